"""The first hour on a GPU machine: environment, parity with a CPU, the teacher's overlap, the cost of each suspicion.

    bash benchmarks/gpu_first_run.sh [--cpu] [--out DIR]

It needs the repository and its environment only. DIR gets report.md, report.json, traces, and the logs of all ranks.
docs/benchmarks.md says what each row means, what to expect, and what to do if it differs. Exit code 1: a row failed.

Each part runs in processes of its own with a time-out. Training runs share a job, which is started again without a run
that crashed or hung. Runs to be timed end before their first checkpoint."""

import argparse
import datetime
import shutil
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from benchmarks.gpu_first_run.cases import train_cases
from benchmarks.gpu_first_run.environment import look_around
from benchmarks.gpu_first_run.jobs import Machine, own_process
from benchmarks.gpu_first_run.kernels import time_kernels
from benchmarks.gpu_first_run.parity import compare_labels, parity
from benchmarks.gpu_first_run.recipes import make_inputs
from benchmarks.gpu_first_run.report import Report
from benchmarks.gpu_first_run.steps import measure_steps
from megacocomix.errors import run_cli
from megacocomix.files import check_absent

Part = Callable[[Machine, Report], None]
ORDER: dict[str, Part] = {
    "environment": partial(own_process, "environment", "environment"),
    "parity": parity,
    "steps": measure_steps,
    "kernels": partial(own_process, "kernels", "suspicions"),
}
PROCESSES: dict[str, Part] = {
    "environment": look_around,
    "labels": compare_labels,
    "inputs": make_inputs,
    "kernels": time_kernels,
}


def main() -> int:
    """Run all parts, write the report. Returns 1 if a row failed."""
    parser = argparse.ArgumentParser(
        prog="gpu_first_run.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cpu", action="store_true", help="the CPU form, even where there are GPUs")
    parser.add_argument("--out", type=Path, metavar="DIR", help="new folder (default runs/gpu-first-run-DATE)")
    parser.add_argument("--process", choices=PROCESSES, help=argparse.SUPPRESS)
    parser.add_argument("--cases", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()  # --process and --cases are for the processes started below
    if options.cases:
        return train_cases(options.cases)
    gpus = 0 if options.cpu else torch.cuda.device_count()
    out = (options.out or Path(f"runs/gpu-first-run-{datetime.datetime.now():%Y%m%d-%H%M%S}")).resolve()
    machine = Machine(out, gpus > 0, 1 << min(gpus, 8).bit_length() - 1 if gpus else 2)
    report = Report(out)
    if options.process:
        PROCESSES[options.process](machine, report)
        return 0
    check_absent(out)
    out.mkdir(parents=True)
    ends = []
    try:
        for name, do in ORDER.items():
            print(f"\n== {name}", flush=True)
            begun = time.monotonic()
            try:
                do(machine, report)
                ends.append((name, "figure", f"{time.monotonic() - begun:.0f} s"))
            except Exception as error:  # the other parts may still tell something
                traceback.print_exc()
                ends.append((name, False, f"{type(error).__name__}: {error}"))
    finally:
        for end in ends:
            report.add("time", *end)
        where = f"{gpus} × {torch.cuda.get_device_name()}" if gpus else "CPU form: 2 gloo processes, tiny sizes"
        is_right = report.write(f"{where}, torch {torch.__version__}, {datetime.date.today()}")
        shutil.rmtree(out / "inputs", ignore_errors=True)
    return 0 if is_right else 1


if __name__ == "__main__":
    run_cli(main, is_parallel=True)
