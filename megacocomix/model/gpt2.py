"""GPT-2 as in its paper, with one optional part: the concept module before block `insertion_layer`.

Shapes: B batch, T tokens, S positions (T before mixing; after it 2T, or less if not every token gets a slot), D width,
H heads, V vocabulary, C concepts.

The concept module adds positions half-way: later blocks see [h_1, c_1, h_2, c_2, …], and only the concept positions
reach the head. For the other positions the last block computes only keys and values, because nothing else of them is
used. Parameter names never depend on the layout of a run.
"""

import hashlib
import math
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from megacocomix.config.method import MethodConfig
from megacocomix.config.schema import Config, ModelConfig
from megacocomix.model.concept import ConceptMixer, predicting_slots, take_predicting

LAYER_NORM_EPS = 1e-5
# All but cuDNN's, whose gradient with a mask can be NaN for some numbers of positions (pytorch issue 196678).
MASKED_KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
INIT_STD = 0.02


class Embedding(nn.Module):
    """Token plus learned position embedding: int64 [B, T] → [B, T, D]."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        # nn.Embedding(…) would draw random values, which `initialise` replaces.
        self.tokens = nn.Embedding.from_pretrained(torch.empty(config.vocab_size, config.hidden_size), freeze=False)
        self.positions = nn.Embedding.from_pretrained(torch.empty(config.context, config.hidden_size), freeze=False)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, tokens_BT):
        positions_T = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
        return self.dropout(self.tokens(tokens_BT) + self.positions(positions_T))


class QKV(nn.Linear):
    """Queries, keys and values of all heads: [B, S, D] → q [B, H, Q, D/H], k and v [B, H, S, D/H].

    The rows of `weight` lie head by head ([H, 3, D/H]), unlike the Q, K and V blocks of Hugging Face, so that a shard
    by heads is contiguous. The number of heads follows from the weight (-1), because the weight may be a shard.
    """

    def __init__(self, hidden_size: int, head_size: int):
        super().__init__(hidden_size, 3 * hidden_size)
        self.head_size = head_size

    def forward(self, x_BSD, every=None):
        return queries_keys_values(x_BSD, self.weight, self.bias, self.head_size, every)


def queries_keys_values(x_BSD, weight, bias, head_size: int, every: int | None):
    """The result of QKV. With `every`, queries are computed only at the positions that predict the next token."""
    if every is None:
        return F.linear(x_BSD, weight, bias).unflatten(-1, (-1, 3, head_size)).permute(3, 0, 2, 1, 4)
    weight, bias = weight.unflatten(0, (-1, 3, head_size)), bias.unflatten(0, (-1, 3, head_size))
    q = F.linear(take_predicting(x_BSD, every), weight[:, 0].flatten(0, 1), bias[:, 0].flatten())
    kv = F.linear(x_BSD, weight[:, 1:].flatten(0, 2), bias[:, 1:].flatten())
    k, v = kv.unflatten(-1, (-1, 2, head_size)).permute(3, 0, 2, 1, 4)
    return q.unflatten(-1, (-1, head_size)).transpose(1, 2), k, v


class Attention(nn.Module):
    """Causal self-attention [B, S, D] → [B, S, D]. With `every`, only the positions that predict, [B, T, D]."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.qkv = QKV(config.hidden_size, config.hidden_size // config.num_heads)
        self.out = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x_BSD, every=None):
        q, k, v = self.qkv(x_BSD, every)
        head_size, visible_QS = self.qkv.head_size, None
        if every is not None:
            num_slots = k.shape[2]
            slots_Q = predicting_slots(num_slots, every, k.device)
            visible_QS = torch.arange(num_slots, device=k.device) <= slots_Q[:, None]
            if spare := -head_size % 8:  # the GPU kernel for masks needs multiples of 8
                q, k, v = (F.pad(each, (0, spare)) for each in (q, k, v))
        dropout = self.dropout.p if self.training else 0.0
        with nullcontext() if visible_QS is None else sdpa_kernel(MASKED_KERNELS):
            mixed = F.scaled_dot_product_attention(
                q, k, v, visible_QS, dropout, is_causal=visible_QS is None, scale=head_size**-0.5
            )
        return self.dropout(self.out(mixed[..., :head_size].transpose(1, 2).flatten(2)))


