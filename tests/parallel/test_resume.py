"""A run goes on where it was stopped: in its own layout to the bit, in any other up to rounding."""

import json

import pytest
import torch
from safetensors.torch import load_file

import tiny
from jobs import train_all
from layouts import WEIGHT_FLOOR, config, difference, layout
from processes import run_processes

pytestmark = pytest.mark.slow

# In the order in which a run is passed on. Those without a pipeline first: see layouts.all_layouts.
LAYOUTS = dict(
    [
        layout(4, 2, 1, 0, "cocomix"),
        layout(4, 4, 1, 2, "cocomix"),
        layout(4, 2, 1, 3, "cocomix", offload_optimizer=True),
        layout(4, 1, 1, 3, "cocomix"),
        layout(4, 1, 2, 1, "cocomix"),
        layout(4, 2, 2, 3, "cocomix"),
        layout(4, 2, 2, 1, "cocomix"),
        layout(4, 1, 4, 3, "cocomix"),
        layout(4, 1, 2, 3, "cocomix", stages_per_rank=2),
    ]
)
PASSED_ON = "passed-on"


def with_steps(made, **training):
    return made.model_copy(
        update={
            "training": made.training.model_copy(update=training),
            "checkpoint": made.checkpoint.model_copy(update={"keep": 100}),
        }
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resumed")
    tiny.make_inputs(folder)
    configs = []
    for number, sections in enumerate(LAYOUTS.values()):
        for run, stops in ((f"whole-{number}", (3,)), (f"parts-{number}", (1, 3))):
            configs += [with_steps(config(folder, run, sections), stop_after=stop) for stop in stops]
    steps = len(LAYOUTS)
    relay = [
        with_steps(config(folder, PASSED_ON, sections), steps=steps, stop_after=number)
        for number, sections in enumerate(LAYOUTS.values(), 1)
    ]
    configs = sorted(configs + relay, key=lambda made: made.parallel.pipeline > 1)
    alone = with_steps(config(folder, "alone", layout(1, 1, 1, 0, "cocomix")[1]), steps=steps)
    assert run_processes(1, train_all, [alone]) == [[(0, [])]]
    assert run_processes(4, train_all, configs) == [[(0, [])] * len(configs)] * 4
    return folder


def tensors(folder, run, step):
    merged = {}
    for file in (folder / run / "checkpoints" / f"step-{step:08d}").glob("*.safetensors"):
        merged |= load_file(file)
    return merged


def records(folder, run):
    lines = [json.loads(line) for line in (folder / run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


@pytest.mark.parametrize("number", range(len(LAYOUTS)), ids=list(LAYOUTS))
def test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit(folder, number):
    whole, parts = (tensors(folder, f"{kind}-{number}", 3) for kind in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    keys = ("step", "loss", "concept_loss", "grad_norm", "lr", "tokens", "flops")
    for line, expected in zip(records(folder, f"parts-{number}"), records(folder, f"whole-{number}"), strict=True):
        assert [line[key] for key in keys] == [expected[key] for key in keys]


def test_a_run_passed_on_from_layout_to_layout_equals_one_of_a_single_process(folder):
    for line, expected in zip(records(folder, PASSED_ON), records(folder, "alone"), strict=True):
        for key in ("loss", "concept_loss", "grad_norm"):
            assert line[key] == pytest.approx(expected[key], rel=1e-5), (line["step"], key)
    ours, theirs = tensors(folder, PASSED_ON, len(LAYOUTS)), tensors(folder, "alone", len(LAYOUTS))
    assert ours.keys() == theirs.keys()
    for name in theirs:
        assert difference(ours[name], theirs[name], 0.0 if "/" in name else WEIGHT_FLOOR) < 1e-5, name
