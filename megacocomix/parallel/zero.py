"""DeepSpeed: engine construction, and every place where its internals are touched. Written for the versions in TESTED.

The rest of the project sees an engine that it can call, that sums gradients over micro-batches and steps, and the fp32
weights, gradients and Adam moments as slices by parameter name (`local_slices`), whatever the ZeRO stage.

What DeepSpeed would do otherwise, and where it is mended here:
- ZeRO-3 broadcasts the order of its modules over all processes, whose order differs between pipeline stages: it would
  wait for ever. `_stop_tracing`.
- Only a forward pass re-arms its reduction hooks: of two backward passes in a row the second would be lost.
  `before_backward`.
- A gradient that the last step left in a partition is added to, when a parameter is first used in a later backward
  pass. `begin_step`.
- Its gradient norm counts tied and replicated parameters wrongly under a pipeline, and its collectives differ in number
  between stages. The norm and the clipping are ours: `_finish_gradients`; DeepSpeed's are switched off.
- It knows no tied weight on two stages: `_sum_shared_gradients`, `_sum_tied_before_reduction`.
"""

import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megacocomix.config import Config
from megacocomix.parallel.grid import Grid
from megacocomix.parallel.stage import TIED, LocalStages
from megacocomix.parallel.tensor import split_dim

# Before its first import: DeepSpeed logs the import itself.
logging.getLogger("DeepSpeed").setLevel(os.environ.get("DEEPSPEED_LOG_LEVEL", "ERROR"))
import deepspeed  # noqa: E402
from deepspeed.ops import __compatible_ops__  # noqa: E402

# DeepSpeed calls names that torch has since renamed, once a collective.
warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.")

TESTED = ("0.19.8",)
STATES = ("weight", "exp_avg", "exp_avg_sq")


class Slice(NamedTuple):
    """What this rank holds of one fp32 state of one parameter: elements [start, start + len(values)) of the flat form
    of its tensor rank's piece."""

    name: str
    """In the whole model."""
    piece: torch.Size
    """Shape of the tensor rank's piece."""
    start: int
    values: Tensor
    """A flat view: writing to it changes the state. Empty on ranks that hold nothing."""
    is_replicated: bool
    """Every data rank holds the whole piece, rather than sharing it."""
    is_copy: bool
    """The last stage's copy of the tied weight, equal to the first stage's."""


def deepspeed_config(config: Config, device: torch.device) -> dict:
    """The JSON that DeepSpeed wants, derived from ours; not an option of its own."""
    training, stage = config.training, config.parallel.zero
    precision = {}
    if training.precision == "bf16":
        # DeepSpeed's defaults accumulate and reduce gradients in bf16: off by 2e-3 against one process.
        precision = {
            # immediate_grad_update: stage 1 adds each gradient to its fp32 sum at once, whatever pass comes next.
            "bf16": {"enabled": True, "check_grad_overflow": False, "immediate_grad_update": True},
            "data_types": {"grad_accum_dtype": "fp32"},
            "communication_data_type": "fp32",
        }
    zero = {
        "stage": stage,
        "contiguous_gradients": True,
        "overlap_comm": device.type == "cuda" and stage >= 2,
        # Its replacement of F.linear is process-wide (the teacher's too) and accumulates in the low precision.
        "memory_efficient_linear": False,
    }
    if config.parallel.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": device.type == "cuda"}
    return {
        "train_micro_batch_size_per_gpu": training.micro_batch,
        # It neither counts micro-batches nor divides by their number, which each pipeline stage would do once more.
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,
        **precision,
    }


