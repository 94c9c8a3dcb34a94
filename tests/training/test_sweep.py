"""Sweeps: finished runs are skipped, failed runs are reported while the others go on, stopped runs are resumed."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import yaml

import tiny
from megacocomix.checkpoint.format import list_checkpoints
from megacocomix.errors import UserError
from megacocomix.training.sweep import plan_jobs, read_plan


@pytest.fixture
def plan(folder, tmp_path):
    """Writes a plan over a tiny recipe; returns its file."""
    recipe = tmp_path / "recipe.yaml"
    values = tiny.values(folder)
    values["data"]["valid"] = str(folder / "val.bin")
    recipe.write_text(yaml.safe_dump(values))

    def write(**changes):
        file = tmp_path / "plan.yaml"
        content = {
            "config": str(recipe),
            "out": str(tmp_path / "runs"),
            "seeds": [1],
            "runs": {"ntp": ["method.name=ntp"]},
        }
        file.write_text(yaml.safe_dump(content | changes, sort_keys=False))
        return file

    return write


def start(root, file, *options):
    return subprocess.Popen(
        [sys.executable, root / "tools/sweep.py", file, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )


def finish(process):
    out, _ = process.communicate(timeout=300)
    return process.returncode, out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": []}, "seeds"),
        ({"runs": {}}, "runs"),
        ({"seed": [1]}, "seed is not an option of a plan. Did you mean seeds?"),
        ({"runs": {"a": ["method.name=cocomics"]}}, "a: "),
        ({"runs": {"a": ["training.steps=0"], "b": ["optimizer.lr=-1"]}}, "b: "),
        ({"config": "nowhere.yaml"}, "nowhere.yaml cannot be read"),
        ({"launch": "torchrun", "world": 3}, "training.global_batch 8 is not a multiple"),
        ({"seeds": [1, 1]}, "seeds names 1 twice"),
        ({"runs": {"a": ["training.seed=7"]}}, "a: training.seed=7 is set by out"),
        ({"overrides": ["run=elsewhere"]}, "overrides: run=elsewhere is set by out"),
        ({"launch": "python -X 'dev"}, "launch: No closing quotation"),
        ({"launch": "nosuchprogram -n 2"}, "launch: nosuchprogram is no program"),
        ({"runs": {"a/b": []}}, "'a/b' is no name of a folder"),
    ],
    ids=str,
)
def test_errors_in_a_plan_are_reported_before_anything_runs(plan, tmp_path, changes, message):
    with pytest.raises(UserError) as caught:
        plan_jobs(read_plan(plan(**changes)))
    assert any(message in line for line in caught.value.problems), caught.value.problems
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("last", ['{"step": null}', "[]", "7", '{"step": 6, "valid_loss"', "\xff"])
def test_a_damaged_last_line_of_the_metrics_is_no_progress_and_no_end(plan, tmp_path, last):
    (job,) = plan_jobs(read_plan(plan()))
    job.checkpoint.mkdir(parents=True)
    (tmp_path / "runs/ntp-s1/metrics.jsonl").write_bytes(last.encode("latin-1") + b"\n")
    assert (job.step, job.is_trained, job.is_done) == (0, False, False)


def test_every_row_is_run_with_every_seed_seed_by_seed(plan):
    jobs = plan_jobs(read_plan(plan(seeds=[3, 1], runs={"ntp": ["method.name=ntp"], "two": ["training.steps=2"]})))
    assert [job.name for job in jobs] == ["ntp-s3", "two-s3", "ntp-s1", "two-s1"]
    assert [job.config.training.seed for job in jobs] == [3, 3, 1, 1]
    assert [job.last_step for job in jobs] == [6, 2, 6, 2]


@pytest.mark.slow
def test_a_failing_run_is_named_the_others_go_on_and_what_is_done_is_skipped(plan, root, tmp_path):
    short = ["training.steps=2"]
    rows = {"ntp": ["method.name=ntp", *short], "pause": ["method.name=pause", *short], "bad": ["data.train=nowhere"]}
    file = plan(runs=rows, at_a_time=2)
    code, out = finish(start(root, file))
    assert code == 1
    assert "failed: bad-s1: exit code 2" in out and "error: nowhere" in out
    assert "ntp-s1: done" in out and "pause-s1: done" in out
    assert (tmp_path / "runs/comparison/comparison.md").is_file()
    evaluated = list((tmp_path / "runs").glob("*/evals/*.json"))
    assert len(evaluated) == 2

    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").glob("*-s1/metrics.jsonl")}
    code, out = finish(start(root, plan(runs={key: rows[key] for key in ("ntp", "pause")})))
    assert code == 0
    assert "2 runs, 2 of them done before" in out and "begins" not in out
    assert times == {path: path.stat().st_mtime_ns for path in times}


@pytest.mark.slow
def test_a_signal_reaches_the_runs_which_save_and_the_sweep_goes_on_later(plan, root, tmp_path):
    file = plan(runs={"long": ["method.name=ntp", "training.steps=20000", "evaluation.every=20000"]})
    process = start(root, file)
    metrics = tmp_path / "runs/long-s1/metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and len(metrics.read_text().splitlines()) > 3):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    code, out = finish(process)
    assert code == 75, out
    saved = list_checkpoints(tmp_path / "runs/long-s1")
    assert len(saved) >= 1
    code, out = finish(start(root, file, "--dry-run"))
    assert code == 0
    step = int(saved[-1].name.removeprefix("step-"))
    assert f"long-s1: step {step} of 20000" in out


@pytest.mark.slow
def test_a_folder_of_another_config_is_refused_and_an_unfinished_run_is_finished(plan, root, tmp_path):
    rows = {"ntp": ["method.name=ntp", "training.steps=2"]}
    assert finish(start(root, plan(runs=rows)))[0] == 0
    with pytest.raises(UserError, match=r"ntp: .*optimizer\.lr"):
        plan_jobs(read_plan(plan(runs=rows, overrides=["optimizer.lr=0.5"])))

    # As if it had been killed after its last save: the last validation is not in the metrics.
    metrics = tmp_path / "runs/ntp-s1/metrics.jsonl"
    whole = metrics.read_text().splitlines(keepends=True)
    assert "valid_loss" in whole[-1]
    metrics.write_text("".join(whole[:-1]) + '{"step": 2, "valid_loss": 4.')
    code, out = finish(start(root, plan(runs=rows)))
    assert code == 0
    assert "1 runs, 0 of them done before" in out and "ntp-s1: resumes after step 2" in out
    last = [json.loads(line) for line in (whole[-1], metrics.read_text().splitlines()[-1])]
    assert {**last[0], "seconds": 0} == {**last[1], "seconds": 0}
