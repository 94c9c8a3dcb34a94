"""benchmarks/gpu_first_run: its CPU form passes; what it concludes from traces, runs, logs and warnings is right."""

import gc
import json
import os
import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch

import tiny
from benchmarks.gpu_first_run import cases, kernels
from benchmarks.gpu_first_run.jobs import Machine, reason
from benchmarks.gpu_first_run.meter import memory_estimate, synchronisations
from benchmarks.gpu_first_run.parity import TOLERANCE, compare, parity_cases
from benchmarks.gpu_first_run.recipes import recipes
from benchmarks.gpu_first_run.report import Report
from benchmarks.gpu_first_run.steps import change_rows, host_rows, teacher_rows, timed_cases
from benchmarks.gpu_first_run.traces import TEACHER, analyse
from megacocomix.config.load import load_config
from megacocomix.config.rules import check_config
from megacocomix.model import concept
from megacocomix.model.concept import weighted_rows
from megacocomix.training.determinism import set_determinism


def event(category, name, start, duration, **arguments):
    return {"ph": "X", "cat": category, "name": name, "ts": start, "dur": duration, "tid": 1, "args": arguments}


def launch(number, at, kernel_at, duration, stream, tid=1, takes=5):
    """A launch at `at` on the host, and its kernel."""
    call = event("cuda_runtime", "cudaLaunchKernel", at, takes, correlation=number) | {"tid": tid}
    return [call, event("kernel", f"kernel {number}", kernel_at, duration, correlation=number, stream=stream)]


def trace(teacher_stream=20):
    """The teacher's kernels run in [100, 200), two at once in a part of it, and, launched by the thread of backward
    passes, in [300, 340). Two of the student's cover [150, 320) together."""
    return [
        {"ph": "M", "name": "process_name", "args": {"name": "python"}},
        event("user_annotation", TEACHER, 10, 30),
        event("gpu_user_annotation", TEACHER, 100, 240),
        *launch(1, 12, 100, 100, teacher_stream),
        *launch(2, 30, 300, 40, teacher_stream, tid=99),
        *launch(5, 33, 120, 40, teacher_stream),
        *launch(3, 50, 150, 100, 7),
        *launch(4, 60, 200, 120, 7, takes=150),
        event("cuda_runtime", "cudaStreamSynchronize", 400, 25),
        event("cpu_op", "aten::mm", 0, 1000),
    ]


def test_overlap_is_the_share_of_the_teachers_kernel_time_in_which_a_kernel_of_the_student_runs():
    shown = analyse(trace())
    assert (shown.teacher, shown.overlapped) == (140, 50 + 20)
    assert shown.share == 0.5
    assert (shown.teacher_streams, shown.student_streams) == ({20}, {7})
    assert (shown.teacher_launches, shown.student_launches) == (3, 2)
    assert (shown.waiting, shown.queueing) == (25, 150)


def test_kernels_one_after_the_other_do_not_overlap():
    one_stream = [
        event("user_annotation", TEACHER, 0, 10),
        *launch(1, 5, 100, 50, 7),
        *launch(2, 20, 150, 50, 7),
    ]
    assert analyse(one_stream).share == 0
    assert analyse([]).share == 0


@pytest.mark.parametrize(("stream", "outcome"), [(20, "PASS"), (7, "FAIL")])
def test_a_teacher_on_the_students_stream_fails(tmp_path, stream, outcome):
    report = Report(tmp_path)
    timed = {"seconds": 0.1, "tokens": 100.0, "teacher_share": 0.5}
    found = {name: timed for name in ("no teacher", "cached labels", "live labels")} | {"trace": {"steps": 1}}
    teacher_rows("69m", found, analyse(trace(stream)), report)
    assert report.rows()[-1].outcome == outcome


def test_compress_is_timed_with_concepts_kept_equally_often_and_with_one_kept_at_every_position(
    machine, folder, monkeypatch
):
    seen = []

    def record(weight, index, value):
        seen.append(index)
        return weighted_rows(weight, index, value)

    monkeypatch.setattr(concept, "weighted_rows", record)
    monkeypatch.setattr(kernels, "seconds_of", lambda call, device: call() or 0.002)
    report = Report(machine.out)
    kernels.compress_step("tiny: ", tiny.config(folder, training={"micro_batch": 4}), machine, report)
    uniform, hot = ((index == 0).any(-1).float().mean() for index in seen)
    assert uniform < 1
    assert hot == 1
    assert [row.value for row in report.rows()] == ["2.00 ms, memory n/a on a CPU"] * 2


