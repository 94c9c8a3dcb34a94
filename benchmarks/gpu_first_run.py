#!/usr/bin/env python
"""The first hour on a GPU machine: environment, parity with a CPU, the teacher's overlap, the cost of each suspicion.

    bash benchmarks/gpu_first_run.sh [--cpu] [--out DIR]

It needs the repository and its environment only. DIR gets report.md, report.json, traces, and the logs of all ranks.
docs/benchmarks.md says what each row means, what to expect, and what to do if it differs. Exit code 1: a row failed.

Each part runs in processes of its own with a time-out. Training runs share a job, which is started again without a run
that crashed or hung. Runs to be timed end before their first checkpoint."""

import argparse
import contextlib
import datetime
import gc
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, NamedTuple
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from megacocomix.config.load import load_config
from megacocomix.config.schema import Config, TrainingConfig
from megacocomix.errors import UserError, run_cli
from megacocomix.files import check_absent
from megacocomix.launchers import child_environment

ROOT = Path(__file__).resolve().parents[1]
PARTS = {
    "environment": "Environment",
    "parity": "Parity with one CPU process",
    "teacher": "The teacher",
    "suspicions": "Suspicions",
}
NO_CPU = "n/a on a CPU"
# Largest relative differences in any step. fp32: on a CPU, layouts differ by 1e-7 in losses and 1e-5 in the norm, and
# kernels that sum in another order will too. bf16 rounds to 2^-9 everywhere: on a CPU it differs from fp32, and tensor
# ranks from one process, by 2e-4 and 6e-3. A gradient that misses a rank's share, or is counted twice, changes the norm
# by tens of percents.
TOLERANCE = {
    "fp32": {"loss": 2e-5, "concept_loss": 2e-5, "grad_norm": 1e-3},
    "bf16": {"loss": 1e-3, "concept_loss": 1e-3, "grad_norm": 0.05},
}
PARITY_STEPS = 4
TEACHER = "megacocomix.teacher"  # marks the making of targets in a trace
PART_LIMIT, CASE_LIMIT = 900, 300  # seconds without progress until a job is ended

Outcome = Literal["PASS", "FAIL", "figure", "n/a"]


@dataclass(frozen=True)
class Row:
    """A line of the report."""

    part: str
    name: str
    outcome: Outcome
    value: str
    expected: str = ""


class Report:
    """The rows so far, in a file that several processes append to, so that a part that is killed keeps its rows."""

    def __init__(self, out: Path):
        self.out, self.file = out, out / "rows.jsonl"

    def add(self, part: str, name: str, outcome: Outcome | bool, value: str, expected: str = "") -> None:
        """Print a row and keep it. A bool is PASS or FAIL."""
        outcome = {True: "PASS", False: "FAIL"}.get(outcome, outcome)
        print(f"{outcome:6} {name}: {value}", flush=True)
        with open(self.file, "a") as file:
            file.write(json.dumps(asdict(Row(part, name, outcome, value, expected))) + "\n")

    def rows(self) -> list[Row]:
        """All rows."""
        return [Row(**record) for record in read_lines(self.file)]

    def write(self, title: str) -> bool:
        """Write report.md and report.json. Returns whether no row failed."""
        rows = self.rows()
        failed = [row.name for row in rows if row.outcome == "FAIL"]
        text = render(title, rows)
        (self.out / "report.md").write_text(text)
        records = {"title": title, "failed": failed, "rows": [asdict(row) for row in rows]}
        (self.out / "report.json").write_text(json.dumps(records, indent=1) + "\n")
        print(f"\n{text}\n{len(failed)} of {len(rows)} rows failed; {self.out}/report.md", flush=True)
        return not failed


