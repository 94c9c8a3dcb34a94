import json
import resource
import signal

import pytest
import torch
from safetensors.torch import load_file

import tiny
from jobs import train
from megacocomix.checkpoint.open import load_model
from processes import run_processes

pytestmark = pytest.mark.slow


def train_on_a_full_disk(config, rank, full_from, full_until):
    """One rank cannot write files of more than 20 kB in its checkpoints number full_from to full_until - 1."""
    import os

    from megacocomix.checkpoint.writer import CheckpointWriter

    write, calls = CheckpointWriter._write, []
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def write_on_a_full_disk(self, *tensors):
        calls.append(1)
        is_full = full_from <= len(calls) < full_until and int(os.environ["RANK"]) == rank
        limit = 20_000 if is_full else resource.RLIM_INFINITY
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        return write(self, *tensors)

    CheckpointWriter._write = write_on_a_full_disk
    return train(config)


def saved(folder, run):
    return sorted(path.name for path in (folder / run / "checkpoints").iterdir())


@pytest.mark.parametrize("rank", [0, 1])
def test_a_full_disk_at_the_end_is_one_clear_line_and_costs_no_earlier_checkpoint(folder, rank):
    run = f"full-{rank}"
    outcomes = run_processes(2, train_on_a_full_disk, tiny.config(folder, run), rank, 2, 9)
    for code, problems in outcomes:
        assert code == 2
        assert f"rank {rank} could not write" in problems[0]
    assert saved(folder, run) == ["step-00000003"]
    assert run_processes(2, train, tiny.config(folder, run)) == [(0, [])] * 2


def test_a_failed_save_is_a_warning_and_the_next_save_makes_up_for_it(folder, capfd):
    config = tiny.config(folder, "full-once", checkpoint={"every": 2})
    assert run_processes(2, train_on_a_full_disk, config, 1, 2, 3) == [(0, [])] * 2
    assert saved(folder, "full-once") == ["step-00000002", "step-00000006"]
    assert "warning: checkpoint" in capfd.readouterr().out


def train_on_two_disks(config, vanish_from, vanish_until):
    """Rank 0 does not see what rank 1 writes, on another host, into its checkpoints number vanish_from to
    vanish_until - 1."""
    import os
    import socket

    from megacocomix import files
    from megacocomix.checkpoint.writer import CheckpointWriter

    files.LATEST = 0.5
    write, calls = CheckpointWriter._write, []

    def write_elsewhere(self, *tensors):
        calls.append(1)
        written = write(self, *tensors)
        if vanish_from <= len(calls) < vanish_until and os.environ["RANK"] == "1":
            for name in written[0]:
                (self._partial / name).unlink()
        return written

    CheckpointWriter._write = write_elsewhere
    socket.gethostname = lambda: f"host-{os.environ['RANK']}"
    return train(config)


def test_a_checkpoint_whose_files_rank_0_does_not_see_is_never_published(folder):
    for code, problems in run_processes(2, train_on_two_disks, tiny.config(folder, "two-disks"), 2, 9):
        assert code == 2
        assert "step-00000006 was not saved: rank 0 on host-0 does not see the files of rank 1 on host-1" in problems[0]
        assert "run must be on a file system that all nodes share" in problems[0]
    assert saved(folder, "two-disks") == ["step-00000003"]


def test_such_a_checkpoint_is_a_warning_while_training_goes_on(folder, capfd):
    config = tiny.config(folder, "two-disks-once", checkpoint={"every": 2})
    assert run_processes(2, train_on_two_disks, config, 2, 3) == [(0, [])] * 2
    assert saved(folder, "two-disks-once") == ["step-00000002", "step-00000006"]
    assert "does not see the files of rank 1 on host-1" in capfd.readouterr().out


def train_while_files_vanish(config, publishes):
    """From its second checkpoint on, files vanish: before they are looked for, or after that."""
    import shutil

    from megacocomix import files
    from megacocomix.checkpoint import writer

    files.LATEST, look, calls = 0.2, writer.missing_files, []

    def lose(folder, sizes):
        calls.append(1)
        if publishes or len(calls) == 1:
            missing = look(folder, sizes)
        if len(calls) > 1:
            shutil.rmtree(folder)
        return missing if publishes or len(calls) == 1 else look(folder, sizes)

    writer.missing_files = lose
    return train(config)


@pytest.mark.parametrize("publishes", [False, True])
def test_files_that_vanish_while_a_checkpoint_is_published_are_named_and_no_other_is_removed(folder, publishes):
    config = tiny.config(folder, f"vanish-{publishes}", checkpoint={"every": 3, "keep": 1})
    ((code, problems),) = run_processes(1, train_while_files_vanish, config, publishes)
    assert code == 2
    assert "step-00000006 was not saved: " in problems[0]
    assert ("is damaged: 0 bytes" if publishes else "has vanished or lost a part") in problems[0]
    assert saved(folder, f"vanish-{publishes}") == ["step-00000003"]


def train_with_a_slow_disk(config):
    """The checkpoint of step 2 is not written before step 3 is done."""
    import threading

    from megacocomix.checkpoint.writer import CheckpointWriter

    write, may_write, steps_before = CheckpointWriter._write, threading.Event(), []

    def write_slowly(self, *tensors):
        if self._state.step == 2:
            assert may_write.wait(100)
        return write(self, *tensors)

    def note(event, trainer):
        if event == "step" and trainer.writer.is_writing:
            steps_before.append(trainer.state.step)
        if (event, trainer.state.step) == ("step", 3):
            may_write.set()

    CheckpointWriter._write = write_slowly
    return train(config, note), steps_before


