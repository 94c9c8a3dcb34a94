"""Whether two runs are the same to the bit: every deterministic number they logged, then their weights.

Numbers are compared in order of steps, so that the answer names the first step and quantity that differ: later
differences follow from it. Lines that a resumption made void do not count.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from megacocomix.checkpoint.format import list_checkpoints, read_checkpoint_manifest
from megacocomix.compare.runs import read_metrics
from megacocomix.errors import UserError

WALL_CLOCK = {"seconds", "tokens_per_second", "flops_per_second", "mfu", "memory_gib"}
"""What differs between two runs of the same arithmetic."""
WORDS = {"loss": "training", "valid_loss": "validation"}


@dataclass(frozen=True)
class Answer:
    """Whether two runs are identical, and the sentence that says so or names the first difference."""

    identical: bool
    text: str


def compare(a: str | Path, b: str | Path) -> Answer:
    """Compare two run folders. Raises UserError for what is no run folder."""
    logs = [_read(Path(folder)) for folder in (a, b)]
    if difference := _first_difference(*logs) or _other_length(logs, (str(a), str(b))):
        return Answer(False, difference)
    counts = " and ".join(f"{len(logs[0][kind])} {word}" for kind, word in WORDS.items())
    step, difference = _compare_weights(Path(a), Path(b))
    if difference:
        return Answer(False, f"the same {counts} lines, but {difference}")
    if step is None:
        return Answer(False, f"the same {counts} lines, but no step has a checkpoint in both: no weights compared")
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
        raise UserError(f"{file} has no training and no validation line: there is nothing to compare.")
    return kinds


def _first_difference(a: dict, b: dict) -> str | None:
    shared = sorted((step, kind) for kind in WORDS for step in a[kind].keys() & b[kind].keys())
    for step, kind in shared:
        ours, theirs = a[kind][step], b[kind][step]
        for key in dict.fromkeys([kind, *ours, *theirs]):
            one, other = (line.get(key) for line in (ours, theirs))
            if one != other and not (one != one and other != other):  # NaN, and null where it was written as that
                return f"differ first at step {step}: {key} {_show(one)} against {_show(other)}"
    return None


def _other_length(logs: list[dict], names: tuple[str, str]) -> str | None:
    for kind, word in WORDS.items():
        a, b = (log[kind] for log in logs)
        if single := a.keys() ^ b.keys():
            step = min(single)
            having = names[0] if step in a else names[1]
            lines = f"{len(a)} against {len(b)} {word} lines, the same where both have one"
            return f"differ in length: {lines}; the first that only {having} has is of step {step}"
    return None


def _compare_weights(a: Path, b: Path) -> tuple[int | None, str | None]:
    """The newest step of which both have a checkpoint, and the first tensor that differs there."""
    ours, theirs = ({folder.name: folder for folder in list_checkpoints(run)} for run in (a, b))
    shared = sorted(ours.keys() & theirs.keys(), key=lambda name: int(name.removeprefix("step-")))
    if not shared:
        return None, None
    step = int(shared[-1].removeprefix("step-"))
    tensors, others = (_tensors(folders[shared[-1]]) for folders in (ours, theirs))
    for name in sorted(tensors.keys() | others.keys()):
        if name not in tensors or name not in others:
            return step, f"only {a if name in tensors else b} has {name} in its weights of step {step}"
        if difference := _tensor_difference(_load(tensors[name], name), _load(others[name], name)):
            return step, f"at step {step} {name} differs {difference}"
    return step, None


def _tensors(checkpoint: Path) -> dict[str, Path]:
    """Tensor → the file that holds it."""
    where = {}
    for file_name in read_checkpoint_manifest(checkpoint)["files"]:
        if file_name.startswith("weights-"):
            try:
                with safe_open(checkpoint / file_name, "pt") as file:
                    where |= dict.fromkeys(file.keys(), checkpoint / file_name)
            except SafetensorError as error:
                raise UserError(f"{checkpoint / file_name} is damaged: {error}.") from None
    return where


def _load(file: Path, name: str) -> torch.Tensor:
    with safe_open(file, "pt") as opened:
        return opened.get_tensor(name)


def _tensor_difference(one: torch.Tensor, other: torch.Tensor) -> str | None:
    if one.shape != other.shape or one.dtype != other.dtype:
        return f"in shape or type: {list(one.shape)} {one.dtype} against {list(other.shape)} {other.dtype}"
    # As bytes: NaN is not equal to itself, and 0.0 is equal to −0.0.
    different = _bytes(one).ne(_bytes(other)).any(dim=1)
    if not different.any():
        return None
    away = (one.double() - other.double()).abs().nan_to_num().max().item()
    return f"in {int(different.sum()):,} of {one.numel():,} values, by up to {away:.3g}"


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """[values, bytes of a value]"""
    return tensor.reshape(-1, 1).view(torch.uint8)


def _show(value: object) -> str:
    return "nothing" if value is None else repr(value)
