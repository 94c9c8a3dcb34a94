"""The figure and the table of a steering curve. Over the scale they show for how many concepts the text follows, by how
much, and the loss of fluency.

A line has one colour in all panels and its name at its end. Its band is one standard error over the concepts. The
unsteered texts are at a scale of 1.
"""

import math
from collections.abc import Iterator

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from megacocomix.compare.plots import COLORS, perplexity_axis

STUDENT, TEACHER, PROMOTED = COLORS[0], COLORS[1], COLORS[2]
LINES = (
    ("student", "activation", "student", STUDENT, "-"),
    ("student", "others", "student: another\nconcept's latent", "0.5", "--"),
    ("student", "promoted", "student: tokens\nit promotes", PROMOTED, ":"),
    ("teacher", "activation", "teacher", TEACHER, "-"),
)
"""The steered model, the key that is drawn, the line's name, its colour and its style."""

Points = dict[float, tuple[float, float]]
"""Scale → y and its standard error; NaN if there is none."""


def draw(result: dict) -> Figure:
    """The figure for a result of `measure_steering`."""
    measured = result["measured"]
    figure = Figure(figsize=(14, 4.6), layout="constrained")
    share, change, fluency = panels = figure.subplots(1, 3)
    for side, key, name, color, style in LINES:
        if side in measured and measured[side]["steered"][0][key]:
            compared = {at["scale"]: at[key] for at in measured[side]["steered"]}
            _line(share, {scale: _share(each) for scale, each in compared.items()}, name, color, style)
            _line(change, {1.0: (1.0, 0.0)} | {s: _ratio(each) for s, each in compared.items()}, name, color, style)
    for side, color in (("student", STUDENT), ("teacher", TEACHER)):
        if side in measured:
            _line(fluency, _perplexity(measured[side]), side, color, "-")
    share.axhline(0.5, color="0.3", linewidth=0.8)
    share.set_ylim(-0.02, 1.02)
    share.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{100 * y:.0f} %"))
    share.set_title("concepts that rise, of all that change", fontsize=12, loc="left")
    change.axhline(1, color="0.3", linewidth=0.8)
    change.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"× {y:g}"))
    change.set_title("the mean, against the unsteered text's", fontsize=12, loc="left")
    perplexity_axis(fluency)
    fluency.set_title("perplexity of the text, by the teacher", fontsize=12, loc="left")
    for panel in panels:
        _dress(panel, result["settings"]["scales"])
        _name_ends(panel)
    return figure


def _share(compared: dict) -> tuple[float, float]:
    """The share of raised concepts among those that changed, and its standard error."""
    total = compared["raised"] + compared["lowered"]
    if not total:
        return math.nan, math.nan
    share = compared["raised"] / total
    return share, math.sqrt(share * (1 - share) / total)


def _ratio(compared: dict) -> tuple[float, float]:
    """Ratio of the steered to the unsteered mean. Its error treats the unsteered mean as exact."""
    if compared["ratio"] is None:
        return math.nan, math.nan
    return compared["ratio"], _error(compared) / (compared["mean"] - compared["difference"])


def _perplexity(side: dict) -> Points:
    steered = {at["scale"]: (at["perplexity"], at["perplexity"] * _error(at["loss"])) for at in side["steered"]}
    return {1.0: (side["unsteered"]["perplexity"], 0.0)} | steered


def _error(measured: dict) -> float:
    return math.nan if measured["standard_error"] is None else measured["standard_error"]


def _line(panel: Axes, points: Points, name: str, color: str, style: str) -> None:
    scales = sorted(points)
    y, error = np.array([points[scale] for scale in scales]).T
    panel.fill_between(scales, y - error, y + error, color=color, alpha=0.15, linewidth=0)
    panel.plot(scales, y, style, color=color, marker="o", markersize=4, linewidth=1.8, label=name)


