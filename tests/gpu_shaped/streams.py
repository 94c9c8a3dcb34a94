"""A simulated GPU: kernels compute on real CPU tensors, and the order that streams, events and collectives give them is
checked with vector clocks.

`with Gpu() as gpu:` makes "cuda" a device of this process. Tensors on it are CPU tensors whose storage is marked. All
code with a branch for CUDA takes it, DeepSpeed too. What is checked:

- Two kernels that touch the same memory, and at least one of them writes, are ordered by streams, events or the host.
- The host reads memory that a kernel or a copy writes only after it waited for it, and does not overwrite what a copy
  still reads.
- Memory is not given to a new tensor while a kernel of another stream may still use it. The caching allocator gives a
  freed block at once to the next tensor of the stream that allocated it, unless `record_stream` named the other stream.
  Which block it gives is not modelled: any freed one may be it, so the check is stricter than one run on a GPU.
- An operation has all its tensors on one device.

A copy to the device from memory that is not pinned makes the host wait for the stream. That is counted, but nothing may
rely on it: it would be lost with pinned memory.

`faults` has one line for each pair of places that failed, and `waits` counts how often the host waited for the GPU.

A clock maps a stream to the number of its kernels that are complete. A stream's clock holds at its end; `host` is what
the host knows. A kernel is ordered after all that the host knew when it launched it.

Everything that this patches is global: use one Gpu in a process, which has to be one rank of a process group "fake".
"""

import functools
import sys
from collections import Counter, defaultdict
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.distributed as dist
from stream_collectives import patch_collectives
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# Kernels whose result the host needs, so it waits for them.
READ_BY_HOST = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_dim", "bincount")
# Kernels that take an index from the host; it is copied to the device.
INDEXING = ("index", "index_put_", "_index_put_impl_", "_unsafe_index")
# Where the package and DeepSpeed are, and DeepSpeed's files through which everything passes.
FOLDERS = [Path(find_spec(name).submodule_search_locations[0]).resolve() for name in ("megacocomix", "deepspeed")]
HELPERS = ("_accelerator.py", "utils/nvtx.py", "comm/comm.py", "comm/torch.py")


class Clock(Counter):
    """How many kernels of each stream are complete."""

    def join(self, other):
        """Also wait for all that `other` waited for."""
        for stream, done in other.items():
            if done > self[stream]:
                self[stream] = done


class Access(NamedTuple):
    """A kernel's use of the bytes [low, high) of a storage. It is kernel number `number` of its stream."""

    low: int
    high: int
    stream: "Stream"
    number: int
    writes: bool
    what: str

    def is_before(self, clock):
        return clock[self.stream] >= self.number

    def __str__(self):
        return f"{'write' if self.writes else 'read'} by {self.what} on {self.stream}"


class Memory:
    """A storage."""

    def __init__(self, storage, on_device, stream):
        self.reference, self.on_device, self.stream = StorageWeakRef(storage), on_device, stream
        self.accesses: list[Access] = []
        self.recorded: set[Stream] = set()
        self.is_fresh = on_device


def callers(limit=3):
    """Innermost functions of the package and of DeepSpeed that are being run, with their files."""
    found, frame = [], sys._getframe(1)
    while frame and len(found) < limit:
        if file := _short(frame.f_code.co_filename):
            found.append(f"{frame.f_code.co_name} ({file})")
        frame = frame.f_back
    return " < ".join(found)


@functools.cache
def _short(file):
    """deepspeed/runtime/zero/stage3.py; None for other files than the package's and DeepSpeed's."""
    path = Path(file).resolve()
    folder = next((folder for folder in FOLDERS if path.is_relative_to(folder)), None)
    return None if folder is None or str(path).endswith(HELPERS) else f"{folder.name}/{path.relative_to(folder)}"


def is_within(function):
    """Whether a function of this name is being run."""
    frame = sys._getframe(1)
    while frame:
        if frame.f_code.co_name == function:
            return True
        frame = frame.f_back
    return False


