"""Hugging Face folders → a source: GPT-2, whole or in shards; a folder of the published CoCoMix code, which is a GPT-2
with `transformer.concept_predictor` in it; and what `--to hf` made of a model with concepts (model_type cocomix).

The config.json of the published code does not know of concepts: they stand in `config.yaml` beside it or one folder up,
else in the hints.
"""

import json
from dataclasses import replace
from pathlib import Path

import torch

from megacocomix.checkpoint.external.source import (
    NEXT_TOKEN,
    Hints,
    Source,
    Store,
    check_tensors,
    hf_shapes,
    method_from_hints,
    neutral_config,
    parameter_shapes,
)
from megacocomix.checkpoint.hf_names import from_hf
from megacocomix.checkpoint.tensors import SafetensorFiles, sharded_files
from megacocomix.config.method import ARCHITECTURE, MethodConfig
from megacocomix.config.schema import ModelConfig
from megacocomix.config.yaml_text import parse_yaml
from megacocomix.errors import UserError

# Stored by some versions of transformers: the causal mask, and a second copy of the tied embedding.
BUFFERS = (".attn.bias", ".attn.masked_bias")
HEAD = "lm_head.weight"


def open_hf(folder: Path, hints: Hints) -> Source:
    """A folder of one of the three kinds above. Raises UserError."""
    shape = hf_shape(folder)
    store = SafetensorFiles(sharded_files(folder))
    values = json.loads((folder / "config.json").read_bytes())
    if values["model_type"] == "cocomix":
        recorded = {key: values[key] for key in ARCHITECTURE if key in values}
        if missing := {"insertion_layer", "num_concepts", "num_kept"} - recorded.keys():
            raise UserError(f"{folder}/config.json lacks {' '.join(sorted(missing))}.")
        try:
            method = MethodConfig(name="cocomix", **recorded).resolved()
        except ValueError as error:
            raise UserError(f"{folder}/config.json is damaged: {' '.join(str(error).split()):.200}.") from None
        return open_hf_named("Hugging Face CoCoMix", folder, store, shape, hints, method)
    return open_hf_named("Hugging Face GPT-2", folder, store, shape, _with_published_config(folder, hints))


def open_hf_named(
    kind: str, path: Path, store: Store, shape: ModelConfig, hints: Hints, method: MethodConfig | None = None
) -> Source:
    """A store whose names are Hugging Face GPT-2's, with or without `transformer.` before them; `method` where the
    source records it."""
    prefix = "transformer." if "transformer.wte.weight" in store.shapes or HEAD in store.shapes else ""
    stored = lambda name: prefix + name.removeprefix("transformer.")
    predictor = store.shapes.get(stored("transformer.concept_predictor.weight"))
    if method is None and predictor is not None:
        method = method_from_hints(predictor[0], shape.num_layers, hints, path)
        kind = kind.replace("Hugging Face GPT-2", "published CoCoMix code")
    method = method or NEXT_TOKEN
    expected = hf_shapes(parameter_shapes(neutral_config(shape, method)), shape.num_heads)
    check_tensors(store, {stored(name): size for name, size in expected.items()}, path, (*BUFFERS, HEAD))
    read = lambda name: store.read(stored(name)).float()
    if HEAD in store.shapes and not torch.equal(store.read(HEAD), store.read(stored("transformer.wte.weight"))):
        raise UserError(
            f"{store.file_of(HEAD)}: {HEAD} is not {stored('transformer.wte.weight')}; only a tied head is read."
        )
    ours = lambda name: from_hf(name, read, shape.num_heads)
    # parity.py writes out a second time only what the published code has.
    read_hf = read if not method.has_module or method.is_published else None
    return Source(kind, path, shape, method, store.files, ours, read_hf)


def hf_model_type(folder: Path) -> str | None:
    """What config.json of a Hugging Face folder names as its model type. Raises UserError where it is damaged."""
    try:
        return dict(json.loads((folder / "config.json").read_bytes())).get("model_type")
    except OSError:
        raise UserError(f"{folder} holds no config.json: save the model with save_pretrained.") from None
    except (ValueError, TypeError):
        raise UserError(f"{folder}/config.json is damaged: not a JSON object.") from None


def hf_shape(folder: Path) -> ModelConfig:
    """The sizes in a Hugging Face folder's config.json. Raises UserError where it is not a GPT-2 or CoCoMix that we can
    run."""
    model_type = hf_model_type(folder)
    if model_type not in ("gpt2", "cocomix"):
        raise UserError(f"{folder} is a {model_type} model; only gpt2 and cocomix can be read here.")
    try:
        return _checked_shape(folder, dict(json.loads((folder / "config.json").read_bytes())))
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{folder}/config.json is damaged, or lacks a size of the model ({' '.join(repr(error).split()):.80})."
        ) from None


def _checked_shape(folder: Path, values: dict) -> ModelConfig:
    expected = {
        "activation_function": "gelu_new",
        "n_inner": None,
        "layer_norm_epsilon": 1e-5,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "tie_word_embeddings": True,
    }
    for key, value in expected.items():
        if values.get(key, value) != value and not (key == "n_inner" and values[key] == 4 * values["n_embd"]):
            raise UserError(f"{folder}/config.json: {key} is {values[key]!r}; only {value!r} can be read.")
    return ModelConfig(
        num_layers=values["n_layer"],
        hidden_size=values["n_embd"],
        num_heads=values["n_head"],
        context=values["n_positions"],
        vocab_size=values["vocab_size"],
        dropout=0.0,
    )


def _with_published_config(folder: Path, hints: Hints) -> Hints:
    """The hints, completed by the config.yaml of the published code where it is beside the weights, or, as that code
    looks for it too, one folder up. Raises UserError where the two contradict each other."""
    for file in (folder / "config.yaml", folder.absolute().parent / "config.yaml"):
        if not file.is_file():
            continue
        values = parse_yaml(file.read_text(), str(file))
        if not isinstance(values, dict) or "insert_layer_index" not in values:
            continue
        for field, key in (("insertion_layer", "insert_layer_index"), ("num_kept", "concept_num")):
            value, hint = values.get(key), getattr(hints, field)
            if not isinstance(value, int):
                continue
            if hint not in (None, value):
                raise UserError(f"{file}: {key} is {value}, but {field} {hint} was asked for.")
            hints = replace(hints, **{field: value})
        break
    return hints
