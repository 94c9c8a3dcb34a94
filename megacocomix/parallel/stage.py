"""Pipeline stages: the model's class with parts missing, and the losses that live on each.

A stage holds neighbouring blocks. The embedding goes with the first block, the concept module with the block it stands
before, final norm and head with the last. So a cut never divides the change from T to 2T positions: a stage that begins
at `insertion_layer` receives T positions and adds the slots itself.
"""

import functools
import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from megacocomix.config import Config
from megacocomix.model.distillation import FrozenHead, hidden_distance, teacher_divergence
from megacocomix.model.flops import block_flops, head_flops, module_flops
from megacocomix.model.gpt2 import GPT2, assemble
from megacocomix.model.losses import MASKED, label_cross_entropy
from megacocomix.parallel.grid import Grid
from megacocomix.parallel.layers import TensorRanks
from megacocomix.parallel.tensor import cut, split_modules

TIED = "embed.tokens.weight"  # the name of the tied weight, wherever a copy of it is


def stage_blocks(config: Config) -> list[range]:
    """The blocks of each stage: cut at `parallel.cuts`, or so that the costliest stage is as cheap as can be.

    Costs are FLOPs: blocks behind the concept module count twice and more. Among equally good cuts the later stages
    are the smaller ones.
    """
    num_layers, parallel = config.model.num_layers, config.parallel
    if parallel.cuts:
        bounds = [0, *parallel.cuts, num_layers]
        return [range(first, stop) for first, stop in itertools.pairwise(bounds)]
    costs = [block_flops(config, index) for index in range(num_layers)]
    costs[-1] += head_flops(config)
    if config.method.has_module:
        costs[config.method.insertion_layer] += module_flops(config)

    @functools.cache
    def best(stop: int, num_stages: int) -> tuple[float, int]:
        """Cost of the costliest of `num_stages` stages over blocks [0, stop), and where the last of them begins."""
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
    """Shape [B, S, D] of what a stage receives from the one before it, on one tensor rank."""
    positions, parallel = config.model.context, config.parallel
    if stage_blocks(config)[stage].start > config.method.insertion_layer:
        positions += config.method.num_slots(positions)
    return (
        config.training.micro_batch,
        positions // (parallel.tensor if parallel.sequence else 1),
        config.model.hidden_size,
    )


