"""What a checkpoint holds: fp32 weights and Adam moments by parameter name; gathered from, and set in, any layout.

A checkpoint folder holds, from each rank, `weights-RANK.safetensors` and `optimizer-RANK.safetensors` (`exp_avg/NAME`,
`exp_avg_sq/NAME`), each parameter whole and in one of them, and `checkpoint.json`: training state, resolved config,
code version, size and SHA-256 of every file. No name or shape depends on how the run was laid out: a run goes on in any
other layout. Files are safetensors and JSON: reading one executes nothing.
"""

import contextlib
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open

from megacocomix.checkpoint.format import read_checkpoint_manifest
from megacocomix.errors import UserError
from megacocomix.parallel.tensor import shard, shard_dim, unshard
from megacocomix.parallel.zero import STATES, Engine, Slice


@dataclass
class TrainingState:
    """Where a run stands. `step` steps were taken; the next sample is at position step × global_batch of the data
    order."""

    step: int = 0
    tokens: int = 0
    flops: float = 0.0
    teacher_flops: float = 0.0
    seconds: float = 0.0


class StoredTensors:
    """Reads a checkpoint's tensors one by one: weights as NAME, moments as `exp_avg/NAME`, `exp_avg_sq/NAME`."""

    def __init__(self, folder: Path):
        self.folder, self._files = folder, contextlib.ExitStack()
        self.state = TrainingState(**read_checkpoint_manifest(folder)["state"])
        self._where = {}
        for path in sorted(folder.glob("*.safetensors")):
            file = self._files.enter_context(safe_open(path, "pt"))
            self._where.update(dict.fromkeys(file.keys(), file))

    def check(self, shapes: dict[str, torch.Size]) -> None:
        """Raises UserError unless weights and moments of every parameter are there in these shapes."""
        for name, shape in shapes.items():
            for key in (_key(state, name) for state in STATES):
                found = self._where[key].get_slice(key).get_shape() if key in self._where else None
                if found != list(shape):
                    raise UserError(
                        f"{self.folder}: {key} is {'missing' if found is None else f'of shape {found}'}, expected "
                        f"{list(shape)}. Delete the folder to go on from the checkpoint before it."
                    )

    def __enter__(self) -> "StoredTensors":
        return self

    def __exit__(self, *error) -> None:
        self._files.close()

    def read(self, key: str) -> torch.Tensor:
        """A whole tensor, fp32 on the CPU."""
        return self._where[key].get_tensor(key)


def load_checkpoint(stored: StoredTensors, engine: Engine) -> TrainingState:
    """Set fp32 masters, Adam moments and Adam's step from a checkpoint of any layout. Called by all ranks.

    The low-precision weights are not touched: the engine must have been built on the stored ones.
    """
    grid = engine.grid
    for state in STATES:
        for each in engine.local_slices(state):
            if len(each.values):
                whole = stored.read(_key(state, each.name))
                values = shard(each.name, whole, grid.tensor, grid.tensor_rank).view(-1)
                each.values.copy_(values[each.start : each.start + len(each.values)])
    engine.set_step(stored.state.step)
    return stored.state


def _key(state: str, name: str) -> str:
    return name if state == "weight" else f"{state}/{name}"


def gather_own_part(engine: Engine) -> tuple[dict, dict]:
    """Whole parameters and whole moments on the CPU: of all those of this stage the ones that this rank writes, dealt
    out by size."""
    grid, weights, moments = engine.grid, {}, {}
    load = [0] * (grid.data * grid.tensor)
    me = grid.data_rank * grid.tensor + grid.tensor_rank
    for state in STATES:
        for each in engine.local_slices(state):
            if each.is_copy:
                continue
            owner = load.index(min(load))
            load[owner] += each.shard_shape.numel()
            whole = gather(each, engine)
            if owner == me:
                (weights if state == "weight" else moments)[_key(state, each.name)] = whole.cpu().clone()
    return weights, moments


def gather(own: Slice, engine: Engine) -> torch.Tensor:
    """One parameter whole, on every rank of its stage: first over the data ranks, then over the tensor ranks."""
    grid, values = engine.grid, own.values
    if not own.is_replicated:
        values = torch.zeros(own.shard_shape.numel(), device=own.values.device)
        values[own.start : own.start + len(own.values)] = own.values
        dist.all_reduce(values, group=grid.data_group)
    shards = [values.view(own.shard_shape)]
    if grid.tensor > 1 and shard_dim(own.name) is not None:
        shards = [torch.empty_like(shards[0]) for _ in range(grid.tensor)]
        dist.all_gather(shards, values.view(own.shard_shape), group=grid.tensor_group)
    return unshard(own.name, shards, engine.stages.whole_shapes[own.name])
