"""A run small enough for a test: random tokens in the reference's format, a random teacher, a random autoencoder."""

from pathlib import Path

import numpy as np
import torch

from megacocomix.checkpoint.open import LoadedModel
from megacocomix.config.load import build_config
from megacocomix.config.method import MethodConfig
from megacocomix.config.schema import ModelConfig
from megacocomix.model.gpt2 import GPT2, initialise
from megacocomix.sae.file import save_sae
from megacocomix.sae.model import SAE, SAEForm

VOCAB, CONTEXT, LATENTS = 97, 16, 62  # the first and the last divide by no number of tensor ranks, but 62 by 2
SHAPE = {"num_layers": 3, "hidden_size": 32, "num_heads": 4, "context": CONTEXT, "vocab_size": VOCAB}


def method(**options):
    """A resolved method section with the sizes of a tiny run."""
    sizes = {"insertion_layer": 1, "num_concepts": LATENTS, "num_kept": 4, "num_labels": 3, "target_size": 24}
    return MethodConfig(**{"name": "cocomix"} | sizes | options).resolved()


def write_tokens(path, num_tokens, seed=0):
    """Independent tokens, some far more frequent than others, so that there is something to learn in a few steps."""
    path.parent.mkdir(parents=True, exist_ok=True)
    frequency = 1 / np.arange(1, VOCAB + 1)
    tokens = np.random.default_rng(seed).choice(VOCAB, num_tokens, p=frequency / frequency.sum())
    tokens.astype(np.uint16).tofile(path)


def write_shards(folder, tokens):
    """The tokens as a split of our own format, of GPT-2's tokenizer but with the vocabulary of a tiny run."""
    from megacocomix.data.tokenizer import load_tokenizer
    from megacocomix.data.tokens import ShardWriter

    writer, gpt2 = ShardWriter(folder, tokens.dtype, len(tokens)), load_tokenizer("gpt2")
    writer.append(tokens)
    tokenizer = {"name": "gpt2", "sha256": gpt2.sha256, "eot_id": gpt2.eot_id}
    writer.finish({"tokenizer": tokenizer, "vocab_size": VOCAB})


def make_teacher(folder):
    """A random GPT-2 in Hugging Face's format, without a tokenizer: its tokens are nobody's."""
    from megacocomix.hf.export import export_hf

    shape = ModelConfig(**SHAPE | {"hidden_size": 24}, dropout=0.0)
    model = GPT2(shape)
    initialise(model, 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5 if parameter.dim() > 1 else 1)  # so that gradients differ between positions
    export_hf(LoadedModel(model, shape, None, "", folder), folder, "gpt2")
    for file in folder.iterdir():
        if file.name not in ("config.json", "model.safetensors"):
            file.unlink()


def make_sae(file, width=24, latents=LATENTS, k=8, **info):
    generator = torch.Generator().manual_seed(3)
    sae = SAE(width, latents, SAEForm(k=k))
    with torch.no_grad():
        sae.encoder.normal_(generator=generator)
        sae.decoder.copy_(torch.nn.functional.normalize(sae.encoder, dim=-1))
    save_sae(sae, file, info)


def make_inputs(folder):
    """Data, teacher and autoencoder under `folder`."""
    write_tokens(folder / "train.bin", 200 * CONTEXT)
    write_tokens(folder / "val.bin", 10 * CONTEXT, seed=1)
    make_teacher(folder / "teacher")
    make_sae(folder / "sae.safetensors")


def letters():
    """A tokenizer of the VOCAB tokens of a tiny run: printable ASCII, the line break, and the end of text."""
    from megacocomix.data.tokenizer import Tokenizer
    from megacocomix.data.tokenizer_identity import Hashes

    characters = [chr(code) for code in range(32, 127)] + ["\n"]
    return Tokenizer(
        name="letters",
        vocab_size=VOCAB,
        eot_id=VOCAB - 1,
        encode_batch=lambda texts: [[characters.index(character) for character in text] for text in texts],
        decode=lambda ids: "".join([*characters, "<|endoftext|>"][i] for i in ids),
        compute_hashes=lambda: Hashes("letters", "letters"),
    )


def loaded(seed=0, vocab_size=VOCAB, context=CONTEXT, **options):
    """A random model with the method options given, whose concepts and next tokens depend on much of what it read."""
    shape = ModelConfig(**SHAPE | {"vocab_size": vocab_size, "context": context}, dropout=0.0)
    model = GPT2(shape, method(**options))
    initialise(model, seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(5) if parameter.dim() > 1 else parameter.add_(0.1 * len(name) / 20)
    return LoadedModel(model.eval(), shape, None, "", Path("tiny"))


def student(seed=0, **options):
    """`loaded`, opened, as a student that reads letters."""
    return opened(loaded(seed, **options), letters())


def opened(model, tokenizer, path=Path("tiny"), sha256="", config=None):
    """What `open_model` makes of a model in memory, with a tokenizer that has no files."""
    from megacocomix.hf.export import to_cocomix
    from megacocomix.hf.open import OpenModel

    made = OpenModel(to_cocomix(model), path, sha256, config)
    made.__dict__["tokenizer"] = tokenizer
    return made


def values(folder, run="run"):
    """The nested values of a config on the inputs in `folder`."""
    return {
        "run": str(folder / run),
        "model": dict(SHAPE),
        "method": {
            "name": "cocomix",
            "insertion_layer": 1,
            "num_concepts": LATENTS,
            "num_kept": 4,
            "num_labels": 3,
            "target_size": 24,
        },
        "teacher": {"model": str(folder / "teacher"), "sae": str(folder / "sae.safetensors"), "sae_layer": 1},
        "data": {"train": str(folder / "train.bin"), "valid": str(folder / "val.bin"), "tokenizer": "gpt2"},
        # eps: the key bias has a mathematically zero gradient, which a small eps would blow up to noise.
        "optimizer": {"lr": 1e-2, "min_lr": 1e-3, "warmup_steps": 1, "eps": 1e-5},
        "training": {"steps": 6, "global_batch": 8, "micro_batch": 2, "precision": "fp32"},
        "parallel": {"zero": 3},
        "checkpoint": {"every": 3},
        "evaluation": {"every": 3, "batches": 1},
        "logging": {"every": 1},
    }


def config(folder, run="run", **sections):
    """A checked config; `training={"steps": 3}` and the like change sections."""
    nested = values(folder, run)
    for section, fields in sections.items():
        nested[section] = nested.get(section, {}) | fields
    return build_config(nested)
