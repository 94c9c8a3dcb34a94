"""One loss for both heads: cross-entropy against K equally likely labels a row, with a single log-sum-exp.

The next-token loss is the case K = 1; the concept loss (paper Eq. 2) is the mean of K_attr single-label
cross-entropies, which share their normaliser. N rows, V classes.
"""

from collections.abc import Callable

import torch

MASKED = -1  # a label that means: this row has none
CHUNK_ELEMENTS = 1 << 24  # fp32 scratch of the softmax: 64 MiB at a time, whatever the logits' size and dtype


def label_cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, first_class: int = 0, join: Callable | None = None
) -> torch.Tensor:
    """Sum over rows of logsumexp(z) − mean over labels of z[label]; rows whose labels are MASKED count nothing.

    logits […, V] in any float dtype, labels int64 […, K], either all MASKED or all in [0, V) in a row. Returns an fp32
    scalar. The fp32 softmax only ever exists for a chunk of rows; the gradient has the dtype of the logits.

    Where the classes are cut in pieces, logits are those of one piece, which begins at `first_class`, and
    `join(log_sum_N, chosen_N)` turns the piece's log-sum-exps, and its part of the labels' mean logits, into the
    whole's.
    """
    assert logits.shape[:-1] == labels.shape[:-1], (logits.shape, labels.shape)
    return _LabelCrossEntropy.apply(logits.flatten(0, -2), labels.flatten(0, -2), first_class, join)


class _LabelCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits_NV, labels_NK, first_class, join):
        log_sum_N = torch.empty(logits_NV.shape[0], device=logits_NV.device)
        for rows in _chunks(logits_NV):
            log_sum_N[rows] = logits_NV[rows].float().logsumexp(-1)
        place_NK = labels_NK - first_class
        is_here_NK = (place_NK >= 0) & (place_NK < logits_NV.shape[1])
        place_NK = torch.where(is_here_NK, place_NK, 0)
        chosen_N = torch.where(is_here_NK, logits_NV.gather(1, place_NK).float(), 0.0).mean(-1)
        if join:
            log_sum_N, chosen_N = join(log_sum_N, chosen_N)
        is_labelled_N = labels_NK[:, 0] != MASKED
        ctx.save_for_backward(logits_NV, place_NK, is_here_NK, is_labelled_N, log_sum_N)
        return torch.where(is_labelled_N, log_sum_N - chosen_N, 0.0).sum()

    @staticmethod
    def backward(ctx, grad):
        logits_NV, place_NK, is_here_NK, is_labelled_N, log_sum_N = ctx.saved_tensors
        scale_N1 = torch.where(is_labelled_N, grad.float(), 0.0)[:, None]
        share_NK = torch.where(is_here_NK, -scale_N1 / place_NK.shape[1], 0.0)
        grad_NV = torch.empty_like(logits_NV, memory_format=torch.contiguous_format)
        for rows in _chunks(logits_NV):
            softmax = (logits_NV[rows].float() - log_sum_N[rows, None]).exp_()
            softmax.mul_(scale_N1[rows]).scatter_add_(1, place_NK[rows], share_NK[rows])
            grad_NV[rows] = softmax
        return grad_NV, None, None, None


def _chunks(logits_NV):
    rows = max(1, CHUNK_ELEMENTS // logits_NV.shape[1])
    return (slice(start, start + rows) for start in range(0, logits_NV.shape[0], rows))


def next_token_targets(tokens_BT: torch.Tensor) -> torch.Tensor:
    """int64 [B, T] → [B, T, 1]: the token that follows; the last position of a window has none."""
    targets = tokens_BT.roll(-1, dims=1)
    targets[:, -1] = MASKED
    return targets.unsqueeze(-1)


def count_labelled(labels_BTk: torch.Tensor) -> torch.Tensor:
    """Number of positions with labels, an int64 scalar on the labels' device."""
    return (labels_BTk[..., 0] != MASKED).sum(dtype=torch.int64)
