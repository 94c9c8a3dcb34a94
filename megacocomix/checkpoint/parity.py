"""Runs two descriptions of a model on the same random tokens and measures the difference of their logits and losses.

Both models run block by block; only the current block of each is in memory. Ours runs on this package's modules. Theirs
runs on transformers' GPT-2 blocks, with weights in Hugging Face's names. Its concept module is implemented as in the
published code: dense, with a mask instead of a list of kept rows.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megacocomix.checkpoint.external.source import Source
from megacocomix.config.method import MethodConfig
from megacocomix.config.schema import ModelConfig
from megacocomix.errors import UserError
from megacocomix.model.gpt2 import GPT2, LAYER_NORM_EPS

TOLERANCE = 1e-4
SEED = 0
CHUNK = 64  # positions whose logits are in memory at a time
Read = Callable[[str], Tensor]


@dataclass(frozen=True)
class Difference:
    """Largest difference of a logit, difference of the mean losses, and the number of tokens compared."""

    logit: float
    loss: float
    num_tokens: int

    def check(self, what: str) -> None:
        """Raises UserError above TOLERANCE, or if either model gave NaN."""
        if math.isinf(self.logit):
            raise UserError(f"{what}: the source gives numbers that are not finite; nothing was written.")
        for name, value in (("logits", self.logit), ("loss", self.loss)):
            if not value <= TOLERANCE:
                raise UserError(f"{what}: {name} of the converted model differ by {value:.1e}; nothing was written.")


@torch.no_grad()
def measure(source: Source, result: Source) -> Difference:
    """Run both on two random sequences of full length. One that has `read_hf` runs on
    transformers' modules, any other on ours."""
    shape = source.shape
    tokens = torch.randint(shape.vocab_size, (2, shape.context), generator=torch.Generator().manual_seed(SEED))
    hidden, heads = [], []
    for side in (source, result):
        run, read = (_ours, side.read) if side.read_hf is None else (_theirs, side.read_hf)
        hidden.append(run(shape, side.method, read, tokens))
        heads.append(read("embed.tokens.weight" if run is _ours else "transformer.wte.weight"))
    largest, losses, count = 0.0, [0.0, 0.0], 0
    for start in range(0, shape.context, CHUNK):
        logits = [h[:, start : start + CHUNK] @ head.T for h, head in zip(hidden, heads, strict=True)]
        largest = max(largest, _or_infinite((logits[0] - logits[1]).abs().max().item()))
        targets = tokens[:, start + 1 : start + 1 + CHUNK]
        for index, each in enumerate(logits):
            each = each[:, : targets.shape[1]].flatten(0, 1).double()
            losses[index] += F.cross_entropy(each, targets.flatten(), reduction="sum").item()
        count += targets.numel()
    return Difference(largest, _or_infinite(abs(losses[0] - losses[1]) / count), tokens.numel())


def _or_infinite(value: float) -> float:
    return math.inf if math.isnan(value) else value  # NaN is above every tolerance


def _ours(shape: ModelConfig, method: MethodConfig, read: Read, tokens: Tensor) -> Tensor:
    """Hidden states before the head, [B, T, D]."""
    with torch.device("meta"):
        model = GPT2(shape, method).eval()

    def load(name: str) -> torch.nn.Module:
        module = model.get_submodule(name)
        names = [own for own, _ in module.named_parameters()]
        module.load_state_dict({own: read(f"{name}.{own}") for own in names}, assign=True)
        return module

    x = load("embed")(tokens)
    for index in range(shape.num_layers):
        if method.has_module and index == method.insertion_layer:
            x, _ = load("concept")(x)
        x = load(f"blocks.{index}")(x, model.every if str(index) == model.last_block else None)
        del model.blocks[str(index)]
    return load("norm")(x)


def _theirs(shape: ModelConfig, method: MethodConfig, read: Read, tokens: Tensor) -> Tensor:
    from transformers import GPT2Config
    from transformers.models.gpt2.modeling_gpt2 import GPT2Block

    config = GPT2Config(
        n_embd=shape.hidden_size,
        n_head=shape.num_heads,
        n_positions=2 * shape.context,
        layer_norm_epsilon=LAYER_NORM_EPS,
        attn_implementation="sdpa",  # causal without a mask
    )
    x = read("transformer.wte.weight")[tokens] + read("transformer.wpe.weight")[: tokens.shape[1]]
    for index in range(shape.num_layers):
        if method.has_module and index == method.insertion_layer:
            x = _published_mixing(x, read, method.num_kept)
        block = GPT2Block(config, layer_idx=index).eval()
        names = [name for name, _ in block.named_parameters()]
        block.load_state_dict({name: read(f"transformer.h.{index}.{name}") for name in names}, strict=False)
        x = block(x)
        x = x[0] if isinstance(x, tuple) else x
    x = x[:, 1::2] if method.has_module else x
    return F.layer_norm(x, x.shape[-1:], read("transformer.ln_f.weight"), read("transformer.ln_f.bias"), LAYER_NORM_EPS)


def _published_mixing(x_BTD: Tensor, read: Read, num_kept: int) -> Tensor:
    """[B, T, D] → [B, 2T, D]: each token's concept is inserted after it."""
    get = lambda name: read(f"transformer.{name}")
    mean = x_BTD.mean(-1, keepdim=True)
    std = x_BTD.std(-1, keepdim=True)
    normed = (x_BTD - mean) / (std + 1e-5)
    logits = F.linear(normed - get("pre_bias"), get("concept_predictor.weight"), get("concept_predictor.bias"))
    mask = torch.zeros_like(logits).scatter_(-1, logits.topk(num_kept, dim=-1).indices, 1.0)
    concept = F.linear(logits * mask, get("compress_layer.weight"), get("compress_layer.bias")) + get("pre_bias")
    batch, length, width = x_BTD.shape
    mixed = x_BTD.new_empty(batch, 2 * length, width)
    mixed[:, 0::2], mixed[:, 1::2] = x_BTD, concept * std + mean
    return mixed
