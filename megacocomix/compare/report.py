"""Write the page of a comparison: comparison.md with tables and sentences, and plots.

Runs that differ only in the seed are one group. The other groups are compared with the first group.
"""

import math
import shlex
from collections.abc import Callable, Iterable
from contextlib import suppress
from itertools import combinations
from pathlib import Path

from megacocomix.compare import curves, identical
from megacocomix.compare.curves import AXES, Noise
from megacocomix.compare.figure6 import plot_figure_6
from megacocomix.compare.groups import SEED, Group, Spread, differing_settings
from megacocomix.compare.plots import FEW, MOST_NATS, PLOTS, X_LABELS, amount, plot, plot_axes, save, shows_training
from megacocomix.compare.summary import comparison_warnings, equal_cell, match_cell, summarize_noise, summarize_pair
from megacocomix.compare.table import table_1
from megacocomix.errors import UserError
from megacocomix.files import write_text

PAGE = "comparison.md"
FIGURE_6 = "figure6"
NOTE = (
    "Losses are compared at the largest x that both runs reached, in the validation during training unless stated "
    "otherwise, interpolated linearly between validations. A run in the middle of its learning-rate schedule usually "
    "has a higher loss than a run planned to end there. The CoCoMix paper compares at equal tokens; equal FLOPs and "
    "equal seconds include the cost of the concepts."
)
MATCH_NOTE = (
    "The cost at which the validation of a run first reached the final validation loss of another run, as a percentage "
    "of that other run's total cost (the paper's 21.5 % fewer tokens are 78.5 % here). Costs are interpolated linearly "
    "between validations and not extrapolated."
)
SEEDS_NOTE = (
    "Repeated runs are compared by their mean curve; ± is the standard deviation of the same ratio over the single "
    "runs, each taken against the run of the same seed if there is one."
)
TABLE_NOTE = (
    "Accuracies in per cent. Repeated runs: mean ± standard deviation over seeds. Single runs: ± the harness's "
    "standard error, which measures the sampling of the task's documents and not the effect of the seed."
)
PLOT_NOTE = "Points and lines: validation during training, perplexity on a log axis. Each plot is also saved as SVG."
AGAINST_NOTE = "Right: perplexity relative to the first run at the same x, where the first run has points."
BAND_NOTE = "Repeated runs: the line is the mean loss, and the band reaches from the best seed to the worst."
TRAINING_NOTE = "Faint lines: training loss, smoothed."

Columns = dict[str, Callable[[Group], object]]
"""Head of a column → the function that returns a group's cell."""


def write_report(groups: list[Group], out: str | Path, command: str, force: bool = False) -> Path:
    """Write out/comparison.md and out/plots/. Raises UserError if `out` holds a comparison, unless `force`."""
    out = Path(out)
    page = out / PAGE
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; name a folder.")
    if page.exists() and not force:
        raise UserError(f"--out {out} already holds a comparison; name another folder, or add --force to replace it.")
    (out / "plots").mkdir(parents=True, exist_ok=True)
    figure, caption = plot_figure_6(groups)
    text = compose(groups, command, caption)  # before the plots: if this fails, an older page and its plots stay whole
    if figure:
        save(figure, out / "plots" / FIGURE_6)
    for axis in plot_axes(groups):
        save(plot(groups, axis), out / "plots" / PLOTS[axis])
    write_text(page, text)
    return page


