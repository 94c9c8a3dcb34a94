"""Validation loss: mean next-token loss over held-out windows, token-weighted, in eval mode."""

from collections.abc import Callable
from math import ceil, exp, inf
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from megacocomix.data.tokens import TokenDataset, TokenShards, check_token_ids
from megacocomix.errors import UserError
from megacocomix.files import write_json
from megacocomix.model.load import load_model
from megacocomix.model.losses import label_cross_entropy, next_token_targets


@torch.no_grad()
def validation_loss(
    forward: Callable[[Tensor], tuple],
    dataset: TokenDataset,
    num_sequences: int,
    micro_batch: int,
    device: torch.device,
    rank: int = 0,
    world: int = 1,
) -> float:
    """Mean loss in nats over the first `num_sequences` windows of `dataset`, at most all of them.

    `forward` maps tokens [B, T] to (logits [B, T, V], …); the caller puts its model in eval mode. The windows are
    shared among `world` ranks; each makes the same number of forward passes, because under ZeRO-3 a forward pass is a
    collective.
    """
    num_sequences = min(num_sequences, dataset.num_windows)
    totals = torch.zeros(2, dtype=torch.float64, device=device)  # summed loss, number of targets
    for round_index in range(ceil(num_sequences / (micro_batch * world))):
        start = min((round_index * world + rank) * micro_batch, num_sequences)
        stop = min(start + micro_batch, num_sequences)
        has_windows = stop > start
        tokens_BT = torch.from_numpy(dataset.batch(range(start, stop) if has_windows else range(1))).to(device)
        logits_BTV = forward(tokens_BT)[0]
        if has_windows:
            targets = next_token_targets(tokens_BT)
            totals[0] += label_cross_entropy(logits_BTV, targets)
            totals[1] += (targets >= 0).sum()
    if world > 1:
        dist.all_reduce(totals)
    return (totals[0] / totals[1]).item()


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
    with tqdm(total=dataset.num_windows, unit="window", desc="evaluating", disable=None) as progress:

        def forward(tokens_BT: Tensor) -> tuple:
            check_token_ids(tokens_BT, loaded.shape.vocab_size, data)
            progress.update(len(tokens_BT))
            return model(tokens_BT)

        loss = validation_loss(forward, dataset, dataset.num_windows, batch, device)
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
