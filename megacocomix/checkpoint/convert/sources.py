"""What holds a GPT-2, with or without the concept module → its sizes, and its tensors under our names, one at a time.

All tensors are found and of the right shape before the first is read.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from megacocomix.checkpoint.convert.tensors import SafetensorFiles, sharded_files
from megacocomix.config import Config, ModelConfig, build_config
from megacocomix.errors import UserError
from megacocomix.files import file_sha256
from megacocomix.method import MethodConfig
from megacocomix.model.gpt2 import assemble
from megacocomix.model.hf_names import from_hf, to_hf
from megacocomix.model.load import CHECKPOINT_FILE, hf_shape, read_checkpoint_manifest
from megacocomix.yaml_text import parse_yaml

# Stored by some versions of transformers: the causal mask, and a second copy of the tied embedding.
BUFFERS = (".attn.bias", ".attn.masked_bias")
HEAD = "lm_head.weight"


@dataclass(frozen=True)
class Hints:
    """What a source may not say about itself; None where unknown."""

    insertion_layer: int | None = None
    num_kept: int | None = None
    num_heads: int | None = None
    vocab_size: int | None = None


NO_HINTS = Hints()


@dataclass(frozen=True)
class Concepts:
    """The parts of a concept module, their sizes and where it stands: options of the method section."""

    insertion_layer: int
    num_concepts: int
    num_kept: int
    predict: str = "concepts"
    mix: str = "predicted"
    placement: str = "interleave"
    interleave_every: int = 1
    target_size: int = MethodConfig.model_fields["target_size"].default

    @classmethod
    def of(cls, method: MethodConfig) -> "Concepts | None":
        """The module that a method has, if it has one."""
        return cls(**{field.name: getattr(method, field.name) for field in fields(cls)}) if method.has_module else None

    @property
    def is_published(self) -> bool:
        """Whether the published code has such a module."""
        parts = (self.predict, self.mix, self.placement, self.interleave_every)
        return parts == ("concepts", "predicted", "interleave", 1)


class Store(Protocol):
    """Named tensors on disk, whatever the format."""

    files: list[Path]
    shapes: dict[str, tuple[int, ...]]

    def file_of(self, name: str) -> Path:
        """The file (or folder) to name in an error about a tensor."""

    def read(self, name: str) -> Tensor:
        """A whole tensor as it is stored."""


@dataclass(frozen=True)
class Source:
    """A model on disk. `read` gives our tensors in fp32; `read_theirs` the same weights under Hugging Face's names by
    a way of its own, None where the source is ours: proof.py holds the two against each other."""

    kind: str
    path: Path
    shape: ModelConfig
    concepts: Concepts | None
    files: list[Path]
    read: Callable[[str], Tensor]
    read_theirs: Callable[[str], Tensor] | None
    config: Config | None = None

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """Shape of every parameter of ours."""
        return parameter_shapes(neutral_config(self.shape, self.concepts))

    @property
    def sha256(self) -> str:
        """One hash over the content of all files."""
        return hashlib.sha256("".join(file_sha256(file) for file in self.files).encode()).hexdigest()


def neutral_config(shape: ModelConfig, concepts: Concepts | None, tokenizer: str = "") -> Config:
    """A config of a model that no run of ours trained: its sizes are true, paths are empty, and the schedule is one of
    no learning."""
    values = {
        "run": "",
        "model": shape.model_dump(),
        "method": {"name": "ntp"},
        "data": {"train": "", "valid": "", "tokenizer": tokenizer},
        "optimizer": {"lr": 1e-8, "min_lr": 0.0, "warmup_steps": 0},
        "training": {"steps": 1, "global_batch": 1, "micro_batch": 1, "precision": "fp32"},
    }
    if concepts:
        values["method"] = {"name": "cocomix", **vars(concepts)}
    return build_config(values, "the sizes of the source")


def parameter_shapes(config: Config) -> dict[str, torch.Size]:
    """Shape of every parameter of a config's student."""
    with torch.device("meta"):
        model = assemble(config)
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def theirs_of(shapes: Mapping[str, torch.Size], num_heads: int) -> dict[str, torch.Size]:
    """Our names and shapes → Hugging Face's."""
    pairs = (to_hf(name, torch.empty(shape, device="meta"), num_heads) for name, shape in shapes.items())
    return {name: tensor.shape for name, tensor in pairs}