class MLP(nn.Module):
    """Two linear layers around a tanh-approximated GELU: [B, S, D] → [B, S, D]."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.up = nn.Linear(config.hidden_size, 4 * config.hidden_size)
        self.down = nn.Linear(4 * config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x_BSD):
        return self.dropout(self.down(F.gelu(self.up(x_BSD), approximate="tanh")))


class Block(nn.Module):
    """A pre-LayerNorm transformer block: [B, S, D] → [B, S, D]. With `every`, only the positions that predict, [B, T,
    D]."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.norm_1 = nn.LayerNorm(config.hidden_size, eps=LAYER_NORM_EPS)
        self.attention = Attention(config)
        self.norm_2 = nn.LayerNorm(config.hidden_size, eps=LAYER_NORM_EPS)
        self.mlp = MLP(config)

    def forward(self, x_BSD, every=None):
        attended = self.attention(self.norm_1(x_BSD), every)
        if every is not None:
            x_BSD = take_predicting(x_BSD, every)
        x_BSD = x_BSD + attended
        return x_BSD + self.mlp(self.norm_2(x_BSD))


class GPT2(nn.Module):
    """The language model, with the concept module before block `insertion_layer` if the method has one.

    A pipeline stage is this class with some parts removed: `embed`, `concept`, `norm` and `head` may be None, and
    `blocks` may hold any consecutive blocks.
    """

    def __init__(self, config: ModelConfig, method: MethodConfig | None = None):
        super().__init__()
        self.embed = Embedding(config)
        self.blocks = nn.ModuleDict({str(index): Block(config) for index in range(config.num_layers)})
        self.last_block = str(config.num_layers - 1)
        self.method = method
        has_module = method is not None and method.has_module
        self.concept = ConceptMixer(config.hidden_size, method) if has_module else None
        self.insertion_layer = method.insertion_layer if has_module else None
        self.every = method.interleave_every if has_module and method.interleaves else None
        self.norm = nn.LayerNorm(config.hidden_size, eps=LAYER_NORM_EPS)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.head.weight = self.embed.tokens.weight

    def forward(self, x):
        """int64 tokens [B, T] → (next-token logits [B, T, V], the concept module's prediction or None).

        Without an embedding, x is the hidden state [B, S, D] from the stage before. Without a head, the hidden state is
        returned instead of logits.
        """
        prediction = None
        if self.embed is not None:
            x = self.embed(x)
        for index, block in self.blocks.items():
            if self.concept is not None and int(index) == self.insertion_layer:
                x, prediction = self.concept(x)
            x = block(x, self.every if index == self.last_block else None)
        if self.head is not None:
            x = self.head(self.norm(x))
        return x, prediction


def assemble(config: Config) -> GPT2:
    """The student of a config, with uninitialised weights."""
    return GPT2(config.model, config.method)


def initial_value(name: str, shape: torch.Size, seed: int, num_layers: int) -> torch.Tensor:
    """GPT-2's initialisation of one parameter, fp32 on the CPU: N(0, 0.02), with a std smaller by √(2·layers) for
    residual projections; biases 0, LayerNorm 1.

    Each parameter has its own generator, seeded by (seed, name), so its values do not depend on other parameters.
    """
    if len(shape) == 1:
        is_gain = "norm" in name and name.endswith(".weight")
        return torch.ones(shape) if is_gain else torch.zeros(shape)
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    is_residual = name.endswith(("attention.out.weight", "mlp.down.weight"))
    std = INIT_STD / math.sqrt(2 * num_layers) if is_residual else INIT_STD
    return torch.empty(shape).normal_(0.0, std, generator=generator)


@torch.no_grad()
def initialise(model: GPT2, seed: int) -> None:
    """Set all parameters of a whole model to their initial values."""
    for name, parameter in model.named_parameters():
        parameter.copy_(initial_value(name, parameter.shape, seed, len(model.blocks)))
