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

from megacocomix.errors import UserError
from megacocomix.model.load import read_checkpoint_manifest
from megacocomix.parallel.tensor import cut, join, split_dim
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
        for piece in engine.local_slices(state):
            if len(piece.values):
                whole = stored.read(_key(state, piece.name))
                values = cut(piece.name, whole, grid.tensor, grid.tensor_rank).view(-1)
                piece.values.copy_(values[piece.start : piece.start + len(piece.values)])
    engine.set_step(stored.state.step)
    return stored.state


def _key(state: str, name: str) -> str:
    return name if state == "weight" else f"{state}/{name}"


def gather_own_share(engine: Engine) -> tuple[dict, dict]:
    """Whole parameters and whole moments on the CPU: of all those of this stage the ones that this rank writes, dealt
    out by size."""
    grid, weights, moments = engine.grid, {}, {}
    load = [0] * (grid.data * grid.tensor)
    me = grid.data_rank * grid.tensor + grid.tensor_rank
    for state in STATES:
        for piece in engine.local_slices(state):
            if piece.is_copy:
                continue
            owner = load.index(min(load))
            load[owner] += piece.piece.numel()
            whole = gather(piece, engine)
            if owner == me:
                (weights if state == "weight" else moments)[_key(state, piece.name)] = whole.cpu().clone()
    return weights, moments


def gather(piece: Slice, engine: Engine) -> torch.Tensor:
    """One parameter whole, on every rank of its stage: first over the data ranks, then over the tensor ranks."""
    grid, values = engine.grid, piece.values
    if not piece.is_replicated:
        values = torch.zeros(piece.piece.numel(), device=piece.values.device)
        values[piece.start : piece.start + len(piece.values)] = piece.values
        dist.all_reduce(values, group=grid.data_group)
    pieces = [values.view(piece.piece)]
    if grid.tensor > 1 and split_dim(piece.name) is not None:
        pieces = [torch.empty_like(pieces[0]) for _ in range(grid.tensor)]
        dist.all_gather(pieces, values.view(piece.piece), group=grid.tensor_group)
    return join(piece.name, pieces, engine.stages.whole_shapes[piece.name])
