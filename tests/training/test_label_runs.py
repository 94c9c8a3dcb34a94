"""A run with labels from a complete or partial cache equals the run with the live teacher."""

import json
from pathlib import Path

import pytest
import torch

import tiny
from jobs import train_all
from megacocomix.config.rules import check_config
from megacocomix.errors import UserError
from megacocomix.teacher import label_cache
from megacocomix.teacher.label_cache import shard_file
from megacocomix.teacher.label_job import label_all
from megacocomix.training.inputs import open_inputs
from processes import run_processes


@pytest.fixture(scope="module")
def cache(folder):
    before, label_cache.SMALLEST_SHARD = label_cache.SMALLEST_SHARD, 32 * tiny.CONTEXT
    label_all(tiny.config(folder), folder / "cache", torch.device("cpu"))
    label_cache.SMALLEST_SHARD = before
    return folder / "cache"


def lines(config):
    """A run's metrics, without those that depend on time or on where the labels come from."""
    varying = ("seconds", "tokens_per_second", "flops_per_second", "memory_gib", "teacher_flops")
    text = (Path(config.run) / "metrics.jsonl").read_text()
    return [{k: v for k, v in json.loads(line).items() if k not in varying} for line in text.splitlines()]


def teacher_flops(config):
    text = (Path(config.run) / "metrics.jsonl").read_text()
    return json.loads(text.splitlines()[-1])["teacher_flops"]


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 4])
def test_live_cached_and_partly_cached_runs_are_the_same_to_the_bit(folder, cache, world):
    layout = {"tensor": 2} if world == 4 else {}
    partial = folder / f"partial-{world}"
    partial.mkdir()
    for file in cache.iterdir():
        if file != shard_file(cache, 2):
            (partial / file.name).write_bytes(file.read_bytes())
    configs = [
        tiny.config(folder, f"{name}-{world}", parallel=layout, teacher={"labels": str(labels)})
        for name, labels in (("live", "live"), ("cached", cache), ("partly", partial))
    ]
    outcomes = run_processes(world, train_all, configs)
    assert outcomes[0] == [(0, [])] * 3
    live, cached, partly = map(lines, configs)
    assert live == cached == partly
    assert any(line.get("concept_loss") for line in live)
    flops = [teacher_flops(config) for config in configs]
    assert flops[0] > flops[2] > flops[1] == 0
    assert flops[2] == pytest.approx(flops[0] * 32 / 200)
    for config, kind in zip(configs, ("labels: live", "labels: cached in", "of the windows cached in"), strict=True):
        assert kind in (Path(config.run) / "logs/rank-00000.log").read_text()


CHOICES = {
    "attribution": {},
    "random": {"label_source": "random"},
    "activation": {"label_source": "activation"},
    "absolute": {"label_sign": "absolute"},
    "negative": {"label_sign": "negative"},
}


@pytest.mark.slow
def test_other_labels_train_other_students(folder):
    configs = [tiny.config(folder, name, method=method, training={"steps": 3}) for name, method in CHOICES.items()]
    assert run_processes(1, train_all, configs) == [[(0, [])] * len(configs)]
    losses = [tuple(line["concept_loss"] for line in lines(each) if "concept_loss" in line) for each in configs]
    assert all(len(each) == 3 and min(each) > 0 for each in losses)
    assert len(set(losses)) == len(losses)


def test_a_stale_cache_stops_a_run_before_it_starts(folder, cache):
    config = tiny.config(folder, "stale", method={"num_labels": 2}, teacher={"labels": str(cache)})
    with pytest.raises(UserError, match=r"label cache .* is stale"):
        open_inputs(config, torch.device("cpu"))
    with pytest.raises(UserError, match="is no label cache"):
        open_inputs(tiny.config(folder, teacher={"labels": str(folder)}), torch.device("cpu"))


def test_a_sign_without_attributions_is_refused(folder):
    config = tiny.config(folder, method={"label_source": "activation", "label_sign": "negative"})
    with pytest.raises(UserError, match=r"label_sign negative chooses among attributions.*Use positive\."):
        check_config(config, 1)
