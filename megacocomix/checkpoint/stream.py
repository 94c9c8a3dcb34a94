"""A safetensors file written tensor by tensor: memory for the largest, not for all."""

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

DTYPES = {"float32": (torch.float32, "F32"), "bfloat16": (torch.bfloat16, "BF16")}


def write_safetensors(file: Path, shapes: dict[str, torch.Size], tensors: Iterable[Tensor], dtype: str) -> None:
    """Write `tensors`, which come in the order of `shapes`, as `dtype`. The header, names and offsets, goes first."""
    torch_dtype, code = DTYPES[dtype]
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shapes.items():
        begin, end = end, end + shape.numel() * torch_dtype.itemsize
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [begin, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)  # the numbers begin at a multiple of 8
    with open(file, "wb") as stream:
        stream.write(len(encoded).to_bytes(8, "little") + encoded)
        for shape, tensor in zip(shapes.values(), tensors, strict=True):
            assert tensor.shape == shape
            # NumPy knows no bfloat16: bytes it knows.
            stream.write(tensor.to(torch_dtype).contiguous().flatten().view(torch.uint8).numpy().data)
