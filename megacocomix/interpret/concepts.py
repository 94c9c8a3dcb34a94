"""Statistics of each concept from one reading: how often and how strongly it is kept, whether the teacher labels the
same positions with it, where it is strongest, and which tokens it promotes.

Shapes: N positions, M largest concepts of a position, K of them kept, C concepts, P pairs (a position, a concept kept
there), k labels of a position, D width, V vocabulary, S concepts whose promoted tokens are requested.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from megacocomix.hf.open import OpenModel
from megacocomix.interpret.reading import LOOKED_AT, Reading
from megacocomix.model.losses import CHUNK_ELEMENTS

SMALL_NORM = 1e-2
"""A concept counts as unused if its compress column has a smaller norm; at 386M 5.8 % of them do (paper §3.3)."""
NUM_BINS = 20
NUM_PROMOTED = 10
NUM_CONTEXTS = 8


class Pairs(NamedTuple):
    """The kept concepts of all slots, sorted by concept, then strongest first, then by position."""

    concept: np.ndarray
    """int64 [P], ascending."""
    position: np.ndarray
    """Index into the reading's positions, int64 [P]."""
    value: np.ndarray
    """Raw logits, fp32 [P]."""
    rank: np.ndarray
    """0 for a concept's strongest position, int64 [P]."""


class Usage(NamedTuple):
    """How the model uses its concepts. Arrays are [C], `histogram` is [C, NUM_BINS]."""

    kept: np.ndarray
    """Number of positions where it is kept."""
    top_1: np.ndarray
    """Number of positions where it is the largest."""
    mean: np.ndarray
    """Mean of its logits where it is kept, fp64. NaN if it is never kept; so is `largest`."""
    largest: np.ndarray
    low: float
    high: float
    """The ends of the histogram, the same for all concepts."""
    histogram: np.ndarray


@dataclass(frozen=True)
class Agreement:
    """Agreement of predictions with the teacher's labels, over the labelled positions. Arrays are [C]. `num` is 1 or 4:
    a concept is predicted where it is among the `num` largest."""

    num_labelled: int
    labelled: np.ndarray
    """Number of positions whose labels include it."""
    predicted: dict[int, np.ndarray]
    hits: dict[int, np.ndarray]
    """Number of positions where it is predicted and among the labels."""
    hit_share: dict[int, float | None]
    """Share of positions where any predicted concept is among the labels."""
    recall_share: float | None
    """Share of a position's labels that are among the 4 largest, mean over positions."""

    def precision(self, num: int) -> np.ndarray:
        """Of the positions where a concept is predicted, the share where it is a label, [C]; NaN if there are none."""
        return _ratio(self.hits[num], self.predicted[num])

    def recall(self, num: int) -> np.ndarray:
        """Of the positions where a concept is a label, the share where it is predicted, [C]; NaN if there are none."""
        return _ratio(self.hits[num], self.labelled)


class Promoted(NamedTuple):
    """The tokens that concepts promote and suppress most: ids and scores, [S, NUM_PROMOTED]."""

    top_index: np.ndarray
    top_score: np.ndarray
    bottom_index: np.ndarray
    bottom_score: np.ndarray


def kept_pairs(reading: Reading) -> Pairs:
    """All pairs of a reading. They are sorted once here; the functions below rely on the order."""
    slots = np.flatnonzero(reading.has_slot)
    concept = reading.index[slots, : reading.num_kept].ravel()
    value = reading.value[slots, : reading.num_kept].ravel()
    order = np.lexsort((-value, concept))
    concept = concept[order]
    return Pairs(concept, np.repeat(slots, reading.num_kept)[order], value[order], _ranks(concept))


def count_usage(reading: Reading, pairs: Pairs, num_concepts: int) -> Usage:
    """How often and how strongly each concept is kept."""
    concept, value = pairs.concept, pairs.value
    kept = np.bincount(concept, minlength=num_concepts)
    mean = _ratio(np.bincount(concept, value.astype(np.float64), num_concepts), kept)
    largest = np.full(num_concepts, np.nan)
    largest[concept[pairs.rank == 0]] = value[pairs.rank == 0]
    low, high = (float(value.min()), float(value.max())) if len(value) else (0.0, 0.0)
    bins = ((value - low) * (NUM_BINS / (high - low)) if high > low else np.zeros(len(value))).astype(np.int64)
    cells = concept * NUM_BINS + bins.clip(max=NUM_BINS - 1)
    histogram = np.bincount(cells, minlength=num_concepts * NUM_BINS).reshape(num_concepts, NUM_BINS)
    top_1 = np.bincount(reading.index[reading.has_slot, 0], minlength=num_concepts)
    return Usage(kept, top_1, mean, largest, low, high, histogram)


