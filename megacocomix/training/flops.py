"""Floating-point operations a token costs, from the shapes alone. A multiply-add is two.

Counted: linear layers, attention scores and mixing over the full S × S square (the convention of the scaling
literature; kernels that skip the masked half do less), the two heads, the K compressed rows. Not counted: LayerNorm,
softmax, embedding look-ups, recomputation. A backward pass costs twice its forward pass; one that stops at activations
costs a linear layer once more, attention twice.
"""

import torch

from megacocomix.config import Config, ModelConfig
from megacocomix.teacher.labels import ConceptLabeler

# Dense bf16 peak of one device, from the makers' data sheets.
PEAK_FLOPS = {
    "A100": 312e12,
    "H100 PCIe": 756e12,
    "H100 HBM3": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
}


def linear_flops(model: ModelConfig) -> float:
    """Forward FLOPs of one block's linear layers for one position."""
    return 2 * 12 * model.hidden_size**2


def attention_flops(model: ModelConfig, positions: int) -> float:
    """Forward FLOPs of one block's attention for one position among `positions`."""
    return 4 * positions * model.hidden_size


def student_flops(config: Config) -> float:
    """Training FLOPs (forward and backward) a token of the student; blocks from insertion_layer on run on 2T
    positions."""
    model, method = config.model, config.method
    tokens, width = model.context, model.hidden_size

    def block(positions_per_token: int) -> float:
        return positions_per_token * (linear_flops(model) + attention_flops(model, positions_per_token * tokens))

    head = 2 * width * model.vocab_size
    if not config.concepts:
        return 3 * (model.num_layers * block(1) + head)
    lower = method.insertion_layer
    concept = 2 * width * (method.num_concepts + method.num_kept)
    return 3 * (lower * block(1) + (model.num_layers - lower) * block(2) + concept + head)


def labelling_flops(config: Config, labeler: ConceptLabeler) -> float:
    """FLOPs a token of live labelling: a forward pass, the backward pass above the autoencoder's layer, encoding, K
    scores."""
    teacher, (latents, width) = labeler.teacher_shape(), labeler.sae.encoder.shape
    linear, attention = linear_flops(teacher), attention_flops(teacher, config.model.context)
    above = teacher.num_layers - config.teacher.sae_layer - 1
    head = 2 * width * teacher.vocab_size
    forward = teacher.num_layers * (linear + attention) + head
    backward = above * (linear + 2 * attention) + head
    return forward + backward + 2 * width * (latents + labeler.sae.k)


def activated_parameters(config: Config) -> int:
    """Parameters a token touches, as the paper counts them: of the compress layer only num_kept rows (appendix A)."""
    model, method = config.model, config.method
    width = model.hidden_size
    base = model.num_layers * (12 * width**2 + 13 * width) + (model.vocab_size + model.context + 2) * width
    return base + ((method.num_concepts + method.num_kept) * width if config.concepts else 0)


def device_peak(device: torch.device, precision: str) -> float | None:
    """Peak bf16 FLOP/s of a device; None where it is not in the table, or in fp32: no MFU rather than a wrong one."""
    if device.type != "cuda" or precision != "bf16":
        return None
    name = torch.cuda.get_device_name(device).replace("-", " ").split()
    return next((peak for words, peak in PEAK_FLOPS.items() if all(word in name for word in words.split())), None)
