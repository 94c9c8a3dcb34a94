"""checkpoint.json, the manifest of a native checkpoint, and the list of a run's checkpoints."""

import logging
import re
from pathlib import Path

from megacocomix.errors import UserError
from megacocomix.files import file_sha256, read_json

log = logging.getLogger(__name__)
CHECKPOINT_FILE = "checkpoint.json"
CHECKPOINT_FORMAT, CHECKPOINT_VERSION = "megacocomix-checkpoint", 1


def list_checkpoints(run: str | Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first. A checkpoint has its final name only when it is complete."""
    complete = [path for path in Path(run).glob("checkpoints/step-*") if re.fullmatch(r"step-\d+", path.name)]
    return sorted(complete, key=lambda path: int(path.name.removeprefix("step-")))


def checkpoint_step(path: Path) -> int | None:
    """The step of a checkpoint inside its run folder; None for any other folder."""
    if path.parent.name != "checkpoints" or not (path / CHECKPOINT_FILE).is_file():
        return None
    found = re.fullmatch(r"step-(\d+)", path.name)
    return int(found[1]) if found else None


def latest_checkpoint(run: str | Path) -> Path:
    """The newest sound checkpoint of a run. All its files are compared with their hashes. Damaged checkpoints are
    skipped with a warning. Raises UserError if none is sound."""
    problems = []
    for folder in reversed(list_checkpoints(run)):
        try:
            read_checkpoint_manifest(folder, verify=True)
            return folder
        except UserError as error:
            problems += error.problems
            log.warning("skipping %s: %s", folder, error)
    if problems:
        raise UserError(*problems, f"No checkpoint of {run} is sound.")
    raise UserError(f"{run} holds no checkpoint yet.")


def read_checkpoint_manifest(folder: Path, verify: bool = False) -> dict:
    """The manifest of a native checkpoint. Checks the size of every file listed in it. `verify` checks their SHA-256
    too, which reads all of them. Raises UserError."""
    remedy = f"Delete {folder} to go on from the checkpoint before it"
    file = folder / CHECKPOINT_FILE
    manifest = read_json(file, CHECKPOINT_FORMAT, CHECKPOINT_VERSION, remedy)
    try:
        expected = {name: (entry["bytes"], entry["sha256"]) for name, entry in manifest["files"].items()}
        for section in ("state", "config", "inputs"):
            dict(manifest[section])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file} is damaged ({type(error).__name__}): {remedy}.") from None
    for name, (num_bytes, sha256) in expected.items():
        size = (folder / name).stat().st_size if (folder / name).is_file() else 0
        if size != num_bytes:
            raise UserError(f"{folder / name} is damaged: {size} bytes, expected {num_bytes}. {remedy}.")
        if verify and file_sha256(folder / name) != sha256:
            raise UserError(f"{folder / name} is damaged: its SHA-256 differs from the manifest's. {remedy}.")
    return manifest
