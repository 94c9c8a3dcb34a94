"""Every rule that spans fields, or looks at the files a config names. All problems come in one report, each with what
to do."""

from dataclasses import dataclass
from importlib.util import find_spec

import torch

from megacocomix.config import Config
from megacocomix.data.tokenizer import load_tokenizer
from megacocomix.data.tokens import TokenDataset, TokenShards, check_token_ids
from megacocomix.errors import UserError
from megacocomix.teacher.labels import ConceptLabeler, open_labeler


@dataclass(frozen=True)
class Inputs:
    """What a run reads: its two splits, and who labels them (None without concepts)."""

    train: TokenDataset
    valid: TokenDataset
    labeler: ConceptLabeler | None
    vocab_size: int
    """Tokens are below this: the smaller of the model's and the teacher's vocabulary."""

    def identity(self) -> dict[str, str]:
        """Hashes of everything read, whatever it is called: a run goes on only on the same."""
        found = {"data.train": self.train.shards.fingerprint, "data.valid": self.valid.shards.fingerprint}
        if self.labeler:
            found |= {"teacher.model": self.labeler.teacher.sha256, "teacher.sae": self.labeler.sae.sha256}
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
    labeler = attempt(open_labeler, config, device) if config.concepts else None
    if labeler and tokenizer and labeler.sae.info.get("tokenizer_sha256") not in (None, tokenizer.sha256):
        problems.append(
            f"teacher.sae {config.teacher.sae} was trained with another tokenizer than {config.data.tokenizer}."
        )
    if labeler:
        for split, dataset in splits.items():
            if dataset and (dataset.shards.vocab_size or 0) > labeler.teacher.vocab_size:
                problems.append(
                    f"data.{split} has a vocabulary of {dataset.shards.vocab_size}, but the teacher one of "
                    f"{labeler.teacher.vocab_size}: both must be of one tokenizer."
                )
    limit = min(config.model.vocab_size, labeler.teacher.vocab_size if labeler else config.model.vocab_size)
    if splits.get("valid"):
        attempt(_check_validation_tokens, splits["valid"], config, limit)
    if problems:
        raise UserError(*problems)
    return Inputs(**splits, labeler=labeler, vocab_size=limit)


def _problems(config: Config, world: int):
    model, method, optimizer, training = config.model, config.method, config.optimizer, config.training
    if model.hidden_size % model.num_heads:
        valid = [heads for heads in range(1, model.hidden_size + 1) if model.hidden_size % heads == 0]
        nearest = min(valid, key=lambda heads: abs(heads - model.num_heads))
        yield (
            f"model.num_heads {model.num_heads} does not divide hidden_size {model.hidden_size}. "
            f"Nearest valid: {nearest}."
        )
    if config.concepts:
        if method.insertion_layer >= model.num_layers:
            yield (
                f"method.insertion_layer {method.insertion_layer} is not before one of the {model.num_layers} blocks. "
                f"Nearest valid: {model.num_layers - 1}."
            )
        if method.num_kept > method.num_concepts:
            yield f"method.num_kept {method.num_kept} exceeds num_concepts. Nearest valid: {method.num_concepts}."
        if config.teacher is None:
            yield "teacher is missing: method.name cocomix needs teacher.model and teacher.sae."
    if optimizer.min_lr > optimizer.lr:
        yield f"optimizer.min_lr {optimizer.min_lr} exceeds lr. Nearest valid: {optimizer.lr}."
    if optimizer.warmup_steps > training.steps:
        nearest = training.steps // 300
        yield f"optimizer.warmup_steps {optimizer.warmup_steps} exceeds training.steps. The paper's share: {nearest}."
    if training.stop_after and training.stop_after > training.steps:
        yield f"training.stop_after {training.stop_after} exceeds training.steps. Nearest valid: {training.steps}."
    if config.logging.tensorboard and not find_spec("tensorboard"):
        yield "logging.tensorboard needs the package tensorboard: pip install 'megacocomix[tensorboard]'."
    for axis in ("tensor", "pipeline"):
        if (degree := getattr(config.parallel, axis)) != 1:
            yield f"parallel.{axis} {degree}: models are sharded by ZeRO over the data ranks only. Nearest valid: 1."
    unit = training.micro_batch * world
    if training.global_batch % unit:
        nearest = max(unit, round(training.global_batch / unit) * unit)
        yield (
            f"training.global_batch {training.global_batch} is not a multiple of micro_batch {training.micro_batch} "
            f"× {world} processes. Nearest valid: {nearest}."
        )
    if config.parallel.zero == 0 and training.precision == "bf16":
        yield "parallel.zero 0 under training.precision bf16 would reduce gradients in bf16. Use parallel.zero=1."


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
