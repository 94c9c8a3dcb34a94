"""One page about any number of runs: comparison.md with its tables and sentences, and plots.

Runs that differ in nothing but the seed are one group, and the first group is what the others are compared with.
"""

import math
import shlex
from collections.abc import Iterable
from contextlib import suppress
from itertools import combinations
from pathlib import Path

from megacocomix.compare import curves, identical
from megacocomix.compare.curves import AXES, Noise
from megacocomix.compare.figure6 import plot_figure_6
from megacocomix.compare.groups import SEED, Group, Spread, differing_settings
from megacocomix.compare.plots import FEW, MOST_NATS, PLOTS, X_LABELS, amount, plot, plot_axes, save, shows_training
from megacocomix.compare.summary import equal_cell, match_cell, summarize_noise, summarize_pair
from megacocomix.compare.table import table_1
from megacocomix.compare.warnings import comparison_warnings
from megacocomix.errors import UserError

PAGE = "comparison.md"
FIGURE_6 = "figure6"
NOTE = (
    "Compared at the largest x that both runs reached, in the validation during training unless something else is "
    "said, interpolated linearly between its points. A run in the middle of its learning-rate schedule usually has a "
    "higher loss than one planned to end there. The CoCoMix paper compares at equal tokens; what the concepts cost "
    "shows at equal FLOPs and seconds."
)
MATCH_NOTE = (
    "What a run had spent when its validation first reached the final validation loss of another, as a part of what "
    "that other had spent in all (the paper's 21.5 % fewer tokens are 78.5 % here). Linearly interpolated between "
    "validations, and not extrapolated."
)
SEEDS_NOTE = (
    "Of repeated runs it is the mean curve that is asked; ± is the standard deviation of the same question asked of "
    "each run, against the run of the same seed where there is one."
)
TABLE_NOTE = (
    "Accuracies in per cent. Of repeated runs mean ± standard deviation over the seeds; of one run ± the harness's "
    "standard error, which is about the task's sample and not about the seed."
)
PLOT_NOTE = "Points and lines: validation during training, perplexity on a log axis. Each picture is there as SVG too."
AGAINST_NOTE = "On the right at the same x, as far as the run that is compared with has points."
BAND_NOTE = "Of repeated runs the line is the mean loss, the band reaches from the best seed to the worst."
TRAINING_NOTE = "Faint lines: training loss, smoothed."


def write_report(groups: list[Group], out: str | Path, command: str, force: bool = False) -> Path:
    """Write out/comparison.md and out/plots/. Raises UserError if `out` holds a comparison and not `force`."""
    out = Path(out)
    page = out / PAGE
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; name a folder.")
    if page.exists() and not force:
        raise UserError(f"--out {out} holds a comparison; name another folder, or add --force to replace it.")
    (out / "plots").mkdir(parents=True, exist_ok=True)
    figure, said = plot_figure_6(groups)
    text = compose(groups, command, said)  # before the plots: what cannot be compared leaves an older page whole
    if figure:
        save(figure, out / "plots" / FIGURE_6)
    for axis in plot_axes(groups):
        save(plot(groups, axis), out / "plots" / PLOTS[axis])
    page.write_text(text)
    return page


def compose(groups: list[Group], command: str, figure_6: str = "") -> str:
    """The text of comparison.md; `figure_6` is what is said under that figure, if it is there."""
    noise = curves.noise(groups)
    names = [group.name for group in groups]
    title = " · ".join(names) if len(groups) <= FEW else f"{len(groups)} methods, compared with {names[0]}"
    head, rows, against = table_1(groups)
    warned = [*comparison_warnings(groups), *against]
    parts = [f"# {title}"]
    parts += ["## Before reading on", bullets(warned)] if warned else []
    parts += ["## What was run", table(*_runs_table(groups)), "## Results", table(*results_table(groups))]
    parts += _differences(groups, noise)
    if len(groups) > 1:
        parts += ["## To match a final loss", MATCH_NOTE + (f" {SEEDS_NOTE}" if _repeated(groups) else "")]
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
    head = ["run", "validation loss / ppl", "tokens", "student FLOPs", "teacher FLOPs", "seconds", "tokens/s"]
    rows = []
    for group in groups:
        end = group.final
        rate = amount("tokens", end.tokens / end.seconds) if end.seconds > 0 else "–"
        flops = [amount("flops", end.flops), amount("flops", end.teacher_flops) if end.teacher_flops else "0"]
        spent = amount("seconds", end.seconds)
        rows.append(
            [group.name, _loss([p.loss for p in group.at_end]), amount("tokens", end.tokens), *flops, spent, rate]
        )
    windows = {run.evaluation.windows for group in groups for run in group.runs if run.evaluation}
    if windows:
        head.insert(2, f"held-out loss / ppl (all {' or '.join(f'{n:,}' for n in sorted(windows))} windows)")
        for group, row in zip(groups, rows, strict=True):
            row.insert(2, _held_out(group, say_windows=len(windows) > 1))
    if _repeated(groups):
        head.insert(1, "seeds")
        for group, row in zip(groups, rows, strict=True):
            row.insert(1, str(len(group.runs)) if len(group.runs) > 1 else "one seed")
    return head, rows


