"""Three kinds of tokenizer behind one class: GPT-2's byte pairs, SentencePiece, a Hugging Face folder.

Special tokens are never found in a text: a document that spells out "<|endoftext|>" gets the ids of those characters,
not the id that ends a document. Nothing here uses the network.
"""

import functools
import hashlib
import io
import json
import multiprocessing
import os
import re
import shutil
import signal
import tempfile
import textwrap
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from megacocomix.data.tokenizer_identity import (
    Hashes,
    fast_sha256,
    files_sha256,
    sentencepiece_sha256,
    vocabulary_sha256,
)
from megacocomix.errors import UserError
from megacocomix.files import check_absent, check_downloaded, write_aside, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")
BPE = 2  # the kind of a SentencePiece model
NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6  # types of its pieces
END_OF_TEXT = "<|endoftext|>"
GPT2_FOLDER = Path(__file__).parent / "gpt2"
GPT2_SHA256 = {
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}
# A line end between two words: GPT-2's pre-tokeniser splits there too.
LINE_END = re.compile(r"(?<=\S)\n(?=\S)")
# In the tokenizer_config.json of a converted SentencePiece model: its hashes, and the hash of what it became.
CONVERTED_FROM = "converted_from"
# SentencePiece's symbol for a space. If a text really contains this character, our own models encode it as its bytes
# (_encode_sentencepiece); it would be decoded as a space.
SPACE_SYMBOL = "\u2581"
# Texts that show whether two tokenizers prepare a text alike: blanks, line ends, letters that a normaliser changes,
# letters and symbols without a token.
PROBES = (
    "word", " two  blanks  ", "line\nline\n\n line", "tab\tand\r\n", "ﬁ Ａ ½ e\u0301 é ß İ",
    "Ünïcödé 漢字 🙂👩\u200d👧 \x00", "x = [1, 22, 333];  // it's 50,000.00 %", "", " ", "\n",
    f"a{SPACE_SYMBOL}b {SPACE_SYMBOL}",
)  # fmt: skip
# SentencePiece trains on text in memory. 4 M lines are a few GB; more lines change a vocabulary little.
MAX_TRAINING_LINES = 4_000_000


@dataclass(frozen=True)
class Tokenizer:
    """Text to ids and back.

    `eot_id` ends every document. All ids are < `vocab_size`.
    """

    name: str
    vocab_size: int
    eot_id: int
    encode_batch: Callable[[list[str]], list[list[int]]]
    decode: Callable[[Sequence[int]], str]
    compute_hashes: Callable[[], Hashes]
    cut: re.Pattern | None = None
    """Where a long text may be cut into parts that have the ids of the whole; None if no such place is known."""

    @property
    def sha256(self) -> str:
        """Identifies all that decides which ids a text gets: see tokenizer_identity.py."""
        return self._hashes.whole

    @property
    def vocabulary_sha256(self) -> str:
        """What earlier versions recorded as sha256."""
        return self._hashes.vocabulary

    @cached_property
    def _hashes(self) -> Hashes:
        return self.compute_hashes()

    def is_recorded_as(self, sha256: str | None) -> bool:
        """Whether a hash that something was made with, or an earlier version recorded, is this tokenizer's."""
        return sha256 in (self.sha256, self.vocabulary_sha256)


def load_tokenizer(spec: str | Path) -> Tokenizer:
    """The tokenizer named by `spec`: "gpt2", a SentencePiece FILE.model, or a Hugging Face folder.

    Raises UserError if there is no such tokenizer, its files are damaged, or it has no end-of-text token.
    """
    path = Path(spec)
    if str(spec) == "gpt2":
        return _load_gpt2(GPT2_FOLDER)
    if path.is_dir():
        return _load_hugging_face(path)
    if path.is_file() and path.suffix == ".model":
        return _load_sentencepiece(path)
    problem = "is not a SentencePiece .model file" if path.is_file() else "does not exist"
    raise UserError(f"tokenizer {spec} {problem}. Valid: gpt2, FILE.model, a Hugging Face tokenizer folder.")


