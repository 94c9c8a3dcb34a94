"""The training objective (paper Eq. 4): mean next-token loss + λ · mean concept loss.

Means are over the global batch, not over a micro-batch: each micro-batch divides its sums by the global counts, so the
result does not depend on how the batch was cut, even where masked positions are spread unevenly.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from megacocomix.model.losses import label_cross_entropy, next_token_targets


class BatchLoss(NamedTuple):
    """This micro-batch's share of the global means; summed over micro-batches and data ranks they are the loss."""

    total: Tensor
    """Scalar with a graph."""
    next_token: Tensor
    """Detached scalar."""
    concept: Tensor | None
    """Detached scalar, before λ; None without a concept module."""


def batch_loss(
    logits_BTV: Tensor,
    concept_logits_BTC: Tensor | None,
    tokens_BT: Tensor,
    labels_BTk: Tensor | None,
    num_targets: int | Tensor,
    num_labelled: int | Tensor,
    concept_weight: float,
) -> BatchLoss:
    """Both losses of a micro-batch. num_targets and num_labelled count the positions of the global batch that have a
    next token, and that have concept labels."""
    next_token = label_cross_entropy(logits_BTV, next_token_targets(tokens_BT)) / num_targets
    if concept_logits_BTC is None:
        return BatchLoss(next_token, next_token.detach(), None)
    concept = label_cross_entropy(concept_logits_BTC, labels_BTk) / num_labelled
    return BatchLoss(next_token + concept_weight * concept, next_token.detach(), concept.detach())


def count_labelled(labels_BTk: Tensor) -> Tensor:
    """Number of positions with labels, an int64 scalar on the labels' device."""
    return (labels_BTk[..., 0] >= 0).sum(dtype=torch.int64)