def compose(groups: list[Group], command: str, figure_6: str = "") -> str:
    """The text of comparison.md; `figure_6` is the caption of that figure, empty if there is no figure."""
    noise = curves.noise(groups)
    names = [group.name for group in groups]
    title = " · ".join(names) if len(groups) <= FEW else f"{len(groups)} methods, compared with {names[0]}"
    head, rows, task_warnings = table_1(groups)
    warnings = [*comparison_warnings(groups), *task_warnings]
    parts = [f"# {title}"]
    parts += ["## Warnings", bullets(warnings)] if warnings else []
    parts += ["## Runs", table(*_runs_table(groups)), "## Results", table(*results_table(groups))]
    parts += _differences(groups, noise)
    if len(groups) > 1:
        parts += ["## Cost to match a final loss", MATCH_NOTE + (f" {SEEDS_NOTE}" if _repeated(groups) else "")]
        parts += [table(*match_table(groups))]
    parts += ["## In the form of the paper's Table 1", table(head, rows)]
    parts += [TABLE_NOTE] if len(head) > 3 else []
    notes = [
        PLOT_NOTE,
        AGAINST_NOTE if len(groups) > FEW else "",
        BAND_NOTE if _repeated(groups) else "",
        TRAINING_NOTE if shows_training(groups) else "",
    ]
    parts += ["## Curves", " ".join(filter(None, notes))]
    parts += [f"![perplexity over {X_LABELS[axis]}](plots/{PLOTS[axis]}.png)" for axis in plot_axes(groups)]
    if figure_6:
        parts += ["## The paper's Figure 6", f"![panels of Figure 6](plots/{FIGURE_6}.png)", figure_6]
    parts += ["## Settings that differ", _settings_section(groups), "## Commands", _commands(groups, command)]
    return "\n\n".join(parts) + "\n"


