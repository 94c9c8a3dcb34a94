"""Turns raw text into token shards: reads documents in order, tokenises them in parallel, writes them in order.

The result depends only on the inputs and the options, not on the number of workers or on interruptions. Every few
seconds the shards are flushed and OUT/.partial/state.json records their lengths. A restart truncates the shards to
those lengths and skips the documents already done. Manifests are written last: a split without one is unfinished.
Memory is bounded by the longest document.
"""

import json
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict
from itertools import islice
from pathlib import Path

from megacocomix.data.documents import is_validation, read_documents
from megacocomix.data.sources import LeftOut, find_sources, source_files
from megacocomix.data.tokenizer import Tokenizer, encode_in_parallel, load_tokenizer, train_sentencepiece
from megacocomix.data.tokens import MANIFEST, ShardWriter, TokenShards, file_fingerprint, read_manifest, token_dtype
from megacocomix.errors import UserError
from megacocomix.files import file_sha256, lock_file, write_json

BATCH_CHARS = 2**18  # given to a worker at a time
COMMIT_SECONDS = 10  # an interruption costs at most about this much work
CHUNK_CHARS = 2**20  # longer documents are tokenised in chunks of about this size, where the tokenizer allows it

Chunk = tuple[str, tuple[str, bool]]  # text, (split, whether the chunk ends a document)


def _batches(documents: Iterable[str], valid: float, cut: re.Pattern | None, done: int) -> Iterator[list[Chunk]]:
    """Chunks of documents in batches of about BATCH_CHARS, without the `done` first chunks."""
    batch, size = [], 0
    for chunk in islice(_chunks(documents, valid, cut), done, None):
        batch.append(chunk)
        size += len(chunk[0])
        if size >= BATCH_CHARS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _chunks(documents: Iterable[str], valid: float, cut: re.Pattern | None) -> Iterator[Chunk]:
    for text in documents:
        split = "valid" if is_validation(text, valid) else "train"
        start = 0
        while match := cut and cut.search(text, start + CHUNK_CHARS):
            yield text[start : match.end()], (split, False)
            start = match.end()
        yield text[start:], (split, True)


def train_tokenizer(
    inputs: Sequence[str],
    out: str | Path,
    vocab_size: int,
    valid: float = 0.0,
    field: str = "text",
    skip_unknown: bool = False,
) -> tuple[Tokenizer, LeftOut]:
    """Train a SentencePiece tokenizer on `inputs`, without the documents of the validation split. Also returns what
    else was not read."""
    if not 0 <= valid < 1:
        raise UserError(f"--valid {valid} is not a fraction from 0 up to 1.")
    left_out = LeftOut()
    documents = read_documents(find_sources(inputs, left_out, skip_unknown), field, left_out)
    texts = (text for text in documents if not is_validation(text, valid))
    return train_sentencepiece(texts, out, vocab_size), left_out


def prepare_data(
    inputs: Sequence[str],
    out: str | Path,
    tokenizer: str,
    valid: float = 0.0,
    workers: int = 1,
    field: str = "text",
    shard_tokens: int = 100_000_000,
    skip_unknown: bool = False,
) -> tuple[dict[str, dict], bool]:
    """Tokenise `inputs` into out/train and, with `valid` > 0, about that fraction of documents into out/valid.

    `skip_unknown` leaves out the files of an unknown kind in folders. Returns the manifest of each split, and whether
    they were complete already. A manifest's `left_out` has the fields of `LeftOut`; those of earlier versions lack it.
    Resumes interrupted work with the same settings. Raises UserError, and destroys nothing, for invalid options or
    inputs, for text without a single token, and if `out` holds anything but this same result or a part of it.
    """
    out = Path(out)
    if not 0 <= valid < 1 or workers < 1 or shard_tokens < 1:
        raise UserError("--valid must be in [0, 1), --workers and --shard-tokens at least 1.")
    left_out = LeftOut()
    sources = find_sources(inputs, left_out, skip_unknown)
    vocabulary = load_tokenizer(tokenizer)
    settings = {
        "tokenizer": {key: getattr(vocabulary, key) for key in ("name", "sha256", "eot_id")},
        "vocab_size": vocabulary.vocab_size,
        "sources": _describe(sources, "sha256", file_sha256),
        "field": field,
        "valid": valid,
        "shard_tokens": shard_tokens,
    }
    splits = ["valid", "train"] if valid else ["train"]  # train's manifest is written last: then all is complete
    if (out / "train" / MANIFEST).exists():
        found = read_manifest(out / "train")
        # Earlier versions recorded the tokenizer's vocabulary, and of each source its size and first and last MiB.
        if found["tokenizer"]["sha256"] == vocabulary.vocabulary_sha256:
            settings["tokenizer"]["sha256"] = vocabulary.vocabulary_sha256
        if any("fingerprint" in source for source in found.get("sources", ())):
            settings["sources"] = _describe(sources, "fingerprint", file_fingerprint)
        _check_same(out, found, settings)
        for split in splits:
            TokenShards.open(out / split)
        shutil.rmtree(out / ".partial", ignore_errors=True)  # left if killed after the last manifest was written
        return {split: read_manifest(out / split) for split in splits}, True
    try:
        with _lock(out):
            state = _restore(out, settings, splits)
            with closing(read_documents(sources, field, left_out)) as documents:
                batches = _batches(documents, valid, vocabulary.cut, state["chunks"])
                with closing(encode_in_parallel(tokenizer, batches, workers)) as encoded:
                    return _write(out, state, encoded, left_out), False
    except OSError as error:
        raise UserError(f"{out}: {error}. Finished work is kept: the same command continues it.") from error


