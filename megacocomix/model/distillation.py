"""Losses on a teacher's continuous outputs: its next-token distribution or its hidden state.

Shapes: N rows, V vocabulary, E width of the teacher.
"""

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from megacocomix.model.heads import FrozenHead
from megacocomix.model.losses import row_chunks


def teacher_divergence(
    logits: Tensor,
    outputs: Tensor,
    head: FrozenHead,
    counts: Tensor,
    num_tokens: int | None = None,
    all_gather: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """KL(teacher ‖ student) over the whole vocabulary (paper §3, appendix A), summed over the rows that count; an fp32
    scalar.

    logits […, V] are the student's, outputs […, E] are the inputs of the teacher's head, counts is bool […]. Logits
    after the first `num_tokens` are padding: they have no part in the loss, and their gradient is 0. If it is None, all
    logits are of tokens. Tokens that the teacher's head lacks have probability 0. The teacher's logits and the fp32
    softmax exist for one chunk of rows at a time. They are computed in the forward pass and again in the backward pass.

    If the vocabulary is sharded, logits and head belong to one shard, and `all_gather(x)` stacks the x of all shards,
    [n, …].
    """
    num_tokens = logits.shape[-1] if num_tokens is None else num_tokens
    rows = logits.flatten(0, -2), outputs.flatten(0, -2), counts.flatten()
    return _Divergence.apply(*rows, head, num_tokens, all_gather)


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits_NV, outputs_NE, counts_N, head, num_tokens, all_gather):
        # For this shard: log-sum-exp of teacher and student, and the mean of (teacher's logit − student's logit) under
        # the teacher's distribution.
        sums_3N = torch.full((3, len(logits_NV)), -torch.inf, device=logits_NV.device)
        sums_3N[2] = 0.0
        for rows in row_chunks(*logits_NV.shape):
            ours = logits_NV[rows, :num_tokens].float()
            sums_3N[1, rows] = ours.logsumexp(-1)
            if head.num_tokens:
                theirs = head.logits(outputs_NE[rows]).float()
                sums_3N[0, rows] = theirs.logsumexp(-1)
                sums_3N[2, rows] = (theirs.softmax(-1) * (theirs - ours[:, : head.num_tokens])).sum(-1)
        shards = all_gather(sums_3N) if all_gather else sums_3N[None]
        log_sums_2N = shards[:, :2].logsumexp(0)
        gap_N = (shards[:, 0].softmax(0) * shards[:, 2]).sum(0)
        ctx.save_for_backward(logits_NV, outputs_NE, counts_N, log_sums_2N)
        ctx.head, ctx.num_tokens = head, num_tokens
        return torch.where(counts_N, gap_N - log_sums_2N[0] + log_sums_2N[1], 0.0).sum()

    @staticmethod
    def backward(ctx, grad):
        logits_NV, outputs_NE, counts_N, (theirs_N, ours_N) = ctx.saved_tensors
        scale_N1 = torch.where(counts_N, grad.float(), 0.0)[:, None]
        head = ctx.head
        grad_NV = torch.empty_like(logits_NV, memory_format=torch.contiguous_format)
        for rows in row_chunks(*logits_NV.shape):
            slope = (logits_NV[rows].float() - ours_N[rows, None]).exp_()
            slope[:, ctx.num_tokens :] = 0
            if head.num_tokens:
                theirs = head.logits(outputs_NE[rows]).float()
                slope[:, : head.num_tokens] -= (theirs - theirs_N[rows, None]).exp_()
            grad_NV[rows] = slope.mul_(scale_N1[rows])
        return grad_NV, None, None, None, None, None


def hidden_distance(predicted: Tensor, target: Tensor, kind: Literal["l1", "l2", "cosine"]) -> Tensor:
    """Distance of predicted hidden states […, E] from the teacher's, summed over rows; an fp32 scalar. The distance is
    the mean over E of the absolute (l1) or squared (l2) difference, or 1 − cosine (paper §3.3)."""
    predicted, target = predicted.float(), target.float()
    if kind == "cosine":
        return (1 - F.cosine_similarity(predicted, target, dim=-1)).sum()
    difference = predicted - target
    return (difference.abs() if kind == "l1" else difference.square()).mean(-1).sum()