class Stream:
    """Stands for torch.cuda.Stream. Streams are made only after the Gpu."""

    gpu: "Gpu"
    numbers = count()

    def __init__(self, device=None, priority=0, name=None):
        self.name, self.clock = name or f"stream {next(Stream.numbers)}", Clock()
        self.gpu.streams.append(self)

    def launch(self):
        """Put a kernel at the end of this stream. Returns its number."""
        self.clock.join(self.gpu.host)
        self.clock[self] += 1
        return self.clock[self]

    def wait_stream(self, other):
        self.clock.join(other.clock)

    def wait_event(self, event):
        self.clock.join(event.clock)

    def record_event(self, event=None):
        event = event or Event()
        event.record(self)
        return event

    def synchronize(self):
        self.gpu.wait("stream", self.clock)

    def query(self):
        return False

    def __repr__(self):
        return self.name


class Event:
    """Stands for torch.cuda.Event."""

    def __init__(self, *args, **kwargs):
        self.clock = Clock()

    def record(self, stream=None):
        self.clock = Clock((stream or Stream.gpu.current).clock)

    def wait(self, stream=None):
        (stream or Stream.gpu.current).wait_event(self)

    def synchronize(self):
        Stream.gpu.wait("event", self.clock)

    def query(self):
        return False

    def elapsed_time(self, other):
        return 1.0


class Work:
    """A collective that was begun. Its tensors live until it is waited for; those of messages are their caller's."""

    def __init__(self, stream, on_device, tensors):
        self.clock, self.on_device, self.tensors = Clock(stream.clock), on_device, tensors

    def wait(self, timeout=None):
        gpu = Stream.gpu
        (gpu.current.clock if self.on_device else gpu.host).join(self.clock)
        self.tensors = None
        return True

    def is_completed(self):
        return all(Stream.gpu.host[stream] >= done for stream, done in self.clock.items())


