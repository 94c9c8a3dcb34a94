"""Runs of every preset in one process: their losses fall, and a teacher is never trained."""

import json
from pathlib import Path

import pytest
from safetensors import safe_open

import tiny
from jobs import train_all
from megacocomix.config.method import PRESETS
from megacocomix.model.gpt2 import assemble
from processes import run_processes

pytestmark = pytest.mark.slow

METHODS = {name: {"name": name} for name in PRESETS}
METHODS |= {
    "negative": {"name": "cocomix", "label_sign": "negative"},
    "absolute": {"name": "cocomix", "label_sign": "absolute"},
    "every 4": {"name": "cocomix", "interleave_every": 4},
    "l1": {"name": "direct-hidden", "hidden_loss": "l1"},
    "cosine": {"name": "direct-hidden", "hidden_loss": "cosine"},
    "mostly kd": {"name": "kd", "kd_weight": 10.0},
    "another layer": {"name": "cocomix", "insertion_layer": 2, "num_labels": 2, "num_kept": 8, "concept_weight": 0.5},
}


@pytest.fixture(scope="module")
def configs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("methods")
    tiny.make_inputs(folder)
    sections = {
        "training": {"steps": 24, "global_batch": 8, "micro_batch": 8},
        "parallel": {"zero": 0},
        "checkpoint": {"every": 24},
        "evaluation": {"every": 12},
    }
    configs = {
        name: tiny.config(folder, name.replace(" ", "-"), method=method, **sections) for name, method in METHODS.items()
    }
    assert run_processes(1, train_all, list(configs.values())) == [[(0, [])] * len(configs)]
    return configs


def lines(config):
    return [json.loads(line) for line in (Path(config.run) / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", METHODS)
def test_what_a_method_minimises_falls(configs, name):
    method, train = configs[name].method, [line for line in lines(configs[name]) if "loss" in line]
    weights = {"loss": 1.0, "concept_loss": method.concept_weight, "hidden_loss": method.concept_weight}
    weights["kd_loss"] = method.kd_weight
    used = [key for key in weights if train[0][key] is not None]
    assert len(used) == 1 + method.has_teacher + (name == "cocomix+kd")
    for line in train:
        line["objective"] = sum(weights[key] * line[key] for key in used)
    # The teacher here is a random network: its next-token predictions contradict the data.
    falling = {"objective", *used} - ({"kd_loss"} if method.kd_weight < 1 else {"loss"})
    for key in falling:
        first, last = (sum(line[key] for line in part) / 4 for part in (train[1:5], train[-4:]))
        assert last < 0.995 * first, f"{key}: {first:.4f} → {last:.4f}"


@pytest.mark.parametrize("name", METHODS)
def test_what_is_saved_is_the_student_alone(configs, name):
    checkpoint = f"{configs[name].run}/checkpoints/step-00000024"
    with safe_open(f"{checkpoint}/weights-00000.safetensors", "pt") as file:
        assert set(file.keys()) == {parameter for parameter, _ in assemble(configs[name]).named_parameters()}


def test_flops_of_student_and_teacher_are_counted_for_what_each_method_runs(configs):
    spent = {name: lines(config)[-1] for name, config in configs.items()}
    assert {name for name, line in spent.items() if not line["teacher_flops"]} == {"ntp", "pause", "mix-only"}
    flops = {name: line["flops"] for name, line in spent.items()}
    assert flops["ntp"] == flops["kd"] < flops["predict-only"] < flops["add"] < flops["cocomix"] == flops["mix-only"]
    assert flops["ntp"] < flops["pause"] < flops["cocomix"]
    assert flops["add"] < flops["cocomix"] and flops["every 4"] < flops["cocomix"]
    teacher = {name: line["teacher_flops"] for name, line in spent.items()}
    assert (
        teacher["random"] == teacher["activation"] < teacher["cocomix"] == teacher["absolute"] < teacher["cocomix+kd"]
    )
    assert teacher["direct-hidden"] < teacher["activation"]  # the same blocks, and no autoencoder
