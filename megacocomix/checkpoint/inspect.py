"""Lists what a checkpoint holds: its files with their hashes, its config, its tensors and, if asked, their health. Only
reads."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from megacocomix.checkpoint.detect import detect
from megacocomix.checkpoint.external.deepspeed import MergedPartitions, find_partitions
from megacocomix.checkpoint.external.hf import config_json
from megacocomix.checkpoint.external.megatron import find_ranks
from megacocomix.checkpoint.format import read_checkpoint_manifest
from megacocomix.checkpoint.tensors import SafetensorFiles, sharded_files
from megacocomix.errors import UserError
from megacocomix.files import file_sha256
from megacocomix.pickles import load_pickle


@dataclass(frozen=True)
class Entry:
    """One stored tensor. The last three fields are its health; they are None if it was not asked for."""

    name: str
    file: str
    shape: list[int]
    dtype: str
    num_nan: int | None = None
    num_inf: int | None = None
    norm: float | None = None
    """L2 norm; None too if the tensor has NaN or infinite values."""


@dataclass(frozen=True)
class Listing:
    """A checkpoint file or folder: its kind, the config it records, its files and its tensors."""

    path: str
    kind: str
    config: dict
    files: list[dict]
    tensors: list[Entry]

    def as_json(self) -> str:
        """The whole listing."""
        return json.dumps(asdict(self), indent=1, default=str)

    def unhealthy(self) -> list[Entry]:
        """Tensors with NaN or infinite values; empty if health was not asked for."""
        return [entry for entry in self.tensors if entry.num_nan or entry.num_inf]


def list_checkpoint(path: str | Path, health: bool = False) -> Listing:
    """Detect the kind of a file or folder and list it. `health` reads every tensor. Raises UserError."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path} does not exist.")
    kind, config, files, tensors = _open(path)
    hashes = [{"name": str(file), "bytes": file.stat().st_size, "sha256": file_sha256(file)} for file in files]
    entries = [
        Entry(name, str(file), list(shape), dtype, *(_health(read()) if health else ()))
        for name, file, shape, dtype, read in tensors
    ]
    return Listing(str(path), kind, config, hashes, entries)


def _open(path: Path) -> tuple[str, dict, list[Path], Iterable]:
    """Kind, recorded config, files, and tensors as (name, file, shape, dtype, read)."""
    if path.is_file():
        if path.suffix == ".safetensors":
            store = SafetensorFiles([path])
            return "safetensors file", store.metadata, [path], _of_store(store)
        content = load_pickle(path)
        return "file of torch.save", _plain(content), [path], _of_pickle(content, path)
    kind, path, is_verified = detect(path)
    if kind == "native":
        manifest = read_checkpoint_manifest(path, verify=not is_verified)
        store = SafetensorFiles(path / name for name in sorted(manifest.pop("files")))
        return "megacocomix checkpoint", manifest, store.files, _of_store(store)
    if kind == "megatron":
        ranks = find_ranks(path)
        contents = [load_pickle(file) for file in ranks]
        tensors = (entry for content, file in zip(contents, ranks, strict=True) for entry in _of_pickle(content, file))
        return "Megatron-LM checkpoint", _plain(contents[0]), ranks, tensors
    config = config_json(path) if (path / "config.json").is_file() else {}
    if kind == "deepspeed":
        store = MergedPartitions(find_partitions(path))
        return "DeepSpeed ZeRO checkpoint", config, store.files, _of_store(store)
    store = SafetensorFiles(sharded_files(path))
    has_concepts = any(name.endswith("concept_predictor.weight") for name in store.shapes)
    is_published = has_concepts and config.get("model_type") != "cocomix"
    kind = "folder of the published CoCoMix code" if is_published else "Hugging Face folder"
    return kind, config, store.files, _of_store(store)


def _of_store(store: SafetensorFiles | MergedPartitions) -> Iterator[tuple]:
    for name, shape in store.shapes.items():
        yield name, store.file_of(name), shape, store.dtypes[name], partial(store.read, name)


def _of_pickle(content: dict, file: Path) -> Iterator[tuple]:
    """Tensors anywhere in nested containers. A tensor's name is the path to it."""
    stack, seen = [("", content)], set()
    while stack:
        name, value = stack.pop()
        if isinstance(value, dict | list) and id(value) in seen:
            continue  # a container may hold itself
        seen.add(id(value))
        if isinstance(value, Tensor):
            dtype = str(value.dtype).removeprefix("torch.")
            yield name, file, tuple(value.shape), dtype, lambda value=value: value
        elif isinstance(value, dict | list | tuple):
            items = value.items() if isinstance(value, dict) else enumerate(value)
            stack += reversed([(f"{name}.{key}" if name else str(key), each) for key, each in items])


def _plain(content: dict) -> dict:
    """The plain values beside the tensors, and the args of Megatron-LM."""
    plain = {key: value for key, value in content.items() if isinstance(value, str | int | float)}
    return plain | (vars(content["args"]) if hasattr(content.get("args"), "__dict__") else {})


def _health(values: Tensor) -> tuple[int, int, float | None]:
    """Number of NaN, number of infinite values, and norm (None if there are any of either)."""
    values = values.to_dense() if values.layout != torch.strided else values
    values = torch.view_as_real(values.resolve_conj()) if values.is_complex() else values
    values = values.float() if values.is_floating_point() else values.double()
    num_nan, num_inf = values.isnan().sum().item(), values.isinf().sum().item()
    norm = torch.linalg.vector_norm(values, dtype=torch.float64).item() if not (num_nan or num_inf) else None
    return num_nan, num_inf, norm
