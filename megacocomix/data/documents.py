"""Reads raw text, document by document.

.txt is split at lines that read `<|endoftext|>`; the other kinds (see `sources`) hold a document in a field of each
row. Everything is streamed, except for a .json that is an array or one object over several lines, which is read whole.
An error names the file and the line or row.
"""

import bz2
import csv
import gzip
import hashlib
import io
import json
import lzma
import shutil
import tempfile
import textwrap
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import BinaryIO

import pyarrow
from pyarrow import ipc, parquet
from tqdm import tqdm

from megacocomix.data.sources import LeftOut, file_kind, source_files
from megacocomix.data.tokenizer import END_OF_TEXT
from megacocomix.errors import UserError

BLOCK = 2**16
ROWS = 1024  # rows of a table that are converted at a time
STREAM_END = bytes.fromhex("ffffffff00000000")
NUL_BYTES = 8000  # bytes in which a NUL means "not text", as git decides


def read_documents(
    sources: Sequence[Path | str], field: str = "text", left_out: LeftOut | None = None
) -> Iterator[str]:
    """Every document that holds more than white space, in order; the others are counted in `left_out`. A progress bar
    counts the bytes read.

    Raises UserError for input that cannot be read; it names the file and, if there are any, the line or row.
    """
    left_out = LeftOut() if left_out is None else left_out
    with tqdm(total=sum(map(_size, sources)) or None, unit="B", unit_scale=True, desc="reading", disable=None) as bar:
        end = 0
        for source in sources:
            end += _size(source)
            try:
                for text in _read(source, field, bar.update, left_out):
                    if text.strip():
                        yield text
                    else:
                        left_out.documents += 1
            except (OSError, EOFError, zlib.error, lzma.LZMAError, RuntimeError, pyarrow.ArrowException) as error:
                reason = textwrap.shorten(str(error), 200)
                raise UserError(f"{source} cannot be read: {reason}") from error
            bar.update(end - bar.n)


def _size(source: Path | str) -> int:
    return sum(file.stat().st_size for file in source_files(source))


def _read(source: Path | str, field: str, advance: Callable, left_out: LeftOut) -> Iterator[str]:
    if isinstance(source, str):
        return _read_hub(source, field, left_out)
    if source.is_dir():
        return _read_saved(source, field, advance)
    return READERS[file_kind(source)[0]](source, field, advance)


class _Streams(io.RawIOBase):
    """The content of compressed streams one after another, of bz2 or xz. The standard library's own files take a
    damaged later stream for the end of the file."""

    def __init__(self, raw: BinaryIO, decompressor: Callable):
        self._raw, self._new, self._stream = raw, decompressor, decompressor()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        while True:
            compressed = b""
            if self._stream.eof:
                compressed = (self._stream.unused_data or self._raw.read(BLOCK)).lstrip(b"\0")  # padding
                if not compressed and not (compressed := self._raw.read(BLOCK).lstrip(b"\0")):
                    return 0
                self._stream = self._new()
            elif self._stream.needs_input and not (compressed := self._raw.read(BLOCK)):
                raise EOFError("it is truncated")
            if content := self._stream.decompress(compressed, len(buffer)):
                buffer[: len(content)] = content
                return len(content)


def _decompressed(raw: BinaryIO, path: Path) -> io.BufferedIOBase:
    """The content of an open file, whether it is compressed or not."""
    match file_kind(path)[1]:
        case ".gz":
            return gzip.GzipFile(fileobj=raw)
        case ".zst":
            return io.BufferedReader(pyarrow.CompressedInputStream(raw, "zstd"), BLOCK)
        case ".bz2":
            return io.BufferedReader(_Streams(raw, bz2.BZ2Decompressor), BLOCK)
        case ".xz":
            return io.BufferedReader(_Streams(raw, lzma.LZMADecompressor), BLOCK)
    return raw


def _lines(path: Path, advance: Callable) -> Iterator[tuple[int, str]]:
    """Line numbers and lines. Line ends are kept unchanged; a byte order mark is removed."""
    with open(path, "rb") as raw:
        position = 0
        lines = _decompressed(raw, path)
        head = lines.peek(NUL_BYTES)[:NUL_BYTES]
        if b"\0" in head:
            raise UserError(f"{path} is not UTF-8 text: it is binary, or UTF-16.")
        if b"\r" in head[:-1] and b"\n" not in head and file_kind(path)[0] != ".txt":
            raise UserError(f"{path} has rows that end in a carriage return alone: convert its line ends to \\n.")
        for number, line in enumerate(lines, 1):
            advance(raw.tell() - position)
            position = raw.tell()
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise UserError(f"{path} line {number} is not UTF-8 text.") from error


