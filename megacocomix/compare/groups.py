"""Groups of runs: runs that differ only in the seed form one group, and groups are compared with each other.

The curve of a group is the mean over its runs, of losses and costs, at the steps at which all of them were validated.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from megacocomix.compare.runs import COSTS, Curve, Evaluation, Point, Run, read_run
from megacocomix.config.effective import BOOKKEEPING, row_of_the_paper
from megacocomix.errors import UserError

SEED = "training.seed"
SEED_IN_A_NAME = re.compile(r"(^|[-_.])(s|seed)?[-_=]?\d+$")


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation of a quantity over seeds."""

    mean: float
    std: float | None
    """None for one seed."""
    n: int

    @classmethod
    def of(cls, values: list[float]) -> "Spread | None":
        """The spread of `values`; None if there are none."""
        if not values:
            return None
        with np.errstate(invalid="ignore", over="ignore"):  # a diverged run makes the spread NaN
            std = float(np.std(values, ddof=1)) if len(values) > 1 else None
        return cls(sum(values) / len(values), std, len(values))

    def text(self, write: Callable[[float], str]) -> str:
        """`mean ± standard deviation`, each formatted by `write`."""
        return write(self.mean) + (f" ± {write(self.std)}" if self.std is not None else "")


@dataclass(frozen=True)
class Group(Curve):
    """Runs that differ only in the seed; a single run is a group too."""

    name: str
    runs: tuple[Run, ...]

    @cached_property
    def valid(self) -> tuple[Point, ...]:
        """The mean of the runs' validation points, at the steps that all runs have."""
        by_step = [{point.step: point for point in run.valid} for run in self.runs]
        shared = [step for step in by_step[0] if all(step in points for points in by_step)]
        return tuple(_mean([points[step] for points in by_step]) for step in shared)

    @property
    def at_end(self) -> list[Point]:
        """Each run's validation point at the last step of the mean curve."""
        return [next(point for point in run.valid if point.step == self.final.step) for run in self.runs]

    @property
    def seed_curves(self) -> list[Run]:
        """The runs at the steps and costs of the mean curve, so that they differ from it only in the loss."""
        curves = []
        for run in self.runs:
            losses = {point.step: point.loss for point in run.valid}
            curves.append(replace(run, valid=tuple(replace(mean, loss=losses[mean.step]) for mean in self.valid)))
        return curves

    @property
    def spread(self) -> Spread:
        """The final validation loss over seeds."""
        return Spread.of([point.loss for point in self.at_end])

    @property
    def evaluations(self) -> list[Evaluation]:
        """The full evaluations of all runs; empty unless all are of the last step and over the same windows."""
        found = [run.evaluation for run in self.runs if run.evaluation and run.evaluation.step == self.final.step]
        return found if len(found) == len(self.runs) and len({one.text for one in found}) == 1 else []

    @property
    def seeds(self) -> dict[Any, Run]:
        """Seed → run."""
        return {run.setting(SEED): run for run in self.runs}

    @property
    def row(self) -> str | None:
        """The paper's name for it; None if the paper has no such row."""
        return row_of_the_paper(self.runs[0].method)

    @property
    def size(self) -> str:
        """The size of the model, `layers × width`."""
        return f"{self.setting('model.num_layers', '–')} × {self.setting('model.hidden_size', '–')}"

    def setting(self, name: str, default: Any = None) -> Any:
        """The value of `section.key` in the config that the runs share."""
        return self.runs[0].setting(name, default)


def read_groups(folders: list[str | Path]) -> list[Group]:
    """Read two or more run folders and group them. Raises one UserError with every problem."""
    paths = [Path(folder) for folder in folders]
    if len(paths) < 2:
        raise UserError(f"give two or more run folders to compare, got {len(paths)}: {', '.join(map(str, paths))}.")
    if len({path.resolve() for path in paths}) < len(paths):
        raise UserError("the same run folder is given twice.")
    runs, problems = [], []
    for path, name in zip(paths, names(paths), strict=True):
        try:
            runs.append(read_run(path, name))
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(*problems)
    refuse_other_data(runs)
    return group_runs(runs)


