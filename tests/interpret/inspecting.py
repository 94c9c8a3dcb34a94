"""A random student that reads numbers, and a text for it."""

import json
import random

import tiny
from megacocomix.data.tokenizer import Tokenizer
from megacocomix.data.tokenizer_identity import Hashes

LENGTHS = (40, 16, 5, 1, 37, 3)  # of documents: longer than the context, as long, shorter, a single token


def make_student(tmp_path, config=None, **method):
    """It reads and writes numbers: token 12 is " 12"."""
    tokenizer = Tokenizer(
        name="numbers",
        vocab_size=tiny.VOCAB,
        eot_id=0,
        encode_batch=lambda texts: [[int(word) for word in text.replace("a", "1").split()] for text in texts],
        decode=lambda ids: "".join(f" {i}" for i in ids),
        compute_hashes=lambda: Hashes("numbers", "numbers"),
    )
    return tiny.opened(tiny.loaded(**method), tokenizer, tmp_path / "step-00000006", "abc", config)


def documents():
    """Token ids of each."""
    drawn = random.Random(1)
    return [[drawn.randrange(1, tiny.VOCAB) for _ in range(length)] for length in LENGTHS]


def joined(found):
    """One list of many."""
    return [token for ids in found for token in ids]


def write_text(file, found):
    """Documents as a file, whose name is returned."""
    file.write_text("".join(json.dumps({"text": " ".join(map(str, each))}) + "\n" for each in found))
    return str(file)
