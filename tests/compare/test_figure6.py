import numpy as np
import pytest
import torch
from run_folders import valid_line, write_checkpoint, write_run

from megacocomix.compare.figure6 import plot_figure_6
from megacocomix.compare.groups import read_groups
from megacocomix.compare.report import compose, write_report

LINES = [valid_line(step, 5 - step / 20) for step in (10, 20, 30, 40)]


def runs(folder, *methods):
    """A run of each preset, `direct-hidden:l1` with that loss, with names that do not show the preset."""
    for index, method in enumerate(methods):
        name, _, loss = method.partition(":")
        yield write_run(
            folder / f"run{index}", LINES, method__name=name, **({"method__hidden_loss": loss} if loss else {})
        )


def titles(figure):
    return [panel.get_title(loc="left")[:3] for panel in figure.axes]


@pytest.mark.parametrize(
    ("methods", "panels"),
    [
        (("cocomix", "activation"), ["(a)"]),
        (("cocomix", "direct-hidden:l1", "direct-hidden:cosine"), ["(b)"]),
        (("ntp", "cocomix", "mix-only"), ["(d)"]),
        (("cocomix", "add"), ["(e)"]),
        (("cocomix", "kd+pause"), ["(f)"]),
        (("cocomix", "pause", "add", "predict-only", "random"), ["(a)", "(d)", "(e)", "(f)"]),
    ],
)
def test_the_panels_whose_runs_are_there_are_drawn(tmp_path, methods, panels):
    figure, caption = plot_figure_6(read_groups(list(runs(tmp_path, *methods))))
    assert titles(figure) == panels
    assert "Panels without runs: " in caption
    assert not any(f"{panel} " in caption.split("Panels without runs")[1] for panel in panels)


def test_the_lines_are_named_by_the_paper_with_their_final_perplexity(tmp_path):
    figure, caption = plot_figure_6(read_groups(list(runs(tmp_path, "ntp", "cocomix", "predict-only"))))
    (panel,) = figure.axes
    labels = [text.get_text() for text in panel.get_legend().get_texts()]
    assert labels == ["CoCoMix  20.09", "NTP  20.09", "predict only  20.09"]
    assert "(d) has no run of mix only." in caption


def test_next_tokens_and_concepts_alone_make_no_panel(tmp_path):
    groups = read_groups(list(runs(tmp_path, "ntp", "cocomix")))
    assert plot_figure_6(groups) == (None, "")
    assert "Figure 6" not in compose(groups, "command")


def test_the_norms_are_of_the_rows_of_the_newest_checkpoint_with_a_compress_layer(tmp_path):
    folders = list(runs(tmp_path, "ntp", "cocomix"))
    weight = torch.ones(8, 4)
    weight[:2] *= 1e-3
    write_checkpoint(folders[1], 20, concept__compress__weight=torch.ones(8, 4))
    write_checkpoint(folders[1], 40, concept__compress__weight=weight, wte__weight=torch.ones(2))
    page = write_report(read_groups(folders), tmp_path / "out", "command")
    assert "(c) run1 at step 40: 25.0 % of 8 concepts have a compress column of norm below 0.01" in page.read_text()
    assert (tmp_path / "out/plots/figure6.svg").exists()
    (panel,) = plot_figure_6(read_groups(folders))[0].axes
    assert np.sum([bar.get_height() for bar in panel.patches]) == 8


def test_a_checkpoint_that_cannot_be_read_is_skipped(tmp_path):
    folders = list(runs(tmp_path, "ntp", "cocomix"))
    write_checkpoint(folders[1], 20, concept__compress__weight=torch.ones(8, 4))
    damaged = write_checkpoint(folders[1], 40, concept__compress__weight=torch.ones(8, 4))
    file = next(damaged.glob("*.safetensors"))
    file.write_bytes(b"\xff" * file.stat().st_size)
    assert "run1 at step 20" in plot_figure_6(read_groups(folders))[1]