def tokenizer_files(spec: str | Path) -> dict[str, Path]:
    """The files of the tokenizer named by `spec`, by their names in a Hugging Face folder."""
    path = Path(spec)
    if str(spec) == "gpt2":
        return {"vocab.json": GPT2_FOLDER / "encoder.json", "merges.txt": GPT2_FOLDER / "vocab.bpe"}
    if path.is_dir():
        names = ("vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json")
        files = [file for file in path.iterdir() if file.is_file()]
        return {file.name: file for file in files if file.name.startswith("tokenizer") or file.name in names}
    return {"tokenizer.model": path}


def folder_tokenizer(folder: Path) -> str | None:
    """The tokenizer that a model folder carries, as a spec for `load_tokenizer`; None if it carries none."""
    if any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json", "tokenizer_config.json")):
        return str(folder)
    return str(folder / "tokenizer.model") if (folder / "tokenizer.model").is_file() else None


def tokenizer_mismatches(first: tuple[str, Tokenizer | None], *others: tuple[str, Tokenizer | str | None]) -> list[str]:
    """One error line for each of `others` whose tokenizer differs from the first's. Each is a name for the error, such
    as `data.train data/wiki`, and its tokenizer or a recorded hash of it, None if unknown."""
    name, expected = first
    found = {other: each.sha256 if isinstance(each, Tokenizer) else each for other, each in others}
    return [
        f"{other} has another tokenizer ({sha256}) than {name} ({expected.sha256}): both must read the same tokens."
        for other, sha256 in found.items()
        if expected and sha256 and not expected.is_recorded_as(sha256)
    ]


def _load_gpt2(folder: Path) -> Tokenizer:
    from tokenizers import Tokenizer as FastTokenizer
    from tokenizers import decoders, models, pre_tokenizers

    for name, expected in GPT2_SHA256.items():
        file = folder / name
        if not file.is_file() or hashlib.sha256(file.read_bytes()).hexdigest() != expected:
            raise UserError(f"{file} of GPT-2's vocabulary is missing or damaged: install megacocomix again.")
    # Built without registering a special token, so that none can be found in a text.
    fast = FastTokenizer(models.BPE.from_file(str(folder / "encoder.json"), str(folder / "vocab.bpe")))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    return Tokenizer(
        name="gpt2",
        vocab_size=fast.get_vocab_size(),
        eot_id=fast.token_to_id(END_OF_TEXT),
        encode_batch=lambda texts: [encoding.ids for encoding in fast.encode_batch(texts)],
        decode=lambda ids: fast.decode([int(i) for i in ids], skip_special_tokens=False),
        compute_hashes=lambda: Hashes(fast_sha256(fast, END_OF_TEXT), vocabulary_sha256(fast.get_vocab())),
        cut=LINE_END,
    )


def load_hf_tokenizer(folder: Path) -> "PreTrainedTokenizerBase":
    """The transformers tokenizer in a folder. Code in the folder is not run. Raises UserError if it cannot be loaded,
    has no vocabulary or has no end of text. Also for a SentencePiece model alone: transformers drops its normaliser."""
    from transformers import AutoTokenizer

    for file in tokenizer_files(folder).values():
        check_downloaded(file)
    if (carried := folder_tokenizer(folder)) not in (None, str(folder)):
        raise UserError(f"tokenizer {folder} is a SentencePiece model alone: give {carried}.")
    try:
        with tempfile.TemporaryDirectory() as copy:
            source = folder
            # If a config.json beside it names code, transformers asks whether to run that code.
            if (config := folder / "config.json").is_file() and b'"auto_map"' in config.read_bytes():
                source = copy
                for name, file in tokenizer_files(folder).items():
                    shutil.copyfile(file, Path(copy) / name)
            tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=True)
    except Exception as error:  # transformers raises many types
        reason = textwrap.shorten(str(error), 200)
        raise UserError(f"tokenizer {folder} is not a Hugging Face tokenizer folder: {reason}") from error
    # transformers loads a folder with a config but no vocabulary as an empty tokenizer, without an error.
    if set(tokenizer.get_vocab().values()) <= set(tokenizer.all_special_ids):
        raise UserError(f"tokenizer {folder} holds no vocabulary, such as a tokenizer.json.")
    if tokenizer.eos_token_id is None:
        raise UserError(f"tokenizer {folder} has no end of text: set eos_token in its tokenizer_config.json.")
    return tokenizer


