"""Train the sparse autoencoder that names a teacher's concepts, on the teacher's residual over token shards."""

import argparse
import sys
from pathlib import Path
from typing import get_args

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megacocomix.config import Location
from megacocomix.errors import run_cli
from megacocomix.teacher.sae_job import SAEJob, run_sae_job

EXAMPLE = """example:
  python tools/train_sae.py --teacher teachers/gpt2 --data data/openwebtext/train --valid data/openwebtext/valid \\
      --layer 5 --latents 32768 --k 32 --out saes/gpt2-layer5.safetensors

Windows are as long as the teacher's context. Beside FILE, FILE.jsonl logs the training."""


def main() -> None:
    """Parse the command line, train, print what was measured."""
    job = SAEJob(**vars(parse_arguments()))
    measured = run_sae_job(job)
    print(
        f"variance unexplained {measured['fvu_standardized']:.4f} standardised, {measured['fvu']:.4f} raw\n"
        f"L0 {measured['l0']:.1f}, dead {measured['dead_fraction']:.1%} (on none of these tokens), "
        f"{measured['dead_fraction_training']:.1%} (silent for {measured['dead_after_tokens']:,} of training)\n"
        f"teacher's loss {measured['loss']:.4f}; {measured['loss_reconstructed']:.4f} through the autoencoder, "
        f"{measured['loss_zeroed']:.4f} through zeros: {measured['loss_recovered']:.1%} recovered\n{job.out}"
    )


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--teacher", required=True, metavar="DIR", help="Hugging Face GPT-2 folder or a run of ours")
    parser.add_argument("--data", required=True, metavar="DIR", help="token shards to train on")
    parser.add_argument("--valid", metavar="DIR", help="token shards to measure on (default: 5 %% of --data)")
    parser.add_argument("--layer", required=True, type=int, metavar="L", help="block whose residual is read, from 0")
    parser.add_argument("--location", default="resid_post_mlp", choices=get_args(Location))
    parser.add_argument("--latents", required=True, type=int, metavar="C", help="number of latents (concepts)")
    parser.add_argument("--k", required=True, type=int, metavar="K", help="latents kept per token")
    parser.add_argument("--out", required=True, metavar="FILE", help="safetensors file to write")
    parser.add_argument("--steps", type=int, default=10_000, metavar="N", help="optimizer steps (default %(default)s)")
    parser.add_argument("--batch-rows", type=int, default=4096, metavar="N", help="tokens a step (default %(default)s)")
    parser.add_argument("--lr", type=float, metavar="X", help="largest learning rate (default: 2e-4 / sqrt(C / 16384))")
    parser.add_argument("--seed", type=int, default=0, metavar="S")
    return parser.parse_args()


if __name__ == "__main__":
    run_cli(main)
