"""Tensor-parallel layers, which replace the model's plain modules.

Shapes as in the model, and T2: the positions that a rank holds, which are all S, or with sequence parallelism its 1/n
of them, in order. Between a column and a row layer a rank works on all positions and on its shard of heads, columns,
vocabulary or concepts. Everywhere else (LayerNorm, dropout, residual) it works on its positions and the whole width.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from megacocomix.model.concept import weighted_rows
from megacocomix.model.gpt2 import queries_keys_values
from megacocomix.model.heads import aligned


@dataclass(frozen=True)
class TensorGroup:
    """The tensor ranks of one copy of the model, and the collectives of their layers."""

    group: dist.ProcessGroup
    rank: int
    size: int
    sequence: bool

    def gather_input(self, x: Tensor) -> Tensor:
        """For a column layer: [B, T2, …] → all positions on every rank (an all-gather if they are split). The backward
        pass sums the gradients of all ranks (all-reduce; if positions are split, reduce-scatter)."""
        if self.sequence:
            return _Collective.apply(x, self.all_gather_positions, self.reduce_scatter_positions)
        return _Collective.apply(x, lambda x: x.view_as(x), self.all_reduce)

    def reduce_output(self, x: Tensor) -> Tensor:
        """For a row layer: partial results of all positions → their sum [B, T2, …] (all-reduce; if positions are split,
        reduce-scatter). The backward pass gives every rank the whole gradient."""
        if self.sequence:
            return _Collective.apply(x, self.reduce_scatter_positions, self.all_gather_positions)
        return _Collective.apply(x, self.all_reduce, lambda grad: grad)

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum over the ranks."""
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=self.group)
        return total

    def all_gather(self, x: Tensor) -> Tensor:
        """Every rank's x, stacked in front: [n, …]."""
        gathered = x.new_empty(self.size, *x.shape)
        dist.all_gather_into_tensor(gathered.view(-1), x.flatten(), group=self.group)
        return gathered

    def local_positions(self, x: Tensor) -> Tensor:
        """A tensor that every rank holds whole, [B, S, …] → this rank's positions, [B, T2, …]."""
        return x.chunk(self.size, dim=1)[self.rank] if self.sequence else x

    def all_gather_positions(self, x: Tensor) -> Tensor:
        """[B, S/n, …] → [B, S, …]."""
        return self.all_gather(x).movedim(0, 1).flatten(1, 2)

    def reduce_scatter_positions(self, x: Tensor) -> Tensor:
        """Partial sums [B, S, …] → this rank's positions of the sum, [B, S/n, …]."""
        parts = x.unflatten(1, (self.size, -1)).movedim(1, 0).contiguous()
        own = torch.empty_like(parts[0])
        dist.reduce_scatter_tensor(own.view(-1), parts.view(-1), group=self.group)
        return own

    def combine_losses(self, log_sum_N: Tensor, chosen_N: Tensor) -> tuple[Tensor, Tensor]:
        """The `combine` of losses.label_cross_entropy: log-sum-exps and chosen logits of this rank's classes → those of
        all classes."""
        log_sums_nN, chosen_nN = self.all_gather(torch.stack((log_sum_N, chosen_N))).unbind(1)
        return log_sums_nN.logsumexp(0), chosen_nN.sum(0)


class _Collective(torch.autograd.Function):
    """`on_value` in the forward pass, `on_gradient` in the backward pass."""

    @staticmethod
    def forward(ctx, x, on_value, on_gradient):
        ctx.on_gradient = on_gradient
        return on_value(x)

    @staticmethod
    def backward(ctx, grad):
        return ctx.on_gradient(grad), None, None


