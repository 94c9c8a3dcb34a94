"""Opens a model folder of any kind: as a `Source`, read tensor by tensor, or as our model in memory."""

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from megacocomix.checkpoint.detect import Detected, detect
from megacocomix.checkpoint.external.deepspeed import open_deepspeed
from megacocomix.checkpoint.external.hf import config_json, hf_model_type, open_hf
from megacocomix.checkpoint.external.megatron import open_megatron
from megacocomix.checkpoint.external.source import NO_HINTS, Hints, Source, check_tensors, parameter_shapes
from megacocomix.checkpoint.format import CHECKPOINT_FILE, read_checkpoint_manifest
from megacocomix.checkpoint.tensors import SafetensorFiles, sharded_files
from megacocomix.config.load import build_config
from megacocomix.config.schema import Config, ModelConfig
from megacocomix.config.yaml_text import read_yaml
from megacocomix.data.tokenizer import Tokenizer, folder_tokenizer, load_tokenizer
from megacocomix.errors import UserError
from megacocomix.files import file_sha256
from megacocomix.model.gpt2 import GPT2

# Keys of config.json that change nothing in a forward pass in eval mode.
RECORDS = re.compile(
    r"_name_or_path|architectures|auto_map|transformers_version|(torch_)?dtype|use_cache|(bos|eos|pad)_token_id|"
    r"initializer_range|summary_\w+|task_specific_params|\w+_pdrop|\w*dropout"
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel  # takes seconds, and few callers need it


def open_source(path: str | Path | Detected, hints: Hints = NO_HINTS) -> Source:
    """Detect a folder's kind and check its tensors against its sizes. Raises UserError."""
    kind, path, is_verified = detect(path)
    if kind == "native":
        return _open_native(path, not is_verified)
    return {"hf": open_hf, "megatron": open_megatron, "deepspeed": open_deepspeed}[kind](path, hints)


def _open_native(folder: Path, verify: bool) -> Source:
    manifest = read_checkpoint_manifest(folder, verify)
    config = build_config(manifest["config"], f"{folder}/{CHECKPOINT_FILE}")
    store = SafetensorFiles(folder / name for name in sorted(manifest["files"]) if name.startswith("weights-"))
    check_tensors(store, parameter_shapes(config.model, config.method, folder), folder)
    read = lambda name: store.read(name).float()
    return Source("megacocomix checkpoint", folder, config.model, config.method, store.files, read, None, config)


@dataclass(frozen=True)
class LoadedModel:
    """Our model in memory, the config of the run that trained it (None if no run did) and the SHA-256 of its
    weights."""

    model: GPT2
    shape: ModelConfig
    config: Config | None
    sha256: str
    path: Path


@torch.no_grad()
def load_model(path: str | Path | Detected) -> LoadedModel:
    """The model in any folder that `open_source` reads without hints, on the CPU in fp32. Raises UserError."""
    source = open_source(path)
    with torch.device("meta"):
        model = GPT2(source.shape, source.method)
    model.to_empty(device="cpu")
    model.head.weight = model.embed.tokens.weight  # to_empty unties the weights
    for name, parameter in model.named_parameters():
        parameter.copy_(source.read(name))
    return LoadedModel(model, source.shape, source.config, weights_sha256(source.path), source.path)


def load_lm(path: str | Path | Detected, dtype: torch.dtype) -> "LoadedModel | PreTrainedModel":
    """The language model in any such folder: ours in fp32, or transformers' class in `dtype`, on the CPU, for another
    architecture and for a GPT-2 that our modules cannot run, such as an untied one. Raises UserError."""
    from megacocomix.checkpoint.external.causal_lm import load_causal_lm  # whose transformers takes seconds

    found = detect(path)
    model_type = hf_model_type(found.path) if found.kind == "hf" else None
    if model_type not in (None, "gpt2", "cocomix"):
        return load_causal_lm(found.path, dtype)
    try:
        return load_model(found)
    except UserError as error:
        if model_type != "gpt2":
            raise
        try:
            return load_causal_lm(found.path, dtype)
        except UserError:
            raise error from None


def weights_sha256(path: str | Path | Detected) -> str:
    """The SHA-256 that identifies a model's weights. For a native checkpoint it comes from the hashes in the manifest,
    for a Hugging Face folder of any architecture from its safetensors files. Raises UserError if there are none."""
    kind, path, _ = detect(path)
    if kind == "native":
        files = read_checkpoint_manifest(path)["files"]
        hashes = {name: entry["sha256"] for name, entry in files.items() if name.startswith("weights-")}
    elif kind != "hf":
        return open_source(path).sha256
    else:
        hashes = {str(file.relative_to(path)): file_sha256(file) for file in sharded_files(path)}
        if hashes.keys() == {"model.safetensors"}:
            return hashes["model.safetensors"]
    return hashlib.sha256("".join(hashes[name] for name in sorted(hashes)).encode()).hexdigest()


def architecture_sha256(path: str | Path | Detected) -> str:
    """Identifies what the config beside a model's weights says about its computation: its number of heads, its
    activation and so on. Raises UserError for a folder without a model."""
    kind, path, _ = detect(path)
    if kind == "hf":
        values = {key: value for key, value in config_json(path).items() if not RECORDS.fullmatch(key)}
    elif kind == "native":  # without reading the weights
        config = build_config(read_checkpoint_manifest(path)["config"], f"{path}/{CHECKPOINT_FILE}")
        values = config.model.model_dump(exclude={"dropout"})
    else:
        values = open_source(path).shape.model_dump(exclude={"dropout"})
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def model_tokenizer(path: str | Path) -> str | None:
    """The tokenizer of a model folder, named as in data.tokenizer: the folder itself if it carries tokenizer files,
    else the one in its run's config. None if the folder records none."""
    path = Path(path)
    if carried := folder_tokenizer(path):
        return carried
    for name, keys in (("config.yaml", ("data", "tokenizer")), (CHECKPOINT_FILE, ("config", "data", "tokenizer"))):
        if (path / name).is_file():
            # Not all JSON is YAML: a character beyond 16 bits is two escapes in JSON.
            value = read_yaml(path / name) if name == "config.yaml" else read_checkpoint_manifest(path)
            for key in keys:
                value = value.get(key) if isinstance(value, dict) else None  # a config.yaml need not be ours
            return value if isinstance(value, str) else None
    return None


def recorded_tokenizer(path: str | Path) -> Tokenizer | None:
    """The tokenizer of a model folder, loaded. None if the folder records none, or a file that does not exist any
    more. Raises UserError for one that is damaged."""
    spec = model_tokenizer(path)
    return load_tokenizer(spec) if spec and (spec == "gpt2" or Path(spec).exists()) else None
