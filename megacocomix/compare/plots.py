"""Plot the perplexity of several groups over tokens, FLOPs or seconds.

Each group is a line with its own colour and marker, inside a band from its best seed to its worst; faint lines show the
single seeds. The name of a group is at the end of its line, not in a legend.
"""

import math
import textwrap
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from megacocomix.compare.groups import Group
from megacocomix.compare.runs import Curve, Run

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""The palette of Okabe and Ito, which is distinguishable with every common kind of colour vision."""
LINES = (("-", "o"), ("--", "s"), (":", "^"), ("-.", "D"))
"""Line style and marker of the first seven groups, of the next seven, and so on."""

PLOTS = {
    "tokens": "ppl_vs_tokens",
    "total_flops": "ppl_vs_flops",
    "flops": "ppl_vs_student_flops",
    "seconds": "ppl_vs_seconds",
}
"""Axis → name of the plot's file."""
X_LABELS = {
    "tokens": "training tokens",
    "total_flops": "training FLOPs, teacher included",
    "flops": "training FLOPs of the student",
    "seconds": "training seconds",
}

View = Callable[[Curve], tuple[np.ndarray, np.ndarray]]
"""Curve → the x and y to draw, NaN where there is nothing to draw."""

MOST_NATS = 50.0
"""Larger losses are treated as not finite: their perplexity is too large to draw."""
FEW = 3
"""Up to this number of groups, a plot shows perplexities and a table has a column for each group. The lines of more
groups would overlap: a plot then shows the difference from the first group, and a table has a row for each group."""


def plot_axes(groups: list[Group]) -> list[str]:
    """The axes that differ for these groups: without a teacher there is only one kind of FLOPs."""
    has_teacher = any(group.final.teacher_flops for group in groups)
    return [axis for axis in PLOTS if has_teacher or axis != "total_flops"]


def save(figure: Figure, stem: Path) -> None:
    """Write STEM.png and STEM.svg. In the SVG text stays text, and its bytes depend only on the figure."""
    figure.savefig(stem.with_suffix(".png"), dpi=150)
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "megacocomix"}):
        figure.savefig(stem.with_suffix(".svg"), metadata={"Date": None})


def shows_training(groups: list[Group]) -> bool:
    """Whether the training loss is drawn too; with many runs it would cover the validation curves."""
    return sum(len(group.runs) for group in groups) <= FEW


def plot(groups: list[Group], axis: str) -> Figure:
    """Perplexity over one axis: the whole run on the left, its end enlarged on the right, names beside the lines."""
    few = len(groups) <= FEW
    absolute = partial(perplexities, axis=axis)
    view = absolute if few else partial(_against, base=groups[0], axis=axis)
    figure = Figure(figsize=(11, max(4.6, 0.9 + 0.36 * len(groups))), layout="constrained")
    whole, close = figure.subplots(1, 2, width_ratios=(1, 1) if few else (3, 4))
    for index, group in enumerate(groups):
        draw(whole, group, index, absolute)
        draw(close, group, index, view)
    for panel in (whole, close):
        dress(panel, axis)
    whole.set_ylabel("validation perplexity", fontsize=12)
    whole.set_title("the whole run", fontsize=12, loc="left")
    perplexity_axis(whole)
    if shows_training(groups):
        for index, group in enumerate(groups):
            _draw_training(whole, group.runs, axis, _look(index)[0])
    # On a log axis a constant distance is a constant factor, and factors matter in a training curve.
    xs = [x for group in groups for x in group.curve(axis)[0] if x > 0]
    if xs and max(xs) / min(xs) > 10:
        whole.set_xscale("log")
        whole.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)) if max(xs) / min(xs) < 100 else LogLocator())
        whole.xaxis.set_minor_locator(NullLocator())
        whole.xaxis.set_major_formatter(_tick(axis))
    _zoom(close, groups, view)
    if few:
        close.set_title("its end", fontsize=12, loc="left")
        perplexity_axis(close)
    else:
        title = textwrap.fill(f"perplexity against {groups[0].name}'s", 50)
        close.set_title(title, fontsize=12, loc="left")
        close.yaxis.set_major_formatter(lambda y, _: f"{y:+g} %".replace("-", "−") if y else "0 %")
    _name_lines(close, groups, view)
    return figure


