"""The CUDA kernels that training, labelling and the optimizer use, forward and backward: kernels.txt lists each
operation with the dtypes it gets and the first torch that has it on CUDA. Written anew by

    python -m pytest tests/gpu_shaped/test_kernels.py --write-kernels

That an operation has a CUDA kernel is read from torch's own table. That table has no dtypes, so kernels that lack one
are listed here by name."""

import configparser
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import yaml

TABLE = Path(__file__).with_name("kernels.txt")
SETUP = Path(__file__).parents[2] / "setup.cfg"
# Operation and dtype → the first torch that has it on CUDA. https://github.com/pytorch/pytorch/issues/185808
GAPS = {
    ("_embedding_bag_per_sample_weights_backward", "bfloat16"): "2.13",
    ("_embedding_bag_per_sample_weights_backward", "float16"): "2.13",
}
# Function of another module of this folder, and its arguments.
RUNS = [
    ("test_engine_on_fake_cuda", "train", [[1]]),
    ("test_engine_on_fake_cuda", "train", [[1, "fp32", 2, 2]]),
    ("test_engine_on_fake_cuda", "train", [[2]]),
    ("test_engine_on_fake_cuda", "train", [[3, "bf16", 2, 1]]),
    ("test_stages", "run_stages", ["69m", 2, 0, {"parallel.tensor": 2, "parallel.sequence": "false"}]),
    ("test_stages", "run_stages", ["69m", 2, 1, {"method.name": "cocomix+kd", "parallel.tensor": 2}]),
    ("test_stages", "run_stages", ["69m", 1, 0, {"method.name": "direct-hidden", "method.interleave_every": 4}]),
    ("test_stages", "run_stages", ["69m", 1, 0, {"model.dropout": 0.1, "training.recompute": "full"}]),
    ("test_memory_and_launches", "label", []),
    ("test_teacher", "make_targets", [{"name": "activation"}, {"k": 32}, "resid_post_attn"]),
    ("test_teacher", "make_targets", [{"name": "direct-hidden", "target_size": 96}, {}, "resid_post_mlp"]),
]


def kernels_of(module, function, arguments):
    """In the process with fake CUDA: the kernels that a run uses."""
    import importlib

    from recorders import Kernels

    run = getattr(importlib.import_module(module), function)
    with Kernels() as kernels:
        run(*arguments)
    return sorted(kernels.launched)


@pytest.fixture(scope="module")
def used(on_fake_cuda):
    """(operation, dtypes) of every kernel."""
    return sorted({tuple(kernel) for run in RUNS for kernel in on_fake_cuda(kernels_of, *run)})


def first_torch(operation, dtypes):
    """The first torch that has a kernel on CUDA, as far as this file knows."""
    name = operation.partition(".")[0]
    return max([GAPS.get((name, dtype), oldest_torch()) for dtype in dtypes.split()], key=version)


def oldest_torch():
    """The oldest torch that setup.cfg allows."""
    setup = configparser.ConfigParser()
    setup.read(SETUP)
    requirements = setup["options"]["install_requires"].split()
    return next(each.removeprefix("torch>=") for each in requirements if each.startswith("torch>="))


def version(text):
    return tuple(map(int, text.split(".")))


def cuda_kernels():
    """Operation → whether torch's table of operations gives it a CUDA kernel, its own or a composition of others."""
    file = Path(find_spec("torchgen").origin).parent / "packaged/ATen/native/native_functions.yaml"
    entries = yaml.load(file.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    by_name = {entry["func"].partition("(")[0]: entry for entry in entries}

    def has_kernel(entry):
        if delegate := entry.get("structured_delegate"):
            return has_kernel(by_name[delegate])
        if "ufunc_inner_loop" in entry:  # torch writes both its CPU and its CUDA kernel
            return True
        keys = [key.strip() for keys in entry.get("dispatch", ["Composite"]) for key in keys.split(",")]
        return any(key == "CUDA" or key.startswith("Composite") for key in keys)

    return {name: has_kernel(entry) for name, entry in by_name.items()}


def test_the_table_lists_the_kernels_that_are_used(used, request):
    release = ".".join(torch.__version__.split(".")[:2])
    lines = [f"{operation} | {dtypes} | {first_torch(operation, dtypes)}" for operation, dtypes in used]
    title = f"# Kernels that are used with torch {release}: operation | dtypes | first torch that has it on CUDA"
    table = "\n".join([title, *lines, ""])
    if request.config.getoption("--write-kernels", default=False):
        TABLE.write_text(table)
    written = TABLE.read_text()
    if written.partition(":")[0] != title.partition(":")[0]:
        pytest.skip(f"{TABLE.name} was written with another torch")
    assert written == table


def test_every_operation_has_a_cuda_kernel(used):
    exists = cuda_kernels()
    assert [operation for operation, _ in used if not exists.get(operation)] == []
    assert len(used) > 100


def test_an_operation_without_a_cuda_kernel_is_found():
    exists = cuda_kernels()
    assert exists["add.Tensor"] and exists["_fused_adamw_"] and not exists["mkldnn_linear"]


def test_the_oldest_torch_has_every_kernel(used):
    oldest = oldest_torch()
    newer = [kernel for kernel in used if version(first_torch(*kernel)) > version(oldest)]
    assert newer == []