def count_agreement(reading: Reading, num_concepts: int) -> Agreement:
    """Agreement of predictions and labels, for a reading that has labels."""
    rows = reading.is_labelled
    index_NM, labels_Nk = reading.index[rows, :LOOKED_AT], reading.labels[rows]
    is_first_Nk = np.ones(labels_Nk.shape, bool)  # an id may repeat where unlabelled positions are not masked
    for place in range(1, labels_Nk.shape[1]):
        is_first_Nk[:, place] = (labels_Nk[:, :place] != labels_Nk[:, place, None]).all(1)
    is_hit_NM = (index_NM[:, :, None] == labels_Nk[:, None, :]).any(2)
    count = lambda ids: np.bincount(ids, minlength=num_concepts)
    total = len(labels_Nk)
    per_position = is_hit_NM.sum(1) / is_first_Nk.sum(1)
    return Agreement(
        num_labelled=total,
        labelled=count(labels_Nk[is_first_Nk]),
        predicted={num: count(index_NM[:, :num].ravel()) for num in (1, LOOKED_AT)},
        hits={num: count(index_NM[:, :num][is_hit_NM[:, :num]]) for num in (1, LOOKED_AT)},
        hit_share={num: float(is_hit_NM[:, :num].any(1).mean()) if total else None for num in (1, LOOKED_AT)},
        recall_share=float(per_position.mean()) if total else None,
    )


def top_contexts(reading: Reading, pairs: Pairs) -> dict[int, np.ndarray]:
    """Concept → the positions of its largest logits, largest first: at most one per window and NUM_CONTEXTS in all."""
    place = pairs.concept * len(reading.windows.tokens) + reading.window[pairs.position]
    first = np.sort(np.unique(place, return_index=True)[1])
    first = first[_ranks(pairs.concept[first]) < NUM_CONTEXTS]
    concept, position = pairs.concept[first], pairs.position[first]
    starts = np.flatnonzero(np.diff(concept, prepend=-1))
    return dict(zip(concept[starts].tolist(), np.split(position, starts[1:]), strict=False))


def column_norms(student: OpenModel) -> np.ndarray | None:
    """The norms of the compress columns, [C]; None if the model mixes no concepts in."""
    layer = student.model.transformer.compress_layer
    return None if layer is None else layer.weight.detach().float().norm(dim=0).cpu().numpy()


@torch.no_grad()
def promoted_tokens(student: OpenModel, concepts: Sequence[int]) -> Promoted:
    """The tokens that each concept's compress column promotes and suppresses. The model must mix concepts in.

    As in a logit lens, the column is read as if it came directly before the head: w = (column − its mean) ⊙ ln_f's
    gain, score = w · token's row of the head, minus the mean over the vocabulary. This skips the blocks between, which
    transform the column. So the scores are a hint at the effect of a concept; steering measures the effect.
    """
    transformer = student.model.transformer
    # The vocabulary may be padded: rows past the tokenizer's size belong to no token.
    head_VD = student.model.lm_head.weight[: student.tokenizer.vocab_size].float()
    most = min(NUM_PROMOTED, len(head_VD))
    concepts = torch.as_tensor(concepts, dtype=torch.int64, device=student.device)
    found: list[list[torch.Tensor]] = []
    chunks = concepts.split(max(1, CHUNK_ELEMENTS // len(head_VD)))
    for chunk in tqdm(chunks, desc="promoted tokens", disable=None, leave=False):
        column_SD = transformer.compress_layer.weight[:, chunk].T.float()
        column_SD = (column_SD - column_SD.mean(1, keepdim=True)) * transformer.ln_f.weight
        score_SV = column_SD @ head_VD.T
        score_SV -= score_SV.mean(1, keepdim=True)
        top, bottom = score_SV.topk(most), score_SV.topk(most, largest=False)
        found.append([top.indices.cpu(), top.values.cpu(), bottom.indices.cpu(), bottom.values.cpu()])
    return Promoted(*(torch.cat(each).numpy() for each in zip(*found, strict=True)))


def _ranks(sorted_P: np.ndarray) -> np.ndarray:
    """For each element of an ascending array, the number of equal elements before it."""
    return np.arange(len(sorted_P)) - np.searchsorted(sorted_P, sorted_P)


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.full(len(whole), np.nan), where=whole > 0)
