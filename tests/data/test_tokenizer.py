import shutil
import socket

import pytest

from megacocomix.data import tokenizer as module
from megacocomix.data.tokenizer import load_tokenizer, train_sentencepiece
from megacocomix.errors import UserError

PROSE = [
    f"The {a} {b} of number {i}.\nIt was, as ever, {b}."
    for i in range(40)
    for a in ("old", "new")
    for b in ("sea", "sky")
]
ODD_TEXTS = [
    "two\n\nlines\r\n",
    "\ttabs\t and  double   spaces ",
    "emoji 😀👩‍👩‍👧 and é, e\u0301, 日本語",
    "a literal <|endoftext|> and <unk> and <0x0A>",
    "the ▁ that SentencePiece writes for spaces ▁▁",
    "\x00 \u200b \ufeff",
    " ",
    "",
]


@pytest.fixture(scope="module")
def sentencepiece_model(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "small.model"
    train_sentencepiece(PROSE, path, 320)
    return path


@pytest.fixture(scope="module")
def hugging_face_folder(tmp_path_factory):
    from transformers import GPT2TokenizerFast

    folder = tmp_path_factory.mktemp("tokenizer") / "hf"
    files = {"vocab": "encoder.json", "merges": "vocab.bpe"}
    hf = GPT2TokenizerFast(**{key: str(module.GPT2_FOLDER / name) for key, name in files.items()})
    hf.save_pretrained(folder)
    return folder


def test_gpt2_needs_no_network(monkeypatch):
    def refuse(*_):
        raise AssertionError("went to the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    gpt2 = load_tokenizer("gpt2")
    assert gpt2.encode_batch(["Hello world"]) == [[15496, 995]]
    assert (gpt2.vocab_size, gpt2.eot_id) == (50257, 50256)


def test_damaged_gpt2_vocabulary_is_refused(tmp_path, monkeypatch):
    folder = shutil.copytree(module.GPT2_FOLDER, tmp_path / "gpt2")
    with open(folder / "vocab.bpe", "r+b") as file:
        file.seek(1000)
        file.write(b"x")
    monkeypatch.setattr(module, "GPT2_FOLDER", folder)
    with pytest.raises(UserError, match=r"vocab\.bpe .* damaged"):
        load_tokenizer("gpt2")


@pytest.mark.parametrize("kind", ["gpt2", "sentencepiece", "hugging_face"])
def test_odd_text_comes_back_and_never_holds_the_end_of_text(kind, sentencepiece_model, hugging_face_folder):
    specs = {"gpt2": "gpt2", "sentencepiece": sentencepiece_model, "hugging_face": hugging_face_folder}
    tokenizer = load_tokenizer(specs[kind])
    encoded = tokenizer.encode_batch(ODD_TEXTS)
    assert [tokenizer.decode(ids) for ids in encoded] == ODD_TEXTS
    assert all(0 <= i < tokenizer.vocab_size and i != tokenizer.eot_id for ids in encoded for i in ids)


def test_identity_is_that_of_the_vocabulary_not_of_its_files(sentencepiece_model, hugging_face_folder, tmp_path):
    gpt2, folder = load_tokenizer("gpt2"), load_tokenizer(hugging_face_folder)
    assert (folder.sha256, folder.vocab_size, folder.eot_id) == (gpt2.sha256, gpt2.vocab_size, gpt2.eot_id)
    copy = shutil.copy(sentencepiece_model, tmp_path / "other-name.model")
    assert load_tokenizer(copy).sha256 == load_tokenizer(sentencepiece_model).sha256 != gpt2.sha256


def test_sentencepiece_training_is_deterministic_even_when_it_samples_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MAX_TRAINING_LINES", 101)
    for name in ("a.model", "b.model"):
        train_sentencepiece(iter(PROSE), tmp_path / name, 300)
    assert (tmp_path / "a.model").read_bytes() == (tmp_path / "b.model").read_bytes()


def test_trained_tokenizer_is_never_overwritten(sentencepiece_model):
    before = sentencepiece_model.read_bytes()
    with pytest.raises(UserError, match="exists already"):
        train_sentencepiece(["other text"], sentencepiece_model, 300)
    assert sentencepiece_model.read_bytes() == before


@pytest.mark.parametrize(
    ("documents", "size", "message"),
    [
        (PROSE, 100, "at least 2"),
        (PROSE, 50_000, "at most [0-9]+"),
        ([], 300, "no text"),
        (PROSE, -1, "vocab-size"),
    ],
)
def test_errors_name_a_vocabulary_size_that_suits(tmp_path, documents, size, message):
    with pytest.raises(UserError, match=message):
        train_sentencepiece(documents, tmp_path / "x.model", size)
    assert list(tmp_path.iterdir()) == []


def test_bad_tokenizer_paths_are_refused(tmp_path):
    (tmp_path / "text.model").write_text("no model")
    (tmp_path / "notes.txt").write_text("no tokenizer")
    (tmp_path / "empty").mkdir()
    (tmp_path / "hollow").mkdir()
    (tmp_path / "hollow" / "config.json").write_text('{"model_type": "gpt2"}')
    for name in ("missing", "text.model", "notes.txt", "empty", "hollow"):
        with pytest.raises(UserError, match=name):
            load_tokenizer(tmp_path / name)
