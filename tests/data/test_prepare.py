import gzip
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megacocomix.data import prepare
from megacocomix.data.prepare import is_validation, prepare_data, train_tokenizer
from megacocomix.data.tokenizer import load_tokenizer
from megacocomix.data.tokens import ShardWriter, TokenShards
from megacocomix.errors import UserError
from processes import run_tool

CHECKOUT = Path(__file__).parents[2]
TEXTS = [f"Document {i}.\n" + f"It says {i} and  {i * i} — naïvely.\n\n" * (i % 7) + "End." for i in range(60)]


@pytest.fixture
def corpus(tmp_path):
    file = tmp_path / "corpus.jsonl"
    write_jsonl(file, TEXTS)
    return file


@pytest.fixture
def many_small_steps(monkeypatch):
    """Batches of 500 characters, and a commit after each batch: a small corpus takes many steps."""
    monkeypatch.setattr(prepare, "BATCH_CHARS", 500)
    monkeypatch.setattr(prepare, "COMMIT_SECONDS", 0)


def write_jsonl(file, texts):
    file.write_text("".join(json.dumps({"title": "t", "text": text}) + "\n" for text in texts))


def contents(folder):
    """Of all files but the record of what was verified."""
    files = (file for file in folder.rglob("*") if file.is_file() and file.name != ".verified.json")
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def tokens(folder):
    shards = TokenShards.open(folder, verify=True)
    return shards.read(0, len(shards)).tolist()


def command_line(*arguments):
    return run_tool([CHECKOUT / "tools" / "prepare_data.py", *arguments], CHECKOUT)


def test_documents_are_kept_in_order_each_ended_by_end_of_text(corpus, tmp_path):
    manifests, complete = prepare_data([corpus], tmp_path / "out", "gpt2")
    gpt2 = load_tokenizer("gpt2")
    assert tokens(tmp_path / "out" / "train") == [i for ids in gpt2.encode_batch(TEXTS) for i in [*ids, 50256]]
    assert manifests["train"]["num_documents"] == 60 and not complete
    assert sorted(contents(tmp_path / "out")) == ["train/manifest.json", "train/shard-00000.bin"]


def test_every_kind_of_file_gives_the_same_tokens(corpus, tmp_path):
    import datasets

    (tmp_path / "corpus.txt").write_text("\n<|endoftext|>\n".join(TEXTS) + "\n")
    (tmp_path / "corpus.jsonl.gz").write_bytes(gzip.compress(corpus.read_bytes()))
    dataset = datasets.Dataset.from_dict({"text": TEXTS, "title": TEXTS})
    dataset.to_parquet(tmp_path / "corpus.parquet")
    dataset.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": dataset}).save_to_disk(tmp_path / "saved_splits")
    (tmp_path / "folder").mkdir()
    write_jsonl(tmp_path / "folder" / "a.jsonl", TEXTS[:20])
    write_jsonl(tmp_path / "folder" / "b.jsonl", TEXTS[20:])
    prepare_data([corpus], tmp_path / "expected", "gpt2")
    expected = tokens(tmp_path / "expected" / "train")
    kinds = ("corpus.txt", "corpus.jsonl.gz", "corpus.parquet", "saved", "saved_splits", "folder")
    for kind in kinds:
        prepare_data([tmp_path / kind], tmp_path / "out" / kind, "gpt2")
        assert tokens(tmp_path / "out" / kind / "train") == expected, kind


def test_the_number_of_workers_changes_no_byte(corpus, tmp_path, many_small_steps):
    for workers in (1, 2):
        prepare_data([corpus], tmp_path / str(workers), "gpt2", valid=0.3, workers=workers, shard_tokens=700)
    assert contents(tmp_path / "1") == contents(tmp_path / "2")
    assert len(contents(tmp_path / "1")) > 6


