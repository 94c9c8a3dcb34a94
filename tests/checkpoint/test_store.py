import resource
import signal

import pytest

import tiny
from jobs import train
from megacocomix.errors import UserError
from megacocomix.model.load import load_model
from processes import run_processes

pytestmark = pytest.mark.slow


def train_on_a_full_disk(config, rank):
    """One rank cannot write files of more than 20 kB from its second checkpoint on."""
    import os

    import megacocomix.training.trainer as trainer

    save, calls = trainer.save_checkpoint, []

    def save_then_fill(*arguments):
        calls.append(1)
        if len(calls) == 2 and int(os.environ["RANK"]) == rank:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
        return save(*arguments)

    trainer.save_checkpoint = save_then_fill
    return train(config)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_full_disk_is_one_clear_line_and_costs_no_earlier_checkpoint(folder, rank):
    run = f"full-{rank}"
    outcomes = run_processes(2, train_on_a_full_disk, tiny.config(folder, run), rank)
    for code, problems in outcomes:
        assert code == 2
        assert f"rank {rank} could not write" in problems[0]
    assert [path.name for path in (folder / run / "checkpoints").iterdir()] == ["step-00000003"]
    assert run_processes(2, train, tiny.config(folder, run)) == [(0, [])] * 2


def test_the_newest_checkpoints_are_kept_and_damage_is_refused(folder):
    config = tiny.config(folder, "kept", checkpoint={"every": 1, "keep": 2})
    assert run_processes(1, train, config) == [(0, [])]
    checkpoints = folder / "kept/checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step-00000005", "step-00000006"]
    loaded = load_model(folder / "kept")
    assert loaded.path.name == "step-00000006"
    assert loaded.config == config
    weights = checkpoints / "step-00000006/weights-00000.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    with pytest.raises(UserError, match=r"is damaged: \d+ bytes, expected"):
        load_model(folder / "kept")


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
