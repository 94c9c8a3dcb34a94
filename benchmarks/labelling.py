#!/usr/bin/env python
"""Measure labelled tokens per second and peak memory: our labeller against a plain implementation of the published
recipe, with GPT-2 small and 32,768 latents.

    python benchmarks/labelling.py --write docs/benchmarks.md

Weights are random, because neither speed nor memory depends on them. Every measurement runs in its own process, so that
its peak memory is its own. The recipes alternate, because the speed of a machine drifts. On a GPU the memory is that of
the GPU."""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from dense_recipe import label_densely

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

LAYERS, WIDTH, HEADS, CONTEXT, VOCAB, LATENTS, KEPT, LABELS, SAE_LAYER = 12, 768, 12, 1024, 50257, 32768, 32, 4, 5
BEGIN, END = "<!-- labelling: written by benchmarks/labelling.py -->", "<!-- end of labelling -->"


def main() -> None:
    """Measure every row, print the table, and write it into a page if --write names one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--batch", type=int, default=4, metavar="B", help="windows of 1,024 tokens (default %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="processes per row (default %(default)s)")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="page in which the table is replaced")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    parser.add_argument("--labels", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()  # --row and --labels are for the processes started below
    if options.row:
        print(json.dumps(measure(options.row, options.batch, options.labels)))
        return
    rows = ["dense", "dense-fused", "ours", "ours-bf16"]
    found: dict[str, list[dict]] = {row: [] for row in rows}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(options.rounds):
            for row in rows:
                labels = Path(folder) / f"{row}.pt"
                command = [sys.executable, __file__, "--row", row, "--batch", str(options.batch), "--labels", labels]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode:
                    sys.exit(f"{row} failed:\n{done.stderr[-2000:]}")
                found[row].append(json.loads(done.stdout.splitlines()[-1]))
                print(row, found[row][-1], flush=True)
        agreement = {row: agree(Path(folder) / "dense.pt", Path(folder) / f"{row}.pt") for row in rows}
    table = render(found, agreement, options.batch)
    print(table)
    if options.write:
        text = options.write.read_text()
        head, rest = text.split(BEGIN)
        options.write.write_text(f"{head}{BEGIN}\n{table}\n{END}{rest.split(END)[1]}")


def measure(row: str, batch: int, labels: Path) -> dict:
    """Seconds to label a batch (the second of two batches), and the process's peak memory in GiB."""
    from transformers import GPT2Config, GPT2LMHeadModel

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    tokens_BT = torch.randint(VOCAB, (batch, CONTEXT)).to(device)
    encoder = torch.nn.functional.normalize(torch.randn(LATENTS, WIDTH), dim=1)
    sae = {
        "pre_bias": torch.zeros(WIDTH),
        "encoder.weight": encoder,
        "latent_bias": torch.zeros(LATENTS),
        "decoder.weight": encoder.T.contiguous(),
    }
    config = GPT2Config(n_layer=LAYERS, n_embd=WIDTH, n_head=HEADS, n_positions=CONTEXT, vocab_size=VOCAB)
    config._attn_implementation = "eager" if row == "dense" else "sdpa"
    lm = GPT2LMHeadModel(config).eval()
    label = dense(lm, sae, device) if row.startswith("dense") else ours(lm, sae, device, row)
    del lm
    seconds = []
    for _ in range(2):
        begun = time.perf_counter()
        found = label(tokens_BT)
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begun)
    torch.save(found.cpu(), labels)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if device == "cuda":
        peak = torch.cuda.max_memory_allocated()
    return {"seconds": seconds[-1], "gib": peak / 2**30, "tokens": batch * CONTEXT}


def dense(lm, sae: dict, device: str):
    """The plain implementation of the published recipe."""
    lm, sae = lm.to(device), {name: value.to(device) for name, value in sae.items()}
    return lambda tokens_BT: label_densely(lm, sae, SAE_LAYER, KEPT, LABELS, tokens_BT)


def ours(lm, sae: dict, device: str, row: str):
    """The labeller that training and tools/label_concepts.py use."""
    from megacocomix.checkpoint.hf_names import load_hf_weights
    from megacocomix.config.schema import ModelConfig
    from megacocomix.model.gpt2 import GPT2
    from megacocomix.sae.formats import from_openai
    from megacocomix.sae.model import SAEForm
    from megacocomix.teacher.labels import ConceptLabeler, LabelSettings
    from megacocomix.teacher.model import Teacher, gpt2_teacher

    shape = ModelConfig(
        num_layers=LAYERS, hidden_size=WIDTH, num_heads=HEADS, context=CONTEXT, vocab_size=VOCAB, dropout=0.0
    )
    model, weights = GPT2(shape), lm.state_dict()
    load_hf_weights(model, weights.__getitem__, HEADS)
    model = model.to(device=device, dtype=torch.bfloat16 if row == "ours-bf16" else torch.float32)
    settings = LabelSettings(
        num_labels=LABELS,
        source="attribution",
        sign="positive",
        mask_unlabelled=True,
        masked_token=None,
        chunk=CONTEXT,
        seed=None,
        sae_layer=SAE_LAYER,
        location="resid_post_mlp",
    )
    autoencoder = from_openai(sae, SAEForm(k=KEPT), "the benchmark").to(device)
    return ConceptLabeler(Teacher(gpt2_teacher(model), SAE_LAYER), autoencoder, settings)


def agree(one: Path, other: Path) -> float:
    """The share of labelled positions at which both files have the same set of labels."""
    first, second = (torch.load(path, weights_only=True) for path in (one, other))
    is_labelled = second[..., 0] >= 0
    return (first.sort(-1).values == second.sort(-1).values).all(-1)[is_labelled].float().mean().item()


def render(found: dict[str, list[dict]], agreement: dict[str, float], batch: int) -> str:
    """The table with medians over the rounds, and the machine that it was measured on."""
    names = {
        "dense": "the recipe, plainly: dense, every gradient, fp32",
        "dense-fused": "the same with a fused attention kernel",
        "ours": "ours, fp32",
        "ours-bf16": "ours, bf16 teacher, fp32 scores",
    }
    median = lambda row, key: statistics.median(each[key] for each in found[row])
    lines = ["| | tokens/s | speed | peak memory | of the recipe's | same labels |", "|---|---|---|---|---|---|"]
    for row in found:
        tokens = found[row][0]["tokens"] / median(row, "seconds")
        speed = median("dense", "seconds") / median(row, "seconds")
        memory = median(row, "gib") / median("dense", "gib")
        lines.append(
            f"| {names[row]} | {tokens:,.0f} | {speed:.2f}× | {median(row, 'gib'):.2f} GiB | {memory:.0%} | "
            f"{agreement[row]:.2%} |"
        )
    num_rounds = len(found["dense"])
    lines.append(
        f"\n{batch} windows of 1,024 tokens; medians of {num_rounds} round{'s' * (num_rounds > 1)}. {machine()}, "
        f"torch {torch.__version__}."
    )
    return "\n".join(lines)


def machine() -> str:
    """A description of this machine."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    return f"{model}, {len(os.sched_getaffinity(0))} cores, {torch.get_num_threads()} threads"


if __name__ == "__main__":
    main()