@pytest.mark.parametrize("documents", [1, 17, 59])
def test_an_interruption_changes_no_byte(corpus, tmp_path, many_small_steps, monkeypatch, documents):
    options = {"tokenizer": "gpt2", "valid": 0.3, "shard_tokens": 700}
    prepare_data([corpus], tmp_path / "whole", **options)
    read = prepare.read_documents

    def break_off(*arguments):
        yield from itertools.islice(read(*arguments), documents)
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare, "read_documents", break_off)
    with pytest.raises(KeyboardInterrupt):
        prepare_data([corpus], tmp_path / "interrupted", **options)
    with pytest.raises(UserError, match="did not finish"):
        TokenShards.open(tmp_path / "interrupted" / "train")
    monkeypatch.setattr(prepare, "read_documents", read)
    prepare_data([corpus], tmp_path / "interrupted", **options)
    assert contents(tmp_path / "interrupted") == contents(tmp_path / "whole")


def test_a_killed_process_is_continued_not_repeated(tmp_path):
    corpus = tmp_path / "corpus.jsonl"
    write_jsonl(corpus, [f"{text} {i}" for i in range(40) for text in TEXTS])
    script = tmp_path / "script.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(CHECKOUT)!r})\n"
        "from megacocomix.data import prepare\n"
        "prepare.BATCH_CHARS, prepare.COMMIT_SECONDS = 2000, 0\n"
        "if __name__ == '__main__':\n"
        f"    prepare.prepare_data([{str(corpus)!r}], sys.argv[1], 'gpt2', 0.1, 2, shard_tokens=20_000)\n"
    )
    process = subprocess.Popen([sys.executable, script, tmp_path / "interrupted"], stderr=subprocess.DEVNULL)
    state = tmp_path / "interrupted" / ".partial" / "state.json"
    while not (state.exists() and json.loads(state.read_bytes())["chunks"] > 200):
        assert process.poll() is None, "finished before it was killed"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = json.loads(state.read_bytes())["chunks"]
    assert 200 < done < 2400
    options = {"tokenizer": "gpt2", "valid": 0.1, "shard_tokens": 20_000}
    prepare_data([corpus], tmp_path / "interrupted", **options)
    prepare_data([corpus], tmp_path / "whole", **options)
    assert contents(tmp_path / "interrupted") == contents(tmp_path / "whole")


def test_a_full_disk_is_one_line_and_keeps_what_is_done(corpus, tmp_path, many_small_steps, monkeypatch):
    append = ShardWriter.append

    def fill_up(writer, ids):
        if writer.num_tokens > 1000:
            raise OSError(28, "No space left on device")
        append(writer, ids)

    monkeypatch.setattr(ShardWriter, "append", fill_up)
    with pytest.raises(UserError, match=r"No space left on device.*the same command continues it"):
        prepare_data([corpus], tmp_path / "out", "gpt2")
    monkeypatch.setattr(ShardWriter, "append", append)
    assert json.loads((tmp_path / "out" / ".partial" / "state.json").read_bytes())["chunks"] > 0
    prepare_data([corpus], tmp_path / "out", "gpt2")
    prepare_data([corpus], tmp_path / "whole", "gpt2")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_complete_folder_is_left_alone(corpus, tmp_path):
    prepare_data([corpus], tmp_path / "out", "gpt2", valid=0.3)
    before = contents(tmp_path / "out")
    assert prepare_data([corpus], tmp_path / "out", "gpt2", valid=0.3)[1]
    for changed in ({"valid": 0.0}, {"valid": 0.3, "shard_tokens": 10}, {"valid": 0.3, "field": "title"}):
        with pytest.raises(UserError, match="other settings"):
            prepare_data([corpus], tmp_path / "out", "gpt2", **changed)
    write_jsonl(corpus, TEXTS[:-1])
    with pytest.raises(UserError, match=r"other settings \(sources\)"):
        prepare_data([corpus], tmp_path / "out", "gpt2", valid=0.3)
    assert contents(tmp_path / "out") == before


def test_a_folder_without_validation_is_not_extended(corpus, tmp_path):
    prepare_data([corpus], tmp_path / "out", "gpt2")
    with pytest.raises(UserError, match=r"other settings \(valid\)"):
        prepare_data([corpus], tmp_path / "out", "gpt2", valid=0.3)


def test_a_complete_folder_with_a_truncated_shard_is_not_called_complete(corpus, tmp_path):
    prepare_data([corpus], tmp_path / "out", "gpt2")
    with open(tmp_path / "out" / "train" / "shard-00000.bin", "r+b") as file:
        file.truncate(100)
    with pytest.raises(UserError, match=r"shard-00000\.bin has 100 bytes"):
        prepare_data([corpus], tmp_path / "out", "gpt2")


