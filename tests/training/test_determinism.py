"""training.deterministic: what it sets, and that every operation of a step has a deterministic form."""

import itertools
import os

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

import tiny
from jobs import train_all
from megacocomix.config.method import PRESETS
from megacocomix.errors import UserError
from megacocomix.training.determinism import set_determinism
from megacocomix.training.run_folder import check_run_folder, write_run_folder
from processes import run_processes

# Operations that raise an error on a GPU under the option: torch.use_deterministic_algorithms's documentation (2.13).
RAISING = {
    *(f"{kind}pool{n}d_backward" for kind in ("avg_", "_adaptive_avg_", "adaptive_max_") for n in (2, 3)),
    *(f"fractional_max_pool{n}d_backward" for n in (2, 3)),
    *(f"max_unpool{n}d" for n in (1, 2, 3)),
    *(f"reflection_pad{n}d_backward" for n in (1, 2, 3)),
    *(f"upsample_{kind}_backward" for kind in ("linear1d", "bilinear2d", "bicubic2d", "trilinear3d")),
    *("nll_loss_forward", "nll_loss2d_forward", "_ctc_loss_backward", "put_", "put", "histc", "bincount"),
    *("median", "nanmedian", "kthvalue", "grid_sampler_2d_backward", "grid_sampler_3d_backward", "scatter_reduce"),
}


class Recorder(TorchDispatchMode):
    """The names of all operations in this context that have no deterministic form, and of all operations."""

    def __init__(self):
        super().__init__()
        self.raising, self.all = set(), set()

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        name = function.overloadpacket.__name__
        self.all.add(name)
        is_float_sum = name in ("cumsum", "cumsum_") and arguments[0].is_floating_point()
        modes = [each for each in arguments if type(each) is int]
        is_maximum = name.startswith("_embedding_bag") and 2 in modes
        if name.removesuffix(".out") in RAISING or is_float_sum or is_maximum:
            self.raising.add(name)
        return function(*arguments, **(keywords or {}))


def record(configs):
    """The operations of these runs that would raise an error, and whether the others were seen."""
    with Recorder() as recorder:
        assert train_all(configs) == [(0, [])] * len(configs)
    return recorder.raising, {"_scaled_dot_product_flash_attention_for_cpu_backward", "scatter_add_"} - recorder.all


def one_step(folder, run, method, **sections):
    training = {"steps": 1, "deterministic": True}
    optimizer = {"warmup_steps": 0}
    return tiny.config(folder, run, method={"name": method}, training=training, optimizer=optimizer, **sections)


@pytest.mark.slow
@pytest.mark.parametrize("tensor", [1, 2])
def test_every_operation_of_a_step_has_a_deterministic_form(folder, tensor):
    configs = [
        one_step(folder, f"{name}-{tensor}", name, model={"dropout": 0.1}, parallel={"tensor": tensor, "zero": zero})
        for name, zero in zip(PRESETS, itertools.cycle((3, 1, 0, 2)), strict=False)
    ]
    assert run_processes(tensor, record, configs) == [(set(), set())] * tensor


def test_an_operation_without_a_deterministic_form_is_noticed():
    with Recorder() as recorder:
        torch.rand(3).cumsum(0), torch.ones(3, dtype=torch.int64).cumsum(0), torch.rand(9).histc()
    assert recorder.raising == {"cumsum", "histc"}


@pytest.mark.slow
def test_on_a_cpu_the_option_changes_no_bit(folder):
    configs = [tiny.config(folder, f"bits-{on}", training={"steps": 3, "deterministic": on}) for on in (False, True)]
    assert run_processes(1, train_all, configs) == [[(0, [])] * 2]
    off, on = (
        load_file(folder / f"bits-{is_on}/checkpoints/step-00000003/weights-00000.safetensors")
        for is_on in (False, True)
    )
    assert all(torch.equal(off[name], on[name]) for name in off)


@pytest.fixture
def flags():
    yield
    set_determinism(False)


def test_the_option_holds_for_one_run_and_is_taken_back_by_the_next(flags):
    set_determinism(True)
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert not torch.utils.deterministic.fill_uninitialized_memory
    set_determinism(False)
    assert not torch.are_deterministic_algorithms_enabled()


def test_cublas_gets_a_deterministic_workspace_unless_the_user_chose_another(flags, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in ("CUBLAS_WORKSPACE_CONFIG", "NCCL_NVLS_ENABLE"):
        monkeypatch.delenv(name, raising=False)
    set_determinism(False)
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    set_determinism(True)
    assert (os.environ["CUBLAS_WORKSPACE_CONFIG"], os.environ["NCCL_NVLS_ENABLE"]) == (":4096:8", "0")
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    set_determinism(True)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:2:16:8")
    with pytest.raises(UserError, match="it is :4096:2:16:8: unset it"):
        set_determinism(True)


def test_it_may_change_between_two_starts(tmp_path):
    first = tiny.config(tmp_path)
    write_run_folder(first, check_run_folder(first), {}).close()
    check_run_folder(tiny.config(tmp_path, training={"deterministic": True}))
