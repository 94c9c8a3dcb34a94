"""The results in the form of the paper's Table 1: perplexities and zero-shot tasks, as means over seeds."""

import json
import logging
import math
from dataclasses import dataclass

from megacocomix.compare.groups import Group, Spread
from megacocomix.compare.runs import Run
from megacocomix.compare.summary import by_value

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Column:
    """A task, the metric that the paper reports for it, and the head of its column."""

    task: str
    metric: str
    head: str

    @property
    def is_perplexity(self) -> bool:
        """Otherwise it is an accuracy, shown in per cent."""
        return "perplexity" in self.metric

    def write(self, value: float) -> str:
        """The value with one decimal, as in the paper."""
        return f"{value if self.is_perplexity else 100 * value:,.1f}"


COLUMNS = (
    Column("lambada_openai", "perplexity", "LAMBADA ppl ↓"),
    Column("wikitext", "word_perplexity", "WikiText word ppl ↓"),
    Column("hellaswag", "acc_norm", "HellaSwag acc_norm ↑"),
    Column("piqa", "acc", "PIQA acc ↑"),
    Column("social_iqa", "acc", "SIQA acc ↑"),
    Column("arc_easy", "acc", "ARC-E acc ↑"),
    Column("winogrande", "acc", "WinoGrande acc ↑"),
)
VALIDATION = Column("", "perplexity", "validation ppl ↓")


@dataclass(frozen=True)
class Tasks:
    """RUN/evals/tasks/step-N.json, as tools/evaluate.py writes it."""

    step: int
    results: dict
    conditions: dict[str, str]
    """Harness, limit, precision, shots."""

    def value(self, column: Column) -> dict | None:
        """`value` and `stderr` of the metric; None if it is absent or not finite."""
        metric = self.results.get(column.task, {}).get("metrics", {}).get(column.metric)
        return metric if metric and metric.get("value") is not None and math.isfinite(metric["value"]) else None

    def made_by(self, column: Column) -> dict[str, str]:
        """Everything that must be equal for two results to be comparable."""
        result = self.results[column.task]
        return self.conditions | {key: str(result.get(key)) for key in ("version", "source", "num_samples")}


def read_tasks(run: Run) -> Tasks | None:
    """The task results of a run's highest step; None if there are none."""
    for file in sorted((run.folder / "evals" / "tasks").glob("step-*.json"), reverse=True):
        try:
            values = json.loads(file.read_text())
            conditions = {key: str(values.get(key)) for key in ("harness", "limit", "precision", "num_fewshot")}
            results = {task: result for task, result in dict(values["results"]).items() if dict(result["metrics"])}
            return Tasks(int(values["step"]), results, conditions)
        except (OSError, KeyError, TypeError, ValueError):
            log.warning("%s holds no task results of tools/evaluate.py and is skipped.", file)
    return None


def table_1(groups: list[Group]) -> tuple[list[str], list[list[str]], list[str]]:
    """Head, rows, and warnings about the results."""
    tasks = {run.name: read_tasks(run) for group in groups for run in group.runs}
    any_task = any(tasks.values())
    refused, warnings = _refused(tasks)
    validation_head, validation = _validation(groups)
    columns = [column for column in COLUMNS if any_task]
    head = ["run", "layers × width", validation_head, *(column.head for column in columns)]
    rows = []
    for group, perplexity in zip(groups, validation, strict=True):
        found = {column: None if column in refused else _over_seeds(group, tasks, column) for column in columns}
        cells = [found[column][1] if found[column] else "–" for column in columns]
        row = [group.name, group.size, perplexity.text(VALIDATION.write), *cells]
        rows.append(row + (_means(perplexity, {c: f[0] for c, f in found.items() if f}) if any_task else []))
    if any_task:
        head += ["mean ppl ↓", "mean acc ↑"]
    return head, rows, warnings + _early(groups, tasks)


def _validation(groups: list[Group]) -> tuple[str, list[Spread]]:
    """Head and perplexity of each group: of the full evaluation if all groups have one over the same windows, else of
    the final validation."""
    texts = {group.evaluations[0].text if group.evaluations else None for group in groups}
    full = len(texts) == 1 and None not in texts
    losses = [[one.loss for one in (group.evaluations if full else group.at_end)] for group in groups]
    head = "held-out ppl ↓" if full else VALIDATION.head
    return head, [Spread.of([math.exp(min(loss, 700.0)) for loss in each]) for each in losses]


def _over_seeds(group: Group, tasks: dict[str, Tasks | None], column: Column) -> tuple[float, str] | None:
    """Mean and text of a cell: ± the standard deviation over seeds, or for one seed ± the harness's standard error."""
    results = [value for run in group.runs if (each := tasks[run.name]) and (value := each.value(column))]
    spread = Spread.of([result["value"] for result in results])
    if spread is None:
        return None
    if spread.n == 1 and (error := results[0].get("stderr")) is not None and math.isfinite(error):
        return spread.mean, f"{column.write(spread.mean)} ± {column.write(error)}"
    some = f" (n = {spread.n})" if spread.n < len(group.runs) else ""
    return spread.mean, spread.text(column.write) + some


def _means(validation: Spread, found: dict[Column, float]) -> list[str]:
    """The mean of the perplexities that are present, and of the accuracies if all are present."""
    perplexities = [validation.mean, *(value for column, value in found.items() if column.is_perplexity)]
    accuracies = [value for column, value in found.items() if not column.is_perplexity]
    some = f" (of {len(perplexities)})" if len(perplexities) < 3 else ""
    mean = f"{sum(perplexities) / len(perplexities):,.1f}{some}"
    return [mean, f"{100 * sum(accuracies) / len(accuracies):.1f}" if len(accuracies) == 5 else "–"]


def _refused(tasks: dict[str, Tasks | None]) -> tuple[set[Column], list[str]]:
    """Columns whose results were measured under different conditions, and a warning for each kind of difference."""
    refused: dict[str, list[Column]] = {}
    for column in COLUMNS:
        made = {name: each.made_by(column) for name, each in tasks.items() if each and each.value(column)}
        keys = dict.fromkeys(key for how in made.values() for key in how)
        different = [key for key in keys if len({how[key] for how in made.values()}) > 1]
        if different:
            how = "; ".join(f"{key} {by_value((name, made[name][key]) for name in made)}" for key in different)
            refused.setdefault(how, []).append(column)
    warnings = [
        f"**Not compared: {', '.join(column.task for column in columns)}**, because the conditions differ: {how}."
        for how, columns in refused.items()
    ]
    return {column for columns in refused.values() for column in columns}, warnings


def _early(groups: list[Group], tasks: dict[str, Tasks | None]) -> list[str]:
    early = [
        f"{run.name} at step {each.step:,} of {run.final.step:,}"
        for group in groups
        for run in group.runs
        if (each := tasks[run.name]) and each.step != run.final.step
    ]
    return [f"Tasks were not evaluated at the last validated step: {'; '.join(early)}."] if early else []
