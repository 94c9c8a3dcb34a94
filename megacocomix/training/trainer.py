"""The training loop, top to bottom: open → (resume) → step, poll, log, save, validate, step … → finish.

A poll is read one step later, except where its step is logged, saved or validated."""

import logging
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megacocomix.checkpoint.format import latest_checkpoint, list_checkpoints, read_checkpoint_manifest
from megacocomix.checkpoint.init_from import describe_init, first_value
from megacocomix.checkpoint.store import StoredTensors, TrainingState, load_checkpoint
from megacocomix.checkpoint.writer import CheckpointWriter
from megacocomix.config.cost import cheaper_layout
from megacocomix.config.load import dump_config
from megacocomix.config.rules import check_config, layout_warnings
from megacocomix.config.schema import Config
from megacocomix.errors import EXIT_FAILED, EXIT_FINISHED, EXIT_REQUEUE, UserError
from megacocomix.evaluation.harness import tasks_left
from megacocomix.evaluation.perplexity import perplexity, validation_batches
from megacocomix.hub import local_folder
from megacocomix.model.flops import student_flops
from megacocomix.parallel.grid import Grid
from megacocomix.parallel.pipeline import Pipeline
from megacocomix.parallel.runtime import Runtime, errors_on_all_ranks, seed_step
from megacocomix.parallel.stage import NUM_LOSSES, MicroBatch, StageModule, hidden_shape
from megacocomix.parallel.zero import Engine
from megacocomix.signals import StopSignal
from megacocomix.teacher.targets import describe_targets
from megacocomix.training.batches import StepBatches
from megacocomix.training.inputs import Inputs, open_inputs, verify_data
from megacocomix.training.metrics import MetricsLog, device_peak, is_validated, peak_memory_gib
from megacocomix.training.optimizer import build_optimizer, learning_rate, set_learning_rate
from megacocomix.training.run_folder import (
    check_all_ranks_share,
    check_run_folder,
    code_version,
    log_to_file,
    write_run_folder,
)
from megacocomix.training.tasks import score_tasks

log = logging.getLogger(__name__)

Event = Literal["step", "gradients", "validate", "validated"]
OnEvent = Callable[[Event, "Trainer"], None]
"""Called on every rank: when a step begins, when its gradients are summed but not yet clipped, and before and after a
validation. It is for tests and experiments. It may read and change everything, at the caller's own risk."""


def train(config: Config, runtime: Runtime, on_event: OnEvent = lambda event, trainer: None) -> int:
    """Train a config to its end, from its newest checkpoint if there is one. Returns an exit code. Raises UserError, on
    all ranks at once. `training.deterministic` must be in effect already (set_determinism)."""
    with errors_on_all_ranks():
        check_config(config, runtime.world)
        run = check_run_folder(config)
    if runtime.world > 1:
        check_all_ranks_share(run, runtime)
    with errors_on_all_ranks():
        if config.method.has_teacher and runtime.is_main:  # the other ranks wait for the download
            local_folder(config.teacher.model, download=True)
    verify_data(config, runtime.is_main)
    with errors_on_all_ranks():
        inputs = open_inputs(config, runtime.device)
    with errors_on_all_ranks():
        # Only now, because every rank has compared the folder's config, which this overwrites.
        device = torch.cuda.get_device_name() if runtime.device.type == "cuda" else "cpu"
        lock = write_run_folder(config, run, {"world": runtime.world, "device": device}) if runtime.is_main else None
    with errors_on_all_ranks():
        log_to_file(run, runtime.rank)
    with errors_on_all_ranks():
        trainer = Trainer(config, runtime, run, inputs, on_event)
    with trainer.stop_signal:
        try:
            return trainer.fit()
        finally:
            trainer.close()
            if lock:
                lock.close()


class Shared(NamedTuple):
    """The values that all ranks share after a step."""

    losses: list[float]
    """Means over the global batch: next token, prediction, distillation."""
    stopped: bool
    """A rank received a signal."""
    has_error: bool
    """A rank found an error in its data."""
    is_writing: bool
    """A rank is still writing the current checkpoint."""


