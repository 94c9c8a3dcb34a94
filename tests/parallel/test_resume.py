"""A run goes on where it was stopped: in its own layout to the bit, in any other up to rounding."""

import json
import shutil
from collections import defaultdict

import pytest
import torch
from safetensors.torch import load_file

import tiny
from jobs import train_all
from layouts import asked_for, config, layout, nightly_unless, run_name
from processes import run_processes

pytestmark = pytest.mark.slow

LAYOUTS = dict(
    [
        layout(4, 2, 2, 3, "cocomix"),
        layout(2, 2, 1, 0, "cocomix"),
        layout(2, 1, 2, 1, "cocomix"),
        layout(2, 1, 2, 3, "cocomix", virtual_stages=2),
        layout(4, 2, 1, 0, "cocomix"),
        layout(4, 4, 1, 2, "cocomix"),
        layout(4, 2, 1, 3, "cocomix", offload_optimizer=True),
        layout(4, 1, 1, 3, "cocomix"),
        layout(4, 1, 2, 1, "cocomix"),
        layout(4, 2, 2, 1, "cocomix"),
        layout(4, 1, 4, 3, "cocomix"),
        layout(4, 1, 2, 3, "cocomix", virtual_stages=2),
    ]
)
NUM_LAYOUTS = 4
"""Layouts that every run of the suite resumes in; the others are nightly."""
# Saved in the first layout, resumed in the second. Of the first pairs each crosses one axis, the next one all of them.
PAIRS = [
    (layout(2, 2, 1, 1, "cocomix"), layout(1, 1, 1, 1, "cocomix")),
    (layout(2, 1, 2, 3, "cocomix"), layout(1, 1, 1, 3, "cocomix")),
    (layout(1, 1, 1, 3, "cocomix"), layout(2, 1, 1, 3, "cocomix")),
    (layout(2, 1, 1, 3, "cocomix"), layout(2, 1, 1, 1, "cocomix")),
    (layout(2, 1, 2, 3, "cocomix"), layout(2, 1, 2, 3, "cocomix", virtual_stages=2)),
    (layout(1, 1, 1, 0, "cocomix"), layout(4, 2, 2, 3, "cocomix")),
    (layout(1, 1, 1, 0, "cocomix"), layout(8, 2, 2, 1, "cocomix")),
    (layout(2, 2, 1, 3, "cocomix"), layout(1, 1, 1, 0, "cocomix")),
    (layout(2, 2, 1, 3, "cocomix"), layout(4, 1, 4, 1, "cocomix")),
    (layout(2, 1, 2, 3, "cocomix"), layout(2, 2, 1, 2, "cocomix")),
    (layout(2, 1, 2, 3, "cocomix"), layout(4, 1, 1, 3, "cocomix")),
    (layout(4, 4, 1, 1, "cocomix"), layout(2, 1, 2, 0, "cocomix")),
    (layout(4, 4, 1, 1, "cocomix"), layout(4, 2, 1, 2, "cocomix")),
    (layout(4, 2, 2, 1, "cocomix"), layout(8, 2, 1, 3, "cocomix")),
    (layout(4, 2, 2, 1, "cocomix"), layout(1, 1, 1, 3, "cocomix")),
    (layout(8, 2, 2, 3, "cocomix"), layout(4, 1, 2, 3, "cocomix", virtual_stages=2)),
    (layout(8, 2, 2, 3, "cocomix"), layout(4, 2, 1, 3, "cocomix", offload_optimizer=True)),
    (layout(8, 2, 2, 3, "cocomix"), layout(2, 1, 1, 1, "cocomix")),
]
NUM_PAIRS = 6
"""Pairs that every run of the suite crosses; the others are nightly."""


def with_steps(made, **training):
    return made.model_copy(update={"training": made.training.model_copy(update=training)})


def run_all(configs_by_world):
    for world, configs in sorted(configs_by_world.items()):
        configs = sorted(configs, key=lambda made: made.parallel.pipeline > 1)
        assert run_processes(world, train_all, configs, timeout=800) == [[(0, [])] * len(configs)] * world


@pytest.fixture(scope="module")
def folder(tmp_path_factory, request):
    """The runs that this module's tests ask for."""
    folder = tmp_path_factory.mktemp("resumed")
    tiny.make_inputs(folder)
    layouts, pairs = asked_for(request, "number"), asked_for(request, "pair")
    begun = defaultdict(list)
    for number in layouts:
        name, sections = list(LAYOUTS.items())[number]
        for run, stops in ((f"whole-{number}", (3,)), (f"parts-{number}", (1, 3))):
            begun[int(name[0])] += [with_steps(config(folder, run, sections), stop_after=stop) for stop in stops]
    for name, sections in dict(PAIRS[pair][0] for pair in pairs).items():
        made = with_steps(config(folder, f"begun-{run_name(name)}", sections), steps=4, stop_after=2)
        begun[int(name[0])].append(made)
    begun[1].append(with_steps(config(folder, "uninterrupted", layout(1, 1, 1, 0, "cocomix")[1]), steps=4))
    run_all(begun)
    resumed = defaultdict(list)
    for pair in pairs:
        (first, _), (second, sections) = PAIRS[pair]
        shutil.copytree(folder / f"begun-{run_name(first)}", folder / f"pair-{pair}")
        resumed[int(second[0])].append(with_steps(config(folder, f"pair-{pair}", sections), steps=4))
    run_all(resumed)
    return folder


def tensors(folder, run, step):
    merged = {}
    for file in (folder / run / "checkpoints" / f"step-{step:08d}").glob("*.safetensors"):
        merged |= load_file(file)
    return merged


def records(folder, run):
    lines = [json.loads(line) for line in (folder / run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


@pytest.mark.parametrize(
    "number",
    [pytest.param(n, marks=nightly_unless(n < NUM_LAYOUTS), id=name) for n, name in enumerate(LAYOUTS)],
)
def test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit(folder, number):
    whole, parts = (tensors(folder, f"{kind}-{number}", 3) for kind in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    keys = ("step", "loss", "concept_loss", "grad_norm", "lr", "tokens", "flops")
    for line, expected in zip(records(folder, f"parts-{number}"), records(folder, f"whole-{number}"), strict=True):
        assert [line[key] for key in keys] == [expected[key] for key in keys]


@pytest.mark.parametrize(
    "pair",
    [
        pytest.param(n, marks=nightly_unless(n < NUM_PAIRS), id=f"{first[0]} to {second[0]}")
        for n, (first, second) in enumerate(PAIRS)
    ],
)
def test_two_steps_in_another_layout_equal_those_of_a_run_that_was_not_interrupted(folder, pair):
    expected = [line for line in records(folder, "uninterrupted")]
    found = records(folder, f"pair-{pair}")
    assert [line["step"] for line in found] == [line["step"] for line in expected] == [1, 2, 3, 4]
    for line, reference in zip(found[2:], expected[2:], strict=True):
        for key in ("loss", "concept_loss", "grad_norm"):
            assert line[key] == pytest.approx(reference[key], rel=1e-6), (line["step"], key)
    ours, theirs = tensors(folder, f"pair-{pair}", 4), tensors(folder, "uninterrupted", 4)
    assert ours.keys() == theirs.keys()
    for name in theirs:
        assert (ours[name] - theirs[name]).abs().max() < 1e-6, name
