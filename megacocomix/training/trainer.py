"""The training loop, read top to bottom: open → (resume) → step, step, step … → validate and save along the way →
finish."""

import logging
import math
import resource
import signal
import time
from pathlib import Path

import torch
import torch.distributed as dist

from megacocomix.checkpoint.store import TrainingState, load_checkpoint, save_checkpoint
from megacocomix.config import Config, dump_config
from megacocomix.errors import EXIT_FAILED, EXIT_FINISHED, EXIT_REQUEUE
from megacocomix.evaluation.perplexity import validation_loss
from megacocomix.model.gpt2 import build_model
from megacocomix.model.load import list_checkpoints, load_weights
from megacocomix.parallel.recompute import recompute_blocks
from megacocomix.parallel.runtime import Runtime, seed_step
from megacocomix.parallel.zero import Engine
from megacocomix.teacher.labels import teacher_shape
from megacocomix.training.flops import device_peak, student_flops, teacher_flops
from megacocomix.training.metrics import MetricsLog
from megacocomix.training.objective import batch_loss, count_labelled
from megacocomix.training.optimizer import build_optimizer, learning_rate, set_learning_rate
from megacocomix.training.run_folder import check_run_folder, code_version, log_to_file, write_run_folder
from megacocomix.validate import Inputs, check_config, check_token_ids, open_inputs

log = logging.getLogger(__name__)


def train(config: Config, runtime: Runtime) -> int:
    """Run a config to its end, from its newest checkpoint if it has one. Returns an exit code. Raises UserError."""
    check_config(config, runtime.world)
    run = check_run_folder(config)
    inputs = open_inputs(config, runtime.device)
    dist.barrier()  # every rank has compared the folder's config before it is written again
    if runtime.is_main:
        write_run_folder(config, run)
    dist.barrier()
    log_to_file(run, runtime.rank)
    return Trainer(config, runtime, run, inputs).fit()