def _read_txt(path: Path, field: str, advance: Callable) -> Iterator[str]:
    """Line ends of other systems become "\\n", as in Python's own text files and in `datasets`."""
    lines: list[str] = []
    for _, text in _lines(path, advance):
        for line in io.StringIO(text, newline=None) if "\r" in text else (text,):
            if line.strip() == END_OF_TEXT:
                yield "".join(lines).removesuffix("\n")
                lines = []
            else:
                lines.append(line)
    if lines:
        yield "".join(lines).removesuffix("\n")


def _read_json_lines(path: Path, field: str, advance: Callable) -> Iterator[str]:
    return _json_rows(path, field, _lines(path, advance))


def _read_json(path: Path, field: str, advance: Callable) -> Iterator[str]:
    """JSON lines, or else one array of objects or one object, which is read whole."""
    lines = _lines(path, advance)
    number, first = next(((number, line) for number, line in lines if line.strip()), (1, ""))
    if _is_object(first):
        yield from _json_rows(path, field, chain([(number, first)], lines))
    elif first:
        whole = _parse_json(first + "".join(line for _, line in lines), field, path, number)
        rows = enumerate(whole if isinstance(whole, list) else [whole], 1)
        yield from _row_texts(((f"{path} row {row_number}", row) for row_number, row in rows), field)


def _is_object(text: str) -> bool:
    try:
        return text.lstrip().startswith("{") and isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def _json_rows(path: Path, field: str, lines: Iterable[tuple[int, str]]) -> Iterator[str]:
    rows = ((f"{path} line {number}", _parse_json(line, field, path, number)) for number, line in lines if line.strip())
    yield from _row_texts(rows, field)


def _row_texts(rows: Iterable[tuple[str, object]], field: str) -> Iterator[str]:
    """The texts of (place, JSON value). A row without the field counts as null, as in `datasets`, if others have it:
    one of the first ROWS."""
    lacking = None
    for number, (where, row) in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise UserError(f"{where} is not a JSON object.")
        if number == 1 and field not in row:
            lacking = where, row
        elif field in row:
            lacking = None
        elif lacking and number == ROWS:
            break
        yield _text(row.get(field), field, where)
    if lacking:
        _check_field(field, lacking[1], lacking[0])