@pytest.mark.parametrize("is_on", [True, False])
def test_a_job_is_deterministic_if_its_runs_are(machine, folder, root, monkeypatch, is_on):
    seen, runtime = [], SimpleNamespace(is_main=True, device=torch.device("cpu"))
    monkeypatch.setattr("megacocomix.parallel.runtime.start_runtime", lambda: runtime)
    monkeypatch.setattr("megacocomix.parallel.runtime.stop_runtime", lambda: None)
    is_deterministic = torch.are_deterministic_algorithms_enabled
    monkeypatch.setattr("megacocomix.training.trainer.train", lambda *_: seen.append(is_deterministic()) or 0)
    name = "bf16, deterministic" if is_on else "bf16, ZeRO 1"
    (case,) = [case for case in parity_cases(machine) if case.name == name]
    file = machine.out / "cases.json"
    file.write_text(json.dumps([case._replace(recipe=str(root / case.recipe))._asdict()]))
    try:
        cases.train_cases(file)
    finally:
        set_determinism(False)
        gc.unfreeze()
    assert seen == [is_on]


def test_every_row_of_a_gpu_is_written_and_a_run_that_does_not_fit_is_no_failure(tmp_path):
    report, machine = Report(tmp_path), Machine(tmp_path, has_gpu=True, world=8)
    (name, recipe), *_ = recipes(machine).items()
    names = [case.name.removeprefix(f"{name}: ") for case in timed_cases(machine, name, recipe, tmp_path)]
    timed = {"seconds": 0.1, "tokens": 100.0, "peak": 3.0, "estimate": 2.0, "teacher_share": 0.5}
    found = dict.fromkeys(names, timed) | {"double micro-batch": {"failure": "torch.OutOfMemoryError: CUDA"}}
    found["trace"] = timed | {"steps": 2, "micro_batches": 2, "synchronisations": {"zero.py:1": 3}}
    shown = analyse(trace())
    teacher_rows(name, found, shown, report)
    change_rows(name, found, report)
    host_rows(name, found["trace"], shown, report)
    rows = {row.name.removeprefix(f"{name}: "): row for row in report.rows()}
    assert [key for key, row in rows.items() if row.outcome not in ("figure", "PASS")] == ["double micro-batch"]
    assert rows["double micro-batch"].outcome == "n/a"
    assert "1.50× the estimate" in rows["peak memory without a teacher"].value
    assert "3 a step: 3 at zero.py:1" in rows["synchronisations"].value


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_the_runs_of_a_gpu_machine_have_valid_configs(tmp_path, root, monkeypatch, world):
    monkeypatch.chdir(root)
    machine = Machine(tmp_path, has_gpu=True, world=world)
    runs = list(parity_cases(machine))
    for name, recipe in recipes(machine).items():
        runs += timed_cases(machine, name, recipe, tmp_path)
    for case in runs:
        check_config(load_config(case.recipe, case.overrides), world)
    assert ("bf16, tensor 2 × pipeline 2" in {case.name for case in runs}) is (world >= 4)


def write_run(folder, factor=1.0, steps=3, key="grad_norm"):
    folder.mkdir()
    lines = [{"step": step, "loss": 8.0, "concept_loss": 7.0, "grad_norm": 2.0} for step in range(1, steps + 1)]
    lines[-1][key] *= factor
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.mark.parametrize(
    ("change", "is_right"),
    [
        ({"factor": 1.0001}, True),
        ({"factor": 2}, False),
        ({"factor": 1.001, "key": "loss"}, False),
        ({"factor": float("nan"), "key": "concept_loss"}, False),
        ({"steps": 2}, False),
    ],
)
def test_runs_agree_only_within_the_bounds_in_every_step(tmp_path, change, is_right):
    reference = write_run(tmp_path / "cpu")
    assert compare(write_run(tmp_path / "run", **change), reference, TOLERANCE["fp32"])[0] is is_right


# A job that crashes at the case "crash", hangs at "hang", and trains the others.
JOB = """
import json, pathlib, sys, time
file = pathlib.Path(sys.argv[1])
for name, *_ in map(dict.values, json.loads(file.read_text())):
    with open(file.with_suffix(".results"), "a") as results:
        print(json.dumps({"name": name, "begun": True}), file=results, flush=True)
        if name == "crash":
            raise RuntimeError("boom")
        while name == "hang":
            time.sleep(1)
        print(json.dumps({"name": name, "seconds": 1.0}), file=results)
"""


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path, has_gpu=False, world=2)


def test_a_run_that_crashes_or_hangs_fails_and_the_others_go_on(machine, monkeypatch):
    monkeypatch.setattr(cases, "torchrun", lambda world, logs, *words: [sys.executable, "-c", JOB, words[-1]])
    monkeypatch.setattr(cases, "CASE_LIMIT", 2)
    runs = [cases.Case(name, "", []) for name in ("one", "crash", "two", "hang", "three")]
    found = cases.run_cases("job", runs, machine, 2, False)
    assert all(found[name]["seconds"] == 1.0 for name in ("one", "two", "three"))
    assert found["crash"]["failure"].startswith("RuntimeError: boom; exit code 1")
    assert found["hang"]["failure"].startswith("no progress for 2 s")