def match_table(groups: list[Group]) -> tuple[list[str], list[list[str]]]:
    """What the others needed to reach the first one's final loss, then what it needed to reach theirs."""
    axes = _axes(groups)
    first, *others = groups
    rows = []
    for group, other in [*((group, first) for group in others), *((first, group) for group in others)]:
        cells = [match_cell(curves.x_to_match(group, other, axis)) for axis in axes]
        rows.append([group.name, f"{other.name} ({other.final.loss:.3f})", *cells])
    return ["run", "reaches the final loss of", *(AXES[axis] for axis in axes)], rows


def _differences(groups: list[Group], noise: Noise) -> list[str]:
    """How the others compare with the first: of two in sentences, of more in a table."""
    first, *others = groups
    axes = _axes(groups)
    same = [f"**{a}** and **{b}** are {text}." for a, b, text in _identical(groups)]
    if len(others) < 2:
        said = [sentence for group in others for sentence in summarize_pair(group, first, axes, noise)]
        return ["## In words", bullets([*said, summarize_noise(groups, noise), *same]), *([NOTE] if others else [])]
    rows = []
    for group in others:
        size = noise.size(group, first)
        rows.append([group.name, *(equal_cell(curves.equal_x(group, first, axis), size) for axis in axes)])
    head = ["run", *(f"at equal {AXES[axis]}" for axis in axes)]
    about = (
        f"Validation loss less that of **{first.name}**, in nats (and in per cent of perplexity); below 0 is better."
    )
    bold = " Bold is more than the noise that is said below." if noise.size(first, first) is not None else ""
    said = bullets([summarize_noise(groups, noise), *same])
    return [f"## Compared with {first.name}", about + bold, table(head, rows), said, NOTE]


def _identical(groups: list[Group]) -> Iterable[tuple[str, str, str]]:
    """Pairs of runs that are the same to the bit. Only runs that ended alike are looked at closely."""
    runs = [run for group in groups for run in group.runs]
    for a, b in combinations(runs, 2):
        with suppress(UserError):  # a checkpoint that cannot be read claims nothing
            if a.final.loss == b.final.loss and (answer := identical.compare(a.folder, b.folder)).identical:
                yield a.name, b.name, answer.text


def _axes(groups: list[Group]) -> list[str]:
    return [axis for axis in AXES if axis in plot_axes(groups)]


def _repeated(groups: list[Group]) -> bool:
    return any(len(group.runs) > 1 for group in groups)


def _held_out(group: Group, say_windows: bool) -> str:
    found = [run.evaluation for run in group.runs if run.evaluation]
    if not found:
        return "–"
    full = found if group.evaluations else found[:1]
    at = "" if full[0].step == group.final.step else f" at step {full[0].step:,}"
    some = "" if len(full) == len(group.runs) else f", {group.runs[0].name} alone"
    return _loss([one.loss for one in full]) + at + (f", {full[0].windows:,} windows" if say_windows else "") + some


def _runs_table(groups: list[Group]) -> tuple[list[str], list[list[str]]]:
    columns = {
        "method": lambda group: group.setting("method.name"),
        "layers × width": lambda group: "{} × {}".format(
            group.setting("model.num_layers", "–"), group.setting("model.hidden_size", "–")
        ),
        "context": lambda group: group.setting("model.context"),
        "batch": lambda group: group.setting("training.global_batch"),
        "steps": lambda group: f"{group.final.step:,}",
        "seed": lambda group: ", ".join(_cell(seed) for seed in group.seeds),
        "processes × device": lambda group: ", ".join(
            dict.fromkeys(str(run.starts[-1]) for run in group.runs if run.starts)
        ),
    }
    return ["run", *columns], [[group.name, *(_cell(of(group)) for of in columns.values())] for group in groups]


def _settings_section(groups: list[Group]) -> str:
    different = differing_settings(groups)
    if _repeated(groups):  # their seeds are in the first table
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
    said = [table(["run", *(f"`{key}`" for key in own)], rows)] if own else []
    return "\n\n".join([*said, f"The same in all runs that have a use for it: {shared}."] if shared else said)


def _commands(groups: list[Group], command: str) -> str:
    lines = []
    for group in groups:
        run, *others = group.runs
        like = f"; {', '.join(other.name for other in others)} the same with other seeds" if others else ""
        if run.starts:
            last = run.starts[-1]
            lines += [f"# {run.name}, as each of its processes ({last}) was started last{like}", last.command]
        else:
            config = shlex.quote(str(run.folder / "config.yaml"))
            lines += [f"# {run.name} again, from its resolved config{like}"]
            lines += [f"deepspeed launcher/pretrain.py --config {config} run=FOLDER"]
    return "\n".join(["```sh", *lines, "# this page", command, "```"])


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
    """Mean loss, over seeds ± its standard deviation, and the perplexity of the mean."""
    spread = Spread.of(losses)
    mean = spread.mean
    if not abs(mean) < MOST_NATS:
        return f"{mean:.4g} / {'nan' if math.isnan(mean) else 'inf'}"
    return f"{spread.text('{:.4f}'.format)} / {math.exp(mean):.2f}"
