"""The training loop, read top to bottom: open → (resume) → step, step, step … → validate and save along the way →
finish."""

import logging
import math
import signal
import time
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path

import torch
import torch.distributed as dist

from megacocomix.checkpoint.convert.begin import first_value, say_init
from megacocomix.checkpoint.store import StoredTensors, TrainingState, load_checkpoint
from megacocomix.checkpoint.writer import CheckpointWriter
from megacocomix.config import Config, dump_config
from megacocomix.errors import EXIT_FAILED, EXIT_FINISHED, EXIT_REQUEUE, UserError
from megacocomix.evaluation.harness import tasks_left
from megacocomix.evaluation.perplexity import perplexity, validation_batches
from megacocomix.hub import local_folder
from megacocomix.model.flops import student_flops
from megacocomix.model.load import latest_checkpoint, list_checkpoints, read_checkpoint_manifest
from megacocomix.parallel.grid import Grid
from megacocomix.parallel.pipeline import MicroBatch, Pipeline
from megacocomix.parallel.recompute import recompute_blocks
from megacocomix.parallel.runtime import Runtime, all_or_none, seed_step
from megacocomix.parallel.stage import LocalStages, hidden_shape
from megacocomix.parallel.zero import Engine
from megacocomix.teacher.guidance import describe_guidance
from megacocomix.training.batches import StepBatches
from megacocomix.training.device import device_peak, peak_memory_gib
from megacocomix.training.metrics import MetricsLog, is_validated
from megacocomix.training.optimizer import build_optimizer, learning_rate, set_learning_rate
from megacocomix.training.run_folder import check_run_folder, code_version, log_to_file, write_run_folder
from megacocomix.training.tasks import score_tasks
from megacocomix.validate import Inputs, check_config, layout_warnings, open_inputs

log = logging.getLogger(__name__)


def train(config: Config, runtime: Runtime) -> int:
    """Run a config to its end, from its newest checkpoint if it has one. Returns an exit code. Raises UserError, on all
    ranks alike."""
    with all_or_none():
        check_config(config, runtime.world)
        run = check_run_folder(config)
        if config.method.has_teacher and runtime.is_main:  # the others wait here, and find it downloaded
            local_folder(config.teacher.model, download=True)
    with all_or_none():
        inputs = open_inputs(config, runtime.device)
    with all_or_none():
        # After every rank has compared the folder's config, which is now written again.
        device = torch.cuda.get_device_name() if runtime.device.type == "cuda" else "cpu"
        lock = write_run_folder(config, run, {"world": runtime.world, "device": device}) if runtime.is_main else None
    with all_or_none():
        log_to_file(run, runtime.rank)
    with all_or_none():
        trainer = Trainer(config, runtime, run, inputs)
    try:
        return trainer.fit()
    finally:
        trainer.close()
        if lock:
            lock.close()