def _load_hugging_face(folder: Path) -> Tokenizer:
    hf = load_hf_tokenizer(folder)
    vocabulary, fast = hf.get_vocab(), getattr(hf, "backend_tokenizer", None)
    if fast and getattr(fast.model, "dropout", None):
        raise UserError(f"tokenizer {folder} merges at random (dropout {fast.model.dropout}): a text has no fixed ids.")

    def hashes() -> Hashes:
        if not fast:
            files = {name: file.read_bytes() for name, file in tokenizer_files(folder).items()}
            return Hashes(files_sha256(type(hf).__name__, vocabulary, files), vocabulary_sha256(vocabulary))
        sha256, origin = fast_sha256(fast, hf.eos_token), hf.init_kwargs.get(CONVERTED_FROM) or {}
        if origin.get("became") == sha256:
            return Hashes(origin["whole"], origin["vocabulary"])
        return Hashes(sha256, vocabulary_sha256(vocabulary))

    # verbose=False: no warning about documents longer than the model's context, which are common in pretraining data.
    options = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
    return Tokenizer(
        name=folder.resolve().name,
        vocab_size=max(vocabulary.values()) + 1,
        eot_id=hf.eos_token_id,
        encode_batch=lambda texts: hf(texts, **options)["input_ids"] if texts else [],
        decode=lambda ids: hf.decode([int(i) for i in ids], clean_up_tokenization_spaces=False),
        compute_hashes=hashes,
        cut=LINE_END if fast and _splits_as_gpt2(fast) else None,
    )


def _splits_as_gpt2(fast) -> bool:
    """Whether a tokenizer of the `tokenizers` library splits a text as GPT-2's does, before any token is looked for."""
    state = json.loads(fast.to_str())
    splitter = state["pre_tokenizer"] or {}
    is_gpt2s = splitter.get("type") == "ByteLevel" and splitter["use_regex"] and not splitter["add_prefix_space"]
    return is_gpt2s and not state["normalizer"] and all(token["special"] for token in state["added_tokens"])


def _load_sentencepiece(path: Path) -> Tokenizer:
    import sentencepiece
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    check_downloaded(path)
    try:
        processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as error:
        raise UserError(f"tokenizer {path} is not a SentencePiece model, or is damaged.") from error
    if processor.eos_id() < 0:
        raise UserError(f"tokenizer {path} has no end-of-text token: train it with an eos token.")
    vocabulary = {processor.id_to_piece(i): i for i in range(processor.vocab_size())}
    model = processor.serialized_model_proto()
    proto = ModelProto.FromString(model)
    # Pieces of byte pairs are joined one by one, so no line end in a piece means that none is crossed. Scores of a
    # unigram model are summed from the start of the text, and rounded there.
    is_local = _is_lossless(proto) and proto.trainer_spec.model_type == BPE
    return Tokenizer(
        name=path.stem,
        vocab_size=processor.vocab_size(),
        eot_id=processor.eos_id(),
        encode_batch=functools.partial(_encode_sentencepiece, processor, _is_ours(proto)),
        decode=lambda ids: processor.decode([int(i) for i in ids]),
        compute_hashes=lambda: Hashes(sentencepiece_sha256(model), vocabulary_sha256(vocabulary)),
        cut=LINE_END if is_local and not any("\n" in piece for piece in vocabulary) else None,
    )


def _is_lossless(proto) -> bool:
    """Whether a SentencePiece model leaves a text as it is, as those of `train_sentencepiece` do."""
    rules, kind = proto.normalizer_spec, proto.trainer_spec
    changes = rules.precompiled_charsmap or rules.add_dummy_prefix or rules.remove_extra_whitespaces
    return not changes and rules.escape_whitespaces and not kind.treat_whitespace_as_suffix and kind.byte_fallback


def _is_ours(proto) -> bool:
    """Whether a SentencePiece model is of the form that `train_sentencepiece` makes. Only what a tokenizer's hash
    covers is looked at, so models with one hash encode alike."""
    types = [piece.type for piece in proto.pieces]
    has_our_pieces = types[:258] == [UNKNOWN, CONTROL, *[BYTE] * 256] and proto.pieces[1].piece == END_OF_TEXT
    is_learned = has_our_pieces and set(types[258:]) <= {NORMAL}
    return is_learned and _is_lossless(proto) and proto.trainer_spec.model_type == BPE


