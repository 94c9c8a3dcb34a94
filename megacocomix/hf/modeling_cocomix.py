"""CoCoMix for transformers: a GPT-2 that predicts concepts before block `insertion_layer` and mixes them into its
hidden states.

Needs only torch and transformers. Parameters have Hugging Face GPT-2's names; those of the concept module have the
published code's names.

Shapes: B batch, T new tokens, P cached tokens, N = P + T, S slots (one a token in the blocks below `insertion_layer`,
two a token from it on: the token and its concept), D width, H heads, C concepts, K kept concepts, V vocabulary,
E width of a teacher.

The cache is unusual: it holds one row a token in every block. From `insertion_layer` on, a row holds the keys of both
slots side by side, [B, H, N, 2·D/H]. So every block's cache is as long as the text, for any `insertion_layer`:
generation, beam search and cropping rely on that. Results with and without a cache agree to rounding. The one exception
is a tie: if the last kept concept and the first dropped one have the same logit to rounding, the two may keep different
concepts. If only every n-th token has a slot (`interleave_every`), the other tokens have one too, but nothing attends
to it.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D
from transformers.utils import can_return_tuple

from .configuration_cocomix import CocomixConfig

STANDARDIZE_EPS = 1e-5
# Largest number of weights that are gathered at once for a gradient: 64 MiB in fp32.
MAX_GATHERED = 2**24
# With label smoothing, Trainer shifts the labels only for the classes in this table: others would learn to copy.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["cocomix"] = "CocomixForCausalLM"


def visible_slots(keys_BS, num_queries):
    """The slots that each of the last Q of S slots may attend to: bool [B, 1, Q, S].

    `keys_BS` is False at padding and at slots that a token does not have. A slot attends to the real slots up to
    itself, and always to itself: a padding row that attends to nothing would become NaN, which would spread.
    """
    num_keys = keys_BS.shape[1]
    key = torch.arange(num_keys, device=keys_BS.device)
    query = torch.arange(num_keys - num_queries, num_keys, device=keys_BS.device)[:, None]
    return ((key <= query) & keys_BS[:, None, None]) | (key == query)


def predicting_rows(x_BSD, has_slot_BT1):
    """Slots [B, 2·T, D] → the row of each token that predicts the next one, [B, T, D]: its concept's slot, or the token
    itself if it has none. `has_slot_BT1` is None if all tokens have one."""
    return x_BSD[:, 1::2] if has_slot_BT1 is None else torch.where(has_slot_BT1, x_BSD[:, 1::2], x_BSD[:, ::2])


class CocomixAttention(nn.Module):
    """Causal self-attention [B, S, D] → [B, S, D] of block `layer`, whose tokens have `num_slots` slots each."""

    def __init__(self, config, layer):
        super().__init__()
        self.layer = layer
        self.num_slots = 2 if config.interleaves and layer >= config.insertion_layer else 1
        self.num_heads = config.n_head
        self.c_attn = Conv1D(3 * config.n_embd, config.n_embd)
        self.c_proj = Conv1D(config.n_embd, config.n_embd)
        self.attn_dropout = config.attn_pdrop
        self.resid_dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, x_BSD, visible, cache):
        """`visible` is None if there are no cached slots and no padding: then attention is plainly causal."""
        qkv = self.c_attn(x_BSD).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B, H, S, D/H]
        if cache is not None:
            k, v = cache.update(self._rows(k), self._rows(v), self.layer)
            k, v = self._slots(k), self._slots(v)
        dropout = self.attn_dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, visible, dropout_p=dropout, is_causal=visible is None)
        return self.resid_dropout(self.c_proj(mixed.transpose(1, 2).flatten(2)))

    def _rows(self, x_BHSd):
        """[B, H, T·num_slots, D/H] → one cache row a token, [B, H, T, num_slots·D/H]."""
        return x_BHSd.unflatten(2, (-1, self.num_slots)).flatten(3)

    def _slots(self, x_BHNd):
        """The inverse: [B, H, N, num_slots·D/H] → [B, H, N·num_slots, D/H]."""
        return x_BHNd.unflatten(3, (self.num_slots, -1)).flatten(2, 3)


class CocomixMLP(nn.Module):
    """Two linear layers around a tanh-approximated GELU: [B, S, D] → [B, S, D]."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = Conv1D(4 * config.n_embd, config.n_embd)
        self.c_proj = Conv1D(config.n_embd, 4 * config.n_embd)
        self.dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, x_BSD):
        """[B, S, D] → [B, S, D]."""
        return self.dropout(self.c_proj(F.gelu(self.c_fc(x_BSD), approximate="tanh")))


