"""Check whether two runs are identical to the bit: every deterministic number in their logs, then their weights.

Numbers are compared in order of steps, because later differences follow from the first one; the answer names the first
step and quantity that differ. Lines that a resume made void do not count.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from megacocomix.checkpoint.format import list_checkpoints, read_checkpoint_manifest
from megacocomix.checkpoint.tensors import SafetensorFiles
from megacocomix.compare.runs import read_metrics
from megacocomix.errors import UserError

WALL_CLOCK = {"seconds", "tokens_per_second", "flops_per_second", "mfu", "memory_gib"}
"""Quantities that may differ between two runs with the same arithmetic."""
KIND_NAMES = {"loss": "training", "valid_loss": "validation"}


@dataclass(frozen=True)
class Answer:
    """Whether two runs are identical, and a text that states it or names the first difference."""

    identical: bool
    text: str


def compare(a: str | Path, b: str | Path) -> Answer:
    """Compare two run folders. Raises UserError if one is not a run folder."""
    logs = [_read(Path(folder)) for folder in (a, b)]
    if difference := _first_difference(*logs) or _other_length(logs, (str(a), str(b))):
        return Answer(False, difference)
    counts = " and ".join(f"{len(logs[0][kind])} {name}" for kind, name in KIND_NAMES.items())
    step, difference = _compare_weights(Path(a), Path(b))
    if step is None:
        difference = "no step has a checkpoint in both runs, so weights were not compared"
    if difference:
        return Answer(False, f"{counts} lines are equal, but {difference}")
    return Answer(True, f"identical to the bit: {counts} lines, and the weights of both at step {step}")


def _read(folder: Path) -> dict[str, dict[int, dict]]:
    """Kind → step → deterministic quantities."""
    file = folder / "metrics.jsonl"
    if not file.is_file():
        raise UserError(f"{folder} is not a run folder: it has no metrics.jsonl.")
    kinds = {
        kind: {line["step"]: {key: line[key] for key in line if key not in WALL_CLOCK} for line in lines.values()}
        for kind, lines in read_metrics(file).items()
    }
    if not any(kinds.values()):
        raise UserError(f"{file} has no training line and no validation line: there is nothing to compare.")
    return kinds


def _first_difference(a: dict, b: dict) -> str | None:
    shared = sorted((step, kind) for kind in KIND_NAMES for step in a[kind].keys() & b[kind].keys())
    for step, kind in shared:
        ours, theirs = a[kind][step], b[kind][step]
        for key in dict.fromkeys([kind, *ours, *theirs]):
            one, other = (line.get(key) for line in (ours, theirs))
            if one != other and not (one != one and other != other):  # two NaNs are equal here
                return f"first difference at step {step}: {key} {_show(one)} against {_show(other)}"
    return None


def _other_length(logs: list[dict], names: tuple[str, str]) -> str | None:
    for kind, kind_name in KIND_NAMES.items():
        a, b = (log[kind] for log in logs)
        if single := a.keys() ^ b.keys():
            step = min(single)
            lines = f"{len(a)} against {len(b)} {kind_name} lines, equal at every step that both have"
            name = names[0] if step in a else names[1]
            return f"different lengths: {lines}; the first line that only {name} has is of step {step}"
    return None


def _compare_weights(a: Path, b: Path) -> tuple[int | None, str | None]:
    """The newest step at which both runs have a checkpoint, and the first tensor that differs there."""
    ours, theirs = ({folder.name: folder for folder in list_checkpoints(run)} for run in (a, b))
    shared = sorted(ours.keys() & theirs.keys(), key=lambda name: int(name.removeprefix("step-")))
    if not shared:
        return None, None
    step = int(shared[-1].removeprefix("step-"))
    weights, other_weights = (open_weights(folders[shared[-1]]) for folders in (ours, theirs))
    for name in sorted(weights.shapes.keys() | other_weights.shapes.keys()):
        if name not in weights.shapes or name not in other_weights.shapes:
            return step, f"only {a if name in weights.shapes else b} has {name} in its weights of step {step}"
        if difference := _tensor_difference(weights.read(name), other_weights.read(name)):
            return step, f"at step {step} {name} differs {difference}"
    return step, None


def open_weights(checkpoint: Path) -> SafetensorFiles:
    """The weights of a native checkpoint, not verified against their hashes. Raises UserError if a file is damaged."""
    names = read_checkpoint_manifest(checkpoint)["files"]
    return SafetensorFiles(checkpoint / name for name in names if name.startswith("weights-"))


def _tensor_difference(one: torch.Tensor, other: torch.Tensor) -> str | None:
    if one.shape != other.shape or one.dtype != other.dtype:
        return f"in shape or type: {list(one.shape)} {one.dtype} against {list(other.shape)} {other.dtype}"
    # Compared as bytes, because NaN does not equal itself and 0.0 equals −0.0.
    different = _bytes(one).ne(_bytes(other)).any(dim=1)
    if not different.any():
        return None
    largest = (one.double() - other.double()).abs().nan_to_num().max().item()
    return f"in {int(different.sum()):,} of {one.numel():,} values, by up to {largest:.3g}"


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """uint8 [values, bytes of a value]"""
    return tensor.reshape(-1, 1).view(torch.uint8)


def _show(value: object) -> str:
    return "no value" if value is None else repr(value)
