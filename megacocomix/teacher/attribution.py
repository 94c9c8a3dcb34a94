"""Concept labels: of the concepts active at a position, those that the chosen score puts first.

attribution: how much a concept's growth would change the teacher's loss, gradient × activation (the method)
activation:  how strongly it is active (the paper's ablation, §3.3)
random:      nothing: any active concepts, drawn from a seed (the control that the paper lacks)

Only the K active latents of a position can score, so only their K decoder rows are gathered: nothing of size [B, T, C]
exists but the autoencoder's pre-activations. B batch, T tokens, D teacher width, K active latents, K_attr labels.
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
    """score = (∂loss/∂h · decoder row) × activation, as in reference concept_extractor.py:97-111: at the true residual,
    times the activation after top-k and ReLU, without the autoencoder's per-token scale, which changes no ranking. The
    loss is each window's mean; the reference's is the batch's, smaller by the factor B. fp32, whatever the
    teacher's."""
    hidden_BTD, gradient_BTD = teacher.hidden_and_gradient(tokens_BT)
    index_BTK, value_BTK = sae.encode(hidden_BTD)
    gradient_ND, index_NK = gradient_BTD.flatten(0, 1).float(), index_BTK.flatten(0, 1)
    slope_NK = torch.empty_like(value_BTK.flatten(0, 1))
    for rows in row_chunks(len(index_NK), index_NK.shape[1] * sae.width):
        slope_NK[rows] = torch.einsum("nkd,nd->nk", sae.decoder[index_NK[rows]], gradient_ND[rows])
    return Scores(index_BTK, slope_NK.view_as(value_BTK) * value_BTK)


def activate(teacher: Teacher, sae: SAE, tokens_BT: Tensor) -> Scores:
    """score = activation. Nothing above the cut is run."""
    return Scores(*sae.encode(teacher.hidden(tokens_BT)))


def draw(teacher: Teacher, sae: SAE, tokens_BT: Tensor, seed: int) -> Scores:
    """score = a number drawn uniformly from (0, 1), a function of the seed, the window's tokens and the place among the
    active latents: whoever labels a window, whenever, draws the same."""
    index_BTK, value_BTK = sae.encode(teacher.hidden(tokens_BT))
    drawn_BTK = torch.stack([_uniform(seed, tokens_T, value_BTK.shape[-1]) for tokens_T in tokens_BT.cpu()])
    return Scores(index_BTK, torch.where(value_BTK > 0, drawn_BTK.to(value_BTK.device), 0.0))


def score(teacher: Teacher, sae: SAE, tokens_BT: Tensor, source: LabelSource, seed: int) -> Scores:
    """Scores of the active latents from `source`; the seed is for random alone."""
    if source == "random":
        return draw(teacher, sae, tokens_BT, seed)
    return attribute(teacher, sae, tokens_BT) if source == "attribution" else activate(teacher, sae, tokens_BT)


def select_labels(scores: Scores, num_labels: int, mask_unlabelled: bool, sign: LabelSign = "positive") -> Tensor:
    """The `num_labels` concepts of each position that score highest (positive), lowest (negative) or furthest from 0
    (absolute), best first, int64 [B, T, K_attr].

    With `mask_unlabelled`, a position where fewer than `num_labels` concepts score on that side of 0 (with attribution
    the last one always) has no signal and is MASKED; without it, it keeps whatever ids stand there, as in the
    reference."""
    missing = max(0, num_labels - scores.index.shape[-1])  # of a ReLU autoencoder that is hardly active anywhere
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
    # A row a place, so that a place draws the same however many there are; never 0, which would mean: not active.
    return 1 - torch.rand(num_active, len(tokens_T), generator=generator).T
