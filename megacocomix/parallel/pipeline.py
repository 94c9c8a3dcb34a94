"""The pipeline's schedule (1F1B, interleaved 1F1B, forward only) and the messages between its stages.

All ranks derive the same plan of rounds. In a round, a rank runs at most one forward or backward pass of one stage. At
the end of the round it sends the result, and the receiver posts its receive in the same round. So messages always match
in order, on any backend. The schedule uses the engine only through two callables.
"""

import functools
from collections.abc import Callable, Iterable
from itertools import islice
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megacocomix.parallel.grid import Grid
from megacocomix.parallel.stage import NUM_LOSSES, MicroBatch


class Pass(NamedTuple):
    """One forward or backward pass of one micro-batch through one stage."""

    is_forward: bool
    stage: int
    micro: int


def rank_order(rank: int, pipeline: int, virtual_stages: int, num_micro: int) -> list[Pass]:
    """The passes of one rank, in order. Stage s lives on rank s mod pipeline.

    1F1B: enough forward passes to fill the pipeline behind this rank, then one backward pass after each forward pass.
    With several stages per rank (virtual stages), micro-batches go in groups of `pipeline` through the first stages of
    all ranks, then through the second ones and so on (interleaved 1F1B; Narayanan et al. 2021, §2.2). num_micro must
    then be a multiple of pipeline.
    """
    assert virtual_stages == 1 or num_micro % pipeline == 0
    total = num_micro * virtual_stages

    def nth_pass(index: int, is_forward: bool) -> Pass:
        group, within = divmod(index, pipeline * virtual_stages)
        virtual, micro = divmod(within, pipeline)
        virtual = virtual if is_forward else virtual_stages - 1 - virtual
        return Pass(is_forward, virtual * pipeline + rank, group * pipeline + micro)

    forward = [nth_pass(index, True) for index in range(total)]
    backward = [nth_pass(index, False) for index in range(total)]
    behind = pipeline - 1 - rank
    num_ahead = min(behind if virtual_stages == 1 else 2 * behind + (virtual_stages - 1) * pipeline, total)
    order = forward[:num_ahead]
    for ahead, behind in zip(forward[num_ahead:], backward, strict=False):
        order += [ahead, behind]
    return order + backward[total - num_ahead :]


def plan_rounds(orders: list[list[Pass]], num_stages: int) -> list[list[Pass | None]]:
    """Rounds with at most one pass per rank. A pass runs as early as its rank's order and its inputs allow. A result is
    available one round after its pass."""
    done: set[Pass] = set()
    waiting = [list(reversed(order)) for order in orders]
    rounds = []
    while any(waiting):
        now = [order[-1] if order and _inputs(order[-1], num_stages) <= done else None for order in waiting]
        assert any(now), "no rank can continue"
        for order, step in zip(waiting, now, strict=True):
            if step:
                order.pop()
        done |= {step for step in now if step}
        rounds.append(now)
    return rounds


def _inputs(step: Pass, num_stages: int) -> set[Pass]:
    if step.is_forward:
        return {Pass(True, step.stage - 1, step.micro)} if step.stage else set()
    needed = {Pass(True, step.stage, step.micro)}
    if step.stage < num_stages - 1:
        needed.add(Pass(False, step.stage + 1, step.micro))
    return needed


