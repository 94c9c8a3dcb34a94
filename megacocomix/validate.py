"""Every rule that spans fields, or looks at the files a config names. All problems come in one report, each with what
to do."""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

from megacocomix.checkpoint.convert.begin import open_init
from megacocomix.checkpoint.convert.sources import Source
from megacocomix.config import Config
from megacocomix.data.tokenizer import load_tokenizer
from megacocomix.data.tokens import TokenDataset, TokenShards, check_token_ids
from megacocomix.errors import UserError
from megacocomix.evaluation.harness import parse_tasks
from megacocomix.parallel.grid import grid_problem
from megacocomix.parallel.pipeline import bubble_fraction
from megacocomix.teacher.guidance import Guidance, open_guidance
from megacocomix.teacher.labels import open_labeler, open_teacher


@dataclass(frozen=True)
class Inputs:
    """What a run reads: its two splits, what it learns from a teacher (None where nothing), and the weights to begin
    with (None where they are drawn)."""

    train: TokenDataset
    valid: TokenDataset
    guidance: Guidance | None
    vocab_size: int
    """Tokens are below this: the smaller of the model's and the teacher's vocabulary."""
    init: Source | None = None

    def identity(self) -> dict[str, str]:
        """Hashes of everything read, whatever it is called: a run goes on only on the same."""
        found = {"data.train": self.train.shards.fingerprint, "data.valid": self.valid.shards.fingerprint}
        if self.guidance:
            found |= self.guidance.identity()
        if self.init:
            found["training.init"] = self.init.sha256
        return found


def check_config(config: Config, world: int) -> None:
    """Check the fields against each other and against the number of processes. Raises one UserError with every
    problem."""
    if problems := list(_problems(config, world)):
        raise UserError(*problems)


def open_inputs(config: Config, device: torch.device) -> Inputs:
    """Open data, teacher and autoencoder and check that they fit the model. Raises one UserError with every problem."""
    problems = []

    def attempt(function, *arguments):
        try:
            return function(*arguments)
        except UserError as error:
            problems.extend(error.problems)

    tokenizer = attempt(load_tokenizer, config.data.tokenizer)
    splits = {}
    for split, path, seed in (("train", config.data.train, config.training.seed), ("valid", config.data.valid, None)):
        if (shards := attempt(TokenShards.open, path)) is not None:
            problems.extend(_data_misfits(f"data.{split} {path}", shards, tokenizer, config))
            splits[split] = attempt(TokenDataset, shards, config.model.context, seed)
    guidance = None
    if tokenizer and splits.get("train"):
        guidance = attempt(open_guidance, config, device, tokenizer.eot_id, splits["train"])
    elif config.method.learns_concepts:
        attempt(open_labeler, config, device, 0)  # for what it has to say
    elif config.method.has_teacher:
        attempt(open_teacher, config, device)
    limit = config.model.vocab_size
    if guidance and guidance.vocab_size:
        limit = min(limit, guidance.vocab_size)
        for split, dataset in splits.items():
            if dataset and (dataset.shards.vocab_size or 0) > limit:
                problems.append(
                    f"data.{split} has a vocabulary of {dataset.shards.vocab_size}, but the teacher one of {limit}: "
                    "both must be of one tokenizer."
                )
    init = attempt(open_init, config)
    if config.evaluation.tasks:
        attempt(parse_tasks, ",".join(config.evaluation.tasks), "evaluation.tasks")
    if (folder := config.evaluation.tasks_data) and not Path(folder).is_dir():
        problems.append(f"evaluation.tasks_data {folder} is no folder: make it with tools/fetch_eval_data.py --out.")
    if splits.get("valid"):
        attempt(_check_validation_tokens, splits["valid"], config, limit)
    if problems:
        raise UserError(*problems)
    return Inputs(**splits, guidance=guidance, vocab_size=limit, init=init)


def _problems(config: Config, world: int):
    model, optimizer, training = config.model, config.optimizer, config.training
    if model.hidden_size % model.num_heads:
        yield (
            f"model.num_heads {model.num_heads} does not divide hidden_size {model.hidden_size}. "
            f"Nearest valid: {_nearest_divisor(model.hidden_size, model.num_heads)}."
        )
    yield from _method_problems(config)
    if optimizer.min_lr > optimizer.lr:
        yield f"optimizer.min_lr {optimizer.min_lr} exceeds lr. Nearest valid: {optimizer.lr}."
    if optimizer.warmup_steps > training.steps:
        nearest = training.steps // 300
        yield f"optimizer.warmup_steps {optimizer.warmup_steps} exceeds training.steps. The paper's share: {nearest}."
    if training.stop_after and training.stop_after > training.steps:
        yield f"training.stop_after {training.stop_after} exceeds training.steps. Nearest valid: {training.steps}."
    if config.evaluation.tasks_every and not config.evaluation.tasks:
        yield "evaluation.tasks_every is how often evaluation.tasks are scored, but there are none. Use null."
    if config.logging.tensorboard and not find_spec("tensorboard"):
        yield "logging.tensorboard needs the package tensorboard: pip install 'megacocomix[tensorboard]'."
    yield from _layout_problems(config, world)


