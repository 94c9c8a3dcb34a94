"""Files of torch.save → their content, without ever running what a pickle asks to run.

torch's weights-only unpickler builds tensors and plain containers; any other class must be on a list. What Megatron-LM
keeps beside its weights is let in as follows: argparse.Namespace and numpy's array constructors as themselves,
Megatron's and DeepSpeed's own classes (enumerations, loss scalers) as inert stand-ins, of which nothing is ever called.
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

STAND_INS = ("megatron.", "deepspeed.")
NUMPY = ("_reconstruct", "scalar")
NUMBERS = np.typecodes["AllInteger"] + np.typecodes["AllFloat"] + "?"


class Inert:
    """In the place of a class of another package: takes anything and does nothing."""

    def __new__(cls, *arguments):  # noqa: D102
        return super().__new__(cls)

    def __init__(self, *arguments):
        self.arguments = arguments


@contextmanager
def allow_list(path: Path, *classes: type) -> Iterator[None]:
    """Within it torch.load(path, weights_only=True) reads what the module's docstring names, and `classes`.

    Raises UserError where the file wants more than that, or cannot be read.
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
            return []  # torch's older format cannot be looked into; its unpickler refuses what is not allowed
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except (ValueError, RuntimeError, EOFError, OSError, pickle.UnpicklingError, AssertionError) as error:
        raise _damaged(path, error) from None


def _is_zip(path: Path) -> bool:
    """Whether it begins as a zip does; one that was cut short still does."""
    with open(path, "rb") as file:
        return file.read(4) == b"PK\x03\x04"


def load_pickle(path: Path) -> dict:
    """The content of a file of torch.save. Tensors stay on disk until they are used, where the format allows that."""
    if not path.is_file():
        raise UserError(f"{path} does not exist.")
    with allow_list(path):
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
        except pickle.UnpicklingError as error:
            reason = str(error).partition("WeightsUnpickler error:")[2].strip().split("\n")[0]
            raise UserError(f"{path} cannot be read as weights only, nothing of it was run: {reason:.150}") from None
        except (RuntimeError, EOFError, OSError, ValueError, TypeError, AttributeError, KeyError, IndexError) as error:
            raise _damaged(path, error) from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not a checkpoint.")
    return content


@contextmanager
def weights_only() -> Iterator[None]:
    """Make every torch.load in it load weights only, also where the caller asks otherwise."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


def _damaged(path: Path, error: Exception) -> UserError:
    first = str(error).strip().split("\n")[0]
    return UserError(f"{path} is truncated or damaged: {first:.100}.")
