#!/usr/bin/env python
"""List the kind and content of a checkpoint file or folder. Only reads.

python tools/inspect_checkpoint.py runs/tiny --health

PATH is a run, a native checkpoint, a folder of Hugging Face, the published CoCoMix code, Megatron-LM or DeepSpeed ZeRO,
or a single .safetensors or .pt file. The exit code is 1 if --health finds NaN or infinite values.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megacocomix.checkpoint.inspect import Listing, list_checkpoint
from megacocomix.errors import EXIT_FAILED, EXIT_FINISHED, run_cli


def main() -> int:
    """Parse the command line and print the listing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", metavar="PATH", help="a file or folder of any kind above")
    parser.add_argument("--health", action="store_true", help="read all tensors; report NaN, infinite values and norms")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    listing = list_checkpoint(options.path, options.health)
    print(listing.as_json() if options.json else _as_text(listing, options.health))
    return EXIT_FAILED if listing.unhealthy() else EXIT_FINISHED


def _as_text(listing: Listing, health: bool) -> str:
    lines = [f"{listing.path}: {listing.kind}", *(f"  {key}: {value}" for key, value in listing.config.items())]
    lines += [f"{file['name']}  {file['bytes']:,} bytes  sha256 {file['sha256']}" for file in listing.files]
    for entry in listing.tensors:
        line = f"{entry.name}  {entry.shape}  {entry.dtype}"
        if health:
            line += f"  norm {entry.norm:.6g}" if entry.norm is not None else ""
            line += f"  NaN {entry.num_nan}, infinite {entry.num_inf}" if entry.num_nan or entry.num_inf else ""
        lines.append(line)
    if health:
        lines.append(f"{len(listing.unhealthy())} of {len(listing.tensors)} tensors hold NaN or infinite values")
    return "\n".join(lines)


if __name__ == "__main__":
    run_cli(main)
