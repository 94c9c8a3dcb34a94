"""The `method` section: CoCoMix, its baselines and its ablations are combinations of a few options, with names.

No other part of the program knows the rows of the paper. It only reads the options.
"""

from typing import Literal

from megacocomix.config.section import NonNegative, NonNegativeFloat, Positive, Section

LabelSource = Literal["attribution", "activation", "random"]
LabelSign = Literal["positive", "negative", "absolute"]
COCOMIX = {
    "predict": "concepts",
    "mix": "predicted",
    "placement": "interleave",
    "label_source": "attribution",
    "concept_weight": 0.1,
    "kd_weight": 0.0,
}
# These options have no meaning without slots, or without attributions. Presets reset them, so that a preset is valid
# on top of any recipe.
WITHOUT_SLOTS = {"interleave_every": 1}
WITHOUT_ATTRIBUTION = {"label_sign": "positive"}
PRESETS = {
    "cocomix": COCOMIX,
    "ntp": COCOMIX | {"predict": "nothing", "mix": "nothing"} | WITHOUT_SLOTS,
    "kd": COCOMIX | {"predict": "nothing", "mix": "nothing", "kd_weight": 0.1} | WITHOUT_SLOTS,
    "pause": COCOMIX | {"predict": "nothing", "mix": "pause"},
    "kd+pause": COCOMIX | {"predict": "nothing", "mix": "pause", "kd_weight": 0.1},
    "cocomix+kd": COCOMIX | {"kd_weight": 0.1},
    "predict-only": COCOMIX | {"mix": "nothing"} | WITHOUT_SLOTS,
    "mix-only": COCOMIX | {"concept_weight": 0.0},
    "add": COCOMIX | {"placement": "add"} | WITHOUT_SLOTS,
    "direct-hidden": COCOMIX | {"predict": "hidden"},
    "activation": COCOMIX | {"label_source": "activation"} | WITHOUT_ATTRIBUTION,
    "random": COCOMIX | {"label_source": "random"} | WITHOUT_ATTRIBUTION,
}
"""method.name → the options of the method section that it sets. The paper's method, its baselines, its ablations."""
ARCHITECTURE = (
    "predict",
    "mix",
    "placement",
    "interleave_every",
    "insertion_layer",
    "num_concepts",
    "num_kept",
    "target_size",
)
"""Options of the method section that decide a model's parameters and computation. Exported folders, converters and
training.init_from keep these options only."""
Preset = Literal[tuple(PRESETS)]


class MethodConfig(Section):
    """What is trained besides the next token: the prediction × what is mixed in × how it is mixed in × the source of
    labels × distillation."""

    name: Preset
    """Sets the options below that are null; an option that is written out wins. ntp is next-token prediction alone,
    cocomix the paper's method; the next table lists what each name sets (a dash: nothing). A name given on the command
    line overrides the options in the recipe, but not the other options on the command line."""
    predict: Literal["concepts", "hidden", "nothing"] | None = None
    """What is predicted from the hidden state before insertion_layer. concepts: logits of the autoencoder's latents.
    hidden: the teacher's hidden state at sae_layer, standardised, by an MLP of two layers (paper §3.3)."""
    mix: Literal["predicted", "pause", "nothing"] | None = None
    """What is mixed into the hidden states there. predicted: the prediction, compressed to one vector. pause: one
    learned vector, the same at every position."""
    placement: Literal["interleave", "add"] | None = None
    """interleave: the vector gets a slot of its own after its token; the slot predicts the next token instead of the
    token. add: the vector is added to the token's hidden state."""
    interleave_every: Positive = 1
    """A slot after every n-th token. The other tokens predict the next token from their own position, and nothing
    else is predicted for them."""
    insertion_layer: NonNegative = 5
    """The concept module runs before this block (0-based); this and later blocks also run on its slots."""
    num_concepts: Positive = 32768
    """Concepts C of the prediction head: the number of latents of the teacher's sparse autoencoder."""
    num_kept: Positive = 32
    """Predicted concepts K kept for the continuous concept (largest raw logits)."""
    num_labels: Positive = 4
    """Concept labels K_attr per position, chosen among the concepts that are active in the teacher there."""
    label_source: LabelSource | None = None
    """How the active concepts are ranked. attribution: by how much the teacher's loss changes as the concept grows.
    activation: by activation (paper §3.3). random: in random order, as a control."""
    label_sign: LabelSign = "positive"
    """Which concepts count under attribution. positive: those that raise the teacher's loss (the published code).
    negative: those that lower it. absolute: both."""
    label_end_of_text: bool = True
    """Whether positions whose token is the tokenizer's end-of-text token are labelled."""
    concept_weight: NonNegativeFloat | None = None
    """Weight λ of the prediction's loss. 0 needs no teacher."""
    hidden_loss: Literal["l1", "l2", "cosine"] = "l2"
    """Distance of a predicted hidden state from the teacher's: mean absolute or squared difference over the width, or
    1 − cosine."""
    target_size: Positive = 768
    """Width of the teacher's hidden state, for predict: hidden."""
    kd_weight: NonNegativeFloat | None = None
    """Weight of the divergence KL(teacher ‖ student) of the next-token distributions, over the whole vocabulary."""
    mask_unlabelled: bool | None = None
    """Leave positions without labels out of the concept loss: the last of a window, and those with fewer than
    num_labels concepts of label_sign. null means true, or false with method.match_reference (the reference trains on
    arbitrary indices there)."""
    match_reference: bool = False
    """Follow the published code where we differ on purpose: null values of model.dropout, method.mask_unlabelled and
    optimizer.decay become the reference's values. A value that is written out wins."""

    def resolved(self) -> "MethodConfig":
        """A copy in which the preset of `name` replaces null."""
        return self.with_defaults(PRESETS[self.name])

    @property
    def learns_concepts(self) -> bool:
        """Whether the prediction of concepts is trained on labels."""
        return self.predict == "concepts" and self.concept_weight > 0

    @property
    def learns_hidden(self) -> bool:
        """Whether the prediction of the teacher's hidden state is trained."""
        return self.predict == "hidden" and self.concept_weight > 0

    @property
    def distills(self) -> bool:
        """Whether the teacher's next-token distribution is learned."""
        return self.kd_weight > 0

    @property
    def has_teacher(self) -> bool:
        """Whether anything is learned from a teacher."""
        return self.learns_concepts or self.learns_hidden or self.distills

    @property
    def has_module(self) -> bool:
        """Whether there is a concept module before insertion_layer."""
        return self.predict != "nothing" or self.mix != "nothing"

    @property
    def is_published(self) -> bool:
        """Whether the concept module has the structure of the published code's."""
        parts = (self.predict, self.mix, self.placement, self.interleave_every)
        return parts == ("concepts", "predicted", "interleave", 1)

    @property
    def interleaves(self) -> bool:
        """Whether slots are put between the tokens."""
        return self.mix != "nothing" and self.placement == "interleave"

    def num_slots(self, num_tokens: int) -> int:
        """Number of slots that this many tokens get, from insertion_layer on."""
        return num_tokens // self.interleave_every if self.interleaves else 0