def refuse_other_data(runs: list[Run]) -> None:
    """Raises UserError if the runs were validated on different data, because such losses are different quantities.

    Data are identified by their hash. If a run does not record the hash, another run must have recorded one for the
    same path, or all runs must have the same path.
    """
    paths = {run.name: str(run.setting("data.valid")) for run in runs}
    hashes = {run.name: run.inputs["data.valid"] for run in runs if run.inputs and "data.valid" in run.inputs}
    recorded = {paths[name]: own for name, own in hashes.items()}
    found: dict[str, list[str]] = {}
    for run in runs:
        own = hashes.get(run.name) or recorded.get(paths[run.name]) or run.content("data.valid")
        found.setdefault(str(own), []).append(run.name)
    if len(found) > 1:
        sources = []
        for own, used_by in found.items():
            places = " and ".join(dict.fromkeys(paths[name] for name in used_by))
            known = f"with hash {own[:16]}" if own in hashes.values() else "with unknown hash"
            sources.append(f"{places} {known} ({', '.join(used_by)})")
        raise UserError(f"validation losses on different data cannot be compared: data.valid is {'; '.join(sources)}.")


def group_runs(runs: list[Run]) -> list[Group]:
    """Groups in the order of their first runs.

    A seed occurs only once in a group. If the same experiment was run twice with the same seeds (with other code, for
    example), the runs form two groups: a run joins the group whose name it shares, apart from the seed in the name.
    """
    groups: list[list[Run]] = []
    for run in runs:
        fitting = [group for group in groups if _belongs(run, group)]
        same_name = [group for group in fitting if _stem(group[0].name) == _stem(run.name)]
        if fitting:
            (same_name or fitting)[0].append(run)
        else:
            groups.append([run])
    group_names = [_group_name(group) for group in groups]
    result = []
    for name, group in zip(group_names, groups, strict=True):
        members = ", ".join(run.name for run in group)
        result.append(Group(name if group_names.count(name) == 1 else f"{name} ({members})", tuple(group)))
    return result


def differing_settings(curves: list[Run] | list[Group]) -> dict[str, list[Any]]:
    """`section.key` → value in each run or group (None: not set), for the settings that differ."""
    runs = [each.runs[0] if isinstance(each, Group) else each for each in curves]
    keys = dict.fromkeys(key for run in runs for key in run.settings if key.split(".")[0] not in BOOKKEEPING)
    table = {key: [run.settings.get(key) for run in runs] for key in keys}
    return {key: values for key, values in table.items() if any(value != values[0] for value in values)}


def names(paths: list[Path]) -> list[str]:
    """The last part of each path, preceded by as many parent folders as make the names distinct."""
    parts = [path.resolve().parts for path in paths]
    depths = range(1, max(map(len, parts)) + 1)
    candidates = (["/".join(part[-depth:]) for part in parts] for depth in depths)
    return next(found for found in candidates if len(set(found)) == len(found))


def _belongs(run: Run, group: list[Run]) -> bool:
    """Whether the run has a new seed, otherwise the same settings, and a validation step that all runs share."""
    if run.setting(SEED) is None or run.setting(SEED) in [other.setting(SEED) for other in group]:
        return False
    different = differing_settings([run, group[0]])
    if any(run.content(name) != group[0].content(name) for name in different if name != SEED):
        return False
    return bool({point.step for point in run.valid}.intersection(*({p.step for p in r.valid} for r in group)))


def _stem(name: str) -> str:
    """The name of a run without its seed."""
    return "/".join(filter(None, (SEED_IN_A_NAME.sub("", part) for part in name.split("/"))))


def _group_name(runs: list[Run]) -> str:
    if len(runs) == 1:
        return runs[0].name
    stem, *others = {_stem(run.name) for run in runs}
    return stem if stem and not others else str(runs[0].setting("method.name"))


def _mean(points: list[Point]) -> Point:
    means = {name: sum(getattr(point, name) for point in points) / len(points) for name in (*COSTS, "loss")}
    return Point(step=points[0].step, **means)