class Gpu:
    """The device, with what happened on it."""

    def __init__(self):
        self.streams, self.host = [], Clock()
        Stream.gpu = self
        self.main = Stream(name="main")
        self.stack, self.communication = [self.main], {}
        self.memories: dict[int, Memory] = {}
        self.shared: set[Memory] = set()  # used by another stream than the one that allocated them
        self.freed: dict[Stream, list[Access]] = defaultdict(list)
        self.faults: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        self.places_on_device: bool | None = None
        self.argument_on_device = False  # of the function that is being run
        self.functions, self.kernels = _Functions(self), _Kernels(self)

    def __enter__(self):
        _patch(self)
        self.functions.__enter__()
        self.kernels.__enter__()
        return self

    def __exit__(self, *error):
        self.kernels.__exit__(*error)
        self.functions.__exit__(*error)
        self.sweep()

    @property
    def current(self):
        return self.stack[-1]

    @contextmanager
    def stream(self, stream):
        """torch.cuda.stream."""
        self.stack.append(stream or self.current)
        try:
            yield
        finally:
            self.stack.pop()

    @contextmanager
    def placing(self, on_device):
        """New tensors are placed on the device or on the host, whatever their source is."""
        before, self.places_on_device = self.places_on_device, on_device
        try:
            yield
        finally:
            self.places_on_device = before

    def wait(self, what, clock):
        """The host waits."""
        self.count_wait(what)
        self.host.join(clock)

    def count_wait(self, what):
        self.waits[f"{what} in {callers()}"] += 1

    def synchronize(self, device=None):
        """torch.cuda.synchronize."""
        everything = Clock()
        for stream in self.streams:
            everything.join(stream.clock)
        self.wait("device", everything)

    def is_on_device(self, tensor):
        memory = self.memories.get(tensor.untyped_storage()._cdata)
        return memory is not None and memory.on_device and not memory.reference.expired()

    def memory(self, tensor, on_device=False):
        storage = tensor.untyped_storage()
        memory = self.memories.get(storage._cdata)
        if memory is None or memory.reference.expired():
            memory = self.memories[storage._cdata] = Memory(storage, on_device, self.current)
        return memory

    def access(self, tensor, stream, number, writes, what):
        """A kernel, a copy or a collective uses a tensor."""
        if not tensor.numel():
            return
        memory = self.memory(tensor)
        access = Access(*_extent(tensor), stream, number, writes, f"{what} in {callers()}")
        if memory.is_fresh:
            memory.is_fresh = False
            for past in self.freed[memory.stream]:
                if not past.is_before(stream.clock):
                    self.faults[f"reused too early: {past}, then {access}"] += 1
        kept = []
        for past in memory.accesses:
            if past.is_before(self.host):
                continue
            ordered = past.is_before(stream.clock)
            if not ordered and (writes or past.writes) and past.low < access.high and access.low < past.high:
                self.faults[f"race: {past}, {access}"] += 1
            # What is ordered after this access is also ordered after those that it covers.
            covers = access.low <= past.low and past.high <= access.high and (writes or not past.writes)
            if not (ordered and covers):
                kept.append(past)
        memory.accesses = [*kept, access]
        if memory.on_device and stream is not memory.stream:
            self.shared.add(memory)

    def host_access(self, tensor, writes, what):
        """The host itself reads or writes a tensor in its own memory."""
        memory = self.memories.get(tensor.untyped_storage()._cdata)
        if memory is None or not memory.accesses:
            return
        low, high = _extent(tensor)
        memory.accesses = [past for past in memory.accesses if not past.is_before(self.host)]
        for past in memory.accesses:
            if (writes or past.writes) and past.low < high and low < past.high:
                self.faults[f"race: {past}, {'write' if writes else 'read'} by the host, {what} in {callers()}"] += 1

    def collective(self, name, group, reads, writes, async_op, keeps=True):
        """NCCL works on a stream of each group's own, after all that the current stream has queued. Collectives of
        tensors of the host are gloo's, on a thread."""
        tensors = [*reads, *writes]
        on_device = self.is_on_device(tensors[0])
        assert all(self.is_on_device(each) == on_device for each in tensors), f"{name} of two devices in {callers()}"
        key = group or dist.group.WORLD, on_device
        if key not in self.communication:
            self.communication[key] = Stream(name=f"{'nccl' if on_device else 'gloo'} {len(self.communication)}")
        stream = self.communication[key]
        if on_device:
            stream.wait_stream(self.current)
        for tensor in () if on_device else tensors:
            self.host_access(tensor, any(tensor is each for each in writes), name)
        number = stream.launch()
        for tensor in reads:
            self.access(tensor, stream, number, False, name)
        for tensor in writes:
            self.access(tensor, stream, number, True, name)
        work = Work(stream, on_device, tensors if keeps else None)
        if async_op:
            return work
        work.wait()
        return None

    def sweep(self):
        """The allocator gets memory back that no tensor has any more."""
        for memory in [memory for memory in self.shared if memory.reference.expired()]:
            self.shared.remove(memory)
            pool = self.freed[memory.stream]
            pending = lambda past, stream: not past.is_before(stream.clock) and not past.is_before(self.host)
            pool[:] = [past for past in pool if pending(past, memory.stream)]
            for past in memory.accesses:
                # Before such memory is used again, the allocator itself waits for the streams that were recorded.
                recorded = any(past.is_before(stream.clock) for stream in memory.recorded)
                if not recorded and pending(past, memory.stream):
                    pool.append(past)

    def settle(self):
        """Forget what is still pending, as if the device had been idle for a while."""
        for stream in self.streams:
            self.host.join(stream.clock)
        self.freed.clear()


