"""Validation loss: mean next-token loss over held-out windows, token-weighted, in eval mode."""

from collections.abc import Iterator
from math import ceil, exp, inf
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from megacocomix.data.tokens import TokenDataset, TokenShards, check_token_ids
from megacocomix.errors import UserError
from megacocomix.files import write_json
from megacocomix.model.load import load_model
from megacocomix.model.losses import MASKED, label_cross_entropy, next_token_targets


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
    loaded = load_model(folder)
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
    if loaded.config and loaded.path.parent.name == "checkpoints":
        result["step"] = int(loaded.path.name.removeprefix("step-"))
        file = loaded.path.parents[1] / "evals" / f"{loaded.path.name}-{shards.fingerprint[:8]}.json"
        file.parent.mkdir(exist_ok=True)
        write_json(file, result)
        result["file"] = str(file)
    return result
