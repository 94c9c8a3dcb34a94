"""Draw those panels of the paper's Figure 6 whose runs are present. The settings of a run, not its name, decide which
line of the figure it is."""

import logging
import math
from dataclasses import dataclass
from functools import partial

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megacocomix.checkpoint.format import list_checkpoints
from megacocomix.compare.groups import Group
from megacocomix.compare.identical import open_weights
from megacocomix.compare.plots import COLORS, draw, dress, perplexities, perplexity_axis
from megacocomix.errors import UserError

log = logging.getLogger(__name__)

COMPRESS = "concept.compress.weight"
SMALL = 1e-2
"""A concept whose norm is smaller counts as unused; at 386M, 5.8 % of the concepts are (paper §3.3)."""
VIEW = partial(perplexities, axis="tokens")
NORMS = "c"
PANELS = {
    "a": (
        "labels",
        ("CoCoMix", "activation labels", "random labels", "negative attributions", "absolute attributions"),
    ),
    "b": ("what is predicted", ("CoCoMix", "hidden, l1", "hidden, l2", "hidden, cosine")),
    NORMS: ("compress layer", ()),
    "d": ("components", ("CoCoMix", "NTP", "predict only", "mix only")),
    "e": ("placement", ("CoCoMix", "add")),
    "f": ("pause tokens", ("CoCoMix", "NTP + pause", "KD + pause")),
}
"""Letter → title and compared rows, CoCoMix first; random labels and the signs are not in the paper."""
NOT_ENOUGH = {"d": {"NTP"}}
"""Rows that alone beside CoCoMix do not make a panel, because the rest of the page compares them."""


@dataclass(frozen=True)
class Norms:
    """The norms of the compress layer's rows, one for each concept, in the newest checkpoint of a run."""

    run: str
    step: int
    values: np.ndarray

    @property
    def small(self) -> float:
        """The share of concepts with a norm below SMALL."""
        return float((self.values < SMALL).mean())


def plot_figure_6(groups: list[Group]) -> tuple[Figure | None, str]:
    """The figure and its caption; None and "" if there is no panel to draw."""
    norms = _first_norms(groups)
    curves = {letter: _lines(groups, letter) for letter in PANELS if letter != NORMS}
    drawn = [letter for letter in PANELS if (norms if letter == NORMS else curves[letter])]
    if not drawn:
        return None, ""
    columns = min(3, len(drawn))
    rows = math.ceil(len(drawn) / columns)
    figure = Figure(figsize=(max(5.5, 4.2 * columns), 3.9 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for letter, panel in zip(drawn, panels, strict=False):
        if letter == NORMS:
            _draw_norms(panel, norms)
        else:
            _draw_curves(panel, curves[letter])
        panel.set_title(f"({letter}) {PANELS[letter][0]}", fontsize=13, loc="left")
    for panel in panels[len(drawn) :]:
        panel.remove()
    return figure, _caption(drawn, curves, norms)


def _lines(groups: list[Group], letter: str) -> list[tuple[str, int, Group]]:
    """(label, index of the colour, group) for each line of a panel; empty without CoCoMix and a row to compare."""
    rows = PANELS[letter][1]
    found = {row: [group for group in groups if group.row == row] for row in rows}
    others = {row for row in rows[1:] if found[row]} - NOT_ENOUGH.get(letter, set())
    if not found[rows[0]] or not others:
        return []
    named = [(f"{row}: {g.name}" if len(found[row]) > 1 else row, g) for row in rows for g in found[row]]
    return [(label, index, group) for index, (label, group) in enumerate(named)]


def _draw_curves(panel: Axes, lines: list[tuple[str, int, Group]]) -> None:
    for label, index, group in lines:
        draw(panel, group, index, VIEW, f"{label}  {VIEW(group)[1][-1]:.4g}")
    dress(panel, "tokens")
    # The paper's axes leave out the first part too: it is steep and the same for all runs.
    ys = [VIEW(curve) for *_, group in lines for curve in (group, *group.seed_curves)]
    first = 0.4 * max(xs[-1] for xs, _ in ys)
    visible = [y for xs, each in ys for y in each[xs >= first] if math.isfinite(y)]
    if visible:
        panel.set_xlim(left=first * 0.95)
        panel.set_ylim(min(visible) * 0.98, max(visible) * (1.02 + 0.03 * len(lines)))  # room for the legend
    perplexity_axis(panel)
    panel.set_ylabel("validation perplexity", fontsize=12)
    panel.legend(frameon=False, fontsize=10.5, loc="best")


def _draw_norms(panel: Axes, norms: Norms) -> None:
    finite = norms.values[np.isfinite(norms.values)]
    panel.hist(finite, bins=60, color=COLORS[0])
    panel.axvline(SMALL, color=COLORS[1], linewidth=1.5)
    panel.set_xlabel("norm of a concept's compress column", fontsize=12)
    panel.set_ylabel("concepts", fontsize=12)
    panel.set_xlim(left=0)
    panel.tick_params(labelsize=11)
    panel.spines[["top", "right"]].set_visible(False)
    text = f"{100 * norms.small:.1f} % below {SMALL:g}"
    panel.text(0.98, 0.97, text, transform=panel.transAxes, ha="right", va="top", fontsize=11.5, color=COLORS[1])


def _caption(drawn: list[str], curves: dict[str, list], norms: Norms | None) -> str:
    parts = []
    if norms:
        parts.append(
            f"(c) {norms.run} at step {norms.step:,}: {100 * norms.small:.1f} % of {norms.values.size:,} concepts have "
            f"a compress column of norm below {SMALL:g} (the paper, at 386M: 5.8 %)."
        )
    for letter in drawn:
        rows = {label.split(":")[0] for label, *_ in curves.get(letter, ())}
        if absent := [row for row in PANELS[letter][1] if row not in rows]:
            parts.append(f"({letter}) has no run of {', '.join(absent)}.")
    if omitted := [f"({letter}) {PANELS[letter][0]}" for letter in PANELS if letter not in drawn]:
        parts.append(f"Panels without runs: {', '.join(omitted)}.")
    return " ".join(parts)


def _first_norms(groups: list[Group]) -> Norms | None:
    """The norms of CoCoMix if present, else of the first run that mixes predicted concepts and has a checkpoint."""
    mixing = [g for g in groups if (g.runs[0].method.predict, g.runs[0].method.mix) == ("concepts", "predicted")]
    for group in sorted(mixing, key=lambda group: group.row != "CoCoMix"):
        for run in group.runs:
            for folder in reversed(list_checkpoints(run.folder)):
                try:
                    weights = open_weights(folder)
                except UserError as error:
                    log.warning("%s cannot be read and is skipped: %s", folder, error)
                    continue
                if COMPRESS in weights.shapes:
                    values = weights.read(COMPRESS).float().norm(dim=1).numpy()
                    return Norms(run.name, int(folder.name.removeprefix("step-")), values)
    return None