def _parse_json(text: str, field: str, path: Path, number: int) -> object:
    """The JSON value of a text that begins at line `number`."""

    def unique(pairs: list[tuple[str, object]]) -> dict:
        if len(row := dict(pairs)) < len(pairs) and [key for key, _ in pairs].count(field) > 1:
            raise ValueError(f"an object holds {field!r} twice")
        return row

    try:
        return json.loads(text.rstrip(), object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        where = f"{path} line {number + error.lineno - 1}"
        raise UserError(f"{where} is not JSON: {error.msg} at column {error.colno}.") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, a very deep list
        raise UserError(f"{path} line {number} cannot be read: {error}.") from error


def _read_csv(path: Path, field: str, advance: Callable) -> Iterator[str]:
    csv.field_size_limit(2**31 - 1)  # the default refuses documents of more than 128 KiB
    delimiter = "\t" if file_kind(path)[0] == ".tsv" else ","
    # Without `strict`, a quote that is never closed makes one document of the rest of the file.
    table = csv.reader((line for _, line in _lines(path, advance)), delimiter=delimiter, strict=True)
    rows = filter(None, table)  # an empty line is no row
    try:
        if (header := next(rows, None)) is None:
            return
        _check_field(field, header, f"{path} line {table.line_num}")
        column = header.index(field)
        for row in rows:
            where = f"{path} line {table.line_num}"
            if len(row) != len(header):
                raise UserError(f"{where} has {len(row)} columns, but the header has {len(header)}.")
            yield _text(row[column], field, where)
    except csv.Error as error:
        raise UserError(f"{path} line {table.line_num} is not CSV: {error}.") from error


def _read_parquet(path: Path, field: str, advance: Callable) -> Iterator[str]:
    with _seekable(path) as file, parquet.ParquetFile(file) as table:
        _check_field(field, table.schema_arrow.names, str(path))
        step = _size(path) / max(1, table.metadata.num_rows)
        for text in _column_texts(path, field, table.iter_batches(ROWS, columns=[field])):
            advance(step)
            yield text


def _read_arrow(path: Path, field: str, advance: Callable) -> Iterator[str]:
    """Arrow's file format and its stream format have the same suffix."""
    with _seekable(path) as file:
        is_file = file.read(6) == b"ARROW1"
        file.seek(0)
        if is_file:
            table = ipc.open_file(file)
            batches = (table.get_batch(index) for index in range(table.num_record_batches))
        else:
            _check_end(file, path)
            batches = table = ipc.open_stream(file)
        _check_field(field, table.schema.names, str(path))
        yield from _column_texts(path, field, batches)


@contextmanager
def _seekable(path: Path) -> Iterator[BinaryIO]:
    """The content of a file in a form that can be read in any order: if compressed, as a temporary file."""
    with open(path, "rb") as raw:
        if not file_kind(path)[1]:
            yield raw
            return
        with tempfile.TemporaryFile() as plain:
            shutil.copyfileobj(_decompressed(raw, path), plain, BLOCK)
            plain.seek(0)
            yield plain


def _column_texts(path: Path, field: str, batches: Iterable[pyarrow.RecordBatch]) -> Iterator[str]:
    number = 0
    for batch in batches:
        column = batch.column(field)
        column.validate(full=True)  # its strings may be no UTF-8
        for start in range(0, len(column), ROWS):
            for value in column.slice(start, ROWS).to_pylist():
                number += 1
                yield _text(value, field, f"{path} row {number}")


def _check_end(file: BinaryIO, path: Path) -> None:
    """Raises UserError for an Arrow stream without its end marker: pyarrow takes one cut between two batches for whole.
    Streams of Arrow before 0.15 have another marker."""
    begins_now = file.read(4) == STREAM_END[:4]
    file.seek(-min(len(STREAM_END), file.seek(0, io.SEEK_END)), io.SEEK_END)
    if begins_now and file.read() != STREAM_END:
        raise UserError(f"{path} is truncated: it does not end in Arrow's end-of-stream marker.")
    file.seek(0)


def _read_saved(folder: Path, field: str, advance: Callable) -> Iterator[str]:
    import datasets

    try:
        rows = datasets.load_from_disk(str(folder)).with_format(None)  # memory-mapped in place
    except Exception as error:  # its parsers raise many types
        raise UserError(f"{folder} is not a readable dataset: {textwrap.shorten(str(error), 200)}") from error
    for path in source_files(folder):
        with open(path, "rb") as file:
            _check_end(file, path)
    step = _size(folder) / max(1, len(rows))
    _check_field(field, rows.column_names, str(folder))
    for number, row in enumerate(rows.select_columns([field]), 1):
        advance(step)
        yield _text(row[field], field, f"{folder} row {number}")


def _read_hub(name: str, field: str, left_out: LeftOut) -> Iterator[str]:
    import datasets

    try:
        splits = datasets.load_dataset(name, streaming=True)  # streaming leaves no copy in a cache
    except Exception as error:  # its parsers, the network and the Hub's client raise many types
        reason = textwrap.shorten(str(error), 200)
        raise UserError(f"{name} is no file, and cannot be read from the Hub: {reason}") from error
    if "train" not in splits:
        raise UserError(f"{name} has no split train on the Hub, only {' '.join(splits)}: fetch one and give its files.")
    left_out.splits[name] = [split for split in splits if split != "train"]
    rows = splits["train"]
    if rows.column_names:
        _check_field(field, rows.column_names, name)
        rows = rows.select_columns([field])
    numbered = enumerate(_to_the_end(rows, name), 1)
    yield from _row_texts(((f"{name} row {number}", row) for number, row in numbered), field)


def _to_the_end(rows: Iterable[dict], name: str) -> Iterator[dict]:
    try:
        yield from rows
    except Exception as error:  # as above
        raise UserError(f"{name} cannot be read to its end: {textwrap.shorten(str(error), 200)}") from error


READERS = {
    ".txt": _read_txt,
    ".json": _read_json,
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
}


def _check_field(field: str, found: Collection[str], where: str) -> None:
    if field not in found:
        names = textwrap.shorten(" ".join(found), 200)  # the first line of a .csv may be no header
        raise UserError(f"{where} has no field {field!r}. Choose one with --field: {names}")
    if list(found).count(field) > 1:
        raise UserError(f"{where} has the field {field!r} twice: rename one.")


def _text(value: object, field: str, where: str) -> str:
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