def _dress(panel: Axes, scales: list[float]) -> None:
    """Axes and grid, with a vertical line at the unsteered scale of 1."""
    panel.axvline(1, color="0.3", linewidth=0.8)
    ticks = sorted({1.0, *scales})
    panel.set_xticks(ticks, [f"{scale:g}".replace("-", "−") for scale in ticks])
    panel.set_xlabel("scale of the concept's logit", fontsize=12)
    panel.tick_params(labelsize=11)
    panel.grid(color="0.9", linewidth=0.8)
    panel.spines[["top", "right"]].set_visible(False)
    panel.set_axisbelow(True)


def _name_ends(panel: Axes) -> None:
    """Write each line's name right of the panel, at the height of its end. Names that would touch are moved apart."""
    inside, floor = panel.transData + panel.transAxes.inverted(), -math.inf
    ends = []
    for line in panel.get_lines():
        y = line.get_ydata()[np.isfinite(line.get_ydata())] if not line.get_label().startswith("_") else []
        if len(y):
            ends.append((inside.transform((0, y[-1]))[1], line))
    for y, line in sorted(ends, key=lambda end: end[0]):
        half = 0.035 * (1 + line.get_label().count("\n"))  # half the height of the name, in panel heights
        middle = max(y, floor + half)
        text = {"color": line.get_color(), "fontsize": 11, "fontweight": "bold", "va": "center"}
        panel.text(1.02, middle, line.get_label(), transform=panel.transAxes, **text)
        floor = middle + half


def table(result: dict) -> Iterator[str]:
    """The result for a terminal, one line per scale; then the texts of one concept."""
    concepts, settings = result["concepts"], result["settings"]
    wanted = settings["concepts"] if isinstance(settings["concepts"], int) else len(concepts)
    few = f" (of {wanted} requested; no more are ever kept)" if len(concepts) < wanted else ""
    shares = [concept["kept_share"] for concept in concepts]
    kept = f"kept at {_percent(min(shares))} to {_percent(max(shares))} of held-out slots"
    yield (
        f"{result['model']}: {len(concepts)} concepts{few}, {kept}; "
        f"{settings['prompts']} prompts of {settings['prompt_tokens']} tokens and "
        f"{settings['new_tokens']} new ones; edits {settings['place']} the largest are kept"
    )
    for side, measured in result["measured"].items():
        base = measured["unsteered"]
        yield (
            f"{side}, unsteered: teacher perplexity {base['perplexity']:,.1f}; a concept's latent is active at "
            f"{_percent(base['active'])} of new tokens, {_percent(base['promoted'])} are promoted by it"
        )
        yield HEAD
        yield from (_row(at) for at in measured["steered"])
    example = result["example"]
    yield f"concept {example['concept']}, first prompt: {_flat(example['prompt'])}"
    for side in result["measured"]:
        for name, text in example[side].items():
            scale = f" × {example['scale']:g}" if name == "steered" else ""
            yield f"  {side} {name}{scale}: {_flat(text)}"


HEAD = (
    f"{'scale':>6}  {'latent up/down':>14} {'p':>8} {'ratio':>6}  {'rank':>13}  {'another up/down':>15} {'p':>8}  "
    f"{'promoted up/down':>16} {'p':>8} {'ratio':>6}  {'ppl':>9} {'KL':>6} {'kept':>5}"
)


def _row(at: dict) -> str:
    own, others, promoted = at["activation"], at["others"], at["promoted"]
    rank = f"{_number(at['rank']['mean'], 3)} ± {_number(at['rank']['standard_error'], 3)}"
    return (
        f"{at['scale']:6g}  {_split(own):>14} {own['p_value']:8.2g} {_number(own['ratio'], 2):>6}  "
        f"{rank:>13}  {_split(others):>15} {_number(others and others['p_value'], 2):>8}  "
        f"{_split(promoted):>16} {promoted['p_value']:8.2g} {_number(promoted['ratio'], 2):>6}  "
        f"{at['perplexity']:9,.1f} {at['kl']:6.3f} {100 * at['kept']:4.0f}%"
    )


def _split(compared: dict | None) -> str:
    return f"{compared['raised']}/{compared['lowered']}" if compared else "–"


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def _flat(text: str) -> str:
    return " ".join(text.split())
