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
        every = self.interleave_every
        if not (isinstance(every, int) and 1 <= every <= self.n_positions):
            raise ValueError(f"interleave_every {every!r} must be from 1 to n_positions {self.n_positions}.")
        super().__init__(**COMMON | kwargs)