def test_a_job_that_cannot_start_fails_all_its_runs_at_once(machine, monkeypatch):
    monkeypatch.setattr(cases, "torchrun", lambda *_: [sys.executable, "-c", "raise SystemError('no ranks')"])
    found = cases.run_cases("job", [cases.Case("one", "", []), cases.Case("two", "", [])], machine, 2, False)
    assert [found[name]["failure"].partition(";")[0] for name in ("one", "two")] == ["SystemError: no ranks"] * 2
    assert len(list(machine.out.glob("logs/*"))) == 1


def test_the_reason_of_a_failure_is_the_rank_that_failed_first(tmp_path):
    for rank, text in ((0, "RuntimeError: NCCL: remote process exited\n"), (1, "ValueError: the cause\n")):
        (tmp_path / f"ranks/{rank}").mkdir(parents=True)
        (tmp_path / f"ranks/{rank}/stderr.log").write_text(f"Traceback\n  File x\n{text}")
    (tmp_path / "stderr.log").write_text("torch.distributed.elastic.multiprocessing.errors.ChildFailedError: \n")
    assert reason(tmp_path) == "ValueError: the cause"


def test_only_warnings_of_synchronisations_count_by_their_place():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            warnings.warn_explicit("called a synchronizing CUDA operation", UserWarning, "a/parallel/zero.py", 5)
        warnings.warn_explicit("called a synchronizing CUDA operation", UserWarning, "a/model/gpt2.py", 9)
        warnings.warn("Synchronization debug mode is a prototype feature")
    assert list(synchronisations(caught).items()) == [("parallel/zero.py:5", 3), ("model/gpt2.py:9", 1)]


def test_the_memory_estimate_counts_what_a_forward_pass_keeps(folder):
    from megacocomix.model.gpt2 import assemble, initialise
    from megacocomix.model.losses import label_cross_entropy, next_token_targets

    size = {"num_layers": 6, "hidden_size": 128, "num_heads": 2, "context": 64}
    config = tiny.config(folder, model=size, training={"micro_batch": 4, "precision": "bf16"})
    model = assemble(config)
    initialise(model, 0)
    model.to(torch.bfloat16)
    kept, weights = {}, {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    tokens = torch.randint(tiny.VOCAB, (4, 64))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits, concepts = model(tokens)
        total = label_cross_entropy(logits, next_token_targets(tokens))
        total += label_cross_entropy(concepts, torch.zeros(*concepts.shape[:2], 1, dtype=torch.int64))
    found = sum(storage.nbytes() for storage in kept.values())
    estimate = memory_estimate(config, 0, 1) - 2 * tiny.VOCAB * tokens.numel()  # without the logits' gradient
    assert found == pytest.approx(estimate, rel=0.15)


def test_a_failed_row_fails_the_report(tmp_path):
    report = Report(tmp_path)
    report.add("parity", "one", True, "a | b", "c")
    assert report.write("a title")
    report.add("teacher", "two", False, "no")
    assert not report.write("a title")
    assert (
        "| one | PASS | a \\| b | c |\n| **The teacher** | | | |\n| two | FAIL" in (tmp_path / "report.md").read_text()
    )
    assert json.loads((tmp_path / "report.json").read_text())["failed"] == ["two"]


@pytest.mark.slow
def test_the_cpu_form_passes_and_has_every_row(root, tmp_path):
    out = tmp_path / "out"
    path = f"{os.path.dirname(sys.executable)}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "VIRTUAL_ENV": sys.prefix}
    command = ["bash", root / "benchmarks/gpu_first_run.sh", "--cpu", "--out", out]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, f"{done.stdout[-5000:]}\n{done.stderr[-3000:]}"
    rows = {row["name"]: row for row in json.loads((out / "report.json").read_text())["rows"]}
    assert len(rows) >= 45
    passed = [f"bf16, ZeRO {zero}" for zero in (1, 2, 3)] + [
        "bf16, tensor 2",
        "bf16, pipeline 2",
        "resume: bf16, ZeRO 1",
    ]
    assert all(rows[name]["outcome"] == "PASS" for name in passed)
    assert all("ms a step" in rows[f"tiny: {name}"]["value"] for name in ("live labels", "cached labels", "no teacher"))
    of_gpus = ("peer access", "tiny: the teacher's kernels beside the student's", "tiny: synchronisations")
    assert all((rows[name]["outcome"], rows[name]["value"]) == ("n/a", "n/a on a CPU") for name in of_gpus)
    assert not (out / "inputs").exists()
