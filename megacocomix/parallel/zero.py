"""DeepSpeed: engine construction, and every place where its internals are touched. Written for the versions in TESTED.

The rest of the project sees an engine it can call, that accumulates gradients and steps (`accumulate`), and the fp32
weights and Adam moments as slices by parameter name (`local_slices`), whatever the ZeRO stage.
"""

import logging
import math
import os
import warnings
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from megacocomix.config import Config
from megacocomix.parallel.runtime import Runtime

# Before its first import: DeepSpeed logs the import itself.
logging.getLogger("DeepSpeed").setLevel(os.environ.get("DEEPSPEED_LOG_LEVEL", "ERROR"))
import deepspeed  # noqa: E402
from deepspeed.ops import __compatible_ops__  # noqa: E402

# DeepSpeed calls names that torch has since renamed, once a collective.
warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.")

TESTED = ("0.19.8",)
STATES = ("weight", "exp_avg", "exp_avg_sq")


class Slice(NamedTuple):
    """What this rank holds of one fp32 state of one parameter: elements [start, start + len(values)) of its flat
    form."""

    name: str
    shape: torch.Size
    start: int
    values: Tensor
    """A flat view: writing to it changes the state. Empty on ranks that hold nothing."""
    is_replicated: bool
    """Every rank holds the whole state, rather than the ranks sharing it."""


def deepspeed_config(config: Config, world: int) -> dict:
    """The JSON that DeepSpeed wants, derived from ours; not an option of its own."""
    training = config.training
    precision = {}
    if training.precision == "bf16":
        # DeepSpeed's defaults accumulate and reduce gradients in bf16: off by 2e-3 against one process.
        precision = {
            "bf16": {"enabled": True},
            "data_types": {"grad_accum_dtype": "fp32"},
            "communication_data_type": "fp32",
        }
    return {
        "train_micro_batch_size_per_gpu": training.micro_batch,
        "gradient_accumulation_steps": training.global_batch // (training.micro_batch * world),
        "gradient_clipping": config.optimizer.clip,
        "zero_optimization": {
            "stage": config.parallel.zero,
            "contiguous_gradients": True,
            "overlap_comm": torch.cuda.is_available(),
            # Its replacement of F.linear is process-wide (the teacher's too) and accumulates in the low precision.
            "memory_efficient_linear": False,
        },
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**31,
        **precision,
    }


class Engine:
    """A DeepSpeed engine around the student. All of its processes are data ranks."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, config: Config, runtime: Runtime):
        if deepspeed.__version__ not in TESTED and runtime.is_main:
            logging.getLogger(__name__).warning(
                "deepspeed %s is not among the tested versions %s: its private parts may have moved",
                deepspeed.__version__,
                " ".join(TESTED),
            )
        if runtime.device.type == "cpu":
            __compatible_ops__["deepspeed_shm_comm"] = (
                False  # would be compiled, for half a minute, and gloo does without
            )
        self.runtime = runtime
        self.names = {parameter: name for name, parameter in model.named_parameters()}
        self._engine, self.optimizer, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=deepspeed_config(config, runtime.world), dist_init_required=False
        )
        self.stage = config.parallel.zero
        self._norm: Tensor | float = 0.0

    @property
    def module(self) -> nn.Module:
        """The student. Under ZeRO-3 its parameters are only whole inside a forward."""
        return self._engine.module

    def __call__(self, *args):
        """The student's forward pass."""
        return self._engine(*args)

    def train(self, mode: bool = True) -> None:
        """Switch dropout on or off."""
        self._engine.train(mode)

    def accumulate(self, loss: Tensor) -> None:
        """Backward of this rank's share of the global loss; the last micro-batch of a step also updates the weights."""
        if self.stage == 0:
            boundary = self._engine.is_gradient_accumulation_boundary()
        # DeepSpeed averages over data ranks; our shares are already divided by the global count and want a sum.
        self._engine.backward(loss * self.runtime.world, scale_wrt_gas=False)
        if self.stage == 0 and boundary:
            gradients = [parameter.grad for parameter in self.module.parameters()]
            self._norm = torch.nn.utils.get_total_norm(gradients)
        self._engine.step()

    def gradient_norm(self) -> float:
        """Global gradient norm before clipping, of the last step."""
        return float(self._norm if self.stage == 0 else self._engine.get_global_grad_norm())

    def step_was_applied(self) -> bool:
        """False when DeepSpeed met a gradient that is not finite and left the weights as they were; all ranks agree."""
        if self.stage == 0:
            return math.isfinite(self.gradient_norm())
        return self._engine.was_step_applied()

    def local_slices(self, state: str) -> Iterator[Slice]:
        """This rank's part of `state` (one of STATES) of every parameter, in the same order on every rank."""
        self._create_moments()
        for parameter, name in self.names.items():
            shape = getattr(parameter, "ds_shape", parameter.shape)
            start, values = self._local_values(parameter, state)
            # DeepSpeed pads the last partition: what lies beyond the parameter is not ours.
            yield Slice(name, shape, start, values[: max(0, math.prod(shape) - start)], self.stage == 0)

    def set_step(self, step: int) -> None:
        """Tell Adam's bias correction how many steps were taken."""
        self._create_moments()
        for state in self._adam().state.values():
            state["step"].fill_(step)

    def _adam(self) -> torch.optim.Optimizer:
        return self.optimizer if self.stage == 0 else self.optimizer.optimizer

    def _masters(self) -> list[Tensor]:
        """The flat fp32 partitions that Adam steps on; under stage 0 the parameters themselves."""
        if self.stage == 3:
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
        if self.stage == 0:
            values = parameter.data if state == "weight" else self._adam().state[parameter][state]
            return 0, values.view(-1)
        if self.stage == 3:
            group, offset, length = self.optimizer.grad_position[self.optimizer.get_param_id(parameter)]
            flat = self._masters()[group]
            values = flat.data if state == "weight" else self._adam().state[flat][state]
            return self.runtime.rank * length, values[offset : offset + length]
        fragment = parameter._hp_mapping
        if fragment is None:  # this rank's partition ends before or begins after the parameter
            return 0, torch.empty(0, device=parameter.device)
        # The fragment is a view of a flat master; where it lies there is where its moments lie in theirs.
        flat = self._masters()[fragment.param_group_index]
        source = flat.data if state == "weight" else self._adam().state[flat][state]
        address = fragment.hp_fragment_address
        return fragment.lp_fragment_address.start, source.narrow(0, address.start, address.numel)
