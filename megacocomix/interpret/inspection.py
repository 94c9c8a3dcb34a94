"""The inspection record: everything a page or a table shows of a model's concepts, as plain JSON.

Its keys: what was read (model, texts, teacher), `totals`, `concepts` (each that was kept or labelled, or has a name of
the user's, most often kept first), `never_kept` and `teacher_dead` (ids), and `windows` (the beginning of the text,
token by token).
"""

import json
import math
import re
from functools import cache
from pathlib import Path

import numpy as np

from megacocomix.errors import UserError
from megacocomix.files import write_text
from megacocomix.hf.open import OpenModel
from megacocomix.interpret.concepts import (
    SMALL_NORM,
    Agreement,
    column_norms,
    count_agreement,
    count_usage,
    kept_pairs,
    promoted_tokens,
    top_contexts,
)
from megacocomix.interpret.names import Spelling, name_concepts
from megacocomix.interpret.reading import LOOKED_AT, Reading
from megacocomix.interpret.token_text import token_texts

FORMAT, VERSION = "megacocomix-inspection", 1
KEYS = {"model", "sha256", "texts", "teacher", "totals", "concepts", "never_kept", "windows"}
"""What a record must have."""
BEFORE, AFTER = 16, 8
"""Tokens of a context around its own."""


def inspect(student: OpenModel, reading: Reading, given_names: dict[int, str], num_shown: int) -> dict:
    """The record of a reading; the first `num_shown` tokens are shown one by one. `given_names` go before automatic
    names."""
    config = student.model.config
    pairs = kept_pairs(reading)
    usage = count_usage(reading, pairs, config.num_concepts)
    agreement = count_agreement(reading, config.num_concepts) if reading.teacher else None
    norms = column_norms(student)
    is_listed = usage.kept > 0
    if agreement:
        is_listed |= agreement.labelled > 0
    is_listed[list(given_names)] = True
    listed = np.flatnonzero(is_listed)
    listed = listed[np.lexsort((listed, -usage.kept[listed]))]
    promoted = promoted_tokens(student, listed) if norms is not None else None
    shares = _shares(agreement, config.num_concepts)
    spelling = Spelling(student.tokenizer)
    names = name_concepts(reading, pairs, promoted, listed, spelling)
    texts = _Texts(student, reading)
    contexts = top_contexts(reading, pairs)
    num_slots = max(1, int(reading.has_slot.sum()))
    spelled = lambda ids, scores: [[spelling(int(i)), _round(score)] for i, score in zip(ids, scores, strict=True)]
    entries = []
    for row, concept in enumerate(listed.tolist()):
        kept = int(usage.kept[concept])
        counts = usage.histogram[concept].tolist()
        entry = {
            "id": concept,
            "name": given_names.get(concept, names[row]),
            "named_by": "file" if concept in given_names else "auto",
            "kept": kept,
            "kept_share": _round(kept / num_slots),
            "top_1": int(usage.top_1[concept]),
            "mean_logit": _round(usage.mean[concept]),
            "max_logit": _round(usage.largest[concept]),
            "column_norm": None if norms is None else _round(norms[concept]),
            "labelled": int(agreement.labelled[concept]) if agreement else None,
            **{key: _round(share[concept]) for key, share in shares.items()},
            "active": int(reading.num_active[concept]) if reading.teacher else None,
            "promotes": spelled(promoted.top_index[row], promoted.top_score[row]) if promoted else [],
            "suppresses": spelled(promoted.bottom_index[row], promoted.bottom_score[row]) if promoted else [],
            "contexts": [texts.context(int(place), concept) for place in contexts.get(concept, ())],
            "histogram": {"low": _round(usage.low), "high": _round(usage.high), "counts": counts} if kept else None,
        }
        entries.append(entry)
    num_labelled = int((agreement.labelled > 0).sum()) if agreement else None
    step = re.fullmatch(r"step-(\d+)", student.path.name)
    return {
        "format": FORMAT,
        "version": VERSION,
        "model": str(student.path),
        "sha256": student.sha256,
        "step": int(step[1]) if step else None,
        "texts": reading.windows.texts,
        "num_tokens": len(reading.tokens),
        "num_windows": len(reading.windows.tokens),
        "context": student.context,
        "num_concepts": config.num_concepts,
        "num_kept": config.num_kept,
        "every": config.interleave_every,
        "teacher": reading.teacher | {"num_labelled": agreement.num_labelled} if agreement else None,
        "totals": {
            "kept": int((usage.kept > 0).sum()),
            "never_kept": int((usage.kept == 0).sum()),
            "small_columns": None if norms is None else int((norms < SMALL_NORM).sum()),
            "labelled": num_labelled,
            "never_labelled": config.num_concepts - num_labelled if agreement else None,
            "teacher_dead": int((reading.num_active == 0).sum()) if agreement else None,
            "hit_1": _round(agreement.hit_share[1]) if agreement else None,
            "hit_4": _round(agreement.hit_share[LOOKED_AT]) if agreement else None,
            "recall_4": _round(agreement.recall_share) if agreement else None,
        },
        "concepts": entries,
        "never_kept": np.flatnonzero(usage.kept == 0).tolist(),
        "teacher_dead": np.flatnonzero(reading.num_active == 0).tolist() if agreement else None,
        "windows": texts.shown(num_shown),
    }


