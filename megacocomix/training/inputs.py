"""Open the inputs of a run, and compare them with its config."""

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from megacocomix.checkpoint.external.source import Source
from megacocomix.checkpoint.init_from import open_init
from megacocomix.config.schema import Config
from megacocomix.data.binary import KNOWN
from megacocomix.data.check import token_problems
from megacocomix.data.tokenizer import Tokenizer, load_tokenizer
from megacocomix.data.tokens import TokenDataset, TokenShards, check_token_ids
from megacocomix.errors import UserError
from megacocomix.evaluation.harness import parse_tasks
from megacocomix.parallel.runtime import errors_on_all_ranks
from megacocomix.teacher.labels import open_labeler, open_teacher
from megacocomix.teacher.targets import TargetSource, open_targets


@dataclass(frozen=True)
class Inputs:
    """The inputs of a run: its two splits, its teacher targets (None without a teacher), and its initial weights (None
    if they are random)."""

    train: TokenDataset
    valid: TokenDataset
    targets: TargetSource | None
    vocab_size: int
    """Token ids are below this: the smaller of the model's and the teacher's vocabulary."""
    init: Source | None = None
    tokenizer: Tokenizer | None = None

    def identity(self) -> dict[str, str]:
        """Hashes of all inputs. A run resumes only with the same ones."""
        found = {"data.train": self.train.shards.fingerprint, "data.valid": self.valid.shards.fingerprint}
        if self.targets:
            found |= self.targets.identity()
        if self.init:
            found["training.init_from"] = self.init.sha256
        if self.tokenizer:
            found["data.tokenizer"] = f"{self.tokenizer.sha256}, end of text {self.tokenizer.eot_id}"
        return found

    def changed(self, recorded: dict[str, str]) -> list[str]:
        """The inputs that have another identity than recorded. Those that only one side knows are not compared."""
        splits = {"data.train": self.train.shards, "data.valid": self.valid.shards}
        now = self.identity() | {key: each.fingerprint_as(recorded.get(key)) for key, each in splits.items()}
        return [key for key in sorted(recorded) if recorded[key] != now.get(key, recorded[key])]


def verify_data(config: Config, is_main: bool) -> None:
    """Rank 0 reads all tokens, unless it did so before: hashes of shards, and all of other projects' files. The other
    ranks wait, and get what it found. Raises UserError on all ranks for a shard that is not as it was written."""
    splits = {Path(config.data.train), Path(config.data.valid)} if is_main else set()
    with errors_on_all_ranks():
        for path in filter(Path.is_dir, splits):
            TokenShards.open(path, verify=True)
        for path in filter(Path.is_file, splits):
            with suppress(UserError):  # open_inputs finds the same, with all other problems
                KNOWN[path] = TokenShards.open(path, config.data.dtype).binary.scan
    known = [KNOWN]
    dist.broadcast_object_list(known, src=0)
    KNOWN.update(known[0])


def open_inputs(config: Config, device: torch.device) -> Inputs:
    """Open data, teacher and autoencoder, and compare them with the model. Raises one UserError with every problem."""
    problems = []

    def attempt(function, *arguments):
        try:
            return function(*arguments)
        except UserError as error:
            problems.extend(error.problems)

    tokenizer = attempt(load_tokenizer, config.data.tokenizer)
    named = f"data.tokenizer {config.data.tokenizer}", tokenizer
    splits = {}
    for split, path, seed in (("train", config.data.train, config.training.seed), ("valid", config.data.valid, None)):
        if (shards := attempt(TokenShards.open, path, config.data.dtype)) is not None:
            problems.extend(token_problems(f"data.{split} {path}", shards, config.model.vocab_size, named))
            splits[split] = attempt(TokenDataset, shards, config.model.context, seed)
    targets = None
    if tokenizer and splits.get("train"):
        targets = attempt(open_targets, config, device, tokenizer.eot_id, splits["train"])
    elif config.method.learns_concepts:
        attempt(open_labeler, config, device, 0)  # only for its errors
    elif config.method.has_teacher:
        attempt(open_teacher, config, device)
    limit = config.model.vocab_size
    if targets and targets.vocab_size:
        limit = min(limit, targets.vocab_size)
        for split, dataset in splits.items():
            if dataset and (dataset.shards.vocab_size or 0) > limit:
                problems.append(
                    f"data.{split} has a vocabulary of {dataset.shards.vocab_size}, but the teacher's is {limit}: "
                    "both must use the same tokenizer."
                )
            elif dataset and dataset.shards.binary and limit < config.model.vocab_size:
                problems.extend(token_problems(f"data.{split}", dataset.shards, limit))
    init = attempt(open_init, config)
    if config.evaluation.tasks:
        attempt(parse_tasks, ",".join(config.evaluation.tasks), "evaluation.tasks")
    if (folder := config.evaluation.tasks_data) and not Path(folder).is_dir():
        problems.append(f"evaluation.tasks_data {folder} is not a folder: make it with tools/fetch_eval_data.py --out.")
    if splits.get("valid") and not splits["valid"].shards.binary:
        attempt(_check_validation_tokens, splits["valid"], config, limit)
    if problems:
        raise UserError(*problems)
    return Inputs(**splits, targets=targets, vocab_size=limit, init=init, tokenizer=tokenizer)


def _check_validation_tokens(dataset: TokenDataset, config: Config, vocab_size: int) -> None:
    num_windows = min(dataset.num_windows, config.evaluation.batches * config.training.global_batch)
    for start in range(0, num_windows, 1024):
        check_token_ids(dataset.batch(range(start, min(start + 1024, num_windows))), vocab_size, config.data.valid)
