"""A tokenizer's hash covers everything that changes ids. A long document has the ids that its tokenizer gives to the
whole of it. Right values come from tokenizers, transformers and sentencepiece."""

import io
import json

import numpy as np
import pytest
import sentencepiece
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import tiny
from jobs import train
from megacocomix.data import prepare
from megacocomix.data.prepare import prepare_data
from megacocomix.data.tokenizer import GPT2_FOLDER, export_tokenizer, load_tokenizer, train_sentencepiece
from megacocomix.data.tokens import TokenShards
from megacocomix.errors import UserError
from processes import run_processes

END = "<|endoftext|>"
TEXT = "The quick brown fox, 12345 times: it's jumped over ÉCOLE's  lazy dogs.\n\tA ▁ blank\nand another line\n\n" * 3
SPECIAL = {"vocab_size": 300, "special_tokens": ["<unk>", END], "show_progress": False}


def byte_level(prefix=False, train_on=TEXT):
    fast = Tokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    fast.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    fast.train_from_iterator([train_on], trainers.BpeTrainer(**SPECIAL, initial_alphabet=alphabet))
    return fast


def llama_like(scheme="first"):
    """No pre-tokeniser splits, and a blank is put before the text."""
    fast = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    fast.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    fast.decoder = decoders.Metaspace(prepend_scheme=scheme)
    fast.train_from_iterator([TEXT], trainers.BpeTrainer(**SPECIAL))
    return fast


def bert_like():
    fast = Tokenizer(models.WordPiece(unk_token="<unk>"))
    fast.normalizer, fast.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    fast.train_from_iterator([TEXT], trainers.WordPieceTrainer(**SPECIAL))
    return fast


def unigram():
    fast = Tokenizer(models.Unigram())
    fast.normalizer, fast.pre_tokenizer = normalizers.NFKC(), pre_tokenizers.Metaspace()
    fast.train_from_iterator([TEXT], trainers.UnigramTrainer(**SPECIAL, unk_token="<unk>"))
    return fast


FAST = {
    "byte level": byte_level,
    "byte level, prefix": lambda: byte_level(prefix=True),
    "llama": llama_like,
    "bert": bert_like,
    "unigram": unigram,
}


def save(fast, folder, **special):
    PreTrainedTokenizerFast(tokenizer_object=fast, eos_token=END, **special).save_pretrained(folder)
    return folder


def changed(fast, change):
    """The same vocabulary with another definition."""
    state = json.loads(fast.to_str())
    change(state)
    return Tokenizer.from_str(json.dumps(state))


