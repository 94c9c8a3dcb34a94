"""Token files of other projects, read in place: where their ids are, of what type, and a hash of all of them.

    Megatron-LM   FILE.bin with FILE.idx: sequences of ids, in the index's order; type and places in the index
    llm.c         a header of 256 int32: magic, version, number of tokens; also modded-nanogpt's files
    numpy         FILE.npy: type and shape in its header
    raw           ids without a header, such as nanoGPT's train.bin: the type is given, or else uint16

Other kinds are recognised by their first bytes and refused by name. The whole file is read once. What was found is kept
beside it, in .FILE.scan.json, until the file changes.
"""

import hashlib
import json
import logging
import os
import struct
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from pydantic import TypeAdapter

from megacocomix.errors import UserError
from megacocomix.files import check_downloaded, damaged, file_sha256, write_json

log = logging.getLogger(__name__)

RAW_DTYPES = {name: np.dtype(name).newbyteorder("<") for name in ("uint8", "uint16", "uint32", "int32", "int64")}
# Magic number and version → type. GPT-2's ids, and since version 7 Llama 3's (llm.c dev/data/data_common.py).
LLM_C = {(20240520, 1): RAW_DTYPES["uint16"], (20240801, 7): RAW_DTYPES["uint32"]}
LLM_C_HEADER = 1024
NUMPY_MAGIC = b"\x93NUMPY"
MEGATRON_MAGIC = b"MMIDIDX\x00\x00"
# Megatron's codes of integers (megatron/core/datasets/indexed_dataset.py DType); 6 and 7 are floats.
MEGATRON_DTYPES = {
    code: np.dtype(name) for code, name in {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}.items()
}
REFUSED = {
    b"LITPKDS": "a packed data set of lit-gpt",
    b"TNTIDX\x00\x00": "an index of fairseq or of early Megatron-LM",
    MEGATRON_MAGIC: "an index of Megatron-LM: give the .bin beside it",
    b"PK\x03\x04": "a zip file or a file of torch.save",
    b"\x80\x02": "a pickle",
    b"\x80\x04": "a pickle",
    b"\x80\x05": "a pickle",
    b"\x04\x22\x4d\x18": "compressed with lz4",
    b"GGUF": "a GGUF file",
    b"SQLite format 3": "a database of SQLite",
    **{
        struct.pack("<I", magic): f"a file of llm.c {what}"
        for magic, what in {
            20240520: "of another version",
            20240801: "of another version",
            20240326: "with a model",
            20240328: "with a tokenizer",
            20240522: "with HellaSwag",
        }.items()
    },
    b"\x1f\x8b": "compressed with gzip",
    b"\x28\xb5\x2f\xfd": "compressed with zstd",
    b"\xfd7zXZ\x00": "compressed with xz",
    b"BZh": "compressed with bzip2",
    b"PAR1": "a parquet file: prepare it with tools/prepare_data.py",
    b"ARROW1": "an Arrow file: prepare it with tools/prepare_data.py",
    b"\x89HDF\r\n": "an HDF5 file",
}
CHUNK_BYTES = 2**26
MOST_DOCUMENTS = 10_000
KNOWN: dict[Path, "Scan"] = {}
"""What another process of the job found."""
# Writes to a mapped file give it a new time of change only when they reach the disk.
SETTLED_SECONDS = 60


@dataclass(frozen=True)
class Scan:
    """What one reading of a whole file found."""

    bytes: int
    mtime_ns: int
    ctime_ns: int
    dtype: str
    sha256: str
    """Of the SHA-256s of its chunks of 64 MiB."""
    smallest: int
    largest: int
    halves: list[int]
    """The largest uint16 at positions 0, 1, 2, 3 of every 8 bytes; they tell ids of 2, 4 and 8 bytes apart."""


