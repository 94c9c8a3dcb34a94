#!/usr/bin/env python
"""Convert a checkpoint of ours to a Hugging Face folder.

python tools/convert_checkpoint.py runs/demo --out demo-hf --to hf
python tools/convert_checkpoint.py runs/teacher --out teacher-hf --to hf --dtype bfloat16
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megacocomix.checkpoint.hf import export_hf
from megacocomix.errors import UserError, run_cli
from megacocomix.model.load import load_model


def main() -> None:
    """Parse the command line, convert, print the proof."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="SOURCE", help="a run folder or a checkpoint folder of ours")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to make; never overwritten")
    parser.add_argument(
        "--to", required=True, choices=["hf"], help="hf: GPT2LMHeadModel, or CocomixForCausalLM with its code"
    )
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the weights written")
    options = parser.parse_args()
    source = load_model(options.source)
    if source.config is None:
        raise UserError(f"{options.source} is a Hugging Face folder already.")
    proof = export_hf(source, options.out, source.config.data.tokenizer, options.dtype)
    rounding = f"; rounded to bfloat16, the loss moved by {proof.rounding:+.1e}" if options.dtype == "bfloat16" else ""
    print(
        f"{source.path} → {options.out}: max |Δlogit| {proof.logit:.1e}, Δloss {proof.loss:.1e} over "
        f"{proof.num_tokens} tokens in fp64{rounding}"
    )


if __name__ == "__main__":
    run_cli(main)
