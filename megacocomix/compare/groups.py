"""Runs that repeat one experiment with other seeds are one group, and a group is what is compared.

Its curve is the mean of its runs' at the steps at which all of them were validated, in the loss and in what was spent.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from megacocomix.compare.runs import Curve, Evaluation, Point, Run, read_run
from megacocomix.config.effective import BOOKKEEPING, row_of_the_paper
from megacocomix.errors import UserError

SEED = "training.seed"
SEED_IN_A_NAME = re.compile(r"(^|[-_.])(s|seed)?[-_=]?\d+$")


@dataclass(frozen=True)
class Spread:
    """A quantity over seeds."""

    mean: float
    std: float | None
    """None for one seed."""
    n: int

    @classmethod
    def of(cls, values: list[float]) -> "Spread | None":
        """None of no values."""
        if not values:
            return None
        with np.errstate(invalid="ignore", over="ignore"):  # of a lost run the spread is lost too
            std = float(np.std(values, ddof=1)) if len(values) > 1 else None
        return cls(sum(values) / len(values), std, len(values))

    def text(self, write: Callable[[float], str]) -> str:
        """mean ± standard deviation, written by `write`."""
        return write(self.mean) + (f" ± {write(self.std)}" if self.std is not None else "")


@dataclass(frozen=True)
class Group(Curve):
    """Runs that differ in nothing but the seed; one run is a group too."""

    name: str
    runs: tuple[Run, ...]

    @cached_property
    def valid(self) -> tuple[Point, ...]:
        """The mean of the runs' points, at the steps that all of them have."""
        by_step = [{point.step: point for point in run.valid} for run in self.runs]
        shared = [step for step in by_step[0] if all(step in points for points in by_step)]
        return tuple(_mean([points[step] for points in by_step]) for step in shared)

    @property
    def at_end(self) -> list[Point]:
        """Each run's point at the last step of the mean."""
        return [next(point for point in run.valid if point.step == self.final.step) for run in self.runs]

    @property
    def seed_curves(self) -> list[Run]:
        """The runs at the steps of the mean and at what the mean had spent there: they differ from it in the loss."""
        curves = []
        for run in self.runs:
            losses = {point.step: point.loss for point in run.valid}
            curves.append(replace(run, valid=tuple(replace(mean, loss=losses[mean.step]) for mean in self.valid)))
        return curves

    @property
    def spread(self) -> Spread:
        """The final validation loss over the seeds."""
        return Spread.of([point.loss for point in self.at_end])

    @property
    def evaluations(self) -> list[Evaluation]:
        """The full evaluations of all runs if all were at the end and over the same windows; else none."""
        found = [run.evaluation for run in self.runs if run.evaluation and run.evaluation.step == self.final.step]
        return found if len(found) == len(self.runs) and len({one.text for one in found}) == 1 else []

    @property
    def seeds(self) -> dict[Any, Run]:
        """Seed → run."""
        return {run.setting(SEED): run for run in self.runs}

    @property
    def row(self) -> str | None:
        """What the paper calls it."""
        return row_of_the_paper(self.runs[0].method)

    def setting(self, name: str, default: Any = None) -> Any:
        """`section.key` of the config that the runs share."""
        return self.runs[0].setting(name, default)


def read_groups(folders: list[str | Path]) -> list[Group]:
    """Read two or more run folders that can be compared. Raises one UserError with every problem."""
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
    """Losses on different held-out text are different quantities; no table should put them side by side.

    Text is known by its hash. Where a run does not record it, its path must lead to a hash that another run recorded,
    or be every run's.
    """
    paths = {run.name: str(run.setting("data.valid")) for run in runs}
    hashes = {run.name: run.inputs["data.valid"] for run in runs if run.inputs and "data.valid" in run.inputs}
    recorded = {paths[name]: own for name, own in hashes.items()}
    found: dict[str, list[str]] = {}
    for run in runs:
        own = hashes.get(run.name) or recorded.get(paths[run.name]) or run.content("data.valid")
        found.setdefault(str(own), []).append(run.name)
    if len(found) > 1:
        said = []
        for own, used_by in found.items():
            places = " and ".join(dict.fromkeys(paths[name] for name in used_by))
            known = f"of hash {own[:16]}" if own in hashes.values() else "of a hash that nothing records"
            said.append(f"{places} {known} ({', '.join(used_by)})")
        raise UserError(f"validation losses on different data cannot be compared: data.valid is {'; '.join(said)}.")


def group_runs(runs: list[Run]) -> list[Group]:
    """Groups in the order of their first runs. A seed stands in a group once: the same experiment run again, with
    other code for example, is another group, made of the folders of the same name but for the seed."""
    groups: list[list[Run]] = []
    for run in runs:
        fits = [group for group in groups if _belongs(run, group)]
        named_alike = [group for group in fits if _stem(group[0].name) == _stem(run.name)]
        if fits:
            (named_alike or fits)[0].append(run)
        else:
            groups.append([run])
    named = [_group_name(group) for group in groups]
    return [
        Group(name if named.count(name) == 1 else f"{name} ({', '.join(run.name for run in group)})", tuple(group))
        for name, group in zip(named, groups, strict=True)
    ]


def differing_settings(curves: list[Run] | list[Group]) -> dict[str, list[Any]]:
    """`section.key` → value each (None: has none), for the settings in which they differ."""
    runs = [each.runs[0] if isinstance(each, Group) else each for each in curves]
    keys = dict.fromkeys(key for run in runs for key in run.settings if key.split(".")[0] not in BOOKKEEPING)
    table = {key: [run.settings.get(key) for run in runs] for key in keys}
    return {key: values for key, values in table.items() if any(value != values[0] for value in values)}


def names(paths: list[Path]) -> list[str]:
    """The last part of each path, with as many parents as it takes to tell them apart."""
    parts = [path.resolve().parts for path in paths]
    for depth in range(1, max(map(len, parts)) + 1):
        found = ["/".join(part[-depth:]) for part in parts]
        if len(set(found)) == len(found):
            return found
    raise AssertionError("distinct paths have distinct names")


def _belongs(run: Run, group: list[Run]) -> bool:
    if run.setting(SEED) is None or run.setting(SEED) in [other.setting(SEED) for other in group]:
        return False
    different = differing_settings([run, group[0]])
    if any(run.content(name) != group[0].content(name) for name in different if name != SEED):
        return False
    return bool({point.step for point in run.valid}.intersection(*({p.step for p in r.valid} for r in group)))


def _stem(name: str) -> str:
    return "/".join(filter(None, (SEED_IN_A_NAME.sub("", part) for part in name.split("/"))))


def _group_name(runs: list[Run]) -> str:
    if len(runs) == 1:
        return runs[0].name
    stems = {_stem(run.name) for run in runs}
    return next(iter(stems)) if len(stems) == 1 and stems != {""} else str(runs[0].setting("method.name"))


def _mean(points: list[Point]) -> Point:
    names = [each.name for each in fields(Point) if each.name != "step"]
    means = {name: sum(getattr(point, name) for point in points) / len(points) for name in names}
    return Point(step=points[0].step, **means)
