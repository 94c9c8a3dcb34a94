"""What the ranks share after a step is read a step later, unless something is due. Nothing unread is saved."""

import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import tiny
from jobs import train_all
from megacocomix.data.tokens import TokenDataset, TokenShards
from processes import run_processes

pytestmark = pytest.mark.slow

NAN = float("nan")


def config_of(folder, run, save_every=100, log_every=100, **sections):
    """A run in which little is due before its last step, the sixth."""
    every = {"checkpoint": save_every, "logging": log_every, "evaluation": 100}
    return tiny.config(folder, run, **{name: {"every": steps} for name, steps in every.items()}, **sections)


def checkpoints(config):
    return sorted(path.name for path in Path(config.run).glob("checkpoints/*"))


def log_of(config):
    return (Path(config.run) / "logs/rank-00000.log").read_text()


def train_and_note_reads(configs):
    """Train; for each poll its step, and the step after which it was read."""
    from megacocomix.training.trainer import Trainer

    reads, read = [], Trainer._read

    def note(self, poll):
        reads.append((poll.step, self.state.step))
        return read(self, poll)

    Trainer._read = note
    return train_all(configs), reads


def test_each_poll_is_read_once_and_a_step_later_unless_its_step_is_due(folder):
    config = config_of(folder, "reads", log_every=3)
    reads = [(1, 2), (2, 3), (3, 3), (4, 5), (5, 6), (6, 6)]
    assert run_processes(2, train_and_note_reads, [config]) == [([(0, [])], reads)] * 2


def signal_rank_1_in_step_3(configs):
    def send(event, trainer):
        if (event, trainer.state.step, trainer.runtime.rank) == ("step", 2, 1):
            os.kill(os.getpid(), signal.SIGTERM)

    return train_all(configs, send)


def test_a_signal_where_nothing_is_due_saves_and_stops_one_step_later_and_the_run_goes_on(folder):
    stopped, whole = config_of(folder, "stopped"), config_of(folder, "whole")
    assert run_processes(2, signal_rank_1_in_step_3, [stopped]) == [[(75, [])]] * 2
    assert checkpoints(stopped) == ["step-00000004"]
    assert "stopped on a signal after step 4" in log_of(stopped)
    assert run_processes(2, train_all, [stopped, whole]) == [[(0, [])] * 2] * 2
    files = list((Path(whole.run) / "checkpoints/step-00000006").glob("*.safetensors"))
    assert files
    for file in files:
        expected, found = load_file(file), load_file(Path(stopped.run) / "checkpoints/step-00000006" / file.name)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def train_and_count_steps(configs, on_step=lambda trainer: None):
    """Outcomes, and the number of steps that each run began."""
    begun = {config.run: 0 for config in configs}

    def count(event, trainer):
        if event == "step":
            begun[trainer.config.run] += 1
            on_step(trainer)

    return train_all(configs, count), [*begun.values()]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_bad_token_stops_all_ranks_a_step_later_and_before_any_save(folder, rank):
    base = tiny.config(folder)
    order = TokenDataset(TokenShards.open(base.data.train), tiny.CONTEXT, base.training.seed)
    tokens = np.fromfile(folder / "train.bin", np.uint16)
    tokens[order.window_index(3 * 8 + 2 * rank) * tiny.CONTEXT] = 500  # this rank reads it in the fourth step
    tiny.write_shards(folder / f"bad-{rank}", tokens)
    data = {"train": str(folder / f"bad-{rank}")}
    configs = [config_of(folder, f"bad-{rank}-{every}", save_every=every, data=data) for every in (100, 4, 5)]
    for outcomes, begun in run_processes(2, train_and_count_steps, configs):
        for code, (problem,) in outcomes:
            assert code == 2
            assert f"bad-{rank} holds token 500" in problem
            assert f"rank {rank} on" in problem
        assert begun == [5, 4, 5]
    assert [checkpoints(config) for config in configs] == [[], [], []]


def train_with_nans(configs, losses, gradients):
    """The losses of one step are not numbers, on rank 1 alone; of another, the gradients of rank 1 too."""
    from megacocomix.parallel.stage import StageModule

    forward, step = StageModule.forward, [0]

    def spoilt(self, *arguments):
        y, shares = forward(self, *arguments)
        is_rank_1 = os.environ["RANK"] == "1"
        y = y * (NAN if step[0] == gradients and is_rank_1 else 1.0)
        return y, shares * (NAN if step[0] == losses and is_rank_1 else 1.0)

    def note(trainer):
        step[0] = trainer.state.step + 1

    StageModule.forward = spoilt
    return train_and_count_steps(configs, note)


@pytest.mark.parametrize(
    ("losses", "gradients", "save_every", "begun"),
    [(4, None, 100, 5), (4, None, 5, 5), (4, None, 4, 4), (4, 5, 100, 5), (None, 4, 100, 4), (5, None, 6, 6)],
)
def test_a_step_that_is_not_finite_is_named_and_neither_it_nor_the_next_is_saved(
    folder, losses, gradients, save_every, begun
):
    config = config_of(folder, f"nan-{losses}-{gradients}-{save_every}", save_every=save_every)
    assert run_processes(2, train_with_nans, [config], losses, gradients) == [([(1, [])], [begun])] * 2
    assert f"not finite at step {losses or gradients}; this step is not saved" in log_of(config)
    assert checkpoints(config) == []
