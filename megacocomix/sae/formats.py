"""Read sparse autoencoders of other projects. Code inside a pickle is never run.

OpenAI    FILE.pt: pre_bias [D], encoder.weight [C, D], latent_bias [C], decoder.weight [D, C]; TopK with k, inputs
          standardised (v5), or ReLU, inputs as they are (v1, v4)
SAELens   cfg.json, sae_weights.safetensors: sae/saelens.py
sparsify  cfg.json, sae.safetensors: encoder.weight [C, D], encoder.bias [C], W_dec [C, D], b_dec [D]; TopK; the
          folder is named after the module that it reads

Other scales and shifts in such a file are folded into the four weights, which changes results only by rounding. A
tensor or setting that is not known is refused by its name.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from megacocomix.errors import UserError
from megacocomix.files import file_sha256
from megacocomix.pickles import load_pickle
from megacocomix.sae.external import (
    ExternalSAE,
    check_fixed,
    check_keys,
    check_tensors,
    module_hook,
    read_cfg,
    read_tensors,
    scale_input,
    unwrap,
    whole_number,
)
from megacocomix.sae.model import CENTERED, SAE, SAEForm
from megacocomix.sae.saelens import read_saelens

# Counts of how often latents were active in training.
OPENAI_STATISTICS = {"stats_last_nonzero", "latents_activation_frequency", "latents_mean_square"}
OPENAI_WEIGHTS = ("pre_bias", "encoder.weight", "latent_bias", "decoder.weight")

SPARSIFY_WEIGHTS = {
    "encoder": "encoder.weight",
    "latent_bias": "encoder.bias",
    "decoder": "W_dec",
    "pre_bias": "b_dec",
}
SPARSIFY_FIXED = {"activation": ("topk",), "signed": (False,), "transcode": (False,), "skip_connection": (False,)}
# Sizes are checked against the tensors. The rest concerns training; naive_decoder is which kernel decodes.
SPARSIFY_KNOWN = {"d_in", "num_latents", "k", "expansion_factor", "normalize_decoder", "multi_topk", "naive_decoder"}

# What unexpected values in an external file raise. A pickle that would run code has been refused before.
UNEXPECTED = (TypeError, ValueError, KeyError, AttributeError, IndexError, RuntimeError, OverflowError, RecursionError)


def read_external_sae(
    path: Path, input_scale: float | None = None, center: bool | None = None, has_layernorm: bool | None = None
) -> ExternalSAE:
    """Read an autoencoder of any format above, fp32, on the CPU. `input_scale` is what its inputs have to be multiplied
    by, if its files do not record that; it is folded into the weights. `center` says whether it was trained on a
    residual without its mean; None: as its files say, if the teacher `has_layernorm` (None: as its name says). Raises
    UserError for anything else, and for a computation that ours does not have."""
    if input_scale is not None and not (math.isfinite(input_scale) and input_scale > 0):
        raise UserError(f"--input-scale {input_scale} must be a positive number.")
    try:
        found = _read(path, input_scale, center, has_layernorm)
    except UserError:
        raise
    except UNEXPECTED as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} holds unexpected values ({type(error).__name__}: {reason:.120}).") from None
    if input_scale is not None and found.sae.form.normalization not in ("none", "center"):
        raise UserError(
            f"--input-scale is for an autoencoder that reads inputs of any scale; {path} scales each row by itself "
            f"({found.sae.form.normalization})."
        )
    if center:
        if (kind := found.sae.form.normalization) not in CENTERED:
            raise UserError(f"--center is for an autoencoder that keeps the mean of a row; {path} does {kind}.")
        found.sae.form = replace(found.sae.form, normalization=CENTERED[kind])
    return found


def _read(path: Path, input_scale: float | None, center: bool | None, has_layernorm: bool | None) -> ExternalSAE:
    if path.is_file() and path.suffix in (".pt", ".pth"):
        return _read_openai(path, input_scale)
    if (path / "cfg.json").is_file():
        saelens = partial(read_saelens, center=center, has_layernorm=has_layernorm)
        readers = {"sae_weights.safetensors": saelens, "sae.safetensors": _read_sparsify}
        if (files := [file for file in readers if (path / file).is_file()]) == list(readers):
            raise UserError(f"{path} holds both {' and '.join(files)}: it is not clear which cfg.json describes.")
        for file in files:
            found = readers[file](path, read_cfg(path / "cfg.json"), read_tensors(path / file), input_scale)
            found.info["source"] = {"format": found.kind, "file": file, "sha256": file_sha256(path / file)}
            return found
    inside = sorted(str(cfg.parent) for cfg in path.glob("*/cfg.json")) if path.is_dir() else []
    hint = f" Give one of its folders: {' '.join(inside)}." if inside else ""
    raise UserError(
        f"{path} is no autoencoder: expected OpenAI's FILE.pt, or a folder of SAELens (cfg.json, "
        f"sae_weights.safetensors) or sparsify (cfg.json, sae.safetensors).{hint}"
    )


def from_openai(state: Mapping[str, Tensor], form: SAEForm, source: str, input_scale: float | None = None) -> SAE:
    """Build from OpenAI's state dict, without `activation` and its settings. Raises UserError for entries that are
    neither weights nor statistics."""
    check_tensors(state, OPENAI_WEIGHTS, OPENAI_STATISTICS, source)
    weights = {name.removesuffix(".weight"): state[name] for name in OPENAI_WEIGHTS}
    weights["decoder"] = weights["decoder"].T
    if input_scale is not None:
        scale_input(weights, input_scale)
    return SAE.from_weights(weights, form, source)


def _read_openai(path: Path, input_scale: float | None) -> ExternalSAE:
    state = unwrap(load_pickle(path), path)
    activation = state.pop("activation", "ReLU")
    settings = dict(state.pop("activation_state_dict", {}))
    if "decoder.linear.weight" in state:
        raise UserError(f"{path}: its decoder is tied to its encoder, which is not computed here.")
    if activation == "TopK":
        if settings.get("postact_fn", "ReLU") != "ReLU":
            raise UserError(f"{path}: {settings['postact_fn']} after TopK is not computed here; only ReLU is.")
        form = SAEForm(k=whole_number(settings, "k", str(path)))
        known = {"k", "postact_fn"}
    elif activation == "ReLU":
        form, known = SAEForm("relu", normalization="none"), set()
    else:
        raise UserError(f"{path}: activation {activation!r} is not computed here. Valid: TopK ReLU.")
    if unknown := sorted(settings.keys() - known):
        raise UserError(f"{path}: activation_state_dict has {' '.join(unknown)}, which {activation} does not have.")
    info: dict[str, Any] = {"source": {"format": "openai", "file": path.name, "sha256": file_sha256(path)}}
    # The published folders: LOCATION[_VERSION]/autoencoders/LAYER.pt, trained on windows of 64 tokens of GPT-2 small.
    if re.fullmatch(r"\d+", path.stem):
        info["sae_layer"] = int(path.stem)
    if found := re.match(r"(resid_(?:post|delta)_(?:mlp|attn))(_v\d+\w*)?$", path.absolute().parents[1].name):
        info |= {"location": found[1], "context": 64}
    return ExternalSAE(from_openai(state, form, str(path), input_scale), "openai", info)


def _read_sparsify(path: Path, cfg: dict, tensors: dict[str, Tensor], input_scale: float | None) -> ExternalSAE:
    source = str(path)
    check_fixed(cfg, SPARSIFY_FIXED, source)
    check_keys(cfg, SPARSIFY_KNOWN | SPARSIFY_FIXED.keys(), "sparsify", source)
    if "W_skip" in tensors:
        raise UserError(f"{path}: W_skip: it is a transcoder with a skip connection, not an autoencoder.")
    check_tensors(tensors, SPARSIFY_WEIGHTS.values(), (), source)
    weights = {ours: tensors[theirs] for ours, theirs in SPARSIFY_WEIGHTS.items()}
    num_latents, width = weights["encoder"].shape
    for key, size in (("d_in", width), ("num_latents", num_latents)):
        if (cfg.get(key) or size) != size:  # num_latents 0: expansion_factor times d_in
            raise UserError(f"{path}: cfg.json has {key} {cfg[key]}, but its encoder is {[num_latents, width]}.")
    if input_scale is not None:
        scale_input(weights, input_scale)
    form = SAEForm(k=whole_number(cfg, "k", source), normalization="none")
    sae = SAE.from_weights(weights, form, source)
    folder = path.absolute()
    folder = folder.parent if re.fullmatch(r"seed\d+", folder.name) else folder
    return ExternalSAE(sae, "sparsify", module_hook(folder.name))
