"""Metrics of a run: RUN/metrics.jsonl and the console; sinks.py holds the optional copies."""

import json
import logging
import math
import resource
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from tqdm import tqdm

from megacocomix.config.schema import Config
from megacocomix.errors import UserError
from megacocomix.training.sinks import Sinks

log = logging.getLogger(__name__)
METRICS_FILE = "metrics.jsonl"


class MetricsLog:
    """Logs rank 0's metrics of a run, a JSON line for each record. Raises UserError if it cannot write them."""

    def __init__(self, run: Path, config: Config, first_step: int):
        self._file = _open_after_whole_lines(run / METRICS_FILE)
        logged = list(_records(run))
        self.console = Console(highlight=False, markup=False, soft_wrap=True)
        self._sinks = Sinks(run, config, first_step, logged, self._warn)
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
        self._sinks.close()

    def _warn(self, line: str) -> None:
        log.info(line)
        self.print(line)

    def _write(self, record: dict) -> None:
        try:
            self._file.write(json.dumps(numbers_only(record), allow_nan=False) + "\n")
            self._file.flush()
        except OSError as error:
            raise UserError(f"{self._file.name} cannot be written: {error.strerror}.") from None
        self._sinks.log({key: value for key, value in record.items() if value is not None})


def is_validated(run: Path, step: int) -> bool:
    """Whether a run's metrics end with the validation of a step. An earlier one is void: the run went back and trained
    that step again."""
    last = next(reversed(list(_records(run))), {})
    return last.get("step") == step and "valid_loss" in last


def _records(run: Path) -> Iterator[dict]:
    """The records of a run's metrics, without lines that a crash truncated."""
    file = run / METRICS_FILE
    for line in file.read_bytes().splitlines() if file.is_file() else []:
        with suppress(ValueError, TypeError):
            yield dict(json.loads(line))


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
