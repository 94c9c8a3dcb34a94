"""What the live teacher costs, and what a device could do; the student's cost is in model/flops.py."""

import torch

from megacocomix.config import Config
from megacocomix.model.flops import attention_flops, linear_flops
from megacocomix.teacher.labels import ConceptLabeler

# Dense bf16 peak of one device, from the makers' data sheets.
PEAK_FLOPS = {
    "A100": 312e12,
    "H100 PCIe": 756e12,
    "H100 HBM3": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
}


def labelling_flops(config: Config, labeler: ConceptLabeler) -> float:
    """FLOPs a token of live labelling: a forward pass, the backward pass above the autoencoder's layer, encoding, K
    scores. A backward pass that stops at activations costs a linear layer once more, attention twice."""
    teacher, (latents, width) = labeler.teacher_shape(), labeler.sae.encoder.shape
    linear, attention = linear_flops(teacher), attention_flops(teacher, config.model.context)
    above = teacher.num_layers - config.teacher.sae_layer - 1
    head = 2 * width * teacher.vocab_size
    forward = teacher.num_layers * (linear + attention) + head
    backward = above * (linear + 2 * attention) + head
    return forward + backward + 2 * width * (latents + labeler.sae.k)


def device_peak(device: torch.device, precision: str) -> float | None:
    """Peak bf16 FLOP/s of a device; None where it is not in the table, or in fp32: no MFU rather than a wrong one."""
    if device.type != "cuda" or precision != "bf16":
        return None
    name = torch.cuda.get_device_name(device).replace("-", " ").split()
    return next((peak for words, peak in PEAK_FLOPS.items() if all(word in name for word in words.split())), None)
