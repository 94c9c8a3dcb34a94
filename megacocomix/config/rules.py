"""The rules between options. All problems come in one report, each with a remedy."""

from collections.abc import Iterator

from megacocomix.config.method import MethodConfig
from megacocomix.config.schema import Config, ModelConfig
from megacocomix.errors import UserError


def check_config(config: Config, world: int) -> None:
    """Check the options against each other and against the number of processes. Raises one UserError with every
    problem."""
    if problems := list(_problems(config, world)):
        raise UserError(*problems)


def _problems(config: Config, world: int):
    optimizer, training = config.optimizer, config.training
    if not config.run:
        yield "run is empty: name a folder, such as run=runs/mine."
    yield from architecture_problems(config.model, config.method)
    yield from _method_problems(config)
    if optimizer.min_lr > optimizer.lr:
        yield f"optimizer.min_lr {optimizer.min_lr} exceeds lr. Nearest valid: {optimizer.lr}."
    if optimizer.warmup_steps > training.steps:
        nearest = training.steps // 300
        yield f"optimizer.warmup_steps {optimizer.warmup_steps} exceeds training.steps. The paper's value: {nearest}."
    if training.stop_after and training.stop_after > training.steps:
        yield f"training.stop_after {training.stop_after} exceeds training.steps. Nearest valid: {training.steps}."
    if config.evaluation.tasks_every and not config.evaluation.tasks:
        yield "evaluation.tasks_every needs evaluation.tasks, but there are none. Use null."
    yield from _layout_problems(config, world)


def architecture_problems(model: ModelConfig, method: MethodConfig) -> Iterator[str]:
    """Rules between the options that decide a model's parameters and computation."""
    width, heads, every = model.hidden_size, model.num_heads, method.interleave_every
    if width % heads:
        nearest = _nearest_divisor(width, heads)
        yield f"model.num_heads {heads} does not divide hidden_size {width}. Nearest valid: {nearest}."
    if method.has_module and method.insertion_layer >= model.num_layers:
        yield (
            f"method.insertion_layer {method.insertion_layer} is not one of the {model.num_layers} blocks (0-based). "
            f"Nearest valid: {model.num_layers - 1}."
        )
    if method.predict == "concepts" and method.num_kept > method.num_concepts:
        yield f"method.num_kept {method.num_kept} exceeds num_concepts. Nearest valid: {method.num_concepts}."
    if method.mix == "predicted" and method.predict == "nothing":
        yield "method.mix is predicted, but method.predict is nothing. Use method.mix=pause or method.mix=nothing."
    if every > 1 and not method.interleaves:
        why = "mixes nothing in" if method.mix == "nothing" else f"has placement {method.placement}"
        yield f"method.interleave_every {every} needs slots, but method {why}. Use 1."
    if every >= model.context:  # no slot, or one after the last token, which has no target
        yield f"method.interleave_every {every} is not below model.context. Nearest valid: {model.context - 1}."


def _method_problems(config: Config):
    """Rules between the other options of the method, and between the method and the teacher section."""
    method, teacher = config.method, config.teacher
    if method.predict != "nothing" and method.mix != "predicted" and not method.concept_weight:
        yield (
            f"method.predict {method.predict} has no effect: method.mix is {method.mix} and method.concept_weight 0. "
            "Use method.predict=nothing."
        )
    if method.label_sign != "positive" and method.label_source != "attribution" and method.learns_concepts:
        yield (
            f"method.label_sign {method.label_sign} chooses among attributions, but method.label_source is "
            f"{method.label_source}. Use positive."
        )
    if method.has_teacher and (teacher is None or (method.learns_concepts and teacher.sae is None)):
        missing = "teacher" if teacher is None else "teacher.sae"
        needs = "teacher.model and teacher.sae" if method.learns_concepts else "teacher.model"
        causes = {"predict": method.learns_concepts or method.learns_hidden, "kd_weight": method.distills}
        why = " and ".join(f"{key} {getattr(method, key)}" for key, is_cause in causes.items() if is_cause)
        yield f"{missing} is missing: method.name {method.name} ({why}) needs {needs}."


