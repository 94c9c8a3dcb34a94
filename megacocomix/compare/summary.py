"""The sentences and table cells of a comparison: results for pairs of groups, the noise, and warnings."""

import math
from collections.abc import Iterable
from typing import Any

from megacocomix.compare import curves
from megacocomix.compare.curves import AXES, EqualX, Noise, ToMatch
from megacocomix.compare.groups import Group
from megacocomix.compare.plots import amount
from megacocomix.compare.runs import Run

LEVEL = 5e-4
"""Smaller differences do not show in three decimals; the losses are then called equal."""
OTHER_LOSS = {
    "model.vocab_size": "the softmax has a different number of outputs, which alone changes the loss",
    "model.context": "a longer context alone lowers the loss",
    "data.train": "the runs were trained on different text, not only with different methods",
    "data.tokenizer": "a loss per token depends on the tokenizer",
}
"""Settings that change the loss whatever the method is → the reason."""
OTHER_SPEED = (
    "parallel.tensor",
    "parallel.pipeline",
    "parallel.zero",
    "training.precision",
    "training.recompute",
    "training.micro_batch",
)


def summarize_pair(group: Group, other: Group, axes: Iterable[str], noise: Noise) -> list[str]:
    """Sentences about one pair: one entry for each axis, and one for the cost of a token if it differs."""
    sentences = []
    for axis in axes:
        full = curves.equal_end(group, other) if axis == "tokens" else None
        equal = full or curves.equal_x(group, other, axis)
        sentences.append(summarize_equal(group, other, axis, equal, noise.size(group, other)))
    return sentences + _summarize_cost(group, other)


def summarize_equal(group: Group, other: Group, axis: str, equal: EqualX | None, noise: float | None) -> str:
    """Which of two losses is lower at equal x, by how much, and whether noise or unfinished schedules weaken that."""
    if equal is None:
        return f"At equal {AXES[axis]}: the validation points of {group.name} and {other.name} do not overlap."
    where = f"At equal {AXES[axis]} ({amount(axis, equal.x)})"
    if equal.windows:
        where += f", over all {equal.windows:,} held-out windows,"
    elif axis == "tokens":
        where += ", in the validation during training,"
    if not math.isfinite(equal.difference):
        names = [g.name for g, loss in zip((group, other), equal.losses, strict=True) if not math.isfinite(loss)]
        return f"{where} the loss of {' and of '.join(names)} is not a finite number, so there is nothing to compare."
    size = abs(equal.difference)
    if size < LEVEL:
        loss = f"{equal.losses[0]:.3f} nats"
        text = f"{where} **{group.name}** and **{other.name}** are equal to three decimals ({loss})."
    else:
        low, high = (group, other) if equal.difference < 0 else (other, group)
        numbers = f"{min(equal.losses):.3f} against {max(equal.losses):.3f}"
        ratio = f"perplexity {100 * -math.expm1(-size):.1f} % lower"
        text = f"{where} **{low.name}** is lower than **{high.name}** by {size:.3f} nats ({numbers}; {ratio})."
        if noise is not None and size < noise:
            text += f" This is less than the noise of {noise:.3f} nats, so it may be chance."
    if abs(equal.progress[0] - equal.progress[1]) > 0.05:
        first, second = (f"{100 * part:.0f} %" for part in equal.progress)
        text += f" At that point {group.name} had completed {first} of its schedule, and {other.name} {second}."
    return text


def equal_cell(equal: EqualX | None, noise: float | None) -> str:
    """A difference at equal x for a table, bold if it is larger than the noise."""
    if equal is None:
        return "–"
    if not math.isfinite(equal.difference):
        return "not finite"
    text = f"{equal.difference:+.3f} ({100 * math.expm1(min(equal.difference, 700.0)):+.1f} %)".replace("-", "−")
    return f"**{text}**" if noise is not None and abs(equal.difference) >= noise else text


def match_cell(match: ToMatch) -> str:
    """The cost to match as a percentage of the other's total cost: `78.5 % (−21.5 %)`; over seeds `78.5 ± 1.3 %`."""
    seeds, tried = match.seeds, match.num_seeds
    some = f"{seeds.n if seeds else 0} of {tried} seeds" if tried > 1 and (seeds is None or seeds.n < tried) else ""
    if match.factor is None:
        return f"not reached by the mean, but by {some}" if some and seeds else "not reached"
    share = 100 * match.factor
    spread = f" ± {100 * seeds.std:.1f}" if seeds and seeds.std is not None else ""
    text = f"{share:.1f}{spread} % ({round(share - 100, 1) + 0.0:+.1f} %)".replace("-", "−")
    return text + (f", {some}" if some else "")


