#!/usr/bin/env python
"""Rename the options in a config of an earlier version to their present names.

    python tools/upgrade_config.py configs/mine.yaml runs/old

PATH is a recipe, a plan of a sweep, a run (its config and all its checkpoints) or a checkpoint. Comments stay, and
so do values, except those of parallel.gather. Files that need no change are not written.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megacocomix.config.renamed import upgrade
from megacocomix.errors import run_cli


def main() -> None:
    """Parse the command line, upgrade, print the changes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH")
    for path in parser.parse_args().paths:
        changes = False
        for line in upgrade(path):
            print(line, flush=True)
            changes = True
        if not changes:
            print(f"{path}: nothing to change")


if __name__ == "__main__":
    run_cli(main)
