"""The config of a CoCoMix model for transformers: GPT-2's keys, and those of its concept module."""

from transformers import PretrainedConfig

GPT2 = {
    "vocab_size": 50257,
    "n_positions": 1024,
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
    "embd_pdrop": 0.1,
    "resid_pdrop": 0.1,
    "attn_pdrop": 0.1,
    "layer_norm_epsilon": 1e-5,
    "initializer_range": 0.02,
    "use_cache": True,
}
"""GPT-2's option → default."""
COMMON = {"bos_token_id": 50256, "eos_token_id": 50256, "pad_token_id": 50256, "tie_word_embeddings": True}
"""Option of PretrainedConfig → GPT-2's default."""
METHOD = {
    "predict": "concepts",
    "mix": "predicted",
    "placement": "interleave",
    "interleave_every": 1,
    "insertion_layer": 5,
    "num_concepts": 32768,
    "num_kept": 32,
    "target_size": 768,
}
"""Option of the concept module → default."""
FIRST_OPTIONS = ("insertion_layer", "num_concepts", "num_kept")
"""The only options that folders of the first exports record. Those models have the defaults of the others."""
SIZES = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")
FORMAT = 1
"""Version of what the options mean. A file without `cocomix_format` is of version 1."""
OF_GPT2_ALONE = {
    "activation_function": "gelu_new",
    "n_inner": None,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
}
"""GPT-2's option → the only value that this model has."""
VALID = {
    "predict": ("concepts", "hidden", "nothing"),
    "mix": ("predicted", "pause", "nothing"),
    "placement": ("interleave", "add"),
}


class CocomixConfig(PretrainedConfig):
    """GPT-2's sizes and dropouts under GPT-2's names, and the options in METHOD:

    - `predict`: "concepts", "hidden" (a teacher's hidden state, of width `target_size`) or "nothing";
    - `mix`: "predicted" (the prediction, compressed to one vector), "pause" (a learned vector) or "nothing";
    - `placement`: "interleave" (the vector has a slot after its token) or "add" (it is added to its token);
    - `interleave_every`: only every n-th token has a slot; the others predict the next token themselves;
    - `insertion_layer`: the concept module stands before this block, counted from 0;
    - `num_concepts`: number of concepts that the head predicts;
    - `num_kept`: number of largest logits of a token that make up its concept vector.
    """

    model_type = "cocomix"
    keys_to_ignore_at_inference = ["past_key_values"]
    attribute_map = {
        "hidden_size": "n_embd",
        "max_position_embeddings": "n_positions",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    }

    @property
    def interleaves(self):
        """Whether tokens have slots from `insertion_layer` on."""
        return self.mix != "nothing" and self.placement == "interleave"

    def __init__(self, **kwargs):
        for key, default in (GPT2 | METHOD).items():
            setattr(self, key, kwargs.pop(key, default))
        self.cocomix_format = kwargs.pop("cocomix_format", FORMAT)
        super().__init__(**COMMON | kwargs)
        self.check()

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """The config in a file's values. Raises ValueError if a size or an option is missing: there, a default would be
        another model."""
        given = {cls.attribute_map.get(key, key) for key in config_dict}
        is_first = given.isdisjoint(METHOD.keys() - set(FIRST_OPTIONS))
        if missing := [key for key in (*SIZES, *(FIRST_OPTIONS if is_first else METHOD)) if key not in given]:
            raise ValueError(f"The config lacks {', '.join(missing)}.")
        return super().from_dict(config_dict, **kwargs)

    def check(self):
        """Raises ValueError for values that the model cannot have. The model checks again, because loading sets options
        that were given beside the file."""
        if self.cocomix_format != FORMAT:
            raise ValueError(f"The config has cocomix_format {self.cocomix_format!r}; this code reads {FORMAT}.")
        for key in (*SIZES, *METHOD):
            expected = type((GPT2 | METHOD)[key])
            if type(getattr(self, key)) is not expected:
                raise ValueError(f"{key} {getattr(self, key)!r} is not of type {expected.__name__}.")
        for key, only in OF_GPT2_ALONE.items():
            if (value := getattr(self, key, only)) != only and not (key == "n_inner" and value == 4 * self.n_embd):
                raise ValueError(f"{key} is {value!r}; this model has only {only!r}.")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} is not divisible by n_head {self.n_head}.")
        if not 0 <= self.insertion_layer < self.n_layer:
            raise ValueError(f"insertion_layer {self.insertion_layer} is none of the {self.n_layer} blocks (from 0).")
        for key, valid in VALID.items():
            if getattr(self, key) not in valid:
                raise ValueError(f"{key} {getattr(self, key)!r} is none of {', '.join(valid)}.")
        if self.mix == "predicted" and self.predict == "nothing":
            raise ValueError("mix is predicted, but predict is nothing.")
        if self.predict == "concepts" and not 1 <= self.num_kept <= self.num_concepts:
            raise ValueError(f"num_kept {self.num_kept} must be from 1 to num_concepts {self.num_concepts}.")
        if not 1 <= self.interleave_every <= self.n_positions:
            raise ValueError(
                f"interleave_every {self.interleave_every} must be from 1 to n_positions {self.n_positions}."
            )