def sentencepiece_model(file, **options):
    """As other projects train one, with a normaliser and a blank before the text."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.splitlines()), model_writer=model, vocab_size=340, byte_fallback=True,
        minloglevel=2, hard_vocab_limit=False, **options,
    )  # fmt: skip
    file.write_bytes(model.getvalue())
    return file


LOSSLESS = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "add_dummy_prefix": False}

CHANGES = {
    "normaliser": lambda state: state.update(normalizer={"type": "Lowercase"}),
    "pre-tokeniser": lambda state: state["pre_tokenizer"].update(add_prefix_space=True),
    "no regex": lambda state: state["pre_tokenizer"].update(use_regex=False),
    "decoder": lambda state: state.update(decoder={"type": "Fuse"}),
    "merges": lambda state: state["model"]["merges"].reverse(),
    "whole words": lambda state: state["model"].update(ignore_merges=True),
    "added token": lambda state: state["added_tokens"].append(
        {"id": 260, "content": "e", "single_word": False, "lstrip": True, "rstrip": False, "normalized": False}
        | {"special": False, "id": state["model"]["vocab"]["e"]}
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_one_vocabulary_with_another_definition_is_another_tokenizer(tmp_path, name):
    fast = byte_level()
    first = load_tokenizer(save(fast, tmp_path / "first"))
    second = load_tokenizer(save(changed(fast, CHANGES[name]), tmp_path / "second"))
    assert first.vocabulary_sha256 == second.vocabulary_sha256 and first.sha256 != second.sha256
    assert load_tokenizer(save(byte_level(), tmp_path / "again")).sha256 == first.sha256


def lower_a_score(state):
    state["model"]["vocab"][9][1] -= 1


def test_scores_of_pieces_are_part_of_a_tokenizer(tmp_path):
    fast = unigram()
    first = load_tokenizer(save(fast, tmp_path / "first"))
    second = load_tokenizer(save(changed(fast, lower_a_score), tmp_path / "second"))
    assert first.vocabulary_sha256 == second.vocabulary_sha256 and first.sha256 != second.sha256


def test_what_changes_no_id_changes_no_hash(tmp_path):
    fast = byte_level()
    first = load_tokenizer(save(fast, tmp_path / "first")).sha256
    fast.enable_truncation(8)
    assert load_tokenizer(save(fast, tmp_path / "second", pad_token=END, model_max_length=77)).sha256 == first


def test_a_special_token_that_no_text_gives_changes_no_hash_but_the_end_of_text_does(tmp_path):
    (tmp_path / "gpt2").mkdir()
    export_tokenizer("gpt2", tmp_path / "gpt2")
    hf = AutoTokenizer.from_pretrained(tmp_path / "gpt2")
    hf.add_special_tokens({"pad_token": "[PAD]"})
    hf.save_pretrained(tmp_path / "padded")
    own, padded = load_tokenizer("gpt2"), load_tokenizer(tmp_path / "padded")
    assert padded.vocabulary_sha256 != own.vocabulary_sha256 and padded.encode_batch(["a [PAD]"]) == own.encode_batch(
        ["a [PAD]"]
    )
    assert padded.sha256 == own.sha256 and padded.vocabulary_sha256 != own.vocabulary_sha256
    hf.add_special_tokens({"eos_token": "[END]"})
    hf.save_pretrained(tmp_path / "ended")
    assert load_tokenizer(tmp_path / "ended").sha256 != own.sha256
    hf.add_tokens(["quick brown"])
    hf.save_pretrained(tmp_path / "added")
    assert load_tokenizer(tmp_path / "added").sha256 != load_tokenizer(tmp_path / "ended").sha256


def test_gpt2_has_one_hash_in_every_form(tmp_path):
    export_tokenizer("gpt2", tmp_path)
    AutoTokenizer.from_pretrained(tmp_path).save_pretrained(tmp_path / "again")  # as a tokenizer.json
    own = load_tokenizer("gpt2")
    # Of every version of `tokenizers`: it is recorded in manifests, runs and label caches.
    assert own.sha256 == "4eb71735dbc0c28228094f866fb4b768e655efc925967d3490839d153203cb58"
    assert own.sha256 == load_tokenizer(tmp_path).sha256 == load_tokenizer(tmp_path / "again").sha256
    files = {"vocab.json": GPT2_FOLDER / "encoder.json", "merges.txt": GPT2_FOLDER / "vocab.bpe"}
    (tmp_path / "roberta").mkdir()
    for name, file in files.items():
        (tmp_path / "roberta" / name).write_bytes(file.read_bytes())
    settings = {"tokenizer_class": "GPT2Tokenizer", "eos_token": END, "add_prefix_space": True}
    (tmp_path / "roberta/tokenizer_config.json").write_text(json.dumps(settings))
    prefixed = load_tokenizer(tmp_path / "roberta")
    assert prefixed.encode_batch(["word"]) != own.encode_batch(["word"]) and prefixed.sha256 != own.sha256


def test_a_converted_sentencepiece_model_keeps_its_hash_until_it_is_changed(tmp_path):
    own = train_sentencepiece([TEXT], tmp_path / "own.model", 320)
    (tmp_path / "hf").mkdir()
    export_tokenizer(tmp_path / "own.model", tmp_path / "hf")
    converted, text = load_tokenizer(tmp_path / "hf"), TEXT + "\u2581\u2581 fox\u2581  \n"
    assert converted.sha256 == own.sha256
    ids = AutoTokenizer.from_pretrained(tmp_path / "hf")(text)["input_ids"]
    assert ids == own.encode_batch([text])[0] and converted.decode(ids) == own.decode(ids) == text
    state = json.loads((tmp_path / "hf/tokenizer.json").read_text())
    state["normalizer"] = {"type": "Lowercase"}
    (tmp_path / "hf/tokenizer.json").write_text(json.dumps(state))
    assert load_tokenizer(tmp_path / "hf").sha256 != own.sha256


def test_a_sentencepiece_models_normaliser_and_blank_are_part_of_its_hash(tmp_path):
    options = [{}, {"add_dummy_prefix": False}, {"normalization_rule_name": "identity"}, {"model_type": "bpe"}]
    files = [sentencepiece_model(tmp_path / f"{index}.model", **each) for index, each in enumerate(options)]
    assert len({load_tokenizer(file).sha256 for file in files}) == len(options)


def test_a_tokenizer_that_merges_at_random_is_refused(tmp_path):
    random = changed(byte_level(), lambda state: state["model"].update(dropout=0.1))
    with pytest.raises(UserError, match="a text has no fixed ids"):
        load_tokenizer(save(random, tmp_path))


def test_data_of_a_tokenizer_with_another_normaliser_is_neither_complete_nor_trained_on(tmp_path):
    fast = byte_level()
    folders = [save(fast, tmp_path / "a"), save(changed(fast, CHANGES["normaliser"]), tmp_path / "b")]
    (tmp_path / "text.txt").write_text(TEXT * 20)
    prepare_data([str(tmp_path / "text.txt")], tmp_path / "data", str(folders[0]))
    with pytest.raises(UserError, match=r"other settings \(tokenizer\)"):
        prepare_data([str(tmp_path / "text.txt")], tmp_path / "data", str(folders[1]))
    tiny.make_inputs(tmp_path)
    data = {"train": str(tmp_path / "data/train"), "valid": str(tmp_path / "data/train")}
    outcomes = []
    for folder in folders:
        options = {"data": data | {"tokenizer": str(folder)}, "model": {"vocab_size": 300}, "method": {"name": "ntp"}}
        config = tiny.config(tmp_path, f"run-{folder.name}", **options, training={"steps": 1})
        outcomes += run_processes(1, train, config)
    assert outcomes[0] == (0, [])
    assert outcomes[1][0] == 2 and all("has another tokenizer" in line for line in outcomes[1][1])


def test_data_prepared_by_an_earlier_version_is_still_complete_and_trained_on(tmp_path):
    """It recorded the hash of the vocabulary alone."""
    (tmp_path / "text.txt").write_text(TEXT * 20)
    prepare_data([str(tmp_path / "text.txt")], tmp_path / "data", "gpt2")
    file = tmp_path / "data/train/manifest.json"
    manifest = json.loads(file.read_text())
    manifest["tokenizer"]["sha256"] = load_tokenizer("gpt2").vocabulary_sha256
    file.write_text(json.dumps(manifest))
    assert prepare_data([str(tmp_path / "text.txt")], tmp_path / "data", "gpt2")[1] is True
    data = dict.fromkeys(("train", "valid"), str(tmp_path / "data/train"))
    options = {"model": {"vocab_size": 50_257}, "method": {"name": "ntp"}, "training": {"steps": 1}}
    assert run_processes(1, train, tiny.config(tmp_path, data=data, **options)) == [(0, [])]


LONG = (TEXT + "x" * 50 + "\n  indented\n").replace("\n\n", "\n") * 400  # 0.14 MB, cut every 16 KB below


@pytest.fixture
def short_chunks(monkeypatch):
    monkeypatch.setattr(prepare, "CHUNK_CHARS", 2**14)


def prepared(folder, tokenizer):
    (folder / "long.jsonl").write_text(json.dumps({"text": LONG}) + "\n")
    prepare_data([str(folder / "long.jsonl")], folder / "data", str(tokenizer))
    shards = TokenShards.open(folder / "data/train")
    ids = shards.read(0, len(shards))
    assert ids[-1] == load_tokenizer(tokenizer).eot_id
    return ids[:-1]


@pytest.mark.parametrize("name", FAST)
def test_a_long_document_has_the_ids_of_the_whole(tmp_path, short_chunks, name):
    fast = FAST[name]()
    expected = fast.encode(LONG, add_special_tokens=False).ids
    assert (prepared(tmp_path, save(fast, tmp_path / "tokenizer")) == np.array(expected)).all()


def test_a_long_document_has_gpt2s_ids_of_the_whole_and_is_cut(tmp_path, short_chunks):
    export_tokenizer("gpt2", tmp_path)
    expected = AutoTokenizer.from_pretrained(tmp_path)(LONG, verbose=False)["input_ids"]
    assert (prepared(tmp_path, "gpt2") == np.array(expected)).all()
    for tokenizer in ("gpt2", tmp_path):
        cut = load_tokenizer(tokenizer).cut
        assert len(list(prepare._chunks([LONG], 0.0, cut))) > 5
    assert len(list(prepare._chunks([LONG], 0.0, load_tokenizer(save(llama_like(), tmp_path / "llama")).cut))) == 1


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"add_dummy_prefix": False},
        {"model_type": "bpe"},
        {"normalization_rule_name": "identity"},
        LOSSLESS,
        LOSSLESS | {"model_type": "bpe"},
        LOSSLESS | {"model_type": "bpe", "user_defined_symbols": ["of the", "    ", "\n\t"]},
    ],
)
def test_a_long_document_has_sentencepieces_ids_of_the_whole(tmp_path, short_chunks, options):
    """Also where the text holds the symbol that stands for a blank."""
    file = sentencepiece_model(tmp_path / "foreign.model", **options)
    expected = sentencepiece.SentencePieceProcessor(model_file=str(file)).encode(LONG)
    assert (prepared(tmp_path, file) == np.array(expected)).all()


def test_our_own_sentencepiece_model_cuts_long_documents_and_gives_every_character_back(tmp_path, short_chunks):
    own = train_sentencepiece([TEXT], tmp_path / "own.model", 320)
    assert len(list(prepare._chunks([LONG], 0.0, own.cut))) > 5
    ids = prepared(tmp_path, tmp_path / "own.model")
    assert ids.tolist() == own.encode_batch([LONG])[0]
    assert own.decode(ids) == LONG


def test_a_sentencepiece_model_is_converted_exactly_or_not_at_all(tmp_path):
    plain = {"model_type": "bpe", "normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    file = sentencepiece_model(tmp_path / "plain.model", add_dummy_prefix=False, **plain)
    (tmp_path / "hf").mkdir()
    export_tokenizer(file, tmp_path / "hf")
    expected = sentencepiece.SentencePieceProcessor(model_file=str(file)).encode("fox  dogs\nfox")
    converted = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert converted("fox  dogs\nfox", add_special_tokens=False)["input_ids"] == expected
    (tmp_path / "other").mkdir()
    for options in (plain, {"model_type": "bpe"}):  # a blank before the text; a normaliser too
        with pytest.raises(UserError, match=r"cannot be converted to tokenizer\.json: .* would get other ids"):
            export_tokenizer(sentencepiece_model(tmp_path / "foreign.model", **options), tmp_path / "other")


def test_a_long_document_is_cut_for_byte_pairs_alone(tmp_path):
    """A unigram model adds up the scores of all pieces so far, and rounds."""
    for kind, is_cut in {"bpe": True, "unigram": False}.items():
        file = sentencepiece_model(tmp_path / f"{kind}.model", model_type=kind, **LOSSLESS)
        assert bool(load_tokenizer(file).cut) == is_cut


def user_defined(folder, piece):
    (folder / "hf").mkdir()
    return sentencepiece_model(folder / "a.model", model_type="bpe", user_defined_symbols=[piece], **LOSSLESS)


@pytest.mark.parametrize("piece", ["    ", "of the", "<a b>", "\u2581\u2581\u2581"])
def test_a_model_whose_user_defined_piece_transformers_does_not_find_is_not_converted(tmp_path, piece):
    with pytest.raises(UserError, match=r"cannot be converted to tokenizer\.json: .* would get other ids"):
        export_tokenizer(user_defined(tmp_path, piece), tmp_path / "hf")


@pytest.mark.parametrize("piece", ["<sep>", "ing", "\t\t"])
def test_a_model_with_another_user_defined_piece_is_converted_exactly(tmp_path, piece):
    export_tokenizer(file := user_defined(tmp_path, piece), tmp_path / "hf")
    text = f"a{piece}b {piece} the lazy  dogs\n{piece}{piece}jumping"
    ids = AutoTokenizer.from_pretrained(tmp_path / "hf")(text, add_special_tokens=False)["input_ids"]
    assert ids == sentencepiece.SentencePieceProcessor(model_file=str(file)).encode(text)


def test_the_symbol_of_a_space_is_read_as_sentencepiece_does_in_models_of_others(tmp_path):
    text = "fox\u2581dogs \u2581\u2581 x"
    for number, options in enumerate(({}, {"eos_piece": END}, {"user_defined_symbols": ["<sep>"]})):
        file = sentencepiece_model(tmp_path / f"{number}.model", model_type="bpe", **LOSSLESS, **options)
        expected = sentencepiece.SentencePieceProcessor(model_file=str(file)).encode(text)
        (tmp_path / str(number)).mkdir()
        export_tokenizer(file, tmp_path / str(number))
        for spec in (file, tmp_path / str(number)):
            assert load_tokenizer(spec).encode_batch([text]) == [expected]


def test_a_folder_with_a_sentencepiece_model_alone_is_refused_with_the_remedy(tmp_path):
    sentencepiece_model(tmp_path / "tokenizer.model", model_type="bpe")
    with pytest.raises(UserError, match=r"is a SentencePiece model alone: give .*tokenizer\.model"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "a.model"])
def test_a_pointer_of_git_lfs_in_place_of_a_tokenizers_file_is_named(tmp_path, name):
    save(byte_level(), tmp_path)
    (tmp_path / "tokenizer").mkdir()  # a folder is no file of a tokenizer
    load_tokenizer(tmp_path)
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(UserError, match=rf"{name} is a git-lfs pointer, .* run git lfs pull"):
        load_tokenizer(tmp_path / name if name == "a.model" else tmp_path)
