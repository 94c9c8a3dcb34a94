"""Validation loss: mean next-token loss over held-out windows, token-weighted, in eval mode."""

import json
from collections.abc import Iterator
from math import ceil, exp, inf
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from tqdm import tqdm

from megacocomix.data.tokens import TokenDataset, TokenShards, check_token_ids
from megacocomix.errors import UserError
from megacocomix.files import write_json
from megacocomix.model.load import (
    CHECKPOINT_FILE,
    LoadedModel,
    hf_shape,
    list_checkpoints,
    load_model,
    read_checkpoint_manifest,
    weights_sha256,
)
from megacocomix.model.losses import MASKED, label_cross_entropy, next_token_targets


class ExportedModel(nn.Module):
    """A model of transformers with the interface of ours: int64 tokens [B, T] → (logits [B, T, V], None)."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, tokens_BT: Tensor) -> tuple[Tensor, None]:
        """Without a cache: every window is read once."""
        return self.model(tokens_BT, use_cache=False).logits, None


def load_any_model(folder: str | Path) -> LoadedModel:
    """What `load_model` loads, and exported folders of models with concepts too. Raises UserError."""
    folder = Path(folder)
    if not is_exported(folder) or model_type(folder) != "cocomix":
        return load_model(folder)
    shape = hf_shape(folder, ("cocomix",))
    return LoadedModel(ExportedModel(load_cocomix(folder)), shape, None, weights_sha256(folder), folder)


def load_cocomix(folder: Path) -> nn.Module:
    """The model of an exported folder with concepts, in fp32, by our own code and not by the folder's. Raises UserError
    where the folder does not hold one."""
    from transformers.utils import logging

    from megacocomix.hf.modeling_cocomix import CocomixForCausalLM

    logging.disable_progress_bar()
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        model, said = CocomixForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32,
            local_files_only=True,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # said below, and not in a table
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, TypeError, AttributeError, SafetensorError) as error:
        raise UserError(f"{folder} cannot be loaded ({' '.join(str(error).split()):.200}).") from None
    finally:
        logging.set_verbosity(verbosity)
    # transformers draws what is missing, or of another size.
    mismatched = {key for key, *_ in said["mismatched_keys"]}
    if unfit := sorted({*said["missing_keys"], *said["unexpected_keys"], *mismatched}):
        raise UserError(f"{folder}/config.json does not fit its weights: {' '.join(unfit)}: export it again.")
    return model.eval()


def is_exported(folder: Path) -> bool:
    """Whether it is a Hugging Face folder, and no run and no checkpoint of ours."""
    is_ours = (folder / "checkpoints").is_dir() or (folder / CHECKPOINT_FILE).is_file()
    return not is_ours and (folder / "config.json").is_file()


def model_type(folder: Path) -> str | None:
    """What config.json of a Hugging Face folder says that it is. Raises UserError where it is damaged."""
    try:
        return json.loads((folder / "config.json").read_bytes()).get("model_type")
    except (ValueError, AttributeError):
        raise UserError(f"{folder}/config.json is damaged.") from None


def all_checkpoints(run: str | Path) -> list[Path]:
    """Every complete checkpoint of a run, oldest first. Raises UserError where there is none."""
    if not (Path(run) / "checkpoints").is_dir():
        raise UserError(f"--all-checkpoints needs a run; {run} has no folder checkpoints.")
    if not (checkpoints := list_checkpoints(run)):
        raise UserError(f"{run} holds no checkpoint yet.")
    return checkpoints


def checkpoint_step(path: Path) -> int | None:
    """The step of a checkpoint that lies in its run; None for any other folder."""
    if path.parent.name != "checkpoints" or not (path / CHECKPOINT_FILE).is_file():
        return None
    return int(path.name.removeprefix("step-"))


def validation_batches(
    dataset: TokenDataset, num_sequences: int, batch: int, rank: int = 0, world: int = 1
) -> Iterator[tuple[Tensor, Tensor]]:
    """Tokens [B, T] and next-token targets [B, T, 1] of the first `num_sequences` windows, shared among `world` ranks.

    All ranks get the same number of batches, all of `batch` windows, because a forward pass may be a collective: where
    the windows do not suffice, the rest of a batch has no targets.
    """
    for start in range(rank * batch, ceil(num_sequences / (batch * world)) * batch * world, batch * world):
        rows = range(start, start + batch)
        tokens_BT = torch.from_numpy(dataset.batch([row if row < num_sequences else 0 for row in rows]))
        targets_BT1 = next_token_targets(tokens_BT)
        targets_BT1[max(0, num_sequences - start) :] = MASKED
        yield tokens_BT, targets_BT1


def perplexity(loss: float) -> float:
    """exp(loss), infinite where that exceeds a float."""
    return exp(loss) if loss < 700 else inf


def evaluate_folder(folder: str | Path, data: str | None, batch: int) -> dict:
    """Validation loss of the model in `folder` over all windows of `data` (default: its config's data.valid), in fp32.

    For a run of ours the result is also written to RUN/evals/STEP.json, whose path is then under `file`.
    """
    if batch < 1:
        raise UserError(f"--batch {batch} is not at least 1.")
    loaded = load_any_model(folder)
    if data is None and loaded.config is None:
        raise UserError(f"{folder} does not say what it was validated on: give --data PATH.")
    data = data or loaded.config.data.valid
    shards = TokenShards.open(data)
    if shards.vocab_size and shards.vocab_size > loaded.shape.vocab_size:
        raise UserError(f"{data} has a vocabulary of {shards.vocab_size}, {folder} one of {loaded.shape.vocab_size}.")
    dataset = TokenDataset(shards, loaded.shape.context, None)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = loaded.model.to(device).eval()
    total = 0.0
    with torch.no_grad(), tqdm(total=dataset.num_windows, unit="window", desc="evaluating", disable=None) as progress:
        for tokens_BT, targets_BT1 in validation_batches(dataset, dataset.num_windows, batch):
            check_token_ids(tokens_BT, loaded.shape.vocab_size, data)
            total += label_cross_entropy(model(tokens_BT.to(device))[0], targets_BT1.to(device)).item()
            progress.update(int((targets_BT1[:, 0] != MASKED).sum()))
    loss = total / (dataset.num_windows * (loaded.shape.context - 1))
    result = {
        "model": str(loaded.path),
        "sha256": loaded.sha256,
        "data": data,
        "data_fingerprint": shards.fingerprint,
        "context": loaded.shape.context,
        "num_sequences": dataset.num_windows,
        "valid_loss": loss,
        "valid_ppl": perplexity(loss),
    }
    if loaded.config and (step := checkpoint_step(loaded.path)) is not None:
        result["step"] = step
        file = _result_file(loaded.path, shards)
        file.parent.mkdir(exist_ok=True)
        write_json(file, result)
        result["file"] = str(file)
    return result


def earlier_evaluation(checkpoint: Path, data: str | None) -> dict | None:
    """What `evaluate_folder` wrote for the same weights and windows of a checkpoint in its run; None where it did
    not."""
    data = data or read_checkpoint_manifest(checkpoint)["config"]["data"]["valid"]
    shards = TokenShards.open(data)
    file = _result_file(checkpoint, shards)
    try:
        result = dict(json.loads(file.read_bytes()))
        found = result["sha256"], result["data_fingerprint"]
        is_same = found == (weights_sha256(checkpoint), shards.fingerprint) and {"valid_loss", "valid_ppl"} <= set(
            result
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return result | {"file": str(file)} if is_same else None


def write_result(file: Path, result: dict) -> None:
    """Write a result that is not a run's where the user wants it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, result)


def _result_file(checkpoint: Path, shards: TokenShards) -> Path:
    return checkpoint.parents[1] / "evals" / f"{checkpoint.name}-{shards.fingerprint[:8]}.json"
