"""What identifies a tokenizer: a hash of everything that decides which ids a text gets and which text ids become.

The forms below do not depend on file formats, on defaults written out or left out, or on special tokens, which are
never looked for in a text: our GPT-2 and a Hugging Face folder of GPT-2 have the same hash, also with a padding token.
"""

import hashlib
import json
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# They move the places in the text that belong to a token, and change no id.
PLACES_ONLY = ("trim_offsets",)


class Hashes(NamedTuple):
    """What identifies a tokenizer, and what identified it in earlier versions."""

    whole: str
    vocabulary: str


def vocabulary_sha256(tokens: dict[str, int]) -> str:
    """Of each id with its token. Earlier versions identified a tokenizer by this alone."""
    pairs = sorted((token_id, token) for token, token_id in tokens.items())
    return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()


def fast_sha256(tokenizer: "Tokenizer", end_of_text: str) -> str:
    """Of a tokenizer of the `tokenizers` library: its vocabulary, model, normaliser, pre-tokeniser, decoder, and those
    added tokens that are found in a text or, as `end_of_text`, after it."""
    state = json.loads(tokenizer.to_str())
    found = [token for token in state["added_tokens"] if not token["special"]]
    vocabulary = tokenizer.get_vocab(with_added_tokens=False)
    for token in state["added_tokens"]:
        if not token["special"] or token["content"] == end_of_text:
            vocabulary[token["content"]] = token["id"]
    model = state["model"]
    if isinstance(model["vocab"], dict):
        del model["vocab"]  # in the vocabulary; a list has scores too
    if "merges" in model:  # earlier versions write a pair as one text
        model["merges"] = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    decoder = state["decoder"]
    return _sha256(
        {
            "vocabulary": vocabulary_sha256(vocabulary),
            "model": model,
            "normalizer": state["normalizer"],
            "pre_tokenizer": state["pre_tokenizer"],
            "decoder": {"type": "ByteLevel"} if decoder and decoder["type"] == "ByteLevel" else decoder,
            "added_tokens": found,
        }
    )


def sentencepiece_sha256(model: bytes) -> str:
    """Of a serialised SentencePiece model: its pieces with scores and types, its kind and its normaliser."""
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    proto = ModelProto.FromString(model)
    kind = proto.trainer_spec
    rules = [
        {field.name: value.hex() if isinstance(value, bytes) else value for field, value in spec.ListFields()}
        for spec in (proto.normalizer_spec, proto.denormalizer_spec)
    ]
    for rule in rules:
        rule.pop("name", None)  # of the rules that precompiled_charsmap holds
        rule.pop("normalization_rule_tsv", None)
    return _sha256(
        {
            "pieces": [[piece.piece, piece.score, piece.type] for piece in proto.pieces],
            "kind": [kind.model_type, kind.byte_fallback, kind.treat_whitespace_as_suffix],
            "normalizer": rules[0],
            "denormalizer": rules[1],
        }
    )


def files_sha256(kind: str, tokens: dict[str, int], files: dict[str, bytes]) -> str:
    """Of a tokenizer in Python, whose parts cannot be listed: its class, its vocabulary and all its files."""
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    return _sha256({"class": kind, "vocabulary": vocabulary_sha256(tokens), "files": hashes})


def _sha256(definition: dict) -> str:
    return hashlib.sha256(json.dumps(_plain(definition), sort_keys=True).encode()).hexdigest()


def _plain(value: Any) -> Any:
    """Without what equals a default: an absent, empty or false entry."""
    if isinstance(value, dict):
        entries = {key: _plain(entry) for key, entry in value.items() if key not in PLACES_ONLY}
        is_default = lambda entry: entry is None or entry is False or entry in ("", [], {})
        return {key: entry for key, entry in entries.items() if not is_default(entry)}
    return [_plain(entry) for entry in value] if isinstance(value, list) else value
