"""Read and write folders of SAELens: cfg.json and sae_weights.safetensors (W_enc [D, C], b_enc [C], W_dec [C, D],
b_dec [D]) of its versions 0.4 to 6.54, architectures standard and topk.

What `normalize_activations` means, and where its factor is (from SAELens' own sources):

    value                      versions      x is divided by, before W_enc
    none, false, absent        all           nothing
    constant_norm_rescale      3.1 to 6      norm(x) / sqrt(D), row by row
    layer_norm                 3.9 to 6      the std of the row, after its mean was subtracted; eps 1e-5
    expected_average_only_in,  3.1 to 6,     one number for all rows: the mean norm of the training rows / sqrt(D). The
    true                       1.8 to 3.0    weights of a file that states it do not contain the factor
    covariance_whitening       6.5x          not one number: refused here

An autoencoder that finished training has the factor in its weights and states `none` (3.13 to 6). Checkpoints written
in between, and everything before 3.13, state the value above. 6.x keeps their factor in activation_scaler.json, 5.x in
activations_store_state.safetensors. Other versions keep it nowhere: SAELens looks it up in its list of published
autoencoders (norm_scaling_factor), and here it has to be given as an option.

3.13 to 5.0 state `none` for finished autoencoders that were trained with constant_norm_rescale or layer_norm, too.
SAELens itself then computes them without normalising; only measuring shows the loss.

Whether the teacher's residual had its mean, where `center_writing_weights` is absent from cfg.json:

    trained by                       the mean of a teacher with LayerNorm was
    up to 3.19.1, or `hook_point`    removed: HookedTransformer.from_pretrained does that by default
    3.19.2 and later                 kept: from_pretrained_no_processing
    not recorded                     unknown: an option has to say

Up to 3.19.1, cfg.json does not record how the teacher was loaded, or records {}, which is the default.
"""

import json
import math
import re
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megacocomix.errors import UserError
from megacocomix.files import write_aside
from megacocomix.sae.external import (
    ExternalSAE,
    check_fixed,
    check_keys,
    check_tensors,
    flag,
    module_hook,
    read_cfg,
    scale_input,
    whole_number,
)
from megacocomix.sae.model import CENTERED, SAE, SAEForm

# Hook points of TransformerLens → our locations.
HOOKS = {
    "hook_resid_post": "resid_post_mlp",
    "hook_resid_mid": "resid_post_attn",
    "hook_mlp_out": "resid_delta_mlp",
    "hook_attn_out": "resid_delta_attn",
}
INPUT_HOOKS = ("hook_resid_pre", "hook_in")
NORMALIZATIONS = {
    "none": "none",
    "constant_norm_rescale": "rescale",
    "layer_norm": "standardize",
    "expected_average_only_in": "none",
}
WEIGHTS = {"encoder": "W_enc", "latent_bias": "b_enc", "decoder": "W_dec", "pre_bias": "b_dec"}
DTYPES = ("float16", "bfloat16", "float32", "float64")

