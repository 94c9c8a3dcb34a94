"""Names for concepts: automatic ones, and the user's own.

An automatic name looks like on ‘of, in’ → ‘the, first’. The tokens after "on" are more frequent at the concept's
strongest positions than in the text; the concept promotes those after the arrow. No language model is involved: the
same reading always gives the same names.
"""

import json
import re
from collections.abc import Iterable, Sequence
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
"""A name is made from this many of a concept's strongest positions."""
SIGNS = {"\n": "⏎", "\r": "⏎", "\t": "⇥", " ": "·"}
WRITTEN = {",": "comma"}
"""Tokens that would be unreadable in a list separated by commas."""
BYTE = "‹byte›"
"""The text of a token that holds part of a character."""
UNNAMED = "never kept"


class Spelling:
    """Token id → its text inside a sentence, " the" and not "the". Caches the texts."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        # Some tokenizers decode a token differently at the beginning of a text.
        self.before = tokenizer.encode_batch(["a"])[0][-1]
        self.known: dict[int, str] = {}

    def __call__(self, token: int) -> str:
        """The token's text, or BYTE."""
        if token == self.tokenizer.eot_id:
            return END_OF_TEXT  # SentencePiece decodes it to nothing
        if token not in self.known:
            text = token_texts(self.tokenizer, [self.before, token])[1]
            self.known[token] = BYTE if UNFINISHED in text else text
        return self.known[token]


def readable(text: str) -> str:
    """A token's text without the space before it. Control characters become visible signs. So do blanks, if the token
    has nothing else."""
    text = text.strip(" ") or text
    unchanged = () if text.isspace() else (" ",)
    text = "".join(c if c in unchanged else SIGNS.get(c, c if c.isprintable() else "·") for c in text)
    return WRITTEN.get(text, text)


def name_concepts(
    reading: Reading, pairs: Pairs, promoted: Promoted | None, concepts: Sequence[int], spelling: Spelling
) -> list[str]:
    """A name of at most LONGEST_NAME characters for each of `concepts`. `promoted` has a row for each; it is None if
    the model mixes no concepts in."""
    at = _frequent_tokens(reading, pairs, spelling)
    to = [_distinct(map(spelling, row.tolist())) for row in promoted.top_index] if promoted else [[]] * len(concepts)
    return [_join(at.get(int(concept), []), promotes) for concept, promotes in zip(concepts, to, strict=True)]


def read_names(file: str | Path, num_concepts: int) -> dict[int, str]:
    """Read concept → name from a JSON or YAML file of ids and names. Raises one UserError with all mistakes."""
    text = Path(file).read_bytes()
    try:
        text = text.decode("utf-8-sig")
        # parse_yaml refuses a key given twice, json.loads keeps the last. But not all JSON is YAML.
        values = json.loads(text) if str(file).endswith(".json") else parse_yaml(text, str(file))
    except UnicodeDecodeError:
        raise UserError(f"{file} is not UTF-8 text.") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{file} line {error.lineno} is not JSON: {error.msg}.") from None
    if not isinstance(values, dict):
        raise UserError(f"{file} holds no names: write an id and a name per line, such as 12: website.")
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


def _frequent_tokens(reading: Reading, pairs: Pairs, spelling: Spelling) -> dict[int, list[str]]:
    """Concept → the tokens that are over-represented at its strongest positions, as text without case, highest score
    first. The score is count × log(share at these positions / share in the text)."""
    ids, token_N = np.unique(reading.tokens, return_inverse=True)
    texts, text_of = np.unique([readable(spelling(int(token))).casefold() for token in ids], return_inverse=True)
    text_N = text_of[token_N]
    share = np.bincount(text_N[reading.has_slot], minlength=len(texts)) / max(1, reading.has_slot.sum())
    strong = pairs.rank < STRONGEST
    cell, count = np.unique(pairs.concept[strong] * len(texts) + text_N[pairs.position[strong]], return_counts=True)
    concept, text = cell // len(texts), cell % len(texts)
    total = np.bincount(pairs.concept[strong])[concept]
    score = count * np.log(count / total / share[text])
    # A token that occurs once means something only for a concept with very few positions.
    telling = (score > 0) & ((count > 1) | (total < 4)) & (texts[text] != "")
    concept, text, score = concept[telling], text[telling], score[telling]
    order = np.lexsort((text, -score, concept))
    found: dict[int, list[str]] = {}
    for each, chosen in zip(concept[order].tolist(), text[order].tolist(), strict=True):
        if len(listed := found.setdefault(each, [])) < MOST_WORDS:
            listed.append(str(texts[chosen]))
    return found


def _distinct(texts: Iterable[str]) -> list[str]:
    """The first MOST_WORDS different texts, without case; parts of characters are left out."""
    found: dict[str, str] = {}
    for text in map(readable, texts):
        if text and text != BYTE:
            found.setdefault(text.casefold(), text)
    return list(found.values())[:MOST_WORDS]


def _join(at: list[str], to: list[str]) -> str:
    short = lambda text: text if len(text) <= LONGEST_WORD else text[: LONGEST_WORD - 1] + "…"
    at, to = list(map(short, at)), list(map(short, to))
    while True:
        parts = [f"on ‘{', '.join(at)}’"] * bool(at) + [f"→ ‘{', '.join(to)}’"] * bool(to)
        if len(name := " ".join(parts)) <= LONGEST_NAME:
            return name or UNNAMED
        (to if len(to) >= len(at) else at).pop()
