"""The recipes that are measured, and a random teacher, autoencoder and tokens of their sizes."""

from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.gpu_first_run.jobs import ROOT, Machine
from benchmarks.gpu_first_run.report import Report
from megacocomix.config.load import load_config


class Sizes(NamedTuple):
    """Sizes of the random teacher and autoencoder, and the number of training windows."""

    layers: int
    width: int
    heads: int
    context: int
    vocab: int
    latents: int
    kept: int
    sae_layer: int
    windows: int


GPT2_SMALL = Sizes(12, 768, 12, 1024, 50257, 32768, 32, 5, 512)  # as of the recipes
MINUTE = Sizes(2, 32, 2, 64, 503, 256, 8, 1, 64)


def sizes(machine: Machine) -> Sizes:
    """GPT-2's on a GPU."""
    return GPT2_SMALL if machine.has_gpu else MINUTE


def recipes(machine: Machine) -> dict[str, tuple[Path, list[str]]]:
    """Name → recipe and overrides: 69m as it is, and four blocks of 1.38b; on a CPU a minute one. A step has two
    micro-batches a rank."""
    inputs, size = machine.out / "inputs", sizes(machine)
    changes = {
        "69m": ("69m", []),
        "1.38b, 4 blocks": ("1.38b", ["model.num_layers=4", "method.insertion_layer=2"]),
    }
    if not machine.has_gpu:
        model = f"{{num_layers: {size.layers}, hidden_size: {size.width}, num_heads: {size.heads}, "
        model += f"context: {size.context}, vocab_size: {size.vocab}}}"
        concepts = [f"method.num_concepts={size.latents}", f"method.num_kept={size.kept}", "method.insertion_layer=1"]
        tokenizer = "data.tokenizer=assets/teacher/tokenizer.model"  # opens sooner than GPT-2's
        changes = {"tiny": ("69m", [f"model={model}", *concepts, "training.micro_batch=2", tokenizer])}
    found = {}
    for name, (recipe, overrides) in changes.items():
        file = ROOT / f"configs/{recipe}.yaml"
        overrides = [
            *(f"teacher.model={inputs}/teacher", f"teacher.sae={inputs}/sae.safetensors"),
            *(f"teacher.sae_layer={size.sae_layer}", "data.dtype=uint16"),
            *(f"data.train={inputs}/train.bin", f"data.valid={inputs}/valid.bin"),
            "optimizer.warmup_steps=1",
            *overrides,
        ]
        windows = 2 * load_config(file, overrides).training.micro_batch * machine.world
        found[name] = (file, [*overrides, f"training.global_batch={windows}"])
    return found


def make_inputs(machine: Machine, report: Report) -> None:
    """A random teacher, autoencoder and tokens: speed and memory do not depend on their values."""
    import numpy as np
    from transformers import GPT2Config, GPT2LMHeadModel

    from megacocomix.sae.file import save_sae
    from megacocomix.sae.model import SAE, SAEForm

    inputs, size = machine.out / "inputs", sizes(machine)
    inputs.mkdir(exist_ok=True)
    torch.manual_seed(0)
    shape = {"n_layer": size.layers, "n_embd": size.width, "n_head": size.heads, "n_positions": size.context}
    GPT2LMHeadModel(GPT2Config(vocab_size=size.vocab, **shape)).save_pretrained(inputs / "teacher")
    sae = SAE(size.width, size.latents, SAEForm(k=size.kept))
    with torch.no_grad():
        sae.encoder.copy_(torch.nn.functional.normalize(torch.randn(size.latents, size.width), dim=1))
        sae.decoder.copy_(sae.encoder)
    save_sae(sae, inputs / "sae.safetensors", {})
    for name, windows in (("train", size.windows), ("valid", 8)):
        tokens = np.random.default_rng(windows).integers(size.vocab, size=windows * size.context + 1)
        tokens.astype(np.uint16).tofile(inputs / f"{name}.bin")
