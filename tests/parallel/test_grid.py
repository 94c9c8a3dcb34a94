import itertools
import os
import re
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megacocomix.config.rules import grid_problem
from megacocomix.parallel.grid import Grid
from megacocomix.parallel.runtime import Runtime, start_runtime, stop_runtime
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


def sockets() -> int:
    """TCP connections of this process."""
    links = set()
    for link in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # that of the listing itself
            links.add(os.readlink(link))
    tables = (Path(f"/proc/self/net/{name}").read_text().splitlines()[1:] for name in ("tcp", "tcp6"))
    established = [line.split() for line in itertools.chain(*tables) if line.split()[3] == "01"]
    return sum(f"socket:[{connection[9]}]" in links for connection in established)


def sockets_of_a_grid(device, tensor, pipeline) -> tuple[int, int]:
    """Connections of the world alone, and with the grid's groups. On "cuda", NCCL is replaced by a backend that does
    nothing."""
    import torch.testing._internal.distributed.fake_pg

    dist.init_process_group("cpu:gloo,cuda:fake" if device == "cuda" else "gloo")
    dist.barrier()
    world = sockets()
    grid = Grid(Runtime(dist.get_rank(), dist.get_world_size(), torch.device(device)), tensor, pipeline)
    found = world, sockets()
    assert grid.data_group is not None
    dist.barrier()
    dist.destroy_process_group()
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("tensor", "pipeline"), [(1, 1), (2, 1), (2, 2)])
def test_on_a_gpu_only_the_worlds_group_opens_sockets(tensor, pipeline):
    # One to each other rank and one to the store, which rank 0 holds.
    for world, with_groups in run_processes(4, sockets_of_a_grid, "cuda", tensor, pipeline)[1:]:
        assert world == with_groups == 4


def shared_groups(tensor, pipeline) -> dict:
    runtime = start_runtime()
    grid = Grid(runtime, tensor, pipeline)
    names = ("tensor", "data", "pipeline", "model", "tied")
    groups = {name: getattr(grid, f"{name}_group") for name in names}
    shared = {name: {other for other in names if groups[other] is groups[name]} for name in names}
    worlds = {name for name in names if groups[name] is dist.group.WORLD}
    stop_runtime()
    return {"shared": shared, "world": worlds}


@pytest.mark.slow
def test_the_same_ranks_share_a_group_but_never_with_messages_between_stages():
    for found in run_processes(2, shared_groups, 1, 1):
        assert found["world"] == {"data"}
        assert found["shared"]["tensor"] == {"tensor", "pipeline", "model"}
    for found in run_processes(2, shared_groups, 2, 1):
        assert found["world"] == {"tensor", "model"}
        assert found["shared"]["data"] == {"data", "pipeline"}
    for found in run_processes(2, shared_groups, 1, 2):
        assert found["world"] == {"model", "tied"}
        assert found["shared"]["pipeline"] == {"pipeline"}
