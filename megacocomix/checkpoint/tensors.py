"""Named tensors in safetensors files, read and written one at a time, so that never more than one is in memory."""

import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megacocomix.errors import UserError
from megacocomix.files import file_sha256

DTYPES = {"float32": (torch.float32, "F32"), "bfloat16": (torch.bfloat16, "BF16")}


class SafetensorFiles:
    """The tensors of one or several safetensors files, by name."""

    def __init__(self, files: Iterable[Path]):
        """Open all files and read their headers. Raises UserError if one is damaged."""
        self.files = list(files)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        self.metadata: dict[str, str] = {}
        self._where = {}
        for path in self.files:
            try:
                file = safe_open(path, "pt")
                self.metadata |= file.metadata() or {}
                for name in file.keys():  # noqa: SIM118 (not a dict)
                    tensor = file.get_slice(name)
                    self._where[name] = path, file
                    self.shapes[name], self.dtypes[name] = tuple(tensor.get_shape()), tensor.get_dtype()
            except (SafetensorError, OSError) as error:
                raise UserError(f"{path} is damaged or not a safetensors file: {error}.") from None

    def file_of(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self._where[name][0]

    def read(self, name: str) -> Tensor:
        """A whole tensor in its stored dtype."""
        return self._where[name][1].get_tensor(name)


def sharded_files(folder: Path) -> list[Path]:
    """`model.safetensors`, or the shards listed in `model.safetensors.index.json`. Raises UserError if one is
    missing."""
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if not index.is_file():
        if not whole.is_file():
            raise UserError(f"{whole} does not exist: save the model with safetensors.")
        return [whole]
    try:
        found = {name: str(shard) for name, shard in json.loads(index.read_bytes())["weight_map"].items()}
        min(found)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{index} is damaged: it does not record which file holds which tensor.") from None
    shards = [folder / Path(shard).name for shard in sorted(set(found.values()))]
    for shard in shards:
        if not shard.is_file():
            lost = min(name for name, file in found.items() if Path(file).name == shard.name)
            raise UserError(f"{shard} does not exist, but {index.name} lists it for {lost}.")
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
