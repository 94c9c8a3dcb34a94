"""Stages: how the model is divided, what each part holds, and how its parameters get their values."""

import itertools
import math
import weakref
from types import SimpleNamespace

import pytest
import torch

import tiny
from layouts import shard_small_parameters_too
from megacocomix.config.load import load_config
from megacocomix.model.flops import block_flops, head_flops, module_flops
from megacocomix.model.gpt2 import assemble, initial_value
from megacocomix.parallel.grid import Grid
from megacocomix.parallel.runtime import start_runtime, stop_runtime
from megacocomix.parallel.stage import TIED, StageModule, hidden_shape, stage_blocks
from megacocomix.parallel.tensor import shard
from processes import run_processes


def stages_on(config, rank):
    parallel = config.parallel
    grid = SimpleNamespace(tensor=1, tensor_rank=0, pipeline=parallel.pipeline, pipeline_rank=rank, data=1)
    return StageModule(config, grid)


def costliest(config, bounds):
    costs = [block_flops(config, index) for index in range(config.model.num_layers)]
    costs[-1] += head_flops(config)
    if config.method.has_module:
        costs[config.method.insertion_layer] += module_flops(config)
    return max(sum(costs[first:stop]) for first, stop in itertools.pairwise(bounds))


@pytest.mark.parametrize("num_stages", [2, 3, 4])
@pytest.mark.parametrize("name", ["69m", "tiny", "69m-ntp"])
def test_no_other_division_has_a_cheaper_costliest_stage(root, name, num_stages):
    overrides = [f"parallel.pipeline={num_stages}"] + (["method.name=ntp"] if name.endswith("-ntp") else [])
    config = load_config(root / f"configs/{name.removesuffix('-ntp')}.yaml", overrides)
    found = stage_blocks(config)
    layers = config.model.num_layers
    assert [index for blocks in found for index in blocks] == list(range(layers))
    others = [[0, *inner, layers] for inner in itertools.combinations(range(1, layers), num_stages - 1)]
    bounds = [0, *(blocks.stop for blocks in found)]
    assert costliest(config, bounds) == min(costliest(config, other) for other in others)


def test_blocks_above_the_concept_module_make_its_stages_shorter(root):
    config = load_config(root / "configs/1.38b.yaml", ["parallel.pipeline=4"])
    lengths = [len(blocks) for blocks in stage_blocks(config)]
    assert lengths[0] > lengths[1]
    assert sum(lengths) == 24


def test_split_points_can_be_set(root):
    config = load_config(root / "configs/1.38b.yaml", ["parallel.pipeline=3", "parallel.split_points=[6,15]"])
    assert stage_blocks(config) == [range(0, 6), range(6, 15), range(15, 24)]


@pytest.mark.parametrize("virtual_stages", [1, 2])
def test_stages_together_hold_the_models_parameters_under_the_models_names(tmp_path, virtual_stages):
    config = tiny.config(tmp_path, model={"num_layers": 5}, parallel={"pipeline": 2, "virtual_stages": virtual_stages})
    held = [list(stages_on(config, rank).named_shards()) for rank in range(2)]
    names = [name for shards in held for name, _, is_copy in shards if not is_copy]
    assert sorted(names) == sorted(name for name, _ in assemble(config).named_parameters())
    assert [[name for name, _, is_copy in shards if is_copy] for shards in held] == [[], [TIED]]


@pytest.mark.parametrize("first", [1, 2, 3])
def test_a_stage_receives_2t_positions_only_behind_the_concept_module(tmp_path, first):
    parallel = {"pipeline": 2, "split_points": [first]}
    config = tiny.config(tmp_path, model={"num_layers": 4}, method={"insertion_layer": 2}, parallel=parallel)
    assert hidden_shape(config, 1) == (2, tiny.CONTEXT * (2 if first > 2 else 1), 32)


def test_a_process_never_holds_two_whole_parameters(tmp_path):
    config = tiny.config(tmp_path)
    stages, previous = stages_on(config, 0), []

    def whole_value(name):
        assert all(value() is None for value in previous), f"a whole value from before {name} is still there"
        value = initial_value(name, stages.whole_shapes[name], 0, 3)
        previous.append(weakref.ref(value))
        return value

    assert all(parameter.is_meta for parameter in stages.parameters())
    stages.set_parameters(whole_value, lambda value: torch.nn.Parameter(value[:1].clone()))
    assert len(previous) == len(stages.whole_shapes)


def sizes_in_memory(config):
    """Elements that ZeRO-3 keeps of all parameters on this rank, and of the gathered ones."""
    from megacocomix.parallel.zero import Engine
    from megacocomix.training.optimizer import build_optimizer

    shard_small_parameters_too()
    grid = Grid(start_runtime(), config.parallel.tensor, config.parallel.pipeline)
    stages = StageModule(config, grid)
    engine = Engine(
        stages,
        lambda name: initial_value(name, stages.whole_shapes[name], 0, 3),
        lambda named: build_optimizer(named, config.optimizer),
        config,
        grid,
    )
    parameters = list(engine.stages.parameters())
    sizes = sum(p.ds_tensor.numel() for p in parameters), sum(p.numel() for p in parameters)
    stop_runtime()
    return sizes


@pytest.mark.slow
def test_under_zero_3_each_rank_keeps_its_share_from_the_start(tmp_path):
    config = tiny.config(tmp_path, parallel={"zero": 3})
    whole = sum(shard(name, parameter, 1, 0).numel() for name, parameter in assemble(config).named_parameters())
    for kept, gathered in run_processes(4, sizes_in_memory, config):
        assert whole / 4 <= kept <= math.ceil(whole / 4) + 100
        assert gathered == 0
