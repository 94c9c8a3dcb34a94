"""Concept labels: the concepts whose growth would change the teacher's loss most, gradient × activation.

Only the K active latents of a position can score, so only their K decoder rows are gathered: nothing of size [B, T, C]
exists but the autoencoder's pre-activations. B batch, T tokens, D teacher width, K active latents, K_attr labels.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from megacocomix.model.losses import MASKED
from megacocomix.teacher.gpt2 import Teacher
from megacocomix.teacher.sae import TopKSAE

CHUNK_ROWS = 1024  # gathers CHUNK_ROWS × K decoder rows at a time: 96 MiB at K 32, D 768


class Attribution(NamedTuple):
    """Latent ids and their signed scores, both [B, T, K]; inactive latents (value 0) score 0."""

    index: Tensor
    score: Tensor


def attribute(teacher: Teacher, sae: TopKSAE, tokens_BT: Tensor) -> Attribution:
    """score = (∂loss/∂h · decoder row) × activation, as in reference concept_extractor.py:97-111: at the true residual,
    times the activation after top-k and ReLU, without the autoencoder's per-token factor std, which changes no
    ranking."""
    hidden_BTD, gradient_BTD = teacher.hidden_and_gradient(tokens_BT)
    index_BTK, value_BTK = sae.encode(hidden_BTD)
    gradient_ND, index_NK = gradient_BTD.flatten(0, 1), index_BTK.flatten(0, 1)
    slope_NK = torch.empty_like(value_BTK.flatten(0, 1))
    for start in range(0, len(index_NK), CHUNK_ROWS):
        rows = slice(start, start + CHUNK_ROWS)
        slope_NK[rows] = torch.einsum("nkd,nd->nk", sae.decoder[index_NK[rows]], gradient_ND[rows])
    return Attribution(index_BTK, slope_NK.view_as(value_BTK) * value_BTK)


def select_labels(attribution: Attribution, num_labels: int, mask_unlabelled: bool) -> Tensor:
    """The `num_labels` best-scoring concepts of each position, int64 [B, T, K_attr].

    With `mask_unlabelled`, a position where fewer than `num_labels` concepts score above 0 (the last one always) has no
    signal and is MASKED; without it, it keeps whatever ids stand there, as in the reference.
    """
    score_BTk, place_BTk = attribution.score.topk(num_labels, dim=-1)
    labels_BTk = attribution.index.gather(-1, place_BTk)
    if not mask_unlabelled:
        return labels_BTk
    return torch.where(score_BTk[..., -1:] > 0, labels_BTk, MASKED)
