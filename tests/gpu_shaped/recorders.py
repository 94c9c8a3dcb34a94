"""Watchers of a run on fake CUDA, as dispatch modes: they see every operation, also those of the backward pass and of
DeepSpeed. Enter them inside `fake_cuda.job`."""

from collections import Counter
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from fake_cuda import BACKENDS, BOTH, Stream, place
from torch._subclasses.fake_tensor import FakeTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten


def tensors_in(*values) -> list[torch.Tensor]:
    return [each for each in tree_leaves(values) if isinstance(each, torch.Tensor)]


class Watcher(TorchDispatchMode):
    """A dispatch mode without the wrapper that torch has for compiling."""

    @classmethod
    def _should_skip_dynamo(cls):
        return False  # nothing is compiled here; torch's wrapper would cost as much as the operation


class HostWaits(Watcher):
    """Counts by place where the host waits for the device, and gives the values that it then reads.

    reads: .item(), bool(), float(), .tolist(), torch.equal and the like, .cpu(), indexing with a mask; a stream, an
    event or the device synchronised. uploads: copies of a host tensor to the device that wait, and torch.tensor(…,
    device=cuda)."""

    def __init__(self, number: float = 2, boolean: bool = False):
        super().__init__()
        self.number, self.boolean = number, boolean
        self.reads, self.uploads = Counter(), Counter()
        Stream.waits = self.reads
        FakeTensor.tolist = lambda tensor: self._to_list(tensor)

    def clear(self):
        self.reads.clear()
        self.uploads.clear()

    def __torch_dispatch__(self, op, types, arguments=(), keywords=None):
        keywords = keywords or {}
        if op in (aten._local_scalar_dense.default, aten.equal.default, aten.allclose.default):
            if arguments[0].device.type == "cuda":
                self.reads[place()] += 1
            return self._value(arguments[0].dtype if op is aten._local_scalar_dense.default else torch.bool)
        if op is aten.exponential_.default:  # fake tensors cannot draw with a generator
            return arguments[0]
        if op in (aten.index.Tensor, aten.index_put_.default, aten.index_put.default):
            self._see_masks(*arguments)
        result = op(*arguments, **keywords)
        if op in (aten._to_copy.default, aten.copy_.default):
            source = arguments[0] if op is aten._to_copy.default else arguments[1]
            is_async = keywords.get("non_blocking") or arguments[2:3] == (True,)
            if source.device != result.device and source.numel() and not is_async:
                (self.reads if source.device.type == "cuda" else self.uploads)[place()] += 1
        return result

    def _value(self, dtype):
        if dtype == torch.bool:
            return self.boolean
        return float(self.number) if dtype.is_floating_point else int(self.number)

    def _see_masks(self, tensor, indices, value=None, *_):
        """The number of true elements must be read, except where one host number fills them."""
        is_fill = value is not None and value.numel() == 1 and value.device.type == "cpu"
        if any(each is not None and each.dtype == torch.bool for each in indices) and not is_fill:
            self.reads[place()] += tensor.device.type == "cuda"

    def _to_list(self, tensor):
        self.reads[place()] += tensor.device.type == "cuda"
        return np.full(tensor.shape, self._value(tensor.dtype)).tolist()


class Collective(NamedTuple):
    """A collective or a message. `group` is tensor, data, pipeline, model, tied or world: the first that has its
    ranks."""

    kind: str
    group: str
    dtype: str
    device: str


