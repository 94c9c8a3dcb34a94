"""A CUDA device without a GPU. Tensors are fake (torch's FakeTensorMode): they have shape, dtype and device, but no
memory and no values. So a wrong device or dtype raises as on a GPU, and models of any size run in seconds.

`install` changes the whole process: it loads the guard (guard.cpp), replaces parts of torch.cuda, and imports what all
scenarios need. `job` makes the process one rank of a job of any size, whose collectives return at once. Watchers of
what then happens are in recorders.py; server.py starts such processes.

What this cannot show: values, speed, the order of streams, NCCL itself, and which kernels exist (test_kernels.py reads
that from torch's tables).
"""

import ctypes
import importlib.util
import os
import sys
import warnings
from collections import Counter
from contextlib import contextmanager, nullcontext
from pathlib import Path

# What torch and DeepSpeed import when the first model or optimizer is built: seconds of every process.
PRELOADED = (
    "megacocomix.parallel.zero",
    "megacocomix.checkpoint.store",
    "megacocomix.interpret.decode",
    "megacocomix.teacher.targets",
    "megacocomix.training.batches",
    "torch._dynamo",
    "torch._inductor.compile_fx",
    "deepspeed.runtime.zero.muon.muon_optimizer",
)
PACKAGES: dict[str, str] = {}
"""Folder → name of the packages whose code can be a `place`; filled by `install`."""

BOTH = "cpu:gloo,cuda:nccl"
BACKENDS: dict[str, str] = {}
"""Group name → the backends it would have on GPUs; those not named have BOTH, as in parallel/runtime.py."""


class Stream:
    """A stream, or an event, on which all work is done. `waits` counts by place how often the host waited for one."""

    waits = Counter()

    def __init__(self, *_, **__):
        pass

    def synchronize(self):
        Stream.waits[place()] += 1

    def record_event(self, *_):
        return self

    def query(self):
        return True

    def record(self, *_):
        pass

    wait = wait_stream = wait_event = record


def install(guard: str) -> None:
    """Make this process, which has not imported torch yet, one that has CUDA devices."""
    os.environ |= {"DS_ACCELERATOR": "cuda", "CUDA_VISIBLE_DEVICES": "", "LOCAL_RANK": "0", "OMP_NUM_THREADS": "1"}
    sys.modules["pynvml"] = None  # DeepSpeed would look for a real GPU
    warnings.filterwarnings("ignore")
    ctypes.CDLL(guard, mode=ctypes.RTLD_GLOBAL)
    import torch

    for name in ("megacocomix", "deepspeed", "transformers"):
        PACKAGES[f"{Path(importlib.util.find_spec(name).origin).parent}/"] = name
    _replace_cuda(torch.cuda)
    _teach_fake_tensors(torch)
    for name in PRELOADED:
        importlib.import_module(name)
    # It compares lists between ranks by their values.
    import deepspeed.runtime.zero.partitioned_param_coordinator as coordinator

    coordinator.assert_ints_same_as_other_ranks = lambda _: None


def _replace_cuda(cuda) -> None:
    stream = Stream()
    properties = type("Properties", (), {"total_memory": 80 * 2**30, "major": 9, "minor": 0, "name": "fake"})()
    nothing = ("_lazy_init", "set_device", "empty_cache", "reset_peak_memory_stats", "manual_seed", "manual_seed_all")
    memory = ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved")
    answers = {
        **dict.fromkeys(nothing),
        **dict.fromkeys(memory, 0),
        "memory_stats": {},
        "is_available": True,
        "is_bf16_supported": True,
        "is_current_stream_capturing": False,
        "device_count": 8,
        "current_device": 0,
        "current_stream": stream,
        "default_stream": stream,
        "get_device_capability": (9, 0),
        "get_device_properties": properties,
        "get_device_name": properties.name,
    }
    for name, answer in answers.items():
        setattr(cuda, name, lambda *_, answer=answer, **__: answer)
    cuda.Stream = cuda.Event = Stream
    cuda.stream = lambda _: nullcontext()
    cuda.synchronize = lambda *_: stream.synchronize()
    cuda.nvtx.range_push = cuda.nvtx.range_pop = lambda *_: None