# Settings that are read below, or have the one value that is computed here.
READ = {
    "architecture", "d_in", "d_sae", "k", "apply_b_dec_to_input", "normalize_activations", "metadata",
    "rescale_acts_by_decoder_norm", "hook_name", "hook_point", "hook_layer", "hook_point_layer", "model_name",
    "context_size", "model_from_pretrained_kwargs", "seqpos_slice",
}  # fmt: skip
# 6.x ignores these; a file that has them beside its metadata was not written by any version.
READ_BEFORE_6 = {"activation_fn", "activation_fn_str", "activation_fn_kwargs", "finetuning_scaling_factor"}
FIXED = {
    "dtype": (*DTYPES, *(f"torch.{dtype}" for dtype in DTYPES)),
    "reshape_activations": ("none",),  # hook_z: heads side by side
    "hook_head_index": (),  # one attention head
    "hook_point_head_index": (),
    "hook_head_index_out": (),  # the output is another place than the input: a transcoder
    "hook_name_out": (),
    "hf_hook_name_out": (),
    "model_kwargs": ({},),  # how the teacher is run
    "use_error_term": (False,),  # adds x - x_hat to x_hat
}
# How the teacher was loaded, without a change of the residual. TransformerLens' other options change it, or are another
# teacher. center_writing_weights removes its mean, which is computed here; revision is recorded.
MODEL_KWARGS = {
    "center_writing_weights", "fold_ln", "center_unembed", "fold_value_biases", "refactor_factored_attn_matrices",
    "revision", "dtype", "torch_dtype", "device", "n_devices", "device_map", "move_to_device", "trust_remote_code",
    "default_prepend_bos", "default_padding_side", "low_cpu_mem_usage", "attn_implementation",
}  # fmt: skip
# The first version that by default loads the teacher without centring it (bisected from the published wheels).
UNCENTERED_SINCE = (3, 19, 2)
# TransformerLens centres these teachers; those with RMSNorm it leaves as they are, whatever the setting says.
LAYERNORM_MODELS = r"(?:[\w.-]+/)?(?:(?:distil)?gpt2|pythia-|opt-|gpt-neo|gpt-?j)"
# Settings of some version that change neither what is computed nor where: data, initial values, losses, schedules,
# logs, and resampling (before 0.1). Weights are stored as training left them. Also harmless: `noise_scale`, the noise
# that 3.0 and later add in training only; `prepend_bos` and `exclude_special_tokens`, which choose training rows, where
# the teacher's own windows are measured here; `hf_hook_name`, another name of the hook.
HARMLESS = """
    adam_beta1 adam_beta2 autocast aux_loss_coefficient b_dec_init_method cached_activations_path
    checkpoint_path compile_llm compile_sae dataset_path dataset_trust_remote_code
    dead_feature_estimation_method dead_feature_threshold dead_feature_window decoder_heuristic_init
    decoder_heuristic_init_norm decoder_init_norm decoder_orthogonal_init device eval_batch_size_prompts
    eval_every_n_wandb_logs exclude_special_tokens expansion_factor feature_reinit_scale feature_sampling_method
    feature_sampling_window finetuning_method finetuning_tokens from_pretrained_path hf_hook_name
    hook_point_eval init_encoder_as_decoder_transpose is_dataset_tokenized jumprelu_bandwidth
    jumprelu_init_threshold l1_coefficient l1_warm_up_steps llm_compilation_mode log_activations_store_to_wandb
    log_optimizer_state_to_wandb log_to_wandb lp_norm lr lr_decay_steps lr_end lr_scheduler_name
    lr_warm_up_steps model_class_name mse_loss_normalization n_batches_in_buffer n_checkpoints n_eval_batches
    n_eval_seqs n_restart_cycles neuronpedia_id noise_scale normalize_sae_decoder prepend_bos resample_batches
    resume run_name sae_compilation_mode sae_lens_training_version sae_lens_version
    scale_sparsity_penalty_by_decoder_norm seed store_batch_size store_batch_size_prompts streaming
    tokens_per_buffer total_training_tokens train_batch_size train_batch_size_tokens training_tokens
    use_cached_activations use_ghost_grads use_sparse_activations verbose wandb_entity wandb_id
    wandb_log_frequency wandb_project
"""


