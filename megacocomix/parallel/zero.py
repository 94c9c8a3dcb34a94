"""The DeepSpeed engine, and all code that uses DeepSpeed's internals. Written for the versions in TESTED.

The rest of the project uses an engine that it can call, that sums gradients over micro-batches, and that steps. The
fp32 weights, gradients and Adam moments are available as slices by parameter name (`local_slices`), for every ZeRO
stage. One class per kind of partition knows where they are: `_Replicated`, `_Bf16Stage1`, `_FlatShards`,
`_ParameterShards`.

Faults of DeepSpeed in our use, and where they are corrected:
- ZeRO-3 broadcasts the order of its modules over all processes. The order differs between pipeline stages, so it would
  hang: `_ParameterShards.__init__`.
- Its reduction hooks fire once after each forward pass. Of two backward passes in a row, the second one's gradient
  would be lost: `before_backward`.
- If a parameter is not used in the first backward pass of a step, its gradient would be added to that of the last step:
  `begin_step`.
- Its gradient norm counts tied and replicated parameters wrongly under a pipeline, and the number of its collectives
  differs between stages. We compute the norm and clip, with DeepSpeed's clipping off: `Engine._finish_gradients`.
- It does not support a tied weight on two stages: `Engine._sum_shared_gradients`, `_FlatShards.before_reduction`.
"""

import contextlib
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megacocomix.config.schema import Config
from megacocomix.launchers import cores_of_process
from megacocomix.parallel.grid import Grid
from megacocomix.parallel.stage import TIED, StageModule
from megacocomix.parallel.tensor import shard_dim

# Before the first import of DeepSpeed, which already logs.
logging.getLogger("DeepSpeed").setLevel(os.environ.get("DEEPSPEED_LOG_LEVEL", "ERROR"))
import deepspeed  # noqa: E402

# In every collective DeepSpeed calls functions that torch has renamed.
warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.")

TESTED = ("0.19.8",)
STATES = ("weight", "exp_avg", "exp_avg_sq")


class Slice(NamedTuple):
    """This rank's part of one fp32 state of one parameter: elements [start, start + len(values)) of the flattened shard
    of its tensor rank."""

    name: str  # in the whole model
    shard_shape: torch.Size  # of the tensor rank's shard
    start: int
    values: Tensor  # a flat view: writing to it changes the state; empty on ranks that hold nothing
    is_replicated: bool  # every data rank holds the whole shard, not a part of it
    is_copy: bool  # the last stage's copy of the tied weight, equal to the first stage's


def deepspeed_config(config: Config, device: torch.device) -> dict:
    """DeepSpeed's JSON config, derived from our config. It is not an option."""
    training, stage = config.training, config.parallel.zero
    precision = {}
    if training.precision == "bf16":
        # By default DeepSpeed accumulates and reduces gradients in bf16, which differs by 2e-3 from one process.
        precision = {
            # immediate_grad_update: stage 1 adds each gradient to its fp32 sum at once, whichever pass comes next.
            "bf16": {"enabled": True, "check_grad_overflow": False, "immediate_grad_update": True},
            "data_types": {"grad_accum_dtype": "fp32"},
            "communication_data_type": "fp32",
        }
    zero = {
        "stage": stage,
        "contiguous_gradients": True,
        # In stage 2 it would wait for the whole device at every bucket and every backward pass.
        "overlap_comm": device.type == "cuda" and stage == 3,
        # If true, it replaces F.linear in the whole process (also for the teacher) and accumulates in low precision.
        "memory_efficient_linear": False,
    }
    if config.parallel.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": device.type == "cuda"}
    return {
        "train_micro_batch_size_per_gpu": training.micro_batch,
        # DeepSpeed must not count micro-batches or divide by their number: every pipeline stage would do it again.
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,
        # It would wait for the whole device at every micro-batch.
        "timers": {"throughput": {"enabled": False}},
        **precision,
    }


