"""What a tensor-parallel layer does differently: split stand-ins for the model's plain modules.

Shapes as in the model; T2 marks positions, of which a rank holds all, or with sequence parallelism its 1/n, in order.
Between a column and a row layer every rank works on all positions and on its share of heads, columns, words or
concepts; everywhere else (LayerNorm, dropout, residual) on its positions and on the whole width.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from megacocomix.model.gpt2 import queries_keys_values


@dataclass(frozen=True)
class TensorRanks:
    """The tensor ranks of one model: the two crossings into and out of the region where layers are split."""

    group: dist.ProcessGroup
    rank: int
    size: int
    sequence: bool

    def enter(self, x: Tensor) -> Tensor:
        """[B, T2, …] → all positions on every rank. Backward: the sum of all ranks' gradients, to the holder of each
        position."""
        return _Gather.apply(x, self) if self.sequence else _Copy.apply(x, self)

    def leave(self, x: Tensor) -> Tensor:
        """Partial results of all positions → their sum [B, T2, …]. Backward: its gradient, on every rank."""
        return _Scatter.apply(x, self) if self.sequence else _Reduce.apply(x, self)

    def sum(self, x: Tensor) -> Tensor:
        """Sum over the ranks."""
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=self.group)
        return total

    def stack(self, x: Tensor) -> Tensor:
        """Every rank's x, stacked in front: [n, …]."""
        stacked = x.new_empty(self.size, *x.shape)
        dist.all_gather_into_tensor(stacked.view(-1), x.flatten(), group=self.group)
        return stacked

    def own_positions(self, x: Tensor) -> Tensor:
        """All positions of something that every rank holds whole, [B, S, …] → [B, T2, …]."""
        return x.chunk(self.size, dim=1)[self.rank] if self.sequence else x

    def gather_positions(self, x: Tensor) -> Tensor:
        """[B, S/n, …] → [B, S, …]."""
        return self.stack(x).movedim(0, 1).flatten(1, 2)

    def scatter_positions(self, x: Tensor) -> Tensor:
        """Partial sums [B, S, …] → this rank's positions of the sum, [B, S/n, …]."""
        pieces = x.unflatten(1, (self.size, -1)).movedim(1, 0).contiguous()
        mine = torch.empty_like(pieces[0])
        dist.reduce_scatter_tensor(mine.view(-1), pieces.view(-1), group=self.group)
        return mine

    def join_losses(self, log_sum_N: Tensor, chosen_N: Tensor) -> tuple[Tensor, Tensor]:
        """For losses.label_cross_entropy: log-sum-exps and chosen logits of this rank's classes → of all classes."""
        log_sums_nN, chosen_nN = self.stack(torch.stack((log_sum_N, chosen_N))).unbind(1)
        return log_sums_nN.logsumexp(0), chosen_nN.sum(0)


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, ranks):
        ctx.ranks = ranks
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return ctx.ranks.sum(grad), None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, ranks):
        return ranks.sum(x)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, ranks):
        ctx.ranks = ranks
        return ranks.gather_positions(x)

    @staticmethod
    def backward(ctx, grad):
        return ctx.ranks.scatter_positions(grad), None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, ranks):
        ctx.ranks = ranks
        return ranks.scatter_positions(x)

    @staticmethod
    def backward(ctx, grad):
        return ctx.ranks.gather_positions(grad), None


