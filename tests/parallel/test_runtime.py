"""Processes that cannot meet."""

import os
import socket

import pytest

from megacocomix.errors import UserError
from megacocomix.parallel.runtime import name_ranks, start_runtime
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


def test_ranks_are_named_host_by_host():
    assert name_ranks({1: "a", 2: "a", 3: "b"}) == "ranks 1 2 on a, rank 3 on b"
