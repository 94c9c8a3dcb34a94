"""Autoencoders in the formats of other projects, and each project's computation with them: dense, in fp64, written from
the formats' formulas and not from our code."""

import json
from collections import OrderedDict

import torch
from safetensors.torch import save_file

WIDTH, LATENTS, K = 24, 96, 5


def tensors(shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def openai_weights():
    shapes = {
        "pre_bias": (WIDTH,),
        "encoder.weight": (LATENTS, WIDTH),
        "latent_bias": (LATENTS,),
        "decoder.weight": (WIDTH, LATENTS),
    }
    return tensors(shapes)


def write_openai(path, activation="TopK", changes=()):
    """A state dict of theirs, with statistics, the activation and its settings beside the weights."""
    state = OrderedDict(openai_weights())
    state["stats_last_nonzero"] = torch.zeros(LATENTS, dtype=torch.int64)
    if activation == "TopK":
        state["latents_activation_frequency"] = torch.ones(LATENTS)
        state["latents_mean_square"] = torch.ones(LATENTS)
        state["activation"] = "TopK"
        state["activation_state_dict"] = OrderedDict(k=K, postact_fn="ReLU")
    state.update(changes)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(OrderedDict((name, value) for name, value in state.items() if value is not None), path)
    return state


def openai_dense(state, x, activation="TopK"):
    """Latents and reconstruction of OpenAI's autoencoder; v5 standardises, v1 and v4 do not."""
    state = {name: value.double() for name, value in state.items() if torch.is_tensor(value)}
    x = x.double()
    mean, std = torch.zeros(()), torch.ones(())
    if activation == "TopK":
        mean = x.mean(-1, keepdim=True)
        std = (x - mean).std(-1, keepdim=True)
    normed = (x - mean) / (std + 1e-5) if activation == "TopK" else x
    pre = (normed - state["pre_bias"]) @ state["encoder.weight"].T + state["latent_bias"]
    latents = keep_largest(pre, K).relu() if activation == "TopK" else pre.relu()
    return latents, (latents @ state["decoder.weight"].T + state["pre_bias"]) * std + mean


SAELENS_6 = {
    "architecture": "topk",
    "d_in": WIDTH,
    "d_sae": LATENTS,
    "k": K,
    "dtype": "float32",
    "device": "cpu",
    "apply_b_dec_to_input": True,
    "normalize_activations": "none",
    "reshape_activations": "none",
    "rescale_acts_by_decoder_norm": False,
    "metadata": {
        "sae_lens_version": "6.16.0",
        "model_name": "gpt2-small",
        "hook_name": "blocks.3.hook_resid_post",
        "prepend_bos": True,
        "context_size": 128,
    },
}
SAELENS_5 = {
    "architecture": "standard",
    "d_in": WIDTH,
    "d_sae": LATENTS,
    "dtype": "torch.float32",
    "device": "cpu",
    "model_name": "gpt2-small",
    "hook_name": "blocks.4.hook_resid_pre",
    "hook_layer": 4,
    "hook_head_index": None,
    "activation_fn_str": "relu",
    "activation_fn_kwargs": {},
    "apply_b_dec_to_input": True,
    "finetuning_scaling_factor": False,
    "normalize_activations": "none",
    "context_size": 128,
    "prepend_bos": True,
    "sae_lens_training_version": "3.20.1",
}
# Published with gpt2-small-res-jb, before version 0.1; SAELens' own test of its loader lists it.
SAELENS_0 = {
    "model_name": "gpt2-small",
    "hook_point": "blocks.4.hook_resid_pre",
    "hook_point_layer": 4,
    "hook_point_head_index": None,
    "dataset_path": "Skylion007/openwebtext",
    "is_dataset_tokenized": False,
    "context_size": 128,
    "use_cached_activations": False,
    "cached_activations_path": "activations/Skylion007_openwebtext/gpt2-small/blocks.4.hook_resid_pre",
    "d_in": WIDTH,
    "n_batches_in_buffer": 128,
    "total_training_tokens": 300000000,
    "store_batch_size": 32,
    "device": "mps",
    "seed": 42,
    "dtype": "torch.float32",
    "b_dec_init_method": "geometric_median",
    "expansion_factor": 4,
    "from_pretrained_path": None,
    "l1_coefficient": 8e-05,
    "lr": 0.0004,
    "lr_scheduler_name": None,
    "lr_warm_up_steps": 5000,
    "model_from_pretrained_kwargs": {"center_writing_weights": True},
    "train_batch_size": 4096,
    "use_ghost_grads": False,
    "feature_sampling_window": 1000,
    "feature_sampling_method": None,
    "resample_batches": 1028,
    "feature_reinit_scale": 0.2,
    "dead_feature_window": 5000,
    "dead_feature_estimation_method": "no_fire",
    "dead_feature_threshold": 1e-08,
    "log_to_wandb": True,
    "wandb_project": "mats_sae_training_gpt2_small_resid_pre_5",
    "wandb_entity": None,
    "wandb_log_frequency": 100,
    "n_checkpoints": 10,
    "checkpoint_path": "checkpoints/y1t51byy",
    "d_sae": LATENTS,
    "tokens_per_buffer": 67108864,
    "run_name": "24576-L1-8e-05-LR-0.0004-Tokens-3.000e+08",
}
SAELENS_1 = {
    "hook_point": "blocks.3.hook_resid_post",
    "hook_point_layer": 3,
    "d_in": WIDTH,
    "d_sae": LATENTS,
    "activation_fn": "relu",
    "normalize_activations": False,
    "apply_b_dec_to_input": True,
    "context_size": 128,
    "model_name": "gpt2-small",
    "dtype": "torch.float32",
    "noise_scale": 0.0,
}


def write_saelens(folder, cfg, extra=()):
    """A folder of theirs; `extra` names tensors [d_sae] beside the four."""
    shapes = {"W_enc": (WIDTH, LATENTS), "b_enc": (LATENTS,), "W_dec": (LATENTS, WIDTH), "b_dec": (WIDTH,)}
    weights = tensors(shapes | {name: (LATENTS,) for name in extra})
    folder.mkdir(parents=True)
    save_file(weights, folder / "sae_weights.safetensors")
    (folder / "cfg.json").write_text(json.dumps(cfg))
    return weights


def saelens_dense(weights, cfg, x):
    """Feature activations and reconstruction of SAELens' standard and topk architectures."""
    w, x = {name: value.double() for name, value in weights.items()}, x.double()
    mean, scale, normed = torch.zeros(()), torch.ones(()), x
    if cfg["normalize_activations"] == "layer_norm":
        mean = x.mean(-1, keepdim=True)
        scale = (x - mean).std(-1, keepdim=True)
        normed = (x - mean) / (scale + 1e-5)
    if cfg["normalize_activations"] == "constant_norm_rescale":
        scale = x.norm(dim=-1, keepdim=True) / WIDTH**0.5
        normed = x / scale
    pre = (normed - w["b_dec"] * cfg["apply_b_dec_to_input"]) @ w["W_enc"] + w["b_enc"]
    norm = w["W_dec"].norm(dim=-1) if cfg.get("rescale_acts_by_decoder_norm") else torch.ones(LATENTS)
    is_topk = cfg.get("architecture") == "topk" or cfg.get("activation_fn_str") == "topk"
    k = cfg.get("k") or (cfg.get("activation_fn_kwargs") or {}).get("k")
    latents = keep_largest(pre * norm, k).relu() if is_topk else pre.relu()
    scaled = latents / norm
    for name in ("scaling_factor", "finetuning_scaling_factor"):
        scaled = scaled * w.get(name, torch.ones(()))
    return latents, (scaled @ w["W_dec"] + w["b_dec"]) * scale + mean


SPARSIFY = {
    "activation": "topk",
    "expansion_factor": 4,
    "normalize_decoder": True,
    "num_latents": 0,
    "k": K,
    "multi_topk": False,
    "skip_connection": False,
    "transcode": False,
    "d_in": WIDTH,
}


def write_sparsify(folder, cfg=None, extra=()):
    """A folder of theirs; `extra` names tensors [D, D] beside the four."""
    shapes = {
        "encoder.weight": (LATENTS, WIDTH),
        "encoder.bias": (LATENTS,),
        "W_dec": (LATENTS, WIDTH),
        "b_dec": (WIDTH,),
    }
    weights = tensors(shapes | {name: (WIDTH, WIDTH) for name in extra})
    folder.mkdir(parents=True)
    save_file(weights, folder / "sae.safetensors")
    (folder / "cfg.json").write_text(json.dumps(cfg or SPARSIFY))
    return weights


def sparsify_dense(weights, x):
    """Latents and reconstruction: ReLU before top-k."""
    w, x = {name: value.double() for name, value in weights.items()}, x.double()
    latents = keep_largest(((x - w["b_dec"]) @ w["encoder.weight"].T + w["encoder.bias"]).relu(), K)
    return latents, latents @ w["W_dec"] + w["b_dec"]


def keep_largest(dense, k):
    """Set all but the k largest of the last dim to 0."""
    top = dense.topk(k, dim=-1)
    return torch.zeros_like(dense).scatter(-1, top.indices, top.values)
