#!/usr/bin/env python
"""Validation perplexity of a run's newest checkpoint, or of any model folder, on all held-out tokens, in fp32.

python tools/evaluate.py runs/tiny
python tools/evaluate.py assets/teacher --data data/wiki/valid
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megacocomix.errors import run_cli
from megacocomix.evaluation.perplexity import evaluate_folder


def main() -> None:
    """Parse the command line, evaluate, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "model", metavar="RUN|FOLDER", help="a run, a checkpoint of ours or a Hugging Face GPT-2 folder"
    )
    parser.add_argument("--data", metavar="PATH", help="held-out tokens; by default data.valid of the run's config")
    parser.add_argument("--batch", type=int, default=8, metavar="N", help="windows at a time (default 8)")
    options = parser.parse_args()
    result = evaluate_folder(options.model, options.data, options.batch)
    print(
        f"{options.model}: valid loss {result['valid_loss']:.4f}, perplexity {result['valid_ppl']:.2f} over "
        f"{result['num_sequences']:,} windows of {result['context']} tokens of {result['data']}"
    )
    if "file" in result:
        print(f"written to {result['file']}")


if __name__ == "__main__":
    run_cli(main)
