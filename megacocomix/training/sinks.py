"""Optional copies of a run's metrics: Weights & Biases and TensorBoard. One that fails is reported once and replaced by
what still works. It never stops a run: RUN/metrics.jsonl holds everything."""

import math
import os
import threading
import uuid
from collections.abc import Callable
from functools import partial
from pathlib import Path

from megacocomix.config.schema import Config
from megacocomix.files import write_text

INIT_SECONDS, FINISH_SECONDS = 20.0, 30.0  # unless WANDB_INIT_TIMEOUT or WANDB_FINISH_TIMEOUT is set
WANDB_ID = "wandb_id"
MARGIN_SECONDS = 30.0  # for a library that does not keep its own limit


class Sinks:
    """The sinks that a config asks for. `report` gets a line when one fails."""

    def __init__(self, run: Path, config: Config, first_step: int, logged: list[dict], report: Callable[[str], None]):
        """`first_step` is the step after which the run goes on: what was logged of later steps is void. `logged` holds
        the records of earlier starts."""
        self._report, self._sinks = report, {}
        # The forms of each sink that are not started yet; the next one replaces one that fails.
        self._forms = {}
        if config.logging.wandb:
            # The id is stored in the run folder, so that a resumed run continues its Weights & Biases run. Without one,
            # none of the records of earlier starts was logged.
            file = run / WANDB_ID
            known = file.read_text().strip() if file.is_file() else ""
            start = partial(_Wandb, run, config, logged if known else [], known or uuid.uuid4().hex[:8])
            self._forms["Weights & Biases"] = [partial(start, online) for online in (True, False)]
        if config.logging.tensorboard:
            self._forms["TensorBoard"] = [partial(_TensorBoard, run, first_step)]
        for name in self._forms:
            self._attempt(name, lambda: None)

    def log(self, record: dict[str, float]) -> None:
        """Log a training or validation record in all sinks that work."""
        for name in list(self._sinks):
            self._attempt(name, lambda name=name: self._sinks[name].log(record))

    def close(self) -> None:
        """Flush and close all sinks, in bounded time."""
        for name, sink in list(self._sinks.items()):
            self._forms[name] = []
            self._attempt(name, sink.close)
        self._sinks = {}

    def _attempt(self, name: str, act: Callable[[], None]) -> None:
        """Start the sink if it is not, and act. On a failure, do the same with its next form, and report once."""
        problem = None
        while name in self._sinks or self._forms[name]:
            try:
                if name not in self._sinks:
                    self._sinks[name] = self._forms[name].pop(0)()
                act()
                break
            except Exception as error:  # whatever a library raises
                problem = problem or " ".join(str(error).split())[:200] or type(error).__name__
                self._sinks.pop(name, None)
        if problem:
            state = self._sinks[name].state if name in self._sinks else "it is off until the next start"
            self._report(f"warning: {name} failed: {problem.rstrip('.')}; {state}. Training is not affected.")


class _Wandb:
    def __init__(self, run: Path, config: Config, logged: list[dict], run_id: str, is_online: bool):
        import wandb

        has_key = is_online and (bool(os.environ.get("WANDB_API_KEY")) or wandb.login(prompt=False, verify=False))
        if not is_online:
            _bounded(wandb.teardown, MARGIN_SECONDS)  # of the run that failed, which would keep its id
        # With a key, the user's own settings count: WANDB_MODE, and what `wandb offline` has written.
        mode = None if has_key or (is_online and os.environ.get("WANDB_MODE")) else "offline"
        limits = {"init_timeout": INIT_SECONDS, "finish_timeout": FINISH_SECONDS, "finish_timeout_raises": True}
        limits = {name: value for name, value in limits.items() if f"WANDB_{name.upper()}" not in os.environ}
        self._run = wandb.init(
            project="megacocomix",
            name=run.name,
            id=run_id,
            resume="allow",
            dir=run,
            mode=mode,
            config=config.model_dump(mode="json"),
            settings=wandb.Settings(**limits),
        )
        if not self._run.disabled:
            write_text(run / WANDB_ID, run_id)
        self.state = f"it goes on offline, wandb sync {run}/wandb/offline-run-* uploads that"
        # A history cannot go back (rewinding is no part of the general service), so what it holds of the steps that are
        # repeated stays, and is not logged again. An offline start does not know what the earlier ones hold.
        self._held_before = self._run.starting_step if not self._run.offline else math.inf
        self._held = {_kind(record) for record in logged}

    def log(self, record: dict[str, float]) -> None:
        step = record["step"]
        if step < self._held_before and _kind(record) in self._held:
            return
        # A run that was killed before its last validation: the history has passed that step, and would ignore it.
        self._run.log(record, step=max(step, self._run.starting_step))

    def close(self) -> None:
        seconds = float(os.environ.get("WANDB_FINISH_TIMEOUT") or FINISH_SECONDS)
        _bounded(self._run.finish, seconds + MARGIN_SECONDS if seconds else None)  # 0: as long as it takes


def _kind(record: dict) -> tuple:
    """What a record is of: its step, and whether it is a validation."""
    return record.get("step"), "valid_loss" in record


class _TensorBoard:
    def __init__(self, run: Path, first_step: int):
        from torch.utils.tensorboard import SummaryWriter

        threading.excepthook = partial(_except_in_tensorboard, threading.excepthook)
        # What earlier starts wrote of the steps that are repeated is void.
        self._board = SummaryWriter(run / "tensorboard", purge_step=first_step + 1)
        self.state = ""

    def log(self, record: dict[str, float]) -> None:
        for key, value in record.items():
            self._board.add_scalar(key, value, record["step"])

    def close(self) -> None:
        _bounded(self._board.close, MARGIN_SECONDS)


def _except_in_tensorboard(otherwise: Callable, error: threading.ExceptHookArgs) -> None:
    """A full disk ends the writer's thread. Instead of its traceback, the error is raised where a value is logged."""
    if not type(error.thread).__module__.startswith("tensorboard."):
        otherwise(error)


def _bounded(act: Callable[[], None], seconds: float | None) -> None:
    """Act in a thread, whose error is raised. Raises TimeoutError if it takes longer, and leaves it alone."""
    errors = []

    def run() -> None:
        try:
            act()
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise TimeoutError(f"it did not end within {seconds:g} s")
    if errors:
        raise errors[0]
