"""Train the sparse autoencoder that defines a teacher's concepts, on the teacher's residual over token shards."""

import argparse
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import get_args

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megacocomix.config.schema import Location
from megacocomix.data.binary import RAW_DTYPES
from megacocomix.errors import EXIT_FINISHED, EXIT_REQUEUE, EXIT_USER, UserError, print_errors, run_cli
from megacocomix.launchers import set_ranks

EXAMPLE = """example:
  python tools/train_sae.py --teacher teachers/gpt2 --data data/openwebtext/train --valid data/openwebtext/valid \\
      --layer 5 --latents 32768 --k 32 --out saes/gpt2-layer5.safetensors

  torchrun --nproc-per-node 8 tools/train_sae.py …      each process takes its part of every batch

Windows are as long as the teacher's context. FILE.jsonl logs the training, and FILE.png plots it. After a stop, the
same command resumes from FILE.resume. Exit code 75 means that a signal stopped it."""


def main() -> int:
    """Parse the command line, train, plot, and print the measurements."""
    arguments = parse_arguments()
    place = set_ranks()  # before torch is imported

    from megacocomix.parallel.runtime import errors_on_all_ranks, local_device, start_runtime, stop_runtime
    from megacocomix.sae.job import SAEJob, SAERun, plot_sae_training

    job = SAEJob(**vars(arguments))
    # A single process needs no process group.
    runtime = start_runtime() if place.size > 1 else None
    here = (runtime.device, runtime.rank, runtime.world) if runtime else (local_device(0),)
    with errors_on_all_ranks() if runtime else nullcontext():
        run = SAERun(job, *here)
    try:
        is_finished = run.train()
    except UserError as error:
        if error.problems:  # empty on ranks that only stop because another rank failed
            print_errors(error)
        return EXIT_USER
    if runtime:
        stop_runtime()  # the other ranks need not wait while rank 0 measures
        if not runtime.is_main:
            return EXIT_FINISHED if is_finished else EXIT_REQUEUE
    if not is_finished:
        print(f"stopped on a signal: saved in {job.resume}, start the same command again to resume", flush=True)
        return EXIT_REQUEUE
    measured = run.finish()
    plot_sae_training(job.log, Path(f"{job.out}.png"))
    print(
        f"variance unexplained {measured['fvu_standardized']:.4f} standardised, {measured['fvu']:.4f} raw\n"
        f"L0 {measured['l0']:.1f}, dead latents {measured['dead_fraction']:.1%} (active on none of these tokens), "
        f"{measured['dead_fraction_training']:.1%} (not active for {measured['dead_after_tokens']:,} training tokens)\n"
        f"teacher's loss {measured['loss']:.4f}; {measured['loss_reconstructed']:.4f} with the reconstruction, "
        f"{measured['loss_zeroed']:.4f} with zeros: {measured['loss_recovered']:.1%} recovered\n"
        f"{job.out}\n{job.out}.png"
    )
    return EXIT_FINISHED


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--teacher", required=True, metavar="DIR", help="Hugging Face causal LM (safetensors) or a native run"
    )
    parser.add_argument("--data", required=True, metavar="DIR", help="token shards to train on")
    parser.add_argument("--valid", metavar="DIR", help="token shards to measure on (default: 5 %% of --data)")
    parser.add_argument("--data-dtype", choices=RAW_DTYPES, help="type of the ids in files without a header")
    parser.add_argument("--layer", required=True, type=int, metavar="L", help="block whose residual is read, from 0")
    parser.add_argument("--location", default="resid_post_mlp", choices=get_args(Location))
    parser.add_argument("--latents", required=True, type=int, metavar="C", help="number of latents (concepts)")
    parser.add_argument("--k", required=True, type=int, metavar="K", help="latents kept per token")
    parser.add_argument("--out", required=True, metavar="FILE", help="safetensors file to write")
    parser.add_argument("--steps", type=int, default=10_000, metavar="N", help="optimizer steps (default %(default)s)")
    parser.add_argument("--batch-rows", type=int, default=4096, metavar="N", help="tokens a step (default %(default)s)")
    parser.add_argument("--lr", type=float, metavar="X", help="largest learning rate (default: 2e-4 / sqrt(C / 16384))")
    parser.add_argument(
        "--resample-every",
        type=int,
        metavar="N",
        help="steps between resets of dead latents (default: a fifth of --steps; 0: never)",
    )
    parser.add_argument(
        "--save-every", type=int, default=500, metavar="N", help="steps between saves (default %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="S")
    return parser.parse_args()


if __name__ == "__main__":
    run_cli(main, is_parallel=True)