def _extent(tensor):
    """The bytes [low, high) between a tensor's first and last element, within its storage."""
    size = tensor.element_size()
    low = tensor.storage_offset() * size
    last = sum((length - 1) * stride for length, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return low, low + (last + 1) * size


def _tensors(value):
    """The tensors with values in nested lists and tuples."""
    if isinstance(value, Tensor):
        return () if value.is_meta else (value,)
    if isinstance(value, (list, tuple)):
        return [tensor for each in value for tensor in _tensors(each)]
    return ()


class _Kernels(TorchDispatchMode):
    """Accounts for each operation below autograd."""

    def __init__(self, gpu):
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunction():  # within a backward pass they would be translated
            return self._account(func, args, kwargs or {})

    def _account(self, func, args, kwargs):
        gpu = self.gpu
        reads, writes = [], []
        for index, argument in enumerate(func._schema.arguments):
            value = args[index] if index < len(args) else kwargs.get(argument.name)
            is_written = argument.alias_info is not None and argument.alias_info.is_write
            (writes if is_written else reads).extend(_tensors(value))
        out = func(*args, **kwargs)
        name = func._schema.name.removeprefix("aten::")
        used = [*reads, *writes]
        on_device = any(map(gpu.is_on_device, used))
        known = {each.untyped_storage()._cdata for each in used}
        made = [each for each in _tensors(out) if each.untyped_storage()._cdata not in known]
        is_view = not writes and not made and any(each.alias_info for each in func._schema.returns)
        if is_view or name == "set_":
            return out
        places = gpu.places_on_device
        if places is None:
            places = on_device if used else gpu.argument_on_device
        if made:
            gpu.sweep()
            for each in made:
                gpu.memory(each, on_device=places)
        if name.startswith(("empty", "new_empty")):
            return out
        if not (on_device or (made and places)):
            for each in used:
                gpu.host_access(each, any(each is one for one in writes), name)
            return out
        self._launch(name, args, kwargs, reads, writes, made)
        return out

    def _launch(self, name, args, kwargs, reads, writes, made):
        gpu = self.gpu
        number, stream = gpu.current.launch(), gpu.current
        is_copy = name in ("copy_", "_to_copy", "to")
        blocks = not (kwargs.get("non_blocking") or (name == "copy_" and args[2:] == (True,)))
        to_device = all(map(gpu.is_on_device, (*writes, *made)))
        of_host = [each for each in reads if not gpu.is_on_device(each)]
        if not is_copy:
            assert to_device, f"{name} writes to the host in {callers()}"
            for each in of_host:
                assert not each.dim() or name in INDEXING, f"{name} of two devices in {callers()}"
        for each in reads:
            if gpu.is_on_device(each) or (is_copy and not blocks):
                gpu.access(each, stream, number, False, name)
            else:
                gpu.host_access(each, False, name)
        for each in (*writes, *made):
            gpu.access(each, stream, number, True, name)
        masks = name in INDEXING and any(each.dtype in (torch.bool, torch.uint8) for each in _tensors(args[1]))
        if name in READ_BY_HOST or masks or (is_copy and blocks and not to_device):
            gpu.wait(name, stream.clock)
        elif blocks and any(is_copy or each.dim() for each in of_host):
            gpu.count_wait(name)


class _Functions(TorchFunctionMode):
    """Translates the device in calls of torch's functions, which the dispatcher would refuse."""

    def __init__(self, gpu):
        super().__init__()
        self.gpu, self.is_active = gpu, True
        of = Tensor
        self.replaced = {
            of.device.__get__: lambda tensor: self.device(tensor),
            of.is_cuda.__get__: lambda tensor: gpu.is_on_device(tensor),
            of.is_cpu.__get__: lambda tensor: not gpu.is_on_device(tensor),
            of.get_device: lambda tensor: 0 if gpu.is_on_device(tensor) else -1,
            of.to: self.to,
            of.cpu: lambda tensor, **kwargs: self.move(tensor, False),
            of.cuda: lambda tensor, device=None, non_blocking=False, **kwargs: self.move(tensor, True, non_blocking),
            of.pin_memory: lambda tensor, *args: tensor.clone(),
            of.is_pinned: lambda tensor, *args: False,
            of.tolist: lambda tensor: self.on_host(tensor).tolist(),
            of.numpy: lambda tensor, **kwargs: self.as_array(tensor).numpy(**kwargs),
            of.__array__: lambda tensor, *args, **kwargs: self.as_array(tensor).__array__(*args, **kwargs),
            torch._C._nn._parse_to: torch._C._nn._parse_to,
            torch.tensor: functools.partial(self.from_values, torch.tensor),
            torch.as_tensor: functools.partial(self.from_values, torch.as_tensor),
            torch.asarray: functools.partial(self.from_values, torch.asarray),
        }

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = {name: value for name, value in (kwargs or {}).items() if name != "pin_memory"}
        gpu, was_active, was_on_device = self.gpu, self.is_active, self.gpu.argument_on_device
        self.is_active = False
        try:
            if func in self.replaced and (not args or not isinstance(args[0], Tensor) or not args[0].is_meta):
                return self.replaced[func](*args, **kwargs)
            device = kwargs.get("device")
            if device is not None and torch.device(device).type != "meta":
                with gpu.placing(_is_cuda(device)):
                    return func(*args, **kwargs | {"device": "cpu"})
            # Some functions make more tensors on the device of their arguments.
            gpu.argument_on_device = any(map(gpu.is_on_device, _tensors(args)))
            return func(*args, **kwargs)
        finally:
            self.is_active, gpu.argument_on_device = was_active, was_on_device

    def run_backward(self, run, roots, *args, **kwargs):
        """Hooks call functions too, whether or not the one that began the backward pass is being translated now."""
        gpu, was_active, was_on_device = self.gpu, self.is_active, self.gpu.argument_on_device
        self.is_active, gpu.argument_on_device = True, any(map(gpu.is_on_device, roots))
        try:
            with nullcontext() if was_active else self:
                return run(roots, *args, **kwargs)
        finally:
            self.is_active, gpu.argument_on_device = was_active, was_on_device

    def device(self, tensor):
        return torch.device("cuda", 0) if self.gpu.is_on_device(tensor) else tensor.device

    def to(self, tensor, *args, **kwargs):
        copy = kwargs.pop("copy", False)
        other = args[0] if args else kwargs.get("other")
        if isinstance(other, Tensor):
            device, dtype, non_blocking, memory_format = self.device(other), other.dtype, False, None
        else:
            device, dtype, non_blocking, memory_format = torch._C._nn._parse_to(*args, **kwargs)
        options = {"dtype": dtype or tensor.dtype, "copy": copy}
        options |= {"memory_format": memory_format} if memory_format else {}
        if device is not None and device.type == "meta":
            return tensor.to(device, **options)
        if device is None or _is_cuda(device) == self.gpu.is_on_device(tensor):
            return tensor.to(**options)
        return self.move(tensor, _is_cuda(device), non_blocking, **options)

    def move(self, tensor, on_device, non_blocking=False, **options):
        if self.gpu.is_on_device(tensor) == on_device:
            return tensor
        with self.gpu.placing(on_device):
            return tensor.to("cpu", non_blocking=non_blocking, **options | {"copy": True})

    def on_host(self, tensor):
        """A tensor's values, which the host reads now."""
        if self.gpu.is_on_device(tensor):
            return self.move(tensor, False)
        self.gpu.host_access(tensor, False, "values")
        return tensor

    def as_array(self, tensor):
        assert not self.gpu.is_on_device(tensor), f"numpy of a tensor on the device in {callers()}"
        return self.on_host(tensor)

    def from_values(self, make, values, *args, device=None, **kwargs):
        if isinstance(values, Tensor):
            device = self.device(values) if device is None else device
            return self.to(values, device, **kwargs) if make is not torch.tensor else self.to(values, device, copy=True)
        made = make(values, *args, **kwargs)
        return self.move(made, True) if device is not None and _is_cuda(device) else made


def _is_cuda(device):
    return isinstance(device, int) or torch.device(device).type == "cuda"


def _patch(gpu):
    cuda = torch.cuda
    cuda.Stream, cuda.Event = Stream, Event
    cuda.stream, cuda.synchronize = gpu.stream, lambda device=None: gpu.synchronize()
    cuda.current_stream, cuda.default_stream = lambda device=None: gpu.current, lambda device=None: gpu.main
    cuda.is_available = cuda.is_bf16_supported = lambda *args: True
    cuda.device_count, cuda.current_device, cuda.set_device = lambda: 1, lambda: 0, lambda device: None
    cuda.get_device_name, cuda.get_device_capability = lambda *args: "simulated", lambda *args: (9, 0)
    cuda.get_device_properties = lambda *args: SimpleNamespace(total_memory=80 * 2**30)
    cuda.empty_cache = cuda.synchronize
    cuda.is_current_stream_capturing = lambda: False
    cuda.memory_stats = lambda *args: {}
    cuda.mem_get_info = lambda *args: (2**36, 2**36)
    for name in ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"):
        setattr(cuda, name, lambda *args: 0)
    for name in ("manual_seed", "manual_seed_all", "reset_peak_memory_stats"):
        setattr(cuda, name, lambda *args: None)
    Tensor.record_stream = lambda tensor, stream: gpu.memory(tensor).recorded.add(stream)
    run = torch.autograd._engine_run_backward
    torch.autograd._engine_run_backward = functools.partial(gpu.functions.run_backward, run)
    patch_collectives(gpu)
