"""The split table: which parameter is cut along which dim, and which module takes the place of the plain one.

Model files know nothing of it. A parameter is cut from its whole value and joined back to it; what pads a piece never
leaves the process.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from megacocomix.model.gpt2 import GPT2
from megacocomix.parallel.layers import (
    ColumnLinear,
    ColumnQKV,
    CompressRows,
    KeepLargestOfAll,
    Piece,
    PositionEmbedding,
    RowLinear,
    TensorRanks,
    WordEmbedding,
)


class Split(NamedTuple):
    """How one module is split. Parameters with fewer dims than `dim` (biases of row layers), and all of a module whose
    dim is None, are whole on every rank."""

    layer: type[nn.Module]
    dim: int | None
    padded: bool = False


SPLITS = {
    "embed.tokens": Split(WordEmbedding, 0, padded=True),
    "embed.positions": Split(PositionEmbedding, None),
    "attention.qkv": Split(ColumnQKV, 0),  # rows lie head by head, so a cut is a number of heads
    "attention.out": Split(RowLinear, 1),
    "mlp.up": Split(ColumnLinear, 0),
    "mlp.down": Split(RowLinear, 1),
    "concept.predict": Split(ColumnLinear, 0, padded=True),
    "predict_hidden.up": Split(ColumnLinear, 0),
    "predict_hidden.down": Split(RowLinear, 1),
    "concept.compress": Split(CompressRows, 0, padded=True),  # by concepts; its bias is of the width, see split_dim
    "head": Split(ColumnLinear, 0, padded=True),  # tied to embed.tokens: must be cut as it is
}


def _split_of(module_path: str) -> Split | None:
    return next((split for end, split in SPLITS.items() if f".{module_path}".endswith(f".{end}")), None)


def split_dim(name: str) -> int | None:
    """The dim along which a parameter is cut over tensor ranks; None where every rank holds it whole."""
    module_path, _, kind = name.rpartition(".")
    split = _split_of(module_path)
    if split is None or (kind == "bias" and split.layer not in (ColumnLinear, ColumnQKV)):
        return None
    return split.dim


def piece_of(name: str, whole: torch.Size, size: int, rank: int) -> Piece:
    """Which part of a split parameter a rank holds along split_dim."""
    return Piece.of(whole[split_dim(name)], size, rank, _split_of(name.rpartition(".")[0]).padded)


def cut(name: str, whole: Tensor, size: int, rank: int) -> Tensor:
    """A rank's piece of a whole parameter (or of a moment of it), padded with zeros."""
    dim = split_dim(name)
    if size == 1 or dim is None:
        return whole
    piece = piece_of(name, whole.shape, size, rank)
    part = whole.narrow(dim, piece.start, piece.owned)
    if piece.owned == piece.stored:
        return part.contiguous()
    shape = list(whole.shape)
    shape[dim] = piece.stored
    padded = whole.new_zeros(shape)
    padded.narrow(dim, 0, piece.owned).copy_(part)
    return padded


def join(name: str, pieces: list[Tensor], whole: torch.Size) -> Tensor:
    """The whole parameter from all ranks' pieces, without their padding."""
    dim = split_dim(name)
    if len(pieces) == 1 or dim is None:
        return pieces[0]
    owned = [piece_of(name, whole, len(pieces), rank).owned for rank in range(len(pieces))]
    return torch.cat([piece.narrow(dim, 0, count) for piece, count in zip(pieces, owned, strict=True)], dim)


def split_modules(part: GPT2, ranks: TensorRanks) -> None:
    """Put split layers in the place of plain ones. Parameters are taken over as they are: cut them when setting
    values."""
    for path, module in list(part.named_modules()):
        if (split := _split_of(path)) is None:
            continue
        piece = None
        if split.dim == 0:
            piece = Piece.of(module.weight.shape[0], ranks.size, ranks.rank, split.padded)
        _replace(part, path, split.layer(module, ranks, piece))
    if part.concept is not None and part.concept.keep is not None:
        num_kept, piece = part.concept.keep.num_kept, part.concept.compress.piece
        part.concept.keep = KeepLargestOfAll(num_kept, ranks, piece)


def _replace(root: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(root.get_submodule(parent), name, module)