class Engine:
    """A DeepSpeed engine around this rank's stages, sharded over the data ranks."""

    def __init__(
        self,
        stages: StageModule,
        whole_value: Callable[[str], Tensor],
        build_optimizer: Callable[[list], torch.optim.Optimizer],
        config: Config,
        grid: Grid,
        on_gradients: Callable[[], None] = lambda: None,
    ):
        """`whole_value(name)` gives the initial weights, fp32 on the CPU. It is called on the first data rank only.
        `build_optimizer` takes (name, number of dims, parameter) triples. `on_gradients` is called in each step after
        the gradients are summed and before they are clipped. All ranks must construct it together."""
        if deepspeed.__version__ not in TESTED and grid.runtime.is_main:
            logging.getLogger(__name__).warning(
                "deepspeed %s is not among the tested versions %s: its internals may have changed",
                deepspeed.__version__,
                " ".join(TESTED),
            )
        if grid.device.type == "cpu":
            # It would be compiled, which takes half a minute, and gloo does not need it. The import looks for the
            # compilers of all operations, and warns of each that a GPU's host lacks.
            from deepspeed.ops import __compatible_ops__

            __compatible_ops__["deepspeed_shm_comm"] = False
        self.grid, self.stages, self.clip, self.on_gradients = grid, stages, config.optimizer.clip, on_gradients
        self.sums_over_tensor = grid.tensor > 1 and config.parallel.sequence
        self.offload = config.parallel.offload_optimizer
        options = deepspeed_config(config, grid.device)
        if grid.data_rank:  # DeepSpeed sends these ranks the weights of the first one, under every ZeRO stage
            whole_value = lambda name: torch.empty(stages.whole_shapes[name])
        stages.set_parameters(whole_value, _placer(options, config, grid))
        named = [(name, len(stages.whole_shapes[name]), parameter) for name, parameter, _ in stages.named_shards()]
        self._engine, self.optimizer, *_ = deepspeed.initialize(
            model=stages, optimizer=build_optimizer(named), config=options, mpu=grid, dist_init_required=False
        )
        self._norm = 0.0
        self._update = self._engine._take_model_step
        self._engine._take_model_step = self._finish_gradients
        self._partition = _choose_partition(self, config)

    def __call__(self, *args):
        """The forward pass of StageModule."""
        return self._partition.forward(*args)

    def train(self, mode: bool = True) -> None:
        """Switch dropout on or off."""
        self._engine.train(mode)

    def begin_step(self) -> None:
        """Before the first forward pass of a step."""
        self._partition.begin_step()

    def before_backward(self) -> None:
        """Right before each backward pass."""
        self._partition.before_backward()

    def step(self) -> None:
        """Reduce gradients over the data ranks, clip them, update the weights."""
        self._partition.before_reduction()
        self._engine.step()

    def gradient_norm(self) -> float:
        """The last step's global gradient norm before clipping, the same on all ranks. If it is not finite, that step
        did not change the weights."""
        return self._norm

    def local_slices(self, state: str) -> Iterator[Slice]:
        """This rank's slice of `state` (one of STATES) of every parameter, in the same order on all ranks of a
        stage."""
        self._partition.create_moments()
        values = lambda parameter: self._partition.values(parameter, state)
        return self._slices(values, self._partition.replicates_states)

    def set_step(self, step: int) -> None:
        """Set the number of steps taken, for Adam's bias correction."""
        self._partition.create_moments()
        for state in self._partition.adam.state.values():
            state["step"].fill_(step)

    def gradients(self) -> Iterator[Slice]:
        """This rank's slices of the summed gradients. Valid only within a step, after reduction and before the
        update."""
        self._partition.merge_gradients()
        return self._slices(self._partition.gradient, self._partition.replicates_gradients)

    def _finish_gradients(self, lr_kwargs: dict) -> None:
        """Replaces DeepSpeed's own update, and calls it at its end. The gradients are already reduced over the data
        ranks."""
        if self.offload and self.grid.device.type == "cuda":
            torch.cuda.synchronize()  # the gradients are still being copied to the host
        with torch.no_grad():
            self._sum_shared_gradients()
            self.on_gradients()
            counted = [each.values for each in self.gradients() if self._counts(each) and len(each.values)]
            norms = torch.stack(torch._foreach_norm(counted)) if counted else torch.zeros(1)
            total = norms.to(self.grid.device, torch.float64).square().sum()
            dist.all_reduce(total)
            self._norm = total.sqrt().item()
            if not math.isfinite(self._norm):
                return
            if self._norm > self.clip:
                for each in self.gradients():
                    each.values.mul_(self.clip / (self._norm + 1e-6))
        with _all_cores() if self.offload else contextlib.nullcontext():
            self._update(lr_kwargs)

    def _counts(self, gradient: Slice) -> bool:
        """Whether this rank's slice counts in the norm. A slice that several ranks hold is counted once."""
        if gradient.is_copy or (gradient.is_replicated and self.grid.data_rank):
            return False
        return shard_dim(gradient.name) is not None or self.grid.tensor_rank == 0

    def _sum_shared_gradients(self) -> None:
        if self.sums_over_tensor:  # each rank's gradient is of its own positions only
            replicated = [each.values for each in self.gradients() if shard_dim(each.name) is None]
            _sum_all(replicated, self.grid.tensor_group, self.grid.device)
        if self.grid.pipeline > 1 and self._partition.sums_tied_after_reduction:
            tied = [each.values for each in self.gradients() if each.name == TIED]
            _sum_all(tied, self.grid.tied_group, self.grid.device)

    def _slices(self, values_of: Callable[[nn.Parameter], tuple[int, Tensor]], is_replicated: bool) -> Iterator[Slice]:
        for name, parameter, is_copy in self.stages.named_shards():
            shape = getattr(parameter, "ds_shape", parameter.shape)
            start, values = values_of(parameter)
            # DeepSpeed pads the last partition: drop the values beyond the parameter's end.
            values = values[: max(0, math.prod(shape) - start)]
            yield Slice(name, shape, start, values, is_replicated, is_copy)


