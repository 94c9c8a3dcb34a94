"""Runs of the real trainer on the simulated GPU of streams.py. Each needs a process of its own."""

import gc
import os
from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import torch
import torch.distributed as dist
from streams import Gpu, Stream, Work, callers, is_within

import tiny

CLEAN_STEPS = 4  # with two checkpoints and two validations between them
SABOTAGED_STEPS = 2  # for each sabotage; a checkpoint and a validation are after the second step


class Run(NamedTuple):
    """A run as one rank of several. After the steps without a sabotage come those of each of its sabotages."""

    config: dict
    world: int = 2
    rank: int = 0
    sabotages: tuple[str, ...] = ()


class Outcome(NamedTuple):
    exit_code: int
    faults: dict[str | None, list[str]]
    """By sabotage; None for the steps without one."""
    waits: Counter
    """How often, and where, the host waited for the device in a step without a checkpoint or a validation."""
    num_skipped: Counter
    """How often each sabotage left something out."""


class LeftOut(NamedTuple):
    """A sabotage: methods that do nothing where `place` is a part of "FUNCTION (FILE)", the innermost function of the
    package or of DeepSpeed."""

    owner: type
    methods: str
    place: str
    only: Callable[..., bool] = lambda owner: True

    @contextmanager
    def begun(self, count: Callable[[], None]):
        """`count()` is called instead of a method that is left out."""
        with ExitStack() as patches:
            for name in self.methods.split():
                patches.enter_context(patch.object(self.owner, name, self._without(name, count)))
            yield

    def _without(self, name, count):
        original = getattr(self.owner, name)

        def call(owner, *args, **kwargs):
            if self.place in callers(1) and self.only(owner):
                return count()
            return original(owner, *args, **kwargs)

        return call


class SentTensorsForgotten:
    """A sabotage: the pipeline keeps no tensor until it is sent."""

    @contextmanager
    def begun(self, count):
        begin = dist.batch_isend_irecv

        def begin_and_forget(messages):
            works = begin(messages)
            for message in messages:
                if message.op is dist.isend:
                    message.tensor = None
                    count()
            return works

        with patch.object(dist, "batch_isend_irecv", begin_and_forget):
            yield


SABOTAGES = {
    # Stages 2 and 3
    "modules do not wait for gathered weights": LeftOut(Stream, "wait_stream", "fetch_sub_module"),
    "reduction does not wait for gradients": LeftOut(Stream, "wait_stream", "__add_grad_to_ipg_bucket"),
    "gradients are freed while they are copied": LeftOut(torch.Tensor, "record_stream", "__add_grad_to_ipg_bucket"),
    "nothing waits for the reduction": LeftOut(Gpu, "wait", "independent_gradient_partition_epilogue"),
    # The teacher
    "student does not wait for the teacher": LeftOut(
        Stream, "wait_stream wait_event", "training/batches.py", lambda stream: stream is Stream.gpu.main
    ),
    "targets are freed while the student reads them": LeftOut(torch.Tensor, "record_stream", "training/batches.py"),
    # The pipeline
    "stage does not wait for its input": LeftOut(Work, "wait", "_run (megacocomix/parallel/pipeline.py)"),
    "validation does not wait for its input": LeftOut(
        Work, "wait", "_run (megacocomix/parallel/pipeline.py)", lambda work: is_within("evaluate")
    ),
    "sent tensors are forgotten": SentTensorsForgotten(),
    # Validation and checkpoint
    "validation does not wait for gathered weights": LeftOut(
        Stream, "wait_stream", "fetch_sub_module", lambda stream: is_within("evaluate")
    ),
    "checkpoint does not wait for its gather": LeftOut(Work, "wait", "gather (megacocomix/checkpoint/store.py)"),
    "checkpoint is written before it is copied": LeftOut(
        Gpu, "wait", "gather_own_part (megacocomix/checkpoint/store.py)"
    ),
    # What the host reads
    "losses are read before they are copied": LeftOut(Gpu, "wait", "_finish_gradients (megacocomix/parallel/zero.py)"),
    "offloaded gradients are read before they are copied": LeftOut(
        Gpu, "synchronize", "_finish_gradients (megacocomix/parallel/zero.py)"
    ),
}


