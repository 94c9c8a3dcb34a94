"""A text as a model reads it: one pass over token windows that keeps, of each position, what there is to know about
concepts. Nothing of size [all positions, concepts] ever exists.

Shapes: W windows, T tokens of a window, G windows at a time, N positions of all windows, C concepts, M largest
concepts that are looked at, k labels, A strongest latents of the teacher.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from megacocomix.data.documents import find_sources, read_documents
from megacocomix.errors import UserError
from megacocomix.hf.open import OpenModel
from megacocomix.interpret.teacher_labels import TeacherLabels
from megacocomix.model.losses import MASKED
from megacocomix.teacher.labels import FORWARD_TOKENS, in_chunks

LOOKED_AT = 4
"""Of the largest concepts at least so many are read, however few are kept: precision and recall look at them."""
STRONGEST = 8
"""Latents of the teacher that are remembered a position."""


@dataclass(frozen=True)
class Windows:
    """Texts as token windows, in order; none is empty, none crosses a document."""

    texts: list[str]
    """Names of the texts that were read."""
    tokens: list[np.ndarray]
    """Of each window, int64 [T]."""
    text: list[int]
    """Which of `texts` a window is from."""
    notes: list[str]
    """What the reader of the numbers must know: documents that were cut in windows, text that was left out."""


@dataclass(frozen=True)
class Reading:
    """What was seen at N positions, window after window. All arrays are on the CPU."""

    windows: Windows
    tokens: np.ndarray
    """int64 [N]."""
    window: np.ndarray
    """Which window, int64 [N]."""
    position: np.ndarray
    """Place in the window, int64 [N]."""
    has_slot: np.ndarray
    """Where concepts are predicted, bool [N]; the rows of the others are of no use."""
    num_kept: int
    """K: the first K of the M largest are the concepts that the model keeps."""
    index: np.ndarray
    """int64 [N, M], largest first."""
    value: np.ndarray
    """Their raw logits, fp32 [N, M]."""
    teacher: dict | None
    """What labelled, as `TeacherLabels.as_dict`; None where nothing did, and then so are the labels."""
    labels: np.ndarray | None
    """int64 [N, k], best first; MASKED where there is none, and where there is no slot to learn them."""
    active_index: np.ndarray | None
    """The teacher's strongest latents, int64 [N, A], strongest first."""
    active_value: np.ndarray | None
    """fp32 [N, A]; 0: not active."""
    num_active: np.ndarray | None
    """Positions at which each latent of the teacher is active, int64 [C]."""

    @property
    def is_labelled(self) -> np.ndarray:
        """Which positions have labels, bool [N]."""
        return self.labels[:, 0] != MASKED

    def rows(self, window: int) -> slice:
        """The positions of a window."""
        start, end = np.searchsorted(self.window, [window, window + 1])
        return slice(int(start), int(end))


def cut_windows(student: OpenModel, files: Sequence[str], num_tokens: int, field: str = "text") -> Windows:
    """At most `num_tokens` tokens of the texts, in windows of the student's context; the last of a document may be
    shorter. Raises UserError for what cannot be read, and for a text that is reached and holds none."""
    find_sources(files)  # says all that are missing at once
    sources = [(name, find_sources([name])) for name in files]
    windows, window_text, notes = [], [], []
    num_documents = num_long = num_read = num_texts = 0
    is_cut = False
    for text, (name, found) in enumerate(sources):
        num_before = num_read
        for document in read_documents(found, field):
            if is_cut := num_read == num_tokens:
                break
            ids = np.array(student.tokenizer.encode_batch([document])[0], dtype=np.int64)
            num_documents += 1
            num_long += len(ids) > student.context
            is_cut = len(ids) > num_tokens - num_read
            ids = ids[: num_tokens - num_read]
            num_read += len(ids)
            cut = [ids[start : start + student.context] for start in range(0, len(ids), student.context)]
            windows += cut
            window_text += [text] * len(cut)
            if is_cut:
                break
        num_texts += num_read > num_before
        if is_cut:
            break
        if num_read == num_before:
            raise UserError(f"{name} holds no text.")
    if num_long:
        notes.append(
            f"{num_long} of {num_documents} documents {'is' if num_long == 1 else 'are'} longer than the context of "
            f"{student.context} tokens: read in windows of {student.context}, each by itself"
        )
    if is_cut:
        notes.append(f"only the first {num_read:,} tokens are read: --tokens N reads more")
    if unread := [name for name, _ in sources[num_texts:]]:
        notes.append(f"not reached: {' '.join(unread)}")
    return Windows(list(files[:num_texts]), windows, window_text, notes)


