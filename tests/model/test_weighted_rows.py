"""The weighted sum of rows in the concept module, against embedding_bag and fp64."""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from megacocomix.model.concept import weighted_rows

C, D = 40, 24


def bag(weight, index, value):
    sums = F.embedding_bag(index.flatten(0, -2), weight, mode="sum", per_sample_weights=value.flatten(0, -2))
    return sums.unflatten(0, index.shape[:-1])


def inputs(*shape, dtype=torch.float32, num_rows=C, width=D):
    """Weight [C, D], indices and values [*shape], gradient [*shape[:-1], D]. Indices may repeat, also in a position."""
    generator = torch.Generator().manual_seed(0)
    weight, value = torch.randn(num_rows, width, generator=generator), torch.randn(shape, generator=generator)
    index = torch.randint(num_rows, shape, generator=generator)
    grad = torch.randn(*shape[:-1], width, generator=generator)
    return weight.to(dtype).requires_grad_(), index, value.to(dtype).requires_grad_(), grad.to(dtype)


def results(function, weight, index, value, grad):
    """→ sums, gradient of the weight, gradient of the values."""
    sums = function(weight, index, value)
    return (sums.detach(), *torch.autograd.grad(sums, (weight, value), grad))


class Recorder(TorchDispatchMode):
    """What was run: names and arguments of operations, and the most numbers in a result."""

    def __init__(self):
        super().__init__()
        self.calls, self.largest = [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **kwargs or {})
        self.calls.append((function.overloadpacket.__name__, args))
        self.largest = max([self.largest, *(x.numel() for x in tree_leaves(made) if torch.is_tensor(x))])
        return made


@pytest.mark.parametrize("shape", [(3, 7, 5), (50, 1), (1, 64), (1, 1, 1)])
def test_sums_and_gradients_are_those_of_embedding_bag(shape):
    given = inputs(*shape)
    for found, expected in zip(results(weighted_rows, *given), results(bag, *given), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


def test_in_bf16_no_result_is_further_from_fp64_than_embedding_bags():
    given = inputs(600, 32, dtype=torch.bfloat16)  # 480 positions keep each row: a sum in bf16 would lose digits
    exact = results(bag, *(x.detach().double().requires_grad_() if x.is_floating_point() else x for x in given))
    error = lambda function: [
        float((found.double() - right).norm() / right.norm())
        for found, right in zip(results(function, *given), exact, strict=True)
    ]
    ours, theirs = error(weighted_rows), error(bag)
    assert all(our <= their * 1.01 for our, their in zip(ours, theirs, strict=True)), (ours, theirs)
    assert max(ours) < 0.002  # one rounding to bf16


def test_gradients_are_those_of_finite_differences():
    weight, index, value, _ = inputs(2, 4, 3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda weight, value: weighted_rows(weight, index, value), (weight, value))


def test_only_the_gradients_that_are_needed_are_made():
    weight, index, value, grad = inputs(6, 3)
    _, of_weight, of_value = results(weighted_rows, weight, index, value, grad)
    with Recorder() as of_one:
        sums = weighted_rows(weight, index, value.detach())
        assert torch.equal(torch.autograd.grad(sums, weight, grad)[0], of_weight)
    with Recorder() as of_other:
        sums = weighted_rows(weight.detach(), index, value)
        assert torch.equal(torch.autograd.grad(sums, value, grad)[0], of_value)
    assert "bmm" not in dict(of_one.calls) and "sort" not in dict(of_other.calls)
    with torch.no_grad():
        assert not weighted_rows(weight, index, value).requires_grad


def test_no_position_means_no_sum_and_a_gradient_of_zeros():
    sums, of_weight, of_value = results(weighted_rows, *inputs(2, 0, 3))
    assert sums.shape == (2, 0, D) and of_value.shape == (2, 0, 3)
    assert torch.equal(of_weight, torch.zeros(C, D))


def test_the_layout_in_memory_does_not_matter():
    weight, index, value, grad = inputs(6, 8, 4)
    expected = results(weighted_rows, weight, index, value, grad)
    strided = lambda x: x.detach().mT.contiguous().mT
    given = strided(weight).requires_grad_(), strided(index), strided(value).requires_grad_(), strided(grad)
    assert not any(x.is_contiguous() for x in given)
    for found, right in zip(results(weighted_rows, *given), expected, strict=True):
        torch.testing.assert_close(found, right, atol=1e-6, rtol=1e-6)


def test_rows_are_gathered_in_chunks_that_do_not_change_the_gradients(monkeypatch):
    given = inputs(32, 8)
    expected = results(weighted_rows, *given)
    monkeypatch.setattr("megacocomix.model.losses.CHUNK_ELEMENTS", 16 * 4 * 8 * D)  # on a CPU, four positions
    with Recorder() as recorder:
        found = results(weighted_rows, *given)
    assert recorder.largest == C * D > 4 * 8 * D  # the gradient of the weight; all gathered rows would be 32 · 8 · D
    for actual, right in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, right, atol=1e-6, rtol=1e-6)


