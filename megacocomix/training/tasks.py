"""Benchmark tasks during training. A separate process scores a step's checkpoint while the ranks wait, so its memory
and its errors do not affect the trainer. Its time does not count as training time."""

import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from megacocomix.config.schema import EvaluationConfig
from megacocomix.evaluation.harness import evaluate_command
from megacocomix.launchers import child_environment

POLL_SECONDS = 0.5


def score_tasks(
    checkpoint: Path, options: EvaluationConfig, log: Path, is_main: bool, stops: Callable[[], bool]
) -> tuple[bool, str | None]:
    """Score the tasks of `options` on a checkpoint. Rank 0 starts the process; its output goes to `log`. Collective.

    `stops()` must return the same on all ranks; when it returns true, the process is ended. Returns, the same on all
    ranks, whether that happened, and a warning if not all tasks were scored.
    """
    child = failure = None
    if is_main:
        try:
            child = _start(checkpoint, options, log)
        except OSError as error:
            failure = f"tasks were not scored on {checkpoint}: {error}."
    is_stopped = False
    while not is_stopped:
        running = torch.tensor(bool(child and child.poll() is None))
        dist.all_reduce(running, op=dist.ReduceOp.MAX)
        if not running:
            break
        time.sleep(POLL_SECONDS)
        is_stopped = stops()
    if child:
        if is_stopped and child.poll() is None:
            child.send_signal(signal.SIGTERM)
        if child.wait() and not is_stopped:
            failure = (
                f"not all tasks were scored on {checkpoint}, see {log}. tools/evaluate.py tasks scores them later."
            )
    failures = [failure]
    dist.broadcast_object_list(failures, src=0)
    return is_stopped, failures[0]


def _start(checkpoint: Path, options: EvaluationConfig, log: Path) -> subprocess.Popen:
    tasks = ",".join(options.tasks)
    command = evaluate_command(checkpoint, tasks, options.tasks_data, limit=options.tasks_limit)
    with open(log, "a") as output:
        return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=child_environment())