def summarize_noise(groups: list[Group], noise: Noise) -> str:
    """How large a difference must be to be more than chance, as far as these runs can show."""
    if noise.seeds is None and noise.scatter is None:
        return "One seed each and too few validations: these runs cannot show how large a difference chance makes."
    if noise.seeds is None:
        return (
            f"One seed each: differences below {noise.scatter:.3f} nats may be chance (twice the scatter of the "
            "validation during training). The effect of another seed was not measured and may be larger."
        )
    deviation = f"The standard deviation of the final loss over seeds is {noise.seeds:.3f} nats"
    sizes = {(len(other.runs), len(groups[0].runs)): noise.size(other, groups[0]) for other in groups[1:]}
    if not sizes:
        return f"{deviation}."
    listed = ", ".join(f"{size:.3f} nats for {n} against {base}" for (n, base), size in sorted(sizes.items()))
    text = (
        f"{deviation} ({noise.freedom} degrees of freedom). To be larger than chance (Student's t, 95 %), a difference "
        f"of two means must reach {listed} seeds."
    )
    return text + (" Of many comparisons, one in twenty exceeds this by chance alone." if len(groups) > 4 else "")


def comparison_warnings(groups: list[Group]) -> list[str]:
    """A warning for everything that weakens the comparison, the most serious first."""
    runs = [run for group in groups for run in group.runs]
    warnings = []
    if runs[0].content("data.valid") is None:
        warnings.append("**The configs do not set data.valid: nothing shows that the losses are on the same text.**")
    for name, reason in OTHER_LOSS.items():
        contents = [group.runs[0].content(name) for group in groups]
        if _differ(contents):
            paths = [group.setting(name) for group in groups]
            shown = paths if _differ(paths) else [content[:16] for content in contents]
            warnings.append(f"**Different {name}** ({_by_group(groups, shown)}): {reason}.")
    sequences = [g.setting("evaluation.batches", 0) * g.setting("training.global_batch", 0) for g in groups]
    if _differ(sequences):
        warnings.append(f"**Validated on different numbers of sequences** ({_by_group(groups, sequences)}).")
    unfinished = [
        f"the last validation of {run.name} was at step {run.final.step:,} of {steps:,}"
        for run in runs
        if (steps := run.setting("training.steps")) and run.final.step < steps
    ]
    if unfinished:
        warnings.append(f"Not finished: {'; '.join(unfinished)}.")
    for group in groups:
        if any(run.final.step > group.final.step for run in group.runs):
            last = f"step {group.final.step:,}, the last at which all its seeds were validated"
            warnings.append(f"The mean of {group.name} ends at {last}.")
    return warnings + _cache_warnings(runs) + _speed_warnings(groups, runs)


def by_value(pairs: Iterable[tuple[str, Any]]) -> str:
    """(name, value) pairs as `value (name, name), value (name)`."""
    found: dict[str, list[str]] = {}
    for name, value in pairs:
        found.setdefault(str(value), []).append(name)
    return ", ".join(f"{value} ({', '.join(names)})" for value, names in found.items())


def _summarize_cost(group: Group, other: Group) -> list[str]:
    if min(group.final.flops, other.final.flops, group.final.tokens, other.final.tokens) <= 0:
        return []
    student, total = (
        (getattr(group.final, kind) / group.final.tokens) / (getattr(other.final, kind) / other.final.tokens)
        for kind in ("flops", "total_flops")
    )
    if max(abs(student - 1), abs(total - 1)) < 0.005:
        return []
    teacher = f" ({total:.2f} × with the teacher's)" if abs(total - student) > 1e-3 * student else ""
    return [f"A token of **{group.name}** takes {student:.2f} × the student FLOPs of **{other.name}**{teacher}."]


def _cache_warnings(runs: list[Run]) -> list[str]:
    cached = [run for run in runs if run.setting("teacher.labels", "live") != "live"]
    counted, gone = (", ".join(run.name for run in cached if bool(run.cache) == there) for there in (True, False))
    warnings = []
    if counted:
        cost = "the cost of labelling counts as teacher FLOPs, once for every token seen; it is not in the seconds"
        warnings.append(f"Labels from a cache ({counted}): {cost}.")
    if gone:
        warnings.append(f"Labels from a cache that no longer exists ({gone}): the FLOPs of labelling are not counted.")
    return warnings


def _speed_warnings(groups: list[Group], runs: list[Run]) -> list[str]:
    warnings = []
    if different := [name for name in OTHER_SPEED if _differ(group.setting(name) for group in groups)]:
        warnings.append(f"Seconds are not directly comparable: the runs differ in {', '.join(different)}.")
    machines = {run.name: ", then ".join(dict.fromkeys(map(str, run.starts))) for run in runs if run.starts}
    if _differ(str(start) for run in runs for start in run.starts):
        warnings.append(f"**Seconds are not comparable**: different hardware ({by_value(machines.items())}).")
    return warnings


def _by_group(groups: list[Group], values: list[Any]) -> str:
    return by_value((group.name, value) for group, value in zip(groups, values, strict=True))


def _differ(values: Iterable[Any]) -> bool:
    return len({str(value) for value in values}) > 1
