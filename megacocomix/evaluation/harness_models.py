"""A folder → a language model of lm-evaluation-harness, in fp32, without running code that a folder brings."""

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from lm_eval.api.model import LM
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from megacocomix.data.hf_tokenizer import export_tokenizer
from megacocomix.data.tokenizer import load_tokenizer
from megacocomix.errors import UserError
from megacocomix.evaluation.native_lm import NativeLM
from megacocomix.evaluation.perplexity import is_exported, load_cocomix, model_type
from megacocomix.model.load import load_model, weights_sha256


@dataclass(frozen=True)
class EvaluatedModel:
    """The model, the folder it was found in (of a run: the checkpoint), and the SHA-256 of its weights."""

    lm: LM
    path: Path
    sha256: str


def open_model(folder: str | Path, batch: int) -> EvaluatedModel:
    """Runs and checkpoints are read by our own model, Hugging Face folders by the harness's own backend. Raises
    UserError where a folder is neither, or its tokenizer is of another vocabulary."""
    folder = Path(folder)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if is_exported(folder):
        return _open_exported(folder, batch, device)
    loaded = load_model(folder)
    if not loaded.config.data.tokenizer:
        raise UserError(f"{loaded.path} does not say its tokenizer: convert it again with --tokenizer.")
    load_tokenizer(loaded.config.data.tokenizer)  # says best what is wrong with it
    tokenizer = _exported_tokenizer(loaded.config.data.tokenizer)
    _check_vocabulary(loaded.path, loaded.shape.vocab_size, tokenizer)
    lm = NativeLM(loaded.model, loaded.shape.context, tokenizer, batch, device)
    return EvaluatedModel(lm, loaded.path, loaded.sha256)


def _open_exported(folder: Path, batch: int, device: torch.device) -> EvaluatedModel:
    from lm_eval.models.huggingface import HFLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    sha256 = weights_sha256(folder)
    model = load_cocomix(folder) if model_type(folder) == "cocomix" else _load_hf(folder)
    model.config.use_cache = False  # every text is read once
    model.config.pad_token_id = None  # padding is on the right, which a causal model needs no warning of
    tokenizer = _folder_tokenizer(folder)
    _check_vocabulary(folder, model.config.vocab_size, tokenizer)
    lm = HFLM(pretrained=model.to(device), tokenizer=tokenizer, backend="causal", batch_size=batch)
    return EvaluatedModel(lm, folder, sha256)


def _load_hf(folder: Path) -> PreTrainedModel:
    try:
        return AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, use_safetensors=True, trust_remote_code=False
        ).eval()
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{folder} is no causal language model that transformers can load ({reason:.200}).") from None


def _folder_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    names = {file.name for file in folder.iterdir()}
    if "tokenizer.model" in names and not names & {"tokenizer.json", "tokenizer_config.json"}:
        return _exported_tokenizer(str(folder / "tokenizer.model"))
    if model_type(folder) == "cocomix":  # beside its config.json, transformers would ask to run the folder's code
        return _exported_tokenizer(str(folder))
    return _read_tokenizer(folder, folder)


def _exported_tokenizer(spec: str) -> PreTrainedTokenizerBase:
    """The tokenizer that an export carries, so that a checkpoint is read as its exported folder is."""
    with TemporaryDirectory() as folder:
        export_tokenizer(spec, Path(folder))
        return _read_tokenizer(folder, spec)


def _read_tokenizer(folder: str | Path, name: str | Path) -> PreTrainedTokenizerBase:
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers raises whatever its parsers do
        raise UserError(f"the tokenizer of {name} cannot be loaded ({' '.join(str(error).split()):.200}).") from None
    # A folder without a vocabulary gives, without complaint, a tokenizer that knows nothing.
    if set(tokenizer.get_vocab().values()) <= set(tokenizer.all_special_ids):
        raise UserError(f"{name} holds no tokenizer, such as a tokenizer.json.")
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer of {name} has no end of text: set eos_token in its tokenizer_config.json.")
    return tokenizer


def _check_vocabulary(folder: Path, size: int, tokenizer: PreTrainedTokenizerBase) -> None:
    if len(tokenizer) > size:
        raise UserError(f"{folder} has a vocabulary of {size}, but its tokenizer one of {len(tokenizer)}.")
