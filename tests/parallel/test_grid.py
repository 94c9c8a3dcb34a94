import itertools
import re

import pytest
import torch
import torch.distributed as dist

from megacocomix.config.rules import grid_problem
from megacocomix.parallel.grid import Grid
from megacocomix.parallel.runtime import start_runtime, stop_runtime
from processes import run_processes


@pytest.mark.parametrize("world", range(1, 9))
def test_degrees_that_do_not_multiply_to_the_processes_are_refused_with_ones_that_do(world):
    for tensor, pipeline in itertools.product(range(1, 10), repeat=2):
        problem = grid_problem(world, tensor, pipeline)
        assert (problem is None) == (world % (tensor * pipeline) == 0)
        if problem:
            near = [
                int(degree) for degree in re.findall(r"(?:tensor|pipeline|data) (\d+)", problem.partition("Nearest")[2])
            ]
            assert len(near) == 3
            assert near[0] * near[1] * near[2] == world


def test_a_refusal_names_every_factor():
    assert grid_problem(6, 4, 2) == (
        "parallel.tensor 4 × parallel.pipeline 2 = 8 does not divide the 6 processes: pipeline × data × tensor must be "
        "their number. Nearest valid: tensor 3 × pipeline 2 × data 1, or start 8 processes "
        "(deepspeed --num_accelerators 8, torchrun --nproc-per-node 8)."
    )


def places_and_groups() -> dict:
    runtime = start_runtime()
    grid = Grid(runtime, tensor=2, pipeline=2)
    groups = {
        name: dist.get_process_group_ranks(getattr(grid, f"{name}_group"))
        for name in ("tensor", "data", "pipeline", "model", "tied")
    }
    total = torch.ones(1)
    dist.all_reduce(total, group=grid.model_group)
    place = (grid.pipeline_rank, grid.data_rank, grid.tensor_rank)
    peers = [grid.pipeline_peer(stage) for stage in range(2)]
    stop_runtime()
    return {"place": place, "groups": groups, "peers": peers, "model_rank": grid.model_rank, "total": total.item()}


@pytest.mark.slow
def test_tensor_ranks_are_neighbours_then_data_ranks_then_stages():
    ranks = run_processes(8, places_and_groups)
    assert [found["place"] for found in ranks] == list(itertools.product(range(2), repeat=3))
    assert ranks[5]["groups"] == {
        "tensor": [4, 5],
        "data": [5, 7],
        "pipeline": [1, 5],
        "model": [0, 1, 4, 5],
        "tied": [1, 5],
    }
    assert ranks[5]["peers"] == [1, 5]
    assert ranks[5]["model_rank"] == 3
    assert all(found["total"] == 4 for found in ranks)
