"""Heads in memory: the alignment of their rows, and the frozen head of a teacher with its next-token loss.

Shapes: N rows, D width, V vocabulary.
"""

import torch
import torch.nn.functional as F

from megacocomix.model.losses import MASKED, row_chunks

ALIGNMENT = 64  # a GPU's matrix units need operands whose rows are a multiple of 16 bytes, and prefer 128


def aligned(num_rows: int) -> int:
    """The number of rows that a head's weight has in memory: the next multiple of ALIGNMENT."""
    return -(-num_rows // ALIGNMENT) * ALIGNMENT


class FrozenHead:
    """The head of a frozen model, or a shard of it, which no optimizer holds. `weight` [V or more, D] and `bias` (None
    if there is none) have `num_tokens` rows of tokens, then rows of zeros up to a multiple of ALIGNMENT."""

    def __init__(self, weight_VD: torch.Tensor, bias_V: torch.Tensor | None):
        self.num_tokens = len(weight_VD)
        self.weight, self.bias = (None if each is None else _pad_rows(each) for each in (weight_VD, bias_V))

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[…, D] → […, V], a view of what was computed: with the padding."""
        return F.linear(hidden, self.weight, self.bias)[..., : self.num_tokens]

    def rows(self, start: int, stop: int) -> "FrozenHead":
        """The head of tokens [start, stop) of the vocabulary, or of those among them that it has."""
        own = slice(start, min(stop, self.num_tokens))
        return FrozenHead(self.weight[own], None if self.bias is None else self.bias[own])


def _pad_rows(x: torch.Tensor) -> torch.Tensor:
    missing = aligned(len(x)) - len(x)
    return torch.cat((x, x.new_zeros(missing, *x.shape[1:]))) if missing else x


def frozen_head_loss(hidden_ND: torch.Tensor, head: FrozenHead, targets_N: torch.Tensor) -> torch.Tensor:
    """Sum over rows of −log softmax(logits)[target], an fp32 scalar. Rows with a MASKED target add 0. Only `hidden`
    gets a gradient.

    The head is frozen, so the forward pass already computes each chunk's gradient from its logits. Logits and their
    gradient exist for one chunk of rows at a time, for any N.
    """
    return _FrozenHeadLoss.apply(hidden_ND, head, targets_N)


class _FrozenHeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_ND, head, targets_N):
        total = torch.zeros((), device=hidden_ND.device)
        grad_ND = torch.empty_like(hidden_ND) if ctx.needs_input_grad[0] else None
        for rows in row_chunks(len(hidden_ND), len(head.weight)):
            logits = F.linear(hidden_ND[rows], head.weight, head.bias)
            logits[:, head.num_tokens :] = -torch.inf  # so that softmax and slope are 0 there
            target_N1, is_target_N1 = targets_N[rows, None].clamp(min=0), (targets_N[rows] != MASKED)[:, None]
            if grad_ND is None:
                log_p_N1 = logits.log_softmax(-1, dtype=torch.float32).gather(1, target_N1)
            else:
                # A single softmax pass over [rows, V]: on a CPU each pass costs a tenth of the matrix product. A
                # probability too small for fp32 counts as the smallest normal fp32 number, a loss of 87.
                p = logits.softmax(-1, dtype=torch.float32)
                log_p_N1 = p.gather(1, target_N1).clamp(min=torch.finfo(p.dtype).tiny).log()
                # Subtract the 1 in fp32: near a probability of 1, bf16 would leave only rounding errors.
                slope = p.scatter_add_(1, target_N1, -torch.ones_like(log_p_N1))
                grad_ND[rows] = torch.where(is_target_N1, slope.to(head.weight.dtype) @ head.weight, 0.0)
            total -= torch.where(is_target_N1, log_p_N1, 0.0).sum()
        ctx.save_for_backward(grad_ND)
        return total

    @staticmethod
    def backward(ctx, grad):
        (grad_ND,) = ctx.saved_tensors
        return grad_ND * grad.to(grad_ND.dtype), None, None