def _encode_sentencepiece(processor, is_ours: bool, texts: list[str]) -> list[list[int]]:
    encoded = processor.encode(texts, num_threads=1)
    if is_ours:
        symbol_bytes = [processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_SYMBOL.encode()]
        for index, text in enumerate(texts):
            if SPACE_SYMBOL in text:
                first, *rest = processor.encode(text.split(SPACE_SYMBOL), num_threads=1)
                encoded[index] = functools.reduce(lambda ids, more: ids + symbol_bytes + more, rest, first)
    return encoded


def encode_in_parallel(
    spec: str, batches: Iterable[list[tuple[str, T]]], workers: int
) -> Iterator[list[tuple[np.ndarray, T]]]:
    """Replace the text in each batch of (text, anything) by its ids, uint32 [n]. Batches are yielded in order.

    Reads at most two batches a worker ahead, so memory is bounded. With one worker, this process does the work itself.
    Raises UserError if a worker process dies.
    """
    encode = functools.partial(_encode, spec)
    if workers == 1:
        yield from map(encode, batches)
        return
    # Not forked: the tokenizer libraries run threads. In a forked child these are dead, but their locks stay held.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, initializer=_start_worker)
    pending = deque()
    try:
        for batch in batches:
            pending.append(pool.submit(encode, batch))
            if len(pending) > 2 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        raise UserError("a worker process died, out of memory perhaps: try again with fewer --workers.") from error
    finally:
        pool.shutdown(cancel_futures=True)


_cached_tokenizer = functools.cache(load_tokenizer)


def _encode(spec: str, batch: list[tuple[str, T]]) -> list[tuple[np.ndarray, T]]:
    texts, tags = zip(*batch, strict=True)
    encoded = _cached_tokenizer(spec).encode_batch(list(texts))
    return [(np.array(ids, dtype=np.uint32), tag) for ids, tag in zip(encoded, tags, strict=True)]


def _start_worker() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process a core is enough
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the parent ends the pool
    parent = multiprocessing.parent_process()
    # A killed parent cannot end the pool: without this thread its workers would wait forever.
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def train_sentencepiece(documents: Iterable[str], out: str | Path, vocab_size: int) -> Tokenizer:
    """Train a byte-pair SentencePiece model of `vocab_size` tokens, write it to `out` and load it.

    It is lossless: text is not normalised, and characters without a token are encoded as bytes, so decode(encode(x)) ==
    x. Ids: 0 unknown (never produced), 1 end of text, 256 bytes, then the learned tokens. The same documents give the
    same file. Raises UserError if `out` exists, the documents hold no text, or the size does not suit the text.
    """
    import sentencepiece

    out = Path(out)
    if out.suffix != ".model":
        raise UserError(f"--out {out} must end in .model: that is how a SentencePiece vocabulary is recognised.")
    check_absent(out)
    if vocab_size < 1:
        raise UserError(f"--vocab-size {vocab_size} must be positive.")
    reader_errors: list[UserError] = []
    model = io.BytesIO()
    sentencepiece.set_random_generator_seed(0)  # for sampling lines if there are too many
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_lines(documents, reader_errors),
            model_writer=model,
            vocab_size=vocab_size,
            model_type="bpe",
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            max_sentence_length=2**30,  # the default drops lines of more than 4 KB
            input_sentence_size=MAX_TRAINING_LINES,
            shuffle_input_sentence=True,
            unk_id=0,
            eos_id=1,
            bos_id=-1,
            pad_id=-1,
            eos_piece=END_OF_TEXT,
            minloglevel=2,
        )
    except RuntimeError as error:
        if reader_errors:
            raise reader_errors[0] from None
        raise UserError(_training_problem(str(error), vocab_size)) from error
    with write_aside(out) as aside:
        aside.write_bytes(model.getvalue())
    return load_tokenizer(out)


def _lines(documents: Iterable[str], reader_errors: list[UserError]) -> Iterator[str]:
    """The lines of all documents, without line ends: the trainer drops those. So a line end is encoded as its byte."""
    try:
        for document in documents:
            yield from filter(None, document.split("\n"))
    except UserError as error:
        reader_errors.append(error)  # the trainer turns every exception into a RuntimeError
        raise


