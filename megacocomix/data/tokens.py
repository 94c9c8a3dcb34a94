"""Token shards on disk and the fixed windows that training reads from them.

A split of a data set is a folder with `manifest.json` and `shard-00000.bin`, `shard-00001.bin`, … of little-endian
uint16 or uint32 ids. Each document is followed by the end-of-text id. Files of other projects are read in place (see
binary.py). Everything is memory-mapped.
"""

import hashlib
import json
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from megacocomix.data.binary import Binary, open_binary
from megacocomix.errors import UserError
from megacocomix.files import check_downloaded, file_sha256, read_json, write_json

FORMAT, VERSION = "megacocomix-tokens", 1
MANIFEST = "manifest.json"
DTYPES = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
MEBIBYTE = 2**20
RECORD_SECONDS = 10  # an interrupted verification repeats about this much


class TokenShards:
    """The tokens of one split as one long sequence of segments: whole shards, or parts of another project's file.

    `fingerprint` identifies the content, not the path: a hash of the shards' recorded SHA-256s, or of a whole file.
    `vocab_size`, `tokenizer_sha256` and `eot_id` are None for a file of another project, which does not record them;
    `binary` describes such a file.
    """

    def __init__(
        self,
        files: Sequence[np.ndarray],
        file_of: np.ndarray,
        firsts: np.ndarray,
        lengths: np.ndarray,
        fingerprint: str,
        manifest: dict | None = None,
        binary: Binary | None = None,
    ):
        """Segment i is the `lengths[i]` ids from place `firsts[i]` on of `files[file_of[i]]`."""
        self.fingerprint, self.binary = fingerprint, binary
        self.vocab_size = manifest and manifest["vocab_size"]
        self.tokenizer_sha256 = manifest and manifest["tokenizer"]["sha256"]
        self.eot_id = manifest and manifest["tokenizer"].get("eot_id")
        self._files, self._file_of, self._firsts = files, file_of, firsts
        self._starts = np.append(0, np.cumsum(lengths))

    @classmethod
    def open(cls, path: str | Path, dtype: str | None = None, verify: bool = False) -> "TokenShards":
        """The split at `path`: a folder with a manifest, or a file of another project; `dtype` is the type of ids in a
        file without a header (data.dtype).

        Checks the size of every shard. `verify` also compares the SHA-256 of every shard with the manifest, unless it
        did so before and the shard has not changed since. A file of another project is read whole, once. Raises
        UserError that names the file and what is wrong with it.
        """
        path = Path(path)
        if path.is_file():
            binary = open_binary(path, dtype)
            file_of = np.zeros(len(binary.starts), int)
            return cls([binary.ids()], file_of, binary.starts, binary.lengths, binary.fingerprint, binary=binary)
        manifest = read_manifest(path)
        files = [(path / shard["file"], shard["num_tokens"]) for shard in manifest["shards"]]
        dtype_name, tokenizer_sha256 = manifest["dtype"], manifest["tokenizer"]["sha256"]
        hashes = [shard["sha256"] for shard in manifest["shards"]]
        fingerprint = hashlib.sha256(json.dumps([dtype_name, tokenizer_sha256, hashes]).encode()).hexdigest()
        shards = [_map_shard(file, count, DTYPES[dtype_name]) for file, count in files]
        if verify:
            _verify(path, dict(zip((file for file, _ in files), hashes, strict=True)))
        lengths = np.array([count for _, count in files])
        return cls(shards, np.arange(len(shards)), np.zeros_like(lengths), lengths, fingerprint, manifest)

    @cached_property
    def former_fingerprint(self) -> str:
        """The fingerprint in the form of earlier versions, which runs and label caches may have recorded. They read a
        file of another project as it lies on disk, and hashed its size and its first and last MiB."""
        before = ("uint16", "int32") if self.binary and self.binary.kind == "Megatron-LM" else ("uint16",)
        is_read_as_before = self.binary and self.binary.is_whole and self.binary.dtype.name in before
        return file_fingerprint(self.binary.path) if is_read_as_before else self.fingerprint

    def fingerprint_as(self, recorded: str | None) -> str:
        """The fingerprint to compare with a recorded one."""
        return recorded if recorded and recorded == self.former_fingerprint else self.fingerprint

    def __len__(self) -> int:
        return int(self._starts[-1])

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens `start` … `start + count` as int64 [count], across shard boundaries."""
        if start < 0 or count < 0 or start + count > len(self):
            raise IndexError(f"tokens {start} to {start + count} of {len(self)}")
        tokens = np.empty(count, dtype=np.int64)
        filled = 0
        while filled < count:
            segment = np.searchsorted(self._starts, start + filled, side="right") - 1
            place = self._firsts[segment] + start + filled - self._starts[segment]
            fitting = min(count - filled, self._starts[segment + 1] - start - filled)
            found = self._files[self._file_of[segment]][place : place + fitting]
            tokens[filled : filled + found.size] = found
            filled += found.size
        return tokens


class TokenDataset:
    """Windows of `context` tokens, window i at offset i * context. Their order is a function of the position.

    A position counts samples since the start of training, over all ranks and epochs. If `seed` is None, the windows are
    in file order in every epoch (for validation). Tokens after the last whole window are not used.
    """

    def __init__(self, shards: TokenShards, context: int, seed: int | None):
        self.shards = shards
        self.context = context
        self.seed = seed
        self.num_windows = len(shards) // context
        if self.num_windows == 0:
            raise UserError(f"the data holds {len(shards)} tokens, fewer than one window of {context}.")

    def window_index(self, position: int) -> int:
        """The index of the window at this position."""
        epoch, index = divmod(position, self.num_windows)
        return index if self.seed is None else permuted_index(self.seed, epoch, index, self.num_windows)

    def batch(self, positions: Sequence[int]) -> np.ndarray:
        """The windows at these positions, int64 [len(positions), context]."""
        return self.read([self.window_index(position) for position in positions])

    def read(self, windows: Sequence[int]) -> np.ndarray:
        """The tokens of these windows, int64 [len(windows), context]."""
        tokens = np.empty((len(windows), self.context), dtype=np.int64)
        for row, window in enumerate(windows):
            tokens[row] = self.shards.read(window * self.context, self.context)
        return tokens


@dataclass
class ShardWriter:
    """Appends tokens to shards of `shard_tokens` each (the last may be shorter) and writes the manifest.

    A writer made with the values that an earlier writer's `flush` returned goes on from that point. Anything written
    after that flush is discarded.
    """

    folder: Path
    dtype: np.dtype
    shard_tokens: int
    num_tokens: int = 0
    num_documents: int = 0
    hashes: Sequence[str] = ()
    """Of the finished shards."""

    def __post_init__(self):
        self.hashes = list(self.hashes)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._file = None
        if self.num_tokens % self.shard_tokens:
            self._file = open(self._path(), "r+b")  # noqa: SIM115 (closed by close)
            self._file.seek(self.num_tokens % self.shard_tokens * self.dtype.itemsize)
            self._file.truncate()

    def append(self, tokens: np.ndarray) -> None:
        """Add tokens [n] of the current document."""
        while tokens.size:
            if self._file is None:
                self._file = open(self._path(), "wb")  # noqa: SIM115
            room = self.shard_tokens - self.num_tokens % self.shard_tokens
            fitting, tokens = tokens[:room], tokens[room:]
            self._file.write(fitting.astype(self.dtype, copy=False))
            self.num_tokens += fitting.size
            if fitting.size == room:
                self._end_shard()

    def end_document(self, eot_id: int) -> None:
        """Add the end-of-text id."""
        self.append(np.array([eot_id]))
        self.num_documents += 1

    def flush(self) -> dict:
        """Write everything to disk. Returns the arguments for a writer that goes on from here."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
        return {"num_tokens": self.num_tokens, "num_documents": self.num_documents, "hashes": [*self.hashes]}

    def close(self) -> None:
        """Close the open shard. Unflushed tokens may be lost."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def finish(self, settings: dict) -> dict:
        """End the last shard, then write and return the manifest, which includes `settings`."""
        if self._file is not None:
            self._end_shard()
        starts = range(0, self.num_tokens, self.shard_tokens)
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "dtype": self.dtype.name,
            **settings,
            "num_tokens": self.num_tokens,
            "num_documents": self.num_documents,
            "shards": [
                {
                    "file": _shard_name(index),
                    "num_tokens": min(self.shard_tokens, self.num_tokens - start),
                    "sha256": sha256,
                }
                for index, (start, sha256) in enumerate(zip(starts, self.hashes, strict=True))
            ],
        }
        write_json(self.folder / MANIFEST, manifest)
        return manifest

    def _path(self) -> Path:
        return self.folder / _shard_name(len(self.hashes))

    def _end_shard(self) -> None:
        self.flush()
        self.close()
        self.hashes.append(file_sha256(self._path()))


def _verify(folder: Path, hashes: dict[Path, str]) -> None:
    """Raises UserError if a shard does not have its SHA-256. Those that had it are in .verified.json."""
    record = folder / ".verified.json"
    times = {file.name: [(stat := file.stat()).st_mtime_ns, stat.st_ctime_ns] for file in hashes}
    known = {}
    with suppress(OSError, ValueError, TypeError):
        known = dict(json.loads(record.read_bytes()))
    written = time.monotonic()
    waiting = {file: sha256 for file, sha256 in hashes.items() if known.get(file.name) != [sha256, *times[file.name]]}
    with ThreadPoolExecutor() as pool:
        for (file, expected), found in zip(waiting.items(), pool.map(file_sha256, waiting), strict=True):
            if found != expected:
                raise UserError(f"{file} is damaged: its SHA-256 differs from the manifest's.")
            known[file.name] = [expected, *times[file.name]]
            if time.monotonic() - written > RECORD_SECONDS or len(known) == len(hashes):
                written = time.monotonic()
                with suppress(OSError):  # the folder may be read-only
                    write_json(record, known)


def _map_shard(file: Path, num_tokens: int, dtype: np.dtype) -> np.ndarray:
    expected = num_tokens * dtype.itemsize
    if not file.is_file():
        raise UserError(f"{file} is missing: the manifest lists it with {expected} bytes.")
    if (found := file.stat().st_size) != expected:
        check_downloaded(file)
        raise UserError(f"{file} has {found} bytes, expected {expected}: copy or prepare the data again.")
    return np.memmap(file, dtype=dtype, mode="r", shape=(num_tokens,))


def _shard_name(index: int) -> str:
    return f"shard-{index:05d}.bin"


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest shard dtype that holds every id of the vocabulary."""
    return DTYPES["uint16" if vocab_size <= 2**16 else "uint32"]