def render(title: str, rows: Iterable[Row]) -> str:
    """The rows as Markdown, to be pasted into docs/benchmarks.md."""
    lines = [title, "", "| | result | value | expected |", "|---|---|---|---|"]
    part = None
    for row in rows:
        if row.part != part:
            lines.append(f"| **{PARTS[row.part]}** | | | |")
            part = row.part
        cells = (row.name, row.outcome, row.value, row.expected)
        lines.append("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


class Machine(NamedTuple):
    """Where this runs."""

    out: Path
    has_gpu: bool
    world: int
    """Processes of a training job: the largest power of two up to 8 for which there are GPUs; 2 on a CPU."""

    @property
    def device(self) -> torch.device:
        """The device of a part of one process."""
        return torch.device("cuda" if self.has_gpu else "cpu")


def main() -> int:
    """Run all parts, write the report. Returns 1 if a row failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true", help="the CPU form, even where there are GPUs")
    parser.add_argument("--out", type=Path, metavar="DIR", help="new folder (default runs/gpu-first-run-DATE)")
    parser.add_argument("--part", choices=PROCESSES, help=argparse.SUPPRESS)
    parser.add_argument("--cases", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()  # --part and --cases are for the processes started below
    if options.cases:
        return train_cases(options.cases)
    gpus = 0 if options.cpu else torch.cuda.device_count()
    out = (options.out or Path(f"runs/gpu-first-run-{datetime.datetime.now():%Y%m%d-%H%M%S}")).resolve()
    machine = Machine(out, gpus > 0, 1 << min(gpus, 8).bit_length() - 1 if gpus else 2)
    report = Report(out)
    if options.part:
        PROCESSES[options.part](machine, report)
        return 0
    check_absent(out)
    out.mkdir(parents=True)
    try:
        for part, do in {"environment": environment, "parity": parity, "suspicions": measure_steps}.items():
            print(f"\n== {do.__doc__.splitlines()[0]}", flush=True)
            try:
                do(machine, report)
            except Exception as error:  # the other parts may still tell something
                traceback.print_exc()
                report.add(part, "this part", False, f"{type(error).__name__}: {error}")
    finally:
        where = f"{gpus} × {torch.cuda.get_device_name()}" if gpus else "CPU form: 2 gloo processes, tiny sizes"
        is_right = report.write(f"{where}, torch {torch.__version__}, {datetime.date.today()}")
        shutil.rmtree(out / "inputs", ignore_errors=True)
    return 0 if is_right else 1


# Processes


def run(command: list, logs: Path, has_gpu: bool, limit: float, progress: Path | None = None) -> str | None:
    """Run a command with its output in `logs`. It is killed after `limit` seconds, counted from the last change of the
    file `progress`. Returns None, or in one line why it failed."""
    logs.mkdir(parents=True, exist_ok=True)
    environment = child_environment() | {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    if not has_gpu:
        environment |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    with open(logs / "stdout.log", "a") as stdout, open(logs / "stderr.log", "a") as stderr:
        process = subprocess.Popen(
            list(map(str, command)), cwd=ROOT, env=environment, stdout=stdout, stderr=stderr, start_new_session=True
        )
        begun = time.time()
        try:
            while process.poll() is None:
                changed = progress.stat().st_mtime if progress and progress.exists() else begun
                if time.time() - max(begun, changed) > limit:
                    return f"no progress for {limit:.0f} s, so it was ended; {logs}"
                time.sleep(0.1)
        finally:
            end(process)
    return None if process.returncode == 0 else f"{reason(logs)}; exit code {process.returncode}, {logs}"


def end(process: subprocess.Popen) -> None:
    """End a process with all that it started. torchrun needs time to end its ranks, which are not in its group."""
    for number, patience in ((signal.SIGTERM, 45), (signal.SIGKILL, 10)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)


def reason(logs: Path) -> str:
    """The first error in the logs of a job's ranks, but rather one that does not say that another rank failed."""
    texts = [file.read_text(errors="replace") for file in sorted(logs.rglob("stderr.log"))]
    found = [line for text in texts for line in re.findall(r"^(?:error: .*|[\w.]*Error: .*)", text, re.M)]
    follows = re.compile("ChildFailed|DistBackendError|Connection|Gloo|NCCL")
    return next(iter(sorted(found, key=lambda line: bool(follows.search(line)))), "it printed no error")[:300]


def python(*words) -> list:
    """A command of this interpreter."""
    return [sys.executable, *words]


def torchrun(world: int, logs: Path, *words) -> list:
    """A command on `world` processes; each rank has its own logs."""
    options = ("--standalone", "--nproc-per-node", world, "--redirects", 3, "--log-dir", logs / "ranks")
    return python("-m", "torch.distributed.run", *options, *words)


def own_process(part: str, machine: Machine) -> str | None:
    """Run one of PROCESSES and show the rows that it adds. Returns None, or why it failed."""
    words = ["--part", part, "--out", machine.out, *["--cpu"] * (not machine.has_gpu)]
    logs, progress = machine.out / "logs" / part, machine.out / "rows.jsonl"
    failure = run(python(__file__, *words), logs, machine.has_gpu, PART_LIMIT, progress)
    print((logs / "stdout.log").read_text(), end="", flush=True)
    return failure


def read_lines(file: Path) -> list[dict]:
    """The records of a file of JSON lines."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


# Training runs


class Case(NamedTuple):
    """A training run of a job."""

    name: str
    recipe: str
    overrides: list[str]
    measure: Literal["nothing", "time", "trace"] = "nothing"
    timer: bool | None = None
    """DeepSpeed's throughput timer on or off; None leaves it as it is."""


class Measured(Exception):
    """Ends a run whose measurement is complete, on all ranks at the same step."""


def run_cases(job: str, cases: list[Case], machine: Machine, world: int, has_gpu: bool) -> dict[str, dict]:
    """Run the cases one after the other in a job of `world` processes. Results by name; that of a case that failed has
    a `failure`. After a crash or a hang the job is started again with the cases that are left."""
    found: dict[str, dict] = {}
    attempt = 0
    while left := [case for case in cases if case.name not in found]:
        logs = machine.out / "logs" / re.sub(r"[^a-z0-9.]+", "-", f"{job} {attempt}")
        logs.mkdir(parents=True)
        file = logs / "cases.json"
        file.write_text(json.dumps([case._asdict() for case in left]))
        results = file.with_suffix(".results")
        failure = run(torchrun(world, logs, __file__, "--cases", file), logs, has_gpu, CASE_LIMIT, results)
        records = read_lines(results)
        found |= {record["name"]: record for record in records if "begun" not in record}
        unfinished = [case.name for case in left if case.name not in found]
        if unfinished and not any(record["name"] == unfinished[0] for record in records):
            found |= {name: {"failure": failure} for name in unfinished}  # the job itself cannot start
        elif unfinished:
            found[unfinished[0]] = {"failure": failure}
        attempt += 1
    return found


def train_cases(file: Path) -> int:
    """What the ranks of a job do: train each case as launcher/pretrain.py would, and let rank 0 write its result."""
    from megacocomix.parallel.runtime import start_runtime, stop_runtime
    from megacocomix.training.trainer import train

    runtime = start_runtime()
    gc.freeze()  # DeepSpeed collects garbage many times at every start, which takes seconds with all modules' objects

    def write(**record) -> None:
        if runtime.is_main:
            with open(file.with_suffix(".results"), "a") as results:
                results.write(json.dumps(record) + "\n")

    for record in json.loads(file.read_text()):
        case = Case(**record)
        write(name=case.name, begun=True)
        meter = Meter(case, runtime.device, file.parent / f"{re.sub(r'[^a-z0-9.]+', '-', case.name)}.trace.json")
        failure = None
        try:
            with marked_teacher() if case.measure == "trace" else contextlib.nullcontext():
                code = train(load_config(case.recipe, case.overrides), runtime, meter)
            if code or case.measure != "nothing":
                failure = f"training ended with exit code {code}"
        except Measured:
            pass
        except UserError as error:
            failure = " ".join(error.problems)
        gc.collect()
        gc.freeze()
        if runtime.device.type == "cuda":
            torch.cuda.empty_cache()
        write(name=case.name, **meter.result, **({"failure": failure} if failure else {}))
    stop_runtime()
    return 0


class Meter:
    """Listens to a training run, measures some steps and ends it."""

    def __init__(self, case: Case, device: torch.device, trace: Path):
        self.case, self.trace, self.is_cuda = case, trace, device.type == "cuda"
        self.result: dict = {}
        self.step = 0
        # DeepSpeed's timer synchronises from the third step on.
        self.warm, self.timed = (3, 5) if self.is_cuda else (1, 3)
        self.allocated_before = torch.cuda.memory_allocated() if self.is_cuda else 0

    def __call__(self, event: str, trainer) -> None:
        """At the beginning of each step."""
        if event != "step" or self.case.measure == "nothing":
            return
        step, self.step = self.step, self.step + 1
        if step == 0:
            self._set_timer(trainer)
        elif step == self.warm:
            self._begin()
        elif step == self.warm + self.timed:
            self._finish(trainer)
            if self.case.measure == "time" or not self.is_cuda:
                raise Measured
            self._begin_counting()
        elif step == self.warm + self.timed + 1:
            self._finish_counting()
            raise Measured

    def _set_timer(self, trainer) -> None:
        timer = getattr(getattr(trainer.engine, "_engine", None), "tput_timer", None)
        if self.case.timer is not None and timer is not None:
            timer.config.enabled = timer.config.synchronized = self.case.timer
        self.result["timer"] = timer is not None and timer.config.enabled and timer.config.synchronized

    def _begin(self) -> None:
        self._synchronize()
        if self.is_cuda:
            torch.cuda.reset_peak_memory_stats()
        if self.case.measure == "trace":
            kinds = [torch.profiler.ProfilerActivity.CPU, *[torch.profiler.ProfilerActivity.CUDA] * self.is_cuda]
            self.profiler = torch.profiler.profile(activities=kinds)
            self.profiler.start()
        self.begun = time.perf_counter()

    def _finish(self, trainer) -> None:
        self._synchronize()
        training, grid = trainer.config.training, trainer.grid
        self.result |= {
            "seconds": (time.perf_counter() - self.begun) / self.timed,
            "steps": self.timed,
            "tokens": training.global_batch * trainer.config.model.context / grid.runtime.world,
            "micro_batches": training.global_batch // (training.micro_batch * grid.data),
            "teacher_share": trainer.teacher_flops / trainer.student_flops,
        }
        if self.is_cuda:
            sizes = [shape.numel() for shape in trainer.stages.whole_shapes.values()]
            self.result["peak"] = torch.cuda.max_memory_allocated() - self.allocated_before
            self.result["estimate"] = memory_estimate(trainer.config, sum(sizes), grid.data)
        if self.case.measure == "trace":
            self.profiler.stop()
            if grid.runtime.is_main:
                self.profiler.export_chrome_trace(str(self.trace))
                self.result["trace"] = str(self.trace)
            del self.profiler

    def _begin_counting(self) -> None:
        self.catching = warnings.catch_warnings(record=True)
        self.caught = self.catching.__enter__()
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")

    def _finish_counting(self) -> None:
        torch.cuda.set_sync_debug_mode("default")
        self.catching.__exit__(None, None, None)
        self.result["synchronisations"] = synchronisations(self.caught)

    def _synchronize(self) -> None:
        if self.is_cuda:
            torch.cuda.synchronize()


def synchronisations(caught: Iterable[warnings.WarningMessage]) -> dict[str, int]:
    """How often each line of code made the host wait, most often first, by the warnings of torch's sync debug mode."""
    lines = [each for each in caught if "synchronizing CUDA operation" in str(each.message)]
    places = Counter("/".join(Path(each.filename).parts[-2:]) + f":{each.lineno}" for each in lines)
    return dict(places.most_common())


@contextlib.contextmanager
def marked_teacher() -> Iterator[None]:
    """Marks the making of teacher targets in a trace."""
    from megacocomix.teacher.targets import TargetSource

    make = TargetSource.passes

    def marked(*arguments):
        passes = make(*arguments)
        while True:
            with torch.profiler.record_function(TEACHER):
                try:
                    next(passes)
                except StopIteration as end:
                    return end.value
            yield

    with mock.patch.object(TargetSource, "passes", marked):
        yield


def memory_estimate(config: Config, num_parameters: int, data: int) -> float:
    """Bytes at the peak of a step in bf16 under ZeRO 1, on one of `data` ranks, without teacher and recomputation: when
    the backward pass begins, with the gradient of the next-token logits.

    States as in docs/parallelism.md. A block keeps 34 bytes a position and unit of width: the inputs of its two norms,
    of qkv, out and up (2 each), q, k and v (6), attention's output (2), the inputs of the GELU and of down (8 each).
    """
    model, method = config.model, config.method
    tokens, width = config.training.micro_batch * model.context, model.hidden_size
    slots = [method.num_slots(model.context) * (index >= method.insertion_layer) for index in range(model.num_layers)]
    blocks = sum(34 * width * tokens * (1 + each / model.context) for each in slots)
    concepts = 2 * method.num_concepts * tokens if method.predict == "concepts" else 0
    return num_parameters * (2 + 4 + 12 / data) + blocks + concepts + 2 * 2 * model.vocab_size * tokens


# Traces: the events of torch.profiler's Chrome trace; times in microseconds


class Kernels(NamedTuple):
    """What a trace shows."""

    teacher: float
    """Time in which a kernel of the teacher runs."""
    overlapped: float
    """The part of it in which a kernel of the student runs too."""
    teacher_streams: set[int]
    student_streams: set[int]
    teacher_launches: int
    student_launches: int
    waiting: float
    """Time in which the host waits for the device."""
    queueing: float
    """Time in launches of more than 100 µs: the stream's queue is full."""

    @property
    def share(self) -> float:
        """Of the teacher's time, the part that costs nothing."""
        return self.overlapped / self.teacher if self.teacher else 0.0


def analyse(events: Iterable[dict]) -> Kernels:
    """A kernel is the teacher's if it was launched, on any thread, while teacher targets were made: backward passes are
    launched by a thread of their own, but the caller waits for it."""
    events = [event for event in events if event.get("ph") == "X"]
    of = lambda *kinds: [event for event in events if event.get("cat") in kinds]
    span = lambda event: (event["ts"], event["ts"] + event["dur"])
    marks = [span(event) for event in of("user_annotation", "cpu_op") if event["name"] == TEACHER]
    calls = of("cuda_runtime", "cuda_driver")
    launched = {event["args"]["correlation"]: event["ts"] for event in calls if "correlation" in event.get("args", {})}
    sides: tuple[list, list] = ([], [])
    for kernel in of("kernel"):
        at = launched.get(kernel["args"].get("correlation"), float("-inf"))
        sides[any(start <= at <= stop for start, stop in marks)].append(kernel)
    student, teacher = sides
    spans = [merge(map(span, side)) for side in (teacher, student)]
    long = lambda event: event["dur"] > 100 and "Launch" in event["name"]
    return Kernels(
        teacher=sum(stop - start for start, stop in spans[0]),
        overlapped=common(*spans),
        teacher_streams={kernel["args"]["stream"] for kernel in teacher},
        student_streams={kernel["args"]["stream"] for kernel in student},
        teacher_launches=len(teacher),
        student_launches=len(student),
        waiting=sum(event["dur"] for event in calls if "Synchronize" in event["name"]),
        queueing=sum(event["dur"] for event in filter(long, calls)),
    )


def merge(spans: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """The union of spans of time, in order."""
    merged: list[tuple[float, float]] = []
    for start, stop in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(stop, merged[-1][1])
        else:
            merged.append((start, stop))
    return merged


def common(ours: list[tuple[float, float]], theirs: list[tuple[float, float]]) -> float:
    """The time that is in both of two unions."""
    total, i, j = 0.0, 0, 0
    while i < len(ours) and j < len(theirs):
        total += max(0.0, min(ours[i][1], theirs[j][1]) - max(ours[i][0], theirs[j][0]))
        i, j = (i + 1, j) if ours[i][1] < theirs[j][1] else (i, j + 1)
    return total


# Part 1: the environment


def environment(machine: Machine, report: Report) -> None:
    """Versions, devices, and the attention kernels of our shapes."""
    if failure := own_process("environment", machine):
        report.add("environment", "environment", False, failure)


def look_around(machine: Machine, report: Report) -> None:
    """The rows of the environment, in a process of its own."""
    from importlib.metadata import PackageNotFoundError, version

    def installed(package: str) -> str:
        try:
            return version(package)
        except PackageNotFoundError:
            return "not installed"

    add = lambda *row: report.add("environment", *row)
    packages = ("deepspeed", "transformers", "triton", "numpy")
    versions = [f"Python {sys.version.split()[0]}", f"torch {torch.__version__}"]
    add(
        "versions",
        "figure",
        ", ".join([*versions, *(f"{name} {installed(name)}" for name in packages)]),
        "docs: torch 2.11+",
    )
    count = torch.cuda.device_count() if machine.has_gpu else 0
    if not count:
        for name in ("devices", "driver and libraries", "peer access"):
            add(name, "n/a", NO_CPU)
    else:
        found = [torch.cuda.get_device_properties(index) for index in range(count)]
        kinds = Counter(
            f"{each.name} (sm_{each.major}{each.minor}, {each.total_memory / 2**30:.0f} GiB)" for each in found
        )
        add("devices", len(kinds) == 1, ", ".join(f"{number} × {kind}" for kind, number in kinds.items()), "one kind")
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            driver = subprocess.run(query, capture_output=True, text=True, timeout=60).stdout.split()[:1]
        except (OSError, subprocess.TimeoutExpired):
            driver = []
        nccl = ".".join(map(str, torch.cuda.nccl.version()))
        libraries = f"CUDA {torch.version.cuda}, NCCL {nccl}, cuDNN {torch.backends.cudnn.version()}"
        add("driver and libraries", "figure", f"driver {(driver or ['unknown'])[0]}, {libraries}")
        pairs = [(one, other) for one in range(count) for other in range(count) if one != other]
        reach = sum(torch.cuda.can_device_access_peer(*pair) for pair in pairs)
        add("peer access", "figure" if pairs else "n/a", f"{reach} of {len(pairs)} pairs", "all pairs of one host")
    precision = torch.get_float32_matmul_precision()
    add("fp32 products", precision == "highest", precision, "highest: no TF32 unless asked for")
    for name, recipe in recipes(machine).items():
        config = load_config(*recipe)
        for every, mask in ((None, "no mask"), (1, "the last block's mask")):
            kernels = attention_kernels(config, every, machine.device)
            is_right = bool(kernels) and "math" not in " ".join(kernels) if machine.has_gpu else "figure"
            wanted = "flash or cudnn" if every is None else "efficient or cudnn: flash takes no mask"
            add(f"attention of {name}, {mask}", is_right, " ".join(kernels), f"{wanted}; never math")


def attention_kernels(config: Config, every: int | None, device: torch.device) -> list[str]:
    """The implementations of scaled_dot_product_attention that a micro-batch of a recipe takes, in bf16, above the
    concept module. `every` as in model/gpt2.py: with it, a block computes the positions that predict only."""
    from megacocomix.model.gpt2 import Attention

    model, method = config.model, config.method
    attention = Attention(model).to(device, torch.bfloat16)
    positions = model.context + method.num_slots(model.context)
    x = torch.randn(config.training.micro_batch, positions, model.hidden_size, dtype=torch.bfloat16, device=device)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        attention(x.requires_grad_(), every).sum().backward()
    found = {event.key for event in profile.key_averages() if "_scaled_dot_product" in event.key}
    return sorted(name.rpartition("_scaled_dot_product_")[2] for name in found if "backward" not in name)


# Part 2: parity


def parity(machine: Machine, report: Report) -> None:
    """The demo's model in every precision and layout on this machine against one CPU process."""
    add = lambda *row: report.add("parity", *row)
    text = machine.out / "inputs/wiki"
    words = ("assets/corpus/wiki_vital.jsonl.gz", "--out", text, "--tokenizer", "assets/teacher/tokenizer.model")
    if failure := run(
        python("tools/prepare_data.py", *words, "--valid", "0.05"), machine.out / "logs/text", False, 300
    ):
        return add("shipped text", False, failure)
    on_cpu = [parity_case(machine, precision, f"CPU {precision}", ["parallel.zero=1"]) for precision in TOLERANCE]
    references = run_cases("reference", on_cpu, machine, 1, False)
    cases = {case.name: case for case in parity_cases(machine)}
    found = run_cases("parity", list(cases.values()), machine, machine.world, machine.has_gpu)
    for precision, bounds in TOLERANCE.items():
        reference = run_folder(machine, f"CPU {precision}")
        if failure := references[f"CPU {precision}"].get("failure"):
            add(f"CPU {precision}", False, failure)
            continue
        for name in (name for name in cases if name.startswith(precision) and "stopped" not in name):
            if failure := found[name].get("failure"):
                add(name, False, failure)
                continue
            add(name, *compare(run_folder(machine, name), reference, bounds))
        if precision == "bf16":
            apart = compare(reference, run_folder(machine, "CPU fp32"), bounds)
            add("bf16 against fp32, both on the CPU", *apart)
    for name in ("tensor 2", "tensor 2, sequence false", "pipeline 2", "tensor 2 × pipeline 2"):
        if f"bf16, {name}" not in cases:
            add(f"bf16, {name}", "n/a", f"needs {4 if '×' in name else 2} GPUs")
    for name in (name for name in cases if "stopped" in name):
        resume(machine, report, cases[name], found[name].get("failure"))
    if not can_be_deterministic():
        add("resume, training.deterministic", "n/a", "not an option of this version")
    if failure := own_process("labels", machine):
        add("labels", False, failure)


def parity_case(machine: Machine, precision: str, name: str, overrides: list[str]) -> Case:
    """A run of the demo's model on the shipped text, with as many samples a step on every layout."""
    text = machine.out / "inputs/wiki"
    common = [
        f"run={run_folder(machine, name)}",
        f"data.train={text}/train",
        f"data.valid={text}/valid",
        f"model.context={256 if machine.has_gpu else 64}",
        f"training.global_batch={4 * machine.world}",
        "training.micro_batch=2",
        f"training.steps={PARITY_STEPS}",
        f"training.precision={precision}",
        "teacher.precision=fp32",
        # eps: the key bias has a mathematically zero gradient, which a small eps would blow up to noise.
        *("optimizer.lr=1e-3", "optimizer.min_lr=1e-4", "optimizer.warmup_steps=1", "optimizer.eps=1e-5"),
        *(f"evaluation.every={PARITY_STEPS // 2}", "evaluation.batches=1", "logging.every=1"),
    ]
    return Case(name, "configs/tiny.yaml", common + overrides)


def parity_cases(machine: Machine) -> Iterator[Case]:
    """The runs that are compared with one CPU process. A run that is stopped in the middle is resumed later."""
    layouts = {
        "ZeRO 1": ["parallel.zero=1"],
        "ZeRO 2": ["parallel.zero=2"],
        "ZeRO 3": ["parallel.zero=3", "parallel.reshard_after_forward=true"],
        "ZeRO 3, reshard false": ["parallel.zero=3", "parallel.reshard_after_forward=false"],
        "ZeRO 1, offload": ["parallel.zero=1", "parallel.offload_optimizer=true"],
    }
    if machine.world >= 2:
        layouts |= {
            "tensor 2": ["parallel.zero=1", "parallel.tensor=2"],
            "tensor 2, sequence false": ["parallel.zero=1", "parallel.tensor=2", "parallel.sequence=false"],
            "pipeline 2": ["parallel.zero=1", "parallel.pipeline=2"],
        }
    if machine.world >= 4:
        layouts["tensor 2 × pipeline 2"] = ["parallel.zero=1", "parallel.tensor=2", "parallel.pipeline=2"]
    for zero in (0, 3):
        yield parity_case(machine, "fp32", f"fp32, ZeRO {zero}", [f"parallel.zero={zero}"])
    for name, overrides in layouts.items():
        yield parity_case(machine, "bf16", f"bf16, {name}", overrides)
    half = f"training.stop_after={PARITY_STEPS // 2}"
    yield parity_case(machine, "bf16", "bf16, ZeRO 1, stopped", ["parallel.zero=1", half])
    if can_be_deterministic():
        overrides = ["parallel.zero=1", "training.deterministic=true"]
        yield parity_case(machine, "bf16", "bf16, deterministic", overrides)
        yield parity_case(machine, "bf16", "bf16, deterministic, stopped", [*overrides, half])


def can_be_deterministic() -> bool:
    """Whether this version has the option."""
    return "deterministic" in TrainingConfig.model_fields


def run_folder(machine: Machine, name: str) -> Path:
    """The run folder of a case."""
    return machine.out / "runs" / re.sub(r"\W+", "-", name)


def compare(ours: Path, theirs: Path, bounds: dict[str, float]) -> tuple[bool, str, str]:
    """Whether the losses and gradient norms of two runs agree in every step, the largest relative differences, and the
    bounds."""
    from megacocomix.compare.runs import read_metrics

    one, other = (read_metrics(folder / "metrics.jsonl")["loss"] for folder in (ours, theirs))
    if one.keys() != other.keys():
        return False, f"{len(one)} steps against {len(other)}", "the same steps"
    distances = {key: [abs(one[at][key] - other[at][key]) / abs(other[at][key]) for at in other] for key in bounds}
    unlike = {
        key: max(values, key=lambda value: (value != value, value)) for key, values in distances.items()
    }  # or NaN
    is_right = all(unlike[key] <= bound for key, bound in bounds.items())  # false for NaN
    show = lambda values, form: ", ".join(
        f"{key.removesuffix('_loss')} {value:{form}}" for key, value in values.items()
    )
    return is_right, show(unlike, ".1e"), "at most " + show(bounds, "g")


def resume(machine: Machine, report: Report, case: Case, failure: str | None) -> None:
    """Start the command of a stopped run again, as a user would, and compare it with the run that was not stopped."""
    from megacocomix.compare.identical import compare as identical

    stopped, whole = run_folder(machine, case.name), run_folder(machine, case.name.removesuffix(", stopped"))
    name, logs = f"resume: {case.name.removesuffix(', stopped')}", machine.out / "logs" / stopped.name
    words = ["--config", case.recipe, *(word for word in case.overrides if "stop_after" not in word)]
    command = torchrun(machine.world, logs, "launcher/pretrain.py", *words)
    if failure := failure or run(command, logs, machine.has_gpu, CASE_LIMIT):
        return report.add("parity", name, False, failure)
    answer = identical(whole, stopped)
    if not machine.has_gpu or "deterministic" in case.name:
        report.add("parity", name, answer.identical, answer.text, "identical to the bit")
    else:
        is_right, value, expected = compare(stopped, whole, TOLERANCE["bf16"])
        bits = "identical to the bit" if answer.identical else value
        report.add("parity", name, is_right, bits, f"{expected}; to the bit only with training.deterministic")


def compare_labels(machine: Machine, report: Report) -> None:
    """The share of positions to which this device gives the CPU's labels, in a process of its own. At the start of
    training a concept loss hardly depends on its labels, so the losses do not show this."""
    from megacocomix.data.tokens import TokenDataset, TokenShards
    from megacocomix.teacher.labels import open_labeler

    labels = {}
    for device, precision in (("cpu", "fp32"), (machine.device.type, "fp32"), (machine.device.type, "bf16")):
        overrides = [*parity_case(machine, "fp32", "labels", []).overrides, f"teacher.precision={precision}"]
        config = load_config("configs/tiny.yaml", overrides)
        windows = TokenDataset(TokenShards.open(config.data.valid), config.model.context, None).read(range(32))
        made = open_labeler(config, torch.device(device), 0)(torch.from_numpy(windows).to(device))
        labels[device, precision] = made.sort(-1).values.cpu()
    truth = labels["cpu", "fp32"]
    for precision in TOLERANCE:
        share = (labels[machine.device.type, precision] == truth).all(-1).float().mean().item()
        # fp32: only concepts whose scores are within rounding of each other may swap.
        is_right = share > 0.99 if precision == "fp32" else "figure"
        expected = "over 99%" if precision == "fp32" else "about 90%: scores within bf16's rounding swap"
        report.add(
            "parity", f"labels of a {precision} teacher", is_right, f"{share:.2%} as on the CPU in fp32", expected
        )


# Parts 3 and 4: the teacher, and the suspicions, at the shapes of the recipes


class Sizes(NamedTuple):
    """The random teacher and autoencoder, and the training windows."""

    layers: int
    width: int
    heads: int
    context: int
    vocab: int
    latents: int
    kept: int
    sae_layer: int
    windows: int


GPT2_SMALL = Sizes(12, 768, 12, 1024, 50257, 32768, 32, 5, 512)  # as of the recipes
MINUTE = Sizes(2, 32, 2, 64, 503, 256, 8, 1, 64)


def sizes(machine: Machine) -> Sizes:
    """GPT-2's on a GPU."""
    return GPT2_SMALL if machine.has_gpu else MINUTE


def recipes(machine: Machine) -> dict[str, tuple[Path, list[str]]]:
    """Name → recipe and overrides: 69m as it is, and a few blocks of the width of 1.38b; on a CPU a minute one."""
    inputs, size = machine.out / "inputs", sizes(machine)
    changes = {
        "69m": ("69m", []),
        "1.38b, 4 blocks": ("1.38b", ["model.num_layers=4", "method.insertion_layer=2"]),
    }
    if not machine.has_gpu:
        model = f"{{num_layers: {size.layers}, hidden_size: {size.width}, num_heads: {size.heads}, "
        model += f"context: {size.context}, vocab_size: {size.vocab}}}"
        concepts = [f"method.num_concepts={size.latents}", f"method.num_kept={size.kept}", "method.insertion_layer=1"]
        tokenizer = "data.tokenizer=assets/teacher/tokenizer.model"  # opens sooner than GPT-2's
        changes = {"tiny": ("69m", [f"model={model}", *concepts, "training.micro_batch=2", tokenizer])}
    found = {}
    for name, (recipe, overrides) in changes.items():
        file = ROOT / f"configs/{recipe}.yaml"
        overrides = [
            *(f"teacher.model={inputs}/teacher", f"teacher.sae={inputs}/sae.safetensors"),
            *(f"teacher.sae_layer={size.sae_layer}", "data.dtype=uint16"),
            *(f"data.train={inputs}/train.bin", f"data.valid={inputs}/valid.bin"),
            *("parallel.zero=1", "optimizer.warmup_steps=1"),
            *overrides,
        ]
        windows = 2 * load_config(file, overrides).training.micro_batch * machine.world
        found[name] = (file, [*overrides, f"training.global_batch={windows}"])
    return found


def make_inputs(machine: Machine, report: Report) -> None:
    """A random teacher, autoencoder and tokens: speed and memory do not depend on their values."""
    import numpy as np
    from transformers import GPT2Config, GPT2LMHeadModel

    from megacocomix.sae.file import save_sae
    from megacocomix.sae.model import SAE, SAEForm

    inputs, size = machine.out / "inputs", sizes(machine)
    inputs.mkdir(exist_ok=True)
    torch.manual_seed(0)
    shape = {"n_layer": size.layers, "n_embd": size.width, "n_head": size.heads, "n_positions": size.context}
    GPT2LMHeadModel(GPT2Config(vocab_size=size.vocab, **shape)).save_pretrained(inputs / "teacher")
    sae = SAE(size.width, size.latents, SAEForm(k=size.kept))
    with torch.no_grad():
        sae.encoder.copy_(torch.nn.functional.normalize(torch.randn(size.latents, size.width), dim=1))
        sae.decoder.copy_(sae.encoder)
    save_sae(sae, inputs / "sae.safetensors", {})
    for name, windows in (("train", size.windows), ("valid", 8)):
        tokens = np.random.default_rng(windows).integers(size.vocab, size=windows * size.context + 1)
        tokens.astype(np.uint16).tofile(inputs / f"{name}.bin")


def measure_steps(machine: Machine, report: Report) -> None:
    """The teacher and the suspicions: training steps with one thing changed at a time, and single kernels."""
    cache, logs = machine.out / "inputs/labels", machine.out / "logs/label-cache"
    if failure := own_process("inputs", machine):
        return report.add("teacher", "inputs", False, failure)
    file, overrides = next(iter(recipes(machine).values()))
    words = ("tools/label_concepts.py", "--config", file, "--out", cache, *overrides)
    if failure := run(python(*words), logs, machine.has_gpu, CASE_LIMIT):
        report.add("teacher", "label cache", False, failure)
    for name, recipe in recipes(machine).items():
        cases = list(timed_cases(machine, name, recipe, cache))
        found = run_cases(f"steps of {name}", cases, machine, machine.world, machine.has_gpu)
        found = {case.removeprefix(f"{name}: "): result for case, result in found.items()}
        trace = found["trace"].get("trace")
        kernels = analyse(json.loads(Path(trace).read_text())["traceEvents"]) if trace else None
        teacher_rows(name, found, kernels, report)
        change_rows(name, found, report)
        host_rows(name, found["trace"], kernels, report)
    if failure := own_process("kernels", machine):
        report.add("suspicions", "kernels", False, failure)


def timed_cases(machine: Machine, name: str, recipe: tuple[Path, list[str]], cache: Path) -> Iterator[Case]:
    """The runs of a recipe. The first is what the others change."""
    file, overrides = recipe
    micro_batch = load_config(file, overrides).training.micro_batch

    def case(change: str, options: Iterable[str] = (), measure="time", timer: bool | None = None) -> Case:
        folder = run_folder(machine, f"{name}: {change}")
        return Case(f"{name}: {change}", str(file), [*overrides, f"run={folder}", *options], measure, timer)

    yield case("live labels")
    yield case("cached labels", [f"teacher.labels={cache}"])
    yield case("no teacher", ["method.concept_weight=0"])
    for reshard in ("true", "false"):
        yield case(f"ZeRO 3, reshard {reshard}", ["parallel.zero=3", f"parallel.reshard_after_forward={reshard}"])
    yield case("half micro-batch", [f"training.micro_batch={micro_batch // 2}"])
    yield case("double micro-batch", [f"training.micro_batch={micro_batch * 2}"])
    yield case("timer on", timer=True)
    yield case("timer off", timer=False)
    yield case("trace", measure="trace")


def teacher_rows(name: str, found: dict[str, dict], kernels: Kernels | None, report: Report) -> None:
    """What live labels cost, and whether the teacher runs beside the student."""
    base = found["no teacher"].get("seconds")
    by_flops = 1 + found["live labels"].get("teacher_share", float("nan"))
    for change, expected in {
        "no teacher": "the base of the next two",
        "cached labels": "1.00×: labels are only read",
        "live labels": f"1.00× if the teacher only fills gaps; {by_flops:.2f}× by FLOPs if there are none",
    }.items():
        step_row(report, "teacher", f"{name}: {change}", found[change], base, expected)
    row, expected = f"{name}: the teacher's kernels beside the student's", "at least 50%, on a stream of its own"
    if kernels is None:
        step_row(report, "teacher", row, found["trace"], None, expected)
    elif not kernels.student_launches:
        report.add("teacher", row, "n/a", NO_CPU)
    else:
        streams = f"streams {sorted(kernels.teacher_streams)} beside {sorted(kernels.student_streams)}"
        value = f"{kernels.share:.0%} of {kernels.teacher / found['trace']['steps'] / 1e3:.1f} ms a step; {streams}"
        is_beside = kernels.share >= 0.5 and not kernels.teacher_streams & kernels.student_streams
        report.add("teacher", row, is_beside, value, expected)


def change_rows(name: str, found: dict[str, dict], report: Report) -> None:
    """Step times with one thing changed, and peak memory against the estimate."""
    base = found["live labels"].get("seconds")
    default = {True: "on", False: "off"}.get(found["live labels"].get("timer"), "unknown")
    for change, expected in {
        "timer on": f"above 1.00×: it waits for the device in every micro-batch. Here it is {default} by default",
        "timer off": "1.00× if it is off by default",
        "ZeRO 3, reshard true": "1 GPU: 1.0× to 1.2×; several: slowest, 2 all-gathers a module and micro-batch",
        "ZeRO 3, reshard false": "near 1.00×: every weight is gathered once a step",
        "half micro-batch": "above 1.00×: twice the launches for the same work",
        "double micro-batch": "at or below 1.00×, if it fits",
    }.items():
        step_row(report, "suspicions", f"{name}: {change}", found[change], base, expected)
    row, result = f"{name}: peak memory without a teacher", found["no teacher"]
    if "peak" in result:
        value = f"{result['peak'] / 2**30:.2f} GiB, {result['peak'] / result['estimate']:.2f}× the estimate"
        report.add("suspicions", row, "figure", value, "0.8× to 1.25×")
    else:
        report.add("suspicions", row, "n/a", "no run without a teacher" if "failure" in result else NO_CPU)


def host_rows(name: str, trace: dict, kernels: Kernels | None, report: Report) -> None:
    """What the trace and torch's sync debug mode show of the host."""
    expected = {
        "kernel launches": "a stream holds about 1,000 before the host waits",
        "the host waits": "once a step, at its end, for the gradient norm",
        "synchronisations": "a few; none in a loop over micro-batches or layers",
    }
    if kernels is None or not kernels.student_launches:
        for row, wanted in expected.items():
            report.add("suspicions", f"{name}: {row}", "n/a", NO_CPU if kernels else "no trace", wanted)
        return
    steps, places = trace["steps"], trace["synchronisations"]
    a_micro, of_teacher = kernels.student_launches / steps / trace["micro_batches"], kernels.teacher_launches / steps
    waiting, queueing = (microseconds / steps / 1e3 for microseconds in (kernels.waiting, kernels.queueing))
    values = (
        f"student {a_micro:,.0f} a micro-batch, its share of the update included; teacher {of_teacher:,.0f} a step",
        f"{waiting:.1f} ms a step in synchronisations, {queueing:.1f} ms in launches over 100 µs, of "
        f"{trace['seconds'] * 1e3:.1f} ms under the profiler",
        f"{sum(places.values())} a step: " + ", ".join(f"{places[place]} at {place}" for place in list(places)[:6]),
    )
    for (row, wanted), value in zip(expected.items(), values, strict=True):
        report.add("suspicions", f"{name}: {row}", "figure", value, wanted)


def step_row(report: Report, part: str, name: str, result: dict, base: float | None, expected: str) -> None:
    """The time of a run's step, and its ratio to `base` seconds."""
    if failure := result.get("failure"):
        is_full = "OutOfMemoryError" in failure
        return report.add(part, name, "n/a" if is_full else False, "out of memory" if is_full else failure, expected)
    seconds = result["seconds"]
    ratio = f", {seconds / base:.2f}×" if base else ""
    value = f"{seconds * 1e3:.1f} ms a step, {result['tokens'] / seconds:,.0f} tokens/s a rank{ratio}"
    report.add(part, name, "figure", value, expected)


# Part 4: single kernels, in a process of their own


def time_kernels(machine: Machine, report: Report) -> None:
    """The kernels of which there is a suspicion, at the shapes of a micro-batch."""
    for name, recipe in recipes(machine).items():
        config = load_config(*recipe)
        for measure in (head_product, loss_chunks, compress_step):
            try:
                measure(f"{name}: ", config, machine, report)
            except Exception as error:
                title = f"{name}: {measure.__name__.replace('_', ' ')}"
                report.add("suspicions", title, False, f"{type(error).__name__}: {error}".splitlines()[0][:300])
    encode_in_tf32(machine, report)


def seconds_of(call: Callable[[], object], device: torch.device, repeats: int = 10) -> float:
    """Seconds of a call, the mean after two that are not counted."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    for repeat in range(repeats + 2):
        if repeat == 2:
            wait()
            begun = time.perf_counter()
        call()
    wait()
    return (time.perf_counter() - begun) / repeats


def peak_of(call: Callable[[], object], device: torch.device) -> str:
    """Device memory that a call takes."""
    if device.type != "cuda":
        return f"memory {NO_CPU}"
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return f"{(torch.cuda.max_memory_allocated() - before) / 2**20:,.0f} MiB"


def head_product(name: str, config: Config, machine: Machine, report: Report) -> None:
    """The head's product, forward and backward, with the vocabulary as it is and as a multiple of 64."""
    rows, width = config.training.micro_batch * config.model.context, config.model.hidden_size
    vocab = config.model.vocab_size
    times = []
    for columns in (vocab, -(-vocab // 64) * 64):
        make = lambda *shape: torch.randn(shape, dtype=torch.bfloat16, device=machine.device)
        x, weight, grad = make(rows, width).requires_grad_(), make(columns, width).requires_grad_(), make(rows, columns)
        call = lambda x=x, weight=weight, grad=grad: torch.nn.functional.linear(x, weight).backward(grad)
        times.append((columns, seconds_of(call, machine.device)))
    (_, plain), (_, padded) = times
    value = " against ".join(f"{seconds * 1e3:.2f} ms ({columns} columns)" for columns, seconds in times)
    report.add(
        "suspicions", f"{name}head product", "figure", f"{value}: {plain / padded:.2f}×", "above 1.00×: alignment"
    )


def loss_chunks(name: str, config: Config, machine: Machine, report: Report) -> None:
    """The next-token loss, forward and backward, with chunks of another size."""
    from megacocomix.model import losses

    rows, vocab = config.training.micro_batch * config.model.context, config.model.vocab_size
    logits = torch.randn(rows, vocab, dtype=torch.bfloat16, device=machine.device, requires_grad=True)
    labels = torch.randint(vocab, (rows, 1), device=machine.device)

    def call() -> None:
        logits.grad = None
        losses.label_cross_entropy(logits, labels).backward()

    default, found = losses.CHUNK_ELEMENTS, []
    for factor in (0.25, 1, 4, 16):
        with mock.patch.object(losses, "CHUNK_ELEMENTS", int(default * factor)):
            found.append(
                f"{factor:g}: {seconds_of(call, machine.device) * 1e3:.2f} ms, {peak_of(call, machine.device)}"
            )
    expected = "time within 5% from 1 on; else make chunks larger"
    report.add("suspicions", f"{name}loss, chunks × {default:,} elements", "figure", "; ".join(found), expected)


def compress_step(name: str, config: Config, machine: Machine, report: Report) -> None:
    """Compress, forward and backward, in bf16."""
    from megacocomix.model.concept import Compress

    method, shape = config.method, (config.training.micro_batch, config.model.context, config.method.num_kept)
    layer = Compress(method.num_concepts, config.model.hidden_size).to(machine.device, torch.bfloat16)
    torch.nn.init.normal_(layer.weight)
    torch.nn.init.zeros_(layer.bias)
    value = torch.randn(shape, dtype=torch.bfloat16, device=machine.device, requires_grad=True)
    index = torch.randint(method.num_concepts, shape, device=machine.device)

    def call() -> None:
        for tensor in (value, *layer.parameters()):
            tensor.grad = None
        layer(value, index).sum().backward()

    rows = shape[0] * shape[1] * shape[2]
    size = rows * config.model.hidden_size * 2 / 2**20
    found = f"{seconds_of(call, machine.device) * 1e3:.2f} ms, {peak_of(call, machine.device)}"
    expected = f"memory-bound: the {rows:,} gathered rows are {size:,.0f} MiB in bf16, read or written about 4 times"
    report.add("suspicions", f"{name}Compress", "figure", found, expected)


def encode_in_tf32(machine: Machine, report: Report) -> None:
    """The autoencoder's encoding in fp32 and in TF32, and how often it keeps the same latents."""
    from megacocomix.sae.file import load_sae

    sae = load_sae(machine.out / "inputs/sae.safetensors", machine.device)
    x = torch.randn(4 * sizes(machine).context, sae.width, device=machine.device)
    times, kept = [], []
    for precision in ("highest", "high"):
        torch.set_float32_matmul_precision(precision)
        times.append(seconds_of(lambda: sae.encode(x), machine.device) * 1e3)
        kept.append(sae.encode(x)[0].sort(-1).values)
    torch.set_float32_matmul_precision("highest")
    if not machine.has_gpu:
        return report.add("suspicions", "encoding in TF32", "n/a", f"{NO_CPU}; fp32 {times[0]:.2f} ms")
    same = (kept[0] == kept[1]).all(-1).float().mean().item()
    value = (
        f"{times[0]:.2f} ms, in TF32 {times[1]:.2f} ms: {times[0] / times[1]:.2f}×; {same:.2%} keep the same latents"
    )
    report.add(
        "suspicions",
        "encoding in TF32",
        "figure",
        value,
        "2× or more; latents of equal rank swap, more with random weights",
    )


PROCESSES: dict[str, Callable[[Machine, Report], None]] = {
    "environment": look_around,
    "labels": compare_labels,
    "inputs": make_inputs,
    "kernels": time_kernels,
}

if __name__ == "__main__":
    run_cli(main, is_parallel=True)