@dataclass(frozen=True)
class Piece:
    """Which of `whole` rows a tensor rank owns, and how many it stores: owned rows first, then padding.

    Owned rows differ by one at most between ranks. Stored ones are the same on every rank; where rows are words or
    concepts they are also a multiple of 8, which matrix units want.
    """

    start: int
    stop: int
    stored: int

    @classmethod
    def of(cls, whole: int, ranks_size: int, rank: int, padded: bool) -> "Piece":
        """The piece of rank `rank`."""
        stored = -(-whole // ranks_size)
        if padded:
            stored = -(-stored // 8) * 8
        return cls(rank * whole // ranks_size, (rank + 1) * whole // ranks_size, stored)

    @property
    def owned(self) -> int:
        """Rows that are not padding."""
        return self.stop - self.start


class SplitLayer(nn.Module):
    """A layer's piece: takes over the plain module's parameters, which are cut when they get their values."""

    def __init__(self, plain: nn.Module, ranks: TensorRanks, piece: Piece | None):
        super().__init__()
        self.ranks, self.piece = ranks, piece
        for name, parameter in plain._parameters.items():
            self.register_parameter(name, parameter)


class ColumnLinear(SplitLayer):
    """A linear layer split by outputs: [B, T2, D] → this rank's columns [B, S, owned]."""

    def forward(self, x):
        y = F.linear(self.ranks.enter(x), self.weight, self.bias)
        return y if self.piece.owned == self.piece.stored else y[..., : self.piece.owned]


class ColumnQKV(SplitLayer):
    """model.gpt2.QKV split by heads: [B, T2, D] → queries, keys and values of this rank's heads."""

    def __init__(self, plain: nn.Module, ranks: TensorRanks, piece: Piece):
        super().__init__(plain, ranks, piece)
        self.head_size = plain.head_size

    def forward(self, x, every=None):
        return queries_keys_values(self.ranks.enter(x), self.weight, self.bias, self.head_size, every)


class RowLinear(SplitLayer):
    """A linear layer split by inputs: this rank's columns [B, S, …] → [B, T2, D]."""

    def forward(self, x):
        return self.ranks.leave(F.linear(x, self.weight)) + self.bias


class WordEmbedding(SplitLayer):
    """An embedding split by words: each rank looks up its own, all are summed. int64 [B, T] → [B, T2, D]."""

    def forward(self, tokens_BT):
        place_BT = tokens_BT - self.piece.start
        is_here_BT = (place_BT >= 0) & (place_BT < self.piece.owned)
        rows = F.embedding(torch.where(is_here_BT, place_BT, 0), self.weight)
        return self.ranks.leave(rows * is_here_BT.unsqueeze(-1))


class PositionEmbedding(SplitLayer):
    """The whole table on every rank; with sequence parallelism only this rank's positions are looked up."""

    def forward(self, positions_T):
        if self.ranks.sequence:
            positions_T = positions_T.chunk(self.ranks.size)[self.ranks.rank]
        return F.embedding(positions_T, self.weight)


class KeepLargestOfAll(nn.Module):
    """The exact K largest of all C concept logits, though each rank has scored only its own.

    Every rank sends its own K largest, and the K largest of those K·n candidates are the K largest of all: a rank never
    needs more than K.

    Bytes that a rank receives for a token, of activations with b bytes: K·n·(b + 4) candidates, and one hidden vector
    in CompressRows. That is D·b in the forward pass; with sequence parallelism D·b/n there, and its gradient, D·b, in
    the backward pass. The choice itself needs nothing in the backward pass: each rank knows which of the K are its own.
    """

    def __init__(self, num_kept: int, ranks: TensorRanks, piece: Piece):
        super().__init__()
        self.num_kept, self.ranks, self.piece = num_kept, ranks, piece

    def forward(self, logits_BTc):
        """This rank's logits [B, T, owned] → (values, rows of this rank's piece), both [B, T, K]; value 0, row 0 for a
        concept of another rank."""
        # The candidates of all ranks must be of one number, though the last ranks may own one concept less.
        num_candidates = min(self.num_kept, self.piece.stored)
        value_BTK, place_BTK = logits_BTc.detach().topk(min(num_candidates, self.piece.owned), dim=-1)
        missing = num_candidates - value_BTK.shape[-1]
        value_BTK = F.pad(value_BTK, (0, missing), value=-torch.inf)
        index_BTK = F.pad(place_BTK + self.piece.start, (0, missing)).int()
        values_BTM = self.ranks.stack(value_BTK).movedim(0, -2).flatten(-2)
        indices_BTM = self.ranks.stack(index_BTK).movedim(0, -2).flatten(-2)
        kept_BTK = indices_BTM.gather(-1, values_BTM.topk(self.num_kept, dim=-1).indices).long()
        is_mine_BTK = (kept_BTK >= self.piece.start) & (kept_BTK < self.piece.stop)
        row_BTK = torch.where(is_mine_BTK, kept_BTK - self.piece.start, 0)
        return torch.where(is_mine_BTK, logits_BTc.gather(-1, row_BTK), 0.0), row_BTK


class CompressRows(SplitLayer):
    """model.concept.Compress split by concepts: each rank sums the rows it owns, then all sums are added."""

    def forward(self, value_BTK, row_BTK):
        rows = F.embedding_bag(
            row_BTK.flatten(0, 1), self.weight, mode="sum", per_sample_weights=value_BTK.flatten(0, 1)
        )
        return self.ranks.leave(rows.unflatten(0, row_BTK.shape[:2])) + self.bias
