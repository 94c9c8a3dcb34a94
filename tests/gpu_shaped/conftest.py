"""Starts the processes in which fake CUDA runs."""

import fcntl
import json
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def guard(tmp_path_factory) -> Path:
    """guard.cpp, compiled once for all workers of a run."""
    if not shutil.which("g++"):
        pytest.skip("g++ is missing: fake CUDA needs a guard, which is compiled")
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "popen-gw" in base.name else base
    library = shared / "guard.so"
    with open(shared / "guard.lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            torch = Path(find_spec("torch").origin).parent
            include = [f"-I{torch}/include", f"-I{torch}/include/torch/csrc/api/include"]
            link = [f"-L{torch}/lib", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{torch}/lib"]
            command = ["g++", "-std=c++17", "-w", "-shared", "-fPIC", *include, HERE / "guard.cpp", *link]
            subprocess.run([*command, "-o", library], check=True)
    return library


@pytest.fixture(scope="session")
def on_fake_cuda(guard):
    """`on_fake_cuda(function, *arguments)` calls a top-level function of a test module where there is a CUDA device,
    in a process of its own. Arguments and result are JSON. What it raises comes as a RuntimeError."""
    server = subprocess.Popen(
        [sys.executable, HERE / "server.py", guard], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )

    def call(function, *arguments):
        request = {"file": function.__code__.co_filename, "function": function.__name__, "arguments": arguments}
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        line = server.stdout.readline()
        answer = json.loads(line or '{"error": "the process with fake CUDA has died"}')
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer["value"]

    yield call
    server.stdin.close()
    try:
        server.wait(20)
    finally:
        server.kill()
        server.stdout.close()


def pytest_addoption(parser):
    parser.addoption("--write-kernels", action="store_true", help="write tests/gpu_shaped/kernels.txt anew")
