"""Saves checkpoints while training goes on: the state is copied, a thread writes the copy, and a later step completes
the checkpoint.

A checkpoint is written as `.step-N.partial`, hashed as it is on disk, and renamed when every rank has written its
files and rank 0 sees all of them. So a folder named `step-N` is complete, no matter when the processes were killed.
"""

import contextlib
import os
import shutil
import socket
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import torch.distributed as dist

from megacocomix.checkpoint.format import (
    CHECKPOINT_FILE,
    CHECKPOINT_FORMAT,
    CHECKPOINT_VERSION,
    list_checkpoints,
    read_checkpoint_manifest,
)
from megacocomix.checkpoint.store import TrainingState, gather_own_part
from megacocomix.checkpoint.tensors import write_safetensors
from megacocomix.config.schema import CheckpointConfig
from megacocomix.errors import UserError
from megacocomix.files import missing_files, write_json
from megacocomix.parallel.runtime import name_ranks
from megacocomix.parallel.zero import Engine


class CheckpointWriter:
    """Writes the checkpoints of one run, one at a time. All ranks call `begin` and `complete`."""

    def __init__(self, run: Path, engine: Engine, metadata: dict, options: CheckpointConfig):
        """`metadata` (config, code version, inputs) is stored in each manifest unchanged."""
        self.run, self.engine, self.metadata, self.options = run, engine, metadata, options
        self.runtime = engine.grid.runtime
        self._state = TrainingState()
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future | None = None

    @property
    def is_pending(self) -> bool:
        """Whether a checkpoint was begun and is not yet completed."""
        return self._writing is not None

    @property
    def is_writing(self) -> bool:
        """Whether this rank is still writing its files."""
        return self._writing is not None and not self._writing.done()

    def begin(self, state: TrainingState) -> None:
        """Copy the state of checkpoints/step-N, and start to write it in the background. The checkpoint before it must
        be completed."""
        assert not self.is_pending
        self._state = replace(state)
        if self.runtime.is_main:
            for left in self.folder.parent.glob(".step-*"):  # left by a job that was killed
                shutil.rmtree(left, ignore_errors=True)
        dist.barrier()
        self._writing = self._thread.submit(self._write, *gather_own_part(self.engine))

    def complete(self) -> list[str]:
        """Wait for all ranks, give the checkpoint its final name, and remove checkpoints that are no longer kept.
        Returns the failures. If there are any, the checkpoint is removed and earlier ones are unchanged."""
        writing, self._writing = self._writing, None
        reports = [None] * self.runtime.world
        dist.all_gather_object(reports, (socket.gethostname(), *writing.result()))
        failures = [failure for _, _, failure in reports if failure]
        if self.runtime.is_main:
            failures = failures or self._unseen(reports)
            if not failures:
                failures = self._publish({name: entry for _, files, _ in reports for name, entry in files.items()})
        outcome = [failures]
        dist.broadcast_object_list(outcome, src=0)
        if outcome[0]:  # on each rank, because they may not share a file system
            shutil.rmtree(self._partial, ignore_errors=True)
        return outcome[0]

    @property
    def folder(self) -> Path:
        """The final name of the checkpoint that was begun last."""
        return self.run / "checkpoints" / f"step-{self._state.step:08d}"

    @property
    def _partial(self) -> Path:
        return self.folder.with_name(f".{self.folder.name}.partial")

    def _write(self, weights: dict, moments: dict) -> tuple[dict[str, dict], str | None]:
        """This rank's files with their sizes and hashes, and the failure if they could not be written."""
        files = {}
        try:
            self._partial.mkdir(parents=True, exist_ok=True)
            for kind, tensors in (("weights", weights), ("optimizer", moments)):
                if tensors:
                    name = f"{kind}-{self.runtime.rank:05d}.safetensors"
                    shapes = {key: tensor.shape for key, tensor in tensors.items()}
                    files[name] = write_safetensors(self._partial / name, shapes, tensors.__getitem__)
        except OSError as error:
            rank = self.runtime.rank
            return files, f"checkpoint {self.folder} was not saved: rank {rank} could not write: {error}."
        return files, None

    def _unseen(self, reports: list[tuple[str, dict, None]]) -> list[str]:
        """The failure if rank 0 does not see a file that another rank has written: they are not on one file system."""
        written = {name: entry["bytes"] for _, files, _ in reports for name, entry in files.items()}
        if not (missing := set(missing_files(self._partial, written))):
            return []
        hosts = {rank: host for rank, (host, files, _) in enumerate(reports) if missing & files.keys()}
        if set(hosts.values()) == {reports[0][0]}:
            return [f"checkpoint {self.folder} was not saved: {min(missing)} has vanished or lost a part."]
        return [
            f"checkpoint {self.folder} was not saved: rank 0 on {reports[0][0]} does not see the files of "
            f"{name_ranks(hosts)}: run must be on a file system that all nodes share."
        ]

    def _publish(self, files: dict) -> list[str]:
        manifest = {"format": CHECKPOINT_FORMAT, "version": CHECKPOINT_VERSION, "state": asdict(self._state)}
        try:
            write_json(self._partial / CHECKPOINT_FILE, manifest | self.metadata | {"files": files})
            if self.folder.exists():  # a damaged one, which was skipped
                _remove(self.folder)
            os.rename(self._partial, self.folder)
        except OSError as error:
            return [f"checkpoint {self.folder} was not saved: {error}."]
        try:
            read_checkpoint_manifest(self.folder)  # before earlier checkpoints are removed
        except UserError as error:
            shutil.rmtree(self.folder, ignore_errors=True)
            return [f"checkpoint {self.folder} was not saved: {error}"]
        for old in list_checkpoints(self.run)[: -self.options.keep]:
            step = int(old.name.removeprefix("step-"))
            if self.options.keep_every is None or step % self.options.keep_every:
                with contextlib.suppress(OSError):  # then it is kept, and training goes on
                    _remove(old)
        return []


def _remove(checkpoint: Path) -> None:
    """Rename it first: a half-removed checkpoint must not have a checkpoint's name."""
    aside = checkpoint.with_name(f".{checkpoint.name}.removed")
    os.rename(checkpoint, aside)
    shutil.rmtree(aside, ignore_errors=True)
