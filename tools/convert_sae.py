#!/usr/bin/env python
"""Convert a sparse autoencoder of another project to the file that teacher.sae reads, after measuring that it fits.

    python tools/convert_sae.py resid_post_mlp_v5_32k/autoencoders/5.pt --out saes/gpt2-5.safetensors \\
        --teacher teachers/gpt2 --text text.jsonl
    python tools/convert_sae.py OWNER/NAME/layers.5 --out saes/pythia-5.safetensors
    python tools/convert_sae.py saes/gpt2-5.safetensors --out saes/gpt2-5-saelens --to saelens

SOURCE is a path, or OWNER/NAME[/FOLDER] on Hugging Face's hub. Its format is recognised by its files: OpenAI's FILE.pt
(TopK, ReLU), a folder of SAELens (standard, topk; 0.4 to 6.x) or of EleutherAI's sparsify. Code inside a pickle is
never run. With a teacher and text, the variance unexplained and L0 are measured on windows of 64 tokens and of the
teacher's context. An autoencoder that does not fit is refused."""

import argparse
import sys
from pathlib import Path
from typing import get_args

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megacocomix.config.schema import Location
from megacocomix.errors import run_cli
from megacocomix.sae.convert import SAEConversion, convert_sae, export_saelens


def main() -> None:
    """Parse the command line, convert, and print the measurements."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "source", metavar="SOURCE", help="an autoencoder of any format above; with --to saelens, one in our format"
    )
    parser.add_argument(
        "--out", required=True, type=Path, metavar="PATH", help="file or folder to write; never overwritten"
    )
    parser.add_argument("--to", choices=["native", "saelens"], default="native", help="default %(default)s")
    parser.add_argument("--teacher", metavar="DIR", help="the model it was trained on, as teacher.model")
    parser.add_argument(
        "--text", metavar="FILE", help="text to measure on, of any kind that tools/prepare_data.py reads"
    )
    parser.add_argument("--tokenizer", metavar="NAME", help="as data.tokenizer, where the teacher's folder has none")
    parser.add_argument(
        "--accept-fvu",
        type=float,
        metavar="X",
        help="largest accepted variance unexplained (default 0.5, and no other block or scale may fit clearly better)",
    )
    hints = parser.add_argument_group("values that a source may not record")
    hints.add_argument("--layer", type=int, metavar="L", help="block whose residual it reads, from 0")
    hints.add_argument("--location", choices=get_args(Location))
    hints.add_argument("--context", type=int, metavar="T", help="tokens of a window it was trained on")
    hints.add_argument(
        "--center",
        action=argparse.BooleanOptionalAction,
        help="it was trained on TransformerLens' mean-centred residual (default: as its cfg.json states, or as its "
        "version of SAELens did)",
    )
    hints.add_argument(
        "--input-scale",
        type=float,
        metavar="X",
        help="what its inputs are multiplied by, as SAELens' expected_average_only_in; 1 if its weights contain it",
    )
    options = vars(parser.parse_args())
    if options.pop("to") == "saelens":
        sae = export_saelens(options["source"], options["out"])
        print(
            f"{options['source']} → {options['out']}: {sae.num_latents:,} latents, {sae.form.activation}, for SAELens 6"
        )
        return
    done = convert_sae(SAEConversion(**options))
    sae, info = done.sae, done.sae.info
    kept = f", {sae.form.k} kept" if sae.form.k else ""
    print(
        f"{options['source']} ({done.kind}) → {options['out']}: {sae.num_latents:,} latents of width {sae.width}, "
        f"{sae.form.activation}{kept}, inputs {sae.form.normalization}, {info['location']} of block {info['sae_layer']}"
    )
    for length, report in done.fit.items():
        print(
            f"windows of {length} tokens: variance unexplained {report.fvu_standardized:.4f} standardised, "
            f"{report.fvu:.4f} raw, L0 {report.l0:.1f}, over {report.num_rows:,} tokens"
        )
    if not done.fit:
        print("not measured: give --teacher and --text to measure whether it fits")


if __name__ == "__main__":
    run_cli(main)
