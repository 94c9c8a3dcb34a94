"""Many runs from one plan: every row with every seed, a few at a time. Finished runs are skipped.

A run's own folder shows whether the run is new, can be resumed or is finished. So a sweep that was stopped, by a signal
or otherwise, continues when it is started again.
"""

import ctypes
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError
from tqdm import tqdm

from megacocomix.config.load import load_config
from megacocomix.config.rules import check_config
from megacocomix.config.schema import Config
from megacocomix.config.section import NonNegative, Positive, Section
from megacocomix.config.yaml_text import read_yaml
from megacocomix.errors import EXIT_FAILED, EXIT_FINISHED, EXIT_REQUEUE, UserError, nearest
from megacocomix.evaluation.perplexity import earlier_evaluation
from megacocomix.files import lock_file
from megacocomix.signals import NUMBERS, StopSignal
from megacocomix.training.run_folder import check_run_folder

POLL_SECONDS = 1.0
TAIL_BYTES = 4096  # of metrics.jsonl: more than its last line
# Loaded here, because a forked child must not load a library.
LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
PR_SET_PDEATHSIG = 1


class Plan(Section):
    """The content of a plan file."""

    config: str
    """The recipe of all runs."""
    out: Annotated[str, Field(min_length=1)]
    """Folder of the runs, OUT/NAME-sSEED, their logs and the comparison."""
    seeds: Annotated[list[NonNegative], Field(min_length=1)]
    """training.seed of each row's runs."""
    at_a_time: Positive = 1
    """Number of runs at the same time; they share the host's cores."""
    launch: str = "python"
    """The command that starts a run, such as `torchrun --nproc-per-node 8 --master-port {port}`; {port} becomes a free
    port."""
    world: Positive = 1
    """Processes that `launch` starts."""
    overrides: list[str] = []
    """section.key=value of all runs."""
    runs: Annotated[dict[str, list[str]], Field(min_length=1)]
    """Name of a row → its overrides. The others are compared with the first row."""