class _Partition:
    """Where a DeepSpeed optimizer keeps masters, moments and gradients. This class has what the sharded kinds share;
    each kind adds `gradient(parameter)`, which returns of the gradient what `values` returns of a state."""

    replicates_states = False
    replicates_gradients = False
    sums_tied_after_reduction = True

    def __init__(self, engine: Engine):
        self.engine, self.optimizer, self.forward = engine, engine.optimizer, engine._engine
        self.adam = self.optimizer.optimizer

    def begin_step(self) -> None:
        """Before the first forward pass of a step."""

    def before_backward(self) -> None:
        """Right before each backward pass."""
        self.optimizer.clear_backward_seen_flag()

    def before_reduction(self) -> None:
        """After the last backward pass, before gradients are reduced over the data ranks."""

    def merge_gradients(self) -> None:
        """Convert the gradients to the form that `gradient` reads."""

    def masters(self) -> list[Tensor]:
        """The flat fp32 partitions that Adam updates."""
        return [parameter for group in self.adam.param_groups for parameter in group["params"]]

    def create_moments(self) -> None:
        """Adam makes its moments at its first step. If a state is read or set before that, make them as Adam would."""
        for flat in self.masters():
            state = self.adam.state[flat]
            if "exp_avg" not in state:
                state["step"] = torch.zeros((), device=flat.device if flat.is_cuda else None)
                state["exp_avg"] = torch.zeros_like(flat)
                state["exp_avg_sq"] = torch.zeros_like(flat)

    def values(self, parameter: nn.Parameter, state: str) -> tuple[int, Tensor]:
        """The parameter's first element that this rank holds, and the flat values of `state` from there."""
        group, start, within = self.place(parameter)
        flat = self.masters()[group]
        values = flat.data if state == "weight" else self.adam.state[flat][state]
        return start, values.view(-1)[within]

    def offloaded_gradient(self, group: int, within: slice) -> Tensor:
        """The flat gradient of this rank's part, where it is on the host."""
        return self.masters()[group].grad.view(-1)[within]

    def place(self, parameter: nn.Parameter) -> tuple[int, int, slice]:
        """This rank's part of a parameter: index of the flat partition, the parameter's first element, and the slice of
        the partition."""
        fragment = parameter._hp_mapping
        if fragment is None:  # this rank's partition holds nothing of the parameter
            return 0, 0, slice(0, 0)
        address = fragment.hp_fragment_address
        return (
            fragment.param_group_index,
            fragment.lp_fragment_address.start,
            slice(address.start, address.start + address.numel),
        )


class _Replicated(_Partition):
    """Stage 0: plain torch parameters and gradients, whole on every data rank."""

    replicates_states = replicates_gradients = True

    def __init__(self, engine: Engine):
        # In stage 0 DeepSpeed refuses a backward pass that it does not start itself. So bypass its hooks.
        self.engine, self.optimizer, self.adam, self.forward = engine, engine.optimizer, engine.optimizer, engine.stages

    def before_backward(self) -> None:
        """Nothing to re-arm."""

    def values(self, parameter: nn.Parameter, state: str) -> tuple[int, Tensor]:
        values = parameter.data if state == "weight" else self.adam.state[parameter][state]
        return 0, values.view(-1)

    def gradient(self, parameter: nn.Parameter) -> tuple[int, Tensor]:
        return 0, parameter.grad.view(-1)


class _Bf16Stage1(_Partition):
    """Stage 1 in bf16, for which DeepSpeed has a separate optimizer: masters are sharded, gradients are reduced whole,
    in fp32."""

    replicates_gradients = True

    def __init__(self, engine: Engine):
        super().__init__(engine)
        norm = lambda: torch.full((1,), engine.gradient_norm(), device=engine.grid.device)
        self.optimizer.get_grads_for_norm = lambda: ([norm()], {})

    def gradient(self, parameter: nn.Parameter) -> tuple[int, Tensor]:
        return 0, parameter._hp_grad.view(-1)