def test_someone_elses_folder_is_left_alone(corpus, tmp_path):
    (tmp_path / "out" / "train").mkdir(parents=True)
    (tmp_path / "out" / "train" / "shard-00000.bin").write_text("mine")
    with pytest.raises(UserError, match="not made by this command"):
        prepare_data([corpus], tmp_path / "out", "gpt2")
    assert (tmp_path / "out" / "train" / "shard-00000.bin").read_text() == "mine"


def test_two_processes_do_not_write_to_one_folder(corpus, tmp_path):
    with prepare._lock(tmp_path / "out"), pytest.raises(UserError, match="another process"):
        prepare_data([corpus], tmp_path / "out", "gpt2")


def test_validation_documents_follow_from_their_own_text(corpus, tmp_path):
    prepare_data([corpus], tmp_path / "out", "gpt2", valid=0.3)
    reversed_corpus = tmp_path / "reversed.jsonl"
    write_jsonl(reversed_corpus, TEXTS[::-1])
    prepare_data([reversed_corpus], tmp_path / "reversed", "gpt2", valid=0.3)
    documents = {}
    for name in ("out", "reversed"):
        text = load_tokenizer("gpt2").decode(tokens(tmp_path / name / "valid"))
        documents[name] = text.split("<|endoftext|>")[:-1]
    assert documents["out"] == documents["reversed"][::-1] == [t for t in TEXTS if is_validation(t, 0.3)]
    assert {t for t in TEXTS if is_validation(t, 0.1)} < {t for t in TEXTS if is_validation(t, 0.3)}


def test_a_spelled_out_end_of_text_is_ordinary_text(tmp_path):
    write_jsonl(tmp_path / "c.jsonl", ["before <|endoftext|> after"])
    prepare_data([tmp_path / "c.jsonl"], tmp_path / "out", "gpt2")
    ids = tokens(tmp_path / "out" / "train")
    assert ids.index(50256) == len(ids) - 1
    assert load_tokenizer("gpt2").decode(ids[:-1]) == "before <|endoftext|> after"


def test_a_long_document_has_the_tokens_of_the_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "CHUNK_CHARS", 100)
    text = "\n".join(TEXTS) + "\n\n  \nlast  line"
    write_jsonl(tmp_path / "c.jsonl", [text])
    manifests, _ = prepare_data([tmp_path / "c.jsonl"], tmp_path / "out", "gpt2", valid=0.0)
    assert tokens(tmp_path / "out" / "train") == [*load_tokenizer("gpt2").encode_batch([text])[0], 50256]
    assert manifests["train"]["num_documents"] == 1


def test_the_tokenizer_never_sees_validation_documents(tmp_path):
    texts = [*TEXTS, *(f"{text} ⚘" for text in TEXTS)]
    write_jsonl(tmp_path / "all.jsonl", texts)
    write_jsonl(tmp_path / "seen.jsonl", [text for text in texts if not is_validation(text, 0.5)])
    train_tokenizer([tmp_path / "all.jsonl"], tmp_path / "a.model", 300, valid=0.5)
    train_tokenizer([tmp_path / "seen.jsonl"], tmp_path / "b.model", 300)
    assert (tmp_path / "a.model").read_bytes() == (tmp_path / "b.model").read_bytes()
    prepare_data([tmp_path / "all.jsonl"], tmp_path / "out", str(tmp_path / "a.model"), valid=0.5, workers=2)
    text = load_tokenizer(tmp_path / "a.model").decode(tokens(tmp_path / "out" / "valid"))
    assert text == "".join(text for text in texts if is_validation(text, 0.5))


