"""Train an autoencoder on a teacher: wire teacher, token shards and trainer, measure on held-out windows, save it."""

import itertools
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from tqdm import tqdm

from megacocomix.config import Location
from megacocomix.data.tokens import TokenDataset, TokenShards
from megacocomix.errors import UserError
from megacocomix.teacher.gpt2 import Teacher, load_teacher
from megacocomix.teacher.sae import TopKSAE
from megacocomix.teacher.sae_trainer import SAETraining, default_aux_k, default_lr, measure_sae, train_sae

TOKENS_PER_FORWARD = 4096
# What the autoencoder is measured on: enough that a latent in use is seldom called dead by chance.
HELD_OUT_TOKENS = 2**17
# Without --valid, this share of the windows is kept out of training.
HELD_OUT_SHARE = 0.05
# Of the 10 M tokens of Gao et al.; a shorter run needs its dead latents sooner.
DEAD_AFTER_TOKENS = 10_000_000


@dataclass(frozen=True)
class SAEJob:
    """What `tools/train_sae.py` was asked for; its --help says what each means."""

    teacher: str
    data: str
    valid: str | None
    layer: int
    location: Location
    latents: int
    k: int
    out: str
    steps: int
    batch_rows: int
    lr: float | None
    seed: int


def run_sae_job(job: SAEJob) -> dict[str, float]:
    """Train, measure and save; FILE.jsonl beside the file logs the training. Returns what was measured.

    Raises UserError for anything that does not fit; an existing file is never overwritten.
    """
    out = Path(job.out)
    log = out.with_name(out.name + ".jsonl")
    for taken in (out, log):
        if taken.exists():
            raise UserError(f"--out {out}: {taken} exists already: choose another name or delete it.")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    teacher = load_teacher(job.teacher, job.layer, job.location, device)
    train, train_positions, valid, valid_positions = _split(job, teacher)
    settings = _choose_settings(job, teacher)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out}: its folder cannot be made ({error.strerror}).") from None
    endless = (train_positions[i % len(train_positions)] for i in itertools.count())
    rows = (teacher.hidden(tokens).flatten(0, 1) for tokens in _token_batches(train, endless, teacher, device))
    sae, last = _train_with_log(rows, settings, log)

    held_out = list(_token_batches(valid, valid_positions, teacher, device))
    print(f"measuring on {sum(map(torch.Tensor.numel, held_out)):,} held-out tokens", flush=True)
    report = measure_sae(sae, (teacher.hidden(tokens).flatten(0, 1) for tokens in held_out))
    measured = asdict(report) | {
        "dead_fraction_training": last["dead_fraction"],
        "dead_after_tokens": settings.dead_after_tokens,
        **_teacher_losses(teacher, sae, held_out),
    }
    info = {
        "teacher": Path(job.teacher).resolve().name,
        "teacher_sha256": teacher.sha256,
        "sae_layer": job.layer,
        "location": job.location,
        "context": teacher.context,
        "tokenizer_sha256": train.shards.tokenizer_sha256,
        "training": asdict(settings),
        "measured": measured,
    }
    try:
        sae.save(out, info)
    except (OSError, SafetensorError) as error:
        raise UserError(f"--out {out} cannot be written: {error}.") from None
    return measured


def _split(job: SAEJob, teacher: Teacher) -> tuple[TokenDataset, range, TokenDataset, range]:
    """Training windows and held-out windows, each as a data set and the positions to read from it."""
    train = _open_windows(job.data, teacher, job.seed)
    wanted = math.ceil(HELD_OUT_TOKENS / teacher.context)
    if job.valid:
        valid = _open_windows(job.valid, teacher, None)
        return train, range(train.num_windows), valid, range(min(wanted, valid.num_windows))
    # The first epoch's order is random, so its last windows are a sample of the data; training repeats the others.
    num_held_out = min(wanted, max(1, int(HELD_OUT_SHARE * train.num_windows)))
    cut = train.num_windows - num_held_out
    if cut == 0:
        raise UserError(
            f"--data {job.data} holds one window of {teacher.context} tokens: nothing is left to measure on."
        )
    return train, range(cut), train, range(cut, train.num_windows)


