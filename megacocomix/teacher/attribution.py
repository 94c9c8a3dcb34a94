"""Concept labels: the active concepts of a position with the highest scores. There are three scores:

attribution: gradient × activation, the first-order effect of a concept on the teacher's loss (the method)
activation:  how strongly a concept is active (the paper's ablation, §3.3)
random:      a random number from a seed (a control that the paper lacks)

Only the K active latents of a position have a score, so only their K decoder rows are gathered. No tensor has size
[B, T, C] except the autoencoder's pre-activations. B batch, T tokens, D teacher width, K active latents, K_attr labels.
"""

import hashlib
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from megacocomix.config.method import LabelSign, LabelSource
from megacocomix.model.losses import MASKED, row_chunks
from megacocomix.sae.model import SAE
from megacocomix.teacher.model import Teacher


class Scores(NamedTuple):
    """Latent ids and their scores, both [B, T, K]; inactive latents (value 0) score 0."""

    index: Tensor
    score: Tensor


def attribute(teacher: Teacher, sae: SAE, tokens_BT: Tensor) -> Scores:
    """score = (∂loss/∂h · decoder row) × activation, as in reference concept_extractor.py:97-111.

    The gradient is taken at the true residual, and the activation after top-k and ReLU. The autoencoder's per-token
    scale is left out, because it changes no ranking. The loss is each window's mean; the reference uses the batch's
    mean, which is smaller by the factor B. Scores are fp32, whatever the teacher's dtype."""
    hidden_BTD, gradient_BTD = teacher.hidden_and_gradient(tokens_BT)
    index_BTK, value_BTK = sae.encode(hidden_BTD)
    gradient_ND, index_NK = gradient_BTD.flatten(0, 1).float(), index_BTK.flatten(0, 1)
    slope_NK = torch.empty_like(value_BTK.flatten(0, 1))
    for rows in row_chunks(len(index_NK), index_NK.shape[1] * sae.width):
        slope_NK[rows] = torch.einsum("nkd,nd->nk", sae.decoder[index_NK[rows]], gradient_ND[rows])
    return Scores(index_BTK, slope_NK.view_as(value_BTK) * value_BTK)


def score(teacher: Teacher, sae: SAE, tokens_BT: Tensor, source: LabelSource, seed: int) -> Scores:
    """Scores of the active latents from `source`. Only attribution runs the teacher above the hook point.

    The random scores are uniform in (0, 1]. They depend only on the seed, the window's tokens and a latent's rank among
    the active ones, so every process draws the same scores for a window."""
    if source == "attribution":
        return attribute(teacher, sae, tokens_BT)
    index_BTK, value_BTK = sae.encode(teacher.hidden(tokens_BT))
    if source == "activation":
        return Scores(index_BTK, value_BTK)
    drawn_BTK = torch.stack([_uniform(seed, tokens_T, value_BTK.shape[-1]) for tokens_T in tokens_BT.cpu()])
    return Scores(index_BTK, torch.where(value_BTK > 0, drawn_BTK.to(value_BTK.device), 0.0))


def select_labels(scores: Scores, num_labels: int, mask_unlabelled: bool, sign: LabelSign = "positive") -> Tensor:
    """The `num_labels` concepts of each position with the highest (positive), lowest (negative) or largest absolute
    (absolute) scores, best first, int64 [B, T, K_attr].

    With `mask_unlabelled`, a position is MASKED if fewer than `num_labels` concepts have a score on that side of 0.
    With attribution that is always so at the last position. Without it, the position keeps the ids that topk returns,
    as in the reference."""
    missing = max(0, num_labels - scores.index.shape[-1])  # a ReLU autoencoder may have fewer active latents
    scores = Scores(*(F.pad(each, (0, missing)) for each in scores))
    signed_BTK = {"positive": scores.score, "negative": -scores.score, "absolute": scores.score.abs()}[sign]
    score_BTk, place_BTk = signed_BTK.topk(num_labels, dim=-1)
    labels_BTk = scores.index.gather(-1, place_BTk)
    if not mask_unlabelled:
        return labels_BTk
    return torch.where(score_BTk[..., -1:] > 0, labels_BTk, MASKED)


def _uniform(seed: int, tokens_T: Tensor, num_active: int) -> Tensor:
    digest = hashlib.sha256(f"{seed}/".encode() + tokens_T.numpy().tobytes()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    # One row for each active latent, so that the number of active latents changes no draw. 1 - x is never 0, because
    # score 0 means "not active".
    return 1 - torch.rand(num_active, len(tokens_T), generator=generator).T
