"""Read sparse autoencoders of other projects, and write ours for SAELens. Code inside a pickle is never run.

OpenAI    FILE.pt: pre_bias [D], encoder.weight [C, D], latent_bias [C], decoder.weight [D, C]; TopK with k, inputs
          standardised (v5), or ReLU, inputs as they are (v1, v4)
SAELens   cfg.json, sae_weights.safetensors: W_enc [D, C], b_enc [C], W_dec [C, D], b_dec [D]; keys of 1.x to 6.x
sparsify  cfg.json, sae.safetensors: encoder.weight [C, D], encoder.bias [C], W_dec [C, D], b_dec [D]; TopK; the
          folder is named after the module that it reads

Other scales and shifts in such a file are folded into the four weights, which changes results only by rounding.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from megacocomix.errors import UserError
from megacocomix.files import file_sha256, write_aside
from megacocomix.pickles import load_pickle
from megacocomix.sae.model import SAE, SAEForm

# Hook points of TransformerLens, and modules of transformers' models → our locations.
LENS_HOOKS = {
    "hook_resid_post": "resid_post_mlp",
    "hook_resid_mid": "resid_post_attn",
    "hook_mlp_out": "resid_delta_mlp",
    "hook_attn_out": "resid_delta_attn",
}
MODULE_HOOKS = {
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


# What unexpected values in an external file raise. A pickle that would run code has been refused before.
UNEXPECTED = (TypeError, ValueError, KeyError, AttributeError, IndexError, RuntimeError, OverflowError, RecursionError)


def read_external_sae(path: Path) -> ExternalSAE:
    """Read an autoencoder of any format above, fp32, on the CPU. Raises UserError for anything else, and for a
    computation that ours does not have."""
    try:
        return _read(path)
    except UserError:
        raise
    except UNEXPECTED as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} holds unexpected values ({type(error).__name__}: {reason:.120}).") from None


def _read(path: Path) -> ExternalSAE:
    if path.is_file() and path.suffix in (".pt", ".pth"):
        return _read_openai(path)
    if (path / "cfg.json").is_file():
        for file, read in (("sae_weights.safetensors", _read_saelens), ("sae.safetensors", _read_sparsify)):
            if (path / file).is_file():
                found = read(path, _read_cfg(path / "cfg.json"), _read_tensors(path / file))
                found.info["source"] = {"format": found.kind, "file": file, "sha256": file_sha256(path / file)}
                return found
    inside = sorted(str(cfg.parent) for cfg in path.glob("*/cfg.json")) if path.is_dir() else []
    hint = f" Give one of its folders: {' '.join(inside)}." if inside else ""
    raise UserError(
        f"{path} is no autoencoder: expected OpenAI's FILE.pt, or a folder of SAELens (cfg.json, "
        f"sae_weights.safetensors) or sparsify (cfg.json, sae.safetensors).{hint}"
    )


def from_openai(state: Mapping[str, Tensor], form: SAEForm, source: str) -> SAE:
    """Build from OpenAI's state dict. Other entries, such as activation statistics, are ignored."""
    weights = {name.removesuffix(".weight"): weight for name, weight in state.items()}
    if torch.is_tensor(weights.get("decoder")) and weights["decoder"].dim() == 2:
        weights["decoder"] = weights["decoder"].T
    return SAE.from_weights(weights, form, source)


def _read_openai(path: Path) -> ExternalSAE:
    state = load_pickle(path)
    activation = state.pop("activation", "ReLU")
    settings = dict(state.pop("activation_state_dict", {}))
    if "decoder.linear.weight" in state:
        raise UserError(f"{path}: its decoder is tied to its encoder, which is not computed here.")
    if activation == "TopK":
        if settings.get("postact_fn", "ReLU") != "ReLU":
            raise UserError(f"{path}: {settings['postact_fn']} after TopK is not computed here; only ReLU is.")
        form = SAEForm(k=_number(settings, "k", path))
    elif activation == "ReLU":
        form = SAEForm("relu", normalization="none")
    else:
        raise UserError(f"{path}: activation {activation!r} is not computed here. Valid: TopK ReLU.")
    info: dict[str, Any] = {"source": {"format": "openai", "file": path.name, "sha256": file_sha256(path)}}
    # The published folders: LOCATION[_VERSION]/autoencoders/LAYER.pt, trained on windows of 64 tokens of GPT-2 small.
    if re.fullmatch(r"\d+", path.stem):
        info["sae_layer"] = int(path.stem)
    if found := re.match(r"(resid_(?:post|delta)_(?:mlp|attn))(_v\d+\w*)?$", path.absolute().parents[1].name):
        info |= {"location": found[1], "context": 64}
    return ExternalSAE(from_openai(state, form, str(path)), "openai", info)


