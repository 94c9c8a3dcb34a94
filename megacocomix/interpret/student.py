"""A folder → a model that can be read, steered and decoded with a cache.

Whatever the folder is, the model is the class that an exported folder carries (megacocomix/hf), in fp32: runs and
checkpoints of ours become one in memory, and a model without concepts is one whose concept module has no parts.
"""

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from megacocomix.checkpoint.hf import to_cocomix
from megacocomix.config import Config
from megacocomix.data.hf_tokenizer import export_tokenizer
from megacocomix.data.tokenizer import Tokenizer, load_tokenizer
from megacocomix.errors import UserError
from megacocomix.evaluation.perplexity import is_exported, load_cocomix, model_type
from megacocomix.hf.modeling_cocomix import CocomixForCausalLM
from megacocomix.model.load import load_model, weights_sha256


@dataclass(frozen=True)
class Student:
    """A model in eval mode, its tokenizer, where it was found (of a run: the checkpoint), the SHA-256 of its weights,
    and the config it was trained with, where the folder has one."""

    model: CocomixForCausalLM
    tokenizer: Tokenizer
    path: Path
    sha256: str
    config: Config | None

    @property
    def context(self) -> int:
        """Most tokens that it reads."""
        return self.model.config.n_positions

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return self.model.device

    def has_slot(self, position: Tensor) -> Tensor:
        """Which token positions have a concept slot: those for which something is predicted (method.interleave_every),
        bool of the same shape."""
        return (position + 1) % self.model.config.interleave_every == 0


def open_student(folder: str | Path, device: str | torch.device | None = None) -> Student:
    """The model in a run, a checkpoint of ours or a Hugging Face folder (GPT-2 or CoCoMix), on `device` (default: the
    GPU where there is one). Raises UserError where there is none, or none whose tokenizer is to be had."""
    folder = Path(folder)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if is_exported(folder) and model_type(folder) == "cocomix":
        tokenizer, model, path, config = _folder_tokenizer(folder), load_cocomix(folder), folder, None
        sha256 = weights_sha256(folder)
    else:
        loaded = load_model(folder)
        path, sha256, config = loaded.path, loaded.sha256, loaded.config
        tokenizer = _config_tokenizer(config, path) if config else _folder_tokenizer(folder)
        model = to_cocomix(loaded)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise UserError(
            f"{path} has a vocabulary of {model.config.vocab_size}, but its tokenizer one of {tokenizer.vocab_size}."
        )
    return Student(model.to(device), tokenizer, path, sha256, config)


def check_has_concepts(student: Student) -> None:
    """Raises UserError for a model that predicts no concepts."""
    predict = student.model.config.predict
    if predict == "concepts":
        return
    instead = "a teacher's hidden state, and no concepts" if predict == "hidden" else "no concepts"
    raise UserError(f"{student.path} predicts {instead}: there is nothing to inspect or to steer.")


def check_mixes_concepts(student: Student) -> None:
    """Raises UserError for a model whose next tokens do not depend on its concepts."""
    check_has_concepts(student)
    if student.model.config.mix != "predicted":
        raise UserError(f"{student.path} predicts concepts but mixes none in: steering them cannot change its text.")


def _config_tokenizer(config: Config, path: Path) -> Tokenizer:
    if not config.data.tokenizer:
        raise UserError(f"{path} does not say its tokenizer: convert it again with --tokenizer.")
    try:
        return load_tokenizer(config.data.tokenizer)
    except UserError as error:
        where = f"So says the config in {path}, whose paths are relative to the folder that its run was started in."
        raise UserError(*error.problems, where) from None


def _folder_tokenizer(folder: Path) -> Tokenizer:
    """Of a Hugging Face folder: from a copy, because beside a config.json that names code transformers would ask to run
    it."""
    with TemporaryDirectory() as copy:
        export_tokenizer(str(folder), Path(copy))
        try:
            return load_tokenizer(copy)
        except UserError as error:
            raise UserError(*(line.replace(copy, str(folder)) for line in error.problems)) from None
