"""The start of a run says which ZeRO stage would exchange less, on a GPU."""

import pytest

import tiny
from jobs import train_all
from processes import run_processes

pytestmark = pytest.mark.slow


def start(configs, device_bytes):
    """Train on a device that has so much memory; None: a CPU."""
    from megacocomix.training import trainer

    if device_bytes:
        trainer._device_bytes = lambda device: device_bytes
    return train_all(configs)


@pytest.mark.parametrize(("device_bytes", "is_advised"), [(None, False), (2**30, True), (500_000, False)])
def test_the_start_advises_a_stage_that_fits_the_device(folder, capfd, device_bytes, is_advised):
    parallel = {"tensor": 2, "zero": 3}
    config = tiny.config(
        folder, f"run-{device_bytes}", parallel=parallel, training={"steps": 1}, optimizer={"warmup_steps": 0}
    )
    assert run_processes(4, start, [config], device_bytes) == [[(0, [])]] * 4
    lines = [line for line in capfd.readouterr().out.splitlines() if "advice:" in line]
    assert len(lines) == is_advised
    if is_advised:
        assert "advice: parallel.zero=0 would exchange up to" in lines[0]
        assert "its states take 0.0 GiB of the device's 1 GiB" in lines[0]