@dataclass(frozen=True)
class Binary:
    """A token file: its ids are those at `starts`, `lengths` tokens each, one after the other."""

    path: Path
    kind: str
    dtype: np.dtype
    header_bytes: int
    num_stored: int
    """Ids in the file, used or not."""
    starts: np.ndarray
    lengths: np.ndarray
    """int64 [segments], in ids."""
    document_ends: np.ndarray | None
    """int64 [some]: the place in the file after the last id of some documents; None if the file does not record it."""
    is_assumed: bool
    """Whether no header and no option says the type."""
    scan: Scan
    fingerprint: str

    @property
    def is_whole(self) -> bool:
        """Whether its ids are those of the whole file in their order on disk."""
        return self.header_bytes == 0 and len(self.starts) == 1 and int(self.lengths[0]) == self.num_stored

    def ids(self) -> np.ndarray:
        """All ids in the file, memory-mapped."""
        return np.memmap(self.path, self.dtype, "r", self.header_bytes, (self.num_stored,))

    def __str__(self) -> str:
        used = int(self.lengths.sum())
        left_out = f"; its index leaves out {self.num_stored - used:,} more" if used < self.num_stored else ""
        assumed = ", as nothing says otherwise," if self.is_assumed else ""
        return (
            f"{self.path} ({self.kind}): {used:,} tokens of type {self.dtype.name}{assumed} with ids from "
            f"{self.scan.smallest} to {self.scan.largest}{left_out}"
        )


