"""Compares the tokens of a split with the model and the tokenizer that are to read them."""

from collections.abc import Iterator

import numpy as np

from megacocomix.data.binary import Binary
from megacocomix.data.tokenizer import Tokenizer, tokenizer_mismatches
from megacocomix.data.tokens import TokenShards
from megacocomix.errors import UserError

Named = tuple[str, Tokenizer | None]
"""A tokenizer, None if unknown, and what errors call it."""


def token_problems(
    name: str, shards: TokenShards, vocab_size: int, named_tokenizer: Named = ("", None)
) -> Iterator[str]:
    """Yields an error line for each reason why `shards`, which errors call `name`, cannot be read with a vocabulary of
    `vocab_size` and a tokenizer."""
    tokenizer_name, tokenizer = named_tokenizer
    if shards.vocab_size is not None and shards.vocab_size > vocab_size:
        yield (
            f"{name} was written with a vocabulary of {shards.vocab_size}, but the model's vocab_size is {vocab_size}. "
            f"Nearest valid: {shards.vocab_size}."
        )
    yield from tokenizer_mismatches(named_tokenizer, (name, shards.tokenizer_sha256))
    if tokenizer and shards.eot_id not in (None, tokenizer.eot_id):
        yield f"{name} ends documents with token {shards.eot_id}, but {tokenizer_name} with {tokenizer.eot_id}."
    if shards.binary:
        yield from _binary_problems(name, shards.binary, vocab_size, tokenizer)


def check_tokens(name: str, shards: TokenShards, vocab_size: int, named_tokenizer: Named = ("", None)) -> None:
    """Raises one UserError with all problems."""
    if problems := list(token_problems(name, shards, vocab_size, named_tokenizer)):
        raise UserError(*problems)


def _binary_problems(name: str, binary: Binary, vocab_size: int, tokenizer: Tokenizer | None) -> Iterator[str]:
    lowest, highest = binary.scan.smallest, binary.scan.largest
    if lowest < 0 or highest >= vocab_size:
        yield (
            f"{name} holds token {lowest if lowest < 0 else highest} (read as {binary.dtype.name}), but the vocabulary "
            f"ends at {vocab_size - 1}."
        )
    known = tokenizer.vocab_size if tokenizer else vocab_size
    if binary.is_assumed and known > 2**16:
        yield (
            f"{name} has no header that says the type of its ids, and {known} tokens do not fit uint16: give it, such "
            "as uint32 (data.dtype, --data-dtype)."
        )
    if tokenizer and binary.document_ends is not None and binary.num_stored > binary.lengths.sum():
        yield from _document_problems(name, binary, tokenizer.eot_id)


def _document_problems(name: str, binary: Binary, eot_id: int) -> Iterator[str]:
    """An index that leaves something out may be another file's, which shows where its documents end."""
    ids = binary.ids()
    assert binary.document_ends is not None
    sample = binary.document_ends[binary.document_ends > 0]
    ended = int((ids[sample - 1] == eot_id).sum())
    if ended < len(sample) and (ended or np.isin(eot_id, ids[: 2**24])):
        yield (
            f"{name}: its index lists {binary.lengths.sum():,} of {binary.num_stored:,} tokens, and only {ended} of "
            f"{len(sample)} documents end with end of text ({eot_id}): is it the index of another file?"
        )