class Poll(NamedTuple):
    """What a rank shares after a step, on its way to the others."""

    step: int
    gradient_norm: float
    """The same on all ranks."""
    error: UserError | None
    """In the data that this rank read."""
    total: Tensor
    """Losses and flags; summed over the ranks when `work` is done."""
    work: dist.Work


def _wait(poll: Poll) -> Shared:
    poll.work.wait()
    losses, flags = poll.total[:NUM_LOSSES], poll.total[NUM_LOSSES:]
    return Shared(losses.tolist(), *map(bool, flags.tolist()))


class Trainer:
    """One run in one process; all processes of a job do the same steps."""

    def __init__(self, config: Config, runtime: Runtime, run: Path, inputs: Inputs, on_event: OnEvent):
        self.config, self.runtime, self.run, self.inputs = config, runtime, run, inputs
        self.on_event = lambda event: on_event(event, self)
        self.grid = Grid(runtime, config.parallel.tensor, config.parallel.pipeline)
        self.stages = StageModule(config, self.grid, inputs.targets.head if inputs.targets else None)
        dtype = torch.bfloat16 if config.training.precision == "bf16" else torch.float32
        self.pipeline = Pipeline(self.grid, self.stages.num_stages, partial(hidden_shape, config), dtype)
        self.engine, self.state = self._build_engine()
        metadata = {"config": config.model_dump(mode="json"), "code": code_version(), "inputs": inputs.identity()}
        self.writer = CheckpointWriter(run, self.engine, metadata, config.checkpoint)
        self.metrics = MetricsLog(run, config, self.state.step) if runtime.is_main else None
        self.last_step = config.training.stop_after or config.training.steps
        self.batches = StepBatches(config, self.grid, inputs, self.last_step)
        self.tokens_per_step = config.training.global_batch * config.model.context
        self.student_flops = student_flops(config)
        self.teacher_flops = inputs.targets.flops if inputs.targets else 0.0
        self.stop_signal, self.tasks_failed = StopSignal(), False

    def fit(self) -> int:
        """Train to the last step. Returns an exit code. Raises UserError."""
        self._announce()
        try:
            return self._train()
        except UserError:  # raised on all ranks, so they can still complete a checkpoint that was begun
            self._complete_save()
            raise

    def _train(self) -> int:
        state, config = self.state, self.config
        self._start_clock()
        if state.step == self.last_step:
            return self._finish_killed_run()
        unread = None
        while state.step < self.last_step:
            losses, error = self._step()
            stopped = False
            if unread:  # the poll of the step before
                shared = self._read(unread)
                if shared is None:
                    return EXIT_FAILED
                stopped = shared.stopped
            unread = self._poll(losses, error)
            is_last = state.step == self.last_step
            scores = bool(config.evaluation.tasks) and (is_last or self._is_due(config.evaluation.tasks_every))
            logs = is_last or self._is_due(config.logging.every)
            saves = is_last or self._is_due(config.checkpoint.every) or scores
            validates = is_last or self._is_due(config.evaluation.every)
            if not (logs or saves or validates or stopped) and math.isfinite(self.engine.gradient_norm()):
                continue
            shared, unread = self._read(unread), None
            if shared is None:
                return EXIT_FAILED
            stopped = shared.stopped
            if logs:
                self._log_step(shared.losses)
            # Save before validating, which may take longer than the grace period after a signal.
            if saves or stopped:
                self._save(must_succeed=is_last or stopped or scores)
            if validates and not self._validate():
                return EXIT_FAILED
            if scores and not stopped:
                stopped = self._score_tasks()
            if stopped and (scores or not is_last):
                self._print(f"stopped on a signal after step {state.step}: saved, start the same command again")
                return EXIT_REQUEUE
        return EXIT_FAILED if self.tasks_failed else EXIT_FINISHED

    def _finish_killed_run(self) -> int:
        """For a run whose last step is saved: run the validation and the tasks that are missing because it was killed.
        Returns an exit code."""
        missing = [False, False]
        if self.runtime.is_main:
            tasks = self.config.evaluation
            left = tasks.tasks and tasks_left(self._checkpoint(), tasks.tasks, tasks.tasks_data, tasks.tasks_limit)
            missing = [not is_validated(self.run, self.state.step), bool(left)]
        dist.broadcast_object_list(missing, src=0)
        validates, scores = missing
        if validates and not self._validate():
            return EXIT_FAILED
        if scores and self._score_tasks():
            return EXIT_REQUEUE
        return EXIT_FAILED if self.tasks_failed else EXIT_FINISHED

    def _checkpoint(self) -> Path:
        return self.run / "checkpoints" / f"step-{self.state.step:08d}"

    def _is_due(self, every: int | None) -> bool:
        return every is not None and self.state.step % every == 0

    def close(self) -> None:
        """Close the logs."""
        if self.metrics:
            self.metrics.close()

    def _build_engine(self) -> tuple[Engine, TrainingState]:
        """The engine and the training state, from the newest checkpoint if there is one, otherwise initial ones."""
        config, shapes = self.config, self.stages.whole_shapes
        optimizer = partial(build_optimizer, config=config.optimizer)
        build = lambda read: Engine(
            self.stages, read, optimizer, config, self.grid, partial(self.on_event, "gradients")
        )
        checkpoint = self._choose_checkpoint()
        if checkpoint is None:
            return build(lambda name: first_value(name, shapes[name], config, self.inputs.init)), TrainingState()
        with errors_on_all_ranks():
            stored = StoredTensors(checkpoint)
            stored.check(shapes)
        with stored:
            engine = build(stored.unread)
            return engine, load_checkpoint(stored, engine)

    def _choose_checkpoint(self) -> Path | None:
        """The newest sound checkpoint; damaged ones are skipped with a warning. Only rank 0 looks, because a shared
        file system may show the others an older state, and one reader is enough to verify all hashes."""
        chosen = [None, None]
        with errors_on_all_ranks():
            if self.runtime.is_main and list_checkpoints(self.run):
                checkpoint = latest_checkpoint(self.run)
                chosen = [checkpoint, read_checkpoint_manifest(checkpoint)["inputs"]]
        dist.broadcast_object_list(chosen, src=0)
        checkpoint, stored = chosen
        with errors_on_all_ranks():
            if changed := self.inputs.changed(stored or {}):
                raise UserError(
                    f"the content of {' and '.join(changed)} has changed since run {self.run} was started. "
                    "Restore it, or choose another folder with run=PATH."
                )
        return checkpoint

    def _step(self) -> tuple[Tensor, UserError | None]:
        """One optimizer step. Returns this rank's summands of the global mean losses, fp64 on the CPU, and an error in
        the data that it read."""
        config, state = self.config, self.state
        self.on_event("step")
        seed_step(config.training.seed, state.step, self.runtime.rank)
        batches, error = self.batches.take(state.step)
        set_learning_rate(self.engine.optimizer, self._learning_rate(state.step))
        self.engine.train()
        self.engine.begin_step()
        losses = self.pipeline.train(self._forward, self.engine.before_backward, batches)
        # Queued before the update, and complete when engine.step() has read the gradient norm.
        losses = losses.to("cpu", non_blocking=True)
        self.engine.step()
        state.step += 1
        state.tokens += self.tokens_per_step
        state.flops += self.tokens_per_step * self.student_flops
        state.teacher_flops += self.tokens_per_step * self.teacher_flops
        if self.metrics:
            self.metrics.advance(state.step)
        return losses, error

    def _forward(self, *inputs):
        """A forward pass of the student; the teacher's next kernels are queued before it, to run beside it."""
        self.batches.prefetch()
        return self.engine(*inputs)

    def _poll(self, losses: Tensor | None = None, error: UserError | None = None) -> Poll:
        """Begin to share losses and flags between all ranks, in the only collective of a step besides those of the
        training. All ranks get the same result, so that none leaves the loop alone while the others wait for it."""
        losses = torch.zeros(NUM_LOSSES, dtype=torch.float64) if losses is None else losses
        flags = torch.tensor([bool(self.stop_signal), error is not None, self.writer.is_writing], dtype=torch.float64)
        total = torch.cat((losses, flags))
        work = dist.all_reduce(total, async_op=True)
        return Poll(self.state.step, self.engine.gradient_norm(), error, total, work)

    def _read(self, poll: Poll) -> Shared | None:
        """What all ranks shared after a step, or None, with a message, if its loss or gradient is not finite. Completes
        a checkpoint that all ranks have written. Raises UserError, on all ranks, for an error in the step's data."""
        shared = _wait(poll)
        if not shared.is_writing:
            self._complete_save()
        if shared.has_error:
            with errors_on_all_ranks():
                if poll.error:
                    raise poll.error
        if all(map(math.isfinite, (*shared.losses, poll.gradient_norm))):
            return shared
        self._complete_save()
        self._print(f"error: loss or gradient is not finite at step {poll.step}; this step is not saved")
        return None

    def _learning_rate(self, step: int) -> float:
        return learning_rate(step, self.config.optimizer, self.config.training.steps)

    def _log_step(self, losses: list[float]) -> None:
        state, method, (loss, predicted_loss, kd_loss) = self.state, self.config.method, losses
        self._pause_clock()
        steps, seconds = state.step - self.logged.step, state.seconds - self.logged.seconds
        self.logged = TrainingState(step=state.step, seconds=state.seconds)
        tokens_per_second = steps * self.tokens_per_step / seconds
        peak = device_peak(self.runtime.device, self.config.training.precision)
        flops_per_second = tokens_per_second * self.student_flops
        record = self._progress_record() | {
            "loss": loss,
            "concept_loss": predicted_loss if method.learns_concepts else None,
            "hidden_loss": predicted_loss if method.learns_hidden else None,
            "kd_loss": kd_loss if method.distills else None,
            "lr": self._learning_rate(state.step - 1),
            "grad_norm": self.engine.gradient_norm(),
            "tokens_per_second": tokens_per_second,
            "flops_per_second": flops_per_second,
            "mfu": flops_per_second / (peak * self.runtime.world) if peak else None,
            "memory_gib": peak_memory_gib(self.runtime.device),
        }
        self._write(lambda metrics: metrics.train(record, seconds / steps))
        self._start_clock()

    def _validate(self) -> bool:
        """Validate. Returns whether the loss is finite; if it is not, prints an error."""
        self.on_event("validate")
        self._pause_clock()
        config, grid = self.config, self.grid
        batch, dataset = config.training.micro_batch, self.inputs.valid
        num_sequences = min(config.evaluation.batches * config.training.global_batch, dataset.num_windows)
        self.engine.train(False)
        pairs = validation_batches(dataset, num_sequences, batch, grid.data_rank, grid.data)
        batches = (MicroBatch(*(each.to(self.runtime.device) for each in pair)) for pair in pairs)
        total = self.pipeline.evaluate(self.engine, batches)[0]
        dist.all_reduce(total)
        loss = (total / (num_sequences * (config.model.context - 1))).item()
        record = self._progress_record() | {"valid_loss": loss, "valid_ppl": perplexity(loss)}
        self._write(lambda metrics: metrics.valid(record))
        self._start_clock()
        self.on_event("validated")
        if not math.isfinite(loss):
            self._complete_save()
            self._print(f"error: validation loss is not finite after step {self.state.step}: lower optimizer.lr")
        return math.isfinite(loss)

    def _score_tasks(self) -> bool:
        """Score the tasks on this step's checkpoint. Returns whether a signal arrived meanwhile."""
        self._pause_clock()
        if self.runtime.device.type == "cuda":
            torch.cuda.empty_cache()  # leaves memory for the process that scores
        stopped, failure = score_tasks(
            self._checkpoint(),
            self.config.evaluation,
            self.run / "logs" / "tasks.log",
            self.runtime.is_main,
            lambda: _wait(self._poll()).stopped,
        )
        self.tasks_failed = failure is not None  # after the last step, this decides the exit code
        if failure:
            self._print(f"warning: {failure}")
        self._start_clock()
        return stopped

    def _save(self, must_succeed: bool) -> None:
        """Begin a checkpoint of this step; with `must_succeed` also complete it, or raise UserError on all ranks."""
        self._pause_clock()
        self._complete_save()
        self.writer.begin(self.state)
        if must_succeed and (failures := self._complete_save()):
            raise UserError(
                *failures, "Earlier checkpoints are untouched; remove the cause and start the same command again."
            )
        self._start_clock()

    def _complete_save(self) -> list[str]:
        """Complete the pending checkpoint, if there is one. Returns its failures; training can go on."""
        if not self.writer.is_pending:
            return []
        failures = self.writer.complete()
        for failure in failures:
            self._print(f"warning: {failure} The next one is due in {self.config.checkpoint.every} steps.")
        if not failures:
            log.info("saved %s", self.writer.folder)
        return failures

    def _pause_clock(self) -> None:
        """Training time counts only steps, so it waits until the device has finished the current one."""
        if self.runtime.device.type == "cuda":
            torch.cuda.synchronize()
        self.state.seconds += time.perf_counter() - self.clock_start

    def _start_clock(self) -> None:
        self.clock_start = time.perf_counter()

    def _progress_record(self) -> dict:
        state = self.state
        return {
            "step": state.step,
            "tokens": state.tokens,
            "flops": state.flops,
            "teacher_flops": state.teacher_flops,
            "seconds": round(state.seconds, 3),
        }

    def _write(self, write: Callable[[MetricsLog], None]) -> None:
        with errors_on_all_ranks():
            if self.metrics:
                write(self.metrics)

    def _announce(self) -> None:
        config, state = self.config, self.state
        self.logged = TrainingState(step=state.step, seconds=state.seconds)
        parameters = sum(shape.numel() for shape in self.stages.whole_shapes.values())
        grid = self.grid
        self._print(dump_config(config).rstrip())
        self._print(
            f"{config.method.name}: {parameters / 1e6:.2f}M parameters on {self.runtime.world} process(es): "
            f"pipeline {grid.pipeline} × data {grid.data} × tensor {grid.tensor}, ZeRO {config.parallel.zero}, "
            f"{self.runtime.device.type}, {self.inputs.train.num_windows:,} training windows, "
            f"{self.student_flops / 1e6:.1f} MFLOP a token for the student"
        )
        for dataset in (self.inputs.train, self.inputs.valid):
            if dataset.shards.binary:
                self._print(str(dataset.shards.binary))
        if targets := self.inputs.targets:
            self._print(describe_targets(config, targets, self.student_flops, self.inputs.train.num_windows))
        for warning in layout_warnings(config, self.runtime.world):
            self._print(f"warning: {warning}")
        if advice := self._cheaper_layout():
            self._print(f"advice: {advice}")
        if self.inputs.init and not state.step:
            self._print(describe_init(config, self.inputs.init))
        if state.step:
            self._print(
                f"{'finished already' if state.step >= self.last_step else 'resuming'}: {state.step} steps are saved"
            )

    def _cheaper_layout(self) -> str | None:
        """Advice for the rank with the most parameters and the one with the least memory. None on a CPU, whose memory
        all processes of a host share."""
        if (device_bytes := _device_bytes(self.runtime.device)) is None:
            return None
        parameters = sum(getattr(p, "ds_shape", p.shape).numel() for _, p, _ in self.stages.named_shards())
        largest = torch.tensor([parameters, -device_bytes], device=self.runtime.device)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        parameters, minus_bytes = largest.tolist()
        return cheaper_layout(self.config, self.runtime.world, parameters, -minus_bytes)

    def _print(self, line: str) -> None:
        """On rank 0's console, above the progress bar, and in every rank's log file."""
        log.info(line)
        if self.metrics:
            self.metrics.print(line)


def _device_bytes(device: torch.device) -> int | None:
    """Memory of a GPU."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
