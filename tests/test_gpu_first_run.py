"""benchmarks/gpu_first_run: its CPU form passes; what it concludes from traces, runs, logs and warnings is right."""

import importlib.util
import json
import os
import subprocess
import sys
import warnings

import pytest
import torch

import tiny
from megacocomix.config.load import load_config
from megacocomix.config.rules import check_config


@pytest.fixture(scope="module")
def first(root):
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("gpu_first_run", root / "benchmarks/gpu_first_run.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def event(category, name, start, duration, **arguments):
    return {"ph": "X", "cat": category, "name": name, "ts": start, "dur": duration, "tid": 1, "args": arguments}


def launch(number, at, kernel_at, duration, stream, tid=1, takes=5):
    """A launch at `at` on the host, and its kernel."""
    call = event("cuda_runtime", "cudaLaunchKernel", at, takes, correlation=number) | {"tid": tid}
    return [call, event("kernel", f"kernel {number}", kernel_at, duration, correlation=number, stream=stream)]


def trace(first, teacher_stream=20):
    """The teacher's kernels run in [100, 200), two at once in a part of it, and, launched by the thread of backward
    passes, in [300, 340). Two of the student's cover [150, 320) together."""
    return [
        {"ph": "M", "name": "process_name", "args": {"name": "python"}},
        event("user_annotation", first.TEACHER, 10, 30),
        event("gpu_user_annotation", first.TEACHER, 100, 240),
        *launch(1, 12, 100, 100, teacher_stream),
        *launch(2, 30, 300, 40, teacher_stream, tid=99),
        *launch(5, 33, 120, 40, teacher_stream),
        *launch(3, 50, 150, 100, 7),
        *launch(4, 60, 200, 120, 7, takes=150),
        event("cuda_runtime", "cudaStreamSynchronize", 400, 25),
        event("cpu_op", "aten::mm", 0, 1000),
    ]


def test_overlap_is_the_share_of_the_teachers_kernel_time_in_which_a_kernel_of_the_student_runs(first):
    kernels = first.analyse(trace(first))
    assert (kernels.teacher, kernels.overlapped) == (140, 50 + 20)
    assert kernels.share == 0.5
    assert (kernels.teacher_streams, kernels.student_streams) == ({20}, {7})
    assert (kernels.teacher_launches, kernels.student_launches) == (3, 2)
    assert (kernels.waiting, kernels.queueing) == (25, 150)


def test_kernels_one_after_the_other_do_not_overlap(first):
    one_stream = [
        event("user_annotation", first.TEACHER, 0, 10),
        *launch(1, 5, 100, 50, 7),
        *launch(2, 20, 150, 50, 7),
    ]
    assert first.analyse(one_stream).share == 0
    assert first.analyse([]).share == 0


@pytest.mark.parametrize(("stream", "outcome"), [(20, "PASS"), (7, "FAIL")])
def test_a_teacher_on_the_students_stream_fails(first, tmp_path, stream, outcome):
    report = first.Report(tmp_path)
    timed = {"seconds": 0.1, "tokens": 100.0, "teacher_share": 0.5}
    found = {name: timed for name in ("no teacher", "cached labels", "live labels")} | {"trace": {"steps": 1}}
    first.teacher_rows("69m", found, first.analyse(trace(first, stream)), report)
    assert report.rows()[-1].outcome == outcome


def test_every_row_of_a_gpu_is_written_and_a_run_that_does_not_fit_is_no_failure(first, tmp_path):
    report, machine = first.Report(tmp_path), first.Machine(tmp_path, has_gpu=True, world=8)
    (name, recipe), *_ = first.recipes(machine).items()
    names = [case.name.removeprefix(f"{name}: ") for case in first.timed_cases(machine, name, recipe, tmp_path)]
    timed = {"seconds": 0.1, "tokens": 100.0, "peak": 3.0, "estimate": 2.0, "teacher_share": 0.5, "timer": True}
    found = dict.fromkeys(names, timed) | {"double micro-batch": {"failure": "torch.OutOfMemoryError: CUDA"}}
    found["trace"] = timed | {"steps": 2, "micro_batches": 2, "synchronisations": {"zero.py:1": 3}}
    kernels = first.analyse(trace(first))
    first.teacher_rows(name, found, kernels, report)
    first.change_rows(name, found, report)
    first.host_rows(name, found["trace"], kernels, report)
    rows = {row.name.removeprefix(f"{name}: "): row for row in report.rows()}
    assert [key for key, row in rows.items() if row.outcome not in ("figure", "PASS")] == ["double micro-batch"]
    assert rows["double micro-batch"].outcome == "n/a"
    assert "1.50× the estimate" in rows["peak memory without a teacher"].value
    assert "3 a step: 3 at zero.py:1" in rows["synchronisations"].value


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_the_runs_of_a_gpu_machine_have_valid_configs(first, tmp_path, root, monkeypatch, world):
    monkeypatch.chdir(root)
    machine = first.Machine(tmp_path, has_gpu=True, world=world)
    cases = list(first.parity_cases(machine))
    for name, recipe in first.recipes(machine).items():
        cases += first.timed_cases(machine, name, recipe, tmp_path)
    for case in cases:
        check_config(load_config(case.recipe, case.overrides), world)
    assert ("bf16, tensor 2 × pipeline 2" in {case.name for case in cases}) is (world >= 4)


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
def test_runs_agree_only_within_the_bounds_in_every_step(first, tmp_path, change, is_right):
    reference = write_run(tmp_path / "cpu")
    assert first.compare(write_run(tmp_path / "run", **change), reference, first.TOLERANCE["fp32"])[0] is is_right


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
def machine(first, tmp_path):
    return first.Machine(tmp_path, has_gpu=False, world=2)


def test_a_run_that_crashes_or_hangs_fails_and_the_others_go_on(first, machine, monkeypatch):
    monkeypatch.setattr(first, "torchrun", lambda world, logs, script, option, file: [sys.executable, "-c", JOB, file])
    monkeypatch.setattr(first, "CASE_LIMIT", 2)
    cases = [first.Case(name, "", []) for name in ("one", "crash", "two", "hang", "three")]
    found = first.run_cases("job", cases, machine, 2, False)
    assert all(found[name]["seconds"] == 1.0 for name in ("one", "two", "three"))
    assert found["crash"]["failure"].startswith("RuntimeError: boom; exit code 1")
    assert found["hang"]["failure"].startswith("no progress for 2 s")


def test_a_job_that_cannot_start_fails_all_its_runs_at_once(first, machine, monkeypatch):
    monkeypatch.setattr(first, "torchrun", lambda *_: [sys.executable, "-c", "raise SystemError('no ranks')"])
    found = first.run_cases("job", [first.Case("one", "", []), first.Case("two", "", [])], machine, 2, False)
    assert [found[name]["failure"].partition(";")[0] for name in ("one", "two")] == ["SystemError: no ranks"] * 2
    assert len(list(machine.out.glob("logs/*"))) == 1


def test_the_reason_of_a_failure_is_the_rank_that_failed_first(first, tmp_path):
    for rank, text in ((0, "RuntimeError: NCCL: remote process exited\n"), (1, "ValueError: the cause\n")):
        (tmp_path / f"ranks/{rank}").mkdir(parents=True)
        (tmp_path / f"ranks/{rank}/stderr.log").write_text(f"Traceback\n  File x\n{text}")
    (tmp_path / "stderr.log").write_text("torch.distributed.elastic.multiprocessing.errors.ChildFailedError: \n")
    assert first.reason(tmp_path) == "ValueError: the cause"


def test_only_warnings_of_synchronisations_count_by_their_place(first):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            warnings.warn_explicit("called a synchronizing CUDA operation", UserWarning, "a/parallel/zero.py", 5)
        warnings.warn_explicit("called a synchronizing CUDA operation", UserWarning, "a/model/gpt2.py", 9)
        warnings.warn("Synchronization debug mode is a prototype feature")
    assert list(first.synchronisations(caught).items()) == [("parallel/zero.py:5", 3), ("model/gpt2.py:9", 1)]


def test_the_memory_estimate_counts_what_a_forward_pass_keeps(first, folder):
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
    estimate = first.memory_estimate(config, 0, 1) - 2 * tiny.VOCAB * tokens.numel()  # without the logits' gradient
    assert found == pytest.approx(estimate, rel=0.15)


def test_a_failed_row_fails_the_report(first, tmp_path):
    report = first.Report(tmp_path)
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
    assert len(rows) >= 41
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
