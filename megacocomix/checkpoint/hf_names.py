"""Our parameter names and layouts ⇄ those of Hugging Face's GPT-2 and of the published CoCoMix code.

Hugging Face stores linear weights as Conv1D, [in, out], with Q, K and V side by side. Ours are [out, in], with the Q,
K and V of one head together (see model.gpt2.QKV). The published CoCoMix code adds three modules to `transformer`: up to
`concept.compress` in OUTER. The names after it belong to our baselines.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from megacocomix.checkpoint.tensors import write_safetensors
from megacocomix.config.schema import ModelConfig
from megacocomix.model.gpt2 import LAYER_NORM_EPS

COCOMIX_FORMAT = 1
"""Version of what config.json of an exported model with concepts means. A file without `cocomix_format` is of version
1."""
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
    """Our (name, tensor) → Hugging Face's."""
    if ".attention.qkv." in name:  # [H, 3, D/H, …] → [3, H, D/H, …]
        tensor = tensor.unflatten(0, (num_heads, 3, -1)).transpose(0, 1).flatten(0, 2)
    if name.endswith(TRANSPOSED):
        tensor = tensor.T
    return hf_name(name), tensor.contiguous()


def from_hf(name: str, read: Callable[[str], Tensor], num_heads: int) -> Tensor:
    """Our tensor `name`. `read` fetches a tensor by its Hugging Face name."""
    tensor = read(hf_name(name))
    if name.endswith(TRANSPOSED):
        tensor = tensor.T
    if ".attention.qkv." in name:  # [3, H, D/H, …] → [H, 3, D/H, …]
        tensor = tensor.unflatten(0, (3, num_heads, -1)).transpose(0, 1).flatten(0, 2)
    return tensor.contiguous()


def gpt2_config(shape: ModelConfig) -> dict:
    """The sizes and settings of our model, in the keys of Hugging Face's GPT-2."""
    return {
        "n_layer": shape.num_layers,
        "n_embd": shape.hidden_size,
        "n_head": shape.num_heads,
        "n_positions": shape.context,
        "vocab_size": shape.vocab_size,
        "layer_norm_epsilon": LAYER_NORM_EPS,
        "attn_pdrop": shape.dropout,
        "embd_pdrop": shape.dropout,
        "resid_pdrop": shape.dropout,
        "tie_word_embeddings": True,
    }


def hf_shapes(shapes: Mapping[str, torch.Size], num_heads: int) -> dict[str, torch.Size]:
    """Our names and shapes → Hugging Face's."""
    pairs = (to_hf(name, torch.empty(shape, device="meta"), num_heads) for name, shape in shapes.items())
    return {name: tensor.shape for name, tensor in pairs}


def write_hf_weights(
    file: Path,
    shapes: Mapping[str, torch.Size],
    read: Callable[[str], Tensor],
    num_heads: int,
    dtype: str = "float32",
) -> None:
    """Write our parameters, of these `shapes`, as a safetensors file in Hugging Face's names and layouts. `read`
    fetches a parameter by our name."""
    ours = {hf_name(name): name for name in shapes}
    read_hf = lambda name: to_hf(ours[name], read(ours[name]), num_heads)[1]
    write_safetensors(file, hf_shapes(shapes, num_heads), read_hf, dtype)


@torch.no_grad()
def load_hf_weights(model, read: Callable[[str], Tensor], num_heads: int) -> None:
    """Copy Hugging Face weights into our `model`, parameter by parameter."""
    for name, parameter in model.named_parameters():
        parameter.copy_(from_hf(name, read, num_heads))
