"""Labels that were computed once: a folder of shards, each holding the label ids of a run of windows.

`manifest.json` says what the labels are of: hashes of data, teacher and autoencoder, the settings, the window length. A
window is known by its place in the data, so one cache serves every seed, order, layout and size of student that reads
windows of this length. A shard is the ids, uint16 where all fit, [windows, T, K_attr], and the SHA-256 of these bytes.
It appears whole or not at all, so whatever has its name is complete, and a cache that lacks shards is usable."""

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from math import ceil
from pathlib import Path

import numpy as np
from pydantic import TypeAdapter

from megacocomix.errors import UserError
from megacocomix.files import write_json
from megacocomix.model.losses import MASKED

FORMAT, VERSION = "megacocomix-labels", 2
MANIFEST = "manifest.json"
DIGEST_BYTES = 32
# What a kill can cost: some seconds of labelling on a GPU; on a CPU minutes, or with a large teacher and much text
# more.
SMALLEST_SHARD, LARGEST_SHARD = 2**16, 2**20  # in tokens


@dataclass(frozen=True)
class CacheManifest:
    """What a cache holds, or will hold."""

    data: str
    """Fingerprint of the token shards."""
    teacher: str
    """SHA-256 of the teacher's weights."""
    sae: str
    """SHA-256 of the autoencoder's file."""
    settings: dict
    """LabelSettings."""
    context: int
    """T, tokens of a window."""
    num_windows: int
    shard_windows: int
    """Windows of a shard; the last may have fewer."""
    num_concepts: int
    precision: str
    """What the teacher computed in. Said, not compared: it decides only between concepts that score alike."""
    teacher_context: int
    """Most tokens that the teacher reads."""
    flops_per_token: float
    """What labelling cost."""

    @property
    def num_labels(self) -> int:
        """K_attr."""
        return self.settings["num_labels"]

    @property
    def dtype(self) -> np.dtype:
        """Of a shard's ids; its largest value stands for MASKED."""
        return np.dtype("<u2" if self.num_concepts < 2**16 else "<u4")

    @property
    def num_shards(self) -> int:
        """Shards of the whole cache."""
        return ceil(self.num_windows / self.shard_windows)

    @property
    def window_bytes(self) -> int:
        """Bytes of a window's ids."""
        return self.context * self.num_labels * self.dtype.itemsize

    def windows(self, shard: int) -> range:
        """The windows of a shard."""
        return range(shard * self.shard_windows, min((shard + 1) * self.shard_windows, self.num_windows))

    def mismatches(self, folder: Path, other: "CacheManifest") -> Iterator[str]:
        """A line for everything in which `other`, what is wanted here, is not what this cache in `folder` was made
        of."""
        for name, what in (("data", "data.train"), ("teacher", "teacher.model"), ("sae", "teacher.sae")):
            there, here = getattr(self, name), getattr(other, name)
            if there != here:
                yield (
                    f"label cache {folder} is stale: {what} had the hash {there[:16]}… there, and has "
                    f"{here[:16]}… here."
                )
        there = {**self.settings, "window": self.context, "concepts": self.num_concepts}
        here = {**other.settings, "window": other.context, "concepts": other.num_concepts}
        changed = [f"{key} {there.get(key)} there, {here[key]} here" for key in here if there.get(key) != here[key]]
        if changed:
            hashes = [
                hashlib.sha256(json.dumps(each, sort_keys=True).encode()).hexdigest()[:16] for each in (there, here)
            ]
            yield (
                f"label cache {folder} is stale: the settings had the hash {hashes[0]}… there, and have "
                f"{hashes[1]}… here: {'; '.join(changed)}."
            )


