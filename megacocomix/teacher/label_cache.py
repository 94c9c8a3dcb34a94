"""A cache of labels: a folder of shards, each with the label ids of consecutive windows.

`manifest.json` records the origin of the labels: hashes of data, teacher and autoencoder, the settings, and the window
length. A window is identified by its position in the data, so one cache serves every seed, order, layout and size of
student with windows of this length. A shard holds the ids [windows, T, K_attr], uint16 if all fit, and the SHA-256 of
these bytes. A shard is written whole or not at all, so a file with a shard's name is complete. A cache without all of
its shards can be used."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from math import ceil
from pathlib import Path

import numpy as np
from pydantic import TypeAdapter

from megacocomix.errors import UserError
from megacocomix.files import lock_file, write_json
from megacocomix.model.losses import MASKED

FORMAT, VERSION = "megacocomix-labels", 2
MANIFEST = "manifest.json"
DIGEST_BYTES = 32
# In tokens. Killing a process loses the work on one shard: seconds on a GPU, minutes or more on a CPU.
SMALLEST_SHARD, LARGEST_SHARD = 2**16, 2**20


@dataclass(frozen=True)
class CacheManifest:
    """The origin and layout of a cache's labels."""

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
    """The teacher's precision. It is recorded, not compared: it only reorders concepts with almost equal scores."""
    teacher_context: int
    """The largest number of tokens that the teacher reads."""
    flops_per_token: float
    """The cost of labelling."""
    teacher_config: str = ""
    """Hash of the settings of the teacher's architecture. Earlier versions did not record it."""
    former_data: str = field(default="", compare=False)
    """What `data` was in earlier versions. It is compared, not recorded."""

    @property
    def num_labels(self) -> int:
        """K_attr."""
        return self.settings["num_labels"]

    @property
    def dtype(self) -> np.dtype:
        """dtype of a shard's ids; its largest value stands for MASKED."""
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
        """Yields an error line for each difference between this cache, in `folder`, and the wanted one, `other`."""
        for name, what in (("data", "data.train"), ("teacher", "teacher.model"), ("sae", "teacher.sae")):
            there, here = getattr(self, name), getattr(other, name)
            if there != here and not (name == "data" and there == other.former_data):
                yield f"label cache {folder} is stale: {what} had the hash {there[:16]}…, now it has {here[:16]}…."
        if self.teacher_config and self.teacher_config != other.teacher_config:
            yield f"label cache {folder} is stale: the config of teacher.model has changed since."
        sizes = lambda each: {"window": each.context, "windows": each.num_windows, "concepts": each.num_concepts}
        there, here = self.settings | sizes(self), other.settings | sizes(other)
        changed = [f"{key} {there.get(key)} there, {here[key]} here" for key in here if there.get(key) != here[key]]
        if changed:
            dumps = (json.dumps(each, sort_keys=True).encode() for each in (there, here))
            was, now = (hashlib.sha256(dump).hexdigest()[:16] for dump in dumps)
            yield (
                f"label cache {folder} is stale: the settings had the hash {was}…, now they have {now}…: "
                f"{'; '.join(changed)}."
            )


