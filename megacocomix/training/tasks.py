"""Benchmark tasks during training: a step's checkpoint is scored by a process of its own while the ranks wait, so that
neither its memory nor its mistakes are the trainer's, and its time is not counted as training."""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from megacocomix.config.schema import EvaluationConfig
from megacocomix.evaluation.harness import evaluate_command

POLL_SECONDS = 0.5
# What makes a process one of a job of several.
JOB_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")


def score_tasks(
    checkpoint: Path, options: EvaluationConfig, log: Path, is_main: bool, stops: Callable[[], bool]
) -> tuple[bool, str | None]:
    """Score the tasks of `options` on a checkpoint; rank 0 starts the process, whose output goes to `log`. Collective.

    Returns, on all ranks alike, whether `stops()`, which all ranks agree on, became true on the way, which ends the
    process; and what is to be said where not all tasks were scored.
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
                f"not all tasks were scored on {checkpoint}, see {log}. tools/evaluate.py --tasks scores them later."
            )
    said = [failure]
    dist.broadcast_object_list(said, src=0)
    return is_stopped, said[0]


def _start(checkpoint: Path, options: EvaluationConfig, log: Path) -> subprocess.Popen:
    tasks = ",".join(options.tasks)
    command = evaluate_command(checkpoint, tasks, options.tasks_data, limit=options.tasks_limit)
    environment = {key: value for key, value in os.environ.items() if key not in JOB_VARIABLES}
    with open(log, "a") as output:
        return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
