"""A source → a checkpoint folder of ours, or a folder as the published code's save_pretrained leaves it.

Written aside, compared with the source on the same tokens, and only then renamed.
"""

from collections.abc import Callable
from pathlib import Path

import yaml

from megacocomix.checkpoint.external.source import Source, hf_shapes, neutral_config
from megacocomix.checkpoint.format import CHECKPOINT_FILE, CHECKPOINT_FORMAT, CHECKPOINT_VERSION
from megacocomix.checkpoint.hf_names import hf_name, to_hf
from megacocomix.checkpoint.open import open_source
from megacocomix.checkpoint.parity import Difference, measure
from megacocomix.checkpoint.store import TrainingState
from megacocomix.checkpoint.tensors import write_safetensors
from megacocomix.errors import UserError
from megacocomix.files import write_aside, write_json
from megacocomix.model.gpt2 import LAYER_NORM_EPS


def write_native(source: Source, out: Path, tokenizer: str, code: dict) -> Difference:
    """A checkpoint of ours at step 0, without optimizer states: something to evaluate, teach, or begin from. `code` is
    the code version to note. Raises UserError, leaving nothing behind."""
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
    """config.json, model.safetensors and config.yaml, as the published code reads them. Raises UserError, leaving
    nothing behind."""
    shape, method = source.shape, source.method
    if not method.has_module:
        raise UserError(f"{source.path} has no concept module; the published code reads it as Hugging Face's: --to hf.")
    if not method.is_published:
        raise UserError(
            f"{source.path} has predict {method.predict}, mix {method.mix}, placement {method.placement}, "
            f"interleave_every {method.interleave_every}, which the published code does not have: --to hf."
        )
    # As save_pretrained leaves it: GPT-2's own settings, and nothing about concepts.
    config = {
        "architectures": ["GPT2CoCoMixLMHeadModel"],
        "model_type": "gpt2",
        "activation_function": "gelu_new",
        "n_layer": shape.num_layers,
        "n_embd": shape.hidden_size,
        "n_head": shape.num_heads,
        "n_positions": shape.context,
        "n_ctx": shape.context,
        "vocab_size": shape.vocab_size,
        "layer_norm_epsilon": LAYER_NORM_EPS,
        "attn_pdrop": shape.dropout,
        "embd_pdrop": shape.dropout,
        "resid_pdrop": shape.dropout,
        "tie_word_embeddings": True,
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
    ours = {hf_name(name): name for name in source.shapes}
    read = lambda name: to_hf(ours[name], source.read(ours[name]), shape.num_heads)[1]

    def write(folder: Path) -> None:
        write_json(folder / "config.json", config)
        (folder / "config.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
        write_safetensors(folder / "model.safetensors", hf_shapes(source.shapes, shape.num_heads), read)

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


def check_absent(out: Path) -> None:
    """Raises UserError where --out is taken."""
    if out.exists():
        raise UserError(f"--out {out} exists already; choose another folder.")
