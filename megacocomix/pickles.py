"""Read files of torch.save without running any code that their pickles ask for.

torch's weights-only unpickler builds tensors and plain containers. Any other class must be on a list. Megatron-LM keeps
more than weights in its files: argparse.Namespace and numpy's array constructors are allowed as they are; Megatron's
and DeepSpeed's own classes (enumerations, loss scalers) are replaced by inert stand-ins that do nothing.
"""

import argparse
import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from megacocomix.errors import UserError
from megacocomix.files import check_downloaded, damaged

STAND_INS = ("megatron.", "deepspeed.")
NUMPY = ("_reconstruct", "scalar")
NUMBERS = np.typecodes["AllInteger"] + np.typecodes["AllFloat"] + "?"


class Inert:
    """Stands in for a class of another package: it accepts any arguments and does nothing."""

    def __init__(self, *arguments):
        pass


@contextmanager
def allow_list(path: Path, *classes: type) -> Iterator[None]:
    """Within this context torch.load(path, weights_only=True) accepts `classes` and those in the module's docstring.

    Raises UserError if the file needs any other class, or cannot be read.
    """
    allowed = [*classes, argparse.Namespace, np.ndarray, np.dtype, *{type(np.dtype(kind)) for kind in NUMBERS}]
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
        allowed += [(getattr(np._core.multiarray, name), f"{module}.{name}") for name in NUMPY]
    with torch.serialization.safe_globals(allowed):
        unknown = _unknown_globals(path)
    refused = [name for name in unknown if not name.startswith(STAND_INS)]
    if refused:
        raise UserError(
            f"{path} wants to run {' '.join(refused)} when it is unpickled; refused, nothing of it was run. "
            "Only tensors, plain values and argparse.Namespace are read."
        )
    with torch.serialization.safe_globals([*allowed, *((type(name, (Inert,), {}), name) for name in unknown)]):
        yield


def _unknown_globals(path: Path) -> list[str]:
    try:
        if not _is_zip(path):
            return []  # torch's older format cannot be listed; its unpickler refuses classes that are not allowed
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except (ValueError, RuntimeError, EOFError, OSError, pickle.UnpicklingError, AssertionError) as error:
        raise damaged(path, error) from None


def _is_zip(path: Path) -> bool:
    """Whether the file begins as a zip file. A truncated one still does."""
    with open(path, "rb") as file:
        return file.read(4) == b"PK\x03\x04"


def load_pickle(path: Path) -> dict:
    """The content of a file of torch.save. If the format allows it, tensors stay on disk until they are used."""
    if not path.is_file():
        raise UserError(f"{path} does not exist.")
    with allow_list(path):
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
        except pickle.UnpicklingError as error:
            check_downloaded(path)
            reason = str(error).partition("WeightsUnpickler error:")[2].strip().split("\n")[0]
            raise UserError(f"{path} cannot be read as weights only, nothing of it was run: {reason:.150}") from None
        except (RuntimeError, EOFError, OSError, ValueError, TypeError, AttributeError, KeyError, IndexError) as error:
            raise damaged(path, error) from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not a checkpoint.")
    return content


@contextmanager
def weights_only() -> Iterator[None]:
    """Within this context every torch.load loads weights only, even if its caller asks otherwise."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before
