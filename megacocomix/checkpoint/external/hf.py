"""Opens Hugging Face folders of three kinds:

- GPT-2, whole or in shards;
- the published CoCoMix code's: a GPT-2 that has `transformer.concept_predictor`;
- those that `--to hf` writes for a model with concepts (model_type cocomix).

The config.json of the published code does not record the concept settings. They are in `config.yaml` beside it or one
folder up, or else in the hints.
"""

import json
import re
from dataclasses import replace
from pathlib import Path

import torch

from megacocomix.checkpoint.external.source import (
    NEXT_TOKEN,
    Hints,
    Source,
    Store,
    check_tensors,
    method_from_hints,
    parameter_shapes,
)
from megacocomix.checkpoint.hf_names import COCOMIX_FORMAT, from_hf, hf_shapes
from megacocomix.checkpoint.tensors import SafetensorFiles, sharded_files, unwrapped_name
from megacocomix.config.method import ARCHITECTURE, MethodConfig
from megacocomix.config.schema import ModelConfig
from megacocomix.config.yaml_text import read_yaml
from megacocomix.errors import UserError
from megacocomix.files import damaged
from megacocomix.model.gpt2 import LAYER_NORM_EPS

# The only options that the first exports recorded. Those models have the defaults of the others.
FIRST_OPTIONS = ("insertion_layer", "num_concepts", "num_kept")
HEAD = "lm_head.weight"
# Other names of sizes, which transformers obeys too (GPT2Config.attribute_map).
ALIASES = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
}
# Heads of other tasks, which a causal LM does not compute.
OTHER_HEADS = re.compile(r"(?:score|classifier|multiple_choice_head|qa_outputs|v_head)\..+")
# Some versions of transformers store the causal mask, the number that stands for minus infinity in it, and a second
# copy of the tied embedding.
HARMLESS = re.compile(rf"(?:transformer\.)?h\.\d+\.attn\.(?:masked_)?bias|lm_head\.weight|{OTHER_HEADS.pattern}")


def open_hf(folder: Path, hints: Hints) -> Source:
    """Open a folder of one of the three kinds above. Raises UserError."""
    check_complete(folder)
    shape = hf_shape(folder)
    store = SafetensorFiles(sharded_files(folder), unwrapped_name)
    values = config_json(folder)
    if values["model_type"] != "cocomix":
        return open_hf_named("Hugging Face GPT-2", folder, store, shape, _with_published_config(folder, hints))
    if (version := values.get("cocomix_format", COCOMIX_FORMAT)) != COCOMIX_FORMAT:
        raise UserError(f"{folder}/config.json has cocomix_format {version!r}; {COCOMIX_FORMAT} can be read.")
    recorded = {key: values[key] for key in ARCHITECTURE if values.get(key) is not None}
    required = FIRST_OPTIONS if values.keys().isdisjoint(set(ARCHITECTURE) - set(FIRST_OPTIONS)) else ARCHITECTURE
    if missing := [key for key in required if key not in recorded]:
        raise UserError(f"{folder}/config.json lacks {' '.join(missing)}.")
    try:
        method = MethodConfig(name="cocomix", **recorded).resolved()
    except ValueError as error:
        raise UserError(f"{folder}/config.json is damaged: {' '.join(str(error).split()):.200}.") from None
    return open_hf_named("Hugging Face CoCoMix", folder, store, shape, hints, method)


def open_hf_named(
    kind: str, path: Path, store: Store, shape: ModelConfig, hints: Hints, method: MethodConfig | None = None
) -> Source:
    """Open a store with Hugging Face GPT-2's parameter names, with or without the prefix `transformer.`. `method` is
    None if the source does not record it."""
    prefix = "transformer." if "transformer.wte.weight" in store.shapes or HEAD in store.shapes else ""
    stored = lambda name: prefix + name.removeprefix("transformer.")
    predictor = store.shapes.get(stored("transformer.concept_predictor.weight"))
    if method is None and predictor is not None:
        method = method_from_hints(predictor[0], shape.num_layers, hints, path)
        kind = kind.replace("Hugging Face GPT-2", "published CoCoMix code")
    method = method or NEXT_TOKEN
    expected = hf_shapes(parameter_shapes(shape, method, path), shape.num_heads)
    check_tensors(store, {stored(name): size for name, size in expected.items()}, path, HARMLESS)
    embedding = stored("transformer.wte.weight")
    if HEAD in store.shapes and not torch.equal(store.read(HEAD).float(), store.read(embedding).float()):
        raise UserError(f"{store.file_of(HEAD)}: {HEAD} is not {embedding}; only a tied head is read.")
    read_hf = lambda name: store.read(stored(name)).float()
    read = lambda name: from_hf(name, read_hf, shape.num_heads)
    # parity.py has a second implementation only of the published concept module.
    has_second = not method.has_module or method.is_published
    return Source(kind, path, shape, method, store.files, read, read_hf if has_second else None)


