"""Every layout trains the model that one process trains: losses, every gradient, norm, weights. The heart of it all."""

import re

import pytest
import torch

import tiny
from layouts import (
    STEPS,
    all_layouts,
    config,
    gradients,
    largest_differences,
    layout,
    lines,
    run_jobs,
    run_name,
    state,
)

pytestmark = pytest.mark.slow

TOLERANCE = 1e-5
LAYOUTS = {world: all_layouts(world) for world in (2, 4, 8)}
NAMES = [name for layouts in LAYOUTS.values() for name in layouts]
BF16 = dict(
    [
        layout(2, 1, 1, 3, "cocomix"),
        layout(2, 2, 1, 1, "cocomix"),
        layout(2, 2, 1, 2, "cocomix"),
        layout(2, 2, 1, 3, "cocomix"),
        layout(2, 1, 2, 1, "cocomix"),
        layout(2, 1, 2, 3, "cocomix"),
        layout(2, 1, 2, 3, "cocomix", offload_optimizer=True),
        layout(4, 2, 1, 1, "cocomix"),
        layout(4, 1, 2, 1, "cocomix"),
        layout(8, 2, 2, 3, "cocomix"),
    ]
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """All runs of this module: one job for each number of processes."""
    folder = tmp_path_factory.mktemp("layouts")
    tiny.make_inputs(folder)
    single = [layout(1, 1, 1, 0, method) for method in ("cocomix", "ntp")]
    jobs = {
        1: [
            *(config(folder, sections["method"]["name"], sections) for _, sections in single),
            config(folder, "bf16-cocomix", layout(1, 1, 1, 1, "cocomix")[1], "bf16"),
        ]
    }
    for world, layouts in LAYOUTS.items():
        runs = [config(folder, run_name(name), sections) for name, sections in layouts.items()]
        bf16 = {name: sections for name, sections in BF16.items() if name.startswith(f"{world}:")}
        runs += [config(folder, f"bf16-{run_name(name)}", sections, "bf16") for name, sections in bf16.items()]
        jobs[world] = runs
    run_jobs(jobs)
    return folder


def distance(ours, theirs):
    """Length of the difference of two sets of tensors, relative to the length of the second."""
    squares = [((ours[name] - theirs[name]).square().sum(), theirs[name].square().sum()) for name in theirs]
    return (sum(square for square, _ in squares) / sum(square for _, square in squares)).sqrt().item()


@pytest.mark.parametrize("name", NAMES)
def test_a_layout_trains_the_model_of_one_process(folder, name):
    found = largest_differences(folder, run_name(name), name.rpartition(", ")[2])
    assert max(found.values()) < TOLERANCE, found


@pytest.mark.parametrize("name", [name for name in NAMES if "pipeline 1" not in name])
def test_both_copies_of_the_tied_weight_get_the_same_gradient(folder, name):
    for step in range(1, STEPS + 1):
        merged = gradients(folder, run_name(name), step)
        torch.testing.assert_close(merged["copy"], merged["embed.tokens.weight"], rtol=0, atol=0)


@pytest.mark.parametrize("name", BF16)
def test_a_layout_in_bf16_stays_within_rounding_of_one_process_in_bf16(folder, name):
    run = f"bf16-{run_name(name)}"
    # By as much as rounding moves the single process away from fp32, a layout may be away from it, and not much more.
    # Over all tensors as one vector: which concepts are kept is decided anew where two scores round to the same.
    exact, theirs, ours = (gradients(folder, each, 1) for each in ("cocomix", "bf16-cocomix", run))
    rounding = distance(theirs, exact)
    assert 1e-3 < rounding < 3e-2
    assert distance(ours, theirs) < 1.5 * rounding
    exact, theirs, ours = (state(folder, each) for each in ("cocomix", "bf16-cocomix", run))
    assert distance(ours, theirs) < 1.5 * distance(theirs, exact)
    for line, expected in zip(lines(folder, run), lines(folder, "bf16-cocomix"), strict=True):
        for key, tolerance in (("loss", 2e-3), ("concept_loss", 2e-3), ("valid_loss", 2e-3), ("grad_norm", 3e-2)):
            if expected.get(key) is not None:
                assert line[key] == pytest.approx(expected[key], rel=tolerance)


def test_the_table_of_layouts_in_the_docs_is_of_these_layouts(folder, root, request):
    """`--write-layouts` writes the table anew."""
    rows = [(name, largest_differences(folder, run_name(name), name.rpartition(", ")[2])["gradient"]) for name in NAMES]
    table = "| processes and layout | largest gradient difference |\n|---|---|\n" + "".join(
        f"| {name} | {value:.1e} |\n" for name, value in rows
    )
    page = root / "docs/parallelism.md"
    text = page.read_text()
    before, _, rest = text.partition("<!-- layouts -->\n")
    old, _, after = rest.partition("<!-- /layouts -->")
    if request.config.getoption("--write-layouts"):
        page.write_text(f"{before}<!-- layouts -->\n{table}<!-- /layouts -->{after}")
        return
    assert re.findall(r"^\| (\d: .*?) \|", old, re.M) == NAMES, (
        "run: pytest tests/parallel/test_layouts.py --write-layouts"
    )
