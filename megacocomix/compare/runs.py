"""A run folder as it is compared: its config, its curves, its evaluations, what it read and where it ran."""

import json
import logging
import math
import shlex
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
"""Lines of metrics.jsonl by the quantity that tells them apart: training and validation."""


@dataclass(frozen=True)
class Point:
    """One line of metrics.jsonl: what the run had spent, and its next-token loss (training or validation)."""

    step: int
    tokens: float
    flops: float
    teacher_flops: float
    """Of the live teacher, and of the label cache that was read, as far as it is known."""
    seconds: float
    loss: float

    @property
    def total_flops(self) -> float:
        """Student and teacher together."""
        return self.flops + self.teacher_flops


class Curve:
    """What has validation points in order of steps: a run, or the mean of several."""

    name: str
    valid: tuple[Point, ...]

    @property
    def final(self) -> Point:
        """The last validation."""
        return self.valid[-1]

    def curve(self, axis: str, value: str = "loss") -> tuple[np.ndarray, np.ndarray]:
        """The validation points as x and y arrays."""
        return tuple(np.array([getattr(point, each) for point in self.valid], dtype=float) for each in (axis, value))


@dataclass(frozen=True)
class Evaluation:
    """What tools/evaluate.py found on all held-out windows of a run's data."""

    step: int
    loss: float
    windows: int
    context: int
    fingerprint: str

    @property
    def text(self) -> tuple:
        """Two losses with the same value here are means over the same windows."""
        return self.windows, self.context, self.fingerprint


@dataclass(frozen=True)
class Start:
    """One start of a run: the command line of its processes, their number, and what they ran on."""

    command: str
    world: int
    device: str

    def __str__(self) -> str:
        return f"{self.world} × {self.device}"


@dataclass(frozen=True)
class Run(Curve):
    """A run folder: its resolved config, its two curves in order of steps, its evaluation, its starts."""

    name: str
    folder: Path
    config: dict
    train: tuple[Point, ...]
    valid: tuple[Point, ...]
    evaluation: Evaluation | None = None
    """The one of the highest step, on data.valid."""
    starts: tuple[Start, ...] = ()
    """Empty where code.json does not tell."""
    inputs: dict | None = None
    """Hashes of what the run read, by the option that names it; None where nothing records them."""
    cache: dict | None = None
    """The manifest of the label cache that the run read, where that is still there."""

    @cached_property
    def method(self) -> MethodConfig:
        """The method section with its preset filled in."""
        return read_method(self.config, f"{self.folder}/config.yaml")

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The config as `section.key` → value, without what the run carries but does not use."""
        return settings_in_effect(self.config, self.method)

    def setting(self, name: str, default: Any = None) -> Any:
        """`section.key` of the config, `default` where the config does not have it."""
        value = self.settings.get(name)
        return default if value is None else value

    def content(self, name: str) -> Any:
        """What tells a setting that names a file or folder apart: its content's hash where known, else its path."""
        value = self.setting(name)
        return (self.inputs or {}).get(name) or (value and _same_path(str(value)))


def read_run(folder: str | Path, name: str | None = None) -> Run:
    """Read config.yaml and metrics.jsonl. Raises UserError for what is no run or has no validation loss."""
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
    train, valid = (_points(metrics_file, lines) for lines in read_metrics(metrics_file).values())
    if not valid:
        raise UserError(f"{metrics_file} has no validation line: there is no valid_loss to compare.")
    inputs = _read_inputs(folder)
    bare = Run(name or folder.resolve().name, folder, config, train, valid, inputs=inputs, starts=_read_starts(folder))
    evaluation, cache = _read_evaluation(bare), _read_cache(bare)
    curves = {kind: _count_cache(bare, getattr(bare, kind), cache) for kind in ("train", "valid")}
    if inputs is None and evaluation:
        inputs = {"data.valid": evaluation.fingerprint}
    return replace(bare, evaluation=evaluation, inputs=inputs, cache=cache, **curves)


def read_metrics(file: Path) -> dict[str, dict[int, dict]]:
    """Kind → line number → record, of the lines of metrics.jsonl that still hold after every resumption. Raises
    UserError."""
    kept: dict[str, dict[int, dict]] = {kind: {} for kind in KINDS}
    lines = file.read_text(errors="replace").splitlines()
    for number, text in enumerate(lines, start=1):
        if not text.strip():
            continue
        try:
            record = dict(json.loads(text))
        except (ValueError, TypeError):
            place = "the last line" if number == len(lines) else f"line {number}"
            log.warning("%s: %s is torn (the run was killed while writing it?) and is left out.", file, place)
            continue
        kind = next((kind for kind in reversed(KINDS) if kind in record), None)
        if kind is None:
            continue
        try:
            step = record["step"] = int(record["step"])
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise UserError(f"{file}:{number}: {_needs_numbers(kind, error)}") from None
        # A resumed run goes back to its checkpoint: what it had written from that step on did not happen.
        while kept[kind] and next(reversed(kept[kind].values()))["step"] >= step:
            kept[kind].popitem()
        kept[kind][number] = record
    return kept


