"""Train an autoencoder on a teacher: open teacher and token shards, train, measure on held-out windows, and save.

Beside FILE there are FILE.jsonl, a line every few steps, and until FILE exists FILE.resume, from which the same command
resumes.
"""

import json
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from megacocomix.checkpoint.open import architecture_sha256
from megacocomix.config.schema import Location
from megacocomix.data.check import check_tokens
from megacocomix.data.tokens import TokenDataset, TokenShards, check_token_ids
from megacocomix.errors import UserError
from megacocomix.files import check_absent, write_aside, write_text
from megacocomix.hub import is_hub_name, local_folder
from megacocomix.sae.file import save_sae, writing_out
from megacocomix.sae.measure import measure_sae
from megacocomix.sae.model import SAE
from megacocomix.sae.train import SAETrainer, SAETraining, all_reduce, default_aux_k, default_lr, shuffled_batches
from megacocomix.signals import StopSignal
from megacocomix.teacher.load import load_teacher, teacher_tokenizer
from megacocomix.teacher.model import Teacher

TOKENS_PER_FORWARD = 4096
# Tokens to measure on: enough that a latent in use is seldom called dead by chance.
HELD_OUT_TOKENS = 2**17
# Without --valid, this share of the windows is held out of training.
HELD_OUT_SHARE = 0.05
# The 10 M tokens of Gao et al. A shorter run declares latents dead sooner.
DEAD_AFTER_TOKENS = 10_000_000
LOG_EVERY = 10
MOST_BATCH_ROWS = 2**24


@dataclass(frozen=True)
class SAEJob:
    """The options of `tools/train_sae.py`; its --help explains them."""

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
    save_every: int
    resample_every: int | None
    data_dtype: str | None = None

    @property
    def log(self) -> Path:
        """FILE.jsonl."""
        return Path(f"{self.out}.jsonl")

    @property
    def resume(self) -> Path:
        """FILE.resume."""
        return Path(f"{self.out}.resume")