def read_saelens(
    path: Path,
    cfg: dict,
    tensors: dict[str, Tensor],
    input_scale: float | None,
    center: bool | None,
    has_layernorm: bool | None,
) -> ExternalSAE:
    """`input_scale` is the factor of `expected_average_only_in` where the folder does not record it. Unless `center` is
    None, the caller removes the mean or keeps it, and what the folder states about that is not used. `has_layernorm` is
    about the teacher; None: as its name says."""
    source = str(path)
    if not isinstance(metadata := cfg.get("metadata", {}), dict):
        raise UserError(f"{path}: metadata {json.dumps(metadata)} in cfg.json is not an object.")
    about = {**cfg, **metadata}
    form = _activation(cfg, source)
    known = READ | FIXED.keys() | set(HARMLESS.split()) | (set() if "metadata" in cfg else READ_BEFORE_6)
    check_keys(cfg, known, "SAELens", source)  # its metadata may hold anything, because nothing is computed with it
    check_fixed(about, FIXED, source)
    if any(place is not None for place in about.get("seqpos_slice") or ()):
        raise UserError(
            f"{path}: it was trained on the positions {about['seqpos_slice']} of a window, and here it would read all. "
            "If that is right, remove seqpos_slice from cfg.json."
        )
    finetuning = _finetuning_factor(cfg, tensors, source)
    harmless = {"scaling_factor", "finetuning_scaling_factor"}  # the one that is used has been taken already
    check_tensors(tensors, WEIGHTS.values(), harmless, source)
    weights = {ours: tensors[theirs].float() for ours, theirs in WEIGHTS.items()}
    width, num_latents = tensors["W_enc"].shape
    for key, size in (("d_in", width), ("d_sae", num_latents)):
        if cfg.get(key, size) != size:
            raise UserError(f"{path}: cfg.json has {key} {cfg[key]}, but W_enc is {[width, num_latents]}.")
    weights["encoder"] = weights["encoder"].T
    if finetuning is not None:
        weights["decoder"] = weights["decoder"] * finetuning[:, None]
    normalize, recorded_factor = _normalization(path, cfg), None
    if normalize == "expected_average_only_in":
        recorded_factor = _recorded_factor(path)
        scale_input(weights, _average_factor(path, recorded_factor, input_scale))
    elif input_scale is not None:
        scale_input(weights, input_scale)
    if flag(cfg, "rescale_acts_by_decoder_norm", False, source):
        if form.get("activation") != "topk":
            raise UserError(f"{path}: rescale_acts_by_decoder_norm belongs to the architecture topk.")
        norm_C = weights["decoder"].norm(dim=1)
        weights["encoder"] = weights["encoder"] * norm_C[:, None]
        weights["latent_bias"] = weights["latent_bias"] * norm_C
        weights["decoder"] = F.normalize(weights["decoder"], dim=1)  # a row of zeros stays one
    if not flag(cfg, "apply_b_dec_to_input", True, source):
        undone_C = weights["encoder"] @ weights["pre_bias"]  # of the pre_bias that we subtract
        weights["latent_bias"] = weights["latent_bias"] + undone_C
    model_kwargs = about.get("model_from_pretrained_kwargs") or {}
    if unknown := sorted(set(model_kwargs) - MODEL_KWARGS):
        raise UserError(
            f"{path}: its teacher was loaded with {' '.join(unknown)}, which may change what it reads. If the teacher "
            "here is the same, remove them from model_from_pretrained_kwargs in cfg.json."
        )
    form["normalization"] = NORMALIZATIONS[normalize]
    if center is None and form["normalization"] in CENTERED and _is_centered(path, about, model_kwargs, has_layernorm):
        form["normalization"] = CENTERED[form["normalization"]]
    info = _hook(path, about)
    info |= {"teacher": about.get("model_name"), "context": about.get("context_size")}
    info["revision"] = model_kwargs.get("revision")
    return ExternalSAE(
        SAE.from_weights(weights, SAEForm(**form), source),
        "saelens",
        {key: value for key, value in info.items() if value is not None},
        recorded_factor,
    )


def _is_centered(path: Path, about: dict, model_kwargs: dict, has_layernorm: bool | None) -> bool:
    """Whether the residual that it was trained on had no mean. Raises UserError where the folder does not say."""
    centers = _was_centered_by_default(about)
    if "center_writing_weights" in model_kwargs:
        centers = flag(model_kwargs, "center_writing_weights", False, str(path))
    if centers is False or has_layernorm is False:
        return False
    if centers is None:
        raise UserError(
            f"{path}: cfg.json records neither center_writing_weights nor the version of SAELens that trained it "
            "(before 3.19.2 it removed the mean of the residual): give --center if the mean was removed, else "
            "--no-center."
        )
    if not has_layernorm and not re.match(LAYERNORM_MODELS, name := str(about.get("model_name"))):
        raise UserError(
            f"{path}: center_writing_weights (true by default before SAELens 3.19.2) removes the mean only if the "
            f"teacher has LayerNorm, and {name} is not known to have it: give --center if it has, --no-center if it "
            "has RMSNorm."
        )
    return True


