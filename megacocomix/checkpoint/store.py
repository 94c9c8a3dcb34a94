"""Checkpoints: fp32 weights and Adam moments by parameter name, written by all ranks, complete or absent.

A checkpoint folder holds, from each rank, `weights-RANK.safetensors` and `optimizer-RANK.safetensors` (`exp_avg/NAME`,
`exp_avg_sq/NAME`), each parameter whole and in one of them, and `checkpoint.json`: training state, resolved config,
code version, size and SHA-256 of every file. No name or shape depends on how the run was laid out.

It is written as `.step-N.partial` and renamed when every file is on disk, so a folder named `step-N` is complete.
"""

import contextlib
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from megacocomix.errors import UserError
from megacocomix.files import file_sha256, write_json
from megacocomix.model.load import (
    CHECKPOINT_FILE,
    CHECKPOINT_FORMAT,
    CHECKPOINT_VERSION,
    list_checkpoints,
    read_checkpoint_manifest,
)
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


def save_checkpoint(run: Path, engine: Engine, state: TrainingState, about: dict, keep: int) -> Path:
    """Write checkpoints/step-N of a run, then remove all but the newest `keep`. `about` (config, code version) is
    stored as it is.

    Called by all ranks. Raises UserError on every rank when any of them could not write (disk full, permission): what
    was begun is removed and earlier checkpoints stay as they were.
    """
    runtime = engine.grid.runtime
    final = run / "checkpoints" / f"step-{state.step:08d}"
    partial = final.with_name(f".{final.name}.partial")
    if runtime.is_main:
        shutil.rmtree(partial, ignore_errors=True)
    dist.barrier()
    # Gathering is a collective: it must be over before one rank may fail alone.
    weights, moments = _gather_own_share(engine)
    files, failure = {}, None
    try:
        partial.mkdir(parents=True, exist_ok=True)
        for kind, tensors in (("weights", weights), ("optimizer", moments)):
            name = f"{kind}-{runtime.rank:05d}.safetensors"
            if tensors:
                files[name] = _write(partial / name, tensors)
    except (OSError, SafetensorError) as error:
        failure = f"checkpoint {final} was not saved: rank {runtime.rank} could not write: {error}."
    reports = [None] * runtime.world
    dist.all_gather_object(reports, (files, failure))
    failures = [failure for _, failure in reports if failure]
    if runtime.is_main and not failures:
        manifest = {"format": CHECKPOINT_FORMAT, "version": CHECKPOINT_VERSION, "state": asdict(state), **about}
        manifest["files"] = {name: entry for files, _ in reports for name, entry in files.items()}
        try:
            write_json(partial / CHECKPOINT_FILE, manifest)
            os.rename(partial, final)
        except OSError as error:
            failures = [f"checkpoint {final} was not saved: {error}."]
    outcome = [failures]
    dist.broadcast_object_list(outcome, src=0)
    if outcome[0]:
        if runtime.is_main:
            shutil.rmtree(partial, ignore_errors=True)
        raise UserError(
            *outcome[0], "Earlier checkpoints are untouched; free some space and start the same command again."
        )
    if runtime.is_main:
        for old in list_checkpoints(run)[:-keep]:
            shutil.rmtree(old, ignore_errors=True)
    return final


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


def _gather_own_share(engine: Engine) -> tuple[dict, dict]:
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
            whole = _gather(piece, engine)
            if owner == me:
                (weights if state == "weight" else moments)[_key(state, piece.name)] = whole.cpu().clone()
    return weights, moments


def _gather(piece: Slice, engine: Engine) -> torch.Tensor:
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


def _write(path: Path, tensors: dict) -> dict:
    """Write, flush to disk, and hash what is then on disk."""
    save_file(tensors, path)
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    return {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