class SAERun:
    """One process's part of a job, alone or as one of `world` ranks. Create it, call `train`, then `finish` on rank 0.

    Creation loads FILE.resume if it exists, and raises UserError for a mismatch of the inputs and for an existing FILE,
    which is never overwritten. No rank may begin to train before all have been created.
    """

    def __init__(self, job: SAEJob, device: torch.device, rank: int = 0, world: int = 1):
        self.job, self.device, self.rank, self.world = job, device, rank, world
        check_absent(job.out)
        if job.batch_rows % world:
            nearest = max(1, round(job.batch_rows / world)) * world
            raise UserError(
                f"--batch-rows {job.batch_rows} cannot be shared by {world} processes. Nearest valid: {nearest}."
            )
        if job.save_every < 1:
            raise UserError(f"--save-every {job.save_every} must be at least 1.")
        local_folder(job.teacher, download=True)  # of several ranks one downloads, the others wait
        if rank == 0 and job.log.exists() and not job.resume.exists():
            print(f"{job.log} is of a run without {job.resume}: training starts again", flush=True)
        self.teacher = load_teacher(job.teacher, job.layer, job.location, device)
        self.train_windows, self.positions, self.valid_windows, self.valid_positions = _split(
            job, self.teacher, rank == 0
        )
        settings = _choose_settings(job, self.teacher)
        if rank == 0:
            _print_settings(job, self.teacher, settings)
            with writing_out(job.out):
                Path(job.out).parent.mkdir(parents=True, exist_ok=True)
        if job.batch_rows > MOST_BATCH_ROWS:
            raise UserError(
                f"--batch-rows {job.batch_rows} is more than a batch can be. Nearest valid: {MOST_BATCH_ROWS}."
            )
        try:
            self.trainer = SAETrainer(settings, self.teacher.width, device)
        except (RuntimeError, MemoryError):
            raise UserError(f"--latents {job.latents} of width {self.teacher.width} do not fit into memory.") from None
        self.identity = {
            **asdict(settings),
            "teacher": self.teacher.sha256,
            "teacher's config": architecture_sha256(local_folder(job.teacher)),
            "layer": job.layer,
            "location": job.location,
            "data": self.train_windows.shards.fingerprint,
            "valid": self.valid_windows.shards.fingerprint,
            "processes": world,
        }
        if job.resume.exists():
            former = {"data": self.train_windows.shards, "valid": self.valid_windows.shards}
            former = {key: shards.former_fingerprint for key, shards in former.items()}
            self.trainer.load_state(_read_resume(job.resume, self.identity, former))

    def train(self) -> bool:
        """Train until the last step, or until a signal to any rank. Returns whether the last step was reached."""
        steps = self.trainer.settings.steps
        if all_reduce(torch.tensor(self.trainer.num_steps)) != self.world * self.trainer.num_steps:
            raise UserError(
                f"{self.job.resume} is not visible to all processes: put --out on a file system that all share."
            )
        if self.rank == 0 and self.job.log.exists():
            _drop_lines_after(self.job.log, self.trainer.num_steps)
        try:
            with (
                StopSignal() as stop,
                open(self.job.log if self.rank == 0 else os.devnull, "a") as log,
                tqdm(total=steps, initial=self.trainer.num_steps, unit="step", disable=self.rank > 0) as bar,
            ):
                rows = self._rows()
                while self.trainer.num_steps < steps:
                    rows_ND, problem = _next(rows)
                    num_stopped, num_bad = all_reduce(torch.tensor([bool(stop), problem is not None]).int()).tolist()
                    if num_bad:
                        raise problem or UserError()  # the failing rank reports the problem; the others exit quietly
                    if num_stopped:
                        if self.rank == 0 and self.trainer.num_steps and not self._save():
                            raise UserError(f"{self.job.resume} could not be written: later steps are lost.")
                        return False
                    if self.trainer.num_steps == 0:
                        self.trainer.begin(rows_ND)
                    record = self.trainer.step(rows_ND)
                    step, is_last = record["step"], record["step"] == steps
                    if step % LOG_EVERY == 0 or is_last:
                        _log(record, log, bar)
                    if (step % self.job.save_every == 0 or is_last) and self.rank == 0:
                        self._save()
                return True
        except OSError as error:
            raise UserError(f"{self.job.log} cannot be written ({error.strerror or error}): free some space.") from None

    def finish(self) -> dict[str, float]:
        """Measure on held-out windows, write FILE, and return the measurements. Call it on rank 0 only. Raises
        UserError if FILE cannot be written; the same command then only measures again."""
        job, teacher, settings = self.job, self.teacher, self.trainer.settings
        held_out = list(_token_batches(self.valid_windows, self.valid_positions, teacher, self.device))
        print(f"measuring on {sum(map(torch.Tensor.numel, held_out)):,} held-out tokens", flush=True)
        sae = self.trainer.sae.requires_grad_(False)
        report = measure_sae(sae, (teacher.hidden(tokens).flatten(0, 1) for tokens in held_out))
        measured = asdict(report) | {
            "dead_fraction_training": len(self.trainer.dead()) / settings.latents,
            "dead_after_tokens": settings.dead_after_tokens,
            **_teacher_losses(teacher, sae, held_out),
        }
        info = {
            "teacher": Path(job.teacher).resolve().name,
            "revision": local_folder(job.teacher).name if is_hub_name(job.teacher) else None,
            "teacher_sha256": teacher.sha256,
            "sae_layer": job.layer,
            "location": job.location,
            "context": teacher.context,
            "tokenizer_sha256": self.train_windows.shards.tokenizer_sha256,
            "training": asdict(settings) | {"processes": self.world},
            "measured": measured,
        }
        with writing_out(job.out):
            save_sae(sae, job.out, info)
        job.resume.unlink(missing_ok=True)
        return measured

    def _rows(self) -> Iterator[Tensor]:
        """This rank's part of each batch, beginning with the next step."""
        settings = self.trainer.settings
        num_rows = settings.batch_rows // self.world

        def read_block(block: int) -> Tensor:
            """Windows are assigned in order to block 0 of rank 0, block 0 of rank 1, …, block 1 of rank 0, …."""
            num_windows = math.ceil(settings.block_batches * num_rows / self.teacher.context)
            first = (block * self.world + self.rank) * num_windows
            positions = (self.positions[i % len(self.positions)] for i in range(first, first + num_windows))
            batches = _token_batches(self.train_windows, positions, self.teacher, self.device)
            rows_ND = torch.cat([self.teacher.hidden(tokens).flatten(0, 1).float() for tokens in batches])
            return rows_ND[: settings.block_batches * num_rows]

        seed = settings.seed * self.world + self.rank
        return shuffled_batches(read_block, num_rows, settings.block_batches, seed, self.trainer.num_steps)

    def _save(self) -> bool:
        """Write FILE.resume. Returns whether that worked: a full disk must not end the run."""
        path = self.job.resume
        try:
            with write_aside(path) as aside:
                save_file(self.trainer.state(), aside, metadata={"identity": json.dumps(self.identity)})
        except (OSError, SafetensorError) as error:
            print(f"warning: {path} could not be written ({error})", flush=True)
            return False
        return True


