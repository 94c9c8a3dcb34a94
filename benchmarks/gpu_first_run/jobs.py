"""Processes with a time-out, and the logs of all their ranks."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.gpu_first_run.report import Report
from megacocomix.launchers import child_environment

ROOT = Path(__file__).resolve().parents[2]
MODULE = ("-m", "benchmarks.gpu_first_run")
PROCESS_LIMIT = 900  # seconds without a new row


def file_name(name: str) -> str:
    """A name without characters that a path should not have."""
    return re.sub(r"[^\w.]+", "-", name)


class Machine(NamedTuple):
    """Where this runs."""

    out: Path
    has_gpu: bool
    world: int
    """Processes of a training job: the largest power of two up to 8 for which there are GPUs; 2 on a CPU."""

    def run_folder(self, name: str) -> Path:
        """The run folder of a training run."""
        return self.out / "runs" / file_name(name)

    @property
    def device(self) -> torch.device:
        """The device of a part of one process."""
        return torch.device("cuda" if self.has_gpu else "cpu")


def run(command: list, logs: Path, has_gpu: bool, limit: float, progress: Path | None = None) -> str | None:
    """Run a command with its output in `logs`. It is killed after `limit` seconds, counted from the last change of the
    file `progress`. Returns None, or in one line why it failed."""
    logs.mkdir(parents=True, exist_ok=True)
    environment = child_environment() | {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    if not has_gpu:
        environment |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    with open(logs / "stdout.log", "a") as stdout, open(logs / "stderr.log", "a") as stderr:
        process = subprocess.Popen(
            list(map(str, command)), cwd=ROOT, env=environment, stdout=stdout, stderr=stderr, start_new_session=True
        )
        begun = time.time()
        try:
            while process.poll() is None:
                changed = progress.stat().st_mtime if progress and progress.exists() else begun
                if time.time() - max(begun, changed) > limit:
                    return f"no progress for {limit:.0f} s, so it was ended; {logs}"
                time.sleep(0.1)
        finally:
            end(process)
    return None if process.returncode == 0 else f"{reason(logs)}; exit code {process.returncode}, {logs}"


def end(process: subprocess.Popen) -> None:
    """End a process with all that it started. torchrun needs time to end its ranks, which are not in its group."""
    for number, patience in ((signal.SIGTERM, 45), (signal.SIGKILL, 10)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)


def reason(logs: Path) -> str:
    """The first error in the logs of a job's ranks, but rather one that does not say that another rank failed."""
    texts = [file.read_text(errors="replace") for file in sorted(logs.rglob("stderr.log"))]
    found = [line for text in texts for line in re.findall(r"^(?:error: .*|[\w.]*Error: .*)", text, re.M)]
    follows = re.compile("ChildFailed|DistBackendError|Connection|Gloo|NCCL")
    return next(iter(sorted(found, key=lambda line: bool(follows.search(line)))), "it printed no error")[:300]


def python(*words) -> list:
    """A command of this interpreter."""
    return [sys.executable, *words]


def torchrun(world: int, logs: Path, *words) -> list:
    """A command on `world` processes; each rank has its own logs."""
    options = ("--standalone", "--nproc-per-node", world, "--redirects", 3, "--log-dir", logs / "ranks")
    return python("-m", "torch.distributed.run", *options, *words)


def own_process(name: str, part: str, machine: Machine, report: Report) -> bool:
    """Run one of __main__'s PROCESSES and show the rows that it adds. Returns whether it ended well; if not, it adds a
    row to `part` that says why."""
    words = ["--process", name, "--out", machine.out, *["--cpu"] * (not machine.has_gpu)]
    logs = machine.out / "logs" / name
    failure = run(python(*MODULE, *words), logs, machine.has_gpu, PROCESS_LIMIT, report.file)
    print((logs / "stdout.log").read_text(), end="", flush=True)
    if failure:
        report.add(part, name, False, failure)
    return failure is None
