"""Read a run folder for a comparison: its config, curves and evaluations, the data it read, the machines it ran on."""

import json
import logging
import math
import shlex
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from megacocomix.checkpoint.format import list_checkpoints, read_checkpoint_manifest
from megacocomix.config.effective import read_method, settings_in_effect
from megacocomix.config.method import MethodConfig
from megacocomix.config.yaml_text import parse_yaml
from megacocomix.errors import UserError

log = logging.getLogger(__name__)

SECTIONS = ("model", "method", "data", "training")
KINDS = ("loss", "valid_loss")
"""The two kinds of lines in metrics.jsonl, training and validation, each named by the key that only it has."""
COSTS = ("tokens", "flops", "teacher_flops", "seconds")
"""The fields of a Point that never decrease during a run."""


@dataclass(frozen=True)
class Point:
    """One line of metrics.jsonl: the cost of the run so far, and its next-token loss (training or validation)."""

    step: int
    tokens: float
    flops: float
    teacher_flops: float
    """Of the live teacher, and of labelling the label cache that the run read, as far as that is known."""
    seconds: float
    loss: float

    @property
    def total_flops(self) -> float:
        """Student and teacher together."""
        return self.flops + self.teacher_flops


class Curve:
    """Base class of Run and Group: validation points in order of steps, of one run or the mean of several."""

    name: str
    valid: tuple[Point, ...]

    @property
    def final(self) -> Point:
        """The last validation point."""
        return self.valid[-1]

    def curve(self, axis: str, value: str = "loss") -> tuple[np.ndarray, np.ndarray]:
        """The validation points as x and y arrays."""
        return tuple(np.array([getattr(point, each) for point in self.valid], dtype=float) for each in (axis, value))


@dataclass(frozen=True)
class Evaluation:
    """The result of tools/evaluate.py on all held-out windows of a run's data."""

    step: int
    loss: float
    windows: int
    context: int
    fingerprint: str

    @property
    def text(self) -> tuple:
        """Identifies the windows: if it is equal for two losses, both are means over the same windows."""
        return self.windows, self.context, self.fingerprint


@dataclass(frozen=True)
class Start:
    """One start of a run: the command line of its processes, their number, and their device."""

    command: str
    world: int
    device: str

    def __str__(self) -> str:
        return f"{self.world} × {self.device}"


@dataclass(frozen=True)
class Run(Curve):
    """The content of a run folder; `train` and `valid` are in order of steps."""

    name: str
    folder: Path
    config: dict
    """The resolved config."""
    train: tuple[Point, ...]
    valid: tuple[Point, ...]
    evaluation: Evaluation | None = None
    """The evaluation on data.valid with the highest step."""
    starts: tuple[Start, ...] = ()
    """Empty if code.json does not record them."""
    inputs: dict | None = None
    """Option → hash of the file or folder that it names; None if nothing records the hashes."""
    cache: dict | None = None
    """Numbers from the manifest of the label cache that the run read; None if the cache is gone."""

    @cached_property
    def method(self) -> MethodConfig:
        """The method section with its preset filled in."""
        return read_method(self.config, f"{self.folder}/config.yaml")

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The config as `section.key` → value, without settings that the run's method does not use."""
        return settings_in_effect(self.config, self.method)

    def setting(self, name: str, default: Any = None) -> Any:
        """The value of `section.key`; `default` if the config does not have it."""
        value = self.settings.get(name)
        return default if value is None else value

    def content(self, name: str) -> Any:
        """Identifies the file or folder that a setting names: the hash of its content if known, else its path."""
        value = self.setting(name)
        return (self.inputs or {}).get(name) or (value and _same_path(str(value)))


def read_run(folder: str | Path, name: str | None = None) -> Run:
    """Read a run folder. Raises UserError if it is not a run folder or has no validation loss."""
    folder = Path(folder)
    config_file, metrics_file = folder / "config.yaml", folder / "metrics.jsonl"
    missing = [file.name for file in (config_file, metrics_file) if not file.is_file()]
    if missing:
        raise UserError(f"{folder} is not a run folder: it has no {' and no '.join(missing)}.")
    config = parse_yaml(config_file.read_text(errors="replace"), str(config_file))
    if not isinstance(config, dict) or not all(isinstance(config.get(key) or {}, dict) for key in SECTIONS):
        raise UserError(f"{config_file} is not a config: expected sections such as model and training.")
    if not isinstance((config.get("training") or {}).get("seed", 0), int):
        raise UserError(f"{config_file}: training.seed is not a number.")
    train, valid = (_points(metrics_file, kind, lines) for kind, lines in read_metrics(metrics_file).items())
    if not valid:
        raise UserError(f"{metrics_file} has no validation line: there is no valid_loss to compare.")
    inputs = _read_inputs(folder)
    run = Run(name or folder.resolve().name, folder, config, train, valid, inputs=inputs, starts=_read_starts(folder))
    evaluation, cache = _read_evaluation(run), _read_cache(run)
    if inputs is None and evaluation:
        inputs = {"data.valid": evaluation.fingerprint}
    train, valid = (_add_cache_flops(run, points, cache) for points in (train, valid))
    return replace(run, evaluation=evaluation, inputs=inputs, cache=cache, train=train, valid=valid)


