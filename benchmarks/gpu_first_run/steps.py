"""Training steps at the shapes of the recipes, with one thing changed at a time."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from benchmarks.gpu_first_run.cases import CASE_LIMIT, Case, run_cases
from benchmarks.gpu_first_run.jobs import Machine, own_process, python, run
from benchmarks.gpu_first_run.recipes import recipes
from benchmarks.gpu_first_run.report import NO_CPU, Report
from benchmarks.gpu_first_run.traces import Kernels, analyse
from megacocomix.config.load import load_config


def measure_steps(machine: Machine, report: Report) -> None:
    """Make the inputs and a label cache, run all cases of the recipes, add their rows."""
    cache, logs = machine.out / "inputs/labels", machine.out / "logs/label-cache"
    if not own_process("inputs", "teacher", machine, report):
        return
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


def timed_cases(machine: Machine, name: str, recipe: tuple[Path, list[str]], cache: Path) -> Iterator[Case]:
    """The runs of a recipe. The first is what the others change."""
    file, overrides = recipe
    micro_batch = load_config(file, overrides).training.micro_batch

    def case(change: str, options: Iterable[str] = (), measure="time", timer=False) -> Case:
        folder = machine.run_folder(f"{name}: {change}")
        return Case(f"{name}: {change}", str(file), [*overrides, f"run={folder}", *options], measure, timer)

    yield case("live labels")
    yield case("cached labels", [f"teacher.labels={cache}"])
    yield case("no teacher", ["method.concept_weight=0"])
    yield case("ZeRO 1", ["parallel.zero=1", "parallel.reshard_after_forward=null"])
    for reshard in ("true", "false"):
        yield case(f"ZeRO 3, reshard {reshard}", ["parallel.zero=3", f"parallel.reshard_after_forward={reshard}"])
    yield case("half micro-batch", [f"training.micro_batch={micro_batch // 2}"])
    yield case("double micro-batch", [f"training.micro_batch={micro_batch * 2}"])
    yield case("timer on", timer=True)
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
    for change, expected in {
        "timer on": "above 1.00×: it waits for the device in every micro-batch",
        "ZeRO 1": "near 1.00×; 69m's own layout",
        "ZeRO 3, reshard true": "1 GPU: 1.0× to 1.2×; several: slowest, 2 all-gathers a module and micro-batch",
        "ZeRO 3, reshard false": "near 1.00×: every weight is gathered once a step; 1.38b's own layout",
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
        "kernel launches": "the teacher's at most about 1,000, which is what a stream holds before the host waits",
        "the host waits": "once a step, at its end, for the gradient norm",
        "synchronisations": "a few; none in a loop over micro-batches or layers",
    }
    if kernels is None or not kernels.student_launches:
        for row, wanted in expected.items():
            report.add("suspicions", f"{name}: {row}", "n/a", NO_CPU if kernels else "no trace", wanted)
        return
    steps, places = trace["steps"], trace["synchronisations"]
    micro_batches = steps * trace["micro_batches"]
    student, teacher = kernels.student_launches / micro_batches, kernels.teacher_launches / micro_batches
    waiting, queueing = (microseconds / steps / 1e3 for microseconds in (kernels.waiting, kernels.queueing))
    values = (
        f"a micro-batch: student {student:,.0f}, its share of the update included; teacher {teacher:,.0f}",
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
