"""Text of single tokens. A token may hold a part of a character, and a tokenizer may write a token otherwise at the
beginning of a text than inside it: so a token's text is what it adds to the text before it."""

from collections.abc import Sequence

from megacocomix.data.tokenizer import Tokenizer

UNFINISHED = "\ufffd"
"""What a decoder puts in the place of bytes that are no character, or not yet one."""
MOST_UNFINISHED = 3
"""Bytes, and so UNFINISHED at most, of a character that is not yet whole."""


class TextStream:
    """Tokens one by one → the text that has become certain. The pieces and `flush()`, joined, are the text of all that
    come after `prompt`."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = ()):
        self.tokenizer = tokenizer
        self.recent: list[int] = []
        """Tokens that are still decoded: what was certain last, which the next are written after, and the next."""
        self.num_certain = 0
        """Characters of their text that were returned."""
        for token in prompt:
            self.push(token)
        self.flush()

    def push(self, token: int) -> str:
        """Take a token; the text that it makes certain, often its own, sometimes none."""
        num_before = len(self.recent)
        self.recent.append(token)
        text = self.tokenizer.decode(self.recent)
        held = len(text) - len(text.rstrip(UNFINISHED))
        end = max(self.num_certain, len(text) - min(held, MOST_UNFINISHED))
        piece = text[self.num_certain : end]
        self.num_certain = end
        if not held:
            self._forget(num_before)
        return piece

    def flush(self) -> str:
        """What is left of a character that never became whole."""
        text = self.tokenizer.decode(self.recent)
        piece, self.num_certain = text[self.num_certain :], len(text)
        return piece

    def _forget(self, num_before: int) -> None:
        """All is certain: of what was decoded so far the last token is enough for the next to be written after."""
        self.recent = self.recent[num_before:]
        self.num_certain = len(self.tokenizer.decode(self.recent))


def token_texts(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """A piece of text for each token: joined, they are the text. A character of several tokens stands at its last."""
    stream = TextStream(tokenizer)
    texts = [stream.push(int(token)) for token in ids]
    if texts:
        texts[-1] += stream.flush()
    return texts
