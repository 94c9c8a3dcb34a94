"""Measures steered texts. The judge is the teacher, which reads prompt and continuation as one text: its autoencoder
gives the activation of the steered concept's latent on the new tokens, and its head gives their probability.

Steering a concept succeeds if this activation is above that of the unsteered texts. There are two controls, on texts of
the same prompts and seeds:

others: the latent of another concept, on the same texts. It shows the effect of any disturbance on a latent.
rank:   the concept's latent, on the texts steered by other concepts: the share of them in which it is less active.
        By chance this is a half, and it does not depend on the few unsteered texts.

All means are over tokens: a text that ends early counts with the tokens it has, its end of text included.

Shapes: B texts, G of them at a time, T tokens of a text, N new ones, S scales, C concepts that are steered, L latents
of the autoencoder, K of them active, V vocabulary.
"""

import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from megacocomix.evaluation.perplexity import perplexity
from megacocomix.sae.model import SAE
from megacocomix.teacher.labels import in_chunks
from megacocomix.teacher.model import Teacher

PER_CONCEPT = ("activation", "active", "promoted", "kept")
"""Fields of `Sums` that are measured for each concept."""
JUDGED_TEXTS = 512
"""Texts that are judged together. It bounds the memory."""


class Text(NamedTuple):
    """A continuation of a prompt."""

    tokens: list[int]
    kl: list[float]
    """KL of each step, in nats."""
    kept: Counter[int]
    """Number of steps at which each concept was kept."""


class Sums(NamedTuple):
    """Sums over the new tokens of the texts of a setting. The unsteered setting comes first, then all concepts at the
    first scale, then all at the second, …: arrays [1 + S·C], or [1 + S·C, C] for the fields in PER_CONCEPT."""

    tokens: np.ndarray
    loss: np.ndarray
    """The teacher's loss, in nats."""
    kl: np.ndarray
    activation: np.ndarray
    active: np.ndarray
    """Number of tokens at which the latent is active."""
    promoted: np.ndarray
    """Number of tokens that are among those the concept promotes most."""
    kept: np.ndarray


