"""What makes runs less than a clean comparison, loudest first."""

from collections.abc import Iterable
from typing import Any

from megacocomix.compare.groups import Group
from megacocomix.compare.runs import Run

OTHER_LOSS = {
    "model.vocab_size": "the softmax is over different alternatives, so losses differ for that reason too",
    "model.context": "a longer window alone lowers the loss",
    "data.train": "they learned from different text, not only by different methods",
    "data.tokenizer": "a loss per token depends on what a token is",
}
OTHER_SPEED = (
    "parallel.tensor",
    "parallel.pipeline",
    "parallel.zero",
    "training.precision",
    "training.recompute",
    "training.micro_batch",
)


def comparison_warnings(groups: list[Group]) -> list[str]:
    """A sentence for each."""
    runs = [run for group in groups for run in group.runs]
    said = []
    if runs[0].content("data.valid") is None:
        said.append("**The configs do not name data.valid: nothing shows that the losses are on the same text.**")
    for name, why in OTHER_LOSS.items():
        if _differ(group.runs[0].content(name) for group in groups):
            paths = [group.setting(name) for group in groups]
            shown = paths if _differ(paths) else [group.runs[0].content(name)[:16] for group in groups]
            listing = by_value(zip((group.name for group in groups), shown, strict=True))
            said.append(f"**Different {name}** ({listing}): {why}.")
    sequences = [g.setting("evaluation.batches", 0) * g.setting("training.global_batch", 0) for g in groups]
    if _differ(sequences):
        listing = by_value(zip((group.name for group in groups), sequences, strict=True))
        said.append(f"**Validated on different numbers of sequences** ({listing}).")
    unfinished = [
        f"{run.name} was validated last at step {run.final.step:,} of {steps:,}"
        for run in runs
        if (steps := run.setting("training.steps")) and run.final.step < steps
    ]
    if unfinished:
        said.append(f"Not finished: {'; '.join(unfinished)}.")
    for group in groups:
        if any(run.final.step > group.final.step for run in group.runs):
            said.append(
                f"The mean of {group.name} ends at step {group.final.step:,}, the last that all its seeds have."
            )
    return said + _cache_warnings(runs) + _speed_warnings(groups, runs)


def by_value(pairs: Iterable[tuple[str, Any]]) -> str:
    """`value (name, name), value (name)`: what has which value."""
    found: dict[str, list[str]] = {}
    for name, value in pairs:
        found.setdefault(str(value), []).append(name)
    return ", ".join(f"{value} ({', '.join(having)})" for value, having in found.items())


def _cache_warnings(runs: list[Run]) -> list[str]:
    cached = [run for run in runs if run.setting("teacher.labels", "live") != "live"]
    counted, gone = ([run.name for run in cached if bool(run.cache) == there] for there in (True, False))
    said = []
    if counted:
        once = "what labelling cost is counted as the teacher's FLOPs, once for every token seen"
        said.append(f"Read from a label cache by {', '.join(counted)}: {once}; seconds do not hold it.")
    if gone:
        said.append(f"Read from a label cache that is gone by {', '.join(gone)}: its FLOPs are not counted.")
    return said


def _speed_warnings(groups: list[Group], runs: list[Run]) -> list[str]:
    said = []
    if different := [name for name in OTHER_SPEED if _differ(group.setting(name) for group in groups)]:
        said.append(f"Seconds are not like for like: {', '.join(different)} differ.")
    machines = {run.name: ", then ".join(dict.fromkeys(map(str, run.starts))) for run in runs if run.starts}
    if _differ(str(start) for run in runs for start in run.starts):
        listing = by_value(machines.items())
        said.append(f"**Seconds are not comparable**: the runs were not on the same hardware ({listing}).")
    return said


def _differ(values: Iterable[Any]) -> bool:
    return len({str(value) for value in values}) > 1
