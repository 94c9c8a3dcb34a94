"""What a device could do, and what it had to hold. What a run costs is in model/flops.py and teacher/guidance.py."""

import resource

import torch

# Dense bf16 peak of one device, from the makers' data sheets.
PEAK_FLOPS = {
    "A100": 312e12,
    "H100 PCIe": 756e12,
    "H100 HBM3": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
}


def device_peak(device: torch.device, precision: str) -> float | None:
    """Peak bf16 FLOP/s of a device; None where it is not in the table, or in fp32: no MFU rather than a wrong one."""
    if device.type != "cuda" or precision != "bf16":
        return None
    name = torch.cuda.get_device_name(device).replace("-", " ").split()
    return next((peak for words, peak in PEAK_FLOPS.items() if all(word in name for word in words.split())), None)


def peak_memory_gib(device: torch.device) -> float:
    """Most memory this process has held: of the GPU where there is one, else of the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
