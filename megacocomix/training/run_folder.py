"""The run folder, which holds everything that a run writes.

config.yaml (resolved) · code.json (version, commit, starts) · metrics.jsonl · logs/ · checkpoints/ · evals/
"""

import contextlib
import json
import logging
import secrets
import subprocess
import sys
import time
from pathlib import Path
from typing import IO

import torch.distributed as dist

from megacocomix import __version__
from megacocomix.config.effective import settings_in_effect
from megacocomix.config.load import build_config, dump_config
from megacocomix.config.schema import Config
from megacocomix.config.yaml_text import read_yaml
from megacocomix.errors import UserError
from megacocomix.files import lock_file, missing_files, write_json, write_text
from megacocomix.parallel.runtime import Runtime, errors_on_all_ranks

LOCK, TOKEN = ".lock", ".start-"
TOKEN_TEXT = "While a run starts, each of its processes looks for this file.\n"
# Options that may change between two starts of one run: none of them changes the weights of any step, but by rounding.
FREE = {"run", "parallel", "checkpoint", "evaluation", "logging"}
FREE |= {"training.stop_after", "training.micro_batch", "training.deterministic"}


def check_run_folder(config: Config) -> Path:
    """The run folder of a config, new or existing. Raises UserError if it belongs to another config."""
    run = Path(config.run)
    if run.parts[:1] and run.parts[0].startswith("~"):
        raise UserError(f"run {run} would be a folder called {run.parts[0]}: write out the path.")
    stored = run / "config.yaml"
    if stored.is_file():
        values = read_yaml(stored)
        if not isinstance(values, dict):
            raise UserError(f"{stored} is empty or damaged. Restore it, or choose another folder with run=PATH.")
        _check_same(config, build_config(values, str(stored)), run)
    elif run.exists() and (not run.is_dir() or any(map(_is_foreign, run.iterdir()))):
        raise UserError(f"run {run} exists and is not a run folder. Choose another: run=PATH.")
    return run


def _is_foreign(path: Path) -> bool:
    """Whether it was not left by a start that failed."""
    return path.name != LOCK and not path.name.startswith(TOKEN)


def check_all_ranks_share(run: Path, runtime: Runtime) -> None:
    """Raises UserError, on all ranks, unless each of them sees a file that rank 0 writes into the run folder, or where
    that will be made. The file is removed again."""
    token = None
    try:
        with errors_on_all_ranks():
            if runtime.is_main:
                folder = next(folder for folder in (run, *run.parents) if folder.is_dir())
                token = folder / f"{TOKEN}{secrets.token_hex(8)}"
                try:
                    token.write_text(TOKEN_TEXT)
                except OSError as error:
                    raise UserError(f"run {run} cannot be written: {error.strerror}.") from None
        written = [token]
        dist.broadcast_object_list(written, src=0)
        with errors_on_all_ranks():
            if missing_files(written[0].parent, {written[0].name: len(TOKEN_TEXT)}):
                raise UserError(
                    f"run {run} is not one folder for all processes: some do not see what rank 0 writes there. Choose "
                    "one on a file system that all nodes share, by its whole path: run=PATH."
                )
    finally:
        if token:
            with contextlib.suppress(OSError):
                token.unlink()


def write_run_folder(config: Config, run: Path, start: dict) -> IO:
    """Make the folder, and write the resolved config, the code version and this start (`world`, `device`) into it.

    Returns an open file that locks the run while it is open. Raises UserError if the folder cannot be written, or
    another job is training in it.
    """
    try:
        run.mkdir(parents=True, exist_ok=True)
        lock = open(run / LOCK, "w")  # noqa: SIM115 (the caller keeps it open)
        if not lock_file(lock, is_optional=True):
            raise UserError(f"run {run} is being trained by another job. Wait for it, or choose another: run=PATH.")
        write_text(run / "config.yaml", dump_config(config))
        starts = [*_earlier_starts(run), {"command": sys.argv, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **start}]
        write_json(run / "code.json", code_version() | {"starts": starts})
    except OSError as error:
        raise UserError(f"run {run} cannot be written: {error.strerror}.") from None
    return lock


def _earlier_starts(run: Path) -> list[dict]:
    """Starts recorded so far. A damaged record is replaced, because it must not prevent the run from resuming."""
    try:
        return list(json.loads((run / "code.json").read_bytes())["starts"])
    except (OSError, ValueError, KeyError, TypeError):
        return []


def log_to_file(run: Path, rank: int) -> None:
    """Send this process's log records to RUN/logs/rank-N.log, and warnings to stderr too. Raises UserError."""
    try:
        (run / "logs").mkdir(parents=True, exist_ok=True)
        handler = logging.FileHandler(run / "logs" / f"rank-{rank:05d}.log")
    except OSError as error:
        raise UserError(f"run {run} cannot be written: {error.strerror}.") from None
    handler.setFormatter(logging.Formatter(f"%(asctime)s rank {rank} %(levelname)s %(name)s: %(message)s"))
    console = logging.StreamHandler()
    console.setLevel(logging.WARNING)
    for each in (handler, console):
        logging.getLogger().addHandler(each)
    logging.getLogger("megacocomix").setLevel(logging.INFO)
    logging.raiseExceptions = False  # on a full disk, do not print a traceback for each line


def code_version() -> dict:
    """Package version; in a git checkout also the commit, and whether tracked files are modified."""

    def git(*arguments: str) -> str | None:
        here = Path(__file__).parent
        result = subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, check=False)
        return result.stdout.strip() if result.returncode == 0 else None

    try:
        commit, changed = git("rev-parse", "HEAD"), git("status", "--porcelain", "--untracked-files=no")
    except OSError:  # no git on this machine
        commit = changed = None
    return {"version": __version__, "commit": commit, "modified": bool(changed)}


def _check_same(config: Config, stored: Config, run: Path) -> None:
    here, there = _flat(config), _flat(stored)
    different = [key for key in sorted(here | there) if here.get(key) != there.get(key)]
    if different:
        raise UserError(
            f"run {run} belongs to another config:",
            *(f"  {key} is {json.dumps(there.get(key))} there, {json.dumps(here.get(key))} here" for key in different),
            "Choose another folder with run=PATH, or give the values of the folder's config.yaml.",
        )


def _flat(config: Config) -> dict:
    used = settings_in_effect(config.model_dump(mode="json"), config.method)
    return {key: value for key, value in used.items() if not {key, key.partition(".")[0]} & FREE}
