"""Weights on disk → a model in memory. What a folder holds is recognised by its files:

- a run folder of ours (`config.yaml`, `checkpoints/`): its newest complete checkpoint;
- a checkpoint folder of ours (`checkpoint.json`): fp32 weights by parameter name;
- a Hugging Face GPT-2 folder (`config.json` with model_type gpt2, `model.safetensors`).
"""

import hashlib
import json
import logging
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from megacocomix.config import Config, ModelConfig, build_config
from megacocomix.errors import UserError
from megacocomix.files import file_sha256
from megacocomix.model.gpt2 import GPT2, assemble
from megacocomix.model.hf_names import load_hf_weights

log = logging.getLogger(__name__)

CHECKPOINT_FILE = "checkpoint.json"
CHECKPOINT_FORMAT, CHECKPOINT_VERSION = "megacocomix-checkpoint", 1


@dataclass(frozen=True)
class LoadedModel:
    """A model, the config it was trained with where it is one of ours, and the SHA-256 of its weights files."""

    model: GPT2
    shape: ModelConfig
    config: Config | None
    sha256: str
    path: Path


def load_model(path: str | Path) -> LoadedModel:
    """Load a model on the CPU in fp32 from any folder named above. Raises UserError where it is none of them."""
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"model folder {path} does not exist.")
    if (path / "checkpoints").is_dir():
        return _load_ours(latest_checkpoint(path), verify=False)
    if (path / CHECKPOINT_FILE).is_file():
        return _load_ours(path, verify=True)
    if (path / "config.json").is_file():
        return _load_hf(path)
    raise UserError(f"{path} holds no model: expected a run, a checkpoint of ours or a Hugging Face GPT-2 folder.")


