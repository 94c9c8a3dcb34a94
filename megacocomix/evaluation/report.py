"""One page about two or more runs: report.md with its tables and sentences, and three plots.

The first run is the one the others are compared with. Every sentence is made from the numbers beside it and
says no more than they do: which run is lower, at equal what, by how much, and whether that means anything.
"""

import math
import shlex
from collections.abc import Iterable
from pathlib import Path

from megacocomix.errors import UserError
from megacocomix.evaluation import curves
from megacocomix.evaluation.curves import AXES, EqualX, Noise, Run, Start
from megacocomix.evaluation.plots import PLOTS, X_LABELS, amount, plot

LEVEL = 5e-4
"""Differences that three decimals do not show are called level."""


def write_report(runs: list[Run], out: str | Path, command: str, force: bool = False) -> Path:
    """Write out/report.md and out/plots/*.png. Raises UserError if `out` holds a report and not `force`."""
    out = Path(out)
    report = out / "report.md"
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; name a folder.")
    if report.exists() and not force:
        raise UserError(f"--out {out} holds a report; name another folder, or add --force to replace it.")
    (out / "plots").mkdir(parents=True, exist_ok=True)
    text = compose(runs, command)  # before the plots: what cannot be compared leaves an older report whole
    for axis, name in PLOTS.items():
        plot(runs, axis).savefig(out / "plots" / name, dpi=150)
    report.write_text(text)
    return report


def compose(runs: list[Run], command: str) -> str:
    """The text of report.md."""
    noise = curves.noise(runs)
    warned = cautions(runs)
    parts = [f"# {' · '.join(run.name for run in runs)}"]
    parts += ["## Before reading on", bullets(warned)] if warned else []
    parts += ["## What was run", table(*_runs_table(runs)), "## Results", table(*results_table(runs))]
    said = [sentence for run in runs[1:] for sentence in words(run, runs[0], noise)]
    parts += ["## In words", bullets([*said, noise_words(runs, noise)]), NOTE, "## Curves", PLOT_NOTE]
    parts += [f"![validation loss over {X_LABELS[axis]}](plots/{name})" for axis, name in PLOTS.items()]
    parts += ["## Settings that differ", _settings_section(runs), "## Commands", _commands(runs, command)]
    return "\n\n".join(parts) + "\n"


NOTE = (
    "Compared at the largest x that both runs reached, in the validation during training unless a sentence says "
    "otherwise, interpolated linearly between its points. A run in the middle of its learning-rate schedule usually "
    "has a higher loss than one planned to end there. The CoCoMix paper compares at equal tokens; what the concepts "
    "cost shows at equal FLOPs and seconds."
)
PLOT_NOTE = (
    "Points and lines: validation during training. Faint lines: training loss, smoothed. Dashed, where a live teacher "
    "labelled: the student's FLOPs alone."
)


def words(run: Run, other: Run, noise: Noise) -> list[str]:
    """What the numbers say about one pair, a sentence or two for each thing that can be held equal."""
    axes = [axis for axis in AXES if axis != "total_flops" or run.final.teacher_flops or other.final.teacher_flops]
    said = []
    for axis in axes:
        full = curves.equal_end(run, other) if axis == "tokens" else None
        said.append(equal_words(run, other, axis, full or curves.equal_x(run, other, axis), noise))
    costs = [_match_words(run, other, axes), _match_words(other, run, axes), _cost_words(run, other)]
    return said + [sentence for sentence in costs if sentence]


