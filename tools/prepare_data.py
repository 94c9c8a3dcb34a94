"""Turn text into token shards.

    python tools/prepare_data.py corpus.jsonl.gz --out data/corpus --tokenizer gpt2 --valid 0.01

INPUT is .txt (documents separated by lines that read <|endoftext|>), .json, .jsonl, .ndjson, .csv, .tsv, .parquet or
.arrow, also compressed (.gz .zst .xz .bz2); a dataset saved by the `datasets` library; a folder of these; or owner/name
on the Hugging Face Hub, whose split train is read. What is left out is printed: documents without text, and with
--skip-unknown files of other kinds, which are otherwise refused. Interrupted work is continued by the same command. A
complete --out is never overwritten.
"""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a checkout that is not installed
from megacocomix.data.prepare import prepare_data
from megacocomix.data.sources import LeftOut
from megacocomix.errors import run_cli

# On Linux only the cores that this process may use: a job's share of a node.
NUM_CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def main() -> None:
    """Parse the command line, prepare the data, print a summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", nargs="+", metavar="INPUT")
    parser.add_argument("--out", required=True, metavar="DIR", help="gets DIR/train and, with --valid, DIR/valid")
    parser.add_argument("--tokenizer", required=True, metavar="gpt2|FILE.model|DIR")
    parser.add_argument("--valid", type=float, default=0.0, metavar="FRACTION", help="of the documents; default 0")
    parser.add_argument("--workers", type=int, default=NUM_CORES, metavar="N", help="default: all cores")
    parser.add_argument("--field", default="text", help="field of a row that holds its text; default text")
    parser.add_argument("--shard-tokens", type=int, default=100_000_000, metavar="N", help="default 100,000,000")
    parser.add_argument("--skip-unknown", action="store_true", help="leave out files of other kinds in folders")
    arguments = vars(parser.parse_args())
    manifests, complete = prepare_data(**arguments)
    for split, manifest in manifests.items():
        tokens, documents = manifest["num_tokens"], manifest["num_documents"]
        note = ", already complete" if complete else ""
        print(f"{arguments['out']}/{split}: {tokens:,} tokens in {documents:,} documents{note}")
    for line in LeftOut(**manifests["train"].get("left_out", {})).lines():
        print(line)


if __name__ == "__main__":
    run_cli(main)