def test_training_goes_on_while_a_checkpoint_is_written_and_does_not_change_it(folder):
    slow = tiny.config(folder, "slow", checkpoint={"every": 2}, training={"stop_after": 5})
    quick = tiny.config(folder, "quick", checkpoint={"every": 2}, training={"stop_after": 5})
    for outcome, steps_before in run_processes(2, train_with_a_slow_disk, slow):
        assert outcome == (0, [])
        assert steps_before[:2] == [2, 3]  # steps that were begun while it was being written
    assert run_processes(2, train, quick) == [(0, [])] * 2
    for run in ("slow", "quick"):
        assert "step-00000002" in saved(folder, run)
    for file in (folder / "quick/checkpoints/step-00000002").glob("*.safetensors"):
        ours, theirs = (load_file(folder / run / "checkpoints/step-00000002" / file.name) for run in ("slow", "quick"))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def train_with_a_bug_in_the_writer(config):
    from megacocomix.checkpoint import writer

    writer.write_safetensors = lambda *arguments: 1 / 0
    with pytest.raises(ZeroDivisionError):
        train(config)


def test_a_bug_while_writing_ends_the_run_and_leaves_no_checkpoint(folder):
    run_processes(1, train_with_a_bug_in_the_writer, tiny.config(folder, "bug"))
    assert not any(name.startswith("step") for name in saved(folder, "bug"))


def test_the_newest_and_every_mth_checkpoint_are_kept(folder):
    config = tiny.config(folder, "kept", checkpoint={"every": 1, "keep": 2, "keep_every": 3})
    assert run_processes(1, train, config) == [(0, [])]
    assert saved(folder, "kept") == ["step-00000003", "step-00000005", "step-00000006"]
    loaded = load_model(folder / "kept")
    assert loaded.path.name == "step-00000006"
    assert loaded.config == config


def test_damaged_checkpoints_are_skipped_with_a_warning(folder, caplog):
    config = tiny.config(folder, "damaged", checkpoint={"every": 1, "keep": 3})
    assert run_processes(1, train, config) == [(0, [])]
    checkpoints = folder / "damaged/checkpoints"
    weights = checkpoints / "step-00000006/weights-00000.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    (checkpoints / "step-00000005/checkpoint.json").write_text("{")
    assert load_model(folder / "damaged").path.name == "step-00000004"
    assert "skipping" in caplog.text
    assert "expected" in caplog.text
    expected = (folder / "damaged/metrics.jsonl").read_text().splitlines()
    assert run_processes(1, train, config) == [(0, [])]
    assert saved(folder, "damaged") == ["step-00000004", "step-00000005", "step-00000006"]
    assert load_model(folder / "damaged").path.name == "step-00000006"
    again = (folder / "damaged/metrics.jsonl").read_text().splitlines()
    losses = [[json.loads(line)["loss"] for line in lines if '"loss"' in line] for lines in (expected, again)]
    assert losses[1] == losses[0] + losses[0][4:]
    for name in saved(folder, "damaged"):
        (checkpoints / name / "checkpoint.json").unlink()
    ((code, problems),) = run_processes(1, train, config)
    assert code == 2
    assert "is sound" in problems[-1]


def train_and_be_killed(config, delays):
    """For each delay, a child resumes the run and saves at every step. It is killed that long after its first
    checkpoint. Returns for each kill the newest step before it and the steps of sound checkpoints after it."""
    import os
    import time

    # Once, for all children: DeepSpeed imports the latter, and with it torch's compiler, when it is first used.
    import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401

    import megacocomix.training.trainer  # noqa: F401
    from megacocomix.checkpoint.format import list_checkpoints, read_checkpoint_manifest

    seen, newest = [], 0
    for delay in delays:
        child = os.fork()
        if child == 0:
            try:
                train(config)
            finally:
                os._exit(0)
        deadline = time.monotonic() + 100
        while time.monotonic() < deadline:
            found = list_checkpoints(config.run)
            if found and int(found[-1].name[5:]) > newest:
                break
            time.sleep(0.002)
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        found = list_checkpoints(config.run)
        steps = [read_checkpoint_manifest(path, verify=True)["state"]["step"] for path in found]
        seen.append((newest, steps))
        newest = steps[-1]
    return seen


def test_kill_9_at_any_moment_loses_no_checkpoint_and_the_run_goes_on(folder):
    import random

    training = {"steps": 100_000}
    config = tiny.config(
        folder,
        "killed",
        method={"name": "ntp"},
        training=training,
        checkpoint={"every": 1, "keep": 2},
        evaluation={"every": 1000},
        logging={"every": 100},
    )
    delays = [random.Random(seed).uniform(0, 0.15) for seed in range(20)]
    (seen,) = run_processes(1, train_and_be_killed, config, delays)
    assert len(seen) == 20
    for before, steps in seen:
        assert steps[-1] > before
        assert len(steps) <= 3


def test_a_flipped_byte_in_a_checkpoint_is_refused(folder):
    config = tiny.config(folder, "flipped", training={"stop_after": 3})
    assert run_processes(1, train, config) == [(0, [])]
    file = folder / "flipped/checkpoints/step-00000003/optimizer-00000.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    ((code, problems),) = run_processes(1, train, tiny.config(folder, "flipped"))
    assert code == 2
    assert "SHA-256" in problems[0]
    assert "Delete" in problems[0]
