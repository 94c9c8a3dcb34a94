"""One loss for both heads: cross-entropy against K equally likely labels a row, with a single log-sum-exp.

The next-token loss is the case K = 1; the concept loss (paper Eq. 2) is the mean of K_attr single-label
cross-entropies, which share their normaliser. N rows, V classes.
"""

import torch

MASKED = -1  # a label that means: this row has none
CHUNK_ELEMENTS = 1 << 24  # fp32 scratch of the softmax: 64 MiB at a time, whatever the logits' size and dtype


def label_cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Sum over rows of logsumexp(z) − mean over labels of z[label]; rows whose labels are MASKED count nothing.

    logits […, V] in any float dtype, labels int64 […, K], either all MASKED or all in [0, V) in a row. Returns an fp32
    scalar. The fp32 softmax only ever exists for a chunk of rows; the gradient has the dtype of the logits.
    """
    assert logits.shape[:-1] == labels.shape[:-1], (logits.shape, labels.shape)
    return _LabelCrossEntropy.apply(logits.flatten(0, -2), labels.flatten(0, -2))


class _LabelCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits_NV, labels_NK):
        log_sum_N = torch.empty(logits_NV.shape[0], device=logits_NV.device)
        for rows in _chunks(logits_NV):
            log_sum_N[rows] = logits_NV[rows].float().logsumexp(-1)
        chosen_N = logits_NV.gather(1, labels_NK.clamp(min=0)).float().mean(-1)
        ctx.save_for_backward(logits_NV, labels_NK, log_sum_N)
        return torch.where(labels_NK[:, 0] != MASKED, log_sum_N - chosen_N, 0.0).sum()

    @staticmethod
    def backward(ctx, grad):
        logits_NV, labels_NK, log_sum_N = ctx.saved_tensors
        scale_N1 = torch.where(labels_NK[:, :1] != MASKED, grad.float(), 0.0)
        share_NK = (-scale_N1 / labels_NK.shape[1]).expand_as(labels_NK)
        grad_NV = torch.empty_like(logits_NV)
        for rows in _chunks(logits_NV):
            softmax = (logits_NV[rows].float() - log_sum_N[rows, None]).exp_()
            softmax.mul_(scale_N1[rows]).scatter_add_(1, labels_NK[rows].clamp(min=0), share_NK[rows])
            grad_NV[rows] = softmax
        return grad_NV, None


def _chunks(logits_NV):
    rows = max(1, CHUNK_ELEMENTS // logits_NV.shape[1])
    return (slice(start, start + rows) for start in range(0, logits_NV.shape[0], rows))


def next_token_targets(tokens_BT: torch.Tensor) -> torch.Tensor:
    """int64 [B, T] → [B, T, 1]: the token that follows; the last position of a window has none."""
    targets = tokens_BT.roll(-1, dims=1)
    targets[:, -1] = MASKED
    return targets.unsqueeze(-1)
