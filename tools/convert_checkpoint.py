#!/usr/bin/env python
"""Convert a next-token checkpoint of ours to a Hugging Face GPT-2 folder.

python tools/convert_checkpoint.py runs/teacher --out teacher-hf --to hf
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megacocomix.checkpoint.hf import export_gpt2
from megacocomix.errors import UserError, run_cli
from megacocomix.model.load import load_model


def main() -> None:
    """Parse the command line, convert, print the proof."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="SOURCE", help="a run folder or a checkpoint folder of ours")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to make; never overwritten")
    parser.add_argument("--to", required=True, choices=["hf"], help="hf: transformers' GPT2LMHeadModel")
    options = parser.parse_args()
    source = load_model(options.source)
    if source.config is None:
        raise UserError(f"{options.source} is a Hugging Face folder already.")
    difference = export_gpt2(source, options.out, source.config.data.tokenizer)
    print(f"{source.path} → {options.out}: max |Δlogit| {difference:.1e} over {2 * source.shape.context} tokens")


if __name__ == "__main__":
    run_cli(main)
