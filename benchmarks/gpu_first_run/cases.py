"""Training runs that share a job: a run that crashes or hangs costs the others nothing but a new start."""

import contextlib
import gc
import json
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.gpu_first_run.jobs import MODULE, Machine, file_name, run, torchrun
from benchmarks.gpu_first_run.meter import Measure, Measured, Meter
from benchmarks.gpu_first_run.report import read_lines
from benchmarks.gpu_first_run.traces import marked_teacher
from megacocomix.config.load import load_config
from megacocomix.errors import UserError

CASE_LIMIT = 300  # seconds without progress until a job is ended


class Case(NamedTuple):
    """A training run of a job."""

    name: str
    recipe: str
    overrides: list[str]
    measure: Measure = "nothing"
    timer: bool = False
    """Switch DeepSpeed's throughput timer on."""


def run_cases(job: str, cases: list[Case], machine: Machine, world: int, has_gpu: bool) -> dict[str, dict]:
    """Run the cases one after the other in a job of `world` processes. Results by name; that of a case that failed has
    a `failure`. After a crash or a hang the job is started again with the cases that are left."""
    found: dict[str, dict] = {}
    attempt = 0
    while left := [case for case in cases if case.name not in found]:
        logs = machine.out / "logs" / file_name(f"{job} {attempt}")
        logs.mkdir(parents=True)
        file = logs / "cases.json"
        file.write_text(json.dumps([case._asdict() for case in left]))
        results = file.with_suffix(".results")
        failure = run(torchrun(world, logs, *MODULE, "--cases", file), logs, has_gpu, CASE_LIMIT, results)
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
    """What the ranks of a job do: train each case as launcher/pretrain.py would, and let rank 0 write its result. All
    cases have the first one's training.deterministic, which is read before the processes connect. Returns 0."""
    from megacocomix.parallel.runtime import start_runtime, stop_runtime
    from megacocomix.training.determinism import set_determinism
    from megacocomix.training.trainer import train

    cases = [Case(**record) for record in json.loads(file.read_text())]
    set_determinism(load_config(cases[0].recipe, cases[0].overrides).training.deterministic)
    runtime = start_runtime()
    gc.freeze()  # DeepSpeed collects garbage many times at every start, which takes seconds with all modules' objects

    def write(**record) -> None:
        if runtime.is_main:
            with open(file.with_suffix(".results"), "a") as results:
                results.write(json.dumps(record) + "\n")

    for case in cases:
        write(name=case.name, begun=True)
        meter = Meter(case.measure, case.timer, runtime.device, file.parent / f"{file_name(case.name)}.trace.json")
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