class Pipeline:
    """The stages of all ranks as one model. It runs a step's forward and backward passes, or forward passes only."""

    def __init__(self, grid: Grid, num_stages: int, input_shape: Callable[[int], tuple], dtype: torch.dtype):
        """`input_shape(stage)` is the shape of the hidden state that a stage receives on this rank."""
        self.grid, self.num_stages, self.dtype = grid, num_stages, dtype
        self.input_shape = functools.cache(input_shape)
        # NCCL requires that all ranks take part in a group's first communication.
        if grid.pipeline > 1:
            dist.all_reduce(torch.zeros(1, device=grid.device), group=grid.pipeline_group)

    def train(self, forward: Callable, before_backward: Callable[[], None], batches: list[MicroBatch]) -> Tensor:
        """Forward and backward passes of every micro-batch. `forward(stage, x, batch)` takes the output of the stage
        before (None on the first stage). It returns the next stage's input or the last stage's loss, and this rank's
        shares of the losses. `before_backward()` is called right before every backward pass. Returns the sum of the
        shares, fp64."""
        pipeline = self.grid.pipeline
        orders = [rank_order(rank, pipeline, self.num_stages // pipeline, len(batches)) for rank in range(pipeline)]
        losses, graphs = self._no_losses(), {}

        def run(step: Pass, received: Tensor | None) -> Tensor | None:
            if step.is_forward:
                if received is not None:
                    received.requires_grad_()
                y, shares = forward(step.stage, received, batches[step.micro])
                losses.add_(shares)
                graphs[step.stage, step.micro] = received, y
                return y.detach()
            x, y = graphs.pop((step.stage, step.micro))
            before_backward()
            torch.autograd.backward(y, received)
            return x.grad if x is not None else None

        self._run(orders, run)
        return losses

    @torch.no_grad()
    def evaluate(self, forward: Callable, batches: Iterable[MicroBatch]) -> Tensor:
        """Forward passes only, of any number of micro-batches, in groups that are large enough to keep the pipeline
        busy. Returns the sum of the shares, as `train` does."""
        batches, pipeline, losses = iter(batches), self.grid.pipeline, self._no_losses()
        while some := list(islice(batches, 4 * pipeline)):
            orders = [
                [Pass(True, stage, micro) for stage in range(rank, self.num_stages, pipeline) for micro in micros]
                for rank, micros in enumerate([range(len(some))] * pipeline)
            ]

            def run(step: Pass, received: Tensor | None, some=some) -> Tensor:
                y, shares = forward(step.stage, received, some[step.micro])
                losses.add_(shares)
                return y

            self._run(orders, run)
        return losses

    def _no_losses(self) -> Tensor:
        return torch.zeros(NUM_LOSSES, dtype=torch.float64, device=self.grid.device)

    def _run(self, orders: list[list[Pass]], run: Callable[[Pass, Tensor | None], Tensor | None]) -> None:
        arriving: dict[Pass, tuple] = {}
        sending = []
        for steps in plan_rounds(orders, self.num_stages):
            result = None
            if step := steps[self.grid.pipeline_rank]:
                tensor, work = arriving.pop(step, (None, None))
                if work:
                    work.wait()
                result = run(step, tensor)
            messages, goals = self._messages(steps, result)
            works = dist.batch_isend_irecv(messages) if messages else []
            works = works if len(works) == len(messages) else works * len(messages)  # NCCL returns one work for all
            sending = [(tensor, work) for tensor, work in sending if not work.is_completed()]
            for message, goal, work in zip(messages, goals, works, strict=True):
                if goal:
                    arriving[goal] = message.tensor, work
                else:  # the tensor must stay alive until it is sent
                    sending.append((message.tensor, work))
        for _, work in sending:
            work.wait()

    def _messages(self, steps: list[Pass | None], result: Tensor | None) -> tuple[list, list]:
        """This rank's messages after a round, and for each the pass that needs it if it is received, else None. They
        are in the order of their senders, so that two ranks that send to each other agree on the order."""
        grid, messages, goals = self.grid, [], []
        for sender, step in enumerate(steps):
            goal = _next_pass(step, self.num_stages) if step else None
            if goal is None:
                continue
            receiver = goal.stage % grid.pipeline
            if sender == grid.pipeline_rank:
                peer = grid.pipeline_peer(receiver)
                messages.append(dist.P2POp(dist.isend, result.contiguous(), peer, grid.pipeline_group))
                goals.append(None)
            elif receiver == grid.pipeline_rank:
                shape = self.input_shape(goal.stage if goal.is_forward else goal.stage + 1)
                buffer = torch.empty(shape, dtype=self.dtype, device=grid.device)
                messages.append(dist.P2POp(dist.irecv, buffer, grid.pipeline_peer(sender), grid.pipeline_group))
                goals.append(goal)
        return messages, goals


def _next_pass(step: Pass, num_stages: int) -> Pass | None:
    """The pass that uses the result of `step`; None at both ends of the model."""
    stage = step.stage + (1 if step.is_forward else -1)
    return step._replace(stage=stage) if 0 <= stage < num_stages else None
