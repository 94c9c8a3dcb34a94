"""A model folder → its weights, whoever wrote it: a `Source` that is read tensor by tensor, or our model in memory."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch

from megacocomix.checkpoint.detect import detect
from megacocomix.checkpoint.external.deepspeed import open_deepspeed
from megacocomix.checkpoint.external.hf import open_hf
from megacocomix.checkpoint.external.megatron import open_megatron
from megacocomix.checkpoint.external.source import (
    NO_HINTS,
    Hints,
    Source,
    check_tensors,
    neutral_config,
    parameter_shapes,
)
from megacocomix.checkpoint.format import CHECKPOINT_FILE, read_checkpoint_manifest
from megacocomix.checkpoint.tensors import SafetensorFiles, sharded_files
from megacocomix.config.load import build_config
from megacocomix.config.schema import Config, ModelConfig
from megacocomix.config.yaml_text import parse_yaml
from megacocomix.data.tokenizer import folder_tokenizer
from megacocomix.files import file_sha256
from megacocomix.model.gpt2 import GPT2, assemble


def open_source(path: str | Path, hints: Hints = NO_HINTS) -> Source:
    """Detect a folder's kind and check that its tensors are those of its sizes. Raises UserError."""
    kind, path = detect(path)
    if kind == "native":
        return _open_native(path)
    return {"hf": open_hf, "megatron": open_megatron, "deepspeed": open_deepspeed}[kind](path, hints)


def _open_native(folder: Path) -> Source:
    """A checkpoint of ours, verified against its hashes. Raises UserError."""
    manifest = read_checkpoint_manifest(folder, verify=True)
    config = build_config(manifest["config"], f"{folder}/{CHECKPOINT_FILE}")
    store = SafetensorFiles(folder / name for name in sorted(manifest["files"]) if name.startswith("weights-"))
    check_tensors(store, parameter_shapes(config), folder)
    read = lambda name: store.read(name).float()
    return Source("megacocomix checkpoint", folder, config.model, config.method, store.files, read, None, config)


@dataclass(frozen=True)
class LoadedModel:
    """A model of ours, the config it was trained with where it is of a run, and the SHA-256 of its weights files."""

    model: GPT2
    shape: ModelConfig
    config: Config | None
    sha256: str
    path: Path


@torch.no_grad()
def load_model(path: str | Path) -> LoadedModel:
    """The model of any folder that `open_source` reads without hints, on the CPU in fp32. Raises UserError."""
    source = open_source(path)
    config = source.config or neutral_config(source.shape, source.method)
    with torch.device("meta"):
        model = assemble(config)
    model.to_empty(device="cpu")
    model.head.weight = model.embed.tokens.weight  # to_empty takes tied weights apart
    for name, parameter in model.named_parameters():
        parameter.copy_(source.read(name))
    return LoadedModel(model, source.shape, source.config, weights_sha256(source.path), source.path)


def weights_sha256(path: str | Path) -> str:
    """The SHA-256 that identifies a model's weights: of ours the hashes that the manifest records, of a Hugging Face
    folder, of any architecture, that of its safetensors. Raises UserError where there are none."""
    kind, path = detect(path)
    if kind == "native":
        files = read_checkpoint_manifest(path)["files"]
        return _combined_sha256({name: entry["sha256"] for name, entry in files.items() if name.startswith("weights-")})
    if kind != "hf":
        return open_source(path).sha256
    if (path / "model.safetensors").is_file():
        return file_sha256(path / "model.safetensors")
    files = sorted(path.glob("*.safetensors")) or sharded_files(path)
    return _combined_sha256({file.name: file_sha256(file) for file in files})


def _combined_sha256(hashes: dict[str, str]) -> str:
    return hashlib.sha256("".join(hashes[name] for name in sorted(hashes)).encode()).hexdigest()


def model_tokenizer(path: str | Path) -> str | None:
    """What names the tokenizer of a model folder, as data.tokenizer does: the files that it carries, else what its run
    was configured with. None where the folder does not record one."""
    path = Path(path)
    if carried := folder_tokenizer(path):
        return carried
    for file, key in ((path / "config.yaml", None), (path / CHECKPOINT_FILE, "config")):
        if file.is_file():
            values = parse_yaml(file.read_text(), str(file))
            return ((values[key] if key else values).get("data") or {}).get("tokenizer") or None
    return None
