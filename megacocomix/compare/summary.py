"""What the numbers say, in sentences that say no more than they do: which is lower, at equal what, by how much, whether
that means anything, and what stands against reading it as it is."""

import math
from collections.abc import Iterable

from megacocomix.compare import curves
from megacocomix.compare.curves import AXES, EqualX, Noise, ToMatch
from megacocomix.compare.groups import Group
from megacocomix.compare.plots import amount

LEVEL = 5e-4
"""Differences that three decimals do not show are called level."""


def summarize_pair(group: Group, other: Group, axes: Iterable[str], noise: Noise) -> list[str]:
    """What the numbers say about one pair, a sentence or two for each thing that can be held equal."""
    said = []
    for axis in axes:
        full = curves.equal_end(group, other) if axis == "tokens" else None
        equal = full or curves.equal_x(group, other, axis)
        said.append(summarize_equal(group, other, axis, equal, noise.size(group, other)))
    cost = _summarize_cost(group, other)
    return [*said, cost] if cost else said


def summarize_equal(group: Group, other: Group, axis: str, equal: EqualX | None, noise: float | None) -> str:
    """Which of two is lower at equal x, by how much, and what stands against reading that as it is."""
    if equal is None:
        return f"At equal {AXES[axis]}: the validation points of {group.name} and {other.name} share no stretch."
    where = f"At equal {AXES[axis]} ({amount(axis, equal.x)})"
    if equal.windows:
        where += f", over all {equal.windows:,} held-out windows,"
    elif axis == "tokens":
        where += ", in the validation during training,"
    if not math.isfinite(equal.difference):
        lost = [g.name for g, loss in zip((group, other), equal.losses, strict=True) if not math.isfinite(loss)]
        return f"{where} the loss of {' and of '.join(lost)} is not a finite number: nothing to compare."
    size = abs(equal.difference)
    if size < LEVEL:
        level = f"level to three decimals ({equal.losses[0]:.3f} nats)"
        text = f"{where} **{group.name}** and **{other.name}** are {level}."
    else:
        low, high = (group, other) if equal.difference < 0 else (other, group)
        numbers = f"{min(equal.losses):.3f} against {max(equal.losses):.3f}"
        ratio = f"perplexity {100 * -math.expm1(-size):.1f} % lower"
        text = f"{where} **{low.name}** is lower than **{high.name}** by {size:.3f} nats ({numbers}; {ratio})."
        if noise is not None and size < noise:
            text += f" That is less than {noise:.3f}: do not read it as real."
    if abs(equal.progress[0] - equal.progress[1]) > 0.05:
        mine, its = (f"{100 * part:.0f} %" for part in equal.progress)
        text += f" There {group.name} was at {mine} of its schedule and {other.name} at {its}."
    return text


def equal_cell(equal: EqualX | None, noise: float | None) -> str:
    """A difference at equal x for a table, bold where it is more than noise."""
    if equal is None:
        return "–"
    if not math.isfinite(equal.difference):
        return "lost"
    text = f"{equal.difference:+.3f} ({100 * math.expm1(min(equal.difference, 700.0)):+.1f} %)".replace("-", "−")
    return f"**{text}**" if noise is not None and abs(equal.difference) >= noise else text


def match_cell(match: ToMatch) -> str:
    """What was needed to match, as a part of what the other had spent: `78.5 % (−21.5 %)`; of seeds `78.5 ± 1.3 %`."""
    seeds, asked = match.seeds, match.num_seeds
    some = f"{seeds.n if seeds else 0} of {asked} seeds" if asked > 1 and (seeds is None or seeds.n < asked) else ""
    if match.factor is None:
        return f"not reached ({some} do)" if some and seeds else "not reached"
    share = 100 * match.factor
    spread = f" ± {100 * seeds.std:.1f}" if seeds and seeds.std is not None else ""
    text = f"{share:.1f}{spread} % ({round(share - 100, 1) + 0.0:+.1f} %)".replace("-", "−")
    return text + (f", {some}" if some else "")


def summarize_noise(groups: list[Group], noise: Noise) -> str:
    """From where on a difference means anything, as far as these runs can tell."""
    if noise.seeds is None:
        if noise.scatter is None:
            return "One seed each and too few validations: these runs cannot tell how large a difference chance makes."
        return (
            f"One seed each: differences below {noise.scatter:.3f} nats should not be read as real (twice the scatter "
            "of the validation during training). How far another seed moves a run is not measured and may be more."
        )
    sizes = {(len(other.runs), len(groups[0].runs)): noise.size(other, groups[0]) for other in groups[1:]}
    if not sizes:
        return f"Over seeds the final loss has a standard deviation of {noise.seeds:.3f} nats."
    listed = ", ".join(f"{size:.3f} nats for {n} against {base}" for (n, base), size in sorted(sizes.items()))
    text = (
        f"Over seeds the final loss has a standard deviation of {noise.seeds:.3f} nats ({noise.freedom} degrees of "
        f"freedom): a difference of two means is beyond chance (Student's t, 95 %) from {listed} seeds."
    )
    many = " Of many comparisons one in twenty is beyond that by chance alone." if len(groups) > 4 else ""
    return text + many


def _summarize_cost(group: Group, other: Group) -> str | None:
    if min(group.final.flops, other.final.flops, group.final.tokens, other.final.tokens) <= 0:
        return None
    student, total = (
        (getattr(group.final, kind) / group.final.tokens) / (getattr(other.final, kind) / other.final.tokens)
        for kind in ("flops", "total_flops")
    )
    if max(abs(student - 1), abs(total - 1)) < 0.005:
        return None
    teacher = f" ({total:.2f} × with the teacher counted)" if abs(total - student) > 1e-3 * student else ""
    return f"A token costs **{group.name}** {student:.2f} × the student FLOPs of **{other.name}**{teacher}."
