import pytest
from run_folders import valid_line, write_evaluation, write_run, write_seeds, write_tasks

from megacocomix.compare.groups import read_groups
from megacocomix.compare.table import table_1

ALL = {
    "lambada_openai__perplexity": 100.0,
    "wikitext__word_perplexity": 50.0,
    "hellaswag__acc_norm": 0.25,
    "piqa__acc": 0.5,
    "social_iqa__acc": 0.375,
    "arc_easy__acc": 0.375,
    "winogrande__acc": 0.5,
}


@pytest.fixture
def pair(tmp_path):
    lines = [valid_line(40, 3.0)]
    return [write_run(tmp_path / name, lines, model__hidden_size=width) for name, width in (("a", 64), ("b", 80))]


def cells(folders):
    head, rows, warnings = table_1(read_groups(folders))
    assert all(len(row) == len(head) for row in rows)
    return [dict(zip(head, row, strict=True)) for row in rows], warnings


def test_the_columns_are_the_papers_and_the_means_are_over_what_is_there(pair):
    write_tasks(pair[0], **ALL)
    write_tasks(pair[1], lambada_openai__perplexity=90.0, piqa__acc=0.5)
    (a, b), warnings = cells(pair)
    assert warnings == []
    assert list(a.values()) == [
        *("a", "2 × 64", "20.1", "100.0 ± 0.0", "50.0 ± 0.0", "25.0 ± 1.0", "50.0 ± 1.0", "37.5 ± 1.0", "37.5 ± 1.0"),
        *("50.0 ± 1.0", "56.7", "40.0"),
    ]
    assert (b["LAMBADA ppl ↓"], b["WikiText word ppl ↓"], b["mean ppl ↓"], b["mean acc ↑"]) == (
        *("90.0 ± 0.0", "–", "55.0 (of 2)", "–"),
    )


def test_over_seeds_it_is_mean_and_standard_deviation(tmp_path):
    folders = write_seeds(tmp_path, "a", [3.0, 3.0, 3.0])
    write_tasks(folders[0], piqa__acc=0.5)
    write_tasks(folders[1], piqa__acc=0.52)
    (row,), _ = cells(folders)
    assert row["PIQA acc ↑"] == "51.0 ± 1.4 (n = 2)"


def test_without_tasks_the_table_has_no_task_columns(pair):
    (a, _), _ = cells(pair)
    assert list(a) == ["run", "layers × width", "validation ppl ↓"]


def test_the_held_out_evaluation_stands_in_where_all_have_it(pair):
    write_evaluation(pair[0], 40, 2.0)
    assert "validation ppl ↓" in cells(pair)[0][0]
    write_evaluation(pair[1], 40, 2.0)
    assert cells(pair)[0][0]["held-out ppl ↓"] == "7.4"


def test_a_task_that_was_measured_otherwise_is_not_compared(pair):
    write_tasks(pair[0], piqa__acc=0.5, arc_easy__acc=0.5)
    write_tasks(pair[1], piqa__acc=0.5, arc_easy__acc=0.5, sources={"piqa": "local 0a1b"})
    (a, b), warnings = cells(pair)
    assert (a["PIQA acc ↑"], b["PIQA acc ↑"], b["ARC-E acc ↑"]) == ("–", "–", "50.0 ± 1.0")
    assert warnings == [
        "**Not compared: piqa**, because the conditions differ: source hub (a), local 0a1b (b).",
    ]


def test_the_tasks_of_the_highest_step_count_and_an_early_step_is_said(pair, caplog):
    write_tasks(pair[0], step=10, piqa__acc=0.1)
    write_tasks(pair[0], step=30, piqa__acc=0.5)
    (pair[0] / "evals/tasks/step-00000035.json").write_text('{"step": 35')
    (a, _), warnings = cells(pair)
    assert a["PIQA acc ↑"] == "50.0 ± 1.0"
    assert warnings == ["Tasks were not evaluated at the last validated step: a at step 30 of 40."]
    assert "is skipped" in caplog.text
