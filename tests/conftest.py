"""Options and settings shared by all tests."""

import os
from pathlib import Path
from unittest.mock import patch

import pytest

# Read before torch or DeepSpeed are imported: the suite runs on the CPU, offline, one thread a process.
os.environ["DS_ACCELERATOR"] = "cpu"
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")

GOLDEN = Path(__file__).parent / "golden" / "small.safetensors"


def pytest_addoption(parser):
    parser.addoption("--golden", default=str(GOLDEN), help="a golden file of the reference implementation")
    parser.addoption("--write-layouts", action="store_true", help="write the table of docs/parallelism.md anew")


def pytest_collection_modifyitems(config, items):
    """Nightly cases run where -m asks for them, and all layouts where their table is written."""
    if "nightly" in config.option.markexpr or config.getoption("--write-layouts"):
        return
    nightly = [item for item in items if item.get_closest_marker("nightly")]
    items[:] = [item for item in items if item not in set(nightly)]
    config.hook.pytest_deselected(items=nightly)


@pytest.fixture(autouse=True)
def environment_is_restored():
    """A command that is run in the test's own process sets the variables of a rank."""
    with patch.dict(os.environ):
        yield


@pytest.fixture(scope="session")
def root() -> Path:
    return Path(__file__).parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with the inputs of a tiny run: see tests/tiny.py."""
    import tiny

    folder = tmp_path_factory.mktemp("tiny")
    tiny.make_inputs(folder)
    return folder
