"""The content of a native checkpoint: fp32 weights and Adam moments by parameter name, for any parallel layout.

Each rank writes `weights-RANK.safetensors` and `optimizer-RANK.safetensors` (`exp_avg/NAME`, `exp_avg_sq/NAME`). Each
parameter is stored unsharded, in one file only. `checkpoint.json` records the training state, the resolved config, the
code version, and the size and SHA-256 of every file. No name or shape depends on the layout, so a run can resume in any
other layout. All files are safetensors or JSON: reading them executes no code.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from megacocomix.checkpoint.format import read_checkpoint_manifest
from megacocomix.checkpoint.tensors import SafetensorFiles
from megacocomix.errors import UserError
from megacocomix.parallel.tensor import shard_dim, shard_of, unshard
from megacocomix.parallel.zero import STATES, Engine, Slice


@dataclass
class TrainingState:
    """A run's progress. `step` is the number of steps taken. The next sample is at position step × global_batch of the
    data order."""

    step: int = 0
    tokens: int = 0
    flops: float = 0.0
    teacher_flops: float = 0.0
    seconds: float = 0.0


class StoredTensors(SafetensorFiles):
    """Reads a checkpoint's tensors one by one. Weights have the key NAME, moments `exp_avg/NAME` and
    `exp_avg_sq/NAME`."""

    def __init__(self, folder: Path):
        self.folder, self.state = folder, TrainingState(**read_checkpoint_manifest(folder)["state"])
        super().__init__(sorted(folder.glob("*.safetensors")))

    def check(self, shapes: dict[str, torch.Size]) -> None:
        """Raises UserError unless the weight and both moments of every parameter are stored in these shapes."""
        for name, shape in shapes.items():
            for key in (_key(state, name) for state in STATES):
                if self.shapes.get(key) != shape:
                    found = f"of shape {list(self.shapes[key])}" if key in self.shapes else "missing"
                    raise UserError(
                        f"{self.folder}: {key} is {found}, expected {list(shape)}. Delete the folder to go on from the "
                        "checkpoint before it."
                    )

    def __enter__(self) -> "StoredTensors":
        return self

    def __exit__(self, *error) -> None:
        self._where.clear()  # closes the files


def load_checkpoint(stored: StoredTensors, engine: Engine) -> TrainingState:
    """Set the fp32 master weights, the Adam moments and Adam's step from a checkpoint of any layout. Called by all
    ranks.

    The low-precision weights are not changed: the engine must have been built from the stored weights.
    """
    for state in STATES:
        for each in engine.local_slices(state):
            if len(each.values):
                each.values.copy_(_read_slice(stored, _key(state, each.name), each, engine))
    engine.set_step(stored.state.step)
    return stored.state


def _read_slice(stored: StoredTensors, key: str, own: Slice, engine: Engine) -> torch.Tensor:
    """The stored values of a slice. Of the stored tensor only the rows that cover it are read, and of these only the
    tensor rank's columns. What the shard holds beyond the stored tensor is 0."""
    row_size = own.shard_shape[1:].numel()
    first, last = own.start // row_size, -(-(own.start + len(own.values)) // row_size)
    bounds = [(first, last), *((0, size) for size in own.shard_shape[1:])]
    if (dim := shard_dim(own.name)) is not None:
        grid, whole = engine.grid, engine.stages.whole_shapes[own.name]
        extent = shard_of(own.name, whole, grid.tensor, grid.tensor_rank)
        bounds[dim] = tuple(min(extent.start + bound, extent.stop) for bound in bounds[dim])
    rows = torch.zeros(last - first, *own.shard_shape[1:])
    part = stored.unread(key)[tuple(slice(*bound) for bound in bounds)]
    rows[tuple(map(slice, part.shape))] = part
    skipped = own.start - first * row_size
    return rows.view(-1)[skipped : skipped + len(own.values)]


def _key(state: str, name: str) -> str:
    return name if state == "weight" else f"{state}/{name}"


def gather_own_part(engine: Engine) -> tuple[dict, dict]:
    """The weights and moments of this stage that this rank writes, unsharded, on the CPU. Tensors are distributed over
    the stage's ranks by size."""
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
                (weights if state == "weight" else moments)[_key(state, each.name)] = whole.to("cpu", copy=True)
    return weights, moments


def gather(own: Slice, engine: Engine) -> torch.Tensor:
    """One parameter unsharded, on the device of every rank of its stage: gathered first over the data ranks, then over
    the tensor ranks. Offloaded values are copied to the device first, because only there the ranks exchange tensors."""
    grid, values = engine.grid, own.values
    if not own.is_replicated:
        values = torch.zeros(own.shard_shape.numel(), device=grid.device)
        values[own.start : own.start + len(own.values)] = own.values
        dist.all_reduce(values, group=grid.data_group)
    shards = [values.view(own.shard_shape)]
    if grid.tensor > 1 and shard_dim(own.name) is not None:
        shards = [torch.empty_like(shards[0]) for _ in range(grid.tensor)]
        dist.all_gather(shards, values.view(own.shard_shape), group=grid.tensor_group)
    return unshard(own.name, shards, engine.stages.whole_shapes[own.name])
