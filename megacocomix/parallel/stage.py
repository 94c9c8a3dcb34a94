"""Pipeline stages: the model's class with parts removed, and the losses of each stage.

A stage holds consecutive blocks. The first block's stage also has the embedding, the last block's stage has the final
norm and the head, and the stage of block `insertion_layer` has the concept module. So a stage that begins at
`insertion_layer` receives T positions and adds the slots itself.
"""

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megacocomix.config.schema import Config
from megacocomix.model.distillation import hidden_distance, teacher_divergence
from megacocomix.model.flops import block_flops, head_flops, module_flops
from megacocomix.model.gpt2 import GPT2, assemble
from megacocomix.model.heads import FrozenHead
from megacocomix.model.losses import MASKED, label_cross_entropy
from megacocomix.parallel.grid import Grid
from megacocomix.parallel.layers import TensorGroup
from megacocomix.parallel.tensor import parallelize, shard, shard_of, skip_padding

TIED = "embed.tokens.weight"  # the name of the tied weight, for both of its copies


def stage_blocks(config: Config) -> list[range]:
    """The blocks of each stage: as `parallel.split_points` divides them, else so that the costliest stage is as cheap
    as possible.

    Costs are FLOPs: a block after the concept module costs at least twice as much. Among equally good divisions the one
    with smaller later stages is taken.
    """
    num_layers, parallel = config.model.num_layers, config.parallel
    if parallel.split_points:
        bounds = [0, *parallel.split_points, num_layers]
        return [range(first, stop) for first, stop in itertools.pairwise(bounds)]
    costs = [block_flops(config, index) for index in range(num_layers)]
    costs[-1] += head_flops(config)
    if config.method.has_module:
        costs[config.method.insertion_layer] += module_flops(config)

    @functools.cache
    def best(stop: int, num_stages: int) -> tuple[float, int]:
        """(Largest cost of a stage, −first block of the last stage) of the best division of blocks [0, stop)."""
        if num_stages == 1:
            return sum(costs[:stop]), 0
        return min(
            (max(best(first, num_stages - 1)[0], sum(costs[first:stop])), -first)
            for first in range(num_stages - 1, stop)
        )

    stages, stop = [], num_layers
    for num_stages in range(parallel.num_stages, 0, -1):
        first = abs(best(stop, num_stages)[1])
        stages.insert(0, range(first, stop))
        stop = first
    return stages


def hidden_shape(config: Config, stage: int) -> tuple[int, int, int]:
    """Shape [B, S, D] of the hidden state that a stage receives from the one before it, on one tensor rank."""
    positions, parallel = config.model.context, config.parallel
    if stage_blocks(config)[stage].start > config.method.insertion_layer:
        positions += config.method.num_slots(positions)
    return (
        config.training.micro_batch,
        positions // (parallel.tensor if parallel.sequence else 1),
        config.model.hidden_size,
    )


class MicroBatch(NamedTuple):
    """One micro-batch. Every stage gets it and uses what it needs. The counts that divide its losses are those of the
    global batch, so that a loss does not depend on how the batch was split."""

    tokens_BT: Tensor
    targets_BT1: Tensor
    num_targets: Tensor | int = 1
    """Number of next-token targets in the global batch. 1 gives the sum of the losses."""
    labels_BMk: Tensor | None = None
    hidden_BME: Tensor | None = None
    outputs_BTE: Tensor | None = None
    """These three are fields of `TeacherTargets`. The loss of one that is None is not computed."""
    num_predicted: Tensor | int = 1
    """Number of positions in the global batch whose prediction has a target."""


NUM_LOSSES = 3  # next token, prediction (of concepts or of a hidden state), distillation