class CocomixBlock(GradientCheckpointingLayer):
    """A pre-LayerNorm transformer block: [B, S, D] → [B, S, D]."""

    def __init__(self, config, layer):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = CocomixAttention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = CocomixMLP(config)

    def forward(self, x_BSD, visible, past_key_values=None):
        """[B, S, D] → [B, S, D]; adds the new keys and values to the cache. Gradient checkpointing leaves the cache
        out, with a warning: it looks for this name."""
        x_BSD = x_BSD + self.attn(self.ln_1(x_BSD), visible, past_key_values)
        return x_BSD + self.mlp(self.ln_2(x_BSD))


class CocomixHiddenPredictor(nn.Module):
    """Predicts a teacher's hidden state with two layers around a GELU: [B, T, D] → [B, T, E]."""

    def __init__(self, config):
        super().__init__()
        self.up = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.down = nn.Linear(4 * config.n_embd, config.target_size)

    def forward(self, x_BTD):
        """[B, T, D] → [B, T, E]."""
        return self.down(F.gelu(self.up(x_BTD), approximate="tanh"))


class CocomixTopK(nn.Module):
    """Concept logits [B, T, C] → the K largest of each token (values, indices), [B, T, K], largest first. A module, so
    that a forward hook can read or change the kept concepts."""

    def __init__(self, config):
        super().__init__()
        self.num_kept = config.num_kept

    def forward(self, logits_BTC):
        """[B, T, C] → values and indices, [B, T, K]."""
        return logits_BTC.topk(self.num_kept, dim=-1)


def as_rows(weight_DC, index_NK):
    """The weight by rows, [C, D]: a copy if many columns will be read, which are slow to read in place."""
    return weight_DC.T.contiguous() if 4 * index_NK.numel() > weight_DC.shape[1] else weight_DC.T


