"""The windows and teacher targets that a data rank trains on in each step.

The ranks of one copy of the model share the work of making the targets. On a GPU, windows and targets are made one step
ahead, on a CUDA stream of their own, in slices: one before each forward pass of the student."""

from collections.abc import Callable
from itertools import islice
from math import ceil
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megacocomix.config.schema import Config
from megacocomix.data.tokens import TokenDataset, check_token_ids
from megacocomix.errors import UserError
from megacocomix.model.losses import count_labelled, next_token_targets
from megacocomix.parallel.grid import Grid
from megacocomix.parallel.stage import MicroBatch
from megacocomix.teacher.labels import Passes, at_once
from megacocomix.teacher.targets import TargetSource, TeacherTargets
from megacocomix.training.inputs import Inputs


class Step(NamedTuple):
    """The micro-batches of a data rank in one step."""

    batches: list[MicroBatch]
    error: UserError | None
    """An error in the data. All ranks stop together after the step, because the other ranks are already in
    its collectives."""


class Windows(NamedTuple):
    """The windows of a data rank in one step, micro-batch after micro-batch."""

    indices: list[int]
    tokens_NT: Tensor
    """int64, on the device."""
    error: UserError | None


class WindowReader:
    """Reads the windows of this data rank. The data ranks take turns in the sample order, a micro-batch at a time."""

    def __init__(self, config: Config, grid: Grid, dataset: TokenDataset, vocab_size: int):
        self.training, self.name, self.grid = config.training, config.data.train, grid
        self.dataset, self.vocab_size = dataset, vocab_size

    def read(self, step: int) -> Windows:
        """The windows of a step."""
        indices = [self.dataset.window_index(position) for position in self._positions(step)]
        tokens, error = self.dataset.read(indices), None
        try:
            check_token_ids(tokens, self.vocab_size, self.name)
        except UserError as found:
            tokens, error = tokens.clip(0, self.vocab_size - 1), found
        tokens_NT = torch.from_numpy(tokens)
        if self.grid.device.type == "cuda":
            tokens_NT = tokens_NT.pin_memory()  # a copy of other memory lets the host wait for the stream
        return Windows(indices, tokens_NT.to(self.grid.device, non_blocking=True), error)

    def _positions(self, step: int) -> list[int]:
        size, first = self.training.micro_batch, step * self.training.global_batch
        starts = range(first + self.grid.data_rank * size, first + self.training.global_batch, size * self.grid.data)
        return [start + row for start in starts for row in range(size)]