def _open_windows(path: str, teacher: Teacher, seed: int | None) -> TokenDataset:
    """Windows of the teacher's context, of ids that the teacher knows."""
    shards = TokenShards.open(path)
    if shards.vocab_size is not None and shards.vocab_size > teacher.vocab_size:
        raise UserError(f"{path} has a vocabulary of {shards.vocab_size}, but the teacher's is {teacher.vocab_size}.")
    return TokenDataset(shards, teacher.context, seed)


def _choose_settings(job: SAEJob, teacher: Teacher) -> SAETraining:
    """The training run, with everything that was not asked for said aloud."""
    num_tokens = job.steps * job.batch_rows
    settings = SAETraining(
        latents=job.latents,
        k=job.k,
        steps=job.steps,
        batch_rows=job.batch_rows,
        lr=default_lr(max(1, job.latents)) if job.lr is None else job.lr,
        warmup_steps=job.steps // 20,
        aux_k=default_aux_k(teacher.width),
        dead_after_tokens=max(1, min(DEAD_AFTER_TOKENS, num_tokens // 10)),
        seed=job.seed,
    )
    print(
        f"{settings.latents:,} latents, {settings.k} kept, on {job.location} of block {job.layer} "
        f"(width {teacher.width}), {num_tokens:,} tokens in windows of {teacher.context}\n"
        f"lr {settings.lr:.2g} after {settings.warmup_steps} steps; a latent is dead after "
        f"{settings.dead_after_tokens:,} silent tokens; {settings.aux_k} dead latents a token learn from the error",
        flush=True,
    )
    return settings


def _token_batches(dataset: TokenDataset, positions: Iterable[int], teacher: Teacher, device: str) -> Iterator[Tensor]:
    """Windows int64 [B, T] for one teacher forward at a time."""
    positions = iter(positions)
    while chunk := list(itertools.islice(positions, max(1, TOKENS_PER_FORWARD // dataset.context))):
        tokens_BT = torch.from_numpy(dataset.batch(chunk))
        # Foreign token files record no vocabulary; on a GPU a wrong id would end in an assertion without a name.
        if (largest := int(tokens_BT.max())) >= teacher.vocab_size:
            raise UserError(
                f"the data holds the id {largest}, but the teacher's vocabulary ends at {teacher.vocab_size - 1}."
            )
        yield tokens_BT.to(device)


def _train_with_log(rows: Iterator[Tensor], settings: SAETraining, path: Path) -> tuple[TopKSAE, dict[str, Any]]:
    """Train under a progress bar, a JSON line at `path` for each record; the last record comes back too."""
    last: dict[str, Any] = {}
    with open(path, "w") as file, tqdm(total=settings.steps, unit="step") as bar:

        def log(record: dict[str, Any]) -> None:
            last.update(record)
            file.write(json.dumps(record) + "\n")
            file.flush()
            bar.update(record["step"] - bar.n)
            bar.set_postfix_str(f"FVU {record['fvu']:.3f} L0 {record['l0']:.1f} dead {record['dead_fraction']:.1%}")

        sae = train_sae(rows, settings, log)
    return sae, last


@torch.no_grad()
def _teacher_losses(teacher: Teacher, sae: TopKSAE, batches: list[Tensor]) -> dict[str, float]:
    """Next-token loss of the teacher as it is, and with the residual replaced by its reconstruction and by zeros.

    `loss_recovered` is the share of what zeros destroy that the reconstruction keeps.
    """
    sums = dict.fromkeys(("loss", "loss_reconstructed", "loss_zeroed"), 0.0)
    for tokens_BT in batches:
        hidden = teacher.hidden(tokens_BT)
        for name, replace in zip(sums, (None, sae.reconstruct(hidden), torch.zeros_like(hidden)), strict=True):
            sums[name] += teacher.loss(tokens_BT, replace).item() * len(tokens_BT)
    num_windows = sum(map(len, batches))
    losses = {name: total / num_windows for name, total in sums.items()}
    destroyed = losses["loss_zeroed"] - losses["loss"]
    kept = losses["loss_zeroed"] - losses["loss_reconstructed"]
    return losses | {"loss_recovered": kept / destroyed if destroyed else math.nan}
