"""Saving while training goes on: what is to be saved is copied, a thread writes it, and a later step completes it.

A checkpoint is written as `.step-N.partial`, hashed as it lies on disk, and renamed when every rank has written its
part: a folder named `step-N` is complete, whenever the processes were killed.
"""

import contextlib
import os
import shutil
import threading
from dataclasses import asdict, replace
from pathlib import Path

import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file

from megacocomix.checkpoint.format import CHECKPOINT_FILE, CHECKPOINT_FORMAT, CHECKPOINT_VERSION, list_checkpoints
from megacocomix.checkpoint.store import TrainingState, gather_own_part
from megacocomix.config.schema import CheckpointConfig
from megacocomix.files import file_sha256, write_json
from megacocomix.parallel.zero import Engine


class CheckpointWriter:
    """Writes checkpoints of one run, one at a time. `begin` and `complete` are called by all ranks."""

    def __init__(self, run: Path, engine: Engine, metadata: dict, options: CheckpointConfig):
        """`metadata` (config, code version, inputs) is stored in each manifest as it is."""
        self.run, self.engine, self.metadata, self.options = run, engine, metadata, options
        self.runtime = engine.grid.runtime
        self._thread: threading.Thread | None = None
        self._state = TrainingState()
        self._files: dict[str, dict] = {}
        self._failure: str | None = None
        self._bug: Exception | None = None

    @property
    def is_pending(self) -> bool:
        """Whether a checkpoint was begun and not yet completed."""
        return self._thread is not None

    @property
    def is_writing(self) -> bool:
        """Whether this rank is still at it."""
        return self._thread is not None and self._thread.is_alive()

    def begin(self, state: TrainingState) -> None:
        """Copy everything that belongs into checkpoints/step-N, and write it in the background. The one before must be
        completed."""
        assert not self.is_pending
        self._state, self._files, self._failure = replace(state), {}, None
        if self.runtime.is_main:
            for left in self.folder.parent.glob(".step-*"):  # of a job that was killed
                shutil.rmtree(left, ignore_errors=True)
        dist.barrier()
        weights, moments = gather_own_part(self.engine)
        self._thread = threading.Thread(target=self._write, args=(weights, moments), name="checkpoint")
        self._thread.start()

    def complete(self) -> list[str]:
        """Wait for all ranks, give the checkpoint its name, remove those that are no longer kept. Returns what went
        wrong: then the checkpoint does not exist, nothing of it is left, and earlier ones are as they were."""
        self._thread.join()
        self._thread = None
        if self._bug:
            raise self._bug
        reports = [None] * self.runtime.world
        dist.all_gather_object(reports, (self._files, self._failure))
        failures = [failure for _, failure in reports if failure]
        if self.runtime.is_main:
            if not failures:
                failures = self._publish({name: entry for files, _ in reports for name, entry in files.items()})
            if failures:
                shutil.rmtree(self._partial, ignore_errors=True)
        outcome = [failures]
        dist.broadcast_object_list(outcome, src=0)
        return outcome[0]

    @property
    def folder(self) -> Path:
        """The checkpoint that was begun last, under its final name."""
        return self.run / "checkpoints" / f"step-{self._state.step:08d}"

    @property
    def _partial(self) -> Path:
        return self.folder.with_name(f".{self.folder.name}.partial")

    def _write(self, weights: dict, moments: dict) -> None:
        try:
            self._partial.mkdir(parents=True, exist_ok=True)
            for kind, tensors in (("weights", weights), ("optimizer", moments)):
                if tensors:
                    path = self._partial / f"{kind}-{self.runtime.rank:05d}.safetensors"
                    save_file(tensors, path)
                    with open(path, "rb") as file:
                        os.fsync(file.fileno())
                    self._files[path.name] = {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
        except (OSError, SafetensorError) as error:
            self._failure = (
                f"checkpoint {self.folder} was not saved: rank {self.runtime.rank} could not write: {error}."
            )
        except Exception as error:  # a thread that dies in silence would leave a checkpoint without its files
            self._bug = error

    def _publish(self, files: dict) -> list[str]:
        manifest = {"format": CHECKPOINT_FORMAT, "version": CHECKPOINT_VERSION, "state": asdict(self._state)}
        try:
            write_json(self._partial / CHECKPOINT_FILE, manifest | self.metadata | {"files": files})
            if self.folder.exists():  # a damaged one, which was walked past
                _remove(self.folder)
            os.rename(self._partial, self.folder)
        except OSError as error:
            return [f"checkpoint {self.folder} was not saved: {error}."]
        for old in list_checkpoints(self.run)[: -self.options.keep]:
            step = int(old.name.removeprefix("step-"))
            if self.options.keep_every is None or step % self.options.keep_every:
                with contextlib.suppress(OSError):  # it stays, and training goes on
                    _remove(old)
        return []


def _remove(checkpoint: Path) -> None:
    """Take its name first: a checkpoint that is half removed must not look like one."""
    aside = checkpoint.with_name(f".{checkpoint.name}.removed")
    os.rename(checkpoint, aside)
    shutil.rmtree(aside, ignore_errors=True)