class Engine:
    """A DeepSpeed engine around this rank's stages. It shards over the data ranks."""

    def __init__(
        self,
        stages: LocalStages,
        whole_value: Callable[[str], Tensor],
        build_optimizer: Callable[[list], torch.optim.Optimizer],
        config: Config,
        grid: Grid,
    ):
        """`whole_value(name)` gives the weights to begin with, fp32 on the CPU; `build_optimizer` takes (name, number
        of dims, parameter) triples. Called by all ranks."""
        if deepspeed.__version__ not in TESTED and grid.runtime.is_main:
            logging.getLogger(__name__).warning(
                "deepspeed %s is not among the tested versions %s: its private parts may have moved",
                deepspeed.__version__,
                " ".join(TESTED),
            )
        if grid.device.type == "cpu":
            # Would be compiled, for half a minute, and gloo does without.
            __compatible_ops__["deepspeed_shm_comm"] = False
        self.grid, self.stages, self.zero_stage, self.clip = grid, stages, config.parallel.zero, config.optimizer.clip
        self.holds_weights = self.zero_stage == 3 and config.parallel.gather == "per_step"
        self.sums_over_tensor = grid.tensor > 1 and config.parallel.sequence
        self.offload = config.parallel.offload_optimizer
        options = deepspeed_config(config, grid.device)
        stages.set_parameters(whole_value, _placer(options, config, grid))
        named = [(name, len(stages.whole_shapes[name]), parameter) for name, parameter, _ in stages.named_pieces()]
        self._engine, self.optimizer, *_ = deepspeed.initialize(
            model=stages, optimizer=build_optimizer(named), config=options, mpu=grid, dist_init_required=False
        )
        self._norm = 0.0
        self._update = self._engine._take_model_step
        self._engine._take_model_step = self._finish_gradients
        # DeepSpeed has an optimizer of its own for stage 1 in bf16, which, as stage 0, reduces gradients whole.
        self.is_bf16_stage_1 = hasattr(self.optimizer, "fp32_groups_gradients")
        self.reduces_whole = self.zero_stage == 0 or self.is_bf16_stage_1
        if self.is_bf16_stage_1:
            self.optimizer.get_grads_for_norm = lambda: ([torch.tensor([self._norm], device=grid.device)], {})
        elif self.zero_stage in (1, 2):
            self.optimizer.scaled_global_norm = lambda: torch.tensor(self._norm)
        elif self.zero_stage == 3:
            self.optimizer._get_norm_groups = lambda: [torch.tensor(self._norm)]
            groups = self.optimizer.fp16_groups
            self.place_in_group = {parameter: i for group in groups for i, parameter in enumerate(group)}
            if grid.pipeline > 1:
                _stop_tracing(self.optimizer.parameter_offload.get_param_coordinator())

    def __call__(self, *args):
        """The forward pass of LocalStages."""
        # DeepSpeed refuses stage 0 a backward pass that it does not start itself; without its hooks it is plain torch.
        return self.stages(*args) if self.zero_stage == 0 else self._engine(*args)

    def train(self, mode: bool = True) -> None:
        """Switch dropout on or off."""
        self._engine.train(mode)

    def begin_step(self) -> None:
        """Before the first forward pass of a step."""
        if self.zero_stage == 3:
            self.optimizer.grad_partitions_flat_buffer.zero_()
            self.optimizer.micro_step_id = 1  # add to the partitions, never overwrite them
        if self.holds_weights:
            for _, parameter, _ in self.stages.named_pieces():
                parameter.ds_active_sub_modules.add("step")  # a user that never ends: what is gathered stays

    def before_backward(self) -> None:
        """Right before each backward pass."""
        if self.zero_stage:
            self.optimizer.clear_backward_seen_flag()

    def step(self) -> None:
        """Reduce gradients over the data ranks, clip them, update the weights."""
        if self.zero_stage == 1 and not self.reduces_whole:
            self._sum_tied_before_reduction()
        self._engine.step()

    def gradient_norm(self) -> float:
        """Global gradient norm before clipping, of the last step."""
        return self._norm

    def step_was_applied(self) -> bool:
        """False when the last step's gradient was not finite, so that the weights were left as they were; all ranks
        agree."""
        return math.isfinite(self._norm)

    def local_slices(self, state: str) -> Iterator[Slice]:
        """This rank's part of `state` (one of STATES) of every parameter, in the same order on all ranks of a stage."""
        self._create_moments()
        return self._slices(lambda parameter: self._local_values(parameter, state), is_replicated=self.zero_stage == 0)

    def set_step(self, step: int) -> None:
        """Tell Adam's bias correction how many steps were taken."""
        self._create_moments()
        for state in self._adam().state.values():
            state["step"].fill_(step)

    def gradients(self) -> Iterator[Slice]:
        """This rank's part of the summed gradients. Only while a step is under way: after reduction, before the
        update."""
        if self.zero_stage in (1, 2) and not (self.offload or self.reduces_whole):
            for group in self.optimizer.averaged_gradients:
                gradients = self.optimizer.averaged_gradients[group]
                if getattr(gradients, "flat_partition", None) is None and len(gradients) > 1:
                    self.optimizer.averaged_gradients[group] = [torch.cat([piece.flatten() for piece in gradients])]
        return self._slices(self._local_gradient, is_replicated=self.reduces_whole)

    def _finish_gradients(self, lr_kwargs: dict) -> None:
        """In the place of DeepSpeed's own step, which it ends with: gradients are reduced over the data ranks now."""
        if self.offload and self.grid.device.type == "cuda":
            torch.cuda.synchronize()  # they are still being copied to the host
        with torch.no_grad():
            self._sum_shared_gradients()
            counted = [piece.values for piece in self.gradients() if self._counts(piece)]
            norms = torch.stack(torch._foreach_norm(counted)) if counted else torch.zeros(1)
            total = norms.to(self.grid.device, torch.float64).square().sum()
            dist.all_reduce(total)
            self._norm = total.sqrt().item()
            if not math.isfinite(self._norm):
                return
            if self._norm > self.clip:
                for piece in self.gradients():
                    piece.values.mul_(self.clip / (self._norm + 1e-6))
        self._update(lr_kwargs)

    def _counts(self, piece: Slice) -> bool:
        """Whether this rank's slice goes into the norm: what several ranks hold alike is counted once."""
        if piece.is_copy or (piece.is_replicated and self.grid.data_rank):
            return False
        return split_dim(piece.name) is not None or self.grid.tensor_rank == 0

    def _sum_shared_gradients(self) -> None:
        if self.sums_over_tensor:  # each rank has seen its positions only
            pieces = [piece.values for piece in self.gradients() if split_dim(piece.name) is None]
            _sum_all(pieces, self.grid.tensor_group)
        if self.grid.pipeline > 1 and (self.reduces_whole or self.zero_stage == 3):
            _sum_all([piece.values for piece in self.gradients() if piece.name == TIED], self.grid.tied_group)

    def _sum_tied_before_reduction(self) -> None:
        """Stage 1 cuts all gradients of a stage as one: the two ends of the pipeline cut the tied one at different
        places. Before that each rank still holds it whole."""
        for name, parameter, _ in self.stages.named_pieces():
            if name == TIED and self.grid.pipeline > 1:
                dist.all_reduce(self.optimizer.get_param_gradient_attribute(parameter), group=self.grid.tied_group)

    def _slices(self, values_of: Callable[[nn.Parameter], tuple[int, Tensor]], is_replicated: bool) -> Iterator[Slice]:
        for name, parameter, is_copy in self.stages.named_pieces():
            shape = getattr(parameter, "ds_shape", parameter.shape)
            start, values = values_of(parameter)
            # DeepSpeed pads the last partition: what lies beyond the parameter is not ours.
            values = values[: max(0, math.prod(shape) - start)]
            yield Slice(name, shape, start, values, is_replicated, is_copy)

    def _adam(self) -> torch.optim.Optimizer:
        return self.optimizer if self.zero_stage == 0 else self.optimizer.optimizer

    def _masters(self) -> list[Tensor]:
        """The flat fp32 partitions that Adam steps on; under stage 0 the parameters themselves."""
        if self.zero_stage == 3:
            return self.optimizer.fp32_partitioned_groups_flat
        return [parameter for group in self._adam().param_groups for parameter in group["params"]]

    def _create_moments(self) -> None:
        """Adam makes its moments at the first step; make them as it would, where a state is read or set before that."""
        for flat in self._masters():
            state = self._adam().state[flat]
            if "exp_avg" not in state:
                state["step"] = torch.zeros((), device=flat.device if flat.is_cuda else None)
                state["exp_avg"] = torch.zeros_like(flat)
                state["exp_avg_sq"] = torch.zeros_like(flat)

    def _local_values(self, parameter: nn.Parameter, state: str) -> tuple[int, Tensor]:
        group, start, within = self._place(parameter)
        flat = parameter if self.zero_stage == 0 else self._masters()[group]
        values = flat.data if state == "weight" else self._adam().state[flat][state]
        return start, values.view(-1)[within]

    def _local_gradient(self, parameter: nn.Parameter) -> tuple[int, Tensor]:
        if self.reduces_whole:
            return 0, (parameter._hp_grad if self.is_bf16_stage_1 else parameter.grad).view(-1)
        group, start, within = self._place(parameter)
        if self.offload:
            return start, self._masters()[group].grad.view(-1)[within]
        gradients = self.optimizer.averaged_gradients[group]
        if self.zero_stage == 3:
            return start, gradients[self.place_in_group[parameter]].view(-1)
        flat = getattr(gradients, "flat_partition", None)
        return start, (gradients[0] if flat is None else flat).view(-1)[within]

    def _place(self, parameter: nn.Parameter) -> tuple[int, int, slice]:
        """Where this rank's part of a parameter is: number of the flat partition, first element of the parameter, and
        where in the partition it lies."""
        if self.zero_stage == 0:
            return 0, 0, slice(None)
        if self.zero_stage == 3:
            group, offset, length = self.optimizer.grad_position[self.optimizer.get_param_id(parameter)]
            return group, self.grid.data_rank * length, slice(offset, offset + length)
        fragment = parameter._hp_mapping
        if fragment is None:  # this rank's partition ends before or begins after the parameter
            return 0, 0, slice(0, 0)
        address = fragment.hp_fragment_address
        return (
            fragment.param_group_index,
            fragment.lp_fragment_address.start,
            slice(address.start, address.start + address.numel),
        )