def draw(panel: Axes, group: Group, index: int, view: View, label: str | None = None) -> None:
    """Draw a group's mean line, band and seeds in the style of the index-th group."""
    color, (line, marker) = _look(index)
    xs, ys = view(group)
    if len(group.runs) > 1:
        each = np.array([view(run)[1] for run in group.seed_curves])
        panel.fill_between(xs, each.min(0), each.max(0), color=color, alpha=0.15, linewidth=0)
        panel.plot(xs, each.T, line, color=color, alpha=0.25, linewidth=0.8)
    panel.plot(xs, ys, line, color=color, marker=marker, markersize=4, linewidth=1.8, label=label)


def _look(index: int) -> tuple[str, tuple[str, str]]:
    """Colour, and (line style, marker)."""
    return COLORS[index % len(COLORS)], LINES[index // len(COLORS) % len(LINES)]


def dress(panel: Axes, axis: str) -> None:
    """Set the grid, the ticks and the label of the x axis."""
    panel.set_xlabel(X_LABELS[axis], fontsize=12)
    panel.tick_params(labelsize=11)
    panel.grid(color="0.9", linewidth=0.8)
    panel.spines[["top", "right"]].set_visible(False)
    panel.set_axisbelow(True)
    panel.xaxis.set_major_locator(MaxNLocator(5))
    panel.xaxis.set_major_formatter(_tick(axis))


def _tick(axis: str) -> FuncFormatter:
    """Ticks of seconds are shortened like those of tokens so that they do not touch; the axis label has the unit."""
    return FuncFormatter(lambda x, _: amount("tokens" if axis == "seconds" else axis, x))


def perplexity_axis(panel: Axes) -> None:
    """Make y a log axis of perplexity with ticks at round numbers, even over a short range."""
    panel.set_yscale("log")
    low, high = panel.get_ylim()
    if high / low <= 5:
        panel.yaxis.set_major_locator(MaxNLocator(6, steps=(1, 2, 5, 10)))
    else:
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)) if high / low < 1e4 else LogLocator())
    panel.yaxis.set_minor_locator(NullLocator())
    panel.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.0f}" if y >= 1000 else f"{y:.4g}"))


def perplexities(curve: Curve, axis: str) -> tuple[np.ndarray, np.ndarray]:
    """x and perplexity of a curve; NaN for x that are not above 0 and for losses that are not finite."""
    xs, losses = curve.curve(axis)
    return np.where(xs > 0, xs, math.nan), _ppl(losses)


def _against(curve: Curve, base: Group, axis: str) -> tuple[np.ndarray, np.ndarray]:
    """x, and by how many per cent the perplexity is above the base's at the same x; NaN where the base has no curve."""
    xs, losses = curve.curve(axis)
    base_losses = np.interp(xs, *base.curve(axis), left=math.nan, right=math.nan)
    return np.where(xs > 0, xs, math.nan), 100 * (_ppl(losses - base_losses) - 1)


def _ppl(losses: np.ndarray) -> np.ndarray:
    return np.exp(np.where(np.abs(losses) < MOST_NATS, losses, math.nan))


def _draw_training(panel: Axes, runs: Sequence[Run], axis: str, color: str) -> None:
    low, high = panel.get_ylim()
    for run in runs:
        points = [point for point in run.train if getattr(point, axis) > 0]
        smooth = _smooth(np.array([point.loss for point in points]))
        panel.plot([getattr(point, axis) for point in points], _ppl(smooth), color=color, alpha=0.3, linewidth=1.2)
    panel.set_ylim(low, high)


