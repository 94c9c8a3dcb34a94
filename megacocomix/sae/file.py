"""An autoencoder as one safetensors file: fp32 weights, and a header with everything needed to use them.

Keys of `info`, all optional: `teacher` (a name), `revision`, `teacher_sha256`, `tokenizer_sha256`, `sae_layer`,
`location`, `context` (tokens of a training window), `source` (format, file and SHA-256 of the converted file),
`training` (settings), `measured` (numbers by name)."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from megacocomix.errors import UserError
from megacocomix.files import check_downloaded, file_sha256, write_aside
from megacocomix.model.concept import STANDARDIZE_EPS
from megacocomix.sae.model import SAE, SAEForm

FORMAT = "megacocomix-sae"
VERSION = 2
HEADER = ("format", "version", "activation", "k", "normalization", "info")
MAKERS = "Train one with tools/train_sae.py, or convert one with tools/convert_sae.py."


@contextmanager
def writing_out(out: str | Path) -> Iterator[None]:
    """Turns a failure to write --out, such as a full disk, into a UserError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(f"--out {out} cannot be written: {error}. Free some space and start it again.") from None


def save_sae(sae: SAE, path: str | Path, info: Mapping[str, Any]) -> None:
    """Write one safetensors file, whole or not at all."""
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

    Raises UserError for a missing file, a file that is not safetensors, another format or version, an unknown
    activation or normalisation, other keys in the header, and tensors that are missing, unknown, disagree in shape or
    are not finite. The caller has to compare width, layer and location with the teacher's.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such SAE file. {MAKERS}")
    check_downloaded(path)
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            form, info = _read_header(path, file.metadata() or {})
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is not a dict
    except SafetensorError as error:
        raise UserError(f"{path}: not a readable safetensors file ({error}). {MAKERS}") from None
    sae = SAE.from_weights(weights, form, str(path)).requires_grad_(False)
    sae.info, sae.sha256 = info, file_sha256(path)
    return sae


def _read_header(path: Path, header: Mapping[str, str]) -> tuple[SAEForm, dict[str, Any]]:
    """The form and `info` in a file's header. Raises UserError for a form that this code does not compute."""
    found = header.get("format", "none")
    if found != FORMAT:
        raise UserError(f"{path}: its header names the format '{found}', not '{FORMAT}'. {MAKERS}")
    try:
        if int(header["version"]) != VERSION:
            raise UserError(f"version {header['version']} of the format; this code reads version {VERSION}. {MAKERS}")
        if unknown := sorted(set(header) - set(HEADER)):
            raise UserError(f"its header has {' '.join(unknown)}, which version {VERSION} of the format does not have.")
        normalization = dict(json.loads(header["normalization"]))
        kind, eps = normalization.pop("kind"), normalization.pop("eps", STANDARDIZE_EPS)
        if normalization not in ({}, {"eps_added_to": "std", "unbiased": True}):
            raise UserError(f"normalises with {header['normalization']}, which is not computed here.")
        form = SAEForm(header["activation"], json.loads(header["k"]), kind, eps)
        return form, dict(json.loads(header["info"]))
    except UserError as error:
        raise UserError(*(f"{path}: {line}" for line in error.problems)) from None
    except (KeyError, ValueError, TypeError) as error:
        raise UserError(f"{path}: its header is damaged ({error}).") from None