def open_binary(path: Path, dtype: str | None = None) -> Binary:
    """Open a token file of another project. `dtype`, a key of RAW_DTYPES, is the type of a file without a header.
    Raises UserError for other kinds, for incomplete files, and for ids that look like those of another type."""
    check_downloaded(path)
    size = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(4096)
    starts = lengths = ends = None
    is_assumed, index_sha256 = False, ""
    if head[:12] and (found := LLM_C.get(struct.unpack("<II", head[:8].ljust(8, b"\0")))):
        kind, kind_dtype, offset = "llm.c", found, LLM_C_HEADER
        (count,) = struct.unpack("<i", head[8:12].ljust(4, b"\0"))
    elif head.startswith(NUMPY_MAGIC):
        kind, (kind_dtype, offset, count) = "numpy", _read_npy_header(path)
    elif path.suffix == ".bin" and (index := _index_of(path)):
        kind, offset, index_sha256 = "Megatron-LM", 0, file_sha256(index)
        kind_dtype, starts, lengths, ends = _read_megatron_index(index, path, size)
        count = size // kind_dtype.itemsize
    else:
        _check_raw(path, head, dtype)
        kind, offset, is_assumed = "raw ids", 0, dtype is None
        kind_dtype = RAW_DTYPES[dtype or "uint16"]
        count = max(1, size // kind_dtype.itemsize)
    if count == 0:
        raise UserError(f"{path} ({kind}) holds no token.")
    if size != offset + count * kind_dtype.itemsize:
        raise UserError(
            f"{path} has {size} bytes, but {count:,} tokens of {kind_dtype.itemsize} bytes after a header of {offset} "
            f"need {offset + count * kind_dtype.itemsize} ({kind}): copy it again, or give the type of its ids."
        )
    scan = _scan(path, kind_dtype, offset, size)
    if kind == "raw ids":
        _check_type(path, kind_dtype, scan)
    if starts is None:
        starts, lengths = np.zeros(1, np.int64), np.array([count])
    identity = [kind_dtype.str, offset, scan.sha256, index_sha256]
    fingerprint = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
    return Binary(path, kind, kind_dtype, offset, count, starts, lengths, ends, is_assumed, scan, fingerprint)


def _index_of(path: Path) -> Path | None:
    """The .idx beside a .bin, or beside the file that a link leads to."""
    found = (each.with_suffix(".idx") for each in (path, path.resolve()))
    return next(filter(Path.is_file, found), None)


def _read_npy_header(path: Path) -> tuple[np.dtype, int, int]:
    """Type, bytes of the header, and number of ids. An array of several dimensions is rows of ids."""
    try:
        array = np.load(path, mmap_mode="r")
    except (ValueError, EOFError, OSError) as error:
        raise damaged(path, error) from None
    if array.dtype.kind not in "iu" or not array.flags.c_contiguous:
        order = "C" if array.flags.c_contiguous else "F"
        raise UserError(f"{path} holds {array.dtype.name} in order {order}; ids are integers in order C.")
    return array.dtype, array.offset, array.size


def _read_megatron_index(index: Path, path: Path, size: int) -> tuple[np.dtype, np.ndarray, np.ndarray, np.ndarray]:
    """The type, the places of the sequences in the file (joined where they follow each other), and the places where
    documents end. Raises UserError unless all counts and places agree with the sizes of both files."""
    check_downloaded(index)
    content = np.memmap(index, np.uint8, "r") if index.stat().st_size else b""
    head = struct.Struct("<9sQBQQ")
    try:
        magic, version, code, num_sequences, num_bounds = head.unpack_from(content)
    except struct.error:
        raise damaged(index, "its header is incomplete.") from None
    if magic != MEGATRON_MAGIC or version != 1:
        raise UserError(f"{index} is not an index of Megatron-LM that is read here (MMIDIDX, version 1).")
    if code not in MEGATRON_DTYPES:
        raise UserError(f"{index}: its type has the code {code}; token ids have {' '.join(map(str, MEGATRON_DTYPES))}.")
    expected = head.size + 12 * num_sequences + 8 * num_bounds
    if len(content) not in (expected, expected + num_sequences):  # with a byte of mode for each, of multimodal data
        raise UserError(f"{index} has {len(content)} bytes, its counts need {expected}: copy or make it again.")
    dtype = MEGATRON_DTYPES[code]
    lengths = np.frombuffer(content, "<i4", num_sequences, head.size).astype(np.int64)
    pointers = np.frombuffer(content, "<i8", num_sequences, head.size + 4 * num_sequences)
    bounds = np.frombuffer(content, "<i8", num_bounds, head.size + 12 * num_sequences)
    starts = pointers // dtype.itemsize
    is_inside = (pointers >= 0) & (pointers % dtype.itemsize == 0) & (lengths >= 0)
    is_inside &= pointers + lengths * dtype.itemsize <= size
    if not is_inside.all():
        first = int(np.argmin(is_inside))
        raise UserError(
            f"{index}: sequence {first} is {lengths[first]} ids at byte {pointers[first]}, but {path} has {size} "
            "bytes: one of the two is incomplete, or of another data set."
        )
    if not num_bounds or bounds[0] != 0 or bounds[-1] != num_sequences or (np.diff(bounds) < 0).any():
        raise UserError(f"{index}: its documents do not divide its {num_sequences} sequences: make it again.")
    last = bounds[1:][np.diff(bounds) > 0] - 1
    last = last[:: max(1, len(last) // MOST_DOCUMENTS)]
    ends = (starts + lengths)[last]
    starts, lengths = starts[lengths > 0], lengths[lengths > 0]
    if not len(starts):
        raise UserError(f"{index} lists no token.")
    is_first = np.append(True, starts[1:] != (starts + lengths)[:-1])
    return dtype, starts[is_first], np.add.reduceat(lengths, np.flatnonzero(is_first)), ends


def _check_raw(path: Path, head: bytes, dtype: str | None) -> None:
    """Raises UserError if a file without a header that is read here cannot be ids alone."""
    for magic, what in REFUSED.items():
        if head.startswith(magic):
            raise UserError(f"{path} is {what}. tools/prepare_data.py makes token files from text.")
    if _is_litdata(path):
        raise UserError(f"{path} is a chunk of litdata, which is not read here: export its tokens to numpy's .npy.")
    is_safetensors = 2 <= int.from_bytes(head[:8], "little") < path.stat().st_size and head[8:10] == b'{"'
    if is_safetensors or head[257:262] == b"ustar":
        raise UserError(f"{path} is a {'safetensors' if is_safetensors else 'tar'} file, not token ids.")
    if len(head) >= 64 and _is_text(head):
        raise UserError(f"{path} is text, not token ids: prepare it with tools/prepare_data.py.")
    if dtype is None and path.suffix != ".bin":
        raise UserError(
            f"{path} is no token file that is known: expected a folder made by tools/prepare_data.py, Megatron-LM's "
            "or llm.c's .bin, numpy's .npy, or a .bin of uint16 ids. For ids without a header give their type."
        )


def _is_text(head: bytes) -> bool:
    """Whether bytes are text in UTF-8, whose last character may be incomplete."""
    try:
        head.decode()
    except UnicodeDecodeError as error:
        if error.start < len(head) - 3:
            return False
    return not any(byte < 32 and byte not in b"\t\n\r\f" for byte in head)


def _is_litdata(path: Path) -> bool:
    """Whether a file begins as a chunk of litdata: the number of items, the place of each, and the place of the end."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        num_items, first = (int.from_bytes(file.read(4), "little") for _ in range(2))
        if not 0 < 4 * (num_items + 2) == first <= size:
            return False
        file.seek(first - 4)
        return int.from_bytes(file.read(4), "little") == size


def _check_type(path: Path, dtype: np.dtype, scan: Scan) -> None:
    """Raises UserError if ids look wider than assumed: their upper halves, read as ids of their own, are almost 0."""
    low, second, third, fourth = scan.halves
    looks = ""
    if scan.bytes % 8 == 0 and not third and not fourth and (low or second) and scan.bytes >= 16:
        looks = "int64"
    elif scan.bytes % 4 == 0 and 16 * max(second, fourth) < max(low, third) and scan.bytes >= 64:
        looks = "uint32"
    if looks and np.dtype(looks).itemsize > dtype.itemsize:
        raise UserError(
            f"{path} holds {looks}, it seems, not {dtype.name}: its type is {looks} (data.dtype, --data-dtype)."
        )


def _scan(path: Path, dtype: np.dtype, offset: int, size: int) -> Scan:
    """Read the whole file in parallel, or what an earlier reading found if the file has not changed since."""
    stat, cache = path.stat(), path.with_name(f".{path.name}.scan.json")
    about = {"bytes": size, "mtime_ns": stat.st_mtime_ns, "ctime_ns": stat.st_ctime_ns, "dtype": dtype.str}
    known = KNOWN.get(path)
    if known and (known.bytes, known.mtime_ns, known.dtype) == (size, stat.st_mtime_ns, dtype.str):
        return known
    with suppress(OSError, ValueError):
        found = TypeAdapter(Scan).validate_json(cache.read_bytes(), strict=True)
        if about.items() <= asdict(found).items() and len(found.halves) == 4:
            return found
    if size > 2**32:
        log.info("%s (%.0f GB) is read once, for its hash and its ids", path, size / 1e9)
    num_threads = min(16, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    with ThreadPoolExecutor(num_threads) as pool:
        chunks = list(pool.map(lambda begin: _scan_chunk(path, dtype, begin, offset), range(offset, size, CHUNK_BYTES)))
    hashes, smallest, largest, halves = zip(*chunks, strict=True)
    sha256 = hashlib.sha256(b"".join(hashes)).hexdigest()
    scan = Scan(**about, sha256=sha256, smallest=min(smallest), largest=max(largest), halves=_maxima(halves))
    if abs(time.time() - stat.st_mtime) > SETTLED_SECONDS:
        with suppress(OSError):  # the folder may be read-only; another process may write the same
            write_json(cache, asdict(scan))
    return scan


def _scan_chunk(path: Path, dtype: np.dtype, begin: int, offset: int) -> tuple[bytes, int, int, list[int]]:
    with open(path, "rb") as file:
        file.seek(begin)
        content = file.read(CHUNK_BYTES)
    ids = np.frombuffer(content, dtype)
    words = np.frombuffer(content, "<u2", len(content) // 2)
    halves = [int(words[place::4].max(initial=0)) for place in range(4)]
    return hashlib.sha256(content).digest(), int(ids.min()), int(ids.max()), halves


def _maxima(rows: Sequence[list[int]]) -> list[int]:
    return [max(column) for column in zip(*rows, strict=True)]