def _zoom(panel: Axes, groups: list[Group], view: View) -> None:
    """Limit the panel to the last 60 % of the shortest line and to everything after it in the other lines."""
    lines = [_drawable(*view(curve)) for group in groups for curve in (group, *group.seed_curves)]
    last = [xs[-1] for xs, _ in lines if xs.size]
    if not last or not 0.4 * min(last) < max(last):
        return
    low = 0.4 * min(last)
    panel.set_xlim(low, max(last) * 1.02)
    visible = [y for xs, ys in lines for y in ys[xs >= low]]
    visible += [np.interp(low, xs, ys) for xs, ys in lines if xs.size and xs[0] <= low <= xs[-1]]
    bottom, top = min(visible), max(visible)
    margin = 0.06 * (top - bottom) or 0.01 * abs(top) or 1.0
    panel.set_ylim(max(bottom - margin, bottom / 2) if bottom > 0 else bottom - margin, top + margin)


def _drawable(xs: np.ndarray, ys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    keep = np.isfinite(xs) & np.isfinite(ys)
    return xs[keep], ys[keep]


def _name_lines(panel: Axes, groups: list[Group], view: View) -> None:
    """Write the names right of the panel at the heights of the line ends, moved apart where they would touch."""
    size = 12 if len(groups) <= 6 else 10.5
    line = size * 1.35 / 72 / (panel.figure.get_figheight() - 1.1)  # height of a text line, in heights of the panel
    inside = panel.transData + panel.transAxes.inverted()
    ends = []
    for index, group in enumerate(groups):
        xs, ys = _drawable(*view(group))
        x, y = np.clip(inside.transform((xs[-1], ys[-1])), 0.0, 1.0) if xs.size else (1.0, 1.0)
        note = " (not finite)" if not abs(group.final.loss) < MOST_NATS else ""
        ends.append((y, x, textwrap.fill(group.name + note, 30), index))
    ends.sort()
    middles = _spread_out([y for y, *_ in ends], [line * (1 + name.count("\n")) for _, _, name, _ in ends])
    text_x = 1.05 if len(groups) <= len(COLORS) else 1.12
    for (y, x, name, index), middle in zip(ends, middles, strict=True):
        color, (style, marker) = _look(index)
        lead = {"color": color, "linewidth": 0.8, "linestyle": ":", "clip_on": False}
        panel.plot([x, 1.0, 1.04], [y, y, middle], transform=panel.transAxes, **lead)
        if text_x > 1.1:  # colours repeat, so a sample of the line is drawn beside the name
            sample = {"color": color, "marker": marker, "markersize": 4, "linewidth": 1.8, "clip_on": False}
            panel.plot([1.05, 1.08, 1.11], [middle] * 3, style, markevery=[1], transform=panel.transAxes, **sample)
        text = {"color": color, "fontsize": size, "fontweight": "bold", "va": "center"}
        panel.text(text_x, middle, name, transform=panel.transAxes, **text)


def _spread_out(wanted: list[float], heights: list[float]) -> list[float]:
    """The middles of labels of these heights: near the wanted middles, in the same order, without overlap."""
    middles, floor = [], -math.inf
    for y, height in zip(wanted, heights, strict=True):
        middles.append(max(y, floor + height / 2))
        floor = middles[-1] + height / 2
    ceiling = max(1.0, wanted[-1] + heights[-1] / 2) if wanted else 0.0
    for index in reversed(range(len(middles))):
        middles[index] = min(middles[index], ceiling - heights[index] / 2)
        ceiling = middles[index] - heights[index] / 2
    return middles


def _smooth(losses: np.ndarray) -> np.ndarray:
    """Centred running mean over a fortieth of the points; near the ends over the points that exist."""
    if len(losses) == 0:
        return losses
    window = np.ones(2 * (len(losses) // 80) + 1)
    return np.convolve(losses, window, "same") / np.convolve(np.ones_like(losses), window, "same")


def amount(axis: str, x: float) -> str:
    """A number with the unit of its axis, short enough for a table cell."""
    if axis == "seconds":
        return f"{x:,.0f} s" if x >= 100 else f"{x:.3g} s"
    if axis in ("flops", "total_flops"):
        return f"{x:.3g}".replace("e+", "e")
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if x >= size:
            return f"{x / size:.4g}{unit}"
    return f"{x:.4g}"