def results_table(groups: list[Group]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the results, for the page and for the terminal."""
    columns: Columns = {"run": lambda group: group.name}
    if _repeated(groups):
        columns["seeds"] = lambda group: len(group.runs) if len(group.runs) > 1 else "one seed"
    columns["validation loss / ppl"] = lambda group: _loss([point.loss for point in group.at_end])
    windows = {run.evaluation.windows for group in groups for run in group.runs if run.evaluation}
    if windows:
        head = f"held-out loss / ppl (all {' or '.join(f'{n:,}' for n in sorted(windows))} windows)"
        columns[head] = lambda group: _held_out(group, shows_windows=len(windows) > 1)
    columns |= {
        "tokens": lambda group: amount("tokens", group.final.tokens),
        "student FLOPs": lambda group: amount("flops", group.final.flops),
        "teacher FLOPs": lambda group: amount("flops", group.final.teacher_flops),
        "seconds": lambda group: amount("seconds", group.final.seconds),
        "tokens/s": lambda group: (
            amount("tokens", group.final.tokens / group.final.seconds) if group.final.seconds > 0 else "–"
        ),
    }
    return _fill(columns, groups)


def match_table(groups: list[Group]) -> tuple[list[str], list[list[str]]]:
    """The cost at which the others reached the first group's final loss, then at which it reached theirs."""
    axes = plot_axes(groups)
    first, *others = groups
    rows = []
    for group, other in [*((group, first) for group in others), *((first, group) for group in others)]:
        cells = [match_cell(curves.x_to_match(group, other, axis)) for axis in axes]
        rows.append([group.name, f"{other.name} ({other.final.loss:.3f})", *cells])
    return ["run", "reaches the final loss of", *(AXES[axis] for axis in axes)], rows


def _differences(groups: list[Group], noise: Noise) -> list[str]:
    """The comparison of the others with the first group: sentences for one other, a table for several."""
    first, *others = groups
    axes = plot_axes(groups)
    closing = [summarize_noise(groups, noise), *_identical(groups)]
    if len(others) < 2:
        sentences = [sentence for group in others for sentence in summarize_pair(group, first, axes, noise)]
        return ["## Summary", bullets([*sentences, *closing]), *([NOTE] if others else [])]
    rows = []
    for group in others:
        size = noise.size(group, first)
        rows.append([group.name, *(equal_cell(curves.equal_x(group, first, axis), size) for axis in axes)])
    head = ["run", *(f"at equal {AXES[axis]}" for axis in axes)]
    about = f"Validation loss minus that of **{first.name}**, in nats (perplexity in per cent); below 0 is better."
    if noise.size(first, first) is not None:
        about += " Bold: larger than the noise stated below."
    return [f"## Compared with {first.name}", about, table(head, rows), bullets(closing), NOTE]


def _identical(groups: list[Group]) -> Iterable[str]:
    """A sentence for each pair of runs that are identical to the bit. Only runs with equal final losses are read."""
    runs = [run for group in groups for run in group.runs]
    for a, b in combinations(runs, 2):
        with suppress(UserError):  # if a checkpoint cannot be read, nothing is claimed
            if a.final.loss == b.final.loss and (answer := identical.compare(a.folder, b.folder)).identical:
                yield f"**{a.name}** and **{b.name}** are {answer.text}."


def _repeated(groups: list[Group]) -> bool:
    return any(len(group.runs) > 1 for group in groups)


def _held_out(group: Group, shows_windows: bool) -> str:
    found = [run.evaluation for run in group.runs if run.evaluation]
    if not found:
        return "–"
    full = found if group.evaluations else found[:1]
    at = "" if full[0].step == group.final.step else f" at step {full[0].step:,}"
    some = "" if len(full) == len(group.runs) else f", {group.runs[0].name} alone"
    return _loss([one.loss for one in full]) + at + (f", {full[0].windows:,} windows" if shows_windows else "") + some


def _runs_table(groups: list[Group]) -> tuple[list[str], list[list[str]]]:
    columns: Columns = {
        "run": lambda group: group.name,
        "method": lambda group: group.setting("method.name"),
        "layers × width": lambda group: group.size,
        "context": lambda group: group.setting("model.context"),
        "batch": lambda group: group.setting("training.global_batch"),
        "steps": lambda group: f"{group.final.step:,}",
        "seed": lambda group: ", ".join(map(_cell, group.seeds)),
        "processes × device": lambda group: ", ".join(
            dict.fromkeys(str(run.starts[-1]) for run in group.runs if run.starts)
        ),
    }
    return _fill(columns, groups)


def _fill(columns: Columns, groups: list[Group]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of a table with a row for each group."""
    return list(columns), [[_cell(of(group)) for of in columns.values()] for group in groups]


def _settings_section(groups: list[Group]) -> str:
    different = differing_settings(groups)
    if _repeated(groups):  # the first table shows the seeds
        different.pop(SEED, None)
    if not different:
        return "None."
    if len(groups) <= FEW:
        rows = [[f"`{key}`", *map(_cell, values)] for key, values in different.items()]
        return table(["setting", *(group.name for group in groups)], rows)
    given = {key: {str(value) for value in values if value is not None} for key, values in different.items()}
    shared = " ".join(f"`{key}={next(iter(values))}`" for key, values in given.items() if len(values) == 1)
    own = {key: different[key] for key, values in given.items() if len(values) > 1}
    rows = [[group.name, *(_cell(values[index]) for values in own.values())] for index, group in enumerate(groups)]
    parts = [table(["run", *(f"`{key}`" for key in own)], rows)] if own else []
    return "\n\n".join([*parts, f"Equal in all runs that use the setting: {shared}."] if shared else parts)


def _commands(groups: list[Group], command: str) -> str:
    lines = []
    for group in groups:
        run, *others = group.runs
        like = f"; the same with other seeds: {', '.join(other.name for other in others)}" if others else ""
        if run.starts:
            last = run.starts[-1]
            lines += [f"# {run.name}: the last start of each process ({last}){like}", last.command]
        else:
            config = shlex.quote(str(run.folder / "config.yaml"))
            lines += [f"# {run.name}: from its resolved config{like}"]
            lines += [f"deepspeed launcher/pretrain.py --config {config} run=FOLDER"]
    return "\n".join(["```sh", *lines, "# this comparison", command, "```"])


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def bullets(lines: Iterable[str]) -> str:
    """A Markdown list."""
    return "\n".join(f"- {line}" for line in lines)


def _cell(value: object) -> str:
    return "–" if value is None or value == "" else str(value)


def _loss(losses: list[float]) -> str:
    """The mean loss (± standard deviation over seeds) and the perplexity of the mean."""
    spread = Spread.of(losses)
    if not abs(spread.mean) < MOST_NATS:
        return f"{spread.mean:.4g} / {'nan' if math.isnan(spread.mean) else 'inf'}"
    return f"{spread.text('{:.4f}'.format)} / {math.exp(spread.mean):.2f}"
