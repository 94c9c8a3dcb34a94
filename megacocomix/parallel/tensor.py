"""The sharding plan: the dim along which each parameter is sharded, and the layer that replaces the plain one.

The model's modules do not depend on it. A shard is made from the whole parameter and merged back into it. The padding
of a shard never leaves the process. A single tensor rank has one shard, the whole parameter with its padding.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from megacocomix.model.gpt2 import GPT2
from megacocomix.parallel.layers import (
    ColumnParallelLinear,
    ColumnParallelQKV,
    GlobalTopK,
    PaddedTopK,
    PositionEmbedding,
    RowParallelCompress,
    RowParallelLinear,
    Shard,
    TensorGroup,
    VocabParallelEmbedding,
)


class Rule(NamedTuple):
    """How one module is sharded. Biases of row layers are whole on every rank, and so are all parameters of a module
    whose dim is None."""

    layer: type[nn.Module]
    dim: int | None
    padded: bool = False


PLAN = {
    "embed.tokens": Rule(VocabParallelEmbedding, 0, padded=True),
    "embed.positions": Rule(PositionEmbedding, None),
    "attention.qkv": Rule(ColumnParallelQKV, 0),  # rows lie head by head, so a shard is a number of heads
    "attention.out": Rule(RowParallelLinear, 1),
    "mlp.up": Rule(ColumnParallelLinear, 0),
    "mlp.down": Rule(RowParallelLinear, 1),
    "concept.predict": Rule(ColumnParallelLinear, 0, padded=True),
    "predict_hidden.up": Rule(ColumnParallelLinear, 0),
    "predict_hidden.down": Rule(RowParallelLinear, 1),
    "concept.compress": Rule(RowParallelCompress, 0, padded=True),  # weight by concepts; the bias is whole
    "head": Rule(ColumnParallelLinear, 0, padded=True),  # tied to embed.tokens, so it must be sharded like it
}


def _rule_of(module_path: str) -> Rule | None:
    return next((rule for end, rule in PLAN.items() if f".{module_path}".endswith(f".{end}")), None)


def shard_dim(name: str) -> int | None:
    """The dim along which a parameter is sharded over tensor ranks; None if every rank holds it whole."""
    module_path, _, kind = name.rpartition(".")
    rule = _rule_of(module_path)
    if rule is None or (kind == "bias" and rule.layer not in (ColumnParallelLinear, ColumnParallelQKV)):
        return None
    return rule.dim


def shard_of(name: str, whole: torch.Size, size: int, rank: int) -> Shard:
    """The rows of a sharded parameter that a rank holds along shard_dim."""
    return Shard.of(whole[shard_dim(name)], size, rank, _rule_of(name.rpartition(".")[0]).padded)


def shard(name: str, whole: Tensor, size: int, rank: int) -> Tensor:
    """A rank's shard of a whole parameter (or of one of its moments), padded with zeros. `whole` may also be a slice of
    a safetensors file (`get_slice`), of which only the shard is read."""
    dim = shard_dim(name)
    if dim is None:
        return whole[:]
    shape = list(whole.shape if isinstance(whole, Tensor) else whole.get_shape())
    extent = shard_of(name, shape, size, rank)
    part = whole[(slice(None),) * dim + (slice(extent.start, extent.stop),)]
    if extent.owned == extent.stored:
        return part.contiguous()
    shape[dim] = extent.stored
    padded = part.new_zeros(shape)
    padded.narrow(dim, 0, extent.owned).copy_(part)
    return padded


def unshard(name: str, shards: list[Tensor], whole: torch.Size) -> Tensor:
    """The whole parameter from all ranks' shards, without their padding."""
    dim = shard_dim(name)
    if dim is None:
        return shards[0]
    owned = [shard_of(name, whole, len(shards), rank).owned for rank in range(len(shards))]
    parts = [each.narrow(dim, 0, count) for each, count in zip(shards, owned, strict=True)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)  # of one part, cat would make a copy


def skip_padding(part: GPT2) -> None:
    """For a single tensor rank, whose layers stay plain: let no padding be among the concepts that are kept."""
    if part.concept is not None and part.concept.top_k is not None:
        part.concept.top_k = PaddedTopK(part.concept.top_k.num_kept, len(part.concept.compress.weight))


def parallelize(part: GPT2, group: TensorGroup) -> None:
    """Replace plain layers by tensor-parallel ones. These take over the parameters unsharded: shard them when setting
    their values."""
    for path, module in list(part.named_modules()):
        if (rule := _rule_of(path)) is None:
            continue
        extent = None
        if rule.dim == 0:
            extent = Shard.of(module.weight.shape[0], group.size, group.rank, rule.padded)
        part.set_submodule(path, rule.layer(module, group, extent))
    if part.concept is not None and part.concept.top_k is not None:
        part.concept.top_k = GlobalTopK(part.concept.top_k.num_kept, group, part.concept.compress.shard)