def _method_problems(config: Config):
    """What the parts of the method ask of each other, and of the teacher section."""
    model, method, teacher = config.model, config.method, config.teacher
    if method.has_module and method.insertion_layer >= model.num_layers:
        yield (
            f"method.insertion_layer {method.insertion_layer} is not before one of the {model.num_layers} blocks. "
            f"Nearest valid: {model.num_layers - 1}."
        )
    if method.predict == "concepts" and method.num_kept > method.num_concepts:
        yield f"method.num_kept {method.num_kept} exceeds num_concepts. Nearest valid: {method.num_concepts}."
    if method.mix == "predicted" and method.predict == "nothing":
        yield "method.mix is predicted, but method.predict is nothing. Use method.mix=pause or method.mix=nothing."
    if method.predict != "nothing" and method.mix != "predicted" and not method.concept_weight:
        yield (
            f"method.predict {method.predict} is neither mixed in nor learned: method.mix is {method.mix} and "
            "method.concept_weight 0. Use method.predict=nothing."
        )
    if method.interleave_every > 1 and not method.interleaves:
        why = "mixes nothing in" if method.mix == "nothing" else f"has placement {method.placement}"
        yield f"method.interleave_every {method.interleave_every} spaces slots, but method {why}. Use 1."
    if method.interleave_every >= model.context:  # a slot after the last token has nothing to predict
        yield (
            f"method.interleave_every {method.interleave_every} is not below model.context. "
            f"Nearest valid: {model.context - 1}."
        )
    if method.label_sign != "positive" and method.label_source != "attribution" and method.learns_concepts:
        yield (
            f"method.label_sign {method.label_sign} chooses among attributions, but method.label_source is "
            f"{method.label_source}. Use positive."
        )
    if method.has_teacher and (teacher is None or (method.learns_concepts and teacher.sae is None)):
        missing = "teacher is" if teacher is None else "teacher.sae is"
        needs = "teacher.model and teacher.sae" if method.learns_concepts else "teacher.model"
        causes = {"predict": method.learns_concepts or method.learns_hidden, "kd_weight": method.distills}
        why = " and ".join(f"{key} {getattr(method, key)}" for key, is_cause in causes.items() if is_cause)
        yield f"{missing} missing: method.name {method.name} ({why}) needs {needs}."