def _read_saelens(path: Path, cfg: dict, tensors: dict[str, Tensor]) -> ExternalSAE:
    about = {**cfg, **(cfg.get("metadata") or {})}
    architecture = cfg.get("architecture", "standard")
    activation = about.get("activation_fn_str") or about.get("activation_fn") or "relu"
    if architecture == "topk" or (architecture == "standard" and activation == "topk"):
        k = cfg.get("k") or (about.get("activation_fn_kwargs") or {}).get("k")
        form = {"activation": "topk", "k": _number({"k": k}, "k", path)}
    elif architecture == "standard" and activation == "relu":
        form = {"activation": "relu"}
    else:
        raise UserError(
            f"{path}: {architecture} with {activation} is not computed here. Valid: standard topk, with relu."
        )
    if cfg.get("reshape_activations", "none") != "none":
        raise UserError(f"{path}: reshape_activations {cfg['reshape_activations']} is not computed here.")
    names = ("W_enc", "b_enc", "W_dec", "b_dec")
    if missing := [name for name in names if name not in tensors]:
        raise UserError(f"{path}: tensors missing: {' '.join(missing)}.")
    encoder_DC, latent_bias_C, decoder_CD, pre_bias_D = (tensors[name].float() for name in names)
    for name in ("scaling_factor", "finetuning_scaling_factor"):
        if name in tensors:
            decoder_CD = decoder_CD * tensors[name].float()[:, None]
    if cfg.get("rescale_acts_by_decoder_norm"):
        norm_C = decoder_CD.norm(dim=1)
        encoder_DC, latent_bias_C = encoder_DC * norm_C, latent_bias_C * norm_C
        decoder_CD = decoder_CD / norm_C[:, None]
    for key, size in (("d_in", encoder_DC.shape[0]), ("d_sae", encoder_DC.shape[1])):
        if cfg.get(key, size) != size:
            raise UserError(f"{path}: cfg.json has {key} {cfg[key]}, but W_enc is {list(encoder_DC.shape)}.")
    subtracts = cfg.get("apply_b_dec_to_input", True)
    if not isinstance(subtracts, bool):
        raise UserError(f"{path}: apply_b_dec_to_input {subtracts!r} is neither true nor false.")
    if not subtracts:
        latent_bias_C = latent_bias_C + pre_bias_D @ encoder_DC  # undoes the pre_bias that we subtract
    normalize = cfg.get("normalize_activations", "none")
    normalize = {True: "expected_average_only_in", False: "none", None: "none"}.get(normalize, normalize)
    kinds = {"layer_norm": "standardize", "constant_norm_rescale": "rescale", "none": "none"}
    kinds["expected_average_only_in"] = "none"  # its scale is folded into the weights before they are published
    if normalize not in kinds:
        raise UserError(f"{path}: normalize_activations {normalize} is not computed here. Valid: {' '.join(kinds)}.")
    is_centered = (about.get("model_from_pretrained_kwargs") or {}).get("center_writing_weights", False)
    form["normalization"] = "center" if is_centered and kinds[normalize] == "none" else kinds[normalize]
    weights = {"encoder": encoder_DC.T, "latent_bias": latent_bias_C, "decoder": decoder_CD, "pre_bias": pre_bias_D}
    info = _lens_hook(path, about.get("hook_name") or about.get("hook_point"))
    info |= {"teacher": about.get("model_name"), "context": about.get("context_size")}
    return ExternalSAE(
        SAE.from_weights(weights, SAEForm(**form), str(path)),
        "saelens",
        {key: value for key, value in info.items() if value is not None},
    )