@torch.no_grad()
def read_windows(student: OpenModel, windows: Windows, source: TeacherLabels | None = None) -> Reading:
    """Read every window by itself with the student, and with the teacher where there is one. Raises UserError for a
    student whose logits are not finite."""
    config, device = student.model.config, student.device
    lengths_W = np.array([len(tokens) for tokens in windows.tokens])
    starts_W = lengths_W.cumsum() - lengths_W
    num_positions = int(lengths_W.sum())
    num_largest = min(max(config.num_kept, LOOKED_AT), config.num_concepts)
    position_N = np.arange(num_positions) - np.repeat(starts_W, lengths_W)
    has_slot_N = student.has_slot(torch.from_numpy(position_N)).numpy()
    index_NM = np.zeros((num_positions, num_largest), np.int64)
    value_NM = np.zeros((num_positions, num_largest), np.float32)
    seen = _Seen(source, num_positions) if source else None
    with tqdm(total=num_positions, unit=" tokens", unit_scale=True, desc="reading", disable=None) as bar:
        for rows in _alike(lengths_W, FORWARD_TOKENS[device.type]):
            tokens_GT = torch.from_numpy(np.stack([windows.tokens[row] for row in rows])).to(device)
            places = (starts_W[rows, None] + np.arange(tokens_GT.shape[1])).ravel()
            read = student.model(tokens_GT, use_cache=False, logits_to_keep=1, output_concept_logits=True)
            largest = read.concept_logits.topk(num_largest)
            index_NM[places] = _rows(largest.indices)
            value_NM[places] = _rows(largest.values)
            if seen:
                seen.add(tokens_GT, places)
            bar.update(len(places))
    if not np.isfinite(value_NM).all():
        raise UserError(f"{student.path} predicts concepts with logits that are not finite: its training diverged.")
    if seen:
        seen.labels[~has_slot_N] = MASKED
    return Reading(
        windows=windows,
        tokens=np.concatenate(windows.tokens),
        window=np.repeat(np.arange(len(lengths_W)), lengths_W),
        position=position_N,
        has_slot=has_slot_N,
        num_kept=config.num_kept,
        index=index_NM,
        value=value_NM,
        teacher=source.as_dict() if source else None,
        labels=seen.labels if seen else None,
        active_index=seen.active_index if seen else None,
        active_value=seen.active_value if seen else None,
        num_active=seen.num_active if seen else None,
    )


class _Seen:
    """What the teacher says, as it is read."""

    def __init__(self, source: TeacherLabels, num_positions: int):
        self.labeler = source.labeler
        num_labels, num_latents = source.labeler.settings.num_labels, source.labeler.sae.num_latents
        self.labels = np.full((num_positions, num_labels), MASKED, np.int64)
        self.active_index = np.zeros((num_positions, STRONGEST), np.int64)
        self.active_value = np.zeros((num_positions, STRONGEST), np.float32)
        self.num_active = np.zeros(num_latents, np.int64)

    def add(self, tokens_GT: Tensor, places: np.ndarray) -> None:
        """Read windows of one length; `places` are their positions."""
        teacher, sae, chunk = self.labeler.teacher, self.labeler.sae, self.labeler.settings.chunk
        self.labels[places] = _rows(self.labeler(tokens_GT))
        index, value = map(_rows, sae.encode(in_chunks(tokens_GT, chunk, teacher.hidden)))
        self.num_active += np.bincount(index[value > 0], minlength=len(self.num_active))
        num_found = min(STRONGEST, index.shape[1])
        self.active_index[places, :num_found] = index[:, :num_found]
        self.active_value[places, :num_found] = value[:, :num_found]


def _alike(lengths_W: np.ndarray, most_tokens: int) -> Iterator[np.ndarray]:
    """Groups of windows of one length, at most so many tokens together: padding would change what the teacher says,
    whose labels depend on the whole window's loss."""
    for length in np.unique(lengths_W)[::-1]:
        rows = np.flatnonzero(lengths_W == length)
        size = max(1, most_tokens // int(length))
        yield from (rows[start : start + size] for start in range(0, len(rows), size))


def _rows(x_GTx: Tensor) -> np.ndarray:
    return x_GTx.flatten(0, 1).cpu().numpy()
