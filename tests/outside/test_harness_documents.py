"""Documents that lm-evaluation-harness cannot score, or would score as something else, are named; the others go on."""

import json

import pytest

pytest.importorskip("lm_eval")

from evaluation.test_harness import CONTEXT, DOCUMENTS, LONG, command, write_checkpoint

from megacocomix.errors import UserError
from megacocomix.evaluation import harness
from megacocomix.evaluation.eval_data import FIELDS, read_documents
from megacocomix.evaluation.harness import evaluate_tasks

SCORABLE = DOCUMENTS["lambada_openai"]


def write(folder, task, *documents):
    folder.mkdir(exist_ok=True)
    (folder / f"{task}.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    return folder


@pytest.fixture
def run(tmp_path, root):
    write_checkpoint(tmp_path / "run", 2, "ntp", str(root / "assets/teacher/tokenizer.model"))
    return tmp_path / "run"


@pytest.mark.parametrize(
    "text",
    ["  blank-context", "\n\n blank-context", "too-long " + LONG.replace(" ", "-")],
    ids=["a context of blanks", "a context of line ends", "an answer longer than the context"],
)
def test_a_document_that_hflm_fails_at_is_left_out_by_name_and_the_others_score_as_without_it(tmp_path, run, text):
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    without = evaluate_tasks(run, ["lambada_openai"], write(tmp_path / "good", "lambada_openai", *SCORABLE))
    documents = [SCORABLE[0], {"text": text}, *SCORABLE[1:]]
    found = evaluate_tasks(run, ["lambada_openai"], write(tmp_path / "eval", "lambada_openai", *documents))
    assert found["missing"] == {}
    result, expected = found["results"]["lambada_openai"], without["results"]["lambada_openai"]
    assert result["left_out"] == [1] and "left_out" not in expected
    assert result["metrics"]["acc"] == expected["metrics"]["acc"]
    assert result["metrics"]["perplexity"]["value"] == pytest.approx(expected["metrics"]["perplexity"]["value"])
    assert result["num_samples"] == expected["num_samples"] == len(SCORABLE)
    lm = harness._language_model(harness_model(run), 1)
    context, answer = " ".join(text.split(" ")[:-1]), " " + text.split(" ")[-1]
    request = Instance("loglikelihood", {}, (context, answer), 0)
    with pytest.raises(AssertionError):
        HFLM._loglikelihood_tokens(lm, [((context, answer), *HFLM._encode_pair(lm, context, answer))])
    with pytest.raises(harness.CannotScore):
        lm.loglikelihood([request])


def harness_model(run):
    from megacocomix.hf.open import open_model

    return open_model(run)


def test_an_answer_that_joins_the_last_token_of_its_context_is_left_out(run, monkeypatch):
    """As with a tokenizer whose merges cross the blank: nothing is left that could be scored."""
    from lm_eval.api.instance import Instance

    lm = harness._language_model(harness_model(run), 1)
    encode = lm.tok_encode
    monkeypatch.setattr(lm, "tok_encode", lambda text, **options: [7] if text == "a b" else encode(text, **options))
    with pytest.raises(harness.CannotScore) as caught:
        lm.loglikelihood([Instance("loglikelihood", {}, pair, 0) for pair in (("a", " c"), ("a", " b"))])
    assert caught.value.requests == {("a", " b")}
    with pytest.raises(harness.CannotScore):
        lm.loglikelihood([Instance("loglikelihood", {}, ("", ""), 0)])


def test_a_question_with_one_such_choice_is_left_out_within_the_limit_and_printed(
    tmp_path, run, root, monkeypatch, capsys
):
    long = {"goal": "Go", "sol1": "x", "sol2": "way " * CONTEXT, "label": 0}
    documents = [DOCUMENTS["piqa"][0], long, DOCUMENTS["piqa"][0], long]
    data = write(tmp_path / "eval", "piqa", *documents)
    arguments = ["tasks", run, "--tasks", "piqa", "--tasks-data", data, "--limit", "3"]
    code, out, _ = command(monkeypatch, capsys, root, *arguments)
    assert code == 0 and "2 samples, local" in out
    assert "piqa: left out, as this model cannot score them: 1 of the documents (from 0: 1)" in out


def test_a_task_without_a_document_that_can_be_scored_is_missing(tmp_path, run):
    data = write(tmp_path / "eval", "lambada_openai", {"text": "  x"}, {"text": "  y"})
    found = evaluate_tasks(run, ["lambada_openai"], data)
    assert found["missing"] == {"lambada_openai": "none of its 2 documents can be scored by this model."}


def test_an_empty_choice_never_wins_by_its_length(tmp_path, run):
    """The harness asks it as one blank, and divides its log-probability by no bytes: minus infinity."""
    empty = {"goal": "Go", "sol1": "", "sol2": "there", "label": 1}
    data = write(tmp_path / "eval", "piqa", DOCUMENTS["piqa"][0], empty)
    found = evaluate_tasks(run, ["piqa"], data)["results"]["piqa"]
    first = evaluate_tasks(run, ["piqa"], data, limit=1)["results"]["piqa"]
    assert found["num_samples"] == 2
    assert 2 * found["metrics"]["acc_norm"]["value"] == first["metrics"]["acc_norm"]["value"] + 1


@pytest.mark.parametrize("task", FIELDS)
def test_a_null_or_missing_field_is_refused_by_line_instead_of_asked_as_none(tmp_path, task):
    good = DOCUMENTS[task][0]
    for field in FIELDS[task]:
        for wrong in (good | {field: None}, {name: value for name, value in good.items() if name != field}):
            write(tmp_path / "eval", task, good, wrong)
            with pytest.raises(UserError, match=rf"{task}\.jsonl line 2 has no {field}: the task asks for "):
                read_documents(tmp_path / "eval", task)


def test_fields_that_only_some_lines_have_are_refused(tmp_path):
    write(tmp_path, "any_task", {"a": 1}, {"a": 1, "b": 2})
    with pytest.raises(UserError, match=r"any_task\.jsonl line 2 has other fields than the first: b"):
        read_documents(tmp_path, "any_task")
    write(tmp_path, "any_task", {"a": None, "b": 1}, {"b": 2, "a": 2})
    assert len(read_documents(tmp_path, "any_task")[0]) == 2


@pytest.mark.parametrize("line", ['""', "[]", '[["page", "x"]]', "3", "null", "{", '{"page": "\udcff"}'])
def test_a_line_that_is_no_object_is_refused_by_its_number(tmp_path, line):
    content = f'{{"page": "x"}}\n\n{line}\n'.encode(errors="surrogateescape")
    (tmp_path / "wikitext.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=r"wikitext\.jsonl is not one JSON object per line \(line 3: "):
        read_documents(tmp_path, "wikitext")


def test_a_document_keeps_its_own_line_separators_and_a_byte_order_mark_is_none_of_it(tmp_path):
    text = "a\u2028b\u0085c\x0bd"
    content = "\ufeff" + json.dumps({"page": text}, ensure_ascii=False) + "\r\n" + json.dumps({"page": "b"})
    (tmp_path / "wikitext.jsonl").write_text(content, newline="")
    assert read_documents(tmp_path, "wikitext")[0] == [{"page": text}, {"page": "b"}]


ARC = {"question": "q", "choices": {"text": ["x", "y"], "label": ["A", "B"]}}
HELLASWAG = {"activity_label": "Go", "ctx_a": "He goes.", "ctx_b": "he", "endings": ["x", "y"]}
SIQA = {"context": "c", "question": "q", "answerA": "a", "answerB": "b", "answerC": "c"}


@pytest.mark.parametrize(
    ("task", "document", "right", "wrong"),
    [
        ("piqa", {"goal": "Go", "sol1": "x", "sol2": "y"}, [0, 1], [2, -1, "0", "", 1.0, True]),
        ("hellaswag", HELLASWAG, ["0", "1", 1], ["2", "-1", "", 2]),
        ("social_iqa", SIQA, ["1", "3", 2], ["0", "4", "A", "", 0]),
        ("arc_easy", ARC, ["A", "B"], ["C", "", 1]),
        ("winogrande", {"sentence": "a _ b", "option1": "x", "option2": "y"}, ["1", "2"], ["0", "", 1]),
        ("winogrande", {"sentence": "a b", "option1": "x", "option2": "y"}, [], ["1"]),
        ("hellaswag", HELLASWAG | {"endings": "abcd"}, [], ["1"]),
    ],
)
def test_an_answer_that_the_harness_would_count_as_wrong_whatever_is_predicted_is_refused(
    tmp_path, task, document, right, wrong
):
    field = {"arc_easy": "answerKey", "winogrande": "answer"}.get(task, "label")
    for answers, is_right in ((right, True), (wrong, False)):
        for answer in answers:
            (tmp_path / f"{task}.jsonl").write_text(json.dumps(document | {field: answer}) + "\n")
            if is_right:
                assert len(read_documents(tmp_path, task)[0]) == 1
            else:
                with pytest.raises(UserError, match=rf"{task}\.jsonl line 1: {field} .* is no answer"):
                    read_documents(tmp_path, task)