def default_shard_windows(num_windows: int, context: int) -> int:
    """Windows of a shard: about a thousand shards, within bounds."""
    tokens = min(max(num_windows * context // 1000, SMALLEST_SHARD), LARGEST_SHARD)
    return max(1, tokens // context)


class LabelCache:
    """The complete shards of a cache. No file is kept open: a large cache has more shards than a process may. Raises
    UserError for a folder that is no cache, or a shard of another size than its manifest says."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        files = {int(file.stem.removeprefix("labels-")) for file in self.folder.glob("labels-?????*.bin")}
        self._held = files & set(range(self.manifest.num_shards))
        for shard in self._held:
            self._check_size(shard)

    @property
    def num_held(self) -> int:
        """Windows whose labels are there."""
        return sum(len(self.manifest.windows(shard)) for shard in self._held)

    @property
    def is_complete(self) -> bool:
        """Whether all windows are there."""
        return self.num_held == self.manifest.num_windows

    def read(self, window: int) -> np.ndarray | None:
        """Labels of a window, int64 [T, K_attr], or None where the cache does not hold them."""
        manifest = self.manifest
        shard, row = divmod(window, manifest.shard_windows)
        if shard not in self._held:
            return None
        with open(shard_file(self.folder, shard), "rb") as file:
            file.seek(row * manifest.window_bytes)
            ids = np.frombuffer(file.read(manifest.window_bytes), manifest.dtype)
        is_masked, labels = ids == np.iinfo(ids.dtype).max, ids.astype(np.int64)
        if ids.size != manifest.context * manifest.num_labels or (labels[~is_masked] >= manifest.num_concepts).any():
            raise UserError(
                f"{shard_file(self.folder, shard)} is damaged: label it again with tools/label_concepts.py."
            )
        labels[is_masked] = MASKED
        return labels.reshape(manifest.context, manifest.num_labels)

    def _check_size(self, shard: int) -> None:
        file = shard_file(self.folder, shard)
        expected = len(self.manifest.windows(shard)) * self.manifest.window_bytes + DIGEST_BYTES
        if (found := file.stat().st_size) != expected:
            raise UserError(f"{file} is damaged: {found} bytes, expected {expected}. Delete it and label it again.")


def shard_file(folder: Path, shard: int) -> Path:
    """Where a shard is, once it is complete."""
    return folder / f"labels-{shard:05d}.bin"


def read_manifest(folder: Path) -> CacheManifest:
    """Raises UserError where the folder has none that this version reads."""
    file = folder / MANIFEST
    if not file.is_file():
        raise UserError(f"{folder} is no label cache: it holds no {MANIFEST}. Make one with tools/label_concepts.py.")
    try:
        values = json.loads(file.read_bytes())
        found = values.pop("format"), values.pop("version")
        if found == (FORMAT, 1):  # what is now called a chunk was a piece
            found, values["settings"]["chunk"] = (FORMAT, VERSION), values["settings"].pop("piece")
        if found != (FORMAT, VERSION):
            raise UserError(f"{file} is of format {found[0]} version {found[1]}, not {FORMAT} version {VERSION}.")
        manifest = TypeAdapter(CacheManifest).validate_json(json.dumps(values), strict=True)
        sizes = (manifest.num_labels, manifest.num_windows, manifest.shard_windows, manifest.context)
        if any(type(size) is not int or size < 1 for size in sizes):
            raise ValueError
        return manifest
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{file} is damaged: label the data again.") from None


def start_cache(folder: Path, manifest: CacheManifest) -> CacheManifest:
    """Make the folder a cache of this manifest, or check that it is one; returns the manifest that is there. Several
    processes may do so at once. Raises UserError where it is a cache of something else, or holds other files."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (folder / MANIFEST).is_file():
            if problems := list(read_manifest(folder).mismatches(folder, manifest)):
                raise UserError(*problems, f"Choose another --out, or delete {folder}.")
        elif others := sorted(file.name for file in folder.iterdir() if file.name != ".lock"):
            raise UserError(f"--out {folder} holds other files, such as {others[0]}: choose an empty folder.")
        else:
            write_json(folder / MANIFEST, {"format": FORMAT, "version": VERSION, **asdict(manifest)})
    return read_manifest(folder)


@contextmanager
def claim_shard(folder: Path, shard: int, verify: bool = False) -> Iterator[Callable[[np.ndarray], None] | None]:
    """Within it no other process writes this shard. Yields what writes its labels, int64 [windows, T, K_attr], for
    good; None where the shard is there already (with `verify`: and sound), or another process is at it. A claim ends
    with its process, however it ends."""
    file, aside = shard_file(folder, shard), folder / f"labels-{shard:05d}.part"
    manifest = read_manifest(folder)

    def is_done() -> bool:
        return file.is_file() and (not verify or is_sound(folder, shard))

    if is_done():
        yield None
        return
    with open(aside, "ab") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
            return

        def is_locked() -> bool:
            """Whether it is this file that the lock is of: the process that had it may have renamed it meanwhile."""
            return aside.exists() and os.path.samestat(os.fstat(stream.fileno()), aside.stat())

        def write(labels: np.ndarray) -> None:
            ids = np.where(labels == MASKED, np.iinfo(manifest.dtype).max, labels).astype(manifest.dtype).tobytes()
            stream.truncate(0)
            stream.write(ids + hashlib.sha256(ids).digest())
            stream.flush()
            os.fsync(stream.fileno())
            os.replace(aside, file)

        try:
            yield write if is_locked() and not is_done() else None
        finally:
            if is_locked():
                aside.unlink()


def is_sound(folder: Path, shard: int) -> bool:
    """Whether a shard is what was written: its bytes give the SHA-256 at its end."""
    content = memoryview(shard_file(folder, shard).read_bytes())
    return hashlib.sha256(content[:-DIGEST_BYTES]).digest() == content[-DIGEST_BYTES:]
