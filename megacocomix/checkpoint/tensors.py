"""Named tensors in safetensors files, read and written one at a time, so that never more than one is in memory."""

import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megacocomix.errors import UserError
from megacocomix.files import damaged, file_sha256

log = logging.getLogger(__name__)

# What DistributedDataParallel and DeepSpeed, torch.compile, FSDP and activation checkpointing put into the names of a
# module that they wrap, and `model.`, under which Lightning and others keep it.
WRAPPERS = r"_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module"
WRAPPED = re.compile(rf"^(?:(?:module|{WRAPPERS})\.)+|(?<=\.)(?:{WRAPPERS})\.")
TYPE_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
FLOATS = tuple(TYPE_NAMES.values())
DTYPES = {"float32": (torch.float32, "F32"), "bfloat16": (torch.bfloat16, "BF16")}


def unwrapped_name(name: str) -> str:
    """`module._orig_mod.model.h.0._orig_mod.ln_1.bias` → `h.0.ln_1.bias`: the name in a GPT-2 that nothing wraps."""
    return WRAPPED.sub("", WRAPPED.sub("", name).removeprefix("model."))


class SafetensorFiles:
    """The tensors of one or several safetensors files, by name."""

    def __init__(self, files: Iterable[Path], rename: Callable[[str], str] = str):
        """Open all files and read their headers. `rename` turns a stored name into the name used here. Raises UserError
        if a file is damaged, or two tensors have one name."""
        self.files = list(files)
        self._stored_names: dict[str, str] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        self.metadata: dict[str, str] = {}
        self._where = {}
        for path in self.files:
            try:
                file = safe_open(path, "pt")
                self.metadata |= file.metadata() or {}
                for stored_name in file.keys():  # noqa: SIM118 (not a dict)
                    tensor, name = file.get_slice(stored_name), rename(stored_name)
                    if name in self._where:
                        first = self._stored_names[name]
                        raise UserError(f"{path}: {stored_name} and {first} of {self.file_of(name)} are one tensor.")
                    self._where[name], self._stored_names[name] = (path, file), stored_name
                    self.shapes[name], self.dtypes[name] = tuple(tensor.get_shape()), tensor.get_dtype()
            except (SafetensorError, OSError) as error:
                raise damaged(path, error) from None

    def file_of(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self._where[name][0]

    def read(self, name: str) -> Tensor:
        """A whole tensor in its stored dtype."""
        return self._where[name][1].get_tensor(self._stored_names[name])

    def unread(self, name: str) -> Any:
        """safetensors' slice of a tensor: only the part that is taken by indexing, such as `x[3:5, :]`, is read."""
        return self._where[name][1].get_slice(self._stored_names[name])


def sharded_files(folder: Path) -> list[Path]:
    """The files of the model in a folder: `model.safetensors` if there is one, as in transformers, else the shards
    listed in `model.safetensors.index.json`. Raises UserError if one is missing, or does not hold what is listed."""
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.is_file():
        if index.is_file():
            log.warning("%s is read, as transformers does; the shards of %s beside it are not", whole, index.name)
        return [whole]
    if not index.is_file():
        shards = sorted(folder.glob("model-*-of-*.safetensors"))
        lost = f"{index.name}, which lists {shards[0].name} and others" if shards else whole.name
        raise UserError(f"{folder} holds no {lost}: copy the whole folder, or save the model with save_pretrained.")
    try:
        found = {name: str(shard) for name, shard in json.loads(index.read_bytes())["weight_map"].items()}
        min(found)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{index} is damaged: it does not record which file holds which tensor.") from None
    shards = [folder / shard for shard in sorted(set(found.values()))]
    for shard in shards:
        if not shard.resolve().is_relative_to(folder.resolve()) and not shard.is_symlink():
            raise UserError(f"{index} lists {shard}, which is outside of the folder.")
        if not shard.is_file():
            lost = min(name for name, file in found.items() if folder / file == shard)
            raise UserError(f"{shard} does not exist, but {index.name} lists it for {lost}.")
    held = SafetensorFiles(shards)
    for name, file in found.items():
        if name not in held.shapes or held.file_of(name) != folder / file:
            raise UserError(f"{folder / file} does not hold {name}, but {index.name} lists it there.")
    return shards


def write_safetensors(
    path: Path, shapes: Mapping[str, tuple[int, ...]], read: Callable[[str], Tensor], dtype: str = "float32"
) -> dict:
    """Write the tensors that `read(name)` returns, one after the other, as `dtype`. Returns the file's size and
    SHA-256: {"bytes", "sha256"}. Raises UserError if a tensor does not have the shape in `shapes`."""
    torch_dtype, code = DTYPES[dtype]
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shapes.items():
        begin, end = end, end + torch.Size(shape).numel() * torch_dtype.itemsize
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [begin, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)  # the numbers begin at a multiple of 8 bytes
    with open(path, "wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name, shape in shapes.items():
            tensor = read(name)
            if tensor.shape != torch.Size(shape):
                raise UserError(f"{path}: {name} is of shape {list(tensor.shape)}, expected {list(shape)}.")
            # As bytes, because NumPy has no bfloat16.
            file.write(tensor.to(torch_dtype).contiguous().flatten().view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
