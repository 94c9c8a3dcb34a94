"""Whose labels a student is compared with, and what tools/inspect_concepts.py prints, writes and refuses."""

import importlib.util
import re
import sys

import pytest
from inspecting import make_student

import tiny
from megacocomix.errors import UserError
from megacocomix.hf.export import export_hf
from megacocomix.interpret.inspection import read_inspection
from megacocomix.interpret.page import render
from megacocomix.interpret.teacher_labels import ALONE, open_teacher_labels, teacher_labels_notes


def test_a_run_is_labelled_as_its_config_says(with_header):
    student = make_student(
        with_header, tiny.config(with_header, method={"label_source": "activation", "num_labels": 2})
    )
    source = open_teacher_labels(student)
    assert source.as_dict() == {
        "model": str(with_header / "teacher"),
        "sae": str(with_header / "sae.safetensors"),
        "num_labels": 2,
        "label_source": "activation",
        "label_sign": "positive",
    }
    moved = open_teacher_labels(student, str(with_header / "teacher"), str(with_header / "told.safetensors"))
    assert moved.sae == str(with_header / "told.safetensors") and moved.labeler.settings.source == "activation"
    assert teacher_labels_notes(student, source) == []


def test_a_run_whose_teacher_is_gone_says_how_to_go_on(with_header):
    student = make_student(with_header, tiny.config(with_header, teacher={"model": str(with_header / "gone")}))
    with pytest.raises(UserError, match="gone") as caught:
        open_teacher_labels(student, remedy=ALONE)
    assert "--no-teacher" in caught.value.problems[-1]


def test_a_student_that_had_no_labels_is_read_alone(with_header):
    student = make_student(with_header, tiny.config(with_header, method={"name": "mix-only"}))
    assert open_teacher_labels(student) is None and "without concept labels" in teacher_labels_notes(student, None)[0]
    folder = make_student(with_header)
    assert open_teacher_labels(folder) is None and "--teacher DIR --sae FILE" in teacher_labels_notes(folder, None)[0]


MISMATCHES = {
    "width": ({"width": 20}, "reads width 20"),
    "latents": ({"latents": 50}, "has 50 latents"),
    "layer": ({"sae_layer": 7}, "layer 7"),
    "teacher": ({"teacher_sha256": "other"}, "trained on another teacher"),
    "tokenizer": ({"tokenizer_sha256": "other"}, "another tokenizer"),
}


@pytest.mark.parametrize("mismatch", MISMATCHES)
def test_an_autoencoder_that_does_not_fit_is_refused(with_header, tmp_path, mismatch):
    change, what = MISMATCHES[mismatch]
    tiny.make_sae(tmp_path / "s.safetensors", **{"sae_layer": 1, "location": "resid_post_mlp"} | change)
    with pytest.raises(UserError, match=what):
        open_teacher_labels(make_student(tmp_path), str(with_header / "teacher"), str(tmp_path / "s.safetensors"))


def test_an_autoencoder_that_does_not_say_its_layer_and_half_a_teacher_are_refused(with_header):
    student = make_student(with_header)
    with pytest.raises(UserError, match="sae_layer and location"):
        open_teacher_labels(student, str(with_header / "teacher"), str(with_header / "sae.safetensors"))
    with pytest.raises(UserError, match="go together"):
        open_teacher_labels(student, str(with_header / "teacher"))


@pytest.fixture(scope="module")
def exported(tmp_path_factory, root):
    """An exported folder of a student of the shipped teacher."""
    folder = tmp_path_factory.mktemp("exported")
    tokenizer = str(root / "assets/teacher/tokenizer.model")
    export_hf(tiny.loaded(vocab_size=4096, num_concepts=2048, num_kept=8), folder / "hf", tokenizer)
    export_hf(tiny.loaded(vocab_size=4096, name="ntp", predict="nothing", mix="nothing"), folder / "plain", tokenizer)
    (folder / "text.txt").write_text("The cat sat on the mat, and the dog sat on the cat.\n" * 3)
    return folder


