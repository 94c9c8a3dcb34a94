#!/usr/bin/env python
"""Label the training windows of a config once, for any number of runs: with teacher.labels=DIR they read the labels
instead of running the teacher.

    python tools/label_concepts.py --config configs/tiny.yaml --out data/labels
    torchrun --nproc-per-node 8 tools/label_concepts.py --config configs/1.38b.yaml --out data/owt-labels

One cache serves all student sizes, layouts, seeds and method options that do not choose labels, as long as data, window
length, teacher and autoencoder are the same. Processes share only the folder: start any number of them, on any number
of hosts, at any time. Started again, they resume. Training can use a cache that is not complete.

Exit codes: 0 the cache is complete, or other processes are labelling the rest; 2 an error to fix; 75 stopped on a
signal."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from megacocomix.config.load import load_config
from megacocomix.errors import EXIT_FINISHED, EXIT_REQUEUE, EXIT_USER, UserError, print_errors, run_cli
from megacocomix.launchers import set_ranks


def main() -> int:
    """Parse the command line, label, and print the state of the cache."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML recipe, such as configs/tiny.yaml")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder of the cache, new or existing")
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="change an option of the recipe")
    options = parser.parse_intermixed_args()
    place = set_ranks()  # before torch is imported
    config = load_config(options.config, options.overrides)

    from megacocomix.config.rules import check_config
    from megacocomix.parallel.runtime import local_device
    from megacocomix.teacher.label_job import label_all
    from megacocomix.training.determinism import set_determinism

    check_config(config, config.parallel.tensor * config.parallel.pipeline)
    set_determinism(config.training.deterministic)
    report = label_all(config, options.out, local_device(place.local_rank or 0), place.rank, place.size)
    print(
        f"{options.out}: {report.num_labelled:,} windows labelled by this process; {report.num_held:,} of "
        f"{report.num_windows:,} have labels" + ("; stopped on a signal" if report.is_stopped else ""),
        flush=True,
    )
    if report.problems:
        print_errors(UserError(*report.problems))
        return EXIT_USER
    return EXIT_REQUEUE if report.is_stopped else EXIT_FINISHED


if __name__ == "__main__":
    run_cli(main, is_parallel=True)