class WeightedColumns(torch.autograd.Function):
    """weight [D, C], indices and values [N, K] → Σ_k value[n, k] · weight[:, index[n, k]], [N, D].

    Sums are in fp32 and in a fixed order. Nothing of N·K·D numbers is made, and no more is kept for the backward pass
    than the three tensors. In bf16, embedding_bag has no gradient of its values on CUDA before torch 2.13.
    """

    @staticmethod
    def forward(ctx, weight_DC, index_NK, value_NK):
        """→ [N, D], in the weight's dtype, which is that of the values too."""
        ctx.save_for_backward(weight_DC, index_NK, value_NK)
        return F.embedding_bag(index_NK, as_rows(weight_DC, index_NK), mode="sum", per_sample_weights=value_NK)

    @staticmethod
    def backward(ctx, grad_ND):
        """→ gradients of weight and values."""
        weight_DC, index_NK, value_NK = ctx.saved_tensors
        grad_ND, num_kept = grad_ND.contiguous(), index_NK.shape[1]
        grad_DC = grad_NK = None
        if ctx.needs_input_grad[0]:
            # The gradient of column c is a weighted sum too, of the gradients of those tokens that kept c.
            kept, order = index_NK.flatten().sort(stable=True)
            starts_C = torch.searchsorted(kept, torch.arange(weight_DC.shape[1], device=kept.device))
            token, value = order // num_kept, value_NK.flatten()[order]
            grad_DC = F.embedding_bag(token, grad_ND, starts_C, mode="sum", per_sample_weights=value).T
        if ctx.needs_input_grad[2]:
            rows_CD, num_tokens = as_rows(weight_DC, index_NK), max(1, MAX_GATHERED // (num_kept * weight_DC.shape[0]))
            chunks = zip(index_NK.split(num_tokens), grad_ND.unsqueeze(1).split(num_tokens), strict=True)
            grad_NK = torch.cat([torch.bmm(grad, F.embedding(index, rows_CD).mT).squeeze(1) for index, grad in chunks])
        return grad_DC, None, grad_NK


class CocomixCompress(nn.Linear):
    """The K largest logits and their indices, both [B, T, K] → a weighted sum of K columns, [B, T, D]. A module, so
    that the hooks run that load its weights, or read its output."""

    def forward(self, value_BTK, index_BTK=None):
        """[B, T, K] twice → [B, T, D], without a dense product over C. Without indices, values are [B, T, C]."""
        if index_BTK is None:
            return super().forward(value_BTK)
        # Autocast casts both operands of a product, but not those of embedding_bag.
        index_NK, value_NK = index_BTK.flatten(0, 1), value_BTK.flatten(0, 1).to(self.weight.dtype)
        x_ND = WeightedColumns.apply(self.weight, index_NK, value_NK)
        return x_ND.unflatten(0, value_BTK.shape[:2]) + self.bias


class CocomixTransformer(nn.Module):
    """The model without its next-token head."""

    def __init__(self, config):
        super().__init__()
        self.insertion_layer = config.insertion_layer
        self.interleaves, self.every = config.interleaves, config.interleave_every
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.drop = nn.Dropout(config.embd_pdrop)
        self.h = nn.ModuleList([CocomixBlock(config, layer) for layer in range(config.n_layer)])
        if config.predict != "nothing":
            self.pre_bias = nn.Parameter(torch.zeros(config.n_embd))
        self.concept_predictor = self.top_k = self.compress_layer = None
        self.hidden_predictor = self.project_layer = None
        if config.predict == "concepts":
            self.concept_predictor = nn.Linear(config.n_embd, config.num_concepts)
            if config.mix == "predicted":
                self.num_concepts = config.num_concepts
                self.top_k = CocomixTopK(config)
                self.compress_layer = CocomixCompress(config.num_concepts, config.n_embd)
        elif config.predict == "hidden":
            self.hidden_predictor = CocomixHiddenPredictor(config)
            if config.mix == "predicted":
                self.project_layer = nn.Linear(config.target_size, config.n_embd)
        self.pause_vector = nn.Parameter(torch.empty(1, config.n_embd)) if config.mix == "pause" else None
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)

    def forward(self, embeds_BTD, mask_BN, cache, output_hidden_states):
        """Token embeddings [B, T, D] and the mask of all tokens (None: nothing cached, no padding) → (hidden states
        before the head [B, T, D], concept logits [B, T, C] or None, all hidden states or None)."""
        num_tokens = embeds_BTD.shape[1]
        if mask_BN is None and self.interleaves and self.every > 1:
            mask_BN = embeds_BTD.new_ones(embeds_BTD.shape[:2])  # nothing may attend to a slot that a token has not
        if mask_BN is None:
            positions = torch.arange(num_tokens, device=embeds_BTD.device)
            visible, has_slot_BT1 = {1: None, 2: None}, None
        else:
            mask_BN = mask_BN.bool()
            positions_BN = (mask_BN.long().cumsum(-1) - 1).clamp(min=0)
            has_slot_BN = (positions_BN + 1) % self.every == 0
            slots_BS = torch.stack((mask_BN, mask_BN & has_slot_BN), dim=-1).flatten(1)
            positions, has_slot_BT1 = positions_BN[:, -num_tokens:], has_slot_BN[:, -num_tokens:, None]
            visible = {1: visible_slots(mask_BN, num_tokens), 2: visible_slots(slots_BS, 2 * num_tokens)}
        x, concept_logits_BTC, states = self.drop(embeds_BTD + self.wpe(positions)), None, ()
        tokens_of = lambda x: x if x.shape[1] == num_tokens else predicting_rows(x, has_slot_BT1)
        for layer, block in enumerate(self.h):
            if output_hidden_states:
                states += (tokens_of(x),)
            if layer == self.insertion_layer:
                x, concept_logits_BTC = self.mix(x)
            x = block(x, visible[block.attn.num_slots], past_key_values=cache)
        x = self.ln_f(tokens_of(x))
        return x, concept_logits_BTC, (*states, x) if output_hidden_states else None

    def mix(self, x_BTD):
        """Insert each token's concept vector after it, or add it: [B, T, D] → ([B, 2T, D] or [B, T, D], concept logits
        [B, T, C] or None). Statistics are in fp32, with unbiased std and eps outside the root, as in training."""
        vector_BTD, logits_BTC = None, None
        if self.pause_vector is not None:
            vector_BTD = self.pause_vector.expand_as(x_BTD)
        if predict := self.concept_predictor or self.hidden_predictor:
            mean = x_BTD.float().mean(-1, keepdim=True)
            centred_BTD = x_BTD.float() - mean
            std = centred_BTD.std(-1, keepdim=True)
            normed_BTD = (centred_BTD / (std + STANDARDIZE_EPS)).to(x_BTD.dtype)
            prediction = predict(normed_BTD - self.pre_bias)
            logits_BTC = prediction if self.concept_predictor else None
        if self.compress_layer is not None:
            vector_BTD = (self.compress(*self.top_k(logits_BTC)) + self.pre_bias) * std + mean
        elif self.project_layer is not None:
            vector_BTD = (self.project_layer(prediction) + self.pre_bias) * std + mean
        if vector_BTD is None:
            return x_BTD, logits_BTC
        vector_BTD = vector_BTD.to(x_BTD.dtype)
        if not self.interleaves:
            return x_BTD + vector_BTD, logits_BTC
        return torch.stack((x_BTD, vector_BTD), dim=2).flatten(1, 2), logits_BTC

    def compress(self, value_BTK, index_BTK):
        """The K largest logits and their indices, [B, T, K] → the concept vector, [B, T, D]."""
        if isinstance(self.compress_layer, CocomixCompress):
            return self.compress_layer(value_BTK, index_BTK)
        # An adapter around it, say, which reads dense inputs.
        zeros_BTC = value_BTK.new_zeros(*value_BTK.shape[:2], self.num_concepts)
        return self.compress_layer(zeros_BTC.scatter(-1, index_BTK, value_BTK))


