"""Run a function on several gloo ranks: `run_processes(2, function, arg)` → its return values by rank. The function
must be defined at the top of a test module. Output comes with the rank before each line; a rank that fails or hangs
ends the others, and its traceback is the error.

Run a command of tools/ or launcher/: `run_tool("tools/evaluate.py perplexity runs/tiny", folder)` → exit code and
output.

Both fork from a server that has imported everything: starting an interpreter for each would take most of the suite's
time.
"""

import functools
import io
import multiprocessing
import os
import queue
import runpy
import shlex
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from multiprocessing.reduction import DupFd
from pathlib import Path

from megacocomix.launchers import child_environment

PRELOADED = [
    "deepspeed",
    "megacocomix.training.trainer",
    "megacocomix.hf.open",
    "megacocomix.compare.report",
    "megacocomix.interpret.server",
    "datasets",
    # What DeepSpeed and torch import when the first optimizer is built: seconds of every process.
    "torch._dynamo",
    "torch._inductor.compile_fx",
    "deepspeed.runtime.zero.muon.muon_optimizer",
]


class _Tagged(io.TextIOBase):
    def __init__(self, stream, rank):
        self._stream, self._tag, self._line = stream, f"[rank {rank}] ", ""

    def write(self, text):
        *lines, self._line = (self._line + text).split("\n")
        for line in lines:
            self._stream.write(f"{self._tag}{line}\n")
        self._stream.flush()
        return len(text)

    def flush(self):
        self._stream.flush()


def run_processes(world, function, *arguments, timeout=600):
    """Call `function(*arguments)` in `world` fresh processes that know each other as a job of `world` ranks."""
    context = _context()
    results = context.Queue()
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    environment = child_environment() | address | {"WORLD_SIZE": str(world)}
    processes = [
        context.Process(target=_work, args=(rank, environment, _Streams(), function, arguments, results), daemon=True)
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    outcomes, deadline = {}, time.monotonic() + timeout
    try:
        while len(outcomes) < world:
            try:
                rank, value, error = results.get(timeout=1)
            except queue.Empty:
                dead = [
                    rank for rank, p in enumerate(processes) if rank not in outcomes and p.exitcode not in (None, 0)
                ]
                if dead:
                    raise AssertionError(f"rank {dead[0]} died with exit code {processes[dead[0]].exitcode}") from None
                if time.monotonic() > deadline:
                    missing = sorted(set(range(world)) - set(outcomes))
                    raise AssertionError(f"ranks {missing} gave no result within {timeout} s") from None
                continue
            if error:
                raise AssertionError(f"rank {rank} failed:\n{error}")
            outcomes[rank] = value
        for process in processes:
            process.join(20)
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
            process.join()
    return [outcomes[rank] for rank in range(world)]


def run_tool(command, folder, timeout=400):
    """Run `command` (a string, or a list of its words) in `folder`, where its script is found, as its own process that
    was forked and not started. Returns a subprocess.CompletedProcess with its output as text."""
    words = shlex.split(command) if isinstance(command, str) else [str(word) for word in command]
    with tempfile.TemporaryDirectory() as outputs:
        files = [Path(outputs) / name for name in ("out", "err")]
        process = _context().Process(
            target=_be_tool, args=(words, str(folder), files)
        )  # no daemon: it may have children
        process.start()
        try:
            process.join(timeout)
        finally:
            is_late = process.is_alive()
            process.kill()
            process.join()
        if is_late:
            raise AssertionError(f"{command} did not end within {timeout} s")
        return subprocess.CompletedProcess(words, process.exitcode, *(file.read_text() for file in files))


def _be_tool(words, folder, files):
    os.chdir(folder)
    for number, file in enumerate(files, start=1):
        os.dup2(os.open(file, os.O_CREAT | os.O_WRONLY | os.O_APPEND), number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")


@functools.cache
def _context():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


class _Streams:
    """This process's standard output and error as they are now; those of the server are of the moment it began."""

    def __reduce__(self):
        return _adopt_streams, (DupFd(1), DupFd(2))


def _adopt_streams(*streams):
    for number, stream in enumerate(streams, start=1):
        os.dup2(stream.detach(), number)


def _work(rank, environment, _streams, function, arguments, results):
    os.environ.clear()
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
    sys.stdout, sys.stderr = _Tagged(sys.stdout, rank), _Tagged(sys.stderr, rank)
    try:
        results.put((rank, function(*arguments), None))
    except BaseException:
        results.put((rank, None, traceback.format_exc()))


def _free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