def _read_sparsify(path: Path, cfg: dict, tensors: dict[str, Tensor]) -> ExternalSAE:
    for key, valid in (("activation", "topk"), ("signed", False), ("transcode", False), ("skip_connection", False)):
        if cfg.get(key, valid) != valid:
            raise UserError(f"{path}: {key} {cfg[key]} is not computed here; only {valid} is.")
    if "W_skip" in tensors:
        raise UserError(f"{path}: it is a transcoder with a skip connection, not an autoencoder.")
    theirs = {"encoder": "encoder.weight", "latent_bias": "encoder.bias", "decoder": "W_dec", "pre_bias": "b_dec"}
    weights = {ours: tensors[name] for ours, name in theirs.items() if name in tensors}
    sae = SAE.from_weights(weights, SAEForm(k=_number(cfg, "k", path), normalization="none"), str(path))
    folder = path.absolute()
    folder = folder.parent if re.fullmatch(r"seed\d+", folder.name) else folder
    found = re.fullmatch(r"(?:[\w.]+\.)?(?:layers|h|blocks)\.(\d+)(\.\w+)?", folder.name)
    info = {}
    if found and (found[2] or "") in MODULE_HOOKS:
        info = {"sae_layer": int(found[1]), "location": MODULE_HOOKS[found[2] or ""]}
    return ExternalSAE(sae, "sparsify", info)


def _lens_hook(path: Path, name: str | None) -> dict[str, Any]:
    """Block and location of a TransformerLens hook point. A block's input is the output of the block before."""
    found = re.fullmatch(r"blocks\.(\d+)\.(hook_\w+)", name or "")
    if name and found and found[2] == "hook_resid_pre" and int(found[1]) > 0:
        return {"sae_layer": int(found[1]) - 1, "location": "resid_post_mlp"}
    if name and (not found or found[2] not in LENS_HOOKS):
        raise UserError(f"{path}: hook {name} is not a residual location of a block. Valid: {' '.join(LENS_HOOKS)}.")
    return {"sae_layer": int(found[1]), "location": LENS_HOOKS[found[2]]} if found else {}


def write_saelens(sae: SAE, folder: Path) -> None:
    """Write a folder that SAELens 6 loads with `SAE.load_from_disk`, with the same values and reconstructions. Raises
    UserError for an eps that SAELens cannot represent."""
    kinds = {"standardize": "layer_norm", "rescale": "constant_norm_rescale", "none": "none", "center": "none"}
    if sae.form.normalization == "standardize" and sae.form.eps != 1e-5:
        raise UserError(f"SAELens' layer_norm adds 1e-5 to the std; this autoencoder adds {sae.form.eps}.")
    hook = {location: hook for hook, location in LENS_HOOKS.items()}.get(sae.info.get("location"))
    metadata = {
        "sae_lens_version": "6.16.0",  # the version that defines these keys
        "model_name": sae.info.get("teacher"),
        "hook_name": f"blocks.{sae.info['sae_layer']}.{hook}" if hook and "sae_layer" in sae.info else None,
        "context_size": sae.info.get("context"),
        "prepend_bos": False,
        "model_from_pretrained_kwargs": {"center_writing_weights": sae.form.normalization == "center"},
    }
    cfg = {
        "architecture": "topk" if sae.form.activation == "topk" else "standard",
        "d_in": sae.width,
        "d_sae": sae.num_latents,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": kinds[sae.form.normalization],
        "reshape_activations": "none",
        "metadata": {key: value for key, value in metadata.items() if value is not None},
    }
    if sae.form.activation == "topk":
        cfg |= {"k": sae.form.k, "rescale_acts_by_decoder_norm": False}
    tensors = {"W_enc": sae.encoder.T, "b_enc": sae.latent_bias, "W_dec": sae.decoder, "b_dec": sae.pre_bias}
    with write_aside(folder) as aside:
        aside.mkdir()
        weights = {name: tensor.detach().float().contiguous() for name, tensor in tensors.items()}
        save_file(weights, aside / "sae_weights.safetensors")
        (aside / "cfg.json").write_text(json.dumps(cfg, indent=1) + "\n")


def _number(values: Mapping[str, Any], key: str, path: Path) -> int:
    value = values.get(key)
    value = value.item() if torch.is_tensor(value) else value
    if type(value) is not int:
        raise UserError(f"{path}: its {key} is missing or not a whole number.")
    return value


def _read_cfg(file: Path) -> dict:
    try:
        return dict(json.loads(file.read_bytes()))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{file} is damaged ({error!r:.80}).") from None


def _read_tensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is truncated or damaged: {error}.") from None
