"""The micro-batches of a step, tokens and labels, for one data rank. Labels of the next step are made while the student
is at this one, where a GPU has a stream to spare."""

import torch
import torch.distributed as dist
from torch import Tensor

from megacocomix.config import Config
from megacocomix.data.tokens import check_token_ids
from megacocomix.errors import UserError
from megacocomix.model.losses import count_labelled, next_token_targets
from megacocomix.parallel.grid import Grid
from megacocomix.parallel.pipeline import MicroBatch
from megacocomix.validate import Inputs


class StepBatches:
    """What this rank trains on, step by step, up to `last_step`. N sequences of a step, T tokens, K_attr labels.

    Data that cannot be trained on is kept in `bad_data`, for all ranks to stop at together: the others are on their way
    into this step's collectives.
    """

    def __init__(self, config: Config, grid: Grid, inputs: Inputs, last_step: int):
        self.config, self.grid, self.inputs, self.last_step = config, grid, inputs, last_step
        self.bad_data: UserError | None = None
        self._bad_steps: dict[int, UserError] = {}
        has_stream = inputs.labels is not None and grid.device.type == "cuda"
        self.stream = torch.cuda.Stream(grid.device) if has_stream else None
        self.ahead: dict[int, tuple[Tensor, Tensor]] = {}

    def take(self, step: int) -> tuple[list[MicroBatch], Tensor | None]:
        """The micro-batches of a step, and the number of labelled positions in all data ranks' (None without labels).
        Collective where there are labels."""
        batch = self.config.training.micro_batch
        if self.inputs.labels is None:
            tokens_NT, labels_NTk = self._read(step), None
        else:
            tokens_NT, labels_NTk = self._labelled_ahead(step) if self.stream else self._labelled(step)
        self.bad_data = self._bad_steps.pop(step, None)
        if labels_NTk is None:
            return [_micro_batch(tokens_BT, None) for tokens_BT in tokens_NT.split(batch)], None
        # The ranks of one copy of the model see the same samples: each labelled its part, and only labels travel.
        dist.all_reduce(labels_NTk, group=self.grid.model_group)
        num_labelled = count_labelled(labels_NTk)
        dist.all_reduce(num_labelled, group=self.grid.data_group)
        pieces = zip(tokens_NT.split(batch), labels_NTk.split(batch), strict=True)
        return [_micro_batch(*piece) for piece in pieces], num_labelled.clamp_(min=1)

    def _labelled_ahead(self, step: int) -> tuple[Tensor, Tensor]:
        """`_labelled`, on its own stream; the kernels that label the next step are queued before the caller queues the
        student's of this one, so the two run side by side."""
        if step not in self.ahead:
            self.stream.wait_stream(torch.cuda.current_stream())  # which put teacher and autoencoder onto the device
            self._start(step)
        labelled = self.ahead.pop(step)
        main = torch.cuda.current_stream()
        main.wait_stream(self.stream)
        for tensor in labelled:
            tensor.record_stream(main)  # else its memory could be given to the next step's labels while in use here
        if step + 1 < self.last_step:
            self._start(step + 1)
        return labelled

    def _start(self, step: int) -> None:
        with torch.cuda.stream(self.stream):
            self.ahead[step] = self._labelled(step)

    def _labelled(self, step: int) -> tuple[Tensor, Tensor]:
        """Tokens [N, T] of a step, and labels [N, T, K_attr]: those of this rank's part, zeros in the others'."""
        grid, dataset = self.grid, self.inputs.train
        tokens_NT = self._read(step)
        windows = [dataset.window_index(position) for position in self._positions(step)]
        labels_NTk = tokens_NT.new_zeros(*tokens_NT.shape, self.config.method.num_labels)
        first, stop = (len(windows) * rank // grid.model for rank in (grid.model_rank, grid.model_rank + 1))
        if first < stop:
            try:
                labels_NTk[first:stop] = self.inputs.labels(windows[first:stop], tokens_NT[first:stop])
            except UserError as error:  # a damaged shard of the label cache
                self._bad_steps[step] = error
        return tokens_NT, labels_NTk

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


def _micro_batch(tokens_BT: Tensor, labels_BTk: Tensor | None) -> MicroBatch:
    return MicroBatch(tokens_BT, next_token_targets(tokens_BT), labels_BTk)
