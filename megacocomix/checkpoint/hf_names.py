"""Our parameter names and layouts ⇄ Hugging Face GPT-2's, and the published CoCoMix code's.

Hugging Face keeps linear weights as Conv1D, [in, out], and lays Q, K and V side by side; ours are [out, in] with Q, K
and V of a head together (see model.gpt2.QKV). The published CoCoMix code adds three modules to `transformer`; those
below them are our baselines'.
"""

from collections.abc import Callable

import torch
from torch import Tensor

OUTER = {
    "embed.tokens.weight": "transformer.wte.weight",
    "embed.positions.weight": "transformer.wpe.weight",
    "norm.weight": "transformer.ln_f.weight",
    "norm.bias": "transformer.ln_f.bias",
    "concept.pre_bias": "transformer.pre_bias",
    "concept.predict.weight": "transformer.concept_predictor.weight",
    "concept.predict.bias": "transformer.concept_predictor.bias",
    "concept.compress.weight": "transformer.compress_layer.weight",
    "concept.compress.bias": "transformer.compress_layer.bias",
    "concept.predict_hidden.up.weight": "transformer.hidden_predictor.up.weight",
    "concept.predict_hidden.up.bias": "transformer.hidden_predictor.up.bias",
    "concept.predict_hidden.down.weight": "transformer.hidden_predictor.down.weight",
    "concept.predict_hidden.down.bias": "transformer.hidden_predictor.down.bias",
    "concept.project.weight": "transformer.project_layer.weight",
    "concept.project.bias": "transformer.project_layer.bias",
    "concept.pause": "transformer.pause_vector",
}
INNER = {
    "norm_1": "ln_1",
    "attention.qkv": "attn.c_attn",
    "attention.out": "attn.c_proj",
    "norm_2": "ln_2",
    "mlp.up": "mlp.c_fc",
    "mlp.down": "mlp.c_proj",
}
TRANSPOSED = (
    "attention.qkv.weight",
    "attention.out.weight",
    "mlp.up.weight",
    "mlp.down.weight",
    "concept.compress.weight",
)


def hf_name(name: str) -> str:
    """`blocks.0.mlp.up.weight` → `transformer.h.0.mlp.c_fc.weight`."""
    if name in OUTER:
        return OUTER[name]
    _, index, inner = name.split(".", 2)
    module, kind = inner.rsplit(".", 1)
    return f"transformer.h.{index}.{INNER[module]}.{kind}"


def to_hf(name: str, tensor: Tensor, num_heads: int) -> tuple[str, Tensor]:
    """Our (name, tensor) → theirs."""
    if ".attention.qkv." in name:  # [H, 3, D/H, …] → [3, H, D/H, …]
        tensor = tensor.unflatten(0, (num_heads, 3, -1)).transpose(0, 1).flatten(0, 2)
    if name.endswith(TRANSPOSED):
        tensor = tensor.T
    return hf_name(name), tensor.contiguous()


def from_hf(name: str, read: Callable[[str], Tensor], num_heads: int) -> Tensor:
    """Our tensor `name`, from theirs, which `read` fetches by their name."""
    tensor = read(hf_name(name))
    if name.endswith(TRANSPOSED):
        tensor = tensor.T
    if ".attention.qkv." in name:  # [3, H, D/H, …] → [H, 3, D/H, …]
        tensor = tensor.unflatten(0, (3, num_heads, -1)).transpose(0, 1).flatten(0, 2)
    return tensor.contiguous()


@torch.no_grad()
def load_hf_weights(model, read: Callable[[str], Tensor], num_heads: int) -> None:
    """Copy a Hugging Face state into our `model`, parameter by parameter."""
    for name, parameter in model.named_parameters():
        parameter.copy_(from_hf(name, read, num_heads))
