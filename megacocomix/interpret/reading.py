"""One pass of a model over the token windows of a text. It stores the largest concepts, and the teacher's labels, of
each position. No array of size [all positions, concepts] ever exists.

Shapes: W windows, T tokens of a window, G windows at a time, N positions of all windows, C concepts, M largest
concepts of a position, k labels, A strongest latents of the teacher.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from megacocomix.data.documents import read_documents
from megacocomix.data.sources import LeftOut, find_sources
from megacocomix.errors import UserError
from megacocomix.hf.open import OpenModel
from megacocomix.interpret.teacher_labels import TeacherLabels
from megacocomix.model.losses import MASKED
from megacocomix.teacher.labels import FORWARD_TOKENS, ConceptLabeler, in_chunks

LOOKED_AT = 4
"""At least this many of the largest concepts are stored, even if fewer are kept: precision and recall need them."""
STRONGEST = 8
"""Latents of the teacher that are stored for each position."""


@dataclass(frozen=True)
class Windows:
    """Texts as token windows, in order. No window is empty, and none crosses a document boundary."""

    texts: list[str]
    """Files that were read."""
    tokens: list[np.ndarray]
    """int64 [T] for each window."""
    text: list[int]
    """Index in `texts` of each window."""
    notes: list[str]
    """Notes for the user: documents that were split into windows, and text that was left out."""


@dataclass(frozen=True)
class Reading:
    """The concepts and labels at N positions, window after window. All arrays are on the CPU."""

    windows: Windows
    tokens: np.ndarray
    """int64 [N]."""
    window: np.ndarray
    """Index of the window, int64 [N]."""
    position: np.ndarray
    """Position in the window, int64 [N]."""
    has_slot: np.ndarray
    """Whether concepts are predicted there, bool [N]. Without a slot, the other arrays have no meaningful row."""
    num_kept: int
    """K: the model keeps the first K of the M largest concepts."""
    index: np.ndarray
    """int64 [N, M], largest first."""
    value: np.ndarray
    """Their raw logits, fp32 [N, M]."""
    teacher: dict | None = None
    """`TeacherLabels.as_dict`. Without a teacher this and all fields below are None."""
    labels: np.ndarray | None = None
    """int64 [N, k], best first; MASKED where there is no label or no slot to learn it."""
    active_index: np.ndarray | None = None
    """The teacher's strongest latents, int64 [N, A], strongest first."""
    active_value: np.ndarray | None = None
    """fp32 [N, A]; 0: not active."""
    num_active: np.ndarray | None = None
    """Number of positions at which each latent of the teacher is active, int64 [C]."""

    @property
    def is_labelled(self) -> np.ndarray:
        """Whether a position has labels, bool [N]."""
        return self.labels[:, 0] != MASKED


def text_windows(student: OpenModel, files: Sequence[str], num_tokens: int, field: str = "text") -> Windows:
    """The first `num_tokens` tokens of the texts, in windows of the student's context; the last window of a document
    may be shorter. Raises UserError for a file that cannot be read, and for one without text before the limit."""
    find_sources(files)  # reports all missing files at once
    windows, window_text, notes, left_out = [], [], [], LeftOut()
    num_documents = num_long = num_read = num_texts = 0
    is_truncated = False
    for text, document in _documents(files, field, left_out):
        if is_truncated := num_read == num_tokens:
            break
        ids = np.array(student.tokenizer.encode_batch([document])[0], dtype=np.int64)
        num_texts = text + 1
        num_documents += 1
        num_long += len(ids) > student.context
        is_truncated = len(ids) > num_tokens - num_read
        ids = ids[: num_tokens - num_read]
        num_read += len(ids)
        starts = range(0, len(ids), student.context)
        windows += [ids[start : start + student.context] for start in starts]
        window_text += [text] * len(starts)
        if is_truncated:
            break
    if num_long:
        notes.append(
            f"{num_long} of {num_documents} documents {'is' if num_long == 1 else 'are'} longer than the context of "
            f"{student.context} tokens: read in windows of {student.context}, each by itself"
        )
    if is_truncated:
        notes.append(f"only the first {num_read:,} tokens are read: --tokens N reads more")
    notes += left_out.lines()
    if unread := files[num_texts:]:
        notes.append(f"not reached: {' '.join(unread)}")
    return Windows(list(files[:num_texts]), windows, window_text, notes)