class StageModule(nn.Module):
    """The stages of this rank, with their losses: one stage, or several under an interleaved schedule. Parameters have
    no memory until `set_parameters`."""

    def __init__(self, config: Config, grid: Grid, teacher_head: FrozenHead | None = None):
        """A method that distills needs `teacher_head`, which is not part of the model."""
        super().__init__()
        blocks = stage_blocks(config)
        self.num_stages = len(blocks)
        self.indices = list(range(grid.pipeline_rank, self.num_stages, grid.pipeline))
        self.method = config.method
        self.tensor_group, self.tensor, self.tensor_rank = None, grid.tensor, grid.tensor_rank
        if grid.tensor > 1:
            sequence = config.parallel.sequence
            self.tensor_group = TensorGroup(grid.tensor_group, grid.tensor_rank, grid.tensor, sequence)
        with torch.device("meta"):
            whole = assemble(config)
            self.parts = nn.ModuleDict({str(index): self._part(config, blocks[index]) for index in self.indices})
        self.whole_shapes = {name: parameter.shape for name, parameter in whole.named_parameters()}
        self.tokens, self.concepts = self._classes(TIED), self._classes("concept.predict.weight")
        self.teacher_head = teacher_head
        if teacher_head and self.tensor_group and self.num_stages - 1 in self.indices:
            self.teacher_head = teacher_head.rows(self.tokens.start, self.tokens.stop)
        self.data = grid.data
        # All tensor ranks of a stage have the same losses, so only one of them counts.
        self.counts_losses = grid.tensor_rank == 0

    def forward(self, stage: int, x: Tensor | None, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """x [B, S, D], None on the first stage → (the next stage's input [B, S, D], or on the last stage the scalar
        loss; this rank's shares of the losses, fp64 [NUM_LOSSES], without their weights).

        The scalar loss is this micro-batch's share of the global batch's mean, times the number of data ranks, because
        gradients are averaged over them. The prediction's loss is attached to the returned tensor's graph, so that its
        backward pass runs with that tensor's.
        """
        part = self.parts[str(stage)]
        y, prediction = part(batch.tokens_BT if x is None else x)
        losses = torch.zeros(NUM_LOSSES, dtype=torch.float64, device=y.device)
        if stage == self.num_stages - 1:
            loss = self._cross_entropy(y, batch.targets_BT1, self.tokens) / batch.num_targets
            losses[0] = loss.detach()
            if batch.outputs_BTE is not None:
                divergence = self._divergence(y, batch.outputs_BTE, batch.targets_BT1) / batch.num_targets
                losses[2] = divergence.detach()
                loss = loss + self.method.kd_weight * divergence
            y = loss * self.data
        predicted = None
        if prediction is not None and batch.labels_BMk is not None:
            predicted = self._cross_entropy(prediction, batch.labels_BMk, self.concepts) / batch.num_predicted
            losses[1] = predicted.detach()
        elif prediction is not None and batch.hidden_BME is not None:
            predicted = self._local_distance(prediction, batch.hidden_BME) / batch.num_predicted
            splits = self.tensor_group and self.tensor_group.sequence
            losses[1] = self.tensor_group.all_reduce(predicted.detach()) if splits else predicted.detach()
        if predicted is not None:
            y = _Attach.apply(y, predicted * (self.method.concept_weight * self.data))
        return y, losses if self.counts_losses else torch.zeros_like(losses)

    def named_shards(self) -> Iterator[tuple[str, nn.Parameter, bool]]:
        """The name in the whole model, this rank's shard, and whether it is the second copy of a tied parameter."""
        for index, part in self.parts.items():
            for name, parameter in part.named_parameters():
                is_copy = name == "head.weight" and index != "0"
                yield TIED if is_copy else name, parameter, is_copy

    def set_parameters(self, whole_value: Callable[[str], Tensor], place: Callable[[Tensor], nn.Parameter]) -> None:
        """Give every parameter its value, one at a time: this rank's shard of `whole_value(name)`, which is a tensor or
        a slice of a safetensors file. `place` moves it to its final memory. So a process never holds more than one
        whole parameter besides its shards."""
        placed = {}
        for name, parameter, _ in list(self.named_shards()):
            placed[parameter] = place(shard(name, whole_value(name), self.tensor, self.tensor_rank))
        for module in self.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = placed[parameter]

    def _part(self, config: Config, blocks: range) -> GPT2:
        part = assemble(config)
        for index in range(config.model.num_layers):
            if index not in blocks:
                del part.blocks[str(index)]
        is_first, is_last = blocks.start == 0, blocks.stop == config.model.num_layers
        if is_last and not is_first:
            part.head.weight = nn.Parameter(torch.empty_like(part.head.weight))
        if not is_first:
            part.embed = None
        if not is_last:
            part.norm = part.head = None
        if config.method.insertion_layer not in blocks:
            part.concept = None
        if self.tensor_group:
            parallelize(part, self.tensor_group)
        else:
            skip_padding(part)
        recompute_blocks(part, config.training.recompute)
        return part

    def _classes(self, name: str) -> range | None:
        """The tokens or concepts whose rows of this weight are on this tensor rank; None if the model has no such
        weight."""
        if name not in self.whole_shapes:
            return None
        extent = shard_of(name, self.whole_shapes[name], self.tensor, self.tensor_rank)
        return range(extent.start, extent.stop)

    def _cross_entropy(self, logits: Tensor, labels: Tensor, classes: range) -> Tensor:
        combine = self.tensor_group and self.tensor_group.combine_losses
        return label_cross_entropy(logits, labels, classes, combine)

    def _divergence(self, logits: Tensor, outputs: Tensor, targets: Tensor) -> Tensor:
        counts, all_gather = targets[..., 0] != MASKED, self.tensor_group and self.tensor_group.all_gather
        return teacher_divergence(logits, outputs, self.teacher_head, counts, len(self.tokens), all_gather)

    def _local_distance(self, predicted: Tensor, target: Tensor) -> Tensor:
        """The distance over the positions of this tensor rank. Gradients are later summed over the tensor ranks."""
        if self.tensor_group:
            target = self.tensor_group.local_positions(target)
        return hidden_distance(predicted, target, self.method.hidden_loss)


class _Attach(torch.autograd.Function):
    """Returns y unchanged. In the backward pass `loss` gets gradient 1, as if it had been added to the final loss."""

    @staticmethod
    def forward(ctx, y, loss):
        return y.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad, torch.ones((), device=grad.device)


def recompute_blocks(part: GPT2, mode: Literal["none", "selective", "full"]) -> None:
    """With `full`, each block keeps only its input and runs again in the backward pass; with `selective`, each
    attention does. Losses and gradients do not change."""
    if mode == "none":
        return
    for block in part.blocks.values():
        module = block if mode == "full" else block.attention
        module.forward = functools.partial(checkpoint, module.forward, use_reentrant=False)
