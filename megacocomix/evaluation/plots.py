"""Loss curves of several runs in one picture: over tokens, FLOPs or seconds.

Validation loss is drawn as points and a line, training loss smoothed and faint behind it. Runs are named where
their lines end, not in a legend.
"""

import math
import textwrap
from itertools import cycle

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from megacocomix.evaluation.curves import Run

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's palette, told apart with every common kind of colour vision."""

PLOTS = {"tokens": "loss_vs_tokens.png", "total_flops": "loss_vs_flops.png", "seconds": "loss_vs_seconds.png"}
X_LABELS = {"tokens": "training tokens", "total_flops": "training FLOPs", "seconds": "training seconds"}


def plot(runs: list[Run], axis: str) -> Figure:
    """Loss over one axis: the whole run on the left, its end on the right, names beside the lines."""
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    whole, end = figure.subplots(1, 2)
    for panel in (whole, end):
        for run, color in zip(runs, cycle(COLORS)):
            _draw(panel, run, axis, color, "-")
            if axis == "total_flops" and run.final.teacher_flops > 0:
                _draw(panel, run, "flops", color, "--")
        panel.set_xlabel(X_LABELS[axis], fontsize=12)
        panel.tick_params(labelsize=11)
        panel.grid(color="0.9", linewidth=0.8)
        panel.spines[["top", "right"]].set_visible(False)
        panel.set_axisbelow(True)
        panel.xaxis.set_major_formatter(lambda x, _: amount(axis, x))
    whole.set_ylabel("loss (nats a token)", fontsize=12)
    whole.set_title("the whole run", fontsize=12, loc="left")
    end.set_title("its end", fontsize=12, loc="left")
    last = [getattr(run.final, axis) for run in runs]
    # On a log axis a constant distance is a constant factor, which is what one asks of a training curve.
    xs = [x for run in runs for x in run.curve(axis)[0] if x > 0]
    if xs and max(xs) / min(xs) > 10:
        whole.set_xscale("log")
        whole.xaxis.set_major_formatter(lambda x, _: amount(axis, x))
    end.xaxis.set_major_locator(MaxNLocator(5))
    _zoom(end, runs, axis, 0.4 * min(last), max(last))
    _name_lines(end, runs, axis)
    if axis == "total_flops" and any(run.final.teacher_flops > 0 for run in runs):
        for style, label in (("-", "student and live teacher"), ("--", "student alone")):
            whole.plot([], [], style, color="0.35", label=label)
        whole.legend(frameon=False, fontsize=11, loc="upper right")
    return figure


def _draw(panel: Axes, run: Run, axis: str, color: str, style: str) -> None:
    if style == "-" and run.train:
        points = [point for point in run.train if getattr(point, axis) > 0]
        smooth = _smooth(np.array([point.loss for point in points]))
        panel.plot([getattr(point, axis) for point in points], smooth, color=color, alpha=0.3, linewidth=1.2)
    xs, losses = run.curve(axis)
    keep = xs > 0
    marker = "o" if style == "-" else None
    panel.plot(xs[keep], losses[keep], style, color=color, marker=marker, markersize=3.5, linewidth=1.8)


def _zoom(panel: Axes, runs: list[Run], axis: str, low: float, high: float) -> None:
    if not 0 < low < high:
        return
    panel.set_xlim(low, high * 1.02)
    losses = []
    for run in runs:
        xs, ys = (values[run.curve(axis)[0] > 0] for values in run.curve(axis))
        losses += [*ys[xs >= low], *([np.interp(low, xs, ys)] if xs.size and xs[0] <= low <= xs[-1] else [])]
    losses = [loss for loss in losses if math.isfinite(loss)]
    if losses:
        margin = 0.06 * (max(losses) - min(losses)) or 0.05
        panel.set_ylim(min(losses) - margin, max(losses) + margin)


def _name_lines(panel: Axes, runs: list[Run], axis: str) -> None:
    """Names right of the panel at the height of each line's end, pushed apart where they would touch."""
    bottom, top = panel.get_ylim()
    left, right = panel.get_xlim()
    ends = []
    for run, color in zip(runs, cycle(COLORS)):
        x = min(max((getattr(run.final, axis) - left) / (right - left), 0.0), 1.0)
        finite = math.isfinite(run.final.loss)
        y = (run.final.loss - bottom) / (top - bottom) if finite else 1.0
        name = run.name if finite else f"{run.name} (lost: not finite)"
        ends.append((min(max(y, 0.0), 1.0), x, textwrap.fill(name, 24), color))
    floor = -math.inf
    for y, x, name, color in sorted(ends):
        half = 0.035 * (1 + name.count("\n"))  # of a name's height, in panel heights
        middle = max(y, floor + half)
        floor = middle + half
        line = {"color": color, "linewidth": 0.8, "linestyle": ":", "clip_on": False}
        panel.plot([x, 1.0, 1.03], [y, y, middle], transform=panel.transAxes, **line)
        text = {"color": color, "fontsize": 12, "fontweight": "bold", "va": "center"}
        panel.text(1.04, middle, name, transform=panel.transAxes, **text)


def _smooth(losses: np.ndarray) -> np.ndarray:
    """Centred running mean over a fortieth of the points; at the ends over as many as there are."""
    window = np.ones(2 * (len(losses) // 80) + 1)
    if len(losses) == 0:
        return losses
    return np.convolve(losses, window, "same") / np.convolve(np.ones_like(losses), window, "same")


def amount(axis: str, x: float) -> str:
    """A number with the unit of its axis, short enough for a table."""
    if axis == "seconds":
        return f"{x:,.0f} s" if x >= 100 else f"{x:.3g} s"
    if axis in ("flops", "total_flops"):
        return f"{x:.3g}".replace("e+", "e")
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if x >= size:
            return f"{x / size:.4g}{unit}"
    return f"{x:.4g}"
