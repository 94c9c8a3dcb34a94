"""What the readers of other projects' autoencoders share. Every tensor and setting of a file is computed, or known as
harmless. Anything else is refused by its name."""

import json
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from megacocomix.checkpoint.tensors import unwrapped_name
from megacocomix.errors import UserError
from megacocomix.files import damaged
from megacocomix.sae.model import SAE, check_dtypes

# Modules inside a block of a transformers model → our locations.
MODULE_LOCATIONS = {
    "": "resid_post_mlp",
    ".mlp": "resid_delta_mlp",
    ".attn": "resid_delta_attn",
    ".attention": "resid_delta_attn",
    ".self_attn": "resid_delta_attn",
}


@dataclass
class ExternalSAE:
    """An autoencoder from another project, and the parts of `info` (sae/file.py) that its files record."""

    sae: SAE
    kind: str
    info: dict[str, Any] = field(default_factory=dict)
    recorded_factor: float | None = None
    """What its files record that inputs are multiplied by. It is in the weights here."""


def read_cfg(file: Path) -> dict[str, Any]:
    """A JSON file that holds one object. Raises UserError."""
    try:
        return dict(json.loads(file.read_bytes()))
    except (OSError, ValueError, TypeError) as error:
        raise damaged(file, error) from None


def read_tensors(file: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, without the prefixes of wrappers. Raises UserError."""
    try:
        return unwrap(load_file(file), file)
    except (SafetensorError, OSError) as error:
        raise damaged(file, error) from None


def unwrap(state: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """The entries without the prefixes of wrappers. Raises UserError if two entries get the same name."""
    bare: dict[str, Any] = {}
    for name, value in state.items():
        short = unwrapped_name(name)
        if short in bare:
            raise UserError(f"{file} holds {short} twice, as {name} too: it is not clear which is meant.")
        bare[short] = value
    return bare


def check_tensors(tensors: Mapping[str, Tensor], used: Iterable[str], harmless: Collection[str], source: str) -> None:
    """Raises UserError unless all of `used` are there, as real numbers, and all others are `harmless`."""
    used = tuple(used)
    if missing := [name for name in used if name not in tensors]:
        raise UserError(f"{source}: tensors missing: {' '.join(missing)}.")
    if unread := sorted(set(tensors) - set(used) - set(harmless)):
        raise UserError(
            f"{source} holds tensors that its kind of autoencoder does not have: {' '.join(unread)}. "
            "What is computed with them is not computed here."
        )
    check_dtypes({name: tensors[name] for name in used}, source)


def check_keys(cfg: Mapping[str, Any], known: Collection[str], kind: str, source: str) -> None:
    """Raises UserError for settings that no version of the `kind` has."""
    if unknown := sorted(set(cfg) - set(known)):
        raise UserError(
            f"{source}: cfg.json has keys that no version of {kind} has for this architecture: {' '.join(unknown)}. "
            "If they change nothing of what is computed, remove them from cfg.json."
        )


def check_fixed(cfg: Mapping[str, Any], fixed: Mapping[str, tuple], source: str) -> None:
    """Raises UserError for a setting whose value is not one of the `fixed` ones. A missing one, or null, is the
    default."""
    for key, valid in fixed.items():
        if (value := cfg.get(key)) is not None and value not in valid:
            names = " or ".join(json.dumps(each) for each in valid) or "null"
            raise UserError(f"{source}: {key} {value} is not computed here; only {names} is.")


def flag(cfg: Mapping[str, Any], key: str, default: bool, source: str) -> bool:
    """A setting that is true or false. Raises UserError for other values."""
    if not isinstance(value := cfg.get(key, default), bool):
        raise UserError(f"{source}: {key} {value!r} is neither true nor false.")
    return value


def whole_number(values: Mapping[str, Any], key: str, source: str) -> int:
    """A setting that is a whole number. Raises UserError for other values and if it is missing."""
    value = values.get(key)
    value = value.item() if isinstance(value, Tensor) else value
    if type(value) is not int:
        raise UserError(f"{source}: its {key} is missing or not a whole number.")
    return value


def module_hook(name: str) -> dict[str, Any]:
    """`sae_layer` and `location` of a module that has transformers' name, such as model.layers.5 or h.3.mlp; {} for any
    other name."""
    found = re.fullmatch(r"(?:[\w.]+\.)?(?:layers|h|blocks)\.(\d+)(\.\w+)?", name)
    if not found or (found[2] or "") not in MODULE_LOCATIONS:
        return {}
    return {"sae_layer": int(found[1]), "location": MODULE_LOCATIONS[found[2] or ""]}


def scale_input(weights: dict[str, Tensor], factor: float) -> None:
    """Change the four weights (names of SAE) so that their input no longer needs to be multiplied by `factor`."""
    weights["encoder"] = weights["encoder"].float() * factor
    weights["decoder"] = weights["decoder"].float() / factor
    weights["pre_bias"] = weights["pre_bias"].float() / factor