class Trainer:
    """One run in one process; all processes of a job do the same steps."""

    def __init__(self, config: Config, runtime: Runtime, run: Path, inputs: Inputs):
        self.config, self.runtime, self.run, self.inputs = config, runtime, run, inputs
        self.identity = inputs.identity()
        self.about = {"config": config.model_dump(mode="json"), "code": code_version(), "inputs": self.identity}
        self.grid = Grid(runtime, config.parallel.tensor, config.parallel.pipeline)
        self.stages = LocalStages(config, self.grid)
        dtype = torch.bfloat16 if config.training.precision == "bf16" else torch.float32
        self.pipeline = Pipeline(self.grid, self.stages.num_stages, partial(hidden_shape, config), dtype)
        self.engine, self.state = self._build_engine()
        self.writer = CheckpointWriter(run, self.engine, self.about, config.checkpoint)
        self.metrics = MetricsLog(run, config, self.state.step) if runtime.is_main else None
        self.last_step = config.training.stop_after or config.training.steps
        self.batches = StepBatches(config, self.grid, inputs, self.last_step)
        self.tokens_per_step = config.training.global_batch * config.model.context
        self.student_flops = student_flops(config)
        self.teacher_flops = inputs.guidance.flops if inputs.guidance else 0.0
        self.stages.teacher_head = inputs.guidance.head if inputs.guidance else None
        self.stop_signal, self.lacks_tasks = 0, False
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._note_signal)

    def fit(self) -> int:
        """Train to the last step. Returns an exit code. Raises UserError."""
        self._announce()
        try:
            return self._train()
        except UserError:  # on all ranks: what was begun can still be completed
            self._complete_save()
            raise

    def _train(self) -> int:
        state, config = self.state, self.config
        self._start_clock()
        if state.step == self.last_step:
            return self._make_up()
        while state.step < self.last_step:
            losses = self._step()
            stopped = self._agree_on_stopping()
            is_last = state.step == self.last_step
            scores = bool(config.evaluation.tasks) and (is_last or self._is_due(config.evaluation.tasks_every))
            saves = self._is_due(config.checkpoint.every) or is_last or stopped or scores
            logs = self._is_due(config.logging.every) or is_last
            if not self.engine.step_was_applied() or ((logs or saves) and not self._is_finite(losses)):
                self._complete_save()
                self._say(f"error: loss or gradient is not finite at step {state.step}; it is not saved")
                return EXIT_FAILED
            if logs:
                self._log_step(losses)
            if saves:  # before validating, which may take longer than the grace period after a signal
                self._save(must_succeed=is_last or stopped or scores)
            if (self._is_due(config.evaluation.every) or is_last) and not self._validates():
                return EXIT_FAILED
            if scores and not stopped:
                stopped = self._score_tasks()
            if stopped and (scores or not is_last):
                self._say(f"stopped on a signal after step {state.step}: saved, start the same command again to go on")
                return EXIT_REQUEUE
        return EXIT_FAILED if self.lacks_tasks else EXIT_FINISHED

    def _make_up(self) -> int:
        """Of a run whose last step is saved: the validation and the tasks that it was killed before. Returns an exit
        code."""
        owed = [False, False]
        if self.runtime.is_main:
            tasks = self.config.evaluation
            left = tasks.tasks and tasks_left(self._checkpoint(), tasks.tasks, tasks.tasks_data, tasks.tasks_limit)
            owed = [not is_validated(self.run, self.state.step), bool(left)]
        dist.broadcast_object_list(owed, src=0)
        validates, scores = owed
        if validates and not self._validates():
            return EXIT_FAILED
        if scores and self._score_tasks():
            return EXIT_REQUEUE
        return EXIT_FAILED if self.lacks_tasks else EXIT_FINISHED

    def _checkpoint(self) -> Path:
        return self.run / "checkpoints" / f"step-{self.state.step:08d}"

    def _is_due(self, every: int | None) -> bool:
        return every is not None and self.state.step % every == 0

    def close(self) -> None:
        """Finish logging."""
        if self.metrics:
            self.metrics.close()

    def _build_engine(self) -> tuple[Engine, TrainingState]:
        """The engine on the newest checkpoint's weights, or on initial ones, and where the run stands."""
        config, shapes = self.config, self.stages.whole_shapes
        for part in self.stages.parts.values():
            recompute_blocks(part, config.training.recompute)
        build = partial(build_optimizer, config=config.optimizer)
        checkpoint = self._choose_checkpoint()
        if checkpoint is None:
            start = lambda name: first_value(name, shapes[name], config, self.inputs.init)
            return Engine(self.stages, start, build, config, self.grid), TrainingState()
        with all_or_none():
            stored = StoredTensors(checkpoint)
            stored.check(shapes)
        with stored:
            engine = Engine(self.stages, stored.read, build, config, self.grid)
            return engine, load_checkpoint(stored, engine)

    def _choose_checkpoint(self) -> Path | None:
        """The newest sound checkpoint; those that are damaged are walked past, and said. Rank 0 looks: a shared file
        system may show the others an older state, and one reader is enough to compare all files with their hashes."""
        chosen = [None, None]
        with all_or_none():
            if self.runtime.is_main and list_checkpoints(self.run):
                checkpoint = latest_checkpoint(self.run)
                chosen = [checkpoint, read_checkpoint_manifest(checkpoint)["inputs"]]
        dist.broadcast_object_list(chosen, src=0)
        checkpoint, stored = chosen
        # What is not read any more cannot have changed.
        changed = [key for key in sorted(stored or {}) if stored[key] != self.identity.get(key, stored[key])]
        with all_or_none():
            if changed:
                raise UserError(
                    f"run {self.run} was begun with other content of {' and '.join(changed)} than is there now. "
                    "Bring it back, or choose another folder with run=PATH."
                )
        return checkpoint

    def _step(self) -> torch.Tensor:
        """One optimizer step. Returns this rank's share of the global mean losses (next token, prediction,
        distillation), on the device."""
        config, state, stages = self.config, self.state, self.stages
        seed_step(config.training.seed, state.step, self.runtime.rank)
        batches, stages.num_predicted = self.batches.take(state.step)
        stages.num_targets = config.training.global_batch * (config.model.context - 1)
        stages.losses.zero_()
        set_learning_rate(self.engine.optimizer, self._learning_rate(state.step))
        self.engine.train()
        self.engine.begin_step()
        self.pipeline.train(self.engine, self.engine.before_backward, batches)
        self.engine.step()
        state.step += 1
        state.tokens += self.tokens_per_step
        state.flops += self.tokens_per_step * self.student_flops
        state.teacher_flops += self.tokens_per_step * self.teacher_flops
        if self.metrics:
            self.metrics.advance(state.step)
        return self._own_losses()

    def _own_losses(self) -> torch.Tensor:
        """This rank's share of the losses: the tensor ranks of a stage know the same, and one of them counts."""
        return self.stages.losses.clone() if self.grid.tensor_rank == 0 else torch.zeros_like(self.stages.losses)

    def _learning_rate(self, step: int) -> float:
        return learning_rate(step, self.config.optimizer, self.config.training.steps)

    def _is_finite(self, losses: torch.Tensor) -> bool:
        """Whether this step's loss and gradient norm are numbers; sums `losses` over the ranks, so that all agree."""
        dist.all_reduce(losses)
        return bool(losses.isfinite().all()) and math.isfinite(self.engine.gradient_norm())

    def _log_step(self, losses: torch.Tensor) -> None:
        state = self.state
        method, (loss, predicted_loss, kd_loss) = self.config.method, losses.tolist()
        grad_norm = self.engine.gradient_norm()
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
            "grad_norm": grad_norm,
            "tokens_per_second": tokens_per_second,
            "flops_per_second": flops_per_second,
            "mfu": flops_per_second / (peak * self.runtime.world) if peak else None,
            "memory_gib": peak_memory_gib(self.runtime.device),
        }
        self._write(lambda metrics: metrics.train(record, seconds / steps))
        self._start_clock()

    def _validates(self) -> bool:
        """Validate; whether the loss is a number. Says so where it is not."""
        if math.isfinite(self._validate()):
            return True
        self._complete_save()
        self._say(f"error: validation loss is not finite after step {self.state.step}: lower optimizer.lr")
        return False

    def _validate(self) -> float:
        self._pause_clock()
        config, grid, stages = self.config, self.grid, self.stages
        batch, dataset = config.training.micro_batch, self.inputs.valid
        num_sequences = min(config.evaluation.batches * config.training.global_batch, dataset.num_windows)
        self.engine.train(False)
        stages.num_targets = 1
        stages.losses.zero_()
        batches = validation_batches(dataset, num_sequences, batch, grid.data_rank, grid.data)
        # As many at a time as keep a pipeline busy.
        for some in iter(lambda: list(islice(batches, 4 * grid.pipeline)), []):
            on_device = [MicroBatch(*(each.to(self.runtime.device) for each in pair)) for pair in some]
            self.pipeline.evaluate(self.engine, on_device)
        total = self._own_losses()[0]
        dist.all_reduce(total)
        loss = (total / (num_sequences * (config.model.context - 1))).item()
        record = self._progress_record() | {"valid_loss": loss, "valid_ppl": perplexity(loss)}
        self._write(lambda metrics: metrics.valid(record))
        self._start_clock()
        return loss

    def _score_tasks(self) -> bool:
        """Score the tasks on this step's checkpoint. Returns whether a signal came on the way."""
        self._pause_clock()
        if self.runtime.device.type == "cuda":
            torch.cuda.empty_cache()  # for the process that scores
        stopped, failure = score_tasks(
            self._checkpoint(),
            self.config.evaluation,
            self.run / "logs" / "tasks.log",
            self.runtime.is_main,
            self._agree_on_stopping,
        )
        self.lacks_tasks = failure is not None  # of the last step it is the run's failure
        if failure:
            self._say(f"warning: {failure}")
        self._start_clock()
        return stopped

    def _save(self, must_succeed: bool) -> None:
        """Begin a checkpoint of this step; with `must_succeed` also complete it, or raise UserError on all ranks."""
        self._pause_clock()
        self._complete_save()
        self.writer.begin(self.state)
        if must_succeed and (failures := self._complete_save()):
            raise UserError(
                *failures, "Earlier checkpoints are untouched; free some space and start the same command again."
            )
        self._start_clock()

    def _complete_save(self) -> list[str]:
        """Complete a checkpoint that was begun, if one was. Returns what went wrong with it; training can go on."""
        if not self.writer.is_pending:
            return []
        failures = self.writer.complete()
        for failure in failures:
            self._say(f"warning: {failure} The next one is due in {self.config.checkpoint.every} steps.")
        if not failures:
            log.info("saved %s", self.writer.folder)
        return failures

    def _pause_clock(self) -> None:
        """Training time counts steps alone, and a step counts when the device has done it."""
        if self.runtime.device.type == "cuda":
            torch.cuda.synchronize()
        self.state.seconds += time.perf_counter() - self.clock_start

    def _start_clock(self) -> None:
        self.clock_start = time.perf_counter()

    def _note_signal(self, number, _frame) -> None:
        self.stop_signal = number

    def _agree_on_stopping(self) -> bool:
        """Whether any rank was signalled. All ranks agree: one that left alone would leave the others waiting.

        Completes a checkpoint that all have written. Raises UserError, on all ranks, when one has read data that cannot
        be trained on.
        """
        flags = torch.tensor([self.stop_signal, self.batches.bad_data is not None, self.writer.is_writing])
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        stop_signal, bad_data, is_writing = flags.tolist()
        if not is_writing:
            self._complete_save()
        if bad_data:
            with all_or_none():
                if self.batches.bad_data:
                    raise self.batches.bad_data
        return bool(stop_signal)

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
        with all_or_none():
            if self.metrics:
                write(self.metrics)

    def _announce(self) -> None:
        config, state = self.config, self.state
        self.logged = TrainingState(step=state.step, seconds=state.seconds)
        parameters = sum(shape.numel() for shape in self.stages.whole_shapes.values())
        grid = self.grid
        self._say(dump_config(config).rstrip())
        self._say(
            f"{config.method.name}: {parameters / 1e6:.2f}M parameters on {self.runtime.world} process(es): "
            f"pipeline {grid.pipeline} × data {grid.data} × tensor {grid.tensor}, ZeRO {config.parallel.zero}, "
            f"{self.runtime.device.type}, {self.inputs.train.num_windows:,} training windows, "
            f"{self.student_flops / 1e6:.1f} MFLOP a token for the student"
        )
        if guidance := self.inputs.guidance:
            self._say(describe_guidance(config, guidance, self.student_flops, self.inputs.train.num_windows))
        for warning in layout_warnings(config, self.runtime.world):
            self._say(f"warning: {warning}")
        if self.inputs.init and not state.step:
            self._say(say_init(config, self.inputs.init))
        if state.step:
            self._say(
                f"{'finished already' if state.step >= self.last_step else 'resuming'}: {state.step} steps are saved"
            )

    def _say(self, line: str) -> None:
        log.info(line)
        if self.metrics:
            self.metrics.say(line)
