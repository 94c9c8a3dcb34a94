"""Every layout trains the model that one process trains: losses, every gradient, norm, weights. The heart of it all."""

import itertools
import re

import pytest
import torch

import tiny
from layouts import (
    STEPS,
    all_layouts,
    asked_for,
    config,
    covering_layouts,
    gradients,
    largest_differences,
    layout,
    lines,
    nightly_unless,
    run_jobs,
    run_name,
    state,
)

pytestmark = pytest.mark.slow

TOLERANCE = 1e-5
LAYOUTS = {world: all_layouts(world) for world in (2, 4, 8)}
NAMES = [name for layouts in LAYOUTS.values() for name in layouts]
COVERING = covering_layouts()
CASES = [pytest.param(name, marks=nightly_unless(name in COVERING)) for name in NAMES]
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
BF16_CASES = [
    pytest.param(name, marks=nightly_unless(name.startswith("2:") and "offload" not in name and index != 3))
    for index, name in enumerate(BF16)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, request):
    """The runs that this module's tests ask for: one job for each number of processes."""
    folder = tmp_path_factory.mktemp("layouts")
    tiny.make_inputs(folder)
    jobs = {1: [config(folder, "bf16-cocomix", layout(1, 1, 1, 1, "cocomix")[1], "bf16")]}
    for method in ("cocomix", "ntp"):
        jobs[1].append(config(folder, method, layout(1, 1, 1, 0, method)[1]))
    for name in asked_for(request, "name"):
        run = config(folder, run_name(name), LAYOUTS[int(name[0])][name])
        jobs.setdefault(int(name[0]), []).append(run)
    for name in asked_for(request, "bf16_name"):
        run = config(folder, f"bf16-{run_name(name)}", BF16[name], "bf16")
        jobs.setdefault(int(name[0]), []).append(run)
    run_jobs(jobs)
    return folder


def distance(ours, theirs):
    """Length of the difference of two sets of tensors, relative to the length of the second."""
    squares = [((ours[name] - theirs[name]).square().sum(), theirs[name].square().sum()) for name in theirs]
    return (sum(square for square, _ in squares) / sum(square for _, square in squares)).sqrt().item()


@pytest.mark.parametrize("name", CASES)
def test_a_layout_trains_the_model_of_one_process(folder, name):
    found = largest_differences(folder, run_name(name), name.rpartition(", ")[2])
    assert max(found.values()) < TOLERANCE, found


@pytest.mark.parametrize("name", [case for case in CASES if "pipeline 1" not in case.values[0]])
def test_both_copies_of_the_tied_weight_get_the_same_gradient(folder, name):
    for step in range(1, STEPS + 1):
        merged = gradients(folder, run_name(name), step)
        torch.testing.assert_close(merged["copy"], merged["embed.tokens.weight"], rtol=0, atol=0)


@pytest.mark.parametrize("bf16_name", BF16_CASES)
def test_a_layout_in_bf16_stays_within_rounding_of_one_process_in_bf16(folder, bf16_name):
    run = f"bf16-{run_name(bf16_name)}"
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


def test_the_covering_set_holds_every_pair_of_sizes_and_stages():
    assert set(NAMES) >= COVERING
    sizes = re.compile(r"4: tensor (\d) × pipeline (\d) × data (\d), ZeRO (\d), cocomix")
    full, covering = (
        [found.groups() for name in names if (found := sizes.fullmatch(name))] for names in (NAMES, COVERING)
    )
    for one, other in itertools.combinations(range(4), 2):
        assert {(each[one], each[other]) for each in covering} == {(each[one], each[other]) for each in full}


def test_the_table_of_layouts_in_the_docs_is_of_these_layouts(request, root):
    """`--write-layouts` writes the table anew."""
    page = root / "docs/parallelism.md"
    before, _, rest = page.read_text().partition("<!-- layouts -->\n")
    old, _, after = rest.partition("<!-- /layouts -->")
    if not request.config.getoption("--write-layouts"):
        command = "pytest tests/parallel/test_layouts.py --write-layouts"
        assert re.findall(r"^\| (\d: .*?) \|", old, re.M) == NAMES, f"run: {command}"
        return
    folder, table = (
        request.getfixturevalue("folder"),
        "| processes and layout | largest gradient difference |\n|---|---|\n",
    )
    for name in NAMES:
        largest = largest_differences(folder, run_name(name), name.rpartition(", ")[2])["gradient"]
        table += f"| {name} | {largest:.1e} |\n"
    page.write_text(f"{before}<!-- layouts -->\n{table}<!-- /layouts -->{after}")