def config_json(folder: Path) -> dict:
    """config.json of a Hugging Face folder. Raises UserError if it is missing or damaged."""
    try:
        return dict(json.loads((folder / "config.json").read_bytes()))
    except OSError:
        raise UserError(f"{folder} holds no config.json: save the model with save_pretrained.") from None
    except (ValueError, TypeError):
        raise damaged(folder / "config.json", "not a JSON object.") from None


def check_complete(folder: Path) -> None:
    """Raises UserError if something beside the weights of a Hugging Face folder changes what they compute."""
    if (folder / "adapter_config.json").is_file():
        raise UserError(f"{folder} holds an adapter of PEFT too: merge it into the weights (merge_and_unload) first.")
    values = config_json(folder)
    if file := values.get("transformers_weights"):
        raise UserError(f"{folder}/config.json names its own file of weights, {file}: save it as model.safetensors.")
    if values.get("model_type") == "gpt2" and "AutoModelForCausalLM" in (values.get("auto_map") or {}):
        raise UserError(f"{folder}/config.json names code of its own (auto_map): its model is not transformers' GPT-2.")


def hf_model_type(folder: Path) -> str | None:
    """The model_type in config.json of a Hugging Face folder. Raises UserError if the file is missing or damaged."""
    return config_json(folder).get("model_type")


def hf_shape(folder: Path) -> ModelConfig:
    """The sizes in config.json of a Hugging Face folder. Raises UserError if it is not a GPT-2 or CoCoMix that our
    modules can run."""
    values = config_json(folder)
    if values.get("model_type") not in ("gpt2", "cocomix"):
        raise UserError(f"{folder} is a {values.get('model_type')} model; only gpt2 and cocomix can be read here.")
    for other, key in ALIASES.items():
        if other in values and values.setdefault(key, values[other]) != values[other]:
            raise UserError(f"{folder}/config.json: {key} is {values[key]}, but {other} is {values[other]}.")
    try:
        shape = ModelConfig(
            num_layers=values["n_layer"],
            hidden_size=values["n_embd"],
            num_heads=values["n_head"],
            context=values["n_positions"],
            vocab_size=values["vocab_size"],
            dropout=0.0,
        )
    except (ValueError, KeyError) as error:
        raise UserError(
            f"{folder}/config.json is damaged, or lacks a size of the model ({' '.join(repr(error).split()):.80})."
        ) from None
    expected = {
        "activation_function": "gelu_new",
        "n_inner": None,
        "layer_norm_epsilon": LAYER_NORM_EPS,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "tie_word_embeddings": True,
        "quantization_config": None,
        "is_causal": True,
        "pruned_heads": {},
    }
    for key, value in expected.items():
        if values.get(key, value) != value and not (key == "n_inner" and values[key] == 4 * shape.hidden_size):
            raise UserError(f"{folder}/config.json: {key} is {values[key]!r}; only {value!r} can be read.")
    return shape


def _with_published_config(folder: Path, hints: Hints) -> Hints:
    """The hints, completed from the config.yaml of the published code. It is beside the weights or one folder up, where
    that code looks too. Raises UserError if file and hints contradict each other."""
    for file in (folder / "config.yaml", folder.absolute().parent / "config.yaml"):
        try:
            values = read_yaml(file) if file.is_file() else None
        except UserError:
            if file.parent == folder:
                raise
            continue  # the folder above need not belong to this model
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
