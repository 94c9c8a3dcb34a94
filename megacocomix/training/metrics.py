"""Metrics of a run: RUN/metrics.jsonl and the console, and optionally Weights & Biases and TensorBoard."""

import json
import math
import os
import resource
import sys
import uuid
from contextlib import suppress
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from tqdm import tqdm

from megacocomix.config.schema import Config
from megacocomix.errors import UserError

METRICS_FILE = "metrics.jsonl"


class MetricsLog:
    """Logs rank 0's metrics of a run, a JSON line for each record. Raises UserError if it cannot write them."""

    def __init__(self, run: Path, config: Config, first_step: int):
        self._file = _open_after_whole_lines(run / METRICS_FILE)
        self.console = Console(highlight=False, markup=False, soft_wrap=True)
        self._wandb = _start_wandb(run, config) if config.logging.wandb else None
        self._board = _start_tensorboard(run) if config.logging.tensorboard else None
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.console,
            disable=not sys.stdout.isatty(),
        )
        self._last_step = config.training.stop_after or config.training.steps
        self._task = self._progress.add_task(config.method.name, total=self._last_step, completed=first_step)
        self._progress.start()

    def advance(self, step: int) -> None:
        """Move the progress bar."""
        self._progress.update(self._task, completed=step)

    def train(self, record: dict, seconds_per_step: float) -> None:
        """Log a training record; the console line is short and includes the remaining time."""
        self._write(record)
        others = {"concept": "concept_loss", "hidden": "hidden_loss", "kd": "kd_loss"}
        others = "".join(f"{name} {record[key]:.3f}  " for name, key in others.items() if record[key] is not None)
        mfu = "" if record["mfu"] is None else f"MFU {record['mfu']:.1%}  "
        left = tqdm.format_interval(round((self._last_step - record["step"]) * seconds_per_step))
        self.print(
            f"step {record['step']:>6}/{self._last_step}  loss {record['loss']:.4f}  {others}lr {record['lr']:.2e}  "
            f"norm {record['grad_norm']:.2f}  {record['tokens_per_second']:,.0f} tok/s  "
            f"{record['flops_per_second'] / 1e9:,.1f} GFLOP/s  {mfu}{record['memory_gib']:.2f} GiB  {left} left"
        )

    def valid(self, record: dict) -> None:
        """Log a validation record."""
        self._write(record)
        self.print(
            f"step {record['step']:>6}/{self._last_step}  valid loss {record['valid_loss']:.4f}  "
            f"ppl {record['valid_ppl']:.2f}"
        )

    def print(self, line: str) -> None:
        """Print a line on the console, above the progress bar."""
        self.console.print(line)

    def close(self) -> None:
        """Flush and close everything."""
        self._progress.stop()
        self._file.close()
        if self._wandb:
            self._wandb.finish()
        if self._board:
            self._board.close()

    def _write(self, record: dict) -> None:
        try:
            self._file.write(json.dumps(numbers_only(record), allow_nan=False) + "\n")
            self._file.flush()
        except OSError as error:
            raise UserError(f"{self._file.name} cannot be written: {error.strerror}.") from None
        numbers = {key: value for key, value in record.items() if value is not None}
        if self._wandb:
            self._wandb.log(numbers, step=record["step"])
        if self._board:
            for key, value in numbers.items():
                self._board.add_scalar(key, value, record["step"])


def is_validated(run: Path, step: int) -> bool:
    """Whether a run's metrics hold the validation of a step."""
    file = run / METRICS_FILE
    for line in reversed(file.read_bytes().splitlines() if file.is_file() else []):
        with suppress(ValueError, AttributeError):  # a line that a crash truncated
            if (record := json.loads(line)).get("step") == step and "valid_loss" in record:
                return True
    return False


def _open_after_whole_lines(path: Path):
    """Open for appending, after removing an incomplete last line: the next record would be appended to it."""
    try:
        content = path.read_bytes() if path.exists() else b""
        file = open(path, "a")  # noqa: SIM115 (closed by MetricsLog.close)
        file.truncate(content.rfind(b"\n") + 1)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}.") from None
    return file


def numbers_only(record: dict) -> dict:
    """Replace infinity and NaN, which JSON does not have, by None."""
    return {key: value if value is None or math.isfinite(value) else None for key, value in record.items()}


def _start_wandb(run: Path, config: Config):
    import wandb

    # The id is stored in the run folder, so that a resumed run continues its Weights & Biases run.
    id_file = run / "wandb_id"
    if not id_file.exists():
        id_file.write_text(uuid.uuid4().hex[:8])
    has_key = bool(os.environ.get("WANDB_API_KEY")) or wandb.login(prompt=False)
    return wandb.init(
        project="megacocomix",
        name=run.name,
        id=id_file.read_text(),
        resume="allow",
        dir=run,
        mode=os.environ.get("WANDB_MODE") or ("online" if has_key else "offline"),
        config=config.model_dump(mode="json"),
    )


def _start_tensorboard(run: Path):
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(run / "tensorboard")


# Dense bf16 peak of one device in FLOP/s, from the manufacturers' data sheets.
PEAK_FLOPS = {
    "A100": 312e12,
    "H100 PCIe": 756e12,
    "H100 HBM3": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
}


def device_peak(device: torch.device, precision: str) -> float | None:
    """Peak bf16 FLOP/s of a device. None in fp32, and for a device that is not in the table: better no MFU than a wrong
    one."""
    if device.type != "cuda" or precision != "bf16":
        return None
    parts = torch.cuda.get_device_name(device).replace("-", " ").split()
    return next((peak for name, peak in PEAK_FLOPS.items() if set(name.split()) <= set(parts)), None)


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory of this process: GPU memory if there is a GPU, otherwise host memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
