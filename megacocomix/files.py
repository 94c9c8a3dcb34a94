"""What several rooms do with files."""

import hashlib
import json
import os
from pathlib import Path


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a file's content, in hexadecimal; reads it in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_text(file: Path, text: str) -> None:
    """Write it whole or not at all: a full disk or a kill leaves what was there before."""
    unfinished = file.with_name(file.name + ".new")
    try:
        with open(unfinished, "w") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(unfinished, file)
    finally:
        unfinished.unlink(missing_ok=True)


def write_json(file: Path, value: dict) -> None:
    """Write a value as JSON, whole or not at all."""
    write_text(file, json.dumps(value, indent=1) + "\n")