BAD_FILES = {
    "broken.jsonl": (b'{"text": "a"}\n{"text": oops}\n', r"broken\.jsonl line 2 is not JSON"),
    "list.jsonl": (b'["a"]\n', r"list\.jsonl line 1 is not a JSON object"),
    "field.jsonl": (b'{"body": "a", "title": "b"}\n', r"field\.jsonl line 1 has no field 'text'.*body title"),
    "number.jsonl": (b'{"text": 3}\n', "line 1: field 'text' holds int"),
    "surrogate.jsonl": (b'{"text": "\\ud800"}\n', "line 1: .* not valid Unicode"),
    "latin.txt": (b"fine\ncaf\xe9\n", r"latin\.txt line 2 is not UTF-8"),
    "truncated.jsonl.gz": (gzip.compress(b'{"text": "a"}\n' * 100)[:-10], r"truncated\.jsonl\.gz cannot be read"),
    "plain.jsonl.gz": (b'{"text": "a"}\n', r"plain\.jsonl\.gz is not compressed as \.gz"),
    "broken.parquet": (b"PAR1 no", r"broken\.parquet cannot be read"),
    "empty.txt": (b"", "no text"),
    "blank.jsonl": (b'{"text": " \\n"}\n\n{"text": null}\n', "no text"),
    "table.xls": (b"text\na\n", r"table\.xls is of an unknown kind"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_are_one_line_and_do_not_prevent_a_later_attempt_with_a_fixed_one(tmp_path, name):
    content, message = BAD_FILES[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        prepare_data([tmp_path / name], tmp_path / "out", "gpt2")
    assert len(caught.value.problems) == 1 and "\n" not in str(caught.value)
    write_jsonl(tmp_path / "fixed.jsonl", TEXTS)
    prepare_data([tmp_path / "fixed.jsonl"], tmp_path / "out", "gpt2")
    prepare_data([tmp_path / "fixed.jsonl"], tmp_path / "fresh", "gpt2")
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_a_missing_parquet_field_names_those_that_are_there(tmp_path):
    import datasets

    datasets.Dataset.from_dict({"body": ["a"], "title": ["b"]}).to_parquet(tmp_path / "x.parquet")
    with pytest.raises(UserError, match=r"no field 'text'.*body title"):
        prepare_data([tmp_path / "x.parquet"], tmp_path / "out", "gpt2")


def test_a_dataset_with_several_splits_asks_for_one(tmp_path):
    import datasets

    one = datasets.Dataset.from_dict({"text": ["a"]})
    datasets.DatasetDict({"train": one, "test": one}).save_to_disk(tmp_path / "both")
    with pytest.raises(UserError, match=r"several splits, give one: .*both/train .*both/test"):
        prepare_data([tmp_path / "both"], tmp_path / "out", "gpt2")


def test_every_unusable_input_is_reported_before_anything_is_written(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError) as caught:
        prepare_data([tmp_path / "no.txt", tmp_path / "empty", "no.jsonl"], tmp_path / "out", "gpt2")
    assert len(caught.value.problems) == 3
    assert not (tmp_path / "out").exists()


def test_a_split_that_gets_no_document_is_refused(tmp_path):
    write_jsonl(tmp_path / "c.jsonl", TEXTS[:2])
    with pytest.raises(UserError, match="no document fell into valid"):
        prepare_data([tmp_path / "c.jsonl"], tmp_path / "out", "gpt2", valid=1e-6)


def test_command_line_prepares_reports_when_complete_and_refuses_with_one_line(corpus, tmp_path):
    arguments = (corpus, "--out", tmp_path / "out", "--tokenizer", "gpt2", "--valid", "0.3", "--workers", "1")
    first, second = command_line(*arguments), command_line(*arguments)
    assert first.returncode == second.returncode == 0, first.stderr
    assert "already complete" in second.stdout and "already complete" not in first.stdout
    refused = command_line(corpus, "--out", tmp_path / "out", "--tokenizer", tmp_path / "nowhere")
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: tokenizer") and refused.stderr.count("\n") == 1


def test_no_copy_of_the_corpus_is_left_in_the_home_directory(corpus, tmp_path, monkeypatch):
    import datasets

    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(tmp_path / "saved")
    home = tmp_path / "home"
    home.mkdir()
    for name in ("HF_HOME", "XDG_CACHE_HOME", "HF_DATASETS_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(home))
    result = command_line(tmp_path / "saved", corpus, "--out", tmp_path / "out", "--tokenizer", "gpt2")
    assert result.returncode == 0, result.stderr
    assert [name for _, _, names in os.walk(home) for name in names] == []
