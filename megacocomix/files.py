"""Files that are written whole or not at all, and their hashes."""

import errno
import fcntl
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from megacocomix.errors import UserError

log = logging.getLogger(__name__)

# NFS may show a file of another host that much later, in seconds: the longest time that it keeps a folder's entries.
LATEST = 60.0
# What flock raises on a file system without locks: Lustre mounted without -o flock, NFS without its lock service.
NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF}


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a file's content, in hexadecimal. It reads the file in chunks."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_lfs_pointer(path: str | Path) -> bool:
    """Whether a file is git-lfs's stand-in for one that was not downloaded: a few lines of text under its name."""
    with open(path, "rb") as file:
        return file.read(64).startswith(b"version https://git-lfs.github.com/spec/")


def check_downloaded(path: str | Path) -> None:
    """Raises UserError for a git-lfs pointer in place of a file."""
    if is_lfs_pointer(path):
        raise UserError(f"{path} is a git-lfs pointer, not the file itself: run git lfs pull in its folder.")


def damaged(path: str | Path, error: object) -> UserError:
    """The error to raise for a file that cannot be read, for the reason `error`."""
    try:
        check_downloaded(path)
    except UserError as pointer:
        return pointer
    except OSError:
        pass
    reason = " ".join(str(error).split())
    return UserError(f"{path} is truncated or damaged: {reason:.150}")


@contextmanager
def write_aside(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path for a file or folder. It is renamed to `path` when the block ends. If the block raises,
    the temporary file is removed and `path` stays as it was, so a full disk or a kill loses nothing. The parent folder
    is made. If the block makes a folder, `path` must not exist yet."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.partial")
    _remove(aside)  # left by a process that was killed
    try:
        yield aside
        if aside.is_file():
            if path.is_file():
                shutil.copymode(path, aside)
            with open(aside, "rb") as file:
                os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        _remove(aside)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def check_absent(path: str | Path, option: str = "--out") -> None:
    """Raises UserError if `path`, which `option` names, exists already."""
    if Path(path).exists():
        raise UserError(f"{option} {path} exists already: choose another name or delete it.")


def read_json(file: str | Path, format_: str, version: int, remedy: str) -> dict:
    """The object in a native JSON file. Raises UserError if the file is damaged (the message ends with `remedy`) or has
    another format or version."""
    try:
        values = dict(json.loads(Path(file).read_bytes()))
        found = values["format"], values["version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        if Path(file).is_file():
            check_downloaded(file)
        raise UserError(f"{file} is missing or damaged ({type(error).__name__}): {remedy}.") from None
    if found != (format_, version):
        raise UserError(f"{file} has format {found[0]} version {found[1]}, not {format_} version {version}.")
    return values


def missing_files(folder: Path, sizes: Mapping[str, int]) -> list[str]:
    """The names in `sizes` that `folder` does not hold with that number of bytes. Other hosts may have written them, so
    this waits up to LATEST seconds for them."""
    deadline, pause = time.monotonic() + LATEST, 0.05
    while True:
        with suppress(OSError):
            os.listdir(folder)  # so that NFS asks its server again for names that it remembers as absent
        missing = [name for name, size in sizes.items() if _size(folder / name) != size]
        if not missing or time.monotonic() > deadline:
            return missing
        time.sleep(pause)
        pause = min(2 * pause, 2.0)


def _size(file: Path) -> int | None:
    try:
        return file.stat().st_size
    except OSError:
        return None


def lock_file(file: IO, wait: bool = False, is_optional: bool = False) -> bool:
    """Lock an open file against other processes until it is closed. False if another one has locked it; with `wait`
    this waits for it instead. If the file system has no locks, this raises UserError, or with `is_optional` warns and
    returns True."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        problem = f"{file.name} cannot be locked, because its file system has no locks ({error.strerror})"
        remedy = "mount it with them (Lustre: -o flock, NFS: with its lock service)"
        if not is_optional:
            raise UserError(
                f"{problem}, by which processes divide the work: {remedy}, or choose a folder on another one."
            ) from None
        log.warning("%s: do not start a second job in this folder, or %s.", problem, remedy)
    return True


def write_text(file: str | Path, text: str) -> None:
    """Write text, whole or not at all."""
    with write_aside(file) as aside:
        aside.write_text(text)


def write_json(file: str | Path, value: dict) -> None:
    """Write a value as JSON, whole or not at all."""
    write_text(file, json.dumps(value, indent=1) + "\n")
