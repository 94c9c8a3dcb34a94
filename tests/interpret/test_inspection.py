"""The statistics of concepts equal a plain count over the dense logits, window by window."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from inspecting import LENGTHS, documents, joined, make_student, write_text

import tiny
from megacocomix.errors import UserError
from megacocomix.interpret.concepts import (
    NUM_BINS,
    NUM_CONTEXTS,
    count_agreement,
    kept_pairs,
    promoted_tokens,
    top_contexts,
)
from megacocomix.interpret.inspection import inspect, read_inspection, write_inspection
from megacocomix.interpret.reading import LOOKED_AT, Reading, Windows, read_windows, text_windows
from megacocomix.interpret.teacher_labels import open_teacher_labels
from megacocomix.model.losses import MASKED


@pytest.fixture(scope="module", params=[1, 2], ids=["every slot", "every second"])
def case(request, with_header):
    """A student, the reading of a text with its teacher, the record."""
    student = make_student(with_header, num_kept=5, interleave_every=request.param)
    source = open_teacher_labels(student, str(with_header / "teacher"), str(with_header / "told.safetensors"))
    windows = text_windows(student, [write_text(with_header / "text.jsonl", documents())], 1000)
    reading = read_windows(student, windows, source)
    return student, source, reading, inspect(student, reading, {3: "mine"}, 30)


def plain(student, source, reading):
    """Of each position, window by window: (window, position, concepts by logit with their logits, labels or None)."""
    found = []
    for window, ids in enumerate(reading.windows.tokens):
        tokens = torch.from_numpy(ids)[None]
        with torch.no_grad():
            logits = student.model(tokens, use_cache=False, output_concept_logits=True).concept_logits[0].tolist()
        labels = source.labeler(tokens)[0].tolist()
        for position, row in enumerate(logits):
            if (position + 1) % student.model.config.interleave_every == 0:
                ranked = sorted(range(len(row)), key=lambda concept: -row[concept])
                known = labels[position] if labels[position][0] != MASKED else None
                found.append((window, position, ranked, row, known))
    return found


def close(actual, expected):
    """To the 4 digits of a record."""
    assert actual == (expected if expected is None else pytest.approx(expected, rel=6e-4)), (actual, expected)


def test_a_document_longer_than_the_context_is_read_in_windows_of_it_and_that_is_said(case):
    _, _, reading, _ = case
    assert [len(ids) for ids in reading.windows.tokens] == [16, 16, 8, 16, 5, 1, 16, 16, 5, 3]
    assert np.concatenate(reading.windows.tokens).tolist() == joined(documents())
    assert reading.windows.notes == [
        "2 of 6 documents are longer than the context of 16 tokens: read in windows of 16, each by itself"
    ]


def test_a_window_is_read_as_the_model_reads_it_alone(case):
    student, source, reading, _ = case
    slots = plain(student, source, reading)
    assert reading.has_slot.sum() == len(slots)
    for (window, position, ranked, row, labels), place in zip(slots, np.flatnonzero(reading.has_slot), strict=True):
        assert (reading.window[place], reading.position[place]) == (window, position)
        assert reading.index[place].tolist() == ranked[:5]
        close(reading.value[place].tolist(), [row[concept] for concept in ranked[:5]])
        assert reading.labels[place].tolist() == (labels or [MASKED] * reading.labels.shape[1])
    assert (reading.labels[~reading.has_slot] == MASKED).all()


def test_every_count_is_that_of_a_plain_loop(case):
    student, source, reading, record = case
    slots = plain(student, source, reading)
    labelled = [slot for slot in slots if slot[4]]
    assert record["teacher"]["num_labelled"] == len(labelled) > 0
    entries = {entry["id"]: entry for entry in record["concepts"]}
    values = [row[concept] for *_, ranked, row, _ in slots for concept in ranked[:5]]
    low, high = min(values), max(values)
    for concept in range(tiny.LATENTS):
        kept = [(row[concept], window) for window, _, ranked, row, _ in slots if concept in ranked[:5]]
        as_label = [slot for slot in labelled if concept in slot[4]]
        assert (concept in record["never_kept"]) == (not kept)
        if not kept and not as_label:
            assert concept not in entries
            continue
        entry = entries[concept]
        assert entry["kept"] == len(kept) and entry["labelled"] == len(as_label)
        close(entry["kept_share"], len(kept) / len(slots))
        assert entry["top_1"] == sum(ranked[0] == concept for _, _, ranked, _, _ in slots)
        for num in (1, 4):
            predicted = [slot for slot in labelled if concept in slot[2][:num]]
            hits = sum(concept in slot[4] for slot in predicted)
            precision = hits / len(predicted) if predicted else None
            close(entry[f"precision_{num}"], precision)
            close(entry[f"recall_{num}"], hits / len(as_label) if as_label else None)
        if not kept:
            assert entry["mean_logit"] is entry["max_logit"] is entry["histogram"] is None and not entry["contexts"]
            continue
        close(entry["mean_logit"], sum(value for value, _ in kept) / len(kept))
        close(entry["max_logit"], max(kept)[0])
        counts = [0] * NUM_BINS
        for value, _ in kept:
            counts[min(NUM_BINS - 1, int((value - low) / (high - low) * NUM_BINS))] += 1
        assert entry["histogram"]["counts"] == counts
        best = sorted(max(value for value, where in kept if where == window) for window in {w for _, w in kept})
        close([context["logit"] for context in entry["contexts"]], best[::-1][:NUM_CONTEXTS])
        column = student.model.transformer.compress_layer.weight[:, concept].tolist()
        close(entry["column_norm"], math.sqrt(sum(x * x for x in column)))
    order = [(-entry["kept"], entry["id"]) for entry in record["concepts"]]
    assert order == sorted(order)


def test_totals_are_those_of_a_plain_loop(case):
    student, source, reading, record = case
    slots, totals = plain(student, source, reading), record["totals"]
    labelled = [(ranked, labels) for _, _, ranked, _, labels in slots if labels]
    kept = {concept for _, _, ranked, _, _ in slots for concept in ranked[:5]}
    named = {label for _, labels in labelled for label in labels}
    assert (totals["kept"], totals["never_kept"]) == (len(kept), tiny.LATENTS - len(kept))
    assert (totals["labelled"], totals["never_labelled"]) == (len(named), tiny.LATENTS - len(named))
    close(totals["hit_1"], sum(ranked[0] in labels for ranked, labels in labelled) / len(labelled))
    close(totals["hit_4"], sum(bool({*ranked[:4]} & {*labels}) for ranked, labels in labelled) / len(labelled))
    close(
        totals["recall_4"],
        sum(len({*ranked[:4]} & {*labels}) / len(labels) for ranked, labels in labelled) / len(labelled),
    )
    active = [0] * tiny.LATENTS
    for ids in reading.windows.tokens:
        index, value = source.labeler.sae.encode(source.labeler.teacher.hidden(torch.from_numpy(ids)[None]))
        for latent in index[value > 0].tolist():
            active[latent] += 1
    assert totals["teacher_dead"] == active.count(0)
    assert all(entry["active"] == active[entry["id"]] for entry in record["concepts"])


def test_small_columns_are_those_of_a_norm_below_a_hundredth(tmp_path):
    student = make_student(tmp_path)
    with torch.no_grad():
        student.model.transformer.compress_layer.weight[:, :7] *= 1e-4
    reading = read_windows(student, text_windows(student, [write_text(tmp_path / "t.jsonl", documents())], 100))
    assert inspect(student, reading, {}, 1)["totals"]["small_columns"] == 7


def test_promoted_tokens_are_those_of_the_dense_formula(tmp_path):
    student = make_student(tmp_path)
    transformer = student.model.transformer
    with torch.no_grad():
        transformer.ln_f.weight.uniform_(0.5, 2, generator=torch.Generator().manual_seed(0))
        column = transformer.compress_layer.weight.T
        dense = ((column - column.mean(1, keepdim=True)) * transformer.ln_f.weight) @ student.model.lm_head.weight.T
        dense -= dense.mean(1, keepdim=True)
    found = promoted_tokens(student, [5, 60, 0])
    for row, concept in enumerate((5, 60, 0)):
        order = dense[concept].argsort(descending=True).tolist()
        assert found.top_index[row].tolist() == order[:10]
        assert found.bottom_index[row].tolist() == order[::-1][:10]
        torch.testing.assert_close(torch.from_numpy(found.top_score[row]), dense[concept][order[:10]])


def test_a_padded_vocabulary_promotes_no_token_that_is_none(tmp_path):
    student = make_student(tmp_path)
    student.__dict__["tokenizer"] = replace(student.tokenizer, vocab_size=12)
    found = promoted_tokens(student, range(tiny.LATENTS))
    assert found.top_index.max() < 12 and found.bottom_index.max() < 12


def fake_readings(index, labels):
    """A reading of one window of so many positions."""
    num = len(index)
    windows = Windows(["t"], [np.arange(num)], [0], [])
    value = np.tile(np.arange(4, 0, -1, dtype=np.float32), (num, 1))
    index, labels, places = np.array(index), np.array(labels), np.arange(num)
    always = np.ones(num, bool)
    return Reading(windows, places, 0 * places, places, always, 2, index, value, {}, labels, None, None, None)


def test_precision_and_recall_by_hand():
    index = [[1, 2, 3, 4], [2, 1, 5, 6], [1, 6, 7, 8], [1, 2, 3, 4]]
    labels = [[1, 9], [3, 1], [8, 9], [MASKED, MASKED]]
    found = count_agreement(fake_readings(index, labels), 10)
    assert found.num_labelled == 3
    # 1 is the largest at two labelled positions and a label at one of them; it labels two.
    assert (found.precision(1)[1], found.recall(1)[1]) == (0.5, 0.5)
    # It is among the 4 largest at all three, and a label at two of them.
    assert (found.precision(4)[1], found.recall(4)[1]) == (pytest.approx(2 / 3), 1.0)
    assert (found.precision(4)[8], found.recall(4)[8]) == (1.0, 1.0)
    assert math.isnan(found.precision(1)[8]) and found.recall(1)[8] == 0
    assert math.isnan(found.precision(4)[9]) and found.recall(4)[9] == 0
    assert math.isnan(found.recall(4)[2])
    assert found.hit_share == {1: pytest.approx(1 / 3), LOOKED_AT: 1.0}
    assert found.recall_share == pytest.approx(0.5)


def test_a_label_that_is_given_twice_counts_once():
    found = count_agreement(fake_readings([[1, 2, 3, 4]], [[1, 0, 0]]), 10)
    assert found.labelled.tolist() == [1, 1, *[0] * 8] and found.recall_share == 0.5


def test_a_context_is_a_window_s_largest_logit_and_the_text_around_it(case):
    _, _, reading, record = case
    contexts = top_contexts(reading, kept_pairs(reading))
    for entry in record["concepts"]:
        windows = [context["window"] for context in entry["contexts"]]
        assert len(set(windows)) == len(windows) == len(contexts.get(entry["id"], ()))
        for context in entry["contexts"]:
            ids = reading.windows.tokens[context["window"]].tolist()
            position = context["position"]
            assert context["token"] == f" {ids[position]}"
            around = "".join(f" {i}" for i in ids[max(0, position - 16) : position + 9])
            assert context["before"] + context["token"] + context["after"] == around


def test_the_shown_windows_are_the_beginning_of_the_text(case):
    _, _, reading, record = case
    assert [len(window["tokens"]) for window in record["windows"]] == [16, 14]
    tokens = [token for window in record["windows"] for token in window["tokens"]]
    assert "".join(tokens) == "".join(f" {i}" for i in joined(documents())[:30])
    rows = [row for window in record["windows"] for row in window["kept"]]
    for place, row in enumerate(rows):
        expected = reading.index[place, :5].tolist() if reading.has_slot[place] else []
        assert [concept for concept, _ in row] == expected
        values = [value for _, value in row]
        assert values == sorted(values, reverse=True)
    labels = [row for window in record["windows"] for row in window["labels"]]
    assert labels == [row.tolist() if row[0] != MASKED else None for row in reading.labels[:30]]
    active = [row for window in record["windows"] for row in window["active"]]
    assert all(0 < len(row) <= 8 and all(value > 0 for _, value in row) for row in active)


def test_a_record_is_read_as_it_was_written_and_nothing_else_is_one(case, tmp_path):
    record = case[3]
    write_inspection(tmp_path / "r.json", record)
    assert read_inspection(tmp_path / "r.json") == record
    assert (record["step"], record["sha256"]) == (6, "abc")
    names = {entry["id"]: (entry["name"], entry["named_by"]) for entry in record["concepts"]}
    assert names[3] == ("mine", "file") and {by for _, by in names.values()} == {"file", "auto"}
    (tmp_path / "r.json").write_text(json.dumps(record | {"version": 2}))
    with pytest.raises(UserError, match="version 2"):
        read_inspection(tmp_path / "r.json")
    (tmp_path / "r.json").write_text("[]")
    with pytest.raises(UserError, match=r"missing or damaged .* tools/inspect_concepts.py --out"):
        read_inspection(tmp_path / "r.json")


def test_a_student_alone_has_everything_but_labels(tmp_path):
    student = make_student(tmp_path, mix="nothing", num_kept=2)
    windows = text_windows(student, [write_text(tmp_path / "t.jsonl", documents())], 1000)
    record = inspect(student, read_windows(student, windows), {}, 50)
    assert record["teacher"] is None and record["windows"][0]["labels"] is None
    assert {record["totals"][key] for key in ("labelled", "hit_1", "small_columns", "teacher_dead")} == {None}
    assert sum(entry["kept"] for entry in record["concepts"]) == 2 * sum(LENGTHS)
    entry = record["concepts"][0]
    assert entry["promotes"] == [] and entry["precision_1"] is None and entry["column_norm"] is None
    assert entry["name"].startswith("on ‘")


def test_no_more_tokens_are_read_than_asked_for_and_that_is_said(tmp_path):
    student = make_student(tmp_path)
    files = [write_text(tmp_path / f"{name}.jsonl", documents()[:2]) for name in "abc"]
    windows = text_windows(student, files, 60)
    assert sum(map(len, windows.tokens)) == 60 and windows.texts == files[:2] and windows.text[-1] == 1
    limit = "only the first 60 tokens are read: --tokens N reads more"
    assert windows.notes[1:] == [limit, f"not reached: {files[2]}"]
    exactly = text_windows(student, files, 3 * 56)
    assert exactly.texts == files and len(exactly.notes) == 1
    assert text_windows(student, files, 56).notes[1:] == [
        "only the first 56 tokens are read: --tokens N reads more",
        f"not reached: {files[1]} {files[2]}",
    ]


def test_documents_without_text_are_noted(tmp_path):
    (tmp_path / "t.jsonl").write_text('{"text": "1 2"}\n{"text": " "}\n{"text": null}\n')
    notes = text_windows(make_student(tmp_path), [str(tmp_path / "t.jsonl")], 100).notes
    assert notes == ["left out: 2 documents without text (only white space, null, or no such field)"]


@pytest.mark.parametrize("content", ["", "\n\n", '{"text": "  "}\n', '{"text": null}\n'])
def test_a_text_without_text_is_a_mistake(tmp_path, content):
    (tmp_path / "t.jsonl").write_text(content)
    with pytest.raises(UserError, match="holds no text"):
        text_windows(make_student(tmp_path), [str(tmp_path / "t.jsonl")], 100)


def test_a_diverged_student_is_a_mistake(tmp_path):
    student = make_student(tmp_path)
    with torch.no_grad():
        student.model.transformer.concept_predictor.bias[3] = math.nan
    windows = text_windows(student, [write_text(tmp_path / "t.jsonl", documents())], 1000)
    with pytest.raises(UserError, match="not finite"):
        read_windows(student, windows)
