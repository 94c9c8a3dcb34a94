"""The shape of a CoCoMix model for transformers: GPT-2's keys, and those of its concept module."""

from transformers import PretrainedConfig

VALID = {
    "predict": ("concepts", "hidden", "nothing"),
    "mix": ("predicted", "pause", "nothing"),
    "placement": ("interleave", "add"),
}


class CocomixConfig(PretrainedConfig):
    """GPT-2's sizes and dropouts under GPT-2's names, and:

    - `insertion_layer`: concepts are put in before this block, counted from 0;
    - `num_concepts`: concepts that the head scores;
    - `num_kept`: largest scores of a token that become its concept vector;
    - `predict`: "concepts", "hidden" (a teacher's hidden state, of width `target_size`) or "nothing";
    - `mix`: "predicted" (what is predicted, as one vector), "pause" (a learned vector) or "nothing";
    - `placement`: "interleave" (the vector has a slot after its token) or "add" (it is added to its token);
    - `interleave_every`: only every n-th token has a slot; the others predict the next token themselves.
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
        """Whether tokens have slots after them, from `insertion_layer` on."""
        return self.mix != "nothing" and self.placement == "interleave"

    def __init__(
        self,
        vocab_size=50257,
        n_positions=1024,
        n_embd=768,
        n_layer=12,
        n_head=12,
        embd_pdrop=0.1,
        resid_pdrop=0.1,
        attn_pdrop=0.1,
        layer_norm_epsilon=1e-5,
        initializer_range=0.02,
        insertion_layer=5,
        num_concepts=32768,
        num_kept=32,
        predict="concepts",
        mix="predicted",
        placement="interleave",
        interleave_every=1,
        target_size=768,
        use_cache=True,
        bos_token_id=50256,
        eos_token_id=50256,
        pad_token_id=50256,
        tie_word_embeddings=True,
        **kwargs,
    ):
        if n_embd % n_head:
            raise ValueError(f"n_embd {n_embd} is not divisible by n_head {n_head}.")
        if not 0 <= insertion_layer < n_layer:
            raise ValueError(f"insertion_layer {insertion_layer} is none of the {n_layer} blocks (from 0).")
        for key, value in (("predict", predict), ("mix", mix), ("placement", placement)):
            if value not in VALID[key]:
                raise ValueError(f"{key} {value!r} is none of {', '.join(VALID[key])}.")
        if mix == "predicted" and predict == "nothing":
            raise ValueError("mix is predicted, but predict is nothing.")
        if predict == "concepts" and not 1 <= num_kept <= num_concepts:
            raise ValueError(f"num_kept {num_kept} must be from 1 to num_concepts {num_concepts}.")
        if not (isinstance(interleave_every, int) and 1 <= interleave_every <= n_positions):
            raise ValueError(f"interleave_every {interleave_every!r} must be from 1 to n_positions {n_positions}.")
        self.vocab_size = vocab_size
        self.n_positions = n_positions
        self.n_embd = n_embd
        self.n_layer = n_layer
        self.n_head = n_head
        self.embd_pdrop = embd_pdrop
        self.resid_pdrop = resid_pdrop
        self.attn_pdrop = attn_pdrop
        self.layer_norm_epsilon = layer_norm_epsilon
        self.initializer_range = initializer_range
        self.insertion_layer = insertion_layer
        self.num_concepts = num_concepts
        self.num_kept = num_kept
        self.predict = predict
        self.mix = mix
        self.placement = placement
        self.interleave_every = interleave_every
        self.target_size = target_size
        self.use_cache = use_cache
        self.tie_word_embeddings = tie_word_embeddings
        super().__init__(
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            pad_token_id=pad_token_id,
            tie_word_embeddings=tie_word_embeddings,
            **kwargs,
        )