def write_inspection(file: Path, record: dict) -> None:
    """Write a record, whole or not at all."""
    write_text(file, json.dumps(record, allow_nan=False, separators=(",", ":")) + "\n")


def read_inspection(file: str | Path) -> dict:
    """A record that was written. Raises UserError where the file holds none, or one of another version."""
    try:
        record = json.loads(Path(file).read_bytes())
        found = record["format"], record["version"]
        is_whole = set(record) >= KEYS and isinstance(record["sha256"], str)
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{file} is no inspection record: make one with tools/inspect_concepts.py --out.") from None
    if found != (FORMAT, VERSION):
        raise UserError(f"{file} is of format {found[0]} version {found[1]}, not {FORMAT} version {VERSION}.")
    if not is_whole:
        raise UserError(f"{file} is damaged: make it again with tools/inspect_concepts.py --out.")
    return record


def _shares(agreement: Agreement | None, num_concepts: int) -> dict[str, np.ndarray]:
    """Precision and recall of all concepts, by key; NaN where there is none."""
    shares = {}
    for num in (1, LOOKED_AT):
        for what in ("precision", "recall"):
            share = getattr(agreement, what)(num) if agreement else np.full(num_concepts, np.nan)
            shares[f"{what}_{num}"] = share
    return shares


class _Texts:
    """A reading's windows as text, each spelled once."""

    def __init__(self, student: OpenModel, reading: Reading):
        self.reading = reading
        self.is_labelled = reading.is_labelled if reading.teacher else np.zeros(len(reading.tokens), bool)
        self.pieces = cache(lambda window: token_texts(student.tokenizer, reading.windows.tokens[window].tolist()))

    def context(self, place: int, concept: int) -> dict:
        """A position at which a concept is kept, and the text around it."""
        reading = self.reading
        window, position = int(reading.window[place]), int(reading.position[place])
        pieces = self.pieces(window)
        kept = reading.index[place, : reading.num_kept].tolist()
        is_label = concept in reading.labels[place].tolist() if self.is_labelled[place] else None
        return {
            "window": window,
            "position": position,
            "before": "".join(pieces[max(0, position - BEFORE) : position]),
            "token": pieces[position],
            "after": "".join(pieces[position + 1 : position + 1 + AFTER]),
            "logit": _round(reading.value[place, kept.index(concept)]),
            "labelled": is_label,
        }

    def shown(self, num_tokens: int) -> list[dict]:
        """The first tokens, window by window; the last window may be cut."""
        found = []
        for window, text in enumerate(self.reading.windows.text):
            pieces = self.pieces(window)[:num_tokens]
            if not pieces:
                break
            num_tokens -= len(pieces)
            start = self.reading.rows(window).start
            found.append({"text": text, "tokens": pieces, **self._rows(range(start, start + len(pieces)))})
        return found

    def _rows(self, places: range) -> dict:
        reading, num_kept = self.reading, self.reading.num_kept
        pairs = lambda ids, values: [[i, _round(value)] for i, value in zip(ids.tolist(), values, strict=True)]
        kept = [
            pairs(reading.index[n, :num_kept], reading.value[n, :num_kept]) if reading.has_slot[n] else []
            for n in places
        ]
        if not reading.teacher:
            return {"kept": kept, "labels": None, "active": None}
        labels = [reading.labels[n].tolist() if self.is_labelled[n] else None for n in places]
        active = []
        for n in places:
            is_active = reading.active_value[n] > 0
            active.append(pairs(reading.active_index[n, is_active], reading.active_value[n, is_active]))
        return {"kept": kept, "labels": labels, "active": active}


def _round(value: float | None) -> float | None:
    """To 4 significant digits; None for what is no number."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.4g}")