class Trainer:
    """One run in one process; all processes of a job do the same steps."""

    def __init__(self, config: Config, runtime: Runtime, run: Path, inputs: Inputs):
        self.config, self.runtime, self.run, self.inputs = config, runtime, run, inputs
        model = build_model(config)
        checkpoints = list_checkpoints(run)
        if checkpoints:
            load_weights(model, checkpoints[-1])
        recompute_blocks(model, config.training.recompute)
        model.to(runtime.device)
        self.engine = Engine(model, build_optimizer(model, config.optimizer), config, runtime)
        self.state = load_checkpoint(checkpoints[-1], self.engine) if checkpoints else TrainingState()
        self.metrics = MetricsLog(run, config, self.state.step) if runtime.is_main else None
        self.last_step = config.training.stop_after or config.training.steps
        self.tokens_per_step = config.training.global_batch * config.model.context
        self.student_flops = student_flops(config)
        self.teacher_flops = 0.0
        if inputs.labeler:
            sae = inputs.labeler.sae
            shape = teacher_shape(inputs.labeler.teacher)
            self.teacher_flops = teacher_flops(
                shape, config.teacher.sae_layer, len(sae.encoder), sae.k, config.model.context
            )
        self.stop_signal = 0
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._note_signal)

    def fit(self) -> int:
        """Train to the last step. Returns an exit code."""
        state, config = self.state, self.config
        self._announce()
        self._start_clock()
        code = EXIT_FINISHED
        while state.step < self.last_step:
            losses = self._step()
            is_last = state.step == self.last_step
            if (state.step % config.logging.every == 0 or is_last) and not self._log_step(losses):
                code = EXIT_FAILED
                break
            stopped = self._any_rank_was_signalled()
            if state.step % config.evaluation.every == 0 or is_last:
                self._validate()
            if state.step % config.checkpoint.every == 0 or is_last or stopped:
                self._save()
            if stopped and not is_last:
                self._say(f"stopped on a signal after step {state.step}: saved, start the same command again to go on")
                code = EXIT_REQUEUE
                break
        if self.metrics:
            self.metrics.close()
        return code

    def _step(self) -> torch.Tensor:
        """One optimizer step. Returns this rank's share of the global mean losses: next-token and concept, on the
        device."""
        config, state, device = self.config, self.state, self.runtime.device
        seed_step(config.training.seed, state.step, self.runtime.rank)
        tokens = [self._read(positions) for positions in self._positions()]
        labels = [None] * len(tokens)
        num_labelled = None
        if self.inputs.labeler:
            labels = [self.inputs.labeler(tokens_BT) for tokens_BT in tokens]
            num_labelled = sum(count_labelled(labels_BTk) for labels_BTk in labels)
            dist.all_reduce(num_labelled)
            num_labelled.clamp_(min=1)
        num_targets = config.training.global_batch * (config.model.context - 1)
        set_learning_rate(self.engine.optimizer, self._learning_rate(state.step))
        losses = torch.zeros(2, device=device)
        self.engine.train()
        for tokens_BT, labels_BTk in zip(tokens, labels, strict=True):
            loss = batch_loss(
                *self.engine(tokens_BT), tokens_BT, labels_BTk, num_targets, num_labelled, config.method.concept_weight
            )
            losses[0] += loss.next_token
            if loss.concept is not None:
                losses[1] += loss.concept
            self.engine.accumulate(loss.total)
        state.step += 1
        state.tokens += self.tokens_per_step
        state.flops += self.tokens_per_step * self.student_flops
        state.teacher_flops += self.tokens_per_step * self.teacher_flops
        if self.metrics:
            self.metrics.advance(state.step)
        return losses

    def _positions(self) -> list[range]:
        """This rank's micro-batches of the current step, as positions of the sample order."""
        training = self.config.training
        first = self.state.step * training.global_batch
        stride = training.micro_batch * self.runtime.world
        starts = range(first + self.runtime.rank * training.micro_batch, first + training.global_batch, stride)
        return [range(start, start + training.micro_batch) for start in starts]

    def _read(self, positions: range) -> torch.Tensor:
        tokens = self.inputs.train.batch(positions)
        check_token_ids(tokens, self.config.model.vocab_size, self.config.data.train)
        return torch.from_numpy(tokens).to(self.runtime.device)

    def _learning_rate(self, step: int) -> float:
        return learning_rate(step, self.config.optimizer, self.config.training.steps)

    def _log_step(self, losses: torch.Tensor) -> bool:
        """Write a training line. Returns False when the loss is no longer a number: every rank sees the same sum."""
        state = self.state
        dist.all_reduce(losses)
        loss, concept_loss = losses.tolist()
        grad_norm = self.engine.gradient_norm()
        self._pause_clock()
        steps, seconds = state.step - self.logged.step, state.seconds - self.logged.seconds
        self.logged = TrainingState(step=state.step, seconds=state.seconds)
        tokens_per_second = steps * self.tokens_per_step / seconds
        peak = device_peak(self.runtime.device)
        flops_per_second = tokens_per_second * self.student_flops
        if self.metrics:
            self.metrics.train(
                {
                    "step": state.step,
                    "tokens": state.tokens,
                    "flops": state.flops,
                    "teacher_flops": state.teacher_flops,
                    "seconds": round(state.seconds, 3),
                    "loss": loss,
                    "concept_loss": concept_loss if self.config.concepts else None,
                    "lr": self._learning_rate(state.step - 1),
                    "grad_norm": grad_norm,
                    "tokens_per_second": tokens_per_second,
                    "flops_per_second": flops_per_second,
                    "mfu": flops_per_second / (peak * self.runtime.world) if peak else None,
                    "memory_gib": _peak_memory_gib(self.runtime.device),
                },
                seconds / steps,
            )
        self._start_clock()
        if math.isfinite(loss) and math.isfinite(grad_norm):
            return True
        self._say(
            f"error: loss {loss}, gradient norm {grad_norm} at step {state.step}: "
            "stopped, nothing saved since the last checkpoint"
        )
        return False

    def _validate(self) -> None:
        self._pause_clock()
        training, runtime, state = self.config.training, self.runtime, self.state
        self.engine.train(False)
        num_sequences = self.config.evaluation.batches * training.global_batch
        loss = validation_loss(
            self.engine,
            self.inputs.valid,
            num_sequences,
            training.micro_batch,
            runtime.device,
            runtime.rank,
            runtime.world,
        )
        if self.metrics:
            self.metrics.valid(
                {
                    "step": state.step,
                    "tokens": state.tokens,
                    "flops": state.flops,
                    "teacher_flops": state.teacher_flops,
                    "seconds": round(state.seconds, 3),
                    "valid_loss": loss,
                    "valid_ppl": math.exp(loss),
                }
            )
        self._start_clock()

    def _save(self) -> None:
        self._pause_clock()
        about = {"config": self.config.model_dump(mode="json"), "code": code_version()}
        folder = save_checkpoint(self.run, self.engine, self.state, about, self.config.checkpoint.keep, self.runtime)
        log.info("saved %s", folder)
        self._start_clock()

    def _pause_clock(self) -> None:
        """Training time counts steps alone, and a step counts when the device has done it."""
        if self.runtime.device.type == "cuda":
            torch.cuda.synchronize()
        self.state.seconds += time.perf_counter() - self.clock_start

    def _start_clock(self) -> None:
        self.clock_start = time.perf_counter()

    def _note_signal(self, number, _frame) -> None:
        self.stop_signal = number

    def _any_rank_was_signalled(self) -> bool:
        """All ranks agree: one that left alone would leave the others waiting."""
        flag = torch.tensor([self.stop_signal])
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())

    def _announce(self) -> None:
        config, state = self.config, self.state
        self.logged = TrainingState(step=state.step, seconds=state.seconds)
        parameters = sum(getattr(p, "ds_numel", p.numel()) for p in self.engine.module.parameters())
        self._say(dump_config(config).rstrip())
        self._say(
            f"{config.method.name}: {parameters / 1e6:.2f}M parameters on {self.runtime.world} process(es), "
            f"{self.runtime.device.type}, {self.inputs.train.num_windows:,} training windows, "
            f"{self.student_flops / 1e6:.1f} MFLOP a token for the student"
            + (f", {self.teacher_flops / 1e6:.1f} for the teacher" if self.teacher_flops else "")
        )
        if state.step:
            self._say(
                f"{'finished already' if state.step >= self.last_step else 'resuming'}: {state.step} steps are saved"
            )

    def _say(self, line: str) -> None:
        log.info(line)
        if self.metrics:
            self.metrics.say(line)


def _peak_memory_gib(device: torch.device) -> float:
    """Most memory this process has held: of the GPU where there is one, else of the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
