"""Loss curves of finished runs: read them, and ask two questions of a pair.

- At equal x (tokens, FLOPs, seconds), which loss is lower, and by how much?
- How much x does one run need to reach the other's final loss?

Both are answered on the validation points, linearly interpolated in x, and only where both runs have points:
nothing is extrapolated. A difference without a scale says little, so `noise` estimates from the runs
themselves how much of it could be chance.
"""

import json
import logging
import math
import shlex
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from megacocomix.errors import UserError

log = logging.getLogger(__name__)

AXES = {
    "tokens": "tokens",
    "total_flops": "FLOPs with the teacher",
    "flops": "student FLOPs",
    "seconds": "seconds",
}
"""What two runs can be equal in: an attribute of `Point`, and the words for it."""

# Sections that say where a run is written and how often, not what is computed.
BOOKKEEPING = ("run", "checkpoint", "logging")


@dataclass(frozen=True)
class Point:
    """One line of metrics.jsonl: what the run had spent, and its next-token loss (training or validation)."""

    step: int
    tokens: float
    flops: float
    teacher_flops: float
    seconds: float
    loss: float

    @property
    def total_flops(self) -> float:
        """Student and live teacher together."""
        return self.flops + self.teacher_flops


@dataclass(frozen=True)
class Evaluation:
    """What tools/evaluate.py found on all held-out windows of a run's data."""

    step: int
    loss: float
    windows: int
    context: int
    fingerprint: str

    def same_windows(self, other: "Evaluation") -> bool:
        """Whether both losses are means over the same windows of the same text."""
        return (self.windows, self.context, self.fingerprint) == (other.windows, other.context, other.fingerprint)


@dataclass(frozen=True)
class Start:
    """One start of a run: the command line of its processes, their number, and what they ran on."""

    command: str
    world: int
    device: str


