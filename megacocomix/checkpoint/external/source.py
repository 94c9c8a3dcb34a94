"""A GPT-2 on disk, with or without the concept module: its sizes, and its tensors in our names, read one at a time.

All tensors are checked for presence and shape before the first is read.
"""

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from megacocomix.checkpoint.tensors import FLOATS
from megacocomix.config.load import build_config
from megacocomix.config.method import ARCHITECTURE, MethodConfig
from megacocomix.config.rules import architecture_problems
from megacocomix.config.schema import Config, ModelConfig
from megacocomix.errors import UserError
from megacocomix.files import file_sha256
from megacocomix.model.gpt2 import GPT2

NEXT_TOKEN = MethodConfig(name="ntp").resolved()
"""The method of a model without a concept module."""


@dataclass(frozen=True)
class Hints:
    """Settings that a source may not record itself; None if unknown."""

    insertion_layer: int | None = None
    num_kept: int | None = None
    num_heads: int | None = None
    vocab_size: int | None = None


NO_HINTS = Hints()


class Store(Protocol):
    """Named tensors on disk, in any format."""

    files: list[Path]
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]

    def file_of(self, name: str) -> Path:
        """The file or folder to name in an error about a tensor."""

    def read(self, name: str) -> Tensor:
        """A whole tensor in its stored dtype."""


@dataclass(frozen=True)
class Source:
    """A model on disk. `read` returns our tensors in fp32. `read_hf` returns the same weights in Hugging Face's names,
    by a separate implementation, or is None if there is none: parity.py compares the two."""

    kind: str
    path: Path
    shape: ModelConfig
    method: MethodConfig
    files: list[Path]
    read: Callable[[str], Tensor]
    read_hf: Callable[[str], Tensor] | None
    config: Config | None = None

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """Shape of every parameter, by our names."""
        return parameter_shapes(self.shape, self.method, self.path)

    @property
    def sha256(self) -> str:
        """One hash over the content of all files."""
        return hashlib.sha256("".join(file_sha256(file) for file in self.files).encode()).hexdigest()


def neutral_config(shape: ModelConfig, method: MethodConfig, tokenizer: str = "") -> Config:
    """A config for a model that none of our runs trained. Its sizes are true; paths are empty, and the schedule trains
    nothing."""
    architecture = {key: getattr(method, key) for key in ARCHITECTURE}
    values = {
        "run": "",
        "model": shape.model_dump(),
        "method": {"name": "cocomix", **architecture} if method.has_module else {"name": "ntp"},
        "data": {"train": "", "valid": "", "tokenizer": tokenizer},
        "optimizer": {"lr": 1e-8, "min_lr": 0.0, "warmup_steps": 0},
        "training": {"steps": 1, "global_batch": 1, "micro_batch": 1, "precision": "fp32"},
    }
    return build_config(values, "the sizes of the source")


def parameter_shapes(shape: ModelConfig, method: MethodConfig, where: Path) -> dict[str, torch.Size]:
    """Shape of every parameter, by our names. Raises UserError, which mentions `where`, if the sizes do not fit each
    other."""
    config = neutral_config(shape, method)
    if problems := list(architecture_problems(config.model, config.method)):
        raise UserError(*(f"{where}: {problem}" for problem in problems))
    with torch.device("meta"):
        model = GPT2(config.model, config.method)
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def check_tensors(
    store: Store, expected: Mapping[str, tuple[int, ...]], where: Path, harmless: re.Pattern | None = None
) -> None:
    """Raises UserError if a tensor is missing, has another shape, holds no floating-point numbers, or is unknown. The
    error is one line: it names the first such tensor and counts the others. Names that match `harmless` are allowed."""
    problems = []
    for name, shape in expected.items():
        if name not in store.shapes:
            problems.append(f"{where} lacks {name}, of shape {list(shape)}")
        elif (found := list(store.shapes[name])) != list(shape):
            problems.append(f"{store.file_of(name)}: {name} is of shape {found}, expected {list(shape)}")
        elif store.dtypes[name] not in FLOATS:
            problems.append(
                f"{store.file_of(name)}: {name} is of type {store.dtypes[name]}; {' '.join(FLOATS)} are read"
            )
    for name in store.shapes:
        if name not in expected and not (harmless and harmless.fullmatch(name)):
            problems.append(f"{store.file_of(name)} holds {name}, which is no tensor of this model")
    if problems:
        more = f", and {len(problems) - 1} more such tensors" if len(problems) > 1 else ""
        raise UserError(f"{problems[0]}{more}.")


def method_from_hints(num_concepts: int, num_layers: int, hints: Hints, path: Path) -> MethodConfig:
    """The published method, with the settings that only the hints give. Raises UserError if one is missing or
    impossible."""
    for flag, value in (("--insertion-layer", hints.insertion_layer), ("--num-kept", hints.num_kept)):
        if value is None:
            raise UserError(
                f"{path} does not record its concept settings: give {flag} (published sizes: 3 or 5, and 32)."
            )
    if not 0 <= hints.insertion_layer < num_layers:
        raise UserError(f"{path}: insertion layer {hints.insertion_layer} is not below its {num_layers} blocks.")
    if not 1 <= hints.num_kept <= num_concepts:
        raise UserError(f"{path}: {hints.num_kept} concepts kept, but it has {num_concepts}.")
    sizes = {"insertion_layer": hints.insertion_layer, "num_concepts": num_concepts, "num_kept": hints.num_kept}
    return MethodConfig(name="cocomix", **sizes).resolved()