def read_metrics(file: Path) -> dict[str, dict[int, dict]]:
    """Kind → line number → record, for the lines of metrics.jsonl that are still valid after every resume. Raises
    UserError if a line has no usable step."""
    kept: dict[str, dict[int, dict]] = {kind: {} for kind in KINDS}
    lines = file.read_text(errors="replace").splitlines()
    for number, text in enumerate(lines, start=1):
        if not text.strip():
            continue
        try:
            record = dict(json.loads(text))
        except (ValueError, TypeError):
            place = "the last line" if number == len(lines) else f"line {number}"
            log.warning("%s: %s is truncated (the run was killed while writing it?) and is skipped.", file, place)
            continue
        kind = next((kind for kind in reversed(KINDS) if kind in record), None)
        if kind is None:
            continue
        with _refuse_bad_numbers(file, number, kind):
            step = record["step"] = int(record["step"])
        # A resumed run goes back to its checkpoint: the lines that it had written from that step on are void.
        while kept[kind] and next(reversed(kept[kind].values()))["step"] >= step:
            kept[kind].popitem()
        kept[kind][number] = record
    return kept


def _points(file: Path, kind: str, lines: dict[int, dict]) -> tuple[Point, ...]:
    points: list[Point] = []
    for number, line in lines.items():
        with _refuse_bad_numbers(file, number, kind):
            costs = {axis: float(line.get(axis) or 0.0) for axis in COSTS} | {"tokens": float(line["tokens"])}
            if infinite := [axis for axis in COSTS if not math.isfinite(costs[axis])]:
                raise ValueError(f"{infinite[0]} is {costs[infinite[0]]}")
            loss = math.nan if line[kind] is None else float(line[kind])
        for axis, cost in costs.items():
            if points and cost < getattr(points[-1], axis):
                problem = f"{axis} is lower at step {line['step']} than before it; that log cannot be trusted."
                raise UserError(f"{file}: {problem}")
        points.append(Point(step=line["step"], loss=loss, **costs))
    return tuple(points)


@contextmanager
def _refuse_bad_numbers(file: Path, number: int, kind: str) -> Iterator[None]:
    """Turn an error from a missing or unusable number into a UserError that names the line."""
    try:
        yield
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        problem = f"a {kind} line needs finite numbers for its step and its costs ({error})."
        raise UserError(f"{file}:{number}: {problem}") from None


def _read_inputs(run: Path) -> dict | None:
    for folder in reversed(list_checkpoints(run)):
        with suppress(UserError):
            return read_checkpoint_manifest(folder)["inputs"]
    return None


def _read_evaluation(run: Run) -> Evaluation | None:
    """The evaluation with the highest step among those on the run's own data.valid."""
    found, own = [], (run.inputs or {}).get("data.valid")
    for file in sorted((run.folder / "evals").glob("*.json")):
        try:
            values = json.loads(file.read_text())
            fingerprint, data = str(values["data_fingerprint"]), _same_path(str(values["data"]))
            if fingerprint == own if own else data == _same_path(str(run.setting("data.valid"))):
                windows = (int(values[name]) for name in ("num_sequences", "context"))
                found.append(Evaluation(int(values["step"]), float(values["valid_loss"]), *windows, fingerprint))
        except (OSError, KeyError, TypeError, ValueError, OverflowError):
            log.warning("%s is not an evaluation by tools/evaluate.py and is skipped.", file)
    return max(found, key=lambda evaluation: evaluation.step, default=None)


def _read_starts(folder: Path) -> tuple[Start, ...]:
    try:
        starts = json.loads((folder / "code.json").read_text())["starts"]
        return tuple(Start(_command(one["command"]), int(one["world"]), str(one["device"])) for one in starts)
    except (OSError, KeyError, TypeError, ValueError, OverflowError):
        return ()


def _command(arguments: list[str]) -> str:
    """The command line as one types it in the root of a checkout."""
    return shlex.join(["/".join(Path(arguments[0]).parts[-2:]), *arguments[1:]])


def _read_cache(run: Run) -> dict | None:
    folder = run.setting("teacher.labels", "live")
    try:
        manifest = json.loads((Path(folder) / "manifest.json").read_text()) if folder != "live" else None
        return manifest and {key: float(manifest[key]) for key in ("flops_per_token", "num_windows", "context")}
    except (OSError, KeyError, TypeError, ValueError):
        return None


def _add_cache_flops(run: Run, points: tuple[Point, ...], cache: dict | None) -> tuple[Point, ...]:
    """Add the FLOPs of the label cache to `teacher_flops`: each cached token counts once, and tokens that the live
    teacher labelled do not count again.

    If a live teacher also distills, its FLOPs do not show how much it labelled; the cache then counts as complete.
    """
    if not cache:
        return points
    flops_per_token, cached_tokens = cache["flops_per_token"], cache["num_windows"] * cache["context"]
    counted = []
    for point in points:
        labelling = 0.0 if run.method.distills else point.teacher_flops
        live_share = labelling / (flops_per_token * point.tokens) if flops_per_token * point.tokens else 1.0
        cached = max(0.0, 1 - live_share) * flops_per_token * min(point.tokens, cached_tokens)
        counted.append(replace(point, teacher_flops=point.teacher_flops + cached))
    return tuple(counted)


def _same_path(text: str) -> str:
    path = Path(text)
    return str(path.resolve() if path.exists() else path)
