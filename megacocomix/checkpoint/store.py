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
from megacocomix.parallel.runtime import Runtime
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


def save_checkpoint(run: Path, engine: Engine, state: TrainingState, about: dict, keep: int, runtime: Runtime) -> Path:
    """Write checkpoints/step-N of a run, then remove all but the newest `keep`. `about` (config, code version) is
    stored as it is.

    Called by all ranks. Raises UserError on every rank when any of them could not write (disk full, permission): what
    was begun is removed and earlier checkpoints stay as they were.
    """
    final = run / "checkpoints" / f"step-{state.step:08d}"
    partial = final.with_name(f".{final.name}.partial")
    if runtime.is_main:
        shutil.rmtree(partial, ignore_errors=True)
    dist.barrier()
    # Gathering is a collective: it must be over before one rank may fail alone.
    weights, moments = _gather_own_share(engine, runtime)
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


def load_checkpoint(folder: Path, engine: Engine) -> TrainingState:
    """Set fp32 masters, Adam moments and Adam's step from a checkpoint of any number of ranks. Called by all ranks.

    The low-precision weights are not touched: load them into the model before the engine is built
    (model.load.load_weights).
    """
    manifest = read_checkpoint_manifest(folder)
    where = {}
    with contextlib.ExitStack() as stack:
        for name in manifest["files"]:
            file = stack.enter_context(safe_open(folder / name, "pt"))
            where.update(dict.fromkeys(file.keys(), file))
        for state in STATES:
            for piece in engine.local_slices(state):
                if not len(piece.values):
                    continue
                key = _key(state, piece.name)
                if key not in where:
                    raise UserError(f"{folder} lacks {key}. Delete it to go on from the checkpoint before it.")
                values = where[key].get_tensor(key).view(-1)
                piece.values.copy_(values[piece.start : piece.start + len(piece.values)])
    training = TrainingState(**manifest["state"])
    engine.set_step(training.step)
    return training


def _key(state: str, name: str) -> str:
    return name if state == "weight" else f"{state}/{name}"


def _gather_own_share(engine: Engine, runtime: Runtime) -> tuple[dict, dict]:
    """Whole parameters and whole moments on the CPU: of all of them those that this rank writes, dealt out by size."""
    weights, moments = {}, {}
    load = [0] * runtime.world
    for state in STATES:
        for piece in engine.local_slices(state):
            owner = load.index(min(load))
            load[owner] += piece.shape.numel()
            whole = _gather(piece)
            if owner == runtime.rank:
                (weights if state == "weight" else moments)[_key(state, piece.name)] = whole.cpu().clone()
    return weights, moments


def _gather(piece: Slice) -> torch.Tensor:
    """One parameter whole, on every rank."""
    if piece.is_replicated:
        return piece.values.view(piece.shape)
    whole = torch.zeros(piece.shape.numel(), device=piece.values.device)
    whole[piece.start : piece.start + len(piece.values)] = piece.values
    dist.all_reduce(whole)
    return whole.view(piece.shape)


def _write(path: Path, tensors: dict) -> dict:
    """Write, flush to disk, and hash what is then on disk."""
    save_file(tensors, path)
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    return {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
