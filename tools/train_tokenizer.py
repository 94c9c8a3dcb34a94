"""Train a SentencePiece tokenizer on text.

    python tools/train_tokenizer.py corpus.jsonl.gz --out data/corpus.model --vocab-size 8000 --valid 0.01

INPUT is of any kind that tools/prepare_data.py reads. With --valid FRACTION the tokenizer never sees the
documents that tools/prepare_data.py puts into the validation split for the same FRACTION.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a checkout that is not installed
from megacocomix.data.prepare import train_tokenizer
from megacocomix.errors import run_cli


def main() -> None:
    """Parse the command line, train the tokenizer, print a summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", nargs="+", metavar="INPUT")
    parser.add_argument("--out", required=True, metavar="FILE.model")
    parser.add_argument("--vocab-size", type=int, required=True, metavar="N", help="a few hundred at least")
    parser.add_argument("--valid", type=float, default=0.0, metavar="FRACTION", help="of the documents; default 0")
    parser.add_argument("--field", default="text", help="field of a row that holds its text; default text")
    parser.add_argument("--skip-unknown", action="store_true", help="leave out files of other kinds in folders")
    arguments = vars(parser.parse_args())
    tokenizer, left_out = train_tokenizer(**arguments)
    print(f"{arguments['out']}: {tokenizer.vocab_size:,} tokens, end of text {tokenizer.eot_id}")
    for line in left_out.lines():
        print(line)


if __name__ == "__main__":
    run_cli(main)
