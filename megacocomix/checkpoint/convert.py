"""Converts a source to a native checkpoint, or to a folder as the published code's save_pretrained writes it.

The result is written under a temporary name, compared with the source on the same tokens, and only then renamed.
"""

from collections.abc import Callable
from pathlib import Path

import yaml

from megacocomix.checkpoint.external.source import Source, neutral_config
from megacocomix.checkpoint.format import CHECKPOINT_FILE, CHECKPOINT_FORMAT, CHECKPOINT_VERSION
from megacocomix.checkpoint.hf_names import gpt2_config, write_hf_weights
from megacocomix.checkpoint.open import open_source
from megacocomix.checkpoint.parity import Difference, measure
from megacocomix.checkpoint.store import TrainingState
from megacocomix.checkpoint.tensors import write_safetensors
from megacocomix.errors import UserError
from megacocomix.files import check_absent, write_aside, write_json


def write_native(source: Source, out: Path, tokenizer: str, code: dict) -> Difference:
    """Write a native checkpoint at step 0, without optimizer states. It can be evaluated, be a teacher, or be the start
    of a run. `code` is the code version to record. Raises UserError; then nothing is left behind."""
    config = source.config or neutral_config(source.shape, source.method, tokenizer)
    manifest = {
        "format": CHECKPOINT_FORMAT,
        "version": CHECKPOINT_VERSION,
        "state": vars(TrainingState()),
        "config": config.model_dump(mode="json"),
        "code": code,
        "inputs": {},
        "converted_from": {"kind": source.kind, "path": str(source.path), "sha256": source.sha256},
    }

    def write(folder: Path) -> None:
        name = "weights-00000.safetensors"
        manifest["files"] = {name: write_safetensors(folder / name, source.shapes, source.read)}
        write_json(folder / CHECKPOINT_FILE, manifest)

    return _write_checked(source, out, write)


def write_reference(source: Source, out: Path) -> Difference:
    """Write config.json, model.safetensors and config.yaml as the published code reads them. Raises UserError; then
    nothing is left behind."""
    shape, method = source.shape, source.method
    if not method.has_module:
        raise UserError(f"{source.path} has no concept module. Export it with --to hf: the published code reads that.")
    if not method.is_published:
        raise UserError(
            f"{source.path} has predict {method.predict}, mix {method.mix}, placement {method.placement}, "
            f"interleave_every {method.interleave_every}, which the published code does not have: use --to hf."
        )
    # As save_pretrained writes it: GPT-2's own settings, and nothing about concepts.
    config = {
        "architectures": ["GPT2CoCoMixLMHeadModel"],
        "model_type": "gpt2",
        "activation_function": "gelu_new",
        **gpt2_config(shape),
        "n_ctx": shape.context,
        "torch_dtype": "float32",
    }
    settings = {
        "mode": "cocomix",
        "base_model": "openai-community/gpt2",
        "n_embd": shape.hidden_size,
        "n_layer": shape.num_layers,
        "n_head": shape.num_heads,
        "vocab_size": shape.vocab_size,
        "block_size": shape.context,
        "concept_dim": method.num_concepts,
        "insert_layer_index": method.insertion_layer,
        "concept_num": method.num_kept,
    }

    def write(folder: Path) -> None:
        write_json(folder / "config.json", config)
        (folder / "config.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
        write_hf_weights(folder / "model.safetensors", source.shapes, source.read, shape.num_heads)

    return _write_checked(source, out, write)


def _write_checked(source: Source, out: Path, write: Callable[[Path], None]) -> Difference:
    check_absent(out)
    try:
        with write_aside(out) as partial:
            partial.mkdir()
            write(partial)
            difference = measure(source, open_source(partial))
            difference.check(f"{source.path} → {out}")
    except OSError as error:
        raise UserError(f"{source.path} → {out} was not written: {error}.") from None
    return difference
