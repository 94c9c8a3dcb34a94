import json
import subprocess
import sys

import pytest

from megacocomix.data.tokenizer import export_tokenizer, load_tokenizer

TEXTS = ["Concepts, 3 of them.", " two  spaces\n\n  and\ta tab", "naïve 日本 😀", ""]
READ = """
import json, sys
sys.modules["sentencepiece"] = sys.modules["megacocomix"] = None
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
texts = json.loads(sys.argv[2])
ids = tokenizer(texts)["input_ids"]
padded = tokenizer(texts[:2], padding=True)
assert set(padded) == {"input_ids", "attention_mask"}
back = tokenizer.batch_decode(ids, clean_up_tokenization_spaces=False)
print(json.dumps([ids, back, tokenizer.eos_token_id, tokenizer.pad_token_id, len(tokenizer), padded["attention_mask"]]))
"""


@pytest.mark.parametrize("spec", ["gpt2", "assets/teacher/tokenizer.model"])
def test_transformers_alone_reads_the_same_tokens(root, tmp_path, spec):
    spec = spec if spec == "gpt2" else str(root / spec)
    ours = load_tokenizer(spec)
    export_tokenizer(spec, tmp_path)
    command = [sys.executable, "-I", "-c", READ, str(tmp_path), json.dumps(TEXTS)]
    ids, back, eos, pad, size, masks = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    assert ids == ours.encode_batch(TEXTS)
    assert back == TEXTS
    assert eos == pad == ours.eot_id
    assert size == ours.vocab_size
    assert [mask[0] for mask in masks].count(0) == 1 and all(mask[-1] for mask in masks)  # padding is on the left


def test_a_hugging_face_folder_is_copied_as_it_is(tmp_path):
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    export_tokenizer("gpt2", tmp_path / "first")
    export_tokenizer(str(tmp_path / "first"), tmp_path / "second")
    for file in (tmp_path / "first").iterdir():
        assert (tmp_path / "second" / file.name).read_bytes() == file.read_bytes()
    assert load_tokenizer(tmp_path / "second").sha256 == load_tokenizer("gpt2").sha256
