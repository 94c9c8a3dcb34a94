"""What is measured of a training run: time, memory, a trace, and where the host waits."""

import time
import warnings
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import torch

from megacocomix.config.schema import Config

Measure = Literal["nothing", "time", "trace"]


class Measured(Exception):
    """Ends a run whose measurement is complete, on all ranks at the same step."""


class Meter:
    """Listens to a training run, measures some steps and ends it. `result` has times in seconds, memory in bytes."""

    def __init__(self, measure: Measure, timer: bool, device: torch.device, trace: Path):
        """`timer`: switch DeepSpeed's throughput timer on. `trace`: the file for a trace."""
        self.measure, self.timer, self.trace, self.is_cuda = measure, timer, trace, device.type == "cuda"
        self.result: dict = {}
        self.step = 0
        # DeepSpeed's timer synchronises from the third step on.
        self.warm, self.timed = (3, 5) if self.is_cuda else (1, 3)
        self.allocated_before = torch.cuda.memory_allocated() if self.is_cuda else 0

    def __call__(self, event: str, trainer) -> None:
        """At the beginning of each step."""
        if event != "step" or self.measure == "nothing":
            return
        step, self.step = self.step, self.step + 1
        if step == 0 and self.timer:
            timer = trainer.engine._engine.tput_timer.config
            timer.enabled = timer.synchronized = True
        if step == self.warm:
            self._begin()
        elif step == self.warm + self.timed:
            self._finish(trainer)
            if self.measure == "time" or not self.is_cuda:
                raise Measured
            self._begin_counting()
        elif step == self.warm + self.timed + 1:
            self._finish_counting()
            raise Measured

    def _begin(self) -> None:
        self._synchronize()
        if self.is_cuda:
            torch.cuda.reset_peak_memory_stats()
        if self.measure == "trace":
            kinds = [torch.profiler.ProfilerActivity.CPU, *[torch.profiler.ProfilerActivity.CUDA] * self.is_cuda]
            self.profiler = torch.profiler.profile(activities=kinds)
            self.profiler.start()
        self.begun = time.perf_counter()

    def _finish(self, trainer) -> None:
        self._synchronize()
        training, grid = trainer.config.training, trainer.grid
        self.result |= {
            "seconds": (time.perf_counter() - self.begun) / self.timed,
            "steps": self.timed,
            "tokens": training.global_batch * trainer.config.model.context / grid.runtime.world,
            "micro_batches": training.global_batch // (training.micro_batch * grid.data),
            "teacher_share": trainer.teacher_flops / trainer.student_flops,
        }
        if self.is_cuda:
            sizes = [shape.numel() for shape in trainer.stages.whole_shapes.values()]
            self.result["peak"] = torch.cuda.max_memory_allocated() - self.allocated_before
            self.result["estimate"] = memory_estimate(trainer.config, sum(sizes), grid.data)
        if self.measure == "trace":
            self.profiler.stop()
            if grid.runtime.is_main:
                self.profiler.export_chrome_trace(str(self.trace))
                self.result["trace"] = str(self.trace)
            del self.profiler

    def _begin_counting(self) -> None:
        self.catching = warnings.catch_warnings(record=True)
        self.caught = self.catching.__enter__()
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")

    def _finish_counting(self) -> None:
        torch.cuda.set_sync_debug_mode("default")
        self.catching.__exit__(None, None, None)
        self.result["synchronisations"] = synchronisations(self.caught)

    def _synchronize(self) -> None:
        if self.is_cuda:
            torch.cuda.synchronize()


def synchronisations(caught: Iterable[warnings.WarningMessage]) -> dict[str, int]:
    """How often each line of code made the host wait, most often first, by the warnings of torch's sync debug mode."""
    lines = [each for each in caught if "synchronizing CUDA operation" in str(each.message)]
    places = Counter("/".join(Path(each.filename).parts[-2:]) + f":{each.lineno}" for each in lines)
    return dict(places.most_common())


def memory_estimate(config: Config, num_parameters: int, data: int) -> float:
    """Bytes at the peak of a step in bf16, on one of `data` ranks, without teacher and recomputation: when the backward
    pass begins, with the gradient of the next-token logits. ZeRO 1, or 3 with weights that stay until the step ends.

    States as in docs/parallelism.md. A block keeps 34 bytes a position and unit of width: the inputs of its two norms,
    of qkv, out and up (2 each), q, k and v (6), attention's output (2), the inputs of the GELU and of down (8 each).
    """
    model, method = config.model, config.method
    tokens, width = config.training.micro_batch * model.context, model.hidden_size
    slots = [method.num_slots(model.context) * (index >= method.insertion_layer) for index in range(model.num_layers)]
    blocks = sum(34 * width * tokens * (1 + each / model.context) for each in slots)
    concepts = 2 * method.num_concepts * tokens if method.predict == "concepts" else 0
    states = 2 + 4 + 12 / data if config.parallel.zero == 1 else 2 + (2 + 4 + 12) / data
    return num_parameters * states + blocks + concepts + 2 * 2 * model.vocab_size * tokens
