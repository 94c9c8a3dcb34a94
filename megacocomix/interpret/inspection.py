"""The inspection record: all data on a model's concepts that the page and the table show, as plain JSON.

Its keys: the inputs (model, texts, teacher), `totals`, `concepts` (those that were kept, were a label or have a name
from the user, most often kept first), `never_kept` and `teacher_dead` (ids), and `windows` (the beginning of the text,
token by token).
"""

import json
import math
import re
from argparse import Namespace
from functools import cache
from pathlib import Path

import numpy as np

from megacocomix.errors import UserError
from megacocomix.files import read_json, write_text
from megacocomix.hf.open import OpenModel
from megacocomix.interpret.concepts import (
    SMALL_NORM,
    column_norms,
    count_agreement,
    count_usage,
    kept_pairs,
    promoted_tokens,
    top_contexts,
)
from megacocomix.interpret.names import Spelling, name_concepts, read_names
from megacocomix.interpret.reading import LOOKED_AT, Reading, read_windows, text_windows
from megacocomix.interpret.teacher_labels import ALONE, open_teacher_labels, teacher_labels_notes
from megacocomix.interpret.token_text import token_texts

FORMAT, VERSION = "megacocomix-inspection", 1
KEYS = {"model", "sha256", "texts", "teacher", "totals", "concepts", "never_kept", "windows"}
"""Keys that every record has."""
BEFORE, AFTER = 16, 8
"""Tokens shown before and after the token of a context."""


def inspect_files(student: OpenModel, options: Namespace) -> dict:
    """Read text files and make their record, with the options of tools/inspect_concepts.py. Prints notes for the user
    before the reading starts. Raises UserError."""
    names = read_names(options.names, student.model.config.num_concepts) if options.names else {}
    windows, source = text_windows(student, options.text, options.tokens, options.field), None
    notes = windows.notes
    if not options.no_teacher:
        source = open_teacher_labels(student, options.teacher, options.sae, ALONE)
        notes = notes + teacher_labels_notes(student, source)
    for note in notes:
        print(f"note: {note}", flush=True)
    return inspect(student, read_windows(student, windows, source), names, options.shown)


def inspect(student: OpenModel, reading: Reading, given_names: dict[int, str], num_shown: int) -> dict:
    """Make the record of a reading, with the first `num_shown` tokens one by one. `given_names` (concept → name)
    replace automatic names."""
    config = student.model.config
    pairs = kept_pairs(reading)
    usage = count_usage(reading, pairs, config.num_concepts)
    agreement = count_agreement(reading, config.num_concepts) if reading.teacher else None
    norms = column_norms(student)
    nothing = np.full(config.num_concepts, np.nan)
    shares = {
        f"{share}_{num}": getattr(agreement, share)(num) if agreement else nothing
        for num in (1, LOOKED_AT)
        for share in ("precision", "recall")
    }
    is_listed = usage.kept > 0
    if agreement:
        is_listed |= agreement.labelled > 0
    is_listed[list(given_names)] = True
    listed = np.flatnonzero(is_listed)
    listed = listed[np.lexsort((listed, -usage.kept[listed]))]
    promoted = promoted_tokens(student, listed) if norms is not None else None
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
        entries.append(
            {
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
        )
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
    """Write a record, whole or not at all. It is much shorter without the indentation of `write_json`."""
    write_text(file, json.dumps(record, allow_nan=False, separators=(",", ":")) + "\n")


def read_inspection(file: str | Path) -> dict:
    """Read a record. Raises UserError for a file that holds none, or one of another version."""
    remedy = "make it with tools/inspect_concepts.py --out"
    record = read_json(file, FORMAT, VERSION, remedy)
    if not (set(record) >= KEYS and isinstance(record["sha256"], str)):
        raise UserError(f"{file} is damaged: {remedy}.")
    return record


class _Texts:
    """The windows of a reading as text. Each is decoded once."""

    def __init__(self, student: OpenModel, reading: Reading):
        self.reading = reading
        self.is_labelled = reading.is_labelled if reading.teacher else np.zeros(len(reading.tokens), bool)
        self.tokens = cache(lambda window: token_texts(student.tokenizer, reading.windows.tokens[window].tolist()))

    def context(self, place: int, concept: int) -> dict:
        """A position where a concept is kept, and the text around it."""
        reading = self.reading
        window, position = int(reading.window[place]), int(reading.position[place])
        tokens = self.tokens(window)
        kept = reading.index[place, : reading.num_kept].tolist()
        is_label = concept in reading.labels[place].tolist() if self.is_labelled[place] else None
        return {
            "window": window,
            "position": position,
            "before": "".join(tokens[max(0, position - BEFORE) : position]),
            "token": tokens[position],
            "after": "".join(tokens[position + 1 : position + 1 + AFTER]),
            "logit": _round(reading.value[place, kept.index(concept)]),
            "labelled": is_label,
        }

    def shown(self, num_tokens: int) -> list[dict]:
        """The first tokens, window by window. The last window may be truncated."""
        found = []
        for window, text in enumerate(self.reading.windows.text):
            tokens = self.tokens(window)[:num_tokens]
            if not tokens:
                break
            num_tokens -= len(tokens)
            start = int(np.searchsorted(self.reading.window, window))
            found.append({"text": text, "tokens": tokens, **self._rows(range(start, start + len(tokens)))})
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
        latents = [pairs(reading.active_index[n], reading.active_value[n]) for n in places]
        active = [[[latent, value] for latent, value in row if value > 0] for row in latents]
        return {"kept": kept, "labels": labels, "active": active}


def _round(value: float | None) -> float | None:
    """Round to 4 significant digits. None for None, NaN and infinity."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.4g}")