def _documents(files: Sequence[str], field: str, left_out: LeftOut) -> Iterator[tuple[int, str]]:
    """The documents of all files, each with the index of its file."""
    for text, name in enumerate(files):
        document = None
        for document in read_documents(find_sources([name]), field, left_out):
            yield text, document
        if document is None:
            raise UserError(f"{name} holds no text.")


@torch.no_grad()
def read_windows(student: OpenModel, windows: Windows, source: TeacherLabels | None = None) -> Reading:
    """Read every window by itself with the student and, if given, with the teacher. Raises UserError when the student's
    concept logits are not finite."""
    config, device = student.model.config, student.device
    lengths_W = np.array([len(tokens) for tokens in windows.tokens])
    starts_W = lengths_W.cumsum() - lengths_W
    num_positions = int(lengths_W.sum())
    num_largest = min(max(config.num_kept, LOOKED_AT), config.num_concepts)
    position_N = np.arange(num_positions) - np.repeat(starts_W, lengths_W)
    reading = Reading(
        windows=windows,
        tokens=np.concatenate(windows.tokens),
        window=np.repeat(np.arange(len(lengths_W)), lengths_W),
        position=position_N,
        has_slot=student.has_slot(torch.from_numpy(position_N)).numpy(),
        num_kept=config.num_kept,
        index=np.zeros((num_positions, num_largest), np.int64),
        value=np.zeros((num_positions, num_largest), np.float32),
        **(_no_labels(source, num_positions) if source else {}),
    )
    with tqdm(total=num_positions, unit=" tokens", unit_scale=True, desc="reading", disable=None) as bar:
        for rows in _equal_lengths(lengths_W, FORWARD_TOKENS[device.type]):
            tokens_GT = torch.from_numpy(np.stack([windows.tokens[row] for row in rows])).to(device)
            places = (starts_W[rows, None] + np.arange(tokens_GT.shape[1])).ravel()
            read = student.model(tokens_GT, use_cache=False, logits_to_keep=1, output_concept_logits=True)
            largest = read.concept_logits.topk(num_largest)
            reading.index[places] = _rows(largest.indices)
            reading.value[places] = _rows(largest.values)
            if source:
                _read_teacher(source.labeler, tokens_GT, places, reading)
            bar.update(len(places))
    if not np.isfinite(reading.value).all():
        raise UserError(f"{student.path} predicts concepts with logits that are not finite: its training diverged.")
    if source:
        reading.labels[~reading.has_slot] = MASKED
    return reading


def _no_labels(source: TeacherLabels, num_positions: int) -> dict:
    """The teacher's fields of a Reading, before anything is read."""
    labeler = source.labeler
    return {
        "teacher": source.as_dict(),
        "labels": np.full((num_positions, labeler.settings.num_labels), MASKED, np.int64),
        "active_index": np.zeros((num_positions, STRONGEST), np.int64),
        "active_value": np.zeros((num_positions, STRONGEST), np.float32),
        "num_active": np.zeros(labeler.sae.num_latents, np.int64),
    }


def _read_teacher(labeler: ConceptLabeler, tokens_GT: Tensor, places: np.ndarray, reading: Reading) -> None:
    """Label windows of equal length; `places` are their positions in the reading."""
    reading.labels[places] = _rows(labeler(tokens_GT))
    hidden_GTD = in_chunks(tokens_GT, labeler.settings.chunk, labeler.teacher.hidden)
    index, value = map(_rows, labeler.sae.encode(hidden_GTD))
    reading.num_active[:] += np.bincount(index[value > 0], minlength=len(reading.num_active))
    num_found = min(STRONGEST, index.shape[1])
    reading.active_index[places, :num_found] = index[:, :num_found]
    reading.active_value[places, :num_found] = value[:, :num_found]


def _equal_lengths(lengths_W: np.ndarray, most_tokens: int) -> Iterator[np.ndarray]:
    """Groups of windows of equal length, each group with at most `most_tokens` tokens. There is no padding, because it
    would change the teacher's labels, which depend on the loss of the whole window."""
    for length in np.unique(lengths_W)[::-1]:
        rows = np.flatnonzero(lengths_W == length)
        size = max(1, most_tokens // int(length))
        yield from (rows[start : start + size] for start in range(0, len(rows), size))


def _rows(x_GTx: Tensor) -> np.ndarray:
    return x_GTx.flatten(0, 1).cpu().numpy()
