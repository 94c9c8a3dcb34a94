"""On resume a rank reads what it keeps: its tensor shard, and of that the rows of its data rank."""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

import tiny
from jobs import train_all
from megacocomix.checkpoint.store import StoredTensors, _read_slice
from megacocomix.checkpoint.tensors import SafetensorFiles
from megacocomix.parallel.tensor import shard, shard_dim
from megacocomix.parallel.zero import Slice
from processes import run_processes

EMBEDDING, COLUMNS, ROWS, REPLICATED = (
    "embed.tokens.weight",  # split along dim 0, and padded
    "blocks.0.attention.qkv.weight",  # split along dim 0
    "blocks.0.mlp.down.weight",  # split along dim 1
    "blocks.0.norm_1.weight",
)


def read(file, name, whole_shape, tensor, tensor_rank, start, stop):
    """A rank's elements [start, stop) of its tensor shard, as load_checkpoint reads them."""
    shard_shape = shard(name, torch.empty(whole_shape), tensor, tensor_rank).shape
    grid = SimpleNamespace(tensor=tensor, tensor_rank=tensor_rank)
    engine = SimpleNamespace(grid=grid, stages=SimpleNamespace(whole_shapes={name: torch.Size(whole_shape)}))
    own = Slice(name, shard_shape, start, torch.empty(stop - start), False, False)
    return _read_slice(file, name, own, engine)


@pytest.mark.parametrize("tensor", [1, 2, 3])
@pytest.mark.parametrize(
    ("name", "shape"), [(EMBEDDING, (97, 6)), (COLUMNS, (36, 5)), (ROWS, (7, 12)), (REPLICATED, (50,))]
)
def test_any_elements_of_any_shard_are_those_of_the_whole_tensor(tmp_path, name, shape, tensor):
    whole = torch.randn(shape)
    save_file({name: whole}, tmp_path / "x.safetensors")
    file = SafetensorFiles([tmp_path / "x.safetensors"])
    for rank in range(tensor):
        expected = shard(name, whole, tensor, rank).reshape(-1)
        size = len(expected)
        for data in (1, 2, 5, 7, size):
            part = -(-size // data)
            for start in range(0, size, part):
                stop = min(start + part, size)
                assert torch.equal(read(file, name, shape, tensor, rank, start, stop), expected[start:stop])


class Counted:
    """A slice of a safetensors file, with the number of bytes that were taken of it."""

    def __init__(self, unread, kind, counted):
        self.unread, self.get_shape, self.kind, self.counted = unread, unread.get_shape, kind, counted

    def __getitem__(self, bounds):
        part = self.unread[bounds]
        self.counted[self.kind] += part.nbytes
        return part


def resume_and_count(config):
    """Bytes of weights and moments that this rank takes of a checkpoint's files, from its start on."""
    counted, unread = {"weights": 0, "moments": 0}, StoredTensors.unread

    def count(self, name):
        return Counted(unread(self, name), "moments" if name.startswith("exp_avg") else "weights", counted)

    StoredTensors.unread = count
    StoredTensors.read = None  # whole tensors
    assert train_all([with_steps(config, steps) for steps in (2, 4)]) == [(0, [])] * 2
    return counted


def with_steps(config, steps):
    return config.model_copy(update={"training": config.training.model_copy(update={"stop_after": steps})})


@pytest.mark.slow
@pytest.mark.parametrize("zero", [1, 3])
def test_the_ranks_together_read_moments_once_and_weights_twice(folder, zero):
    config = tiny.config(folder, f"run-{zero}", parallel={"tensor": 2, "zero": zero}, checkpoint={"every": 2})
    ranks = run_processes(4, resume_and_count, config)
    checkpoint = folder / f"run-{zero}/checkpoints/step-00000002"
    stored = {
        kind: sum(file.stat().st_size for file in checkpoint.glob(f"{kind}-*")) for kind in ("weights", "optimizer")
    }
    # Rows that cross the bound between two data ranks, and parameters that are not split, are read by both.
    assert stored["optimizer"] * 0.9 < sum(rank["moments"] for rank in ranks) < stored["optimizer"] * 1.3
    assert max(rank["moments"] for rank in ranks) < stored["optimizer"] / 4 * 1.3
    # As masters by all ranks, and as weights by the first data rank, from which the others get them.
    assert stored["weights"] * 1.9 < sum(rank["weights"] for rank in ranks) < stored["weights"] * 2.6
    assert max(rank["weights"] for rank in ranks) < stored["weights"] * (1 / 2 + 1 / 4) * 1.3


def test_of_a_row_layer_only_the_columns_of_the_tensor_rank_are_read(tmp_path):
    assert shard_dim(ROWS) == 1
    save_file({ROWS: torch.ones(8, 64)}, tmp_path / "x.safetensors")
    file = SafetensorFiles([tmp_path / "x.safetensors"])
    assert file.unread(ROWS)[2:4, 32:64].shape == (2, 32)
    assert file.unread(ROWS)[8:8, 0:64].numel() == 0