def _teach_fake_tensors(torch) -> None:
    """Let fake tensors do what torch's own cannot."""
    import numpy
    from torch._subclasses import fake_tensor
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    fake_tensor.init_gpu_context = lambda device: None
    FakeTensorMode.avoid_device_init = property(lambda self: True)
    torch.Tensor.record_stream = lambda self, stream: None
    torch.Tensor.pin_memory = lambda self, *_: self
    torch.Tensor.data_ptr = lambda self: 0
    torch.nn.functional.scaled_dot_product_attention = _attention
    torch.nn.Module.to = _to
    real_numpy, data = torch.Tensor.numpy, torch.Tensor.data

    def to_numpy(self):
        if not isinstance(self, FakeTensor):
            return real_numpy(self)
        assert self.device.type == "cpu"
        return numpy.zeros(self.shape, dtype=str(self.dtype).removeprefix("torch."))

    def set_data(self, value):
        data.__set__(self, value)
        self.fake_device = value.fake_device  # torch forgets to

    torch.Tensor.numpy = to_numpy
    FakeTensor.data = property(data.__get__, set_data)


def _attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """The kernel that torch chooses on a recent GPU: flash attention for half precision without a mask, else the
    memory-efficient one, whose mask is a bias and whose head size must be a multiple of 8."""
    import torch

    assert q.device.type == k.device.type == v.device.type == "cuda" and q.dtype == k.dtype == v.dtype
    if attn_mask is None and q.dtype != torch.float32:
        # The kernel pads heads to a multiple of 8.
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal, False, scale=scale)[0]
    assert q.shape[-1] % (4 if q.dtype == torch.float32 else 8) == 0, "no fused kernel for this head size"
    bias = None
    if attn_mask is not None:
        assert attn_mask.dtype in (torch.bool, q.dtype)
        if attn_mask.dtype == torch.bool:
            bias = torch.zeros_like(attn_mask, dtype=q.dtype).masked_fill_(attn_mask.logical_not(), -torch.inf)
        bias = (attn_mask if bias is None else bias).expand(*q.shape[:3], k.shape[2])
    keeps = torch.is_grad_enabled() and any(each.requires_grad for each in (q, k, v))
    run = torch.ops.aten._scaled_dot_product_efficient_attention
    return run(q, k, v, bias, keeps, dropout_p, is_causal, scale=scale)[0]


def _to(module, device):
    """A fake parameter that others refer to cannot be replaced. So it must be on the device already."""
    assert all(value.device.type == device.type for value in module.state_dict().values())
    return module


def place() -> str:
    """Where the caller's work comes from: the innermost frame in one of PACKAGES, as package/file:function."""
    frame = sys._getframe(1)
    while frame:
        file = frame.f_code.co_filename
        for folder, package in PACKAGES.items():
            if file.startswith(folder) and not file.endswith("/cuda_accelerator.py"):  # which only forwards
                return f"{package}/{file.removeprefix(folder)}:{frame.f_code.co_name}"
        frame = frame.f_back
    return "elsewhere"


@contextmanager
def job(world: int = 1, rank: int = 0, tensor: int = 1, pipeline: int = 1):
    """Inside, this process is one rank of `world`, and new tensors are fake. Yields its Grid."""
    import torch
    import torch.distributed as dist
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from megacocomix.parallel.grid import Grid
    from megacocomix.parallel.runtime import Runtime

    real = dist.new_group

    def new_group(ranks, timeout=None, backend=None, **options):
        group = real(ranks, timeout, **options)
        if isinstance(group, dist.ProcessGroup):  # else this rank is not in it
            BACKENDS[group.group_name] = backend or BOTH
        return group

    dist.new_group, dist.get_backend_config = new_group, lambda: BOTH
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    grid = Grid(Runtime(rank, world, torch.device("cuda", 0)), tensor, pipeline)
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield grid
    dist.destroy_process_group()