def _split(job: SAEJob, teacher: Teacher, is_main: bool) -> tuple[TokenDataset, range, TokenDataset, range]:
    """Training windows and held-out windows, each as a dataset and the positions to read from it."""
    train = _open_windows(job.data, job, teacher, job.seed, is_main)
    wanted = math.ceil(HELD_OUT_TOKENS / teacher.context)
    if job.valid:
        valid = _open_windows(job.valid, job, teacher, None, is_main)
        return train, range(train.num_windows), valid, range(min(wanted, valid.num_windows))
    # The first epoch's order is random, so its last windows are a sample of the data. Training repeats the others.
    num_held_out = min(wanted, max(1, int(HELD_OUT_SHARE * train.num_windows)))
    num_train = train.num_windows - num_held_out
    if num_train == 0:
        raise UserError(f"--data {job.data} holds one window of {teacher.context} tokens: none is left to measure on.")
    return train, range(num_train), train, range(num_train, train.num_windows)


def _open_windows(path: str, job: SAEJob, teacher: Teacher, seed: int | None, is_main: bool) -> TokenDataset:
    shards = TokenShards.open(path, job.data_dtype, verify=is_main)
    check_tokens(path, shards, teacher.vocab_size, (f"--teacher {job.teacher}", teacher_tokenizer(job.teacher)))
    return TokenDataset(shards, teacher.context, seed)