def default_shard_windows(num_windows: int, context: int) -> int:
    """Windows of a shard: about a thousand shards, within bounds."""
    tokens = min(max(num_windows * context // 1000, SMALLEST_SHARD), LARGEST_SHARD)
    return max(1, tokens // context)


class LabelCache:
    """Reads the complete shards of a cache. It keeps no file open, because a large cache has more shards than a process
    may open. Raises UserError for a folder that is no cache, and for a shard whose size is wrong."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        files = {int(file.stem.removeprefix("labels-")) for file in self.folder.glob("labels-?????*.bin")}
        self._held = files & set(range(self.manifest.num_shards))
        for shard in self._held:
            file = shard_file(self.folder, shard)
            expected = len(self.manifest.windows(shard)) * self.manifest.window_bytes + DIGEST_BYTES
            if (found := file.stat().st_size) != expected:
                raise UserError(f"{file} is damaged: {found} bytes, expected {expected}. Delete it and label it again.")

    @property
    def num_held(self) -> int:
        """Number of windows with labels."""
        return sum(len(self.manifest.windows(shard)) for shard in self._held)

    @property
    def is_complete(self) -> bool:
        """Whether all windows have labels."""
        return self.num_held == self.manifest.num_windows

    def read(self, window: int) -> np.ndarray | None:
        """Labels of a window, int64 [T, K_attr], or None if the cache does not have them."""
        manifest = self.manifest
        shard, row = divmod(window, manifest.shard_windows)
        if shard not in self._held:
            return None
        with open(shard_file(self.folder, shard), "rb") as file:
            file.seek(row * manifest.window_bytes)
            ids = np.frombuffer(file.read(manifest.window_bytes), manifest.dtype)
        is_masked, labels = ids == np.iinfo(ids.dtype).max, ids.astype(np.int64)
        if ids.size != manifest.context * manifest.num_labels or (labels[~is_masked] >= manifest.num_concepts).any():
            raise UserError(f"{file.name} is damaged: label it again with tools/label_concepts.py.")
        labels[is_masked] = MASKED
        return labels.reshape(manifest.context, manifest.num_labels)


def shard_file(folder: Path, shard: int) -> Path:
    """The path of a complete shard."""
    return folder / f"labels-{shard:05d}.bin"


def read_manifest(folder: Path) -> CacheManifest:
    """Raises UserError if the folder has no manifest that this version reads."""
    file = folder / MANIFEST
    if not file.is_file():
        raise UserError(f"{folder} is no label cache: it holds no {MANIFEST}. Make one with tools/label_concepts.py.")
    try:
        values = json.loads(file.read_bytes())
        found = values.pop("format"), values.pop("version")
        if found == (FORMAT, 1):  # version 1 called a chunk a piece
            found, values["settings"]["chunk"] = (FORMAT, VERSION), values["settings"].pop("piece")
        values["settings"].setdefault("sae_precision", "fp32")  # earlier versions knew no other
        if found != (FORMAT, VERSION):
            raise UserError(f"{file} is of format {found[0]} version {found[1]}, not {FORMAT} version {VERSION}.")
        manifest = TypeAdapter(CacheManifest).validate_json(json.dumps(values), strict=True)
        sizes = (manifest.num_labels, manifest.num_windows, manifest.shard_windows, manifest.context)
        if any(type(size) is not int or size < 1 for size in sizes):
            raise ValueError
        return manifest
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{file} is damaged: label the data again.") from None


def start_cache(folder: Path, manifest: CacheManifest) -> CacheManifest:
    """Make the folder a cache with this manifest, or check that it is one. Returns the manifest in the folder. Several
    processes may call this at once. Raises UserError if the cache has another origin, the folder other files, or its
    file system no locks."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a") as lock:
        lock_file(lock, wait=True)
        if (folder / MANIFEST).is_file():
            if problems := list(read_manifest(folder).mismatches(folder, manifest)):
                raise UserError(*problems, f"Choose another --out, or delete {folder}.")
        elif others := sorted(file.name for file in folder.iterdir() if file.name != ".lock"):
            raise UserError(f"--out {folder} holds other files, such as {others[0]}: choose an empty folder.")
        else:
            values = asdict(manifest)
            del values["former_data"]
            write_json(folder / MANIFEST, {"format": FORMAT, "version": VERSION, **values})
    return read_manifest(folder)


@contextmanager
def claim_shard(folder: Path, shard: int, verify: bool = False) -> Iterator[Callable[[np.ndarray], None] | None]:
    """A context in which no other process writes this shard. Yields a function that writes its labels, int64 [windows,
    T, K_attr]. Yields None if the shard exists already (with `verify`: and is sound), or another process is writing it.
    A claim ends with its process, even if the process is killed."""
    file, aside = shard_file(folder, shard), folder / f"labels-{shard:05d}.part"
    manifest = read_manifest(folder)

    def is_done() -> bool:
        return file.is_file() and (not verify or is_sound(folder, shard))

    if is_done():
        yield None
        return
    with open(aside, "ab") as stream:
        if not lock_file(stream):
            yield None
            return

        def is_locked() -> bool:
            """Whether the lock is on the file at `aside`: its former holder may have renamed the file meanwhile."""
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
    """Whether a shard's bytes match the SHA-256 at its end."""
    content = memoryview(shard_file(folder, shard).read_bytes())
    return hashlib.sha256(content[:-DIGEST_BYTES]).digest() == content[-DIGEST_BYTES:]
