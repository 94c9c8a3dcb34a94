"""An autoencoder as one safetensors file: fp32 weights, and in its header everything that they mean nothing without.

Keys of `info`, of which a file may lack any: `teacher` (a name), `revision`, `teacher_sha256`, `tokenizer_sha256`,
`sae_layer`, `location`, `context` (tokens of a window it was trained on), `source` (format, file and SHA-256 of what
was converted), `training` (settings), `measured` (numbers by name)."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from megacocomix.errors import UserError
from megacocomix.files import file_sha256, write_aside
from megacocomix.model.concept import STANDARDIZE_EPS
from megacocomix.sae.model import SAE, SAEForm

FORMAT = "megacocomix-sae"
VERSION = 2
MAKERS = "Train one with tools/train_sae.py, or convert one with tools/convert_sae.py."


def save_sae(sae: SAE, path: str | Path, info: Mapping[str, Any]) -> None:
    """Write one safetensors file, whole or not at all."""
    path = Path(path)
    form = sae.form
    normalization: dict[str, Any] = {"kind": form.normalization}
    if form.normalization == "standardize":
        normalization |= {"eps": form.eps, "eps_added_to": "std", "unbiased": True}
    header = {
        "format": FORMAT,
        "version": str(VERSION),
        "activation": form.activation,
        "k": json.dumps(form.k),
        "normalization": json.dumps(normalization),
        "info": json.dumps(dict(info)),
    }
    weights = {name: weight.detach().float().cpu().contiguous() for name, weight in sae.named_parameters()}
    with write_aside(path) as aside:
        save_file(weights, aside, metadata=header)


def load_sae(path: str | Path, device: str | torch.device = "cpu") -> SAE:
    """Read a file that `save_sae` wrote, frozen (no gradients), straight onto `device`.

    Raises UserError for a missing file, one that is not safetensors, another format, a newer version, an activation or
    normalisation that is not computed here, and tensors that are missing, disagree in shape or are not finite. Whether
    its width, layer and location are those of the teacher at hand is for the caller to compare.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such SAE file. {MAKERS}")
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            form, info = _read_header(path, file.metadata() or {})
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is not a dict
    except SafetensorError as error:
        raise UserError(f"{path}: not a readable safetensors file ({error}). {MAKERS}") from None
    sae = SAE.from_weights(weights, form, str(path)).requires_grad_(False)
    sae.info = info
    sae.sha256 = file_sha256(path)
    return sae


def _read_header(path: Path, header: Mapping[str, str]) -> tuple[SAEForm, dict[str, Any]]:
    """The form and `info` from a file's header, once everything in it is something this code computes."""
    found = header.get("format", "none")
    if found != FORMAT:
        raise UserError(f"{path}: its header names the format '{found}', not '{FORMAT}'. {MAKERS}")
    try:
        if int(header["version"]) != VERSION:
            raise UserError(
                f"{path}: version {header['version']} of the format; this code reads version {VERSION}. {MAKERS}"
            )
        normalization = dict(json.loads(header["normalization"]))
        kind, eps = normalization.pop("kind"), normalization.pop("eps", STANDARDIZE_EPS)
        if normalization not in ({}, {"eps_added_to": "std", "unbiased": True}):
            raise UserError(f"{path}: normalises with {header['normalization']}, which is not computed here.")
        form = SAEForm(header["activation"], json.loads(header["k"]), kind, eps)
        return form, dict(json.loads(header["info"]))
    except UserError as error:
        raise UserError(
            *(line if line.startswith(str(path)) else f"{path}: {line}" for line in error.problems)
        ) from None
    except (KeyError, ValueError, TypeError) as error:
        raise UserError(f"{path}: its header is damaged ({error}).") from None