def _layout_problems(config: Config, world: int):
    """Rules between the layout and the sizes. All are reported together, so no rule may rely on another."""
    model, training, parallel = config.model, config.training, config.parallel
    tensor, pipeline, every = parallel.tensor, parallel.pipeline, config.method.interleave_every
    heads, context, batch = model.num_heads, model.context, training.global_batch
    if problem := grid_problem(world, tensor, pipeline):
        yield problem
    data = max(1, world // (tensor * pipeline))
    unit = training.micro_batch * data
    if batch % unit:
        yield (
            f"training.global_batch {batch} is not a multiple of micro_batch {training.micro_batch} "
            f"× {data} data ranks. Nearest valid: {_nearest_multiple(batch, unit)}."
        )
    if heads % tensor:
        nearest = _nearest_divisor(heads, tensor)
        yield f"parallel.tensor {tensor} does not divide model.num_heads {heads}. Nearest valid: {nearest}."
    if tensor > 1 and parallel.sequence and context % tensor:
        yield (
            f"parallel.tensor {tensor} does not divide model.context {context}, whose positions it splits. "
            f"Nearest valid: model.context={_nearest_multiple(context, tensor)}, or parallel.sequence=false."
        )
    if tensor == 1 and parallel.sequence:
        yield "parallel.sequence splits positions among tensor ranks, but parallel.tensor is 1. Use false."
    if tensor > 1 and parallel.sequence and (context // tensor) % every:
        yield (
            f"method.interleave_every {every} does not divide the {context // tensor} positions of a tensor rank "
            f"(model.context {context} / parallel.tensor {tensor}). Nearest valid: "
            f"{_nearest_divisor(context // tensor, every)}, or parallel.sequence=false."
        )
    splits = [("model.vocab_size", model.vocab_size)]
    if config.method.predict == "concepts":
        splits.append(("method.num_concepts", config.method.num_concepts))
    for option, size in splits:
        if size < tensor:
            yield f"{option} {size} is below parallel.tensor {tensor}. Nearest valid: parallel.tensor={size}."
    if tensor > 1 and not parallel.sequence and model.dropout:
        yield (
            f"parallel.sequence false under parallel.tensor {tensor} would drop different values on each rank "
            f"(model.dropout {model.dropout}). Use parallel.sequence=true or model.dropout=0."
        )
    yield from _stage_problems(config, unit)
    if parallel.zero == 0 and training.precision == "bf16":
        yield "parallel.zero 0 under training.precision bf16 would reduce gradients in bf16. Use parallel.zero=1."
    if parallel.zero == 2 and pipeline > 1:
        yield (
            "parallel.zero 2 under a pipeline would shard the two copies of the tied embedding's gradient "
            "differently. Use parallel.zero=3 with parallel.reshard_after_forward=false, or parallel.zero=1."
        )
    if parallel.zero < 3 and not parallel.reshard_after_forward:
        yield (
            f"parallel.reshard_after_forward false is for parallel.zero 3; zero {parallel.zero} never gathers weights. "
            "Use null."
        )
    if parallel.zero == 0 and parallel.offload_optimizer:
        yield "parallel.offload_optimizer needs sharded optimizer states. Use parallel.zero=1, 2 or 3."


def _stage_problems(config: Config, unit: int):
    model, training, parallel = config.model, config.training, config.parallel
    num_stages = parallel.num_stages
    if parallel.virtual_stages > 1 and parallel.pipeline == 1:
        yield "parallel.virtual_stages interleaves a pipeline's stages, but parallel.pipeline is 1. Use 1."
    elif num_stages > model.num_layers:
        nearest = max(1, model.num_layers // parallel.virtual_stages)
        yield (
            f"parallel.pipeline {parallel.pipeline} × virtual_stages {parallel.virtual_stages} = {num_stages} "
            f"stages, but model.num_layers is {model.num_layers}. Nearest valid: parallel.pipeline={nearest}."
        )
    points = parallel.split_points
    if points and num_stages == 1:
        yield f"parallel.split_points {points} divide a pipeline into stages, but parallel.pipeline is 1. Use null."
    elif points is not None and (
        len(points) != num_stages - 1 or sorted(set(points)) != points or points[-1:] >= [model.num_layers]
    ):
        yield (
            f"parallel.split_points {points} must be the first blocks of stages 1 to {num_stages - 1}, "
            f"in increasing order, each below model.num_layers {model.num_layers}. Nearest valid: null (by FLOPs)."
        )
    micro_batches = max(1, training.global_batch // unit)
    if parallel.virtual_stages > 1 and micro_batches % parallel.pipeline:
        nearest = _nearest_multiple(micro_batches, parallel.pipeline) * unit
        yield (
            f"parallel.virtual_stages {parallel.virtual_stages} needs micro-batches in multiples of "
            f"parallel.pipeline {parallel.pipeline}, but a step has {micro_batches}. "
            f"Nearest valid: training.global_batch={nearest}."
        )


def layout_warnings(config: Config, world: int):
    """Warnings about a valid but wasteful layout, to print at the start of a run."""
    training, parallel = config.training, config.parallel
    data = world // (parallel.tensor * parallel.pipeline)
    micro_batches = training.global_batch // (training.micro_batch * data)
    if micro_batches < parallel.num_stages > 1:
        bubble = bubble_fraction(parallel.pipeline, parallel.virtual_stages, micro_batches)
        yield (
            f"a step has {micro_batches} micro-batches for {parallel.num_stages} pipeline stages: each rank waits "
            f"{bubble:.0%} of the time. Raise training.global_batch, or lower training.micro_batch."
        )


def _nearest_multiple(value: int, unit: int) -> int:
    return max(unit, round(value / unit) * unit)


def _nearest_divisor(whole: int, value: int) -> int:
    valid = [divisor for divisor in range(1, whole + 1) if whole % divisor == 0]
    return min(valid, key=lambda divisor: abs(divisor - value))


def grid_problem(world: int, tensor: int, pipeline: int) -> str | None:
    """Why `world` processes cannot form this grid, with the nearest one that they can form. None if they can."""
    if world % (tensor * pipeline) == 0:
        return None
    degrees = [(t, p) for t in range(1, world + 1) for p in range(1, world // t + 1) if world % (t * p) == 0]
    near_t, near_p = min(degrees, key=lambda tp: (abs(tp[0] - tensor) + abs(tp[1] - pipeline), tp))
    return (
        f"parallel.tensor {tensor} × parallel.pipeline {pipeline} = {tensor * pipeline} does not divide the {world} "
        f"process{'es' * (world > 1)}: pipeline × data × tensor must be their number. Nearest valid: "
        f"tensor {near_t} × pipeline {near_p} × data {world // (near_t * near_p)}, or start {tensor * pipeline} "
        f"processes (deepspeed --num_accelerators {tensor * pipeline}, torchrun --nproc-per-node {tensor * pipeline})."
    )


def bubble_fraction(pipeline: int, per_rank: int, num_micro: int) -> float:
    """Share of a step in which a rank waits, for stages of equal cost."""
    idle = (pipeline - 1) / per_rank
    return idle / (idle + num_micro)