@dataclass
class CocomixOutput(CausalLMOutputWithPast):
    """`logits` [B, T, V] has one row a token. `concept_logits` [B, T, C] is None unless asked for and predicted."""

    concept_logits: torch.FloatTensor | None = None


class CocomixForCausalLM(PreTrainedModel, GenerationMixin):
    """CoCoMix with its next-token head, tied to the token embedding."""

    config_class = CocomixConfig
    base_model_prefix = "transformer"
    _supports_sdpa = True
    supports_gradient_checkpointing = True
    _no_split_modules = ["CocomixBlock"]
    _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}

    def __init__(self, config):
        config.check()
        super().__init__(config)
        self.transformer = CocomixTransformer(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.post_init()

    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, Conv1D):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
            nn.init.zeros_(module.bias)
        elif isinstance(module, CocomixTransformer):
            if hasattr(module, "pre_bias"):
                nn.init.zeros_(module.pre_bias)
            if module.pause_vector is not None:
                nn.init.normal_(module.pause_vector, std=self.config.initializer_range)

    def get_input_embeddings(self):
        """The token embedding, tied to the head."""
        return self.transformer.wte

    def set_input_embeddings(self, value):
        """Replace the token embedding."""
        self.transformer.wte = value

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        past_key_values=None,
        inputs_embeds=None,
        labels=None,
        use_cache=None,
        output_hidden_states=None,
        logits_to_keep=0,
        output_concept_logits=False,
        num_items_in_batch=None,
        **unknown,
    ):
        """int64 tokens [B, T] → CocomixOutput.

        - `attention_mask` [B, N]: 0 at padding, over cached and new tokens. Positions are counted from it.
        - `past_key_values`: a DynamicCache, which grows by the new tokens.
        - `inputs_embeds` [B, T, D]: token embeddings, in place of `input_ids`.
        - `labels` [B, T]: usually `input_ids`; -100 is ignored. `loss` is the mean over all tokens but the first, or
          their sum over `num_items_in_batch`, as Trainer asks for when it accumulates gradients.
        - `output_hidden_states`: as GPT-2's, n_layer + 1 entries [B, T, D]: what each block reads, before a concept is
          mixed in, and the head's input. Above `insertion_layer`, the row of a token that predicts the next one.
        - `logits_to_keep`: compute logits only for this many last tokens (0: all), or for these positions.

        Raises ValueError for any other argument, unless it is None or False: there are no attention weights, no
        segments, and no positions but those counted.
        """
        unknown.pop("cache_position", None)  # generate() of transformers 5.0: what the cache says too
        unknown.setdefault("output_attentions", self.config.output_attentions)
        if refused := [name for name, value in unknown.items() if value is not None and value is not False]:
            raise ValueError(f"{type(self).__name__} does not take {', '.join(refused)}.")
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give either input_ids or inputs_embeds.")
        if past_key_values is not None and past_key_values.is_compileable:
            raise ValueError("past_key_values must be a DynamicCache: static caches are not supported.")
        given = input_ids if inputs_embeds is None else inputs_embeds
        batch, num_tokens = given.shape[:2]
        num_cached = past_key_values.get_seq_length() if past_key_values is not None else 0
        if num_cached:
            keys = past_key_values.layers[-1].keys  # of a quantised cache, those not yet quantised: perhaps none
            width = self.transformer.h[-1].attn.num_slots * self.config.n_embd // self.config.n_head
            if keys.numel() and keys.shape[-1] != width:
                raise ValueError(
                    f"past_key_values was not made by this model: the last block's keys have {keys.shape[-1]} numbers, "
                    f"not {width}. Prefix tuning cannot be used with interleaved concepts; prompt tuning can."
                )
        num_all = num_cached + num_tokens
        if num_all > self.config.n_positions:
            raise ValueError(f"{num_all} tokens do not fit the context of {self.config.n_positions}.")
        is_checkpointed = self.training and self.transformer.h[0].gradient_checkpointing
        if num_cached and is_checkpointed:
            raise ValueError("past_key_values cannot be read under gradient checkpointing.")
        if attention_mask is None and num_cached:
            attention_mask = given.new_ones(batch, num_all)
        if attention_mask is not None and attention_mask.shape != (batch, num_all):
            raise ValueError(
                f"attention_mask is {list(attention_mask.shape)}, not {[batch, num_all]}: one row a text, "
                "one column for each cached and each new token."
            )
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if inputs_embeds is None:
            inputs_embeds = self.transformer.wte(input_ids)
        x_BTD, concept_logits_BTC, hidden_states = self.transformer(
            inputs_embeds, attention_mask, past_key_values, output_hidden_states
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits_BTV = self.lm_head(x_BTD[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits_BTV, labels, vocab_size=logits_BTV.shape[-1], num_items_in_batch=num_items_in_batch
            )
        return CocomixOutput(
            loss=loss,
            logits=logits_BTV,
            past_key_values=past_key_values if use_cache and not is_checkpointed else None,
            hidden_states=hidden_states,
            concept_logits=concept_logits_BTC if output_concept_logits else None,
        )