def _layout_problems(config: Config, world: int):
    """What the layout asks of sizes. Everything is said at once, so each rule holds on its own."""
    model, training, parallel = config.model, config.training, config.parallel
    tensor, pipeline = parallel.tensor, parallel.pipeline
    if problem := grid_problem(world, tensor, pipeline):
        yield problem
    data = max(1, world // (tensor * pipeline))
    unit = training.micro_batch * data
    if training.global_batch % unit:
        yield (
            f"training.global_batch {training.global_batch} is not a multiple of micro_batch {training.micro_batch} "
            f"× {data} data ranks. Nearest valid: {_nearest_multiple(training.global_batch, unit)}."
        )
    if model.num_heads % tensor:
        yield (
            f"parallel.tensor {tensor} does not divide model.num_heads {model.num_heads}. "
            f"Nearest valid: {_nearest_divisor(model.num_heads, tensor)}."
        )
    if tensor > 1 and parallel.sequence and model.context % tensor:
        yield (
            f"parallel.tensor {tensor} does not divide model.context {model.context}, whose positions it splits. "
            f"Nearest valid: model.context={_nearest_multiple(model.context, tensor)}, or parallel.sequence=false."
        )
    if tensor == 1 and parallel.sequence:
        yield "parallel.sequence splits positions among tensor ranks, but parallel.tensor is 1. Use false."
    if tensor > 1 and parallel.sequence and (model.context // tensor) % config.method.interleave_every:
        yield (
            f"method.interleave_every {config.method.interleave_every} does not divide the {model.context // tensor} "
            f"positions of a tensor rank (model.context {model.context} / parallel.tensor {tensor}). Nearest valid: "
            f"{_nearest_divisor(model.context // tensor, config.method.interleave_every)}, or parallel.sequence=false."
        )
    splits = [("model.vocab_size", model.vocab_size)]
    if config.method.predict == "concepts":
        splits.append(("method.num_concepts", config.method.num_concepts))
    for option, size in splits:
        if size < tensor:
            yield f"{option} {size} is below parallel.tensor {tensor}. Nearest valid: parallel.tensor={size}."
    if tensor > 1 and not parallel.sequence and model.dropout:
        yield (
            f"parallel.sequence false under parallel.tensor {tensor} would drop other values on each rank "
            f"(model.dropout {model.dropout}). Use parallel.sequence=true or model.dropout=0."
        )
    yield from _stage_problems(config, unit)
    if parallel.zero == 0 and training.precision == "bf16":
        yield "parallel.zero 0 under training.precision bf16 would reduce gradients in bf16. Use parallel.zero=1."
    if parallel.zero == 2 and pipeline > 1:
        yield (
            "parallel.zero 2 under a pipeline would cut the two copies of the tied embedding's gradient at different "
            "places. Use parallel.zero=3 with parallel.gather=per_step, or parallel.zero=1."
        )
    if parallel.zero < 3 and parallel.gather == "per_step":
        yield f"parallel.gather per_step is for parallel.zero 3; zero {parallel.zero} never gathers weights. Use null."
    if parallel.zero == 0 and parallel.offload_optimizer:
        yield "parallel.offload_optimizer needs sharded optimizer states. Use parallel.zero=1, 2 or 3."


def _stage_problems(config: Config, unit: int):
    model, training, parallel = config.model, config.training, config.parallel
    num_stages = parallel.num_stages
    if parallel.stages_per_rank > 1 and parallel.pipeline == 1:
        yield "parallel.stages_per_rank interleaves a pipeline's stages, but parallel.pipeline is 1. Use 1."
    elif num_stages > model.num_layers:
        nearest = max(1, model.num_layers // parallel.stages_per_rank)
        yield (
            f"parallel.pipeline {parallel.pipeline} × stages_per_rank {parallel.stages_per_rank} = {num_stages} "
            f"stages, but model.num_layers is {model.num_layers}. Nearest valid: parallel.pipeline={nearest}."
        )
    cuts = parallel.cuts
    if cuts and num_stages == 1:
        yield f"parallel.cuts {cuts} cut a pipeline into stages, but parallel.pipeline is 1. Use null."
    elif cuts is not None and (
        len(cuts) != num_stages - 1 or sorted(set(cuts)) != cuts or cuts[-1:] >= [model.num_layers]
    ):
        yield (
            f"parallel.cuts {cuts} must be the {num_stages - 1} first blocks of stages 1 to {num_stages - 1}, rising, "
            f"each below model.num_layers {model.num_layers}. Nearest valid: null (cut by FLOPs)."
        )
    micro_batches = max(1, training.global_batch // unit)
    if parallel.stages_per_rank > 1 and micro_batches % parallel.pipeline:
        nearest = _nearest_multiple(micro_batches, parallel.pipeline) * unit
        yield (
            f"parallel.stages_per_rank {parallel.stages_per_rank} needs micro-batches in multiples of "
            f"parallel.pipeline {parallel.pipeline}, but a step has {micro_batches}. "
            f"Nearest valid: training.global_batch={nearest}."
        )


def layout_warnings(config: Config, world: int):
    """What runs, but wastes: lines to print at the start of a run."""
    training, parallel = config.training, config.parallel
    data = world // (parallel.tensor * parallel.pipeline)
    micro_batches = training.global_batch // (training.micro_batch * data)
    if micro_batches < parallel.num_stages > 1:
        bubble = bubble_fraction(parallel.pipeline, parallel.stages_per_rank, micro_batches)
        yield (
            f"a step has {micro_batches} micro-batches for {parallel.num_stages} pipeline stages: each rank waits "
            f"{bubble:.0%} of the time. Raise training.global_batch, or lower training.micro_batch."
        )


def _nearest_multiple(value: int, unit: int) -> int:
    return max(unit, round(value / unit) * unit)


def _nearest_divisor(whole: int, value: int) -> int:
    valid = [divisor for divisor in range(1, whole + 1) if whole % divisor == 0]
    return min(valid, key=lambda divisor: abs(divisor - value))


def _data_misfits(what: str, shards: TokenShards, tokenizer, config: Config):
    vocab_size = config.model.vocab_size
    if shards.vocab_size is not None and shards.vocab_size > vocab_size:
        yield (
            f"{what} was written with a vocabulary of {shards.vocab_size}, but model.vocab_size is {vocab_size}. "
            f"Nearest valid: {shards.vocab_size}."
        )
    if tokenizer is None or shards.tokenizer_sha256 in (None, tokenizer.sha256):
        return
    yield f"{what} was written with another tokenizer than data.tokenizer {config.data.tokenizer}."


def _check_validation_tokens(dataset: TokenDataset, config: Config, vocab_size: int) -> None:
    num_windows = min(dataset.num_windows, config.evaluation.batches * config.training.global_batch)
    for start in range(0, num_windows, 1024):
        check_token_ids(dataset.batch(range(start, min(start + 1024, num_windows))), vocab_size, config.data.valid)
