"""Compare two groups on their mean validation curves.

- At equal x (tokens, FLOPs, seconds), which loss is lower, and by how much?
- How much x does one group need to reach the other's final loss? (The paper's "21.5 % fewer tokens".)

Curves are interpolated linearly in x, only where both have points; nothing is extrapolated. `noise` estimates from the
runs themselves how large a difference chance alone can make.
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
"""Quantities at which runs are compared: an attribute of `Point` → its name for the reader."""

STUDENT_95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13)
"""Student's t, two-sided 95 %, for 1, 2, … degrees of freedom; the last value also serves all higher numbers."""


@dataclass(frozen=True)
class EqualX:
    """The losses of two groups at the largest x that both reached."""

    axis: str
    x: float
    losses: tuple[float, float]
    progress: tuple[float, float]
    """The share of its schedule that each group had completed at x."""
    windows: int | None = None
    """The number of held-out windows of a full evaluation; None for the validation during training."""

    @property
    def difference(self) -> float:
        """First minus second: negative if the first is lower, NaN if either loss is NaN."""
        return self.losses[0] - self.losses[1]


@dataclass(frozen=True)
class ToMatch:
    """The cost x at which one group reached the final validation loss of another, and that other's total cost."""

    axis: str
    target: float
    x: float | None
    """None: the mean curve never reached the loss."""
    other_x: float
    seeds: Spread | None
    """The factor over seeds: from pairs with the same seed if there are at least two, else against the other's mean."""
    num_seeds: int
    """The number of seeds or pairs that were tried; those that never reached the loss are not in `seeds`."""

    @property
    def factor(self) -> float | None:
        """x as a fraction of the other's total cost."""
        return self.x / self.other_x if self.x is not None and self.other_x > 0 else None


@dataclass(frozen=True)
class Noise:
    """How large a difference of final losses chance alone can make."""

    scatter: float | None
    """Twice the standard deviation of the difference of two points, in the run whose validation scatters most."""
    seeds: float | None
    """Standard deviation of the final loss over seeds, pooled over the groups."""
    freedom: int = 0
    """Degrees of freedom of `seeds`."""

    def size(self, group: Group, other: Group) -> float | None:
        """Smaller differences of these two may be chance; None if the runs have too few points to tell."""
        if self.seeds is None:
            return self.scatter
        factor = STUDENT_95[min(self.freedom, len(STUDENT_95)) - 1]
        return factor * self.seeds * math.sqrt(1 / len(group.runs) + 1 / len(other.runs))


def progress(group: Group, axis: str, x: float) -> float:
    """The share of its schedule that a group had completed at cost `x`."""
    xs, steps = group.curve(axis, "step")
    return float(np.interp(x, xs, steps)) / (group.setting("training.steps") or group.final.step)


def equal_x(group: Group, other: Group, axis: str) -> EqualX | None:
    """Both validation losses at the largest x that both reached; None if their ranges of x do not overlap."""
    both = [each.curve(axis) for each in (group, other)]
    x = float(min(xs[-1] for xs, _ in both))
    if x <= 0 or x < max(xs[0] for xs, _ in both):
        return None
    losses = tuple(float(np.interp(x, xs, losses)) for xs, losses in both)
    return EqualX(axis, x, losses, (progress(group, axis, x), progress(other, axis, x)))


def equal_end(group: Group, other: Group) -> EqualX | None:
    """Both full evaluations; None unless both groups ended at the same number of tokens and have been evaluated there
    over the same windows."""
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
    costs = [(_reach(run, partner, axis), getattr(partner.final, axis)) for run, partner in pairs]
    reached = [x / other_x for x, other_x in costs if x is not None and other_x > 0]
    spread = Spread.of(reached) if len(pairs) > 1 else None
    return ToMatch(axis, other.final.loss, _reach(group, other, axis), getattr(other.final, axis), spread, len(pairs))


def noise(groups: list[Group]) -> Noise:
    """Estimate the noise from the runs: from repeated seeds if there are any, else from the scatter of the validation
    points, which is a lower bound."""
    scatters = [value for group in groups for run in group.runs if (value := _scatter(run)) is not None]
    scatter = 2 * math.sqrt(2) * max(scatters) if scatters else None
    repeated = [group for group in groups if len(group.runs) > 1 and math.isfinite(group.spread.std)]
    freedom = sum(len(group.runs) - 1 for group in repeated)
    if not freedom:
        return Noise(scatter, None)
    pooled = sum((len(group.runs) - 1) * group.spread.std**2 for group in repeated) / freedom
    return Noise(scatter, math.sqrt(pooled), freedom)


def _reach(curve: Curve, other: Curve, axis: str) -> float | None:
    """The x at which a curve first reaches the other's final loss, interpolated linearly between two points."""
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
    deviations = losses[1:-1] - (losses[:-2] * (1 - weight) + losses[2:] * weight)
    # std subtracts the mean and with it a constant curvature. If the noise is independent from point to point, a point
    # minus the midpoint of its neighbours has 3/2 of the variance of the noise.
    return float(np.std(deviations, ddof=1) / math.sqrt(1.5))