@dataclass(frozen=True)
class Run:
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

    @property
    def final(self) -> Point:
        """The last validation."""
        return self.valid[-1]

    def setting(self, name: str, default: Any = None) -> Any:
        """`section.key` of the config, `default` where the config does not have it."""
        value = self.settings.get(name)
        return default if value is None else value

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The config as `section.key` → value, without what a next-token run carries but does not use."""
        flat = _flatten(self.config)
        if flat.get("method.name") == "ntp":
            return {key: value for key, value in flat.items() if not _is_unused(key)}
        return flat

    def progress(self, axis: str, x: float) -> float:
        """The part of the schedule that lay behind the run when it had spent `x`."""
        xs, steps = self.curve(axis, "step")
        return float(np.interp(x, xs, steps)) / (self.setting("training.steps") or self.final.step)

    def curve(self, axis: str, value: str = "loss") -> tuple[np.ndarray, np.ndarray]:
        """The validation points as x and y arrays. Raises UserError where x runs backwards."""
        xs = np.array([getattr(point, axis) for point in self.valid], dtype=float)
        back = np.flatnonzero(np.diff(xs) < 0)
        if back.size:
            file, step = self.folder / "metrics.jsonl", self.valid[back[0] + 1].step
            raise UserError(f"{file}: {axis} is lower at step {step} than before it; that log cannot be trusted.")
        return xs, np.array([getattr(point, value) for point in self.valid], dtype=float)


@dataclass(frozen=True)
class EqualX:
    """Two losses at the largest x that both runs reached."""

    axis: str
    x: float
    losses: tuple[float, float]
    progress: tuple[float, float]
    windows: int | None = None
    """How many the losses are over, if all held-out ones. None: the validation during training."""

    @property
    def difference(self) -> float:
        """First minus second: negative where the first run is lower, NaN where either loss is."""
        return self.losses[0] - self.losses[1]


@dataclass(frozen=True)
class ToMatch:
    """What `run` needed to reach the final validation loss of `other`."""

    axis: str
    target: float
    x: float | None
    """None: never reached."""
    other_x: float

    @property
    def factor(self) -> float | None:
        """x as a part of what `other` spent to get there."""
        return self.x / self.other_x if self.x is not None and self.other_x > 0 else None


@dataclass(frozen=True)
class Noise:
    """Differences of final losses below `size` should not be read as real; `scatter` and `seeds` say why."""

    scatter: float | None
    """Twice the standard deviation of a difference of two points of the run that scatters most."""
    seeds: float | None
    """Largest difference between runs that differ in nothing but the seed."""

    @property
    def size(self) -> float | None:
        """The larger of the two; None where the runs hold too little to tell."""
        return max((part for part in (self.scatter, self.seeds) if part is not None), default=None)


def read_runs(folders: list[str | Path]) -> list[Run]:
    """Read two or more run folders that can be compared. Raises one UserError with every problem."""
    paths = [Path(folder) for folder in folders]
    if len(paths) < 2:
        raise UserError(f"give two or more run folders to compare, got {len(paths)}: {', '.join(map(str, paths))}.")
    if len({path.resolve() for path in paths}) < len(paths):
        raise UserError("the same run folder is given twice.")
    runs, problems = [], []
    for path, name in zip(paths, _names(paths), strict=True):
        try:
            runs.append(read_run(path, name))
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(*problems)
    _refuse_other_data(runs)
    return runs


def read_run(folder: str | Path, name: str | None = None) -> Run:
    """Read config.yaml and metrics.jsonl. Raises UserError for what is no run or has no validation loss."""
    folder = Path(folder)
    config_file, metrics_file = folder / "config.yaml", folder / "metrics.jsonl"
    missing = [file.name for file in (config_file, metrics_file) if not file.is_file()]
    if missing:
        raise UserError(f"{folder} is not a run folder: it has no {' and no '.join(missing)}.")
    try:
        config = yaml.safe_load(config_file.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{config_file} is not valid YAML: {str(error).splitlines()[0]}.") from None
    if not isinstance(config, dict):
        raise UserError(f"{config_file} is not a config: expected sections such as model and training.")
    train, valid = _read_metrics(metrics_file)
    if not valid:
        raise UserError(f"{metrics_file} has no validation line: there is no valid_loss to compare.")
    evaluation = _read_evaluation(folder, _flatten(config).get("data.valid"))
    return Run(name or folder.resolve().name, folder, config, train, valid, evaluation, _read_starts(folder))


def equal_x(run: Run, other: Run, axis: str) -> EqualX | None:
    """Both validation losses at the largest x both runs reached; None where they share no stretch of x."""
    (xs, losses), (other_xs, other_losses) = run.curve(axis), other.curve(axis)
    x = min(xs[-1], other_xs[-1])
    if x <= 0 or x < max(xs[0], other_xs[0]):
        return None
    return EqualX(
        axis,
        float(x),
        (float(np.interp(x, xs, losses)), float(np.interp(x, other_xs, other_losses))),
        (run.progress(axis, x), other.progress(axis, x)),
    )


def equal_end(run: Run, other: Run) -> EqualX | None:
    """Both full evaluations, of runs that ended at the same number of tokens and were evaluated there alike."""
    ours, theirs = run.evaluation, other.evaluation
    if run.final.tokens != other.final.tokens or not ours or not theirs or not ours.same_windows(theirs):
        return None
    if (ours.step, theirs.step) != (run.final.step, other.final.step):
        return None
    x = run.final.tokens
    progress = run.progress("tokens", x), other.progress("tokens", x)
    return EqualX("tokens", x, (ours.loss, theirs.loss), progress, ours.windows)


def x_to_match(run: Run, other: Run, axis: str) -> ToMatch:
    """The x at which `run` first reaches the final validation loss of `other`."""
    xs, losses = run.curve(axis)
    target = other.final.loss
    return ToMatch(axis, target, _first_reach(xs, losses, target), getattr(other.final, axis))


def noise(runs: list[Run]) -> Noise:
    """What the runs themselves say about chance. Scatter is a lower bound: another seed may differ more."""
    worst = max((value for run in runs if (value := _scatter(run)) is not None), default=None)
    scatter = 2 * math.sqrt(2) * worst if worst is not None else None
    spreads = [
        abs(equal.difference)
        for index, run in enumerate(runs)
        for other in runs[index + 1 :]
        if differs_in_seed_only(run, other) and (equal := equal_x(run, other, "tokens"))
    ]
    return Noise(scatter, max(filter(math.isfinite, spreads), default=None))


def differs_in_seed_only(run: Run, other: Run) -> bool:
    """Whether two runs repeat one experiment."""
    return run.setting("training.seed") != other.setting("training.seed") and not (
        set(differing_settings([run, other])) - {"training.seed"}
    )


def differing_settings(runs: list[Run]) -> dict[str, list[Any]]:
    """`section.key` → value per run (None: the run has none), for the settings in which the runs differ."""
    keys = dict.fromkeys(key for run in runs for key in run.settings if key.split(".")[0] not in BOOKKEEPING)
    table = {key: [run.settings.get(key) for run in runs] for key in keys}
    return {key: values for key, values in table.items() if any(value != values[0] for value in values)}


def _read_metrics(file: Path) -> tuple[tuple[Point, ...], tuple[Point, ...]]:
    curves: dict[str, list[Point]] = {"loss": [], "valid_loss": []}
    lines = file.read_text(errors="replace").splitlines()
    for number, text in enumerate(lines, start=1):
        if not text.strip():
            continue
        try:
            line = dict(json.loads(text))
        except (ValueError, TypeError):
            place = "the last line" if number == len(lines) else f"line {number}"
            log.warning("%s: %s is torn (the run was killed while writing it?) and is left out.", file, place)
            continue
        kind = next((kind for kind in ("valid_loss", "loss") if kind in line), None)
        if kind is None:
            continue
        try:
            point = _point(line, kind)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            problem = f"{file}:{number}: a {kind} line needs numbers for its step and what was spent ({error})."
            raise UserError(problem) from None
        # A resumed run goes back to its checkpoint: what it had written from that step on did not happen.
        while curves[kind] and curves[kind][-1].step >= point.step:
            curves[kind].pop()
        curves[kind].append(point)
    return tuple(curves["loss"]), tuple(curves["valid_loss"])


def _point(line: dict, kind: str) -> Point:
    spent = {name: float(line.get(name) or 0.0) for name in ("flops", "teacher_flops", "seconds")}
    spent["tokens"] = float(line["tokens"])
    if endless := [name for name, value in spent.items() if not math.isfinite(value)]:
        raise ValueError(f"{endless[0]} is {spent[endless[0]]}")
    return Point(step=int(line["step"]), loss=math.nan if line[kind] is None else float(line[kind]), **spent)


def _read_evaluation(folder: Path, data: Any) -> Evaluation | None:
    found = []
    for file in sorted((folder / "evals").glob("*.json")):
        try:
            values = json.loads(file.read_text())
            if _same_path(str(values["data"])) != _same_path(str(data)):
                continue
            numbers = (int(values[name]) for name in ("num_sequences", "context"))
            step, loss = int(values["step"]), float(values["valid_loss"])
            found.append(Evaluation(step, loss, *numbers, str(values["data_fingerprint"])))
        except (OSError, KeyError, TypeError, ValueError, OverflowError):
            log.warning("%s is no evaluation by tools/evaluate.py and is left out.", file)
    return max(found, key=lambda evaluation: evaluation.step, default=None)


def _read_starts(folder: Path) -> tuple[Start, ...]:
    try:
        starts = json.loads((folder / "code.json").read_text())["starts"]
        return tuple(Start(shlex.join(one["command"]), int(one["world"]), str(one["device"])) for one in starts)
    except (OSError, KeyError, TypeError, ValueError, OverflowError):
        return ()


def _refuse_other_data(runs: list[Run]) -> None:
    """Losses on different held-out text are different quantities; no table should put them side by side."""
    folders = {run.name: run.setting("data.valid") for run in runs}
    if len({_same_path(str(folder)) for folder in folders.values()}) > 1:
        said = ", ".join(f"{folder} ({name})" for name, folder in folders.items())
        raise UserError(f"validation losses on different data cannot be compared: data.valid is {said}.")


def _same_path(text: str) -> str:
    path = Path(text)
    return str(path.resolve() if path.exists() else path)


def _names(paths: list[Path]) -> list[str]:
    """The last part of each path, with as many parents as it takes to tell the runs apart."""
    parts = [path.resolve().parts for path in paths]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise AssertionError("distinct paths have distinct names")


def _flatten(values: dict, prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in values.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _is_unused(key: str) -> bool:
    return key.startswith("teacher.") or (key.startswith("method.") and key != "method.name")


def _first_reach(xs: np.ndarray, losses: np.ndarray, target: float) -> float | None:
    reached = np.flatnonzero(losses <= target)  # comparisons with NaN are false
    if not reached.size or not math.isfinite(target):
        return None
    index = int(reached[0])
    if index == 0 or not math.isfinite(losses[index - 1]):
        return float(xs[index])
    before, after = losses[index - 1], losses[index]
    return float(xs[index - 1] + (xs[index] - xs[index - 1]) * (before - target) / (before - after))


def _scatter(run: Run) -> float | None:
    """Standard deviation of a validation point around a smooth curve, over the second half of the run."""
    xs, losses = run.curve("tokens")
    start = len(xs) // 2
    xs, losses = xs[max(start - 1, 0) :], losses[max(start - 1, 0) :]
    if len(xs) < 6 or not np.isfinite(losses).all() or (np.diff(xs) <= 0).any():
        return None
    weight = (xs[1:-1] - xs[:-2]) / (xs[2:] - xs[:-2])
    off = losses[1:-1] - (losses[:-2] * (1 - weight) + losses[2:] * weight)
    # std takes off the mean, so a steady bend of the curve. A point less the middle of its neighbours
    # has 3/2 of the variance of the noise, if that is independent from point to point.
    return float(np.std(off, ddof=1) / math.sqrt(1.5))