def equal_words(run: Run, other: Run, axis: str, equal: EqualX | None, noise: Noise) -> str:
    """Which of two runs is lower at equal x, by how much, and what stands against reading that as it is."""
    if equal is None:
        return f"At equal {AXES[axis]}: the validation points of {run.name} and {other.name} share no stretch."
    where = f"At equal {AXES[axis]} ({amount(axis, equal.x)})"
    if equal.windows:
        where += f", over all {equal.windows:,} held-out windows,"
    elif axis == "tokens":
        where += ", in the validation during training,"
    if not math.isfinite(equal.difference):
        lost = [r.name for r, loss in zip((run, other), equal.losses, strict=True) if not math.isfinite(loss)]
        return f"{where} the loss of {' and of '.join(lost)} is not a finite number: nothing to compare."
    size = abs(equal.difference)
    if size < LEVEL:
        level = f"level to three decimals ({equal.losses[0]:.3f} nats)"
        text = f"{where} **{run.name}** and **{other.name}** are {level}."
    else:
        low, high = (run, other) if equal.difference < 0 else (other, run)
        numbers = f"{min(equal.losses):.3f} against {max(equal.losses):.3f}"
        ratio = f"perplexity {100 * -math.expm1(-size):.1f} % lower"
        text = f"{where} **{low.name}** is lower than **{high.name}** by {size:.3f} nats ({numbers}; {ratio})."
        if noise.size is not None and size < noise.size:
            text += f" That is less than {noise.size:.3f}: do not read it as real."
    if abs(equal.progress[0] - equal.progress[1]) > 0.05:
        mine, its = (f"{100 * part:.0f} %" for part in equal.progress)
        text += f" There {run.name} was at {mine} of its schedule and {other.name} at {its}."
    return text


def noise_words(runs: list[Run], noise: Noise) -> str:
    """From where on a difference means anything, as far as these runs can tell."""
    seeds = "Some runs differ in nothing but the seed" if noise.seeds is not None else "One seed per run"
    if noise.size is None:
        return f"{seeds} and too few validations: these runs cannot tell how large a difference chance alone makes."
    unread = f"differences below {noise.size:.3f} nats should not be read as real"
    scatter = "twice the scatter of the validation during training"
    if noise.seeds is not None:
        return f"{seeds}; they are up to {noise.seeds:.3f} nats apart: {unread} (that, or {scatter} if larger)."
    return f"{seeds}: {unread} ({scatter}). How far another seed moves a run is not measured and may be more."


def cautions(runs: list[Run]) -> list[str]:
    """What makes these runs less than a clean comparison, loudest first."""

    def differ(name: str) -> str | None:
        values = [run.setting(name) for run in runs]
        return _listing(runs, values) if len(set(map(str, values))) > 1 else None

    said = []
    if runs[0].setting("data.valid") is None:
        said.append("**The configs do not name data.valid: nothing shows that the losses are on the same text.**")
    for name, why in (
        (
            "model.vocab_size",
            "the softmax is over different alternatives, so losses differ for that reason too",
        ),
        ("model.context", "a longer window alone lowers the loss"),
        ("data.train", "they learned from different text, not only by different methods"),
        ("data.tokenizer", "a loss per token depends on what a token is"),
    ):
        if listing := differ(name):
            said.append(f"**Different {name}** ({listing}): {why}.")
    sequences = [run.setting("evaluation.batches", 0) * run.setting("training.global_batch", 0) for run in runs]
    if len(set(sequences)) > 1:
        said.append(f"**Validated on different numbers of sequences** ({_listing(runs, sequences)}).")
    if len({run.evaluation.fingerprint for run in runs if run.evaluation}) > 1:
        said.append("**The held-out evaluations are on different text**: their data fingerprints differ.")
    for run in runs:
        steps = run.setting("training.steps")
        if steps and run.final.step < steps:
            said.append(f"{run.name} was validated last at step {run.final.step:,} of {steps:,}: not a finished run.")
        if run.setting("teacher.labels", "live") != "live":
            said.append(f"{run.name} read its labels from a cache: the FLOPs of making that cache are not counted.")
    speed = ("parallel.tensor", "parallel.pipeline", "parallel.zero", "training.precision", "training.recompute")
    if different := [name for name in (*speed, "training.micro_batch") if differ(name)]:
        said.append(f"Seconds are not like for like: {', '.join(different)} differ.")
    machines = {run.name: list(dict.fromkeys(_machine(start) for start in run.starts)) for run in runs if run.starts}
    if len({machine for used in machines.values() for machine in used}) > 1:
        listing = ", ".join(f"{name}: {', then '.join(used)}" for name, used in machines.items())
        said.append(f"**Seconds are not comparable**: the runs were not on the same hardware ({listing}).")
    return said


