"""One loss for both heads: cross-entropy against K equally likely labels per row, with a single log-sum-exp.

The next-token loss is the case K = 1. The concept loss (paper Eq. 2) is the mean of K_attr single-label
cross-entropies, which share their normaliser. Shapes: N rows, V classes. Losses on a teacher's continuous outputs are
in distillation.py.
"""

from collections.abc import Callable, Iterator

import torch

MASKED = -1  # the label of a row that has none
CHUNK_ELEMENTS = 1 << 24  # limits the softmax's fp32 scratch to 64 MiB for logits of any size and dtype


def label_cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, classes: range | None = None, combine: Callable | None = None
) -> torch.Tensor:
    """Sum over rows of logsumexp(z) − mean over labels of z[label]. Rows with MASKED labels add 0.

    logits […, V] have any float dtype. labels are int64 […, K]; a row's labels are either all MASKED or all in [0, V).
    Returns an fp32 scalar. The fp32 softmax exists for one chunk of rows at a time. The gradient has the logits' dtype.

    The first columns of the logits are of `classes`. Columns after them are padding: they have no part in the loss, and
    their gradient is 0. If the classes are sharded, `combine(log_sum_N, chosen_N)` turns this shard's log-sum-exps and
    its part of the labels' mean logits into those of all classes.
    """
    assert logits.shape[:-1] == labels.shape[:-1], (logits.shape, labels.shape)
    classes = range(logits.shape[-1]) if classes is None else classes
    return _LabelCrossEntropy.apply(logits.flatten(0, -2), labels.flatten(0, -2), classes, combine)


class _LabelCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits_NV, labels_NK, classes, combine):
        log_sum_N = torch.empty(logits_NV.shape[0], device=logits_NV.device)
        for rows in row_chunks(*logits_NV.shape):
            log_sum_N[rows] = logits_NV[rows, : len(classes)].float().logsumexp(-1)
        place_NK = labels_NK - classes.start
        is_here_NK = (place_NK >= 0) & (place_NK < len(classes))
        place_NK = torch.where(is_here_NK, place_NK, 0)
        chosen_N = torch.where(is_here_NK, logits_NV.gather(1, place_NK).float(), 0.0).mean(-1)
        if combine:
            log_sum_N, chosen_N = combine(log_sum_N, chosen_N)
        is_labelled_N = labels_NK[:, 0] != MASKED
        ctx.save_for_backward(logits_NV, place_NK, is_here_NK, is_labelled_N, log_sum_N)
        ctx.num_classes = len(classes)
        return torch.where(is_labelled_N, log_sum_N - chosen_N, 0.0).sum()

    @staticmethod
    def backward(ctx, grad):
        logits_NV, place_NK, is_here_NK, is_labelled_N, log_sum_N = ctx.saved_tensors
        scale_N1 = torch.where(is_labelled_N, grad.float(), 0.0)[:, None]
        share_NK = torch.where(is_here_NK, -scale_N1 / place_NK.shape[1], 0.0)
        grad_NV = torch.empty_like(logits_NV, memory_format=torch.contiguous_format)
        for rows in row_chunks(*logits_NV.shape):
            softmax = (logits_NV[rows].float() - log_sum_N[rows, None]).exp_()
            softmax[:, ctx.num_classes :] = 0
            softmax.mul_(scale_N1[rows]).scatter_add_(1, place_NK[rows], share_NK[rows])
            grad_NV[rows] = softmax
        return grad_NV, None, None, None


def row_chunks(num_rows: int, elements_per_row: int) -> Iterator[slice]:
    """Slices of whole rows that cover all rows, with at most CHUNK_ELEMENTS elements each. Their length is a power of
    two, so that a window is divided into the same chunks wherever it is in a batch."""
    rows = 1 << max(1, CHUNK_ELEMENTS // elements_per_row).bit_length() - 1
    return (slice(start, start + rows) for start in range(0, num_rows, rows))


def next_token_targets(tokens_BT: torch.Tensor) -> torch.Tensor:
    """int64 [B, T] → [B, T, 1]: the token that follows. The last position of a window is MASKED."""
    targets = tokens_BT.roll(-1, dims=1)
    targets[:, -1] = MASKED
    return targets.unsqueeze(-1)


def count_labelled(labels_BTk: torch.Tensor) -> torch.Tensor:
    """Number of positions with labels, an int64 scalar on the labels' device."""
    return (labels_BTk[..., 0] != MASKED).sum(dtype=torch.int64)