class LocalStages(nn.Module):
    """The stages of this rank, with their losses: one, or under an interleaved schedule several. Parameters have no
    memory until `set_parameters`."""

    def __init__(self, config: Config, grid: Grid):
        super().__init__()
        cuts = stage_blocks(config)
        self.num_stages = len(cuts)
        self.indices = list(range(grid.pipeline_rank, self.num_stages, grid.pipeline))
        self.method = config.method
        self.teacher_head: FrozenHead | None = None  # set before a step that distills; no part of the model
        self.tensor_ranks = None
        if grid.tensor > 1:
            sequence = config.parallel.sequence
            self.tensor_ranks = TensorRanks(grid.tensor_group, grid.tensor_rank, grid.tensor, sequence)
        with torch.device("meta"):
            whole = assemble(config)
        self.whole_shapes = {name: parameter.shape for name, parameter in whole.named_parameters()}
        with torch.device("meta"):
            self.parts = nn.ModuleDict({str(index): self._part(config, cuts[index]) for index in self.indices})
        # Of the global batch, so that a loss does not depend on how the batch was cut. Set for every step.
        self.num_targets: Tensor | int = 1
        self.num_predicted: Tensor | int = 1
        self.data = grid.data
        self.losses = torch.zeros(3, dtype=torch.float64, device=grid.device)

    def forward(
        self,
        stage: int,
        x: Tensor,
        targets_BT1: Tensor,
        labels_BMk: Tensor | None = None,
        hidden_BME: Tensor | None = None,
        outputs_BTE: Tensor | None = None,
    ) -> Tensor:
        """What goes on to the next stage, [B, S, D]; of the last stage, the scalar loss.

        Losses are shares of the global batch's means, times the number of data ranks, over which gradients are
        averaged. The loss of what the concept module predicts joins the graph of what is returned: it needs no gradient
        from there. What the teacher did not give is not learned. The shares, before their weights, are added to
        `losses` (next token, prediction, distillation), where this rank has the head or the module; every tensor rank
        of such a stage adds the same.
        """
        part = self.parts[str(stage)]
        y, prediction = part(x)
        if stage == self.num_stages - 1:
            logits_BTV, loss = y, self._cross_entropy(y, targets_BT1, part.head) / self.num_targets
            self.losses[0] += loss.detach()
            if outputs_BTE is not None:
                divergence = self._divergence(logits_BTV, outputs_BTE, targets_BT1, part.head) / self.num_targets
                self.losses[2] += divergence.detach()
                loss = loss + self.method.kd_weight * divergence
            y = loss * self.data
        predicted = None
        if prediction is not None and labels_BMk is not None:
            predicted = shown = self._cross_entropy(prediction, labels_BMk, part.concept.predict) / self.num_predicted
        elif prediction is not None and hidden_BME is not None:
            predicted = self._own_distance(prediction, hidden_BME) / self.num_predicted
            splits = self.tensor_ranks and self.tensor_ranks.sequence
            shown = self.tensor_ranks.sum(predicted.detach()) if splits else predicted
        if predicted is not None:
            self.losses[1] += shown.detach()
            y = _Attach.apply(y, predicted * (self.method.concept_weight * self.data))
        return y

    def named_pieces(self) -> Iterator[tuple[str, nn.Parameter, bool]]:
        """Name in the whole model, parameter, and whether it is the second copy of a tied one."""
        for index, part in self.parts.items():
            for name, parameter in part.named_parameters():
                is_copy = name == "head.weight" and index != "0"
                yield TIED if is_copy else name, parameter, is_copy

    def set_parameters(self, whole_value: Callable[[str], Tensor], place: Callable[[Tensor], nn.Parameter]) -> None:
        """Give every parameter its value, one after the other: `whole_value(name)` is cut to this rank's piece, and
        `place` puts it where it is to stay. So a process never holds more than one whole parameter besides its own.
        """
        size, rank = (self.tensor_ranks.size, self.tensor_ranks.rank) if self.tensor_ranks else (1, 0)
        placed = {}
        for name, parameter, _ in list(self.named_pieces()):
            placed[parameter] = place(cut(name, whole_value(name), size, rank))
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
        if self.tensor_ranks:
            split_modules(part, self.tensor_ranks)
        return part

    def _cross_entropy(self, logits: Tensor, labels: Tensor, layer: nn.Module) -> Tensor:
        if self.tensor_ranks is None:
            return label_cross_entropy(logits, labels)
        return label_cross_entropy(logits, labels, layer.piece.start, self.tensor_ranks.join_losses)

    def _divergence(self, logits: Tensor, outputs: Tensor, targets: Tensor, layer: nn.Module) -> Tensor:
        counts = targets[..., 0] != MASKED
        if self.tensor_ranks is None:
            return teacher_divergence(logits, outputs, self.teacher_head, counts)
        head = self.teacher_head.rows(layer.piece.start, layer.piece.stop)
        return teacher_divergence(logits, outputs, head, counts, self.tensor_ranks.stack)

    def _own_distance(self, predicted: Tensor, target: Tensor) -> Tensor:
        """Of the positions that this tensor rank holds, over all of which the gradients are summed."""
        if self.tensor_ranks:
            target = self.tensor_ranks.own_positions(target)
        return hidden_distance(predicted, target, self.method.hidden_loss)


class _Attach(torch.autograd.Function):
    """y unchanged; in the backward pass `loss` gets gradient 1, as if it had been added to the final loss."""

    @staticmethod
    def forward(ctx, y, loss):
        return y.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad, torch.ones((), device=grad.device)
