"""What a checkpoint is and holds: files with their hashes, config, tensors, and on request their health. Reads only."""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from megacocomix.checkpoint.detect import detect
from megacocomix.checkpoint.external.deepspeed import MergedPartitions, find_partitions
from megacocomix.checkpoint.external.megatron import find_ranks
from megacocomix.checkpoint.format import read_checkpoint_manifest
from megacocomix.checkpoint.tensors import SafetensorFiles, sharded_files
from megacocomix.errors import UserError
from megacocomix.files import file_sha256
from megacocomix.pickles import load_pickle


@dataclass(frozen=True)
class Entry:
    """One tensor as it is stored; health is None where it was not asked for."""

    name: str
    file: str
    shape: list[int]
    dtype: str
    num_nan: int | None = None
    num_inf: int | None = None
    norm: float | None = None


@dataclass(frozen=True)
class Listing:
    """A file or folder: what it is, what it says about itself, its files and its tensors."""

    path: str
    kind: str
    config: dict
    files: list[dict]
    tensors: list[Entry]

    def as_json(self) -> str:
        """All of it. A norm that is not finite is null."""
        return json.dumps(asdict(self), indent=1, default=str)

    def unhealthy(self) -> list[Entry]:
        """Tensors with NaN or infinite values, as far as health was asked for."""
        return [entry for entry in self.tensors if entry.num_nan or entry.num_inf]


def list_checkpoint(path: str | Path, health: bool = False) -> Listing:
    """Recognise a file or folder and list it; with `health` every tensor is read. Raises UserError."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path} does not exist.")
    kind, config, files, tensors = _open(path)
    hashes = [{"name": str(file), "bytes": file.stat().st_size, "sha256": file_sha256(file)} for file in files]
    entries = [_entry(name, file, shape, dtype, read, health) for name, file, shape, dtype, read in tensors]
    return Listing(str(path), kind, config, hashes, entries)


def _open(path: Path) -> tuple[str, dict, list[Path], Iterable]:
    """Kind, what it records about itself, files, and tensors as (name, file, shape, dtype, read)."""
    if path.is_file():
        if path.suffix == ".safetensors":
            return "safetensors file", SafetensorFiles([path]).metadata, [path], _of_safetensors([path])
        content = load_pickle(path)
        return "file of torch.save", _plain(content), [path], _of_pickle(content, path)
    kind, path = detect(path)
    if kind == "native":
        manifest = read_checkpoint_manifest(path, verify=True)
        files = [path / name for name in sorted(manifest.pop("files"))]
        return "megacocomix checkpoint", manifest, files, _of_safetensors(files)
    if kind == "megatron":
        ranks = find_ranks(path)
        contents = [load_pickle(file) for file in ranks]
        tensors = (entry for content, file in zip(contents, ranks, strict=True) for entry in _of_pickle(content, file))
        return "Megatron-LM checkpoint", _plain(contents[0]), ranks, tensors
    if kind == "deepspeed":
        folder = find_partitions(path)
        merged = MergedPartitions(folder)
        tensors = (
            (name, folder, shape, "fp32 partitions", lambda name=name: merged.read(name))
            for name, shape in merged.shapes.items()
        )
        return "DeepSpeed ZeRO checkpoint", _config_json(path), merged.files, tensors
    files, config = sharded_files(path), _config_json(path)
    has_concepts = any(name.endswith("concept_predictor.weight") for name in SafetensorFiles(files).shapes)
    is_published = has_concepts and config.get("model_type") != "cocomix"
    name = "folder of the published CoCoMix code" if is_published else "Hugging Face folder"
    return name, config, files, _of_safetensors(files)


def _config_json(folder: Path) -> dict:
    file = folder / "config.json"
    try:
        return dict(json.loads(file.read_bytes())) if file.is_file() else {}
    except (ValueError, TypeError):
        raise UserError(f"{file} is damaged: not a JSON object.") from None


def _of_safetensors(files: list[Path]) -> Iterator[tuple]:
    store = SafetensorFiles(files)
    for name, shape in store.shapes.items():
        yield name, store.file_of(name), shape, store.dtypes[name], lambda name=name: store.read(name)


def _of_pickle(content: dict, file: Path) -> Iterator[tuple]:
    """Tensors anywhere in nested containers, by the path to them."""
    stack = [("", content)]
    while stack:
        name, value = stack.pop()
        if isinstance(value, Tensor):
            dtype = str(value.dtype).removeprefix("torch.")
            yield name, file, tuple(value.shape), dtype, lambda value=value: value
        elif isinstance(value, dict | list | tuple):
            items = value.items() if isinstance(value, dict) else enumerate(value)
            stack += reversed([(f"{name}.{key}" if name else str(key), each) for key, each in items])


def _plain(content: dict) -> dict:
    """What stands beside the tensors: plain values, and the args of Megatron-LM."""
    plain = {key: value for key, value in content.items() if isinstance(value, str | int | float)}
    return plain | (vars(content["args"]) if hasattr(content.get("args"), "__dict__") else {})


def _entry(
    name: str, file: Path, shape: tuple[int, ...], dtype: str, read: Callable[[], Tensor], health: bool
) -> Entry:
    entry = Entry(name, str(file), list(shape), dtype)
    if not health:
        return entry
    values = read()
    values = values.float() if values.is_floating_point() else values.double()
    num_nan, num_inf = values.isnan().sum().item(), values.isinf().sum().item()
    norm = torch.linalg.vector_norm(values, dtype=torch.float64).item() if not (num_nan or num_inf) else None
    return Entry(name, str(file), list(shape), dtype, num_nan, num_inf, norm)