def train(folder, name, run):
    """Train a run in this process. Returns its Outcome."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from megacocomix.parallel.runtime import Runtime
    from megacocomix.training import trainer

    gc.freeze()  # DeepSpeed collects garbage, which would search all that was imported
    torch.set_num_threads(1)
    os.environ.update(RANK=str(run.rank), WORLD_SIZE=str(run.world), LOCAL_RANK="0", DS_ACCELERATOR="cuda")
    dist.init_process_group("fake", store=FakeStore(), rank=run.rank, world_size=run.world)
    steps = {"steps": CLEAN_STEPS + SABOTAGED_STEPS * len(run.sabotages)}
    often = {"logging": {"every": 1000}, "checkpoint": {"every": 2, "keep": 1}, "evaluation": {"every": 2}}
    config = tiny.config(folder, name, **often | run.config | {"training": run.config.get("training", {}) | steps})
    Path(config.run).mkdir()
    seen, faults, num_skipped = [], defaultdict(list), Counter()
    phase = sabotage = None

    def on_event(event, trainer):
        nonlocal phase, sabotage
        if event != "step":
            return
        seen.append(gpu.waits.copy())
        index, rest = divmod(trainer.state.step - CLEAN_STEPS, SABOTAGED_STEPS)
        if index < 0 or rest:
            return
        end_phase()
        gpu.settle()
        phase = run.sabotages[index]
        sabotage = SABOTAGES[phase].begun(lambda name=phase: num_skipped.update([name]))
        sabotage.__enter__()

    def end_phase():
        if sabotage:
            sabotage.__exit__(None, None, None)
        faults[phase] = sorted(gpu.faults)
        gpu.faults.clear()

    with ExitStack() as patches:
        for each in _speed_up():
            patches.enter_context(each)
        patches.enter_context(_read_checkpoint())
        gpu = patches.enter_context(Gpu())
        _use_cuda()
        # No rank 0 writes the file that the others would look for.
        patches.enter_context(patch.object(trainer, "check_all_ranks_share", lambda run, runtime: None))
        code = trainer.train(config, Runtime(run.rank, run.world, torch.device("cuda", 0)), on_event)
        end_phase()
    return Outcome(code, dict(faults), seen[3] - seen[2], num_skipped)


def take_batches(folder, configs, sabotages):
    """Steps of StepBatches alone, for a student that only reads them. No gradient norm makes the host wait, so that
    nothing else orders the two streams. For each config: its faults by sabotage (None for none), and how often each
    sabotage left something out. All in this process, as rank 0 of 4."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from megacocomix.parallel.grid import Grid
    from megacocomix.parallel.runtime import Runtime
    from megacocomix.training.batches import StepBatches
    from megacocomix.training.inputs import open_inputs

    torch.set_num_threads(1)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    device, found = torch.device("cuda", 0), []
    with ExitStack() as patches:
        for each in _speed_up():
            patches.enter_context(each)
        gpu = patches.enter_context(Gpu())
        for sections in configs:
            config = tiny.config(folder, **sections)
            grid = Grid(Runtime(0, 4, device), config.parallel.tensor, config.parallel.pipeline)
            inputs, faults, num_skipped = open_inputs(config, device), {}, Counter()
            for sabotage in (None, *sabotages):
                gpu.settle()
                with ExitStack() as begun:
                    if sabotage:
                        count = lambda name=sabotage, num=num_skipped: num.update([name])
                        begun.enter_context(SABOTAGES[sabotage].begun(count))
                    _read_batches(StepBatches(config, grid, inputs, 4), 4)
                faults[sabotage] = sorted(gpu.faults)
                gpu.faults.clear()
            found.append((faults, num_skipped))
    return found


def _read_batches(batches, num_steps):
    for step in range(num_steps):
        for batch in batches.take(step).batches:
            for value in batch:
                if isinstance(value, torch.Tensor):
                    value + 1


def _speed_up():
    """Small batches for the teacher, and a tokenizer without files. DeepSpeed works as if the model were large: with
    several collectives of each kind in a step, and weights that are gathered ahead."""
    from megacocomix.parallel import zero
    from megacocomix.teacher import labels
    from megacocomix.training import inputs

    plain = zero.deepspeed_config

    def with_small_buckets(config, device):
        options = plain(config, device)
        options["zero_optimization"] |= {
            "reduce_bucket_size": 5000,
            "allgather_bucket_size": 5000,
            "stage3_prefetch_bucket_size": 3000,
            "stage3_param_persistence_threshold": 100,
            "stage3_max_reuse_distance": 0,
        }
        return options

    yield patch.object(zero, "deepspeed_config", with_small_buckets)
    yield patch.dict(labels.FORWARD_TOKENS, cuda=32)
    yield patch.object(inputs, "load_tokenizer", lambda name: tiny.letters())


def _read_checkpoint():
    """The thread that writes a checkpoint is not checked, so read what it gets before it begins."""
    from megacocomix.checkpoint import writer

    gather = writer.gather_own_part

    def gather_and_read(engine):
        parts = gather(engine)
        for tensors in parts:
            for tensor in tensors.values():
                tensor + 1
        return parts

    return patch.object(writer, "gather_own_part", gather_and_read)


def _use_cuda():
    from deepspeed.accelerator import real_accelerator
    from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator

    class Simulated(CUDA_Accelerator):
        def available_memory(self, device_index=None):
            return 2**36

        def total_memory(self, device_index=None):
            return 2**36

        def range_push(self, *args, **kwargs):
            pass

        def range_pop(self, *args, **kwargs):
            pass

    real_accelerator.set_accelerator(Simulated())
