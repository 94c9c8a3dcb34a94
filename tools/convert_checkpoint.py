#!/usr/bin/env python
"""Convert a checkpoint, and check that the result is the same model.

python tools/convert_checkpoint.py runs/demo --out demo-hf --to hf --dtype bfloat16
python tools/convert_checkpoint.py gpt2-hf --out gpt2 --to native

SOURCE is a run, a native checkpoint, or a folder of Hugging Face GPT-2, the published CoCoMix code, Megatron-LM
(mp_rank_*) or DeepSpeed ZeRO. Its kind is detected from its files. The last group of options gives settings that a
source may not record.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megacocomix.checkpoint.convert import write_native, write_reference
from megacocomix.checkpoint.external.source import Hints
from megacocomix.checkpoint.open import load_model, open_source
from megacocomix.errors import UserError, run_cli
from megacocomix.files import check_absent
from megacocomix.hf.export import export_hf
from megacocomix.training.run_folder import code_version


def main() -> None:
    """Parse the command line, convert, print the differences."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="SOURCE", help="a folder of any kind above")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder to make; never overwritten")
    parser.add_argument(
        "--to",
        required=True,
        choices=["native", "hf", "reference"],
        help="native: our checkpoint format; hf: transformers; reference: the published CoCoMix code",
    )
    parser.add_argument("--tokenizer", metavar="NAME", help="as data.tokenizer; it is recorded, or copied by --to hf")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16"], default="float32", help="dtype of the weights, for --to hf"
    )
    hints = parser.add_argument_group("settings that a source may not record")
    hints.add_argument(
        "--insertion-layer", type=int, metavar="N", help="block (0-based) that the concept module stands before"
    )
    hints.add_argument("--num-kept", type=int, metavar="K", help="predicted concepts kept")
    hints.add_argument("--num-heads", type=int, metavar="N", help="attention heads")
    hints.add_argument("--vocab-size", type=int, metavar="N", help="vocabulary without padding (Megatron-LM)")
    options = parser.parse_args()
    check_absent(options.out)
    if options.to == "hf":
        return _to_hf(options)
    fields = ("insertion_layer", "num_kept", "num_heads", "vocab_size")
    source = open_source(options.source, Hints(**{field: getattr(options, field) for field in fields}))
    for field in ("num_heads", "vocab_size"):
        if (given := getattr(options, field)) not in (None, found := getattr(source.shape, field)):
            raise UserError(f"{options.source} records {field} {found}, but --{field.replace('_', '-')} is {given}.")
    if options.to == "native":
        difference = write_native(source, options.out, options.tokenizer or "", code_version())
    else:
        difference = write_reference(source, options.out)
    runs_as = "our modules" if source.read_hf is None else "transformers' GPT-2 blocks"
    print(f"{source.path}: {source.kind}, run on {runs_as}")
    print(
        f"{source.path} → {options.out}: max |Δlogit| {difference.logit:.1e}, Δloss {difference.loss:.1e} "
        f"over {difference.num_tokens} tokens"
    )


def _to_hf(options: argparse.Namespace) -> None:
    source = load_model(options.source)
    if source.config is None:
        raise UserError(f"{options.source} is a Hugging Face folder already.")
    tokenizer = options.tokenizer or source.config.data.tokenizer
    if not tokenizer:
        raise UserError(f"{options.source} does not record its tokenizer: give --tokenizer.")
    parity = export_hf(source, options.out, tokenizer, options.dtype)
    rounding = f"; rounded to bfloat16, the loss moved by {parity.rounding:+.1e}" if options.dtype == "bfloat16" else ""
    print(
        f"{source.path} → {options.out}: max |Δlogit| {parity.logit:.1e}, Δloss {parity.loss:.1e} over "
        f"{parity.num_tokens} tokens in fp64{rounding}"
    )


if __name__ == "__main__":
    run_cli(main)
