#!/usr/bin/env python
"""Pretrain a model. The same command starts a run and resumes it.

    deepspeed launcher/pretrain.py --config configs/1.38b.yaml
    torchrun --nproc-per-node 8 launcher/pretrain.py --config configs/386m.yaml training.micro_batch=16
    python launcher/pretrain.py --config configs/tiny.yaml method.name=ntp run=runs/control
    mpirun -n 2 python launcher/pretrain.py --config configs/tiny.yaml
    srun -n 2 python launcher/pretrain.py --config configs/tiny.yaml

Exit codes: 0 finished, 2 an error in the config or its files, 75 saved and stopped on a signal, 1 any other error.
torchrun turns 2 and 75 into 1. Under deepspeed, send the signal to the processes of pretrain.py.
"""

import argparse
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from megacocomix.config.load import load_config
from megacocomix.errors import EXIT_USER, UserError, print_errors, run_cli
from megacocomix.launchers import set_ranks


def main() -> None:
    """Parse the command line, train, exit with the run's code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML recipe, such as configs/tiny.yaml")
    # deepspeed passes it. LOCAL_RANK in the environment has the same value.
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="change an option of the recipe")
    options = parser.parse_intermixed_args()
    place = set_ranks()  # before torch is imported
    config = load_config(options.config, options.overrides)

    from megacocomix.config.rules import check_config
    from megacocomix.parallel.runtime import start_runtime, stop_runtime
    from megacocomix.training.determinism import set_determinism

    # Before the processes connect, which takes time and may fail for other reasons.
    check_config(config, place.size)
    set_determinism(config.training.deterministic)
    runtime = start_runtime()
    from megacocomix.signals import NUMBERS
    from megacocomix.training.trainer import train

    try:
        code = train(config, runtime)
    except UserError as error:
        if runtime.is_main:
            print_errors(error)
        code = EXIT_USER
    for number in NUMBERS:
        signal.signal(number, signal.SIG_IGN)  # the exit code is decided: a repeated signal must not change it
    stop_runtime()
    # All files are written and closed. Skip the interpreter's shutdown: under load, its race with threads of the native
    # libraries has aborted a process whose run had finished.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    run_cli(main, is_parallel=True)