def results_table(runs: list[Run]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the results, for report.md and for the terminal."""
    head = ["run", "validation loss / ppl", "tokens", "student FLOPs", "teacher FLOPs", "seconds", "tokens/s"]
    rows = []
    for run in runs:
        end = run.final
        rate = amount("tokens", end.tokens / end.seconds) if end.seconds > 0 else "–"
        flops = [amount("flops", end.flops), amount("flops", end.teacher_flops) if end.teacher_flops else "0"]
        spent = amount("seconds", end.seconds)
        rows.append([run.name, _loss(end.loss), amount("tokens", end.tokens), *flops, spent, rate])
    windows = {run.evaluation.windows for run in runs if run.evaluation}
    if windows:
        head.insert(2, f"held-out loss / ppl (all {' or '.join(f'{n:,}' for n in sorted(windows))} windows)")
        for run, row in zip(runs, rows, strict=True):
            row.insert(2, _held_out(run, say_windows=len(windows) > 1))
    return head, rows


def _held_out(run: Run, say_windows: bool) -> str:
    full = run.evaluation
    if full is None:
        return "–"
    at = f" at step {full.step:,}" if full.step != run.final.step else ""
    return _loss(full.loss) + at + (f", {full.windows:,} windows" if say_windows else "")


def _runs_table(runs: list[Run]) -> tuple[list[str], list[list[str]]]:
    columns = {
        "method": lambda run: run.setting("method.name"),
        "layers × width": lambda run: "{} × {}".format(
            run.setting("model.num_layers", "–"), run.setting("model.hidden_size", "–")
        ),
        "context": lambda run: run.setting("model.context"),
        "batch": lambda run: run.setting("training.global_batch"),
        "steps": lambda run: f"{run.final.step:,}",
        "seed": lambda run: run.setting("training.seed"),
        "processes × device": lambda run: _machine(run.starts[-1]) if run.starts else None,
    }
    return ["run", *columns], [[run.name, *(_cell(of(run)) for of in columns.values())] for run in runs]


def _match_words(run: Run, other: Run, axes: list[str]) -> str | None:
    matches = [curves.x_to_match(run, other, axis) for axis in axes]
    parts = [f"{match.factor:.2f} × its {AXES[match.axis]}" for match in matches if match.factor is not None]
    if not parts:
        return None
    return (
        f"**{run.name}** reaches the final loss of **{other.name}** ({other.final.loss:.3f}) with {', '.join(parts)}."
    )


def _cost_words(run: Run, other: Run) -> str | None:
    if min(run.final.flops, other.final.flops, run.final.tokens, other.final.tokens) <= 0:
        return None
    student, total = (
        (getattr(run.final, kind) / run.final.tokens) / (getattr(other.final, kind) / other.final.tokens)
        for kind in ("flops", "total_flops")
    )
    if max(abs(student - 1), abs(total - 1)) < 0.005:
        return None
    teacher = f" ({total:.2f} × with the teacher counted)" if abs(total - student) > 1e-3 * student else ""
    return f"A token costs **{run.name}** {student:.2f} × the student FLOPs of **{other.name}**{teacher}."


def _settings_section(runs: list[Run]) -> str:
    different = curves.differing_settings(runs)
    if not different:
        return "None."
    rows = [[f"`{key}`", *map(_cell, values)] for key, values in different.items()]
    return table(["setting", *(run.name for run in runs)], rows)


def _commands(runs: list[Run], command: str) -> str:
    lines = []
    for run in runs:
        if run.starts:
            last = run.starts[-1]
            lines += [f"# {run.name}, as each of its processes ({_machine(last)}) was started last", last.command]
        else:
            config = shlex.quote(str(run.folder / "config.yaml"))
            lines += [f"# {run.name} again, from its resolved config"]
            lines += [f"deepspeed launcher/pretrain.py --config {config} run=FOLDER"]
    return "\n".join(["```sh", *lines, "# this page", command, "```"])


def _machine(start: Start) -> str:
    return f"{start.world} × {start.device}"


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def bullets(lines: Iterable[str]) -> str:
    """A Markdown list."""
    return "\n".join(f"- {line}" for line in lines)


def _cell(value: object) -> str:
    return "–" if value is None else str(value)


def _listing(runs: list[Run], values: list) -> str:
    return ", ".join(f"{run.name}: {value}" for run, value in zip(runs, values, strict=True))


def _loss(loss: float) -> str:
    try:
        return f"{loss:.4f} / {math.exp(loss):.2f}"
    except OverflowError:
        return f"{loss:.4g} / inf"
