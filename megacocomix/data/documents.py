"""Reads raw text, document by document.

Sources: .txt (documents separated by a line `<|endoftext|>`), .jsonl and .jsonl.gz, .parquet, the folder of a saved
dataset, or a name on the Hugging Face Hub. Everything is streamed. An error about a malformed line names the file and
the line number.
"""

import gzip
import hashlib
import json
import re
import textwrap
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

from megacocomix.data.tokenizer import END_OF_TEXT
from megacocomix.errors import UserError

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".parquet")


def find_sources(inputs: Sequence[str]) -> list[Path | str]:
    """The sources to read, in order: a Path for each file or saved dataset, a str for a name on the Hugging Face Hub.

    A folder means the dataset saved in it, or else every file of a known kind below it, sorted by name.
    Raises UserError with one line for each input that does not exist or is of an unknown kind.
    """
    sources, problems = [], []
    for name in inputs:
        path = Path(name)
        known = str(name).endswith(SUFFIXES)
        if path.is_dir():
            found = _sources_in(path)
            sources += found
            if not found:
                problems.append(f"{name} holds no dataset and no files of a known kind: {' '.join(SUFFIXES)}.")
        elif path.is_file() and known:
            sources.append(path)
        elif path.exists():
            problems.append(f"{name} is of an unknown kind. Valid: {' '.join(SUFFIXES)}, or a dataset folder.")
        elif not known and not path.is_symlink() and re.fullmatch(r"\w[\w.-]*/[\w.-]+", str(name)):
            sources.append(str(name))
        else:
            problems.append(f"{name} does not exist.")
    if problems:
        raise UserError(*problems)
    return sources


def _sources_in(folder: Path) -> list[Path]:
    if (folder / "dataset_dict.json").is_file():
        try:
            splits = [str(split) for split in json.loads((folder / "dataset_dict.json").read_bytes())["splits"]]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{folder}/dataset_dict.json is damaged.") from error
        if len(splits) != 1:
            raise UserError(f"{folder} has several splits, give one: {' '.join(str(folder / s) for s in splits)}")
        return [folder / splits[0]]
    if (folder / "dataset_info.json").is_file():
        return [folder]
    return sorted(file for file in folder.rglob("*") if file.is_file() and file.name.endswith(SUFFIXES))


def read_documents(sources: Sequence[Path | str], field: str = "text") -> Iterator[str]:
    """Every document that holds more than white space, in order. A progress bar counts the bytes read.

    A .txt file is split at lines that read <|endoftext|>. The other kinds hold one document in the `field` of each row.
    Raises UserError for input that cannot be read; it names the file and, if there are lines, the line.
    """
    with tqdm(total=sum(map(_size, sources)) or None, unit="B", unit_scale=True, desc="reading", disable=None) as bar:
        end = 0
        for source in sources:
            end += _size(source)
            try:
                for text in _reader(source)(source, field, bar.update):
                    if text.strip():
                        yield text
            except (OSError, EOFError, zlib.error, RuntimeError) as error:
                reason = textwrap.shorten(str(error), 200)
                raise UserError(f"{source} cannot be read: {reason}") from error
            bar.update(end - bar.n)


def source_files(source: Path | str) -> list[Path]:
    """The files of a source; none for a name on the Hub."""
    if isinstance(source, str):
        return []
    return sorted(source.glob("*.arrow")) if source.is_dir() else [source]


def _size(source: Path | str) -> int:
    return sum(file.stat().st_size for file in source_files(source))


def _reader(source: Path | str) -> Callable[[Path | str, str, Callable], Iterator[str]]:
    if isinstance(source, str) or source.is_dir():
        return _read_dataset
    return {".txt": _read_txt, ".parquet": _read_parquet}.get(source.suffix, _read_jsonl)


def _lines(path: Path, advance: Callable) -> Iterator[tuple[int, str]]:
    """Line numbers and lines. Line ends are kept unchanged; a byte order mark is removed."""
    with open(path, "rb") as raw:
        position = 0
        lines = gzip.GzipFile(fileobj=raw) if path.suffix == ".gz" else raw
        for number, line in enumerate(lines, 1):
            advance(raw.tell() - position)
            position = raw.tell()
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise UserError(f"{path} line {number} is not UTF-8 text.") from error


def _read_txt(path: Path, field: str, advance: Callable) -> Iterator[str]:
    lines: list[str] = []
    for _, line in _lines(path, advance):
        if line.strip() == END_OF_TEXT:
            yield "".join(lines).removesuffix("\n")
            lines = []
        else:
            lines.append(line)
    yield "".join(lines).removesuffix("\n")


def _read_jsonl(path: Path, field: str, advance: Callable) -> Iterator[str]:
    for number, line in _lines(path, advance):
        if not line.strip():
            continue
        where = f"{path} line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{where} is not JSON: {error.msg} at column {error.colno}.") from error
        except (ValueError, RecursionError) as error:  # a number of thousands of digits, a very deep list
            raise UserError(f"{where} cannot be read: {error}.") from error
        if not isinstance(row, dict):
            raise UserError(f"{where} is not a JSON object.")
        yield _text(row, field, where)


def _read_parquet(path: Path, field: str, advance: Callable) -> Iterator[str]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            _check_field(field, file.schema_arrow.names, str(path))
            for batch in file.iter_batches(batch_size=1024, columns=[field]):
                advance(_size(path) * batch.num_rows // file.metadata.num_rows)
                for value in batch.column(0).to_pylist():
                    yield _text({field: value}, field, str(path))
    except pyarrow.ArrowException as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def _read_dataset(source: Path | str, field: str, advance: Callable) -> Iterator[str]:
    import datasets

    try:
        if isinstance(source, Path):
            rows = datasets.load_from_disk(str(source))  # memory-mapped in place
        else:
            rows = datasets.load_dataset(source, split="train", streaming=True)  # streaming leaves no copy in a cache
    except Exception as error:  # its parsers, the network and the Hub's client raise many types
        kind = "is not a readable dataset" if isinstance(source, Path) else "is neither a file nor on the Hub"
        raise UserError(f"{source} {kind}: {textwrap.shorten(str(error), 200)}") from error
    step = _size(source) // max(1, len(rows)) if isinstance(source, Path) else 0
    if rows.column_names:
        _check_field(field, rows.column_names, str(source))
        rows = rows.select_columns([field])
    for row in rows:
        advance(step)
        yield _text(row, field, str(source))


def _check_field(field: str, found: Iterable[str], where: str) -> None:
    if field not in found:
        raise UserError(f"{where} has no field {field!r}. Choose one with --field: {' '.join(found)}")


def _text(row: dict, field: str, where: str) -> str:
    _check_field(field, row, where)
    value = row[field]
    if value is None:
        return ""
    if not isinstance(value, str):
        raise UserError(f"{where}: field {field!r} holds {type(value).__name__}, not text.")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can encode half of a surrogate pair
        raise UserError(f"{where}: field {field!r} is not valid Unicode text.") from error
    return value


def is_validation(text: str, fraction: float) -> bool:
    """Whether a document belongs to the validation split. It depends only on the document's own text."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) < fraction * 2**64
