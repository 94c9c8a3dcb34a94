"""How the training of an autoencoder went: variance unexplained, active latents and dead latents over its tokens."""

import json
from pathlib import Path

from matplotlib.figure import Figure

from megacocomix.evaluation.plots import COLORS, amount

PANELS = (
    ("fvu", "variance unexplained"),
    ("l0", "active latents a token (L0)"),
    ("dead_fraction", "dead latents"),
)


def plot_sae_training(log: Path, out: Path) -> None:
    """Draw FILE.jsonl of tools/train_sae.py as a PNG of three panels; nothing where it holds no record (any more)."""
    records = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    if not records:
        return
    tokens = [record["tokens"] for record in records]
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    for panel, (key, label), color in zip(figure.subplots(1, 3), PANELS, COLORS, strict=False):
        values = [record[key] for record in records]
        panel.plot(tokens, values, color=color, linewidth=1.8, marker="o" if len(values) < 3 else None)
        panel.set_title(f"{label}: {values[-1]:.3g} at the end", fontsize=12, loc="left")
        panel.set_xlabel("training tokens", fontsize=12)
        panel.xaxis.set_major_formatter(lambda x, _: amount("tokens", x))
        panel.tick_params(labelsize=11)
        panel.set_ylim(bottom=0)
        panel.grid(color="0.9", linewidth=0.8)
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(out, dpi=120)
