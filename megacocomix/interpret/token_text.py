"""The text of single tokens. A token may hold part of a character, and a tokenizer may decode a token differently at
the beginning of a text. So a token's text is defined as what it adds to the text before it."""

from collections.abc import Sequence

from megacocomix.data.tokenizer import Tokenizer

UNFINISHED = "\ufffd"
"""Decoders write this for bytes that are no character, or not a whole one yet."""
MOST_UNFINISHED = 3
"""Most bytes, and so most UNFINISHED, of a character that is not whole yet."""


class TextStream:
    """Tokens one by one → the text that is certain so far. The texts from `push` and `flush`, joined, are the text of
    all tokens after `prompt`."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = ()):
        self.tokenizer = tokenizer
        self.recent: list[int] = []
        """Tokens to decode at the next push: the last ones whose text is certain, as context, and those after them."""
        self.num_certain = 0
        """Characters of the text of `recent` that were returned already."""
        for token in prompt:
            self.push(token)
        self.flush()

    def push(self, token: int) -> str:
        """Add a token. Returns the text that becomes certain: usually the token's own, sometimes none."""
        num_before = len(self.recent)
        self.recent.append(token)
        text = self.tokenizer.decode(self.recent)
        held = len(text) - len(text.rstrip(UNFINISHED))
        end = max(self.num_certain, len(text) - min(held, MOST_UNFINISHED))
        new_text, self.num_certain = text[self.num_certain : end], end
        if not held:  # all text is certain: the new token alone is enough context for the next one
            self.recent = self.recent[num_before:]
            self.num_certain = len(self.tokenizer.decode(self.recent))
        return new_text

    def flush(self) -> str:
        """The rest of a character that never became whole."""
        text = self.tokenizer.decode(self.recent)
        new_text, self.num_certain = text[self.num_certain :], len(text)
        return new_text


def token_texts(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """The text of each token; joined, they are the text. A character of several tokens belongs to its last one."""
    stream = TextStream(tokenizer)
    texts = [stream.push(int(token)) for token in ids]
    if texts:
        texts[-1] += stream.flush()
    return texts