@dataclass
class Job:
    """One run of a sweep."""

    name: str
    config: Config
    arguments: list[str]
    """For launcher/pretrain.py."""
    log: Path
    commands: list[list[str]] = field(default_factory=list)
    """Command lines that are not started yet, in order."""
    process: subprocess.Popen | None = None
    failure: str | None = None

    @property
    def last_step(self) -> int:
        """The step at which the run ends."""
        return self.config.training.stop_after or self.config.training.steps

    @property
    def checkpoint(self) -> Path:
        """The last checkpoint."""
        return Path(self.config.run) / "checkpoints" / f"step-{self.last_step:08d}"

    @property
    def is_trained(self) -> bool:
        """Whether its last checkpoint exists, and its metrics end with the last validation."""
        last = self._last_record()
        return self.checkpoint.is_dir() and "valid_loss" in last and last.get("step") == self.last_step

    @property
    def is_done(self) -> bool:
        """Whether it is trained, and its last checkpoint is evaluated on all held-out text of its config."""
        try:
            return self.is_trained and earlier_evaluation(self.checkpoint, None) is not None
        except UserError:  # evaluating it says what is wrong
            return False

    @property
    def step(self) -> int:
        """The last step in its metrics."""
        return int(self._last_record().get("step") or 0)

    def _last_record(self) -> dict:
        """The last complete line of its metrics; empty if there is none."""
        try:
            with open(Path(self.config.run) / "metrics.jsonl", "rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
                lines = file.read().split(b"\n")
            return dict(json.loads(lines[-2]))
        except (OSError, ValueError, TypeError, IndexError):
            return {}


def read_plan(path: str | Path) -> Plan:
    """Read a plan file. Raises one UserError with every problem."""
    values = read_yaml(Path(path))
    try:
        plan = Plan.model_validate(values)
    except ValidationError as error:
        raise UserError(*(f"{path}: {_explain(each)}" for each in error.errors())) from None
    if problems := list(_problems(plan)):
        raise UserError(*(f"{path}: {problem}" for problem in problems))
    return plan


def _explain(problem: dict) -> str:
    where = ".".join(str(part) for part in problem["loc"] if part != "[key]")
    if problem["type"] == "extra_forbidden":
        return f"{where} is not an option of a plan.{nearest(where, Plan.model_fields)}"
    if not where:
        return "it is not a plan: expected keys such as config, out, seeds and runs."
    return f"{where}: {problem['msg'][0].lower()}{problem['msg'][1:]}."


def _problems(plan: Plan) -> Iterator[str]:
    yield from (f"seeds names {seed} twice." for seed in sorted(set(plan.seeds)) if plan.seeds.count(seed) > 1)
    for row in plan.runs:
        if not re.fullmatch(r"[\w+-][\w.+-]*", row):
            yield f"runs: {row!r} is no name of a folder: use only letters, digits and _ + - ."
    for where, overrides in {"overrides": plan.overrides, **plan.runs}.items():
        for override in overrides:
            if override.partition("=")[0] in ("run", "training.seed"):
                yield f"{where}: {override} is set by out, the row's name and seeds."
    try:
        program = (shlex.split(plan.launch) or ["nothing"])[0]
    except ValueError as error:
        yield f"launch: {error}: {plan.launch}"
    else:
        if program != "python" and not shutil.which(program):
            yield f"launch: {program} is no program on this machine."


def plan_jobs(plan: Plan) -> list[Job]:
    """All runs of a plan, seed by seed. Checks every config, also against an existing run folder. Raises one UserError
    with every problem."""
    jobs, problems = [], []
    for seed in plan.seeds:
        for row, overrides in plan.runs.items():
            name = f"{row}-s{seed}"
            arguments = [*plan.overrides, *overrides, f"training.seed={seed}", f"run={Path(plan.out) / name}"]
            try:
                config = load_config(plan.config, arguments)
                check_config(config, plan.world)
                check_run_folder(config)
            except UserError as error:
                problems += [f"{row}: {line}" for line in error.problems]
                continue
            jobs.append(Job(name, config, ["--config", plan.config, *arguments], Path(plan.out) / f"{name}.log"))
    if problems:
        raise UserError(*dict.fromkeys(problems))  # each seed of a row has the same problem
    return jobs


class Sweep:
    """Runs the jobs of a plan. `log` gets a line when a job begins or ends. A terminal shows a bar over all steps."""

    def __init__(self, plan: Plan, jobs: list[Job], root: Path, log: Callable[[str], None]):
        self.plan, self.jobs, self.root, self.log = plan, jobs, root, log
        self.stop_signal = StopSignal((*NUMBERS, signal.SIGHUP))

    def run(self) -> int:
        """Run all unfinished jobs. Returns an exit code: finished, failed if a run failed (the others are run all the
        same), or requeue after a signal, which active runs receive too, so that they save. Raises UserError if another
        sweep uses the same folder, or the folder cannot be written."""
        out = Path(self.plan.out)
        try:
            out.mkdir(parents=True, exist_ok=True)
            lock = open(out / ".lock", "w")  # noqa: SIM115 (open until the sweep ends)
            is_locked = lock_file(lock, is_optional=True)
        except OSError as error:
            raise UserError(f"out {out} cannot be written: {error.strerror}.") from None
        if not is_locked:
            raise UserError(f"out {out} is being filled by another sweep: wait for it.")
        try:
            with self.stop_signal:
                self._run_jobs()
        finally:
            lock.close()
        if self.stop_signal:
            return EXIT_REQUEUE
        return EXIT_FAILED if any(job.failure for job in self.jobs) else EXIT_FINISHED

    def _run_jobs(self) -> None:
        """Run unfinished jobs, a few at a time. After a signal, pass it on to the active ones and begin no other."""
        waiting = [job for job in self.jobs if not job.is_done]
        self.log(f"{len(self.jobs)} runs, {len(self.jobs) - len(waiting)} of them done before")
        active: list[Job] = []
        passed_on = False
        total, begun = sum(job.last_step for job in self.jobs), sum(job.step for job in self.jobs)
        self.bar = tqdm(total=total, initial=begun, unit="step", disable=None)
        try:
            while (waiting and not self.stop_signal) or active:
                while waiting and len(active) < self.plan.at_a_time and not self.stop_signal:
                    active.append(self._begin(waiting.pop(0)))
                if self.stop_signal and not passed_on:
                    for job in active:
                        _signal(job, signal.SIGTERM)
                    passed_on = True
                time.sleep(POLL_SECONDS)
                self._show(active)
                active = [job for job in active if not self._has_ended(job)]
        finally:
            self.bar.close()
            for job in active:
                _signal(job, signal.SIGKILL)

    def _show(self, active: list[Job]) -> None:
        if not self.bar.disable:
            self.bar.n = sum(job.step for job in self.jobs)
            self.bar.set_postfix_str(", ".join(f"{job.name} {job.step}/{job.last_step}" for job in active))

    def _begin(self, job: Job) -> Job:
        launch = shlex.split(self.plan.launch.replace("{port}", str(_free_port())))
        launch = [sys.executable if argument == "python" else argument for argument in launch]
        train = [*launch, str(self.root / "launcher/pretrain.py"), *job.arguments]
        evaluate = [sys.executable, str(self.root / "tools/evaluate.py"), "perplexity", str(job.checkpoint)]
        job.commands = [evaluate] if job.is_trained else [train, evaluate]
        if not job.is_trained:
            self.log(f"{job.name}: resumes after step {job.step}" if job.step else f"{job.name}: begins")
        self._start_next(job)
        return job

    def _start_next(self, job: Job) -> None:
        threads = max(1, (os.cpu_count() or 1) // (self.plan.at_a_time * self.plan.world))
        environment = {"OMP_NUM_THREADS": str(threads)} | os.environ
        with open(job.log, "a") as log:
            job.process = subprocess.Popen(
                job.commands.pop(0),
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
                preexec_fn=_die_with_parent,
            )

    def _has_ended(self, job: Job) -> bool:
        code = job.process.poll()
        if code is None:
            return False
        job.process = None
        if code == EXIT_FINISHED and job.commands and not self.stop_signal:
            self._start_next(job)
            return False
        if job.is_done:
            left = sum(not each.is_done and not each.failure for each in self.jobs)
            self.log(f"{job.name}: done, {left} to go")
        elif not self.stop_signal:
            job.failure = f"{job.name}: exit code {code}, see {job.log}: {_last_error(job.log)}"
            self.log(job.failure)
        return True


def _die_with_parent() -> None:
    """In a starting child: get SIGTERM when the sweep's process ends, even if it is killed. Only on Linux."""
    if LIBC:
        LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _signal(job: Job, number: int) -> None:
    """Send a signal to all processes of a job, including the launcher's."""
    if job.process and job.process.poll() is None:
        os.killpg(job.process.pid, number)


def _last_error(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    return (errors or lines or ["no output"])[-1]


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
