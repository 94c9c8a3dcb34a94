"""What a ZeRO stage costs: the table of docs/parallelism.md as functions, and which stage would cost less.

Bytes are those of one rank. `parameters` are those of its shard: of its tensor rank's part of its pipeline stage.
"""

from megacocomix.config.rules import check_config
from megacocomix.config.schema import Config
from megacocomix.errors import UserError

GIB = 2**30
SHARE_OF_STATES = 0.5
"""States fit a device if they take at most this share of its memory: the rest is for activations, whose size is not
known before training, for the buffers of communication, and for the teacher."""
# (zero, reshard_after_forward), by the memory that they need, largest first.
STAGES = ((0, True), (1, True), (3, False), (2, True), (3, True))


def state_bytes(config: Config, parameters: int, data: int) -> float:
    """Weights, gradients, fp32 masters and Adam's moments of a rank, on its device, at their largest in a step."""
    parallel = config.parallel
    weight = _weight_bytes(config)
    optimizer = 0 if parallel.offload_optimizer else 12
    if parallel.zero == 0:
        return (weight + 4 + 8) * parameters  # masters are the weights
    if parallel.zero == 3:
        whole = 0 if parallel.reshard_after_forward else weight
        return ((weight + 4 + optimizer) / data + whole) * parameters
    gradient = 4 / data if parallel.zero == 2 else 4
    return (weight + gradient + optimizer / data) * parameters


def exchanged_bytes(config: Config, parameters: int, micro_batches: int) -> float:
    """At most so much does a rank receive in a step from the other data ranks."""
    parallel = config.parallel
    weight = _weight_bytes(config)
    per_parameter = {
        0: 8,
        1: 8 + weight,
        2: 8 * micro_batches + weight,
        3: (2 * weight * micro_batches if parallel.reshard_after_forward else weight) + 4 * micro_batches,
    }
    return per_parameter[parallel.zero] * parameters


def cheaper_layout(config: Config, world: int, parameters: int, device_bytes: int) -> str | None:
    """A sentence about the ZeRO stage that would exchange least, of those that need more memory than the config's but
    fit the device. None if there is none. Tensor and pipeline ranks stay as they are."""
    parallel = config.parallel
    data = world // (parallel.tensor * parallel.pipeline)
    if data == 1:
        return None  # nothing is exchanged
    micro_batches = config.training.global_batch // (config.training.micro_batch * data)
    bytes_of = lambda candidate: exchanged_bytes(candidate, parameters, micro_batches)
    fitting = [
        candidate
        for candidate in _larger_layouts(config)
        if _is_valid(candidate, world) and state_bytes(candidate, parameters, data) <= SHARE_OF_STATES * device_bytes
    ]
    best = min(fitting, key=bytes_of, default=config)
    if bytes_of(best) >= bytes_of(config):
        return None
    options = f"parallel.zero={best.parallel.zero}"
    if best.parallel.reshard_after_forward != parallel.reshard_after_forward:  # a recipe may have set it
        options += f" parallel.reshard_after_forward={'null' if best.parallel.zero < 3 else 'false'}"
    return (
        f"{options} would exchange up to {bytes_of(best) / 1e9:.3g} GB a step and rank instead of "
        f"{bytes_of(config) / 1e9:.3g} GB; its states take {state_bytes(best, parameters, data) / GIB:.1f} GiB of the "
        f"device's {device_bytes / GIB:.0f} GiB"
    )


def _larger_layouts(config: Config) -> list[Config]:
    parallel = config.parallel
    stages = STAGES[: STAGES.index((parallel.zero, bool(parallel.reshard_after_forward)))]
    change = lambda zero, reshard: parallel.model_copy(update={"zero": zero, "reshard_after_forward": reshard})
    return [config.model_copy(update={"parallel": change(*stage)}) for stage in stages]


def _is_valid(config: Config, world: int) -> bool:
    try:
        check_config(config, world)
    except UserError:
        return False
    return True


def _weight_bytes(config: Config) -> int:
    return 2 if config.training.precision == "bf16" else 4