def _points(file: Path, lines: dict[int, dict]) -> tuple[Point, ...]:
    points: list[Point] = []
    for number, line in lines.items():
        kind = next(kind for kind in reversed(KINDS) if kind in line)
        try:
            point = _point(line, kind)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise UserError(f"{file}:{number}: {_needs_numbers(kind, error)}") from None
        for axis in ("tokens", "flops", "teacher_flops", "seconds"):
            if points and getattr(point, axis) < getattr(points[-1], axis):
                problem = f"{axis} is lower at step {point.step} than before it; that log cannot be trusted."
                raise UserError(f"{file}: {problem}")
        points.append(point)
    return tuple(points)


def _point(line: dict, kind: str) -> Point:
    spent = {name: float(line.get(name) or 0.0) for name in ("flops", "teacher_flops", "seconds")}
    spent["tokens"] = float(line["tokens"])
    if endless := [name for name, value in spent.items() if not math.isfinite(value)]:
        raise ValueError(f"{endless[0]} is {spent[endless[0]]}")
    return Point(step=line["step"], loss=math.nan if line[kind] is None else float(line[kind]), **spent)


def _needs_numbers(kind: str, error: Exception) -> str:
    return f"a {kind} line needs numbers for its step and what was spent ({error})."


def _read_inputs(run: Path) -> dict | None:
    for folder in reversed(list_checkpoints(run)):
        try:
            return read_checkpoint_manifest(folder)["inputs"]
        except UserError:
            continue
    return None


def _read_evaluation(run: Run) -> Evaluation | None:
    found, own = [], (run.inputs or {}).get("data.valid")
    for file in sorted((run.folder / "evals").glob("*.json")):
        try:
            values = json.loads(file.read_text())
            fingerprint, data = str(values["data_fingerprint"]), _same_path(str(values["data"]))
            if fingerprint != own if own else data != _same_path(str(run.setting("data.valid"))):
                continue
            numbers = (int(values[name]) for name in ("num_sequences", "context"))
            found.append(Evaluation(int(values["step"]), float(values["valid_loss"]), *numbers, fingerprint))
        except (OSError, KeyError, TypeError, ValueError, OverflowError):
            log.warning("%s is no evaluation by tools/evaluate.py and is left out.", file)
    return max(found, key=lambda evaluation: evaluation.step, default=None)


def _read_starts(folder: Path) -> tuple[Start, ...]:
    try:
        starts = json.loads((folder / "code.json").read_text())["starts"]
        return tuple(Start(_command(one["command"]), int(one["world"]), str(one["device"])) for one in starts)
    except (OSError, KeyError, TypeError, ValueError, OverflowError):
        return ()


def _command(words: list[str]) -> str:
    """As it is typed in a checkout, wherever that was."""
    return shlex.join(["/".join(Path(words[0]).parts[-2:]), *words[1:]])


def _read_cache(run: Run) -> dict | None:
    folder = run.setting("teacher.labels", "live")
    try:
        manifest = json.loads((Path(folder) / "manifest.json").read_text()) if folder != "live" else None
        return manifest and {key: float(manifest[key]) for key in ("flops_per_token", "num_windows", "context")}
    except (OSError, KeyError, TypeError, ValueError):
        return None


def _count_cache(run: Run, points: tuple[Point, ...], cache: dict | None) -> tuple[Point, ...]:
    """The points with what it cost to label, once, those of their tokens that the live teacher did not label.

    Where a live teacher also distills, its FLOPs do not tell what it labelled: the cache is taken to be complete.
    """
    if not cache:
        return points
    a_token, most = cache["flops_per_token"], cache["num_windows"] * cache["context"]
    counted = []
    for point in points:
        labelling = 0.0 if run.method.distills else point.teacher_flops
        live = labelling / (a_token * point.tokens) if a_token * point.tokens else 1.0
        cached = max(0.0, 1 - live) * a_token * min(point.tokens, most)
        counted.append(replace(point, teacher_flops=point.teacher_flops + cached))
    return tuple(counted)


def _same_path(text: str) -> str:
    path = Path(text)
    return str(path.resolve() if path.exists() else path)
