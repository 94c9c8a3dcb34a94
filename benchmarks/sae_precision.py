#!/usr/bin/env python
"""Measure how many labels change with the precision of the teacher and of the autoencoder's encoder, on the shipped
teacher, autoencoder and held-out text.

    python benchmarks/sae_precision.py --write docs/benchmarks.md

A GPU computes in TF32. On a CPU it is emulated: both factors are rounded to 10 bits of mantissa, and sums are fp32."""

import argparse
import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from megacocomix.data.prepare import prepare_data  # noqa: E402
from megacocomix.data.tokens import TokenDataset, TokenShards  # noqa: E402
from megacocomix.sae.file import load_sae  # noqa: E402
from megacocomix.sae.model import SAE  # noqa: E402
from megacocomix.teacher.labels import ConceptLabeler, LabelSettings  # noqa: E402
from megacocomix.teacher.load import load_teacher  # noqa: E402

TEACHER, TEXT = ROOT / "assets/teacher", ROOT / "assets/corpus/wiki_vital.jsonl.gz"
BEGIN, END = "<!-- precision: written by benchmarks/sae_precision.py -->", "<!-- end of precision -->"
# Teacher and encoder: what is changed, and what it is compared with.
ROWS = [
    (("fp32", "tf32"), ("fp32", "fp32")),
    (("bf16", "tf32"), ("bf16", "fp32")),
    (("bf16", "fp32"), ("fp32", "fp32")),
    (("bf16", "tf32"), ("fp32", "fp32")),
]


def main() -> None:
    """Label the text in each precision, print the table, and write it into a page if --write names one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, metavar="PAGE", help="page in which the table is replaced")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokens_BT = read_tokens().to(device)
    found = {row: label(tokens_BT, *row) for row in {row for pair in ROWS for row in pair}}
    table = render([(row, than, *changes(found[row], found[than])) for row, than in ROWS], tokens_BT)
    print(table)
    if options.write:
        head, rest = options.write.read_text().split(BEGIN)
        options.write.write_text(f"{head}{BEGIN}\n{table}\n{END}{rest.split(END)[1]}")


def read_tokens() -> torch.Tensor:
    """The held-out text in windows of the teacher's context, int64 [B, T]."""
    with tempfile.TemporaryDirectory() as folder:
        prepare_data([str(TEXT)], Path(folder), str(TEACHER / "tokenizer.model"), 0.05, 1)
        dataset = TokenDataset(TokenShards.open(Path(folder) / "valid"), 256, None)
        return torch.from_numpy(dataset.batch(range(dataset.num_windows)))


def label(tokens_BT: torch.Tensor, teacher_precision: str, sae_precision: str) -> torch.Tensor:
    """Labels int64 [B, T, 4]."""
    device = tokens_BT.device
    sae = load_sae(TEACHER / "sae.safetensors", device)
    layer, location = sae.info["sae_layer"], sae.info["location"]
    dtype = torch.bfloat16 if teacher_precision == "bf16" else torch.float32
    teacher = load_teacher(str(TEACHER), layer, location, device, dtype)
    settings = LabelSettings(
        num_labels=4,
        source="attribution",
        sign="positive",
        mask_unlabelled=True,
        masked_token=None,
        chunk=teacher.context,
        seed=None,
        sae_layer=layer,
        location=location,
        sae_precision=sae_precision,
    )
    if sae_precision == "tf32" and device.type == "cpu":
        emulate_tf32(sae)
    return ConceptLabeler(teacher, sae, settings)(tokens_BT).cpu()


def emulate_tf32(sae: SAE) -> None:
    """Let a CPU multiply by the encoder as a GPU does in TF32."""
    encoder, bias = to_tf32(sae.encoder.detach()), sae.latent_bias.detach()
    sae._pre_activations = lambda centred_ND: F.linear(to_tf32(centred_ND), encoder, bias)


def to_tf32(x: torch.Tensor) -> torch.Tensor:
    """fp32 rounded to the nearest number with 10 bits of mantissa, of two equally near ones away from zero."""
    return ((x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def changes(found: torch.Tensor, before: torch.Tensor) -> tuple[float, float]:
    """The share of labelled positions whose set of labels changes, and the share of their labels that are lost. A
    position is labelled if it has labels before or after."""
    is_labelled = (before[..., 0] >= 0) | (found[..., 0] >= 0)
    before, found = before[is_labelled], found[is_labelled]
    is_kept = (before[:, :, None] == found[:, None, :]).any(-1) & (before >= 0)
    return (~is_kept).any(-1).double().mean().item(), (~is_kept).double().mean().item()


def render(rows: list[tuple], tokens_BT: torch.Tensor) -> str:
    """The table, and what it was measured on."""
    name = lambda precisions: "{} teacher, {} encoder".format(*precisions)
    lines = ["| labels of | compared with | positions with another set | other labels |", "|---|---|---|---|"]
    lines += [
        f"| {name(row)} | {name(than)} | {positions:.3%} | {labels:.3%} |" for row, than, positions, labels in rows
    ]
    device = torch.cuda.get_device_name() if tokens_BT.is_cuda else "a CPU, TF32 emulated"
    lines.append(f"\n{tokens_BT.numel():,} held-out tokens, 4 labels each; {device}, torch {torch.__version__}.")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