@dataclass(frozen=True)
class Shard:
    """The rows that a tensor rank owns, and how many it stores: owned rows first, then padding.

    The number of owned rows differs between ranks by at most one. The number of stored rows is the same on every rank.
    If `padded` (vocabulary and concepts) it is also a multiple of heads.ALIGNMENT, on a single rank too.
    """

    start: int
    stop: int
    stored: int

    @classmethod
    def of(cls, whole: int, num_ranks: int, rank: int, padded: bool) -> "Shard":
        """The shard of one rank, for `whole` rows in total."""
        stored = -(-whole // num_ranks)
        return cls(rank * whole // num_ranks, (rank + 1) * whole // num_ranks, aligned(stored) if padded else stored)

    @property
    def owned(self) -> int:
        """Rows that are not padding."""
        return self.stop - self.start


class ShardedLayer(nn.Module):
    """A rank's shard of a layer. It takes over the plain module's parameters, which are sharded later, when they get
    their values."""

    def __init__(self, plain: nn.Module, group: TensorGroup, shard: Shard | None):
        super().__init__()
        self.group, self.shard = group, shard
        for name, parameter in plain._parameters.items():
            self.register_parameter(name, parameter)


class ColumnParallelLinear(ShardedLayer):
    """A linear layer split by outputs: [B, T2, D] → this rank's columns [B, S, stored]. Those of padding are 0."""

    def forward(self, x):
        return F.linear(self.group.gather_input(x), self.weight, self.bias)


class ColumnParallelQKV(ShardedLayer):
    """model.gpt2.QKV split by heads: [B, T2, D] → queries, keys and values of this rank's heads."""

    def __init__(self, plain: nn.Module, group: TensorGroup, shard: Shard):
        super().__init__(plain, group, shard)
        self.head_size = plain.head_size

    def forward(self, x, every=None):
        return queries_keys_values(self.group.gather_input(x), self.weight, self.bias, self.head_size, every)


class RowParallelLinear(ShardedLayer):
    """A linear layer split by inputs: this rank's columns [B, S, …] → [B, T2, D]."""

    def forward(self, x):
        return self.group.reduce_output(F.linear(x, self.weight)) + self.bias


class VocabParallelEmbedding(ShardedLayer):
    """An embedding split by the tokens of the vocabulary. Each rank looks up its own tokens, then the results are
    summed: int64 [B, T] → [B, T2, D]."""

    def forward(self, tokens_BT):
        place_BT = tokens_BT - self.shard.start
        is_here_BT = (place_BT >= 0) & (place_BT < self.shard.owned)
        rows = F.embedding(torch.where(is_here_BT, place_BT, 0), self.weight)
        return self.group.reduce_output(rows * is_here_BT.unsqueeze(-1))


class PositionEmbedding(ShardedLayer):
    """The whole table on every rank. With sequence parallelism a rank looks up only its own positions."""

    def forward(self, positions_T):
        if self.group.sequence:
            positions_T = positions_T.chunk(self.group.size)[self.group.rank]
        return F.embedding(positions_T, self.weight)


class _Columns(torch.autograd.Function):
    """logits.gather(-1, index). torch's keeps the logits for its backward pass, of which only their shape is used: that
    would be a gigabyte which their loss does not need any more."""

    @staticmethod
    def forward(ctx, logits, index):
        ctx.save_for_backward(index)
        ctx.shape = logits.shape
        return logits.gather(-1, index)

    @staticmethod
    def backward(ctx, grad):
        (index,) = ctx.saved_tensors
        return grad.new_zeros(ctx.shape).scatter_add_(-1, index, grad), None


class PaddedTopK(nn.Module):
    """model.concept.TopK on one rank: only the first `num_concepts` columns of the logits are concepts."""

    def __init__(self, num_kept: int, num_concepts: int):
        super().__init__()
        self.num_kept, self.num_concepts = num_kept, num_concepts

    def forward(self, logits_BTc):
        index_BTK = logits_BTc.detach()[..., : self.num_concepts].topk(self.num_kept, dim=-1).indices
        return _Columns.apply(logits_BTc, index_BTK), index_BTK


class GlobalTopK(nn.Module):
    """The exact K largest of all C concept logits, although each rank has only its own logits.

    Every rank sends its K largest. The K largest of these K·n candidates are the K largest of all.

    Bytes that a rank receives per token, for activations of b bytes: K·n·(b + 4) for the candidates, and one hidden
    vector in RowParallelCompress. The vector is D·b in the forward pass; with sequence parallelism it is D·b/n in the
    forward pass, and its gradient is D·b in the backward pass. The choice itself needs no communication in the backward
    pass: each rank knows which of the K are its own.
    """

    def __init__(self, num_kept: int, group: TensorGroup, shard: Shard):
        super().__init__()
        self.num_kept, self.group, self.shard = num_kept, group, shard

    def forward(self, logits_BTc):
        """This rank's logits [B, T, stored] → (values, rows of this rank's shard), both [B, T, K]. A concept of another
        rank has value 0 and row 0."""
        # All ranks must send the same number of candidates, although some ranks may own one concept less.
        num_candidates = min(self.num_kept, self.shard.stored)
        own_BTc = logits_BTc.detach()[..., : self.shard.owned]
        value_BTK, place_BTK = own_BTc.topk(min(num_candidates, self.shard.owned), dim=-1)
        missing = num_candidates - value_BTK.shape[-1]
        value_BTK = F.pad(value_BTK, (0, missing), value=-torch.inf)
        index_BTK = F.pad(place_BTK + self.shard.start, (0, missing)).int()
        values_BTM = self.group.all_gather(value_BTK).movedim(0, -2).flatten(-2)
        indices_BTM = self.group.all_gather(index_BTK).movedim(0, -2).flatten(-2)
        kept_BTK = indices_BTM.gather(-1, values_BTM.topk(self.num_kept, dim=-1).indices).long()
        is_own_BTK = (kept_BTK >= self.shard.start) & (kept_BTK < self.shard.stop)
        row_BTK = torch.where(is_own_BTK, kept_BTK - self.shard.start, 0)
        return torch.where(is_own_BTK, _Columns.apply(logits_BTc, row_BTK), 0.0), row_BTK


class RowParallelCompress(ShardedLayer):
    """model.concept.Compress split by concepts. Each rank sums its own rows, then the sums of all ranks are added."""

    def forward(self, value_BTK, row_BTK):
        return self.group.reduce_output(weighted_rows(self.weight, row_BTK, value_BTK)) + self.bias