class Collectives(Watcher):
    """Counts collectives and the bytes of their whole tensors: of a gather its result, of a scatter its input."""

    KINDS = {
        "allreduce_": "all_reduce",
        "_allgather_base_": "all_gather",
        "allgather_": "all_gather",
        "_reduce_scatter_base_": "reduce_scatter",
        "broadcast_": "broadcast",
        "send": "send",
        "recv_": "receive",
        "barrier": "barrier",
    }

    def __init__(self, grid):
        super().__init__()
        self.number, self.bytes = Counter(), Counter()
        groups = {axis: getattr(grid, f"{axis}_group") for axis in ("tied", "model", "pipeline", "data", "tensor")}
        self.names = {_ranks(group): axis for axis, group in groups.items() if group is not None}

    def clear(self):
        self.number.clear()
        self.bytes.clear()

    def report(self) -> list[tuple]:
        """(*Collective, number, bytes) of each."""
        return [(*key, number, self.bytes[key]) for key, number in self.number.items()]

    def __torch_dispatch__(self, op, types, arguments=(), keywords=None):
        if op.namespace == "c10d":
            self._count(op, arguments, keywords)
        return op(*arguments, **(keywords or {}))

    def _count(self, op, arguments, keywords):
        kind = self.KINDS[op._schema.name.removeprefix("c10d::")]
        tensors = tensors_in(arguments, keywords)
        scripts = (each for each in arguments if isinstance(each, torch.ScriptObject))
        group = next(dist.ProcessGroup.unbox(each) for each in scripts if "ProcessGroup" in str(each._type()))
        assert len({(each.dtype, each.device) for each in tensors}) == 1, (kind, tensors)
        assert all(each.is_contiguous() for each in tensors), (kind, tensors)
        first, backend = tensors[0], BACKENDS.get(group.group_name, BOTH)
        assert {"cuda": "nccl", "cpu": "gloo"}[first.device.type] in backend, (kind, backend, first.device.type)
        key = Collective(kind, self.names.get(_ranks(group), "world"), str(first.dtype)[6:], first.device.type)
        gathered = sum(each.nbytes for each in tensors[:-1])  # of a gather into a list
        self.number[key] += 1
        self.bytes[key] += max(
            gathered if op._schema.name == "c10d::allgather_" else 0, *(t.nbytes for t in tensors), 0
        )


def _ranks(group) -> tuple:
    return tuple(dist.get_process_group_ranks(group))


def launches_kernel(op) -> bool:
    """Whether an operation starts a kernel: views and new memory do not."""
    name = op._schema.name.removeprefix("aten::")
    is_view = any(each.alias_info is not None and not each.alias_info.is_write for each in op._schema.returns)
    return not is_view and "empty" not in name and name not in ("_unsafe_view", "_local_scalar_dense", "set_")


class Kernels(Watcher):
    """Counts kernels by operation and dtypes of its floating-point tensors."""

    def __init__(self):
        super().__init__()
        self.launched = Counter()

    @property
    def number(self) -> int:
        return sum(self.launched.values())

    def __torch_dispatch__(self, op, types, arguments=(), keywords=None):
        result = op(*arguments, **(keywords or {}))
        tensors = tensors_in(arguments, keywords, result)
        if op.namespace == "aten" and launches_kernel(op) and any(each.device.type == "cuda" for each in tensors):
            dtypes = sorted({str(each.dtype)[6:] for each in tensors})
            self.launched[str(op).removeprefix("aten.").removesuffix(".default"), " ".join(dtypes)] += 1
        return result


class Memory(Watcher):
    """Bytes of the device's tensors: `peak` is the most that lived after an operation."""

    def __init__(self):
        super().__init__()
        self.live, self.now, self.peak = {}, 0, 0

    def measure(self) -> int:
        """Bytes that live now."""
        self.live = {key: each for key, each in self.live.items() if not each[0].expired()}
        self.now = sum(size for _, size in self.live.values())
        return self.now

    def restart(self) -> None:
        """Forget the peak."""
        self.peak = self.measure()

    def __torch_dispatch__(self, op, types, arguments=(), keywords=None):
        result = op(*arguments, **(keywords or {}))
        for tensor in tensors_in(result):
            if tensor.device.type == "cuda":
                self._see(tensor.untyped_storage())
        if self.now > self.peak:
            self.peak = max(self.peak, self.measure())
        return result

    def _see(self, storage):
        key = storage._cdata
        if key in self.live and not self.live[key][0].expired():
            return
        self.now += storage.nbytes() - self.live.get(key, (None, 0))[1]
        self.live[key] = StorageWeakRef(storage), storage.nbytes()