def _placer(options: dict, config: Config, grid: Grid) -> Callable[[Tensor], nn.Parameter]:
    """Where a parameter's value is to stay: on the device, and under stage 3 in partitions at once."""
    if config.parallel.zero < 3:
        return lambda value: nn.Parameter(value.to(grid.device, copy=True))
    dtype = torch.bfloat16 if config.training.precision == "bf16" else torch.float32
    partitioner = deepspeed.zero.Init(
        module=nn.Module(), data_parallel_group=grid.data_group, config_dict_or_path=options, mpu=grid
    )

    def place(value: Tensor) -> nn.Parameter:
        parameter = nn.Parameter(value.to(dtype))
        partitioner._convert_to_zero_parameters([parameter])
        return parameter

    return place


def _stop_tracing(coordinator) -> None:
    """Fetch each module's weights when it runs, rather than ahead in a recorded order."""
    coordinator.reset_step = coordinator._clean_inflight_param_registry


def _sum_all(tensors: list[Tensor], group: dist.ProcessGroup) -> None:
    """Sum over a group, in place, in one collective. Ranks outside of the group have nothing to sum."""
    if not tensors:
        return
    flat = torch.cat(tensors)
    dist.all_reduce(flat, group=group)
    for tensor, total in zip(tensors, flat.split([len(tensor) for tensor in tensors]), strict=True):
        tensor.copy_(total)