def read_manifest(folder: Path) -> dict:
    """The manifest of one split. Raises UserError if the folder has none, or one that this version cannot read."""
    file = folder / MANIFEST
    if not folder.exists():
        raise UserError(f"{folder} does not exist: make it with tools/prepare_data.py.")
    if not file.is_file():
        splits = " ".join(str(manifest.parent) for manifest in sorted(folder.glob(f"*/{MANIFEST}")))
        hint = f"give one of its splits: {splits}" if splits else "tools/prepare_data.py did not finish it"
        raise UserError(f"{folder} holds no {MANIFEST}: {hint}.")
    manifest = read_json(file, FORMAT, VERSION, "prepare the data again")
    try:
        shards = [(str(shard["file"]), int(shard["num_tokens"]), shard["sha256"]) for shard in manifest["shards"]]
        if manifest["dtype"] not in DTYPES or not shards or int(manifest["vocab_size"]) < 1:
            raise ValueError
        str(manifest["tokenizer"]["sha256"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is damaged: prepare the data again.") from error
    return manifest


def file_fingerprint(path: Path) -> str:
    """SHA-256 of the file's size and its first and last MiB. It tells big files apart without reading all of them."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(MEBIBYTE)
        file.seek(max(0, size - MEBIBYTE))
        return hashlib.sha256(b"%d\n" % size + head + file.read()).hexdigest()


def check_token_ids(tokens, vocab_size: int, source: str | Path) -> None:
    """Raises UserError if a token is outside the vocabulary. A GPU's embedding would only report 'device-side assert',
    and the external kinds of data do not record their vocabulary. `tokens` is an array or a tensor of ids."""
    if tokens.min() < 0 or tokens.max() >= vocab_size:
        wrong = tokens.min() if tokens.min() < 0 else tokens.max()
        raise UserError(f"{source} holds token {wrong}, but model and teacher know those up to {vocab_size - 1}.")


NUM_ROUNDS = 8  # four are enough for halves of many bits; small data sets have halves of few bits
MASK = 2**64 - 1


def permuted_index(seed: int, epoch: int, index: int, size: int) -> int:
    """The item, of `size`, at place `index` of this epoch: a bijection of range(size).

    Never change its results: a run that resumes relies on them.
    """
    assert 0 <= index < size, f"index {index} outside of range({size})"
    bits = (size - 1).bit_length()
    low_bits = bits // 2
    low_mask, high_mask = (1 << low_bits) - 1, (1 << (bits - low_bits)) - 1
    key = _mix(_mix(seed) + epoch)
    round_keys = [_mix(key + i) for i in range(NUM_ROUNDS)]
    while True:
        high, low = index >> low_bits, index & low_mask
        for even_key, odd_key in zip(round_keys[::2], round_keys[1::2], strict=True):
            high ^= _mix(even_key ^ low) & high_mask
            low ^= _mix(odd_key ^ high) & low_mask
        index = high << low_bits | low
        if index < size:
            return index


def _mix(value: int) -> int:
    """SplitMix64's finaliser: every bit of the input changes about half of the 64 bits of the output."""
    value = (value + 0x9E3779B97F4A7C15) & MASK
    value = ((value ^ value >> 30) * 0xBF58476D1CE4E5B9) & MASK
    value = ((value ^ value >> 27) * 0x94D049BB133111EB) & MASK
    return value ^ value >> 31
