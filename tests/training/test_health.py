"""Runs with errors in their numbers, their data or their logs."""

import errno
import json
import os

import numpy as np
import pytest

import tiny
from jobs import train, train_all
from megacocomix.errors import UserError
from megacocomix.parallel.runtime import errors_on_all_ranks, start_runtime, stop_runtime
from processes import run_processes

pytestmark = pytest.mark.slow


def train_with_a_nan(configs):
    """The loss of the fourth step, which is not logged, is not a number."""
    from megacocomix.parallel.stage import StageModule

    forward, step = StageModule.forward, [0]

    def spoilt(self, *arguments):
        y, losses = forward(self, *arguments)
        return y * (float("nan") if step[0] == 3 else 1.0), losses

    def note(event, trainer):
        step[0] = trainer.state.step

    StageModule.forward = spoilt
    return train_all(configs, note)


def train_with_another_file_on_rank_1(config, train_path):
    if os.environ["RANK"] == "1":
        config = config.model_copy(update={"data": config.data.model_copy(update={"train": train_path})})
    return train(config)


def test_a_step_that_is_not_finite_ends_the_run_with_1_and_is_never_saved(folder):
    configs = [tiny.config(folder, f"nan{zero}", parallel={"zero": zero}, logging={"every": 100}) for zero in range(4)]
    assert run_processes(2, train_with_a_nan, configs) == [[(1, [])] * 4] * 2
    for zero in range(4):
        assert [path.name for path in (folder / f"nan{zero}/checkpoints").iterdir()] == ["step-00000003"]


def test_a_file_that_one_rank_lacks_is_an_error_of_all_ranks_that_names_it(folder):
    config = tiny.config(folder, "one-rank")
    for code, problems in run_processes(2, train_with_another_file_on_rank_1, config, str(folder / "gone.bin")):
        assert code == 2
        assert len(problems) == 1
        assert "gone.bin" in problems[0]
        assert "rank 1 on" in problems[0]
    assert not (folder / "one-rank").exists()


def lose_a_disk_on_rank_1():
    start_runtime()
    problems = []
    try:
        with errors_on_all_ranks():
            if os.environ["RANK"] == "1":
                raise OSError(errno.EIO, "Input/output error", "data/x.bin")
    except UserError as error:
        problems = error.problems
    stop_runtime()
    return problems


def test_a_file_that_one_rank_cannot_read_is_an_error_of_all_ranks():
    for (problem,) in run_processes(2, lose_a_disk_on_rank_1, timeout=100):
        assert problem.startswith("data/x.bin: Input/output error. (rank 1 on ")


def test_a_token_that_one_rank_reads_outside_the_vocabulary_stops_all(folder):
    tokens = np.fromfile(folder / "train.bin", np.uint16)
    tokens[16 * 40] = 500  # in one window, of shards whose manifest says that there is no such token
    bad = folder / "bad"
    tiny.write_shards(bad, tokens)
    config = tiny.config(
        folder, "bad-token", data={"train": str(bad)}, training={"steps": 30}, checkpoint={"every": 100}
    )
    for code, problems in run_processes(2, train, config):
        assert code == 2
        assert "bad holds token 500" in problems[0]


def test_other_content_under_the_same_name_does_not_resume(folder):
    tiny.write_tokens(folder / "moving.bin", 100 * tiny.CONTEXT)
    data = {"train": str(folder / "moving.bin")}
    assert run_processes(1, train, tiny.config(folder, "moved", data=data, training={"stop_after": 3})) == [(0, [])]
    tiny.write_tokens(folder / "moving.bin", 100 * tiny.CONTEXT, seed=7)
    ((code, problems),) = run_processes(1, train, tiny.config(folder, "moved", data=data))
    assert code == 2
    assert "the content of data.train has changed" in problems[0]


def validation_dropout(config):
    """Train with dropout; note in which mode each forward pass of a validation runs."""
    modes, handles = [], []

    def watch(event, trainer):
        if event == "validate":
            note = lambda module, _: modes.append(module.training)
            handles.append(trainer.stages.parts["0"].register_forward_pre_hook(note))
        elif event == "validated":
            handles.pop().remove()

    assert train(config, watch) == (0, [])
    return modes


def test_validation_runs_without_dropout(folder):
    (modes,) = run_processes(1, validation_dropout, tiny.config(folder, "dropout", model={"dropout": 0.5}))
    assert modes
    assert not any(modes)


def test_without_a_key_wandb_gets_the_metrics_offline_and_a_resumed_run_goes_on_in_the_same(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))  # no key in ~/.netrc
    for name in ("WANDB_MODE", "WANDB_API_KEY", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    logging = {"wandb": True, "tensorboard": True}
    for stop in (3, None):
        config = tiny.config(folder, "sinks", logging=logging, training={"stop_after": stop})
        assert run_processes(1, train, config) == [(0, [])]
    run = folder / "sinks"
    wandb_id = (run / "wandb_id").read_text()
    assert len(list(run.glob(f"wandb/offline-run-*-{wandb_id}"))) == 2
    assert len(list(run.glob("tensorboard/events*"))) == 2
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 6 + 2
    assert len(json.loads((run / "code.json").read_text())["starts"]) == 2


def test_a_truncated_line_is_removed_when_the_run_resumes(folder):
    config = tiny.config(folder, "truncated", training={"stop_after": 3})
    assert run_processes(1, train, config) == [(0, [])]
    with open(folder / "truncated/metrics.jsonl", "a") as file:
        file.write('{"step": 4, "lo')
    assert run_processes(1, train, tiny.config(folder, "truncated")) == [(0, [])]
    lines = (folder / "truncated/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines if '"loss"' in line] == [1, 2, 3, 4, 5, 6]


def test_weights_that_the_last_step_made_useless_are_not_a_finished_run(folder):
    config = tiny.config(folder, "huge-lr", optimizer={"lr": 1e30}, training={"steps": 2}, logging={"every": 1})
    assert run_processes(1, train, config) == [(1, [])]
    lines = (folder / "huge-lr/metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["valid_loss"] is None