def list_checkpoints(run: str | Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first: only these carry their final name."""
    complete = [path for path in Path(run).glob("checkpoints/step-*") if re.fullmatch(r"step-\d+", path.name)]
    return sorted(complete, key=lambda path: int(path.name.removeprefix("step-")))


def latest_checkpoint(run: str | Path) -> Path:
    """The newest sound checkpoint of a run, all of it compared with its hashes; damaged ones are walked past, and said.
    Raises UserError where there is none."""
    problems = []
    for folder in reversed(list_checkpoints(run)):
        try:
            read_checkpoint_manifest(folder, verify=True)
            return folder
        except UserError as error:
            problems += error.problems
            log.warning("walking past %s: %s", folder, error)
    if problems:
        raise UserError(*problems, f"No checkpoint of {run} is sound.")
    raise UserError(f"{run} holds no checkpoint yet.")


def read_checkpoint_manifest(folder: Path, verify: bool = False) -> dict:
    """checkpoint.json of a checkpoint of ours. The size of every file it names is checked, with `verify` its SHA-256
    too, which reads it all. Raises UserError."""
    remedy = f"Delete {folder} to go on from the checkpoint before it."
    file = folder / CHECKPOINT_FILE
    try:
        manifest = json.loads(file.read_bytes())
        found = manifest["format"], manifest["version"]
        expected = {name: (entry["bytes"], entry["sha256"]) for name, entry in manifest["files"].items()}
        for section in ("state", "config", "inputs"):
            dict(manifest[section])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file} is missing or damaged ({type(error).__name__}). {remedy}") from None
    if found != (CHECKPOINT_FORMAT, CHECKPOINT_VERSION):
        raise UserError(
            f"{file} is of format {found[0]} version {found[1]}, not {CHECKPOINT_FORMAT} version {CHECKPOINT_VERSION}."
        )
    for name, (num_bytes, sha256) in expected.items():
        size = (folder / name).stat().st_size if (folder / name).is_file() else 0
        if size != num_bytes:
            raise UserError(f"{folder / name} is damaged: {size} bytes, expected {num_bytes}. {remedy}")
        if verify and file_sha256(folder / name) != sha256:
            raise UserError(f"{folder / name} is damaged: its SHA-256 is not the manifest's. {remedy}")
    return manifest


@torch.no_grad()
def load_weights(model: GPT2, folder: Path) -> str:
    """Copy the weights of a checkpoint of ours into `model`; returns their SHA-256. Raises UserError where the two
    differ."""
    manifest = read_checkpoint_manifest(folder)
    weights = {name: entry["sha256"] for name, entry in manifest["files"].items() if name.startswith("weights-")}
    parameters = dict(model.named_parameters())
    for file_name in weights:
        with safe_open(folder / file_name, "pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                if name not in parameters or list(parameters[name].shape) != file.get_slice(name).get_shape():
                    raise UserError(f"{folder}: {name} is not a parameter of this model, or has another shape there.")
                parameters.pop(name).copy_(file.get_tensor(name))
    if parameters:
        raise UserError(f"{folder} lacks {' '.join(sorted(parameters))}.")
    return _joined_sha256(weights)


def weights_sha256(path: str | Path) -> str:
    """What `load_model(path).sha256` would be, without loading; of any Hugging Face folder in safetensors too. Raises
    UserError where there are no weights."""
    path = Path(path)
    if (path / "checkpoints").is_dir():
        path = latest_checkpoint(path)
    if (path / CHECKPOINT_FILE).is_file():
        files = read_checkpoint_manifest(path)["files"]
        return _joined_sha256({n: entry["sha256"] for n, entry in files.items() if n.startswith("weights-")})
    files = sorted(path.glob("*.safetensors")) if (path / "config.json").is_file() else []
    if (path / "model.safetensors").is_file():
        return file_sha256(path / "model.safetensors")
    if not files:
        raise UserError(f"{path} holds no model: expected a run, a checkpoint of ours or a Hugging Face folder.")
    return _joined_sha256({file.name: file_sha256(file) for file in files})


def _joined_sha256(hashes: dict[str, str]) -> str:
    return hashlib.sha256("".join(hashes[name] for name in sorted(hashes)).encode()).hexdigest()


def _load_ours(folder: Path, verify: bool) -> LoadedModel:
    config = build_config(read_checkpoint_manifest(folder, verify)["config"], f"{folder}/{CHECKPOINT_FILE}")
    model = assemble(config)
    return LoadedModel(model, config.model, config, load_weights(model, folder), folder)


def _load_hf(folder: Path) -> LoadedModel:
    shape = hf_shape(folder)
    weights = folder / "model.safetensors"
    if not weights.is_file():
        raise UserError(f"{weights} does not exist: save the teacher with safetensors in one file.")
    model = GPT2(shape)
    try:
        with safe_open(weights, "pt") as file:
            # GPT2Model saves bare names, GPT2LMHeadModel puts `transformer.` before them.
            prefix = "transformer." if "transformer.wte.weight" in file.keys() else ""  # noqa: SIM118
            load_hf_weights(
                model, lambda name: file.get_tensor(prefix + name.removeprefix("transformer.")), shape.num_heads
            )
    except (SafetensorError, RuntimeError) as error:
        raise UserError(f"{weights} does not hold the GPT-2 that config.json describes: {error}.") from None
    return LoadedModel(model, shape, None, file_sha256(weights), folder)


def hf_shape(folder: Path, model_types: tuple[str, ...] = ("gpt2",)) -> ModelConfig:
    """The sizes in a Hugging Face folder's config.json. Raises UserError where it is not a GPT-2 that we can run, or
    of another type."""
    try:
        values = dict(json.loads((folder / "config.json").read_bytes()))
        return _checked_hf_shape(folder, values, model_types)
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{folder}/config.json is damaged, or lacks a size of the model ({' '.join(repr(error).split()):.80})."
        ) from None


def _checked_hf_shape(folder: Path, values: dict, model_types: tuple[str, ...]) -> ModelConfig:
    if values.get("model_type") not in model_types:
        valid = " or ".join(model_types)
        raise UserError(f"{folder} is a {values.get('model_type')} model; only {valid} can be read here.")
    expected = {
        "activation_function": "gelu_new",
        "n_inner": None,
        "layer_norm_epsilon": 1e-5,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "tie_word_embeddings": True,
    }
    for key, value in expected.items():
        if values.get(key, value) != value and not (key == "n_inner" and values[key] == 4 * values["n_embd"]):
            raise UserError(f"{folder}/config.json: {key} is {values[key]!r}; only {value!r} can be read.")
    return ModelConfig(
        num_layers=values["n_layer"],
        hidden_size=values["n_embd"],
        num_heads=values["n_head"],
        context=values["n_positions"],
        vocab_size=values["vocab_size"],
        dropout=0.0,
    )