def _training_problem(message: str, vocab_size: int) -> str:
    if "sentences_.empty()" in message:
        return "there is no text to train a tokenizer on."
    if "<= " in message and "too high" in message:
        largest = message.rsplit("<= ", 1)[1].rstrip(".")
        return f"--vocab-size {vocab_size} is more than this text yields: at most {largest}."
    if "smaller than required_chars" in message:
        smallest = message.rsplit(" vs ", 1)[1].split(".")[0]
        return f"--vocab-size {vocab_size} is too small for the characters of this text: at least {smallest}."
    return f"SentencePiece failed: {message}"


def export_tokenizer(spec: str, out: Path) -> None:
    """Copy the files of the tokenizer named by `spec` into the folder `out`, and write those that are missing. Raises
    UserError for a SentencePiece model that transformers' tokenizer does not reproduce, such as one with a normaliser.

    Padding is the end of text, on the left, as generation needs it. A text that spells out a special token gets that
    token's id, as is usual in transformers.
    """
    for name, file in tokenizer_files(spec).items():
        shutil.copyfile(file, out / name)
    if Path(spec).is_dir():
        return
    if spec == "gpt2":
        settings = {"tokenizer_class": "GPT2Tokenizer", "unk_token": END_OF_TEXT, "eos_token": END_OF_TEXT}
    else:
        settings = _convert_sentencepiece(out)
    settings |= {"bos_token": settings["eos_token"], "pad_token": settings["eos_token"], "padding_side": "left"}
    settings["model_input_names"] = ["input_ids", "attention_mask"]  # `generate(**tokens)` takes no token types
    write_json(out / "tokenizer_config.json", settings)
    if spec != "gpt2":
        ours, theirs = load_tokenizer(spec), load_tokenizer(out)
        probes = [*PROBES, *_special_texts(out / "tokenizer.model")]
        for text, *ids in zip(probes, ours.encode_batch(probes), theirs.encode_batch(probes), strict=True):
            if ids[0] != ids[1]:
                raise UserError(
                    f"tokenizer {spec} cannot be converted to tokenizer.json: {text!r} would get other ids. Give the "
                    "Hugging Face folder of this tokenizer."
                )
        origin = Hashes(ours.sha256, ours.vocabulary_sha256)
        settings[CONVERTED_FROM] = origin._asdict() | {"became": theirs.sha256}
        write_json(out / "tokenizer_config.json", settings)


def _special_texts(model: Path) -> list[str]:
    """Texts that hold the pieces of a SentencePiece model that were not learned: one alone, and inside others."""
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    pieces = ModelProto.FromString(model.read_bytes()).pieces
    special = [piece.piece.replace(SPACE_SYMBOL, " ") for piece in pieces if piece.type not in (NORMAL, BYTE)]
    around = ("{}", "a{}b", "word {} word", "1{}2", "\n{}\n", "{0}{0}", " {0} {0}")
    words = [piece.piece.replace(SPACE_SYMBOL, " ") for piece in pieces if piece.type == NORMAL]
    inside = [word for word in words if any(text in word for text in special)]
    return [form.format(text) for text in special for form in around] + inside


def _convert_sentencepiece(out: Path) -> dict[str, str]:
    """tokenizer.model → tokenizer.json, which needs no SentencePiece. Returns settings for tokenizer_config.json."""
    import sentencepiece
    from sentencepiece.sentencepiece_model_pb2 import ModelProto
    from transformers import LlamaTokenizer

    processor = sentencepiece.SentencePieceProcessor(model_file=str(out / "tokenizer.model"))
    unknown, end = (processor.id_to_piece(i) for i in (processor.unk_id(), processor.eos_id()))
    # Llama's is SentencePiece's byte-pair scheme with byte fallback. Without these, its special tokens would be added.
    special = {"unk_token": unknown, "eos_token": end, "bos_token": end}
    converted = LlamaTokenizer.from_pretrained(out, add_prefix_space=False, **special)
    fast = converted.backend_tokenizer
    if _is_ours(ModelProto.FromString(processor.serialized_model_proto())):
        # Its pieces hold the space itself, so that the symbol in a text has no token, and becomes its bytes.
        state = json.loads(fast.to_str().replace(SPACE_SYMBOL, " ")) | {"pre_tokenizer": None}
        state["decoder"] = {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]}
        fast = type(fast).from_str(json.dumps(state))
    fast.save(str(out / "tokenizer.json"))
    return {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": unknown, "eos_token": end}
