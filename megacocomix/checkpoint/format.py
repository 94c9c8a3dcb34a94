"""checkpoint.json: what a checkpoint folder of ours holds, and which of a run's checkpoints are there."""

import json
import logging
import re
from pathlib import Path

from megacocomix.errors import UserError
from megacocomix.files import file_sha256

log = logging.getLogger(__name__)
CHECKPOINT_FILE = "checkpoint.json"
CHECKPOINT_FORMAT, CHECKPOINT_VERSION = "megacocomix-checkpoint", 1


def list_checkpoints(run: str | Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first: only these carry their final name."""
    complete = [path for path in Path(run).glob("checkpoints/step-*") if re.fullmatch(r"step-\d+", path.name)]
    return sorted(complete, key=lambda path: int(path.name.removeprefix("step-")))


def checkpoint_step(path: Path) -> int | None:
    """The step of a checkpoint that lies in its run; None for any other folder."""
    if path.parent.name != "checkpoints" or not (path / CHECKPOINT_FILE).is_file():
        return None
    return int(path.name.removeprefix("step-"))


def latest_checkpoint(run: str | Path) -> Path:
    """The newest sound checkpoint of a run, all of it compared with its hashes; damaged ones are walked past, and said.
    Raises UserError where there is none."""
    problems = []
    for folder in reversed(list_checkpoints(run)):
        try:
            read_checkpoint_manifest(folder, verify=True)
            return folder
        except UserError as error:
            problems += error.problems
            log.warning("walking past %s: %s", folder, error)
    if problems:
        raise UserError(*problems, f"No checkpoint of {run} is sound.")
    raise UserError(f"{run} holds no checkpoint yet.")


def read_checkpoint_manifest(folder: Path, verify: bool = False) -> dict:
    """checkpoint.json of a checkpoint of ours. The size of every file it names is checked, with `verify` its SHA-256
    too, which reads it all. Raises UserError."""
    remedy = f"Delete {folder} to go on from the checkpoint before it."
    file = folder / CHECKPOINT_FILE
    try:
        manifest = json.loads(file.read_bytes())
        found = manifest["format"], manifest["version"]
        expected = {name: (entry["bytes"], entry["sha256"]) for name, entry in manifest["files"].items()}
        for section in ("state", "config", "inputs"):
            dict(manifest[section])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file} is missing or damaged ({type(error).__name__}). {remedy}") from None
    if found != (CHECKPOINT_FORMAT, CHECKPOINT_VERSION):
        raise UserError(
            f"{file} is of format {found[0]} version {found[1]}, not {CHECKPOINT_FORMAT} version {CHECKPOINT_VERSION}."
        )
    for name, (num_bytes, sha256) in expected.items():
        size = (folder / name).stat().st_size if (folder / name).is_file() else 0
        if size != num_bytes:
            raise UserError(f"{folder / name} is damaged: {size} bytes, expected {num_bytes}. {remedy}")
        if verify and file_sha256(folder / name) != sha256:
            raise UserError(f"{folder / name} is damaged: its SHA-256 is not the manifest's. {remedy}")
    return manifest
