"""Validation loss: the mean next-token loss per token over held-out windows, in eval mode."""

import json
from collections.abc import Iterator
from math import ceil, exp, inf, isfinite
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from megacocomix.checkpoint.format import checkpoint_step, list_checkpoints, read_checkpoint_manifest
from megacocomix.checkpoint.open import recorded_tokenizer, weights_sha256
from megacocomix.config.load import build_config
from megacocomix.config.schema import Config
from megacocomix.data.check import check_tokens
from megacocomix.data.tokens import TokenDataset, TokenShards, check_token_ids
from megacocomix.errors import UserError
from megacocomix.files import write_json
from megacocomix.model.losses import MASKED, label_cross_entropy, next_token_targets


def all_checkpoints(run: str | Path) -> list[Path]:
    """Every complete checkpoint of a run, oldest first. Raises UserError if there is none."""
    if not (Path(run) / "checkpoints").is_dir():
        raise UserError(f"--all-checkpoints needs a run, but {run} has no folder checkpoints.")
    if not (checkpoints := list_checkpoints(run)):
        raise UserError(f"{run} holds no checkpoint yet.")
    return checkpoints


def validation_batches(
    dataset: TokenDataset, num_sequences: int, batch: int, rank: int = 0, world: int = 1
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield tokens int64 [B, T] and next-token targets int64 [B, T, 1] of the first `num_sequences` windows, divided
    among `world` ranks.

    All ranks get the same number of batches, each of `batch` windows, because a forward pass may be a collective. If
    the windows do not fill a batch, the rest of the batch has no targets.
    """
    for start in range(rank * batch, ceil(num_sequences / (batch * world)) * batch * world, batch * world):
        rows = range(start, start + batch)
        tokens_BT = torch.from_numpy(dataset.batch([row if row < num_sequences else 0 for row in rows]))
        targets_BT1 = next_token_targets(tokens_BT)
        targets_BT1[max(0, num_sequences - start) :] = MASKED
        yield tokens_BT, targets_BT1


def perplexity(loss: float) -> float:
    """exp(loss), or infinity if that exceeds a float."""
    return exp(loss) if loss < 700 else inf


def evaluate_folder(folder: str | Path, data: str | None, batch: int, dtype: str | None = None) -> dict:
    """Validation loss of the model in `folder` over all windows of `data` (default: its config's data.valid), in fp32.
    `dtype` is the type of ids in a file without a header.

    For a checkpoint in its run the result is also written to RUN/evals/, and the path of that file is under `file`.
    """
    if batch < 1:
        raise UserError(f"--batch must be at least 1, not {batch}.")
    from megacocomix.hf.open import open_model  # imported here: transformers would add seconds to every training

    opened = open_model(folder)
    shards, data = open_held_out(opened.path, opened.config, data, dtype)
    vocab_size = opened.vocab_size
    check_tokens(data, shards, vocab_size, (str(opened.path), recorded_tokenizer(opened.path)))
    dataset = TokenDataset(shards, opened.context, None)
    total = 0.0
    with torch.no_grad(), tqdm(total=dataset.num_windows, unit="window", desc="evaluating", disable=None) as progress:
        for tokens_BT, targets_BT1 in validation_batches(dataset, dataset.num_windows, batch):
            check_token_ids(tokens_BT, vocab_size, data)
            logits_BTV = opened.model(tokens_BT.to(opened.device), use_cache=False).logits
            total += label_cross_entropy(logits_BTV, targets_BT1.to(opened.device)).item()
            progress.update(int((targets_BT1[:, 0] != MASKED).sum()))
    loss = total / (dataset.num_windows * (opened.context - 1))
    if not isfinite(loss):
        raise UserError(f"{folder}: the loss on {data} is {loss}: its weights are damaged, or its numbers overflow.")
    result = {
        "model": str(opened.path),
        "sha256": opened.sha256,
        "data": data,
        "data_fingerprint": shards.fingerprint,
        "context": opened.context,
        "num_sequences": dataset.num_windows,
        "valid_loss": loss,
        "valid_ppl": perplexity(loss),
    }
    if opened.config and (step := checkpoint_step(opened.path)) is not None:
        result["step"] = step
        file = _result_file(opened.path, shards)
        write_json(file, result)
        result["file"] = str(file)
    return result


def open_held_out(
    model: Path, config: Config | None, data: str | None, dtype: str | None, verify: bool = True
) -> tuple[TokenShards, str]:
    """The tokens to measure a model on, and their path: `data`, or data.valid of its run's config. `dtype` is the type
    of ids in a file without a header. With `verify`, shards are compared with their hashes. Raises UserError."""
    if data is None and config is None:
        raise UserError(f"{model} does not record what it was validated on: give --data PATH.")
    if data is None:
        data, dtype = config.data.valid, dtype or config.data.dtype
    return TokenShards.open(data, dtype, verify=verify), data


def earlier_evaluation(checkpoint: Path, data: str | None, dtype: str | None = None) -> dict | None:
    """The result of `evaluate_folder` for the same weights and windows of a checkpoint in its run; None if there is
    none."""
    config = build_config(read_checkpoint_manifest(checkpoint)["config"], str(checkpoint))
    shards, _ = open_held_out(checkpoint, config, data, dtype, verify=False)
    file = _result_file(checkpoint, shards)
    try:
        result = dict(json.loads(file.read_bytes()))
        found = result["sha256"], result["data_fingerprint"]
        is_same = found == (weights_sha256(checkpoint), shards.fingerprint) and isfinite(result["valid_loss"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return result | {"file": str(file)} if is_same and {"valid_loss", "valid_ppl"} <= result.keys() else None


def _result_file(checkpoint: Path, shards: TokenShards) -> Path:
    return checkpoint.parents[1] / "evals" / f"{checkpoint.name}-{shards.fingerprint[:8]}.json"
