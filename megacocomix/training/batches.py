"""The micro-batches of a step, tokens and what the teacher says of them, for one data rank. The teacher reads the next
step's tokens while the student is at this one's, where a GPU has a stream to spare."""

import torch
import torch.distributed as dist
from torch import Tensor

from megacocomix.config import Config
from megacocomix.data.tokens import check_token_ids
from megacocomix.errors import UserError
from megacocomix.model.losses import count_labelled, next_token_targets
from megacocomix.parallel.grid import Grid
from megacocomix.parallel.pipeline import MicroBatch
from megacocomix.teacher.guidance import Signals
from megacocomix.validate import Inputs


class StepBatches:
    """What this rank trains on, step by step, up to `last_step`. N sequences of a step, T tokens.

    Data that cannot be trained on is kept in `bad_data`, for all ranks to stop at together: the others are on their way
    into this step's collectives.
    """

    def __init__(self, config: Config, grid: Grid, inputs: Inputs, last_step: int):
        self.config, self.grid, self.inputs, self.last_step = config, grid, inputs, last_step
        self.bad_data: UserError | None = None
        self._bad_steps: dict[int, UserError] = {}
        has_stream = inputs.guidance is not None and grid.device.type == "cuda"
        self.stream = torch.cuda.Stream(grid.device) if has_stream else None
        self.ahead: dict[int, tuple[Tensor, Signals]] = {}

    def take(self, step: int) -> tuple[list[MicroBatch], Tensor | int]:
        """The micro-batches of a step, and the number of positions of all data ranks whose prediction is learned.
        Collective where there is a teacher."""
        training = self.config.training
        if self.inputs.guidance is None:
            tokens_NT = self._read(step)
            self.bad_data = self._bad_steps.pop(step, None)
            return _micro_batches(tokens_NT, Signals(), training.micro_batch), 1
        tokens_NT, signals = self._guided_ahead(step) if self.stream else self._guided(step)
        self.bad_data = self._bad_steps.pop(step, None)
        # The ranks of one copy of the model see the same samples: each asked the teacher about its part, and only the
        # answers travel.
        if self.grid.model > 1:
            for signal in signals:
                if signal is not None:
                    dist.all_reduce(signal, group=self.grid.model_group)
        num_predicted = 1
        if signals.labels_NMk is not None:
            num_predicted = count_labelled(signals.labels_NMk)
            dist.all_reduce(num_predicted, group=self.grid.data_group)
            num_predicted = num_predicted.clamp_(min=1)
        elif signals.hidden_NME is not None:
            num_predicted = training.global_batch * signals.hidden_NME.shape[1]
        return _micro_batches(tokens_NT, signals, training.micro_batch), num_predicted

    def _guided_ahead(self, step: int) -> tuple[Tensor, Signals]:
        """`_guided`, on its own stream; the teacher's kernels for the next step are queued before the caller queues the
        student's of this one, so the two run side by side."""
        if step not in self.ahead:
            self.stream.wait_stream(torch.cuda.current_stream())  # which put teacher and autoencoder onto the device
            self._start(step)
        tokens_NT, signals = self.ahead.pop(step)
        main = torch.cuda.current_stream()
        main.wait_stream(self.stream)
        for tensor in (tokens_NT, *signals):
            if tensor is not None:
                tensor.record_stream(main)  # else its memory could be given to the next step while in use here
        if step + 1 < self.last_step:
            self._start(step + 1)
        return tokens_NT, signals

    def _start(self, step: int) -> None:
        with torch.cuda.stream(self.stream):
            self.ahead[step] = self._guided(step)

    def _guided(self, step: int) -> tuple[Tensor, Signals]:
        """Tokens [N, T] of a step, and the signals of this rank's part of them, zeros in the others'."""
        grid, dataset, guidance = self.grid, self.inputs.train, self.inputs.guidance
        tokens_NT = self._read(step)
        windows = [dataset.window_index(position) for position in self._positions(step)]
        first, stop = (len(windows) * rank // grid.model for rank in (grid.model_rank, grid.model_rank + 1))
        own = None
        if first < stop:
            try:
                own = guidance(windows[first:stop], tokens_NT[first:stop])
            except UserError as error:  # a damaged shard of the label cache
                self._bad_steps[step] = error
        if own and grid.model == 1:
            return tokens_NT, own
        signals = guidance.zeros(tokens_NT)
        for signal, part in zip(signals, own or Signals(), strict=True):
            if part is not None:
                signal[first:stop] = part
        return tokens_NT, signals

    def _read(self, step: int) -> Tensor:
        """Tokens of this data rank's micro-batches one after the other, int64 [N, T] on the device."""
        tokens = self.inputs.train.batch(self._positions(step))
        try:
            check_token_ids(tokens, self.inputs.vocab_size, self.config.data.train)
        except UserError as error:
            self._bad_steps[step] = error
            tokens = tokens.clip(0, self.inputs.vocab_size - 1)
        return torch.from_numpy(tokens).to(self.grid.device)

    def _positions(self, step: int) -> list[int]:
        """The same as positions of the sample order: micro-batch by micro-batch, the data ranks take turns."""
        training, grid = self.config.training, self.grid
        first = step * training.global_batch
        stride = training.micro_batch * grid.data
        starts = range(first + grid.data_rank * training.micro_batch, first + training.global_batch, stride)
        return [start + row for start in starts for row in range(training.micro_batch)]


def _micro_batches(tokens_NT: Tensor, signals: Signals, size: int) -> list[MicroBatch]:
    rows = [slice(start, start + size) for start in range(0, len(tokens_NT), size)]
    parts = lambda row: (None if signal is None else signal[row] for signal in signals)
    return [MicroBatch(tokens_NT[row], next_token_targets(tokens_NT[row]), *parts(row)) for row in rows]
