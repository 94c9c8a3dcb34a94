"""Opens a run, a native checkpoint or a Hugging Face folder as a transformers model, which can be evaluated, inspected,
steered and decoded with a cache.

GPT-2 and CoCoMix are opened in fp32 as the class in modeling_cocomix.py, with our code and never with code from the
folder. A model without concepts has an empty concept module. Any other causal language model keeps its own transformers
class.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from megacocomix.checkpoint.detect import detect
from megacocomix.checkpoint.open import LoadedModel, load_lm, model_tokenizer, weights_sha256
from megacocomix.config.schema import Config
from megacocomix.data.tokenizer import Tokenizer, export_tokenizer, load_hf_tokenizer, load_tokenizer
from megacocomix.errors import UserError
from megacocomix.hf.export import to_cocomix
from megacocomix.hf.modeling_cocomix import CocomixForCausalLM


@dataclass(frozen=True)
class OpenModel:
    """A model in eval mode and in fp32, its folder (for a run: the checkpoint), the SHA-256 of its weights, and the
    config it was trained with (None if the folder records none)."""

    model: PreTrainedModel
    path: Path
    sha256: str
    config: Config | None

    @property
    def context(self) -> int:
        """The largest number of tokens it can read."""
        return self.model.config.get_text_config().max_position_embeddings

    @property
    def vocab_size(self) -> int:
        """The number of tokens that it knows."""
        return self.model.config.get_text_config().vocab_size

    @property
    def device(self) -> torch.device:
        """The device of its weights."""
        return self.model.device

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Raises UserError if the folder records none, or one with a larger vocabulary than the model's."""
        spec = self._tokenizer_spec
        try:
            tokenizer = load_tokenizer(spec)
        except UserError as error:
            if self.config is None:
                raise
            where = f"The config in {self.path} names it, relative to the folder in which its run was started."
            raise UserError(*error.problems, where) from None
        self._check_vocabulary(tokenizer.vocab_size)
        return tokenizer

    @cached_property
    def hf_tokenizer(self) -> PreTrainedTokenizerBase:
        """The same tokenizer as transformers' class. Raises UserError."""
        spec = self._tokenizer_spec
        if Path(spec).is_dir():
            tokenizer = load_hf_tokenizer(Path(spec))
        else:
            load_tokenizer(spec)  # for its better error messages
            with TemporaryDirectory() as folder:
                export_tokenizer(spec, Path(folder))
                tokenizer = load_hf_tokenizer(Path(folder))
        self._check_vocabulary(len(tokenizer))
        return tokenizer

    @property
    def _tokenizer_spec(self) -> str:
        if spec := model_tokenizer(self.path):
            return spec
        if self.config:
            raise UserError(f"{self.path} does not record its tokenizer: convert it again with --tokenizer.")
        raise UserError(f"{self.path} holds no tokenizer, such as a tokenizer.json.")

    def _check_vocabulary(self, num_tokens: int) -> None:
        size = self.vocab_size
        if num_tokens > size:
            raise UserError(f"{self.path} has a vocabulary of {size}, but its tokenizer one of {num_tokens}.")

    def has_slot(self, position: Tensor) -> Tensor:
        """Whether token positions have a concept slot (method.interleave_every), bool of the same shape."""
        return (position + 1) % self.model.config.interleave_every == 0


def open_model(path: str | Path, device: str | torch.device | None = None) -> OpenModel:
    """The model in a run, a native checkpoint or a Hugging Face folder, on `device` (default: the GPU if there is one).
    Raises UserError if there is no model, or none that can be run."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    found = detect(path)
    if found.kind in ("megatron", "deepspeed"):
        raise UserError(
            f"{path} is a checkpoint of {'Megatron-LM' if found.kind == 'megatron' else 'DeepSpeed'}: convert it first "
            "with tools/convert_checkpoint.py --to native."
        )
    lm = load_lm(found, torch.float32)
    module = lm.model if isinstance(lm, LoadedModel) else lm
    if not all(parameter.isfinite().all() for parameter in module.parameters()):
        raise UserError(f"{found.path} holds weights that are not finite (tools/inspect_checkpoint.py --health).")
    if isinstance(lm, LoadedModel):
        return OpenModel(to_cocomix(lm).to(device), lm.path, lm.sha256, lm.config)
    return OpenModel(lm.to(device), found.path, weights_sha256(found), None)


def check_is_cocomix(opened: OpenModel) -> None:
    """Raises UserError for another architecture: its cache and padding are not as our decoding needs them."""
    if not isinstance(opened.model, CocomixForCausalLM):
        raise UserError(
            f"{opened.path} runs as transformers' {type(opened.model).__name__}: only CoCoMix, and GPT-2 with a tied "
            "head, are decoded here."
        )


def check_has_concepts(opened: OpenModel) -> None:
    """Raises UserError for a model that predicts no concepts."""
    check_is_cocomix(opened)
    predict = opened.model.config.predict
    if predict == "concepts":
        return
    instead = "a teacher's hidden state, not concepts" if predict == "hidden" else "no concepts"
    raise UserError(f"{opened.path} predicts {instead}: there is nothing to inspect or to steer.")


def check_mixes_concepts(opened: OpenModel) -> None:
    """Raises UserError for a model whose next tokens do not depend on its concepts."""
    check_has_concepts(opened)
    if opened.model.config.mix != "predicted":
        raise UserError(f"{opened.path} predicts concepts but mixes none in: steering them cannot change its text.")