class _FlatShards(_Partition):
    """Stages 1 and 2: the parameters of a group are concatenated, and each data rank has one contiguous part."""

    sums_tied_after_reduction = False

    def __init__(self, engine: Engine, stage: int):
        super().__init__(engine)
        self.stage = stage
        self.optimizer.scaled_global_norm = lambda: torch.tensor(engine.gradient_norm())

    def before_reduction(self) -> None:
        """Sum the tied gradient while each rank still holds it whole. Stage 1 shards all gradients of a pipeline stage
        as one tensor, so the first and the last stage would shard the tied one differently."""
        if self.stage == 1 and self.engine.grid.pipeline > 1:
            for name, parameter, _ in self.engine.stages.named_shards():
                if name == TIED:
                    gradient = self.optimizer.get_param_gradient_attribute(parameter)
                    dist.all_reduce(gradient, group=self.engine.grid.tied_group)

    def merge_gradients(self) -> None:
        if self.engine.offload:
            return
        for group, gradients in self.optimizer.averaged_gradients.items():
            if getattr(gradients, "flat_partition", None) is None and len(gradients) > 1:
                flat = torch.cat([gradient.flatten() for gradient in gradients])
                self.optimizer.averaged_gradients[group] = [flat]

    def gradient(self, parameter: nn.Parameter) -> tuple[int, Tensor]:
        group, start, within = self.place(parameter)
        if self.engine.offload:
            return start, self.offloaded_gradient(group, within)
        gradients = self.optimizer.averaged_gradients[group]
        flat = getattr(gradients, "flat_partition", None)
        return start, (gradients[0] if flat is None else flat).view(-1)[within]


class _ParameterShards(_Partition):
    """Stage 3: each parameter is sharded over the data ranks by itself."""

    def __init__(self, engine: Engine, holds_weights: bool):
        super().__init__(engine)
        self.holds_weights = holds_weights
        self.optimizer._get_norm_groups = lambda: [torch.tensor(engine.gradient_norm())]
        groups = self.optimizer.fp16_groups
        self.place_in_group = {parameter: i for group in groups for i, parameter in enumerate(group)}
        if engine.grid.pipeline > 1:
            # Fetch each module's weights when it runs, instead of ahead of time in a recorded order.
            coordinator = self.optimizer.parameter_offload.get_param_coordinator()
            coordinator.reset_step = coordinator._clean_inflight_param_registry

    def begin_step(self) -> None:
        self.optimizer.grad_partitions_flat_buffer.zero_()
        self.optimizer.micro_step_id = 1  # add to the partitions, do not overwrite them
        if self.holds_weights:
            for _, parameter, _ in self.engine.stages.named_shards():
                parameter.ds_active_sub_modules.add("step")  # a user that never ends, so gathered weights stay

    def masters(self) -> list[Tensor]:
        return self.optimizer.fp32_partitioned_groups_flat

    def place(self, parameter: nn.Parameter) -> tuple[int, int, slice]:
        group, offset, length = self.optimizer.grad_position[self.optimizer.get_param_id(parameter)]
        return group, self.engine.grid.data_rank * length, slice(offset, offset + length)

    def gradient(self, parameter: nn.Parameter) -> tuple[int, Tensor]:
        group, start, within = self.place(parameter)
        if self.engine.offload:
            return start, self.offloaded_gradient(group, within)
        return start, self.optimizer.averaged_gradients[group][self.place_in_group[parameter]].view(-1)


def _choose_partition(engine: Engine, config: Config) -> _Partition:
    parallel = config.parallel
    if parallel.zero == 0:
        return _Replicated(engine)
    if parallel.zero == 3:
        return _ParameterShards(engine, holds_weights=not parallel.reshard_after_forward)
    if hasattr(engine.optimizer, "fp32_groups_gradients"):
        return _Bf16Stage1(engine)
    return _FlatShards(engine, parallel.zero)


def _placer(options: dict, config: Config, grid: Grid) -> Callable[[Tensor], nn.Parameter]:
    """A function that moves a parameter's value to its final memory: the device, and under stage 3 sharded at once."""
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


def _sum_all(tensors: list[Tensor], group: dist.ProcessGroup, device: torch.device) -> None:
    """Sum tensors over a group, in place, in one collective. Ranks outside the group have no tensors. Offloaded
    gradients are on the host, so they are summed on the device."""
    if not tensors:
        return
    flat = torch.cat(tensors).to(device)
    dist.all_reduce(flat, group=group)
    flat = flat.to(tensors[0].device)  # at once: each copy to the host waits for the device
    for tensor, total in zip(tensors, flat.split([len(tensor) for tensor in tensors]), strict=True):
        tensor.copy_(total)


@contextlib.contextmanager
def _all_cores() -> Iterator[None]:
    """For the update of offloaded states: torch uses this process's share of the cores, where torchrun has set a single
    thread. The update is element by element, so its result does not depend on the number of threads."""
    before = torch.get_num_threads()
    if before == 1:  # another number was chosen
        torch.set_num_threads(cores_of_process())
    try:
        yield
    finally:
        torch.set_num_threads(before)
