"""Runs functions on fake CUDA: `python server.py GUARD` reads requests from its input, one JSON object a line, and
answers each with a line. It imports everything once; each request then runs in a fork, so that process groups, patches
and DeepSpeed's globals of one cannot reach the next."""

import ctypes
import gc
import importlib.util
import json
import os
import signal
import sys
import traceback
from pathlib import Path

PR_SET_PDEATHSIG = 1


def main():
    _die_with_parent()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what is printed goes to the errors
    here = Path(__file__).resolve()
    sys.path[:0] = [str(here.parent), str(here.parents[1]), str(here.parents[2])]
    import fake_cuda

    fake_cuda.install(sys.argv[1])
    gc.collect()
    gc.freeze()  # DeepSpeed collects garbage often
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            _die_with_parent()
            print(_answer(json.loads(line)), file=answers, flush=True)
            os._exit(0)
        if os.waitpid(child, 0)[1]:
            print(json.dumps({"error": "the process died: see its errors above"}), file=answers, flush=True)


def _answer(request):
    try:
        file = Path(request["file"])
        specification = importlib.util.spec_from_file_location(file.stem, file)
        module = importlib.util.module_from_spec(specification)
        specification.loader.exec_module(module)
        return json.dumps({"value": getattr(module, request["function"])(*request["arguments"])})
    except BaseException:
        return json.dumps({"error": traceback.format_exc()})


def _die_with_parent():
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    main()
