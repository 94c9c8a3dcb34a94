"""Questions about a pair of groups, answered on their mean validation curves.

- At equal x (tokens, FLOPs, seconds), which loss is lower, and by how much?
- How much x does one need to reach the other's final loss? (The paper's "21.5 % fewer tokens".)

Curves are linearly interpolated in x, and only where both have points: nothing is extrapolated. A difference without
a scale says little, so `noise` estimates from the runs themselves how much of it could be chance.
"""

import math
from dataclasses import dataclass

import numpy as np

from megacocomix.compare.groups import Group, Spread
from megacocomix.compare.runs import Curve, Run

AXES = {
    "tokens": "tokens",
    "total_flops": "FLOPs with the teacher",
    "flops": "student FLOPs",
    "seconds": "seconds",
}
"""What two runs can be equal in: an attribute of `Point`, and the words for it."""

STUDENT_95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13)
"""Student's t, two-sided 95 %, by degrees of freedom from 1; the last one also serves all that are more."""


@dataclass(frozen=True)
class EqualX:
    """Two losses at the largest x that both groups reached."""

    axis: str
    x: float
    losses: tuple[float, float]
    progress: tuple[float, float]
    windows: int | None = None
    """How many the losses are over, if all held-out ones. None: the validation during training."""

    @property
    def difference(self) -> float:
        """First minus second: negative where the first is lower, NaN where either loss is."""
        return self.losses[0] - self.losses[1]


@dataclass(frozen=True)
class ToMatch:
    """What one group needed to reach the final validation loss of another, as a part of what that one had spent."""

    axis: str
    target: float
    x: float | None
    """None: the mean curve never reached it."""
    other_x: float
    seeds: Spread | None
    """The factor over seeds: of pairs with the same seed where there are any, else against the other's mean."""
    num_seeds: int
    """Seeds that were asked; those that never reached it are not in `seeds`."""

    @property
    def factor(self) -> float | None:
        """x as a part of what the other spent to get there."""
        return self.x / self.other_x if self.x is not None and self.other_x > 0 else None


@dataclass(frozen=True)
class Noise:
    """How large a difference of final losses chance alone makes."""

    scatter: float | None
    """Twice the standard deviation of a difference of two points of the run whose validation scatters most."""
    seeds: float | None
    """Standard deviation of the final loss over seeds, pooled over the groups."""
    freedom: int = 0
    """Degrees of freedom of `seeds`."""

    def size(self, group: Group, other: Group) -> float | None:
        """Smaller differences of these two should not be read as real; None where the runs hold too little to tell."""
        if self.seeds is None:
            return self.scatter
        factor = STUDENT_95[min(self.freedom, len(STUDENT_95)) - 1]
        return factor * self.seeds * math.sqrt(1 / len(group.runs) + 1 / len(other.runs))


def progress(group: Group, axis: str, x: float) -> float:
    """The part of the schedule that lay behind a group when it had spent `x`."""
    xs, steps = group.curve(axis, "step")
    return float(np.interp(x, xs, steps)) / (group.setting("training.steps") or group.final.step)


def equal_x(group: Group, other: Group, axis: str) -> EqualX | None:
    """Both validation losses at the largest x both reached; None where they share no stretch of x."""
    (xs, losses), (other_xs, other_losses) = group.curve(axis), other.curve(axis)
    x = min(xs[-1], other_xs[-1])
    if x <= 0 or x < max(xs[0], other_xs[0]):
        return None
    return EqualX(
        axis,
        float(x),
        (float(np.interp(x, xs, losses)), float(np.interp(x, other_xs, other_losses))),
        (progress(group, axis, x), progress(other, axis, x)),
    )


def equal_end(group: Group, other: Group) -> EqualX | None:
    """Both full evaluations, of groups that ended at the same number of tokens and were evaluated there alike."""
    ours, theirs = group.evaluations, other.evaluations
    if group.final.tokens != other.final.tokens or not ours or not theirs or ours[0].text != theirs[0].text:
        return None
    losses = tuple(sum(one.loss for one in each) / len(each) for each in (ours, theirs))
    x = group.final.tokens
    return EqualX("tokens", x, losses, (progress(group, "tokens", x), progress(other, "tokens", x)), ours[0].windows)


def x_to_match(group: Group, other: Group, axis: str) -> ToMatch:
    """The x at which `group` first reaches the final validation loss of `other`."""
    pairs = [(run, other.seeds[seed]) for seed, run in group.seeds.items() if seed in other.seeds]
    if len(pairs) < 2:
        pairs = [(run, other) for run in group.runs]
    factors = [(_reach(run, mate, axis), getattr(mate.final, axis)) for run, mate in pairs]
    reached = [x / spent for x, spent in factors if x is not None and spent > 0]
    spread = Spread.of(reached) if len(pairs) > 1 else None
    return ToMatch(axis, other.final.loss, _reach(group, other, axis), getattr(other.final, axis), spread, len(pairs))


def noise(groups: list[Group]) -> Noise:
    """What the runs themselves say about chance: their seeds, where some were repeated, else their scatter, which is a
    lower bound."""
    worst = max((value for group in groups for run in group.runs if (value := _scatter(run)) is not None), default=None)
    scatter = 2 * math.sqrt(2) * worst if worst is not None else None
    repeated = [group for group in groups if len(group.runs) > 1 and math.isfinite(group.spread.std)]
    freedom = sum(len(group.runs) - 1 for group in repeated)
    if not freedom:
        return Noise(scatter, None)
    pooled = sum((len(group.runs) - 1) * group.spread.std**2 for group in repeated) / freedom
    return Noise(scatter, math.sqrt(pooled), freedom)


def _reach(curve: Curve, other: Curve, axis: str) -> float | None:
    """The x at which a curve first has the other's final loss, on the straight line between two points."""
    (xs, losses), target = curve.curve(axis), other.final.loss
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
