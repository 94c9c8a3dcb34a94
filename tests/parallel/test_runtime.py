"""Processes that cannot meet, or have no device."""

import os
import socket

import pytest
import torch

from megacocomix.errors import UserError
from megacocomix.parallel.runtime import local_device, name_ranks, start_runtime
from processes import run_processes


def start_on_an_interface(name):
    os.environ["GLOO_SOCKET_IFNAME"] = name
    try:
        start_runtime()
    except UserError as error:
        return error.problems


@pytest.mark.slow
def test_processes_that_cannot_connect_name_address_interfaces_and_what_to_export(capfd):
    found = run_processes(2, start_on_an_interface, "nonesuch0")
    for rank, (line,) in enumerate(found):
        assert "\n" not in line
        assert f"rank {rank} of 2 on {socket.gethostname()} could not connect to the others at 127.0.0.1:" in line
        assert "GLOO_SOCKET_IFNAME (nonesuch0) and NCCL_SOCKET_IFNAME (not set)" in line
        assert line.endswith(f"This host has {' '.join(name for _, name in socket.if_nameindex())}.")
    # Rank 0's is printed by the command; any other may be the only one that cannot connect.
    assert f"error: {found[1][0]}" in capfd.readouterr().err


def test_a_process_without_a_gpu_of_its_own_says_so_itself(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert local_device(0) == torch.device("cuda", 0)
    with pytest.raises(UserError) as error:
        local_device(1)
    assert capsys.readouterr().err == f"error: {error.value}\n"
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert local_device(1) == torch.device("cpu")


def start_below_mpirun():
    """As mpirun starts one torchrun a host: Open MPI's ranks are those of the hosts. What DeepSpeed compares."""
    os.environ["OMPI_COMM_WORLD_LOCAL_RANK"] = "0"
    start_runtime()
    return os.environ["LOCAL_RANK"], os.environ["OMPI_COMM_WORLD_LOCAL_RANK"]


@pytest.mark.slow
def test_open_mpis_rank_on_a_host_is_the_one_that_deepspeed_gets():
    assert run_processes(2, start_below_mpirun) == [("0", "0"), ("1", "1")]


def test_ranks_are_named_host_by_host():
    assert name_ranks({1: "a", 2: "a", 3: "b"}) == "ranks 1 2 on a, rank 3 on b"