def _was_centered_by_default(about: dict) -> bool | None:
    """What the version that trained it did; None if that is not recorded."""
    version = about.get("sae_lens_training_version", about.get("sae_lens_version"))  # as 6.x reads it
    if found := re.match(r"(\d+)\.(\d+)\.(\d+)", str(version)):
        return tuple(map(int, found.groups())) < UNCENTERED_SINCE
    return True if "hook_point" in about else None  # the name before 3.0


def _activation(cfg: dict, source: str) -> dict[str, Any]:
    """activation and k of SAEForm. Before 6.x, topk is an activation of the architecture standard."""
    architecture = cfg.get("architecture", "standard")
    is_before_6 = "metadata" not in cfg
    names = [cfg[key] for key in ("activation_fn", "activation_fn_str") if is_before_6 and cfg.get(key)] or ["relu"]
    if architecture not in ("standard", "topk") or any(name not in ("relu", "topk") for name in names):
        raise UserError(
            f"{source}: {architecture} with {names[0]} is not computed here. Valid: standard topk, with relu."
        )
    if len({*names}) > 1:
        raise UserError(f"{source}: activation_fn {names[0]} and activation_fn_str {names[1]} contradict each other.")
    arguments = dict((is_before_6 and cfg.get("activation_fn_kwargs")) or {})
    check_fixed(arguments, {"signed": (False,)}, source)
    if unknown := sorted(arguments.keys() - {"k", "signed"}):
        raise UserError(f"{source}: activation_fn_kwargs {' '.join(unknown)} is not computed here; only k is.")
    given = [values["k"] for values in (cfg, arguments) if values.get("k") is not None]
    if architecture == "standard" and names[0] == "relu":
        if given:
            raise UserError(f"{source}: k {given[0]} belongs to topk, but the activation is relu.")
        return {"activation": "relu"}
    if len({*given}) > 1:
        raise UserError(f"{source}: k {given[0]} and activation_fn_kwargs k {given[1]} contradict each other.")
    return {"activation": "topk", "k": whole_number({"k": given[0] if given else None}, "k", source)}


def _finetuning_factor(cfg: dict, tensors: dict[str, Tensor], source: str) -> Tensor | None:
    """What latents are multiplied by before the decoder, [C]. 0.x to 2.x (`hook_point`) always do it, and later
    versions if `finetuning_scaling_factor` is true. 6.x does not, and refuses a factor other than 1, as later versions
    do if the setting is false."""
    names = [name for name in ("scaling_factor", "finetuning_scaling_factor") if name in tensors]
    if len(names) > 1:
        raise UserError(f"{source} holds both {' and '.join(names)}: it is not clear which is meant.")
    if not names:
        return None
    check_tensors({names[0]: tensors[names[0]]}, names, (), source)
    factor_C = tensors[names[0]].float()
    if factor_C.shape != tensors.get("b_enc", factor_C).shape:
        raise UserError(f"{source}: {names[0]} is {list(factor_C.shape)}, not one number for each latent.")
    if torch.allclose(factor_C, torch.ones_like(factor_C)):
        return None
    if not flag(cfg, "finetuning_scaling_factor", "hook_point" in cfg, source):
        raise UserError(f"{source} holds a {names[0]} that is not 1, but finetuning_scaling_factor is not true.")
    return factor_C


def _normalization(path: Path, cfg: dict) -> str:
    value = cfg.get("normalize_activations")
    name = {True: "expected_average_only_in", False: "none", None: "none"}.get(value, value)
    if name not in NORMALIZATIONS:
        valid = " ".join(NORMALIZATIONS)
        raise UserError(f"{path}: normalize_activations {name} is not computed here. Valid: {valid}.")
    if name != "expected_average_only_in" and (factor := _scaler_factor(path)) is not None:
        raise UserError(
            f"{path}: activation_scaler.json has the factor {factor}, but normalize_activations is {name}. Remove "
            "the file if the weights contain the factor, else set expected_average_only_in in cfg.json."
        )
    return name


def _recorded_factor(path: Path) -> float | None:
    recorded = _scaler_factor(path)
    return _store_factor(path) if recorded is None else recorded


