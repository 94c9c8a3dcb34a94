"""Offloaded states are on the host, but groups of ranks exchange tensors of the device only."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode

from megacocomix.checkpoint.store import gather
from megacocomix.parallel.zero import Slice, _sum_all

DEVICE = torch.device("meta")  # any device but the host's


@pytest.fixture
def exchanged(monkeypatch):
    """The devices of the tensors in collectives."""
    devices = []
    monkeypatch.setattr(dist, "all_reduce", lambda tensor, **_: devices.append(tensor.device))
    monkeypatch.setattr(dist, "all_gather", lambda all_, own, **_: devices.extend(each.device for each in (*all_, own)))
    with FakeTensorMode():
        yield devices


@pytest.mark.parametrize("is_replicated", [False, True])
def test_a_checkpoint_gathers_offloaded_states_through_the_device(exchanged, is_replicated):
    name, shape = "blocks.0.mlp.up.weight", torch.Size((8, 4))
    grid = SimpleNamespace(device=DEVICE, tensor=2, data_group=None, tensor_group=None)
    engine = SimpleNamespace(grid=grid, stages=SimpleNamespace(whole_shapes={name: torch.Size((16, 4))}))
    where = DEVICE if is_replicated else torch.device("cpu")  # states that are not sharded are not offloaded
    values = torch.zeros(32 if is_replicated else 10, device=where)
    whole = gather(Slice(name, shape, 0, values, is_replicated, False), engine)
    assert whole.shape == (16, 4)
    assert whole.device == DEVICE
    assert exchanged == [DEVICE] * (3 if is_replicated else 4)


def test_offloaded_gradients_are_summed_on_the_device_and_return_to_the_host(exchanged):
    gradients = [torch.ones(3), torch.ones(5)]
    _sum_all(gradients, None, DEVICE)
    assert exchanged == [DEVICE]
    assert {each.device.type for each in gradients} == {"cpu"}
