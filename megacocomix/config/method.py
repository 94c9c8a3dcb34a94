"""The `method` section: CoCoMix, its baselines and ablations as compositions of a few options, and names for them.

No class and no branch of the program knows a row of the paper: everything else asks for the options.
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
# What has no meaning without slots, or without attributions, is reset: a preset is valid over any recipe.
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
"""method.name → the options of the method section that it sets: the paper's method, its baselines, its ablations."""
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
"""Options of the method section that decide which parameters a model has and what it computes: what exported folders,
converters and training.init_from carry of a method."""
Preset = Literal[tuple(PRESETS)]


class MethodConfig(Section):
    """What is trained besides the next token: what is predicted × what is mixed in × how × where labels come from ×
    distillation."""

    name: Preset
    """Sets the options below that are null; one that is written out wins. ntp is none of them, cocomix the method; the
    table under this one says what each name sets. Named on the command line it goes over what the recipe writes out,
    and under the other options of the command line."""
    predict: Literal["concepts", "hidden", "nothing"] | None = None
    """What is predicted from the hidden state before insertion_layer. concepts: logits of the autoencoder's latents.
    hidden: the teacher's hidden state at sae_layer, standardised, by an MLP of two layers (paper §3.3)."""
    mix: Literal["predicted", "pause", "nothing"] | None = None
    """What joins the hidden states there. predicted: what is predicted, compressed to one vector. pause: a learned
    vector, the same everywhere."""
    placement: Literal["interleave", "add"] | None = None
    """interleave: in a slot of its own after its token; the slot predicts the next token in the token's place. add:
    added to the token's hidden state."""
    interleave_every: Positive = 1
    """A slot after every n-th token. The other tokens predict from their own position; nothing is predicted for them
    but the next token."""
    insertion_layer: NonNegative = 5
    """The concept module stands before this block (0-based); this and later blocks run on its slots too."""
    num_concepts: Positive = 32768
    """Concepts C of the prediction head: the number of latents of the teacher's sparse autoencoder."""
    num_kept: Positive = 32
    """Predicted concepts K kept for the continuous concept (largest raw logits)."""
    num_labels: Positive = 4
    """Concept labels K_attr a position, taken from the concepts that are active in the teacher there."""
    label_source: LabelSource | None = None
    """What puts a concept first. attribution: how much its growth would change the teacher's loss. activation: how
    strongly it is active (paper §3.3). random: nothing, which is the control."""
    label_sign: LabelSign = "positive"
    """Which attributions count. positive: of concepts that raise the teacher's loss (the published code). negative:
    that lower it. absolute: either."""
    label_end_of_text: bool = True
    """Whether positions whose token is the tokenizer's end of text are labelled."""
    concept_weight: NonNegativeFloat | None = None
    """Weight λ of the loss of what is predicted. 0 needs no teacher."""
    hidden_loss: Literal["l1", "l2", "cosine"] = "l2"
    """Distance of a predicted hidden state from the teacher's: mean over the width of its absolute or squared
    difference, or 1 − cosine."""
    target_size: Positive = 768
    """Width of the teacher's hidden state, where that is predicted."""
    kd_weight: NonNegativeFloat | None = None
    """Weight of the divergence KL(teacher ‖ student) of the next-token distributions, over the whole vocabulary."""
    mask_unlabelled: bool | None = None
    """Leave positions without a signal (the last of a window; fewer than num_labels concepts on label_sign's side) out
    of the concept loss. null means true, or false with method.match_reference (the reference trains on arbitrary
    indices there)."""
    match_reference: bool = False
    """Follow the published code wherever we differ on purpose: the null defaults of model.dropout,
    method.mask_unlabelled and optimizer.decay take the reference's values. A value that is written out wins."""

    def resolved(self) -> "MethodConfig":
        """With what `name` sets in the place of null."""
        preset = PRESETS[self.name].items()
        return self.model_copy(update={key: value for key, value in preset if getattr(self, key) is None})

    @property
    def learns_concepts(self) -> bool:
        """Whether concepts are predicted against labels."""
        return self.predict == "concepts" and self.concept_weight > 0

    @property
    def learns_hidden(self) -> bool:
        """Whether the teacher's hidden state is predicted against the true one."""
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
        """Whether a concept module stands before insertion_layer."""
        return self.predict != "nothing" or self.mix != "nothing"

    @property
    def is_published(self) -> bool:
        """Whether the published code has such a concept module."""
        parts = (self.predict, self.mix, self.placement, self.interleave_every)
        return parts == ("concepts", "predicted", "interleave", 1)

    @property
    def interleaves(self) -> bool:
        """Whether slots are put between the tokens."""
        return self.mix != "nothing" and self.placement == "interleave"

    def num_slots(self, num_tokens: int) -> int:
        """Slots among this many tokens, from insertion_layer on."""
        return num_tokens // self.interleave_every if self.interleaves else 0