def _average_factor(path: Path, recorded: float | None, given: float | None) -> float:
    """What the inputs have to be multiplied by: as recorded, else as given."""
    if recorded is not None and given is not None:
        raise UserError(f"{path} records the factor {recorded:.6g} of its inputs: leave out --input-scale.")
    if (factor := given if recorded is None else recorded) is None:
        raise UserError(
            f"{path}: normalize_activations expected_average_only_in multiplies inputs by a factor that the folder "
            "does not record (activation_scaler.json): give --input-scale X, or 1 if the weights contain it already. "
            "SAELens lists it as norm_scaling_factor; it is sqrt(width) / mean norm of the residual."
        )
    return factor


def _scaler_factor(path: Path) -> float | None:
    if not (file := path / "activation_scaler.json").is_file():
        return None
    if (scaler := read_cfg(file)).get("has_whitening"):
        raise UserError(f"{file} states has_whitening: its inputs were whitened, which is not computed here.")
    return _positive(scaler.get("scaling_factor"), file)


def _store_factor(path: Path) -> float | None:
    if not (file := path / "activations_store_state.safetensors").is_file():
        return None
    try:
        with safe_open(file, framework="pt") as opened:  # may also hold activations, which are large
            name = "estimated_norm_scaling_factor"
            return _positive(opened.get_tensor(name).item(), file) if name in opened.keys() else None  # noqa: SIM118
    except SafetensorError as error:
        raise UserError(f"{file} is truncated or damaged: {error}.") from None


def _positive(factor: Any, file: Path) -> float | None:
    if factor is not None and (isinstance(factor, bool) or not math.isfinite(factor) or factor <= 0):
        raise UserError(f"{file}: the factor {factor} of the inputs is not a positive number.")
    return factor


def _hook(path: Path, about: dict) -> dict[str, Any]:
    """Block and location of a hook point: TransformerLens' name, or transformers' name of a module, which may end in
    .hook_out. A block's input is the output of the block before."""
    name = about.get("hook_name") or about.get("hook_point")
    if not name:
        return {}
    found = re.fullmatch(r"blocks\.(\d+)\.(hook_\w+)", name)
    hook = module_hook(name.removesuffix(".hook_out"))
    is_input = bool(found) and found[2] in INPUT_HOOKS and found[1] != "0"
    if is_input:
        hook = {"sae_layer": int(found[1]) - 1, "location": "resid_post_mlp"}
    elif found and found[2] in HOOKS:
        hook = {"sae_layer": int(found[1]), "location": HOOKS[found[2]]}
    if not hook:
        raise UserError(
            f"{path}: hook {name} is not a residual location of a block. Valid: {' '.join(HOOKS)}, or a block, its MLP "
            "or its attention as transformers names them."
        )
    layer = hook["sae_layer"] + is_input
    for key in ("hook_layer", "hook_point_layer"):
        if about.get(key) not in (None, layer, str(layer)):
            raise UserError(f"{path}: {key} {about[key]} contradicts the hook {name}.")
    return hook


def write_saelens(sae: SAE, folder: Path) -> None:
    """Write a folder that SAELens 6 loads with `SAE.load_from_disk`, with the same values and reconstructions. Raises
    UserError for an eps that SAELens cannot represent."""
    is_centered = sae.form.normalization in CENTERED.values()
    kinds = {"standardize": "layer_norm", "rescale": "constant_norm_rescale", "none": "none"}
    kinds |= {after: kinds[before] for before, after in CENTERED.items()}
    if sae.form.normalization == "standardize" and sae.form.eps != 1e-5:
        raise UserError(f"SAELens' layer_norm adds 1e-5 to the std; this autoencoder adds {sae.form.eps}.")
    hook = {location: hook for hook, location in HOOKS.items()}.get(sae.info.get("location"))
    metadata = {
        "sae_lens_version": "6.16.0",  # the version that defines these keys
        "model_name": sae.info.get("teacher"),
        "hook_name": f"blocks.{sae.info['sae_layer']}.{hook}" if hook and "sae_layer" in sae.info else None,
        "context_size": sae.info.get("context"),
        "prepend_bos": False,
        "model_from_pretrained_kwargs": {"center_writing_weights": is_centered},
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