def test_no_operation_lacks_a_gpu_kernel_adds_in_random_order_or_waits_for_the_device():
    with Recorder() as recorder:
        results(weighted_rows, *inputs(32, 8, dtype=torch.bfloat16))
    names = {name for name, _ in recorder.calls}
    assert any(name.startswith("_embedding_bag") for name in names)
    banned = ("backward", "index_add", "index_put", "scatter", "nonzero", "unique", "bincount", "_local_scalar_dense")
    assert not [name for name in names if any(word in name for word in banned)]


def test_entries_of_value_zero_make_no_row_long():
    weight, index, value, grad = inputs(100, 8)
    others = torch.arange(8) >= 2  # as a tensor rank has them: the concepts of other ranks
    index, value = index.masked_fill(others, 0), value.detach().masked_fill(others, 0.0).requires_grad_()
    with Recorder() as recorder:
        found = results(weighted_rows, weight, index, value, grad)
    starts = [args[2] for name, args in recorder.calls if name.startswith("_embedding_bag")][-1]
    assert len(starts) == C and int(starts.diff().max()) < 40  # 20 on average; row 0 would have over 600
    for actual, right in zip(found, results(bag, weight, index, value, grad), strict=True):
        torch.testing.assert_close(actual, right, atol=1e-6, rtol=1e-6)


def test_a_weight_in_fp32_takes_values_in_bf16_as_under_autocast():
    weight, index, value, grad = inputs(6, 3)
    rounded = value.detach().bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        sums, of_weight, of_value = results(weighted_rows, weight, index, rounded, grad)
    expected = results(bag, weight, index, rounded.detach().float().requires_grad_(), grad)
    assert (sums.dtype, of_weight.dtype, of_value.dtype) == (torch.float32, torch.float32, torch.bfloat16)
    for actual, right, close in zip((sums, of_weight, of_value), expected, (1e-6, 1e-6, 0.02), strict=True):
        torch.testing.assert_close(actual.float(), right, atol=close, rtol=close)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpointed_sum_has_the_same_gradients(use_reentrant):
    weight, index, value, grad = inputs(2, 9, 4)
    expected = results(weighted_rows, weight, index, value, grad)
    sums = checkpoint(weighted_rows, weight, index, value, use_reentrant=use_reentrant)
    sums.backward(grad)
    for found, right in zip((sums, weight.grad, value.grad), expected, strict=True):
        assert torch.equal(found, right)


def test_shapes_alone_are_enough():
    with FakeTensorMode():
        weight, value = torch.empty(C, D, requires_grad=True), torch.empty(4, 16, 8, requires_grad=True)
        index, grad = torch.empty(4, 16, 8, dtype=torch.int64), torch.empty(4, 16, D)
        sums, of_weight, of_value = results(weighted_rows, weight, index, value, grad)
    assert (sums.shape, of_weight.shape, of_value.shape) == (grad.shape, weight.shape, value.shape)


def test_it_compiles_to_one_graph():
    given = inputs(2, 9, 4)
    compiled = torch.compile(weighted_rows, fullgraph=True, backend="aot_eager")
    for found, expected in zip(results(compiled, *given), results(weighted_rows, *given), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
