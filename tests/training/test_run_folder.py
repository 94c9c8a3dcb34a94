"""The run folder: whether all processes share it, and its lock."""

import errno
import fcntl
import os

import pytest

import tiny
from jobs import train
from megacocomix import files
from megacocomix.data import prepare
from megacocomix.errors import UserError
from megacocomix.teacher.label_cache import start_cache
from megacocomix.training.run_folder import check_run_folder, write_run_folder
from megacocomix.training.sweep import Plan, Sweep
from processes import run_processes


def train_in_a_folder_of_its_own(config, nodes):
    os.chdir(nodes / os.environ["RANK"])
    files.LATEST = 0.5
    return train(config)


@pytest.mark.slow
@pytest.mark.parametrize("exists", ["nothing", "runs", "runs/one"])
def test_a_run_folder_on_disks_that_nodes_do_not_share_is_refused_in_one_line(folder, tmp_path, exists):
    for rank in "01":
        (tmp_path / rank).mkdir()
        if exists != "nothing":
            (tmp_path / rank / exists).mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    config = tiny.config(folder, "one").model_copy(update={"run": "runs/one"})
    outcomes = run_processes(2, train_in_a_folder_of_its_own, config, tmp_path)
    assert outcomes[0] == outcomes[1]
    code, (problem,) = outcomes[0]
    assert code == 2
    assert problem.startswith("run runs/one is not one folder for all processes")
    assert "run=PATH. (rank 1 on " in problem
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.slow
def test_a_folder_that_all_share_is_trained_in_and_nothing_is_left_of_the_check(folder):
    assert run_processes(2, train, tiny.config(folder, "shared/run")) == [(0, [])] * 2
    assert not [*folder.rglob(".start-*")]


def test_what_a_killed_check_left_does_not_make_the_folder_another_ones(folder, tmp_path):
    (tmp_path / ".start-00").touch()
    check_run_folder(tiny.config(folder, "x").model_copy(update={"run": str(tmp_path)}))
    (tmp_path / "other").touch()
    with pytest.raises(UserError, match="is not a run folder"):
        check_run_folder(tiny.config(folder, "x").model_copy(update={"run": str(tmp_path)}))


def flock_that_fails(number):
    def flock(file, operation):
        raise OSError(number, os.strerror(number))

    return flock


def test_a_run_goes_on_without_locks_with_a_warning(folder, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(fcntl, "flock", flock_that_fails(errno.ENOSYS))
    write_run_folder(tiny.config(folder, "x"), tmp_path / "run", {"world": 1}).close()
    assert (tmp_path / "run/config.yaml").is_file()
    assert "do not start a second job" in caplog.text


def test_a_second_job_in_a_run_is_refused(folder, tmp_path):
    with write_run_folder(tiny.config(folder, "x"), tmp_path, {"world": 1}):
        with pytest.raises(UserError, match="is being trained by another job"):
            write_run_folder(tiny.config(folder, "x"), tmp_path, {"world": 1})


def test_sweeps_and_data_are_made_without_locks_and_labels_are_not(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(fcntl, "flock", flock_that_fails(errno.ENOLCK))
    with prepare._lock(tmp_path / "data"):
        assert "-o flock" in caplog.text
    caplog.clear()
    plan = Plan.model_construct(out=str(tmp_path / "sweep"), at_a_time=1)
    assert Sweep(plan, [], tmp_path, lambda line: None).run() == 0
    assert "-o flock" in caplog.text
    with pytest.raises(UserError, match="divide the work"):
        start_cache(tmp_path / "labels", None)