@pytest.fixture
def tool(root, monkeypatch):
    """tools/inspect_concepts.py, to be run with arguments."""
    spec = importlib.util.spec_from_file_location("inspect_concepts", root / "tools/inspect_concepts.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["inspect_concepts.py", *map(str, arguments)])
        return module.main()

    return run


def test_the_tool_prints_a_table_and_writes_the_record(tool, exported, root, tmp_path, capsys):
    teacher = root / "assets/teacher"
    options = ("--teacher", teacher, "--sae", teacher / "sae.safetensors", "--out", tmp_path / "new/r.json")
    options += ("--html", tmp_path / "new/r.html")
    tool(exported / "hf", "--text", exported / "text.txt", *options, "--top", 3)
    printed = capsys.readouterr().out
    record = read_inspection(tmp_path / "new/r.json")
    rows = re.findall(r"^ +(\d+) +[\d.]+ %", printed, re.MULTILINE)
    assert [int(row) for row in rows] == [entry["id"] for entry in record["concepts"][:3]]
    assert "note: 1 of 1 documents is longer than the context of 16 tokens" in printed
    assert f"never kept in this text: {record['totals']['never_kept']:,}" in printed
    assert record["texts"] == [str(exported / "text.txt")] and record["step"] is None
    assert record["teacher"]["num_labelled"] > 0
    assert len(record["teacher_dead"]) == record["totals"]["teacher_dead"]
    assert (tmp_path / "new/r.html").read_text() == render(record)


def test_a_name_of_the_user_is_kept_for_a_concept_that_the_text_never_shows(tool, exported, tmp_path):
    alone = ("--text", exported / "text.txt", "--no-teacher")
    tool(exported / "hf", *alone, "--out", tmp_path / "a.json")
    never = read_inspection(tmp_path / "a.json")["never_kept"][0]
    (tmp_path / "names.yaml").write_text(f"{never}: website\n")
    tool(exported / "hf", *alone, "--names", tmp_path / "names.yaml", "--out", tmp_path / "b.json")
    named = {entry["id"]: entry for entry in read_inspection(tmp_path / "b.json")["concepts"]}[never]
    assert (named["name"], named["named_by"], named["kept"]) == ("website", "file", 0)


def test_the_tool_prints_cards_of_single_concepts(tool, exported, tmp_path, capsys):
    tool(exported / "hf", "--text", exported / "text.txt", "--no-teacher", "--out", tmp_path / "r.json")
    record = read_inspection(tmp_path / "r.json")
    first, never = record["concepts"][0], record["never_kept"][0]
    capsys.readouterr()
    asked = ("--concept", first["id"], "--concept", never)
    tool(exported / "hf", "--text", exported / "text.txt", "--no-teacher", *asked)
    printed = capsys.readouterr().out
    assert f"kept at {first['kept']:,} positions" in printed and first["name"] in printed
    assert f"⟦{first['contexts'][0]['token']}⟧" in printed
    assert f"concept {never}: never kept in this text" in printed
    assert "note" in printed and "does not record its teacher" not in printed


MISTAKES = {
    "no text file": (("hf", "--text", "{folder}/none.txt"), "none.txt does not exist"),
    "tokens": (("hf", "--text", "{folder}/text.txt", "--tokens", "0"), "--tokens 0 must be 1 or more"),
    "shown": (("hf", "--text", "{folder}/text.txt", "--shown", "-1"), "--shown -1 must be 1 or more"),
    "top": (("hf", "--text", "{folder}/text.txt", "--top", "0"), "--top 0 must be 1 or more"),
    "out exists": (("hf", "--text", "{folder}/text.txt", "--out", "{folder}/text.txt"), "exists already"),
    "html exists": (("hf", "--text", "{folder}/text.txt", "--html", "{folder}/text.txt"), "exists already"),
    "same file": (("hf", "--text", "x", "--out", "{folder}/n", "--html", "{folder}/n"), "choose two names"),
    "concept": (("hf", "--text", "{folder}/text.txt", "--concept", "2048"), "Valid: 0 … 2047"),
    "negative": (("hf", "--text", "{folder}/text.txt", "--concept", "-1"), "Valid: 0 … 2047"),
    "two minds": (("hf", "--text", "{folder}/text.txt", "--no-teacher", "--sae", "x"), "goes with neither"),
    "no concepts": (("plain", "--text", "{folder}/none.txt"), "predicts no concepts"),
    "no model": (("none", "--text", "{folder}/text.txt"), "none does not exist"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_said_before_anything_is_read(tool, exported, mistake):
    arguments, what = MISTAKES[mistake]
    name, *rest = (argument.format(folder=exported) for argument in arguments)
    before = sorted(exported.rglob("*"))
    with pytest.raises(UserError) as caught:
        tool(exported / name, *rest)
    assert any(what in problem for problem in caught.value.problems), caught.value.problems
    assert sorted(exported.rglob("*")) == before