def _write(out: Path, state: dict, batches: Iterable, left_out: LeftOut) -> dict[str, dict]:
    settings = state["settings"]
    dtype = token_dtype(settings["vocab_size"])
    with ExitStack() as stack:
        writers = {}
        for split, progress in state["splits"].items():
            writers[split] = ShardWriter(out / split, dtype, settings["shard_tokens"], **progress)
            stack.enter_context(closing(writers[split]))

        def commit() -> None:
            state["splits"] = {split: writer.flush() for split, writer in writers.items()}
            write_json(out / ".partial" / "state.json", state)

        last_commit = time.monotonic()
        for batch in batches:
            for ids, (split, ends_document) in batch:
                writers[split].append(ids)
                if ends_document:
                    writers[split].end_document(settings["tokenizer"]["eot_id"])
            state["chunks"] += len(batch)
            if time.monotonic() - last_commit > COMMIT_SECONDS:
                commit()
                last_commit = time.monotonic()
        if state["chunks"] == 0:
            raise UserError("there is no text in the inputs: every document is empty.")
        for split, writer in writers.items():
            if writer.num_tokens == 0:
                raise UserError(
                    f"no document fell into {split}: --valid {settings['valid']} is too small for this text."
                )
        commit()
        values = settings | {"left_out": asdict(left_out)}
        manifests = {split: writer.finish(values) for split, writer in writers.items()}
    shutil.rmtree(out / ".partial")
    return manifests


def _restore(out: Path, settings: dict, splits: list[str]) -> dict:
    """The recorded state of interrupted work, or else a new state."""
    file = out / ".partial" / "state.json"
    if file.exists():
        try:
            state = json.loads(file.read_bytes())
            chunks, found, _ = state["chunks"], dict(state["settings"]), dict(state["splits"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{file} is damaged: delete {out} and start again.") from error
        if chunks:
            _check_same(out, found, settings)
            return state
        for split in ("train", "valid"):  # begun, but nothing recorded: the shards are of no use
            shutil.rmtree(out / split, ignore_errors=True)
    taken = [str(out / split) for split in ("train", "valid") if (out / split).exists()]
    if taken:
        raise UserError(f"{' and '.join(taken)}: exists, not made by this command. Choose another --out.")
    state = {"settings": settings, "chunks": 0, "splits": {split: {} for split in splits}}
    write_json(file, state)
    return state


def _check_same(out: Path, found: dict, wanted: dict) -> None:
    changed = [key for key, value in wanted.items() if found.get(key) != value]
    if changed:
        raise UserError(
            f"{out} holds data prepared with other settings ({', '.join(changed)}): choose another --out, or delete it."
        )


def _describe(sources: Sequence[Path | str], key: str, hash_file: Callable[[Path], str]) -> list[dict]:
    """Identifies the inputs by name and content, not by folder. Files are hashed in parallel."""
    files = [file for source in sources for file in source_files(source)]
    with ThreadPoolExecutor() as pool:
        hashes = dict(zip(files, pool.map(hash_file, files), strict=True))
    described = []
    for source in sources:
        described += [
            {"name": file.name, "bytes": file.stat().st_size, key: hashes[file]} for file in source_files(source)
        ] or [{"name": str(source)}]
    return described


@contextmanager
def _lock(out: Path) -> Iterator[None]:
    """Prevents a second process from writing to the same folder."""
    (out / ".partial").mkdir(parents=True, exist_ok=True)
    with open(out / ".partial" / "lock", "w") as file:
        if not lock_file(file, is_optional=True):
            raise UserError(f"another process is preparing {out}: wait for it or choose another --out.")
        yield