class SharedTargets:
    """Teacher targets of all windows. Each rank of one copy of the model makes the targets of some windows: these ranks
    read the same windows, so only the targets have to be sent."""

    def __init__(self, source: TargetSource, grid: Grid):
        self.source, self.grid = source, grid

    def make_part(self, windows: Windows) -> Passes[tuple[TeacherTargets, UserError | None]]:
        """Targets of this rank's part of the windows, zeros for the others, and an error, such as a damaged shard of
        the label cache; a forward pass of the teacher at a time."""
        grid, indices, tokens_NT = self.grid, windows.indices, windows.tokens_NT
        first, stop = (len(indices) * rank // grid.model for rank in (grid.model_rank, grid.model_rank + 1))
        part = error = None
        if first < stop:
            try:
                part = yield from self.source.passes(indices[first:stop], tokens_NT[first:stop])
            except UserError as found:
                error = found
        if part and grid.model == 1:
            return part, error
        targets = self.source.zeros(tokens_NT)
        for whole, own in zip(targets, part or TeacherTargets(), strict=True):
            if own is not None:
                whole[first:stop] = own
        return targets, error

    def merge(self, targets: TeacherTargets) -> None:
        """Add up the parts of all ranks, in place. Collective over the ranks of one copy of the model."""
        if self.grid.model > 1:
            for target in targets:
                if target is not None:
                    dist.all_reduce(target, group=self.grid.model_group)


class Prefetcher:
    """Makes the next step's targets on a CUDA stream of its own, beside the student's kernels of this step.

    A stream takes about a thousand kernels, then the host waits. If all of the teacher's were queued at once, the
    student's would start late. So a slice of them is queued before each of the student's forward passes."""

    def __init__(self, make: Callable[[int], Passes[tuple]], last_step: int, device: torch.device, num_slices: int):
        """`make(step)` returns tuples of tensors, which the caller uses on its own stream, and other values. The
        student has `num_slices` forward passes in a step."""
        self.make, self.last_step, self.num_slices = make, last_step, num_slices
        self.stream = torch.cuda.Stream(device)
        self.slice_size = 1  # in forward passes of the teacher
        self.step, self.passes, self.num_queued = -1, iter(()), 0  # of the step that is being made
        self.made = None

    def __call__(self, step: int) -> tuple:
        """The result of `make(step)`, of which it queues what is left."""
        main = torch.cuda.current_stream()
        if step != self.step:
            self.stream.wait_stream(main)  # it put teacher and autoencoder onto the device
            self._begin(step)
        self._queue(None)
        main.wait_stream(self.stream)
        made, self.made = self.made, None
        for values in made:
            for value in values if isinstance(values, tuple) else ():
                if torch.is_tensor(value):
                    value.record_stream(main)  # otherwise the next step could reuse its memory too early
        # With an incomplete cache the number of passes varies.
        self.slice_size = max(self.slice_size, ceil(self.num_queued / self.num_slices))
        if step + 1 < self.last_step:
            self._begin(step + 1)
        return made

    def prefetch(self) -> None:
        """Queue a slice of the next step's targets."""
        self._queue(self.slice_size)

    def _begin(self, step: int) -> None:
        def passes():
            self.made = yield from self.make(step)

        self.step, self.passes, self.num_queued = step, passes(), 0

    def _queue(self, num_passes: int | None) -> None:
        with torch.cuda.stream(self.stream):
            self.num_queued += sum(1 for _ in islice(self.passes, num_passes))


class StepBatches:
    """The micro-batches of each step, up to `last_step`."""

    def __init__(self, config: Config, grid: Grid, inputs: Inputs, last_step: int):
        self.training, self.grid = config.training, grid
        self.num_targets = config.training.global_batch * (config.model.context - 1)
        self.reader = WindowReader(config, grid, inputs.train, inputs.vocab_size)
        self.targets = SharedTargets(inputs.targets, grid) if inputs.targets else None
        is_ahead = self.targets is not None and grid.device.type == "cuda"
        num_forwards = config.training.global_batch // (config.training.micro_batch * grid.data)
        num_forwards *= config.parallel.virtual_stages
        self.ahead = Prefetcher(self._make, last_step, grid.device, num_forwards) if is_ahead else None

    def take(self, step: int) -> Step:
        """This rank's micro-batches of a step. Collective if there are teacher targets."""
        windows, targets, error = self.ahead(step) if self.ahead else at_once(self._make(step))
        if self.targets:
            self.targets.merge(targets)
        num_predicted, size = self._num_predicted(targets), self.training.micro_batch
        batches = []
        for start in range(0, len(windows.tokens_NT), size):
            rows = slice(start, start + size)
            tokens_BT = windows.tokens_NT[rows]
            own = (None if target is None else target[rows] for target in targets)
            batches.append(MicroBatch(tokens_BT, next_token_targets(tokens_BT), self.num_targets, *own, num_predicted))
        return Step(batches, windows.error or error)

    def prefetch(self) -> None:
        """On a GPU, queue a part of the next step's targets. Called before each forward pass of the student."""
        if self.ahead:
            self.ahead.prefetch()

    def _make(self, step: int) -> Passes[tuple[Windows, TeacherTargets, UserError | None]]:
        windows = self.reader.read(step)
        if self.targets is None:
            return windows, TeacherTargets(), None
        return windows, *(yield from self.targets.make_part(windows))

    def _num_predicted(self, targets: TeacherTargets) -> Tensor | int:
        """Positions of all data ranks with a loss on their prediction."""
        if targets.labels_NMk is not None:
            count = count_labelled(targets.labels_NMk)
            dist.all_reduce(count, group=self.grid.data_group)
            return count.clamp_(min=1)
        if targets.hidden_NME is not None:
            return self.training.global_batch * targets.hidden_NME.shape[1]
        return 1
