"""The rows of the environment: versions, devices, and the attention kernels of our shapes."""

import subprocess
import sys
from collections import Counter
from importlib.metadata import PackageNotFoundError, version

import torch

from benchmarks.gpu_first_run.jobs import Machine
from benchmarks.gpu_first_run.recipes import recipes
from benchmarks.gpu_first_run.report import NO_CPU, Report
from megacocomix.config.load import load_config
from megacocomix.config.schema import Config


def look_around(machine: Machine, report: Report) -> None:
    """The rows of the environment, in a process of its own."""

    def installed(package: str) -> str:
        try:
            return version(package)
        except PackageNotFoundError:
            return "not installed"

    add = lambda *row: report.add("environment", *row)
    packages = ("deepspeed", "transformers", "triton", "numpy")
    versions = [f"Python {sys.version.split()[0]}", f"torch {torch.__version__}"]
    add(
        "versions",
        "figure",
        ", ".join([*versions, *(f"{name} {installed(name)}" for name in packages)]),
        "docs: torch 2.11+",
    )
    count = torch.cuda.device_count() if machine.has_gpu else 0
    if not count:
        for name in ("devices", "driver and libraries", "peer access"):
            add(name, "n/a", NO_CPU)
    else:
        found = [torch.cuda.get_device_properties(index) for index in range(count)]
        kinds = Counter(
            f"{each.name} (sm_{each.major}{each.minor}, {each.total_memory / 2**30:.0f} GiB)" for each in found
        )
        add("devices", len(kinds) == 1, ", ".join(f"{number} × {kind}" for kind, number in kinds.items()), "one kind")
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            driver = subprocess.run(query, capture_output=True, text=True, timeout=60).stdout.split()[:1]
        except (OSError, subprocess.TimeoutExpired):
            driver = []
        nccl = ".".join(map(str, torch.cuda.nccl.version()))
        libraries = f"CUDA {torch.version.cuda}, NCCL {nccl}, cuDNN {torch.backends.cudnn.version()}"
        add("driver and libraries", "figure", f"driver {(driver or ['unknown'])[0]}, {libraries}")
        pairs = [(one, other) for one in range(count) for other in range(count) if one != other]
        reach = sum(torch.cuda.can_device_access_peer(*pair) for pair in pairs)
        add("peer access", "figure" if pairs else "n/a", f"{reach} of {len(pairs)} pairs", "all pairs of one host")
    precision = torch.get_float32_matmul_precision()
    add("fp32 products", precision == "highest", precision, "highest: no TF32 unless asked for")
    for name, recipe in recipes(machine).items():
        config = load_config(*recipe)
        for every, mask in ((None, "no mask"), (1, "the last block's mask")):
            kernels = attention_kernels(config, every, machine.device)
            is_right = bool(kernels) and "math" not in " ".join(kernels) if machine.has_gpu else "figure"
            wanted = "flash or cudnn" if every is None else "efficient or cudnn: flash takes no mask"
            add(f"attention of {name}, {mask}", is_right, " ".join(kernels), f"{wanted}; never math")


def attention_kernels(config: Config, every: int | None, device: torch.device) -> list[str]:
    """The implementations of scaled_dot_product_attention that a micro-batch of a recipe takes, in bf16, above the
    concept module. `every` as in model/gpt2.py: with it, a block computes the positions that predict only."""
    from megacocomix.model.gpt2 import Attention

    model, method = config.model, config.method
    attention = Attention(model).to(device, torch.bfloat16)
    positions = model.context + method.num_slots(model.context)
    x = torch.randn(config.training.micro_batch, positions, model.hidden_size, dtype=torch.bfloat16, device=device)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        attention(x.requires_grad_(), every).sum().backward()
    found = {event.key for event in profile.key_averages() if "_scaled_dot_product" in event.key}
    return sorted(name.rpartition("_scaled_dot_product_")[2] for name in found if "backward" not in name)