def check_tensors(store: Store, expected: Mapping[str, tuple[int, ...]], where: Path, ignore=()) -> None:
    """Raises UserError where a tensor is missing, of another shape, or known to nobody: one line, naming the first and
    how many more there are."""
    problems = [
        f"{where} lacks {name}, of shape {list(expected[name])}" for name in expected if name not in store.shapes
    ]
    for name, shape in expected.items():
        if tuple(store.shapes.get(name, shape)) != tuple(shape):
            found = list(store.shapes[name])
            problems.append(f"{store.file_of(name)}: {name} is of shape {found}, expected {list(shape)}")
    for name in store.shapes:
        if name not in expected and not name.endswith(tuple(ignore)):
            problems.append(f"{store.file_of(name)} holds {name}, which is no tensor of this model")
    if problems:
        more = f", and {len(problems) - 1} more such tensors" if len(problems) > 1 else ""
        raise UserError(f"{problems[0]}{more}.")


def concepts_of(num_concepts: int, num_layers: int, hints: Hints, path: Path) -> Concepts:
    """The concept settings that only the hints know. Raises UserError where they do not, or where they cannot be."""
    for flag, value in (("--insertion-layer", hints.insertion_layer), ("--num-kept", hints.num_kept)):
        if value is None:
            raise UserError(f"{path} does not say its concept settings: give {flag} (published sizes: 3 or 5, and 32).")
    if not 0 <= hints.insertion_layer < num_layers:
        raise UserError(f"{path}: insertion layer {hints.insertion_layer} is not below {num_layers}, its blocks.")
    if not 1 <= hints.num_kept <= num_concepts:
        raise UserError(f"{path}: {hints.num_kept} concepts kept, but it has {num_concepts}.")
    return Concepts(hints.insertion_layer, num_concepts, hints.num_kept)


def open_hf_named(
    kind: str, path: Path, store: Store, shape: ModelConfig, hints: Hints, concepts: Concepts | None = None
) -> Source:
    """A store whose names are Hugging Face GPT-2's, with or without `transformer.` before them; `concepts` where the
    source says what it has."""
    prefix = "transformer." if "transformer.wte.weight" in store.shapes or HEAD in store.shapes else ""
    stored = lambda name: prefix + name.removeprefix("transformer.")
    predictor = store.shapes.get(stored("transformer.concept_predictor.weight"))
    if concepts is None and predictor is not None:
        concepts = concepts_of(predictor[0], shape.num_layers, hints, path)
        kind = kind.replace("Hugging Face GPT-2", "published CoCoMix code")
    expected = theirs_of(parameter_shapes(neutral_config(shape, concepts)), shape.num_heads)
    check_tensors(store, {stored(name): size for name, size in expected.items()}, path, (*BUFFERS, HEAD))
    read = lambda name: store.read(stored(name)).float()
    if HEAD in store.shapes and not torch.equal(store.read(HEAD), store.read(stored("transformer.wte.weight"))):
        raise UserError(
            f"{store.file_of(HEAD)}: {HEAD} is not {stored('transformer.wte.weight')}; only a tied head is read."
        )
    ours = lambda name: from_hf(name, read, shape.num_heads)
    # Written out a second time, in proof.py, is only what the published code has.
    theirs = read if concepts is None or concepts.is_published else None
    return Source(kind, path, shape, concepts, store.files, ours, theirs)


def open_ours(folder: Path) -> Source:
    """A checkpoint of ours, verified against its hashes. Raises UserError."""
    manifest = read_checkpoint_manifest(folder, verify=True)
    config = build_config(manifest["config"], f"{folder}/{CHECKPOINT_FILE}")
    store = SafetensorFiles(folder / name for name in sorted(manifest["files"]) if name.startswith("weights-"))
    check_tensors(store, parameter_shapes(config), folder)
    read = lambda name: store.read(name).float()
    return Source(
        "megacocomix checkpoint", folder, config.model, Concepts.of(config.method), store.files, read, None, config
    )


def open_hf(folder: Path, hints: Hints) -> Source:
    """A Hugging Face GPT-2 folder, one of the published code, or one that we exported. Raises UserError."""
    shape = hf_shape(folder, ("gpt2", "cocomix"))
    store = SafetensorFiles(sharded_files(folder))
    values = json.loads((folder / "config.json").read_bytes())
    if values["model_type"] == "cocomix":
        said = {field.name: values[field.name] for field in fields(Concepts) if field.name in values}
        if lacking := {"insertion_layer", "num_concepts", "num_kept"} - said.keys():
            raise UserError(f"{folder}/config.json lacks {' '.join(sorted(lacking))}.")
        return open_hf_named("Hugging Face CoCoMix", folder, store, shape, hints, Concepts(**said))
    return open_hf_named("Hugging Face GPT-2", folder, store, shape, _with_published_config(folder, hints))


def _with_published_config(folder: Path, hints: Hints) -> Hints:
    """The hints, with what the config.yaml of the published code says where it is beside the weights, or, as that code
    looks for it too, one folder up. Raises UserError where the two contradict each other."""
    for file in (folder / "config.yaml", folder.absolute().parent / "config.yaml"):
        if not file.is_file():
            continue
        values = parse_yaml(file.read_text(), str(file))
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