def judge(
    teacher: Teacher,
    sae: SAE,
    vocab_size: int,
    prompts: list[list[int]],
    texts: list[Text],
    concepts: list[int],
    promoted: np.ndarray,
) -> Sums:
    """Measure the texts with the teacher, and count the other fields of `Sums`. `promoted` has token ids, [C, any]."""
    # A few settings at a time: [all tokens, all concepts] would not fit in memory.
    size = len(prompts) * max(1, JUDGED_TEXTS // len(prompts))
    parts = [
        _judge(teacher, sae, vocab_size, prompts, texts[start : start + size], concepts, promoted)
        for start in range(0, len(texts), size)
    ]
    return Sums(*map(np.concatenate, zip(*parts, strict=True)))


@torch.no_grad()
def _judge(teacher, sae, vocab_size, prompts, texts, concepts, promoted) -> Sums:
    num_before, num_new = len(prompts[0]), max(len(text.tokens) for text in texts)
    rows = zip(prompts * (len(texts) // len(prompts)), texts, strict=True)
    # Padding is on the right, where attention is causal and no real token sees it.
    padded = [prompt + text.tokens + [0] * (num_new - len(text.tokens)) for prompt, text in rows]
    device = sae.decoder.device
    tokens_BT, ids_C = torch.tensor(padded, device=device), torch.tensor(concepts, device=device)

    def read(tokens_GT: Tensor) -> Tensor:
        """[G, T] → [G, N, 1 + C]: the loss, and the activation of each concept's latent."""
        logits_GNV = teacher.logits(tokens_GT)[:, num_before - 1 : -1, :vocab_size].float()
        loss_GN = F.cross_entropy(logits_GNV.transpose(1, 2), tokens_GT[:, num_before:], reduction="none")
        index_GNK, value_GNK = sae.encode(teacher.hidden(tokens_GT)[:, num_before:])
        latent_GNL = torch.zeros(*loss_GN.shape, sae.num_latents, device=device)
        latent_GNL.scatter_add_(-1, index_GNK, value_GNK)
        return torch.cat((loss_GN[..., None], latent_GNL[..., ids_C]), dim=-1)

    found_BNx = in_chunks(tokens_BT, tokens_BT.shape[1], read).double().cpu().numpy()
    new_BN = tokens_BT[:, num_before:].cpu().numpy()
    length_B = np.array([len(text.tokens) for text in texts])
    is_new_BN = np.arange(num_new) < length_B[:, None]
    latent_BNC = found_BNx[..., 1:] * is_new_BN[..., None]
    is_promoted_VC = np.zeros((vocab_size, len(concepts)), bool)
    is_promoted_VC[promoted.T, np.arange(len(concepts))] = True
    # A setting has one text per prompt, in adjacent rows.
    pool = lambda x_Bx: x_Bx.reshape(-1, len(prompts), *x_Bx.shape[1:]).sum(1)
    return Sums(
        tokens=pool(length_B),
        loss=pool((found_BNx[..., 0] * is_new_BN).sum(1)),
        kl=pool(np.array([sum(text.kl) for text in texts])),
        activation=pool(latent_BNC.sum(1)),
        active=pool((latent_BNC > 0).sum(1)),
        promoted=pool((is_promoted_VC[new_BN] & is_new_BN[..., None]).sum(1)),
        kept=pool(np.array([[text.kept[concept] for concept in concepts] for text in texts])),
    )


def summarise(sums: Sums, scales: Sequence[float]) -> dict:
    """Means of the unsteered texts and of each scale, and for how many concepts a scale is above the unsteered texts.
    `concepts` in the result has lists in the order of the concepts."""
    first = {name: getattr(sums, name)[0] / sums.tokens[0] for name in PER_CONCEPT}
    num_concepts = len(first["activation"])
    following = np.roll(np.arange(num_concepts), -1)
    steered = []
    for place, scale in enumerate(scales):
        at = slice(1 + place * num_concepts, 1 + (place + 1) * num_concepts)
        tokens_C = sums.tokens[at]
        means = {name: getattr(sums, name)[at] / tokens_C[:, None] for name in PER_CONCEPT}
        own = {name: np.diagonal(mean_CC) for name, mean_CC in means.items()}
        others_C = means["activation"][np.arange(num_concepts), following]
        rank_C = ranks(means["activation"])
        loss_C = sums.loss[at] / tokens_C
        values = own | {"others": others_C, "rank": rank_C, "loss": loss_C, "kl": sums.kl[at] / tokens_C}
        steered.append(
            {
                "scale": scale,
                "num_tokens": int(tokens_C.sum()),
                "activation": compare(own["activation"], first["activation"]),
                "others": compare(others_C, first["activation"][following]) if num_concepts > 1 else None,
                "promoted": compare(own["promoted"], first["promoted"]),
                "rank": mean_and_error(rank_C),
                "active": float(own["active"].mean()),
                "kept": float(own["kept"].mean()),
                "perplexity": perplexity(float(sums.loss[at].sum() / tokens_C.sum())),
                "loss": mean_and_error(loss_C),
                "kl": float(sums.kl[at].sum() / tokens_C.sum()),
                "concepts": {name: _rounded(each) for name, each in values.items()},
            }
        )
    loss = float(sums.loss[0] / sums.tokens[0])
    unsteered = {"num_tokens": int(sums.tokens[0]), "perplexity": perplexity(loss), "loss": loss}
    unsteered |= {name: float(each.mean()) for name, each in first.items()}
    return {"unsteered": unsteered | {"concepts": {n: _rounded(e) for n, e in first.items()}}, "steered": steered}


def compare(steered_C: np.ndarray, unsteered_C: np.ndarray) -> dict:
    """For how many concepts a number rose or fell, with a two-sided sign test. The test assumes independent concepts,
    although all are compared with the same few unsteered texts; `rank` is a sharper test. Then the mean over concepts,
    its difference from the unsteered mean with the standard error over concepts, and the ratio of the two means, None
    if the unsteered mean is 0."""
    difference_C = steered_C - unsteered_C
    raised, lowered = int((difference_C > 0).sum()), int((difference_C < 0).sum())
    change, base = mean_and_error(difference_C), float(unsteered_C.mean())
    return {
        "raised": raised,
        "lowered": lowered,
        "equal": len(difference_C) - raised - lowered,
        "p_value": sign_test(raised, lowered),
        "mean": float(steered_C.mean()),
        "difference": change["mean"],
        "standard_error": change["standard_error"],
        "ratio": float(steered_C.mean()) / base if base else None,
    }


def sign_test(raised: int, lowered: int) -> float:
    """The probability of a split at least this uneven if up and down are equally likely; two-sided, without ties."""
    total, fewer = raised + lowered, min(raised, lowered)
    return min(1.0, 2 * sum(math.comb(total, count) for count in range(fewer + 1)) / 2**total)


def ranks(mean_CC: np.ndarray) -> np.ndarray:
    """Means [steered concept, latent] → for each concept, the share of the other concepts' texts in which its latent is
    less active than in its own texts; a tie counts half. [C], NaN for a single concept."""
    own_C = np.diagonal(mean_CC)
    below = (mean_CC < own_C).sum(0) + 0.5 * ((mean_CC == own_C).sum(0) - 1)
    return below / (len(own_C) - 1) if len(own_C) > 1 else np.full(1, np.nan)


def mean_and_error(values_C: np.ndarray) -> dict:
    """The mean and its standard error; None where there are too few values."""
    size = len(values_C)
    error = float(values_C.std(ddof=1) / math.sqrt(size)) if size > 1 else None
    mean = float(values_C.mean())
    return {"mean": mean if math.isfinite(mean) else None, "standard_error": error}


def _rounded(values_C: np.ndarray) -> list[float | None]:
    return [float(f"{value:.6g}") if math.isfinite(value) else None for value in values_C.tolist()]