def _choose_settings(job: SAEJob, teacher: Teacher) -> SAETraining:
    num_tokens = job.steps * job.batch_rows
    return SAETraining(
        latents=job.latents,
        k=job.k,
        steps=job.steps,
        batch_rows=job.batch_rows,
        lr=default_lr(max(1, job.latents)) if job.lr is None else job.lr,
        warmup_steps=job.steps // 20,
        aux_k=default_aux_k(teacher.width),
        dead_after_tokens=max(1, min(DEAD_AFTER_TOKENS, num_tokens // 10)),
        resample_every=max(1, job.steps // 5) if job.resample_every is None else job.resample_every,
        seed=job.seed,
    )


def _print_settings(job: SAEJob, teacher: Teacher, settings: SAETraining) -> None:
    """Print the settings, also those that no option sets."""
    resampled = f"reset every {settings.resample_every} steps" if settings.resample_every else "never reset"
    print(
        f"{settings.latents:,} latents, {settings.k} kept, on {job.location} of block {job.layer} "
        f"(width {teacher.width}), {settings.steps * settings.batch_rows:,} tokens in windows of {teacher.context}\n"
        f"lr {settings.lr:.2g} after {settings.warmup_steps} steps; a latent is dead after "
        f"{settings.dead_after_tokens:,} tokens without activity; for each token, {settings.aux_k} dead latents are "
        f"trained on the error; dead latents are {resampled}",
        flush=True,
    )


def _token_batches(
    dataset: TokenDataset, positions: Iterable[int], teacher: Teacher, device: torch.device
) -> Iterator[Tensor]:
    """Windows int64 [B, T], as many as one forward pass of the teacher reads."""
    positions = iter(positions)
    while chunk := list(islice(positions, max(1, TOKENS_PER_FORWARD // dataset.context))):
        tokens = dataset.batch(chunk)
        check_token_ids(tokens, teacher.vocab_size, "the data")
        yield torch.from_numpy(tokens).to(device)


def _next(rows: Iterator[Tensor]) -> tuple[Tensor | None, UserError | None]:
    """The next rows, or the error that prevents them: the other ranks must learn of it before this one exits."""
    try:
        return next(rows), None
    except UserError as error:
        return None, error


def _log(record: dict[str, Any], log: TextIO, bar: tqdm) -> None:
    record = {key: value.item() if torch.is_tensor(value) else value for key, value in record.items()}
    log.write(json.dumps(record) + "\n")
    log.flush()
    bar.update(record["step"] - bar.n)
    bar.set_postfix_str(f"FVU {record['fvu']:.3f} L0 {record['l0']:.1f} dead {record['dead_fraction']:.1%}")


def _drop_lines_after(log: Path, num_steps: int) -> None:
    """Remove the lines of steps that will be repeated."""
    lines = log.read_text().splitlines()
    kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= num_steps]
    write_text(log, "".join(f"{line}\n" for line in kept))


def _read_resume(path: Path, identity: dict, former: dict[str, str]) -> dict[str, Tensor]:
    try:
        with safe_open(path, "pt") as file:
            saved = json.loads(file.metadata()["identity"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}): delete it to begin again.") from None
    changed = [
        f"{key} {saved[key]} there, {identity[key]} here"
        for key in identity
        if saved.get(key, identity[key]) not in (identity[key], former.get(key))  # as earlier versions recorded it
    ]
    if changed:
        raise UserError(
            f"{path} was begun with other settings ({'; '.join(changed)}): use the same, or delete it to begin again."
        )
    return tensors


@torch.no_grad()
def _teacher_losses(teacher: Teacher, sae: SAE, batches: list[Tensor]) -> dict[str, float]:
    """Next-token loss of the unchanged teacher, and with the residual replaced by its reconstruction and by zeros.

    `loss_recovered` is 1 if the reconstruction costs no loss, and 0 if it costs as much as zeros.
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


PANELS = (
    ("fvu", "variance unexplained"),
    ("l0", "active latents a token (L0)"),
    ("dead_fraction", "dead latents"),
)


def plot_sae_training(log: Path, out: Path) -> None:
    """Draw FILE.jsonl of tools/train_sae.py as a PNG of three panels. Draws nothing if there are no records."""
    records = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    if not records:
        return
    tokens = [record["tokens"] for record in records]
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    for index, (panel, (key, label)) in enumerate(zip(figure.subplots(1, 3), PANELS, strict=True)):
        values = [record[key] for record in records]
        panel.plot(tokens, values, color=f"C{index}", linewidth=1.8, marker="o" if len(values) < 3 else None)
        panel.set_title(f"{label}: {values[-1]:.3g} at the end", fontsize=12, loc="left")
        panel.set_xlabel("training tokens", fontsize=12)
        panel.xaxis.set_major_formatter(EngFormatter())
        panel.tick_params(labelsize=11)
        panel.set_ylim(bottom=0)
        panel.grid(color="0.9", linewidth=0.8)
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(out, dpi=120)
