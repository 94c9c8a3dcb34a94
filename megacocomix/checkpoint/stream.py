"""A safetensors file written tensor by tensor: memory for the largest, not, as with safetensors' save_file, for all."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from megacocomix.errors import UserError
from megacocomix.files import file_sha256

DTYPES = {"float32": (torch.float32, "F32"), "bfloat16": (torch.bfloat16, "BF16")}


def write_safetensors(
    path: Path, shapes: Mapping[str, tuple[int, ...]], read: Callable[[str], Tensor], dtype: str = "float32"
) -> dict:
    """Write the tensors that `read(name)` gives, one after the other, as `dtype`; returns the file's size and SHA-256.

    The header, with names and offsets, goes first. Raises UserError where a tensor is not of the shape announced.
    """
    torch_dtype, code = DTYPES[dtype]
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shapes.items():
        begin, end = end, end + torch.Size(shape).numel() * torch_dtype.itemsize
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [begin, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)  # the numbers begin at a multiple of 8
    with open(path, "wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name, shape in shapes.items():
            tensor = read(name)
            if tensor.shape != torch.Size(shape):
                raise UserError(f"{path}: {name} is of shape {list(tensor.shape)}, expected {list(shape)}.")
            # NumPy knows no bfloat16: bytes it knows.
            file.write(tensor.to(torch_dtype).contiguous().flatten().view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
