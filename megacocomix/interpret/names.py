"""Names for concepts: automatic ones, from the tokens a concept stands at and the tokens it promotes, and the user's.

A name reads on ‘of, in’ → ‘the, first’: the first tokens are more frequent at its strongest positions than in the
text, the others it promotes. No model is asked; the same reading gives the same names.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megacocomix.config.yaml_text import parse_yaml
from megacocomix.data.tokenizer import END_OF_TEXT, Tokenizer
from megacocomix.errors import UserError
from megacocomix.interpret.concepts import Pairs, Promoted
from megacocomix.interpret.reading import Reading
from megacocomix.interpret.token_text import UNFINISHED, token_texts

LONGEST_NAME = 60
LONGEST_WORD = 18
MOST_WORDS = 3
STRONGEST = 64
"""A name looks at so many of a concept's strongest positions."""
SIGNS = {"\n": "⏎", "\r": "⏎", "\t": "⇥", " ": "·"}
WRITTEN = {",": "comma"}
"""Tokens that a list of tokens cannot show."""
BYTE = "‹byte›"
"""Of a token that holds a part of a character."""
UNNAMED = "never kept"


class Spelling:
    """Token id → its text inside a sentence, " the" and not "the"; remembered."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        # At the beginning of a text some tokenizers write a token otherwise.
        self.before = tokenizer.encode_batch(["a"])[0][-1]
        self.known: dict[int, str] = {}

    def __call__(self, token: int) -> str:
        """Its text, or BYTE."""
        if token == self.tokenizer.eot_id:
            return END_OF_TEXT  # SentencePiece writes nothing
        if token not in self.known:
            text = token_texts(self.tokenizer, [self.before, token])[1]
            self.known[token] = BYTE if UNFINISHED in text else text
        return self.known[token]


def readable(text: str) -> str:
    """A token's text without the space before it. What cannot be seen is a sign: every blank of a token that is
    nothing else, and control characters."""
    text = text.strip(" ") or text
    as_it_is = () if text.isspace() else (" ",)
    text = "".join(c if c in as_it_is else SIGNS.get(c, c if c.isprintable() else "·") for c in text)
    return WRITTEN.get(text, text)


def name_concepts(
    reading: Reading, pairs: Pairs, promoted: Promoted | None, concepts: Sequence[int], spelling: Spelling
) -> list[str]:
    """A name of at most LONGEST_NAME characters for each of `concepts`; `promoted` has a row for each, and is None
    where nothing is mixed in."""
    at = _frequent_words(reading, pairs, spelling)
    names = []
    for row, concept in enumerate(concepts):
        to = _words(spelling(int(token)) for token in promoted.top_index[row]) if promoted else []
        names.append(_join(at.get(int(concept), []), to))
    return names


def read_names(file: str | Path, num_concepts: int) -> dict[int, str]:
    """Concept → name from a JSON or YAML file of ids and names. Raises one UserError with all that is wrong."""
    text = Path(file).read_bytes()
    try:
        text = text.decode("utf-8-sig")
        # json.loads keeps the last of a key given twice, parse_yaml refuses it, but not all JSON is YAML.
        values = json.loads(text) if str(file).endswith(".json") else parse_yaml(text, str(file))
    except UnicodeDecodeError:
        raise UserError(f"{file} is not UTF-8 text.") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{file} line {error.lineno} is not JSON: {error.msg}.") from None
    if not isinstance(values, dict):
        raise UserError(f"{file} holds no names: write an id and a name a line, such as 12: website.")
    names, problems = {}, []
    for key, name in values.items():
        concept = int(key) if isinstance(key, str) and re.fullmatch("[0-9]{1,9}", key) else key
        if type(concept) is not int or not 0 <= concept < num_concepts:
            problems.append(f"{file}: {key!r} is no concept. Valid: 0 … {num_concepts - 1}.")
        elif not isinstance(name, str) or not name.strip():
            problems.append(f"{file}: the name of {concept} is {name!r}, not text: put it in quotes.")
        else:
            if concept in names:
                problems.append(f"{file}: {concept} has two names.")
            names[concept] = " ".join(name.split())
    if problems:
        raise UserError(*problems)
    return names


def _frequent_words(reading: Reading, pairs: Pairs, spelling: Spelling) -> dict[int, list[str]]:
    """Concept → the words that are over-represented at its strongest positions, most telling first: by how often a
    word is there × the log of how many times as often as in the text."""
    ids, token_N = np.unique(reading.tokens, return_inverse=True)
    words, word_of = np.unique([readable(spelling(int(token))).casefold() for token in ids], return_inverse=True)
    word_N = word_of[token_N]
    share = np.bincount(word_N[reading.has_slot], minlength=len(words)) / max(1, reading.has_slot.sum())
    strong = pairs.rank < STRONGEST
    cell, count = np.unique(pairs.concept[strong] * len(words) + word_N[pairs.position[strong]], return_counts=True)
    concept, word = cell // len(words), cell % len(words)
    total = np.bincount(pairs.concept[strong])[concept]
    score = count * np.log(count / total / share[word])
    # A word that a concept met once says something only of a concept that was hardly met at all.
    telling = (score > 0) & ((count > 1) | (total < 4)) & (words[word] != "")
    concept, word, score = concept[telling], word[telling], score[telling]
    order = np.lexsort((word, -score, concept))
    found: dict[int, list[str]] = {}
    for each, chosen in zip(concept[order].tolist(), word[order].tolist(), strict=True):
        if len(listed := found.setdefault(each, [])) < MOST_WORDS:
            listed.append(str(words[chosen]))
    return found


def _words(texts) -> list[str]:
    """The first few, each once; parts of characters are left out."""
    found: dict[str, str] = {}
    for text in texts:
        word = readable(text)
        if word and word != BYTE:
            found.setdefault(word.casefold(), word)
    return list(found.values())[:MOST_WORDS]


def _join(at: list[str], to: list[str]) -> str:
    at, to = list(map(_short, at)), list(map(_short, to))
    while True:
        parts = [f"on ‘{', '.join(at)}’"] * bool(at) + [f"→ ‘{', '.join(to)}’"] * bool(to)
        if len(name := " ".join(parts)) <= LONGEST_NAME:
            return name or UNNAMED
        (to if len(to) >= len(at) else at).pop()


def _short(word: str) -> str:
    return word if len(word) <= LONGEST_WORD else word[: LONGEST_WORD - 1] + "…"
