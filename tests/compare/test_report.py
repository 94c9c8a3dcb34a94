import json
import math
from pathlib import Path

import pytest
import torch
from run_folders import train_line, valid_line, write_checkpoint, write_evaluation, write_seeds
from run_folders import write_run as write_lines

from megacocomix.compare.curves import EqualX, Noise, ToMatch, equal_x
from megacocomix.compare.groups import Group, Spread, read_groups
from megacocomix.compare.plots import PLOTS, _spread_out, plot_axes
from megacocomix.compare.report import compose, match_table, results_table, write_report
from megacocomix.compare.summary import (
    comparison_warnings,
    match_cell,
    summarize_equal,
    summarize_noise,
    summarize_pair,
)
from megacocomix.errors import UserError
from processes import run_tool

SILENT = Noise(scatter=None, seeds=None)


def write_run(folder, losses, cost=2.0, teacher=0.0, **changes):
    """A run of len(losses) validations, 1000 tokens apart, and a training line before each."""
    lines = []
    for index, loss in enumerate(losses, start=1):
        valid = {**valid_line(10 * index, 1.0, 1e12 * cost, 1e12 * teacher), "seconds": 10 * cost * index}
        valid["valid_loss"] = loss
        lines += [{**train_line(10 * index, loss + 0.1), **{k: valid[k] for k in ("flops", "seconds")}}, valid]
    name = "cocomix" if teacher else "ntp"
    return write_lines(folder, lines, method__name=name, training__steps=10 * len(losses), **changes)


def evaluate(folder, loss, step=40, windows=1024):
    """The full evaluation of a run."""
    write_evaluation(folder, step, loss, num_sequences=windows)


def summarize(run, other, noise):
    return summarize_pair(run, other, [axis for axis in PLOTS if axis in plot_axes([run, other])], noise)


def start(folder, *machines):
    """code.json of a run started once on each of `machines`: (world, device)."""
    starts = [
        {"command": ["launcher/pretrain.py", "--config", f"my {index}.yaml"], "world": world, "device": device}
        for index, (world, device) in enumerate(machines)
    ]
    (folder / "code.json").write_text(json.dumps({"version": "0.1.0", "commit": None, "starts": starts}))


@pytest.fixture
def folders(tmp_path):
    """Concepts are lower at equal tokens (by 0.2); the control is lower at equal FLOPs."""
    control = write_run(tmp_path / "control", [6.0, 5.0, 4.5, 4.2])
    return [control, write_run(tmp_path / "concepts", [5.9, 4.9, 4.4, 4.0], cost=4.0, teacher=2.0)]


def bare(name):
    return Group(name, ())


def equal(first, second, progress=(1.0, 1.0)):
    return EqualX("tokens", 4000.0, (first, second), progress)


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ((4.0, 4.031), "**a** is lower than **b** by 0.031 nats (4.000 against 4.031; perplexity 3.1 % lower)."),
        ((4.031, 4.0), "**b** is lower than **a** by 0.031 nats (4.000 against 4.031; perplexity 3.1 % lower)."),
        ((4.0, 4.0002), "**a** and **b** are equal to three decimals (4.000 nats)."),
        ((float("nan"), 4.0), "the loss of a is not a finite number, so there is nothing to compare."),
    ],
)
def test_the_summary_names_the_lower_run_whichever_it_is(losses, expected):
    text = summarize_equal(bare("a"), bare("b"), "tokens", equal(*losses), None)
    assert text == f"At equal tokens (4k), in the validation during training, {expected}"


def test_a_difference_within_the_noise_is_said_not_to_be_real():
    a, b = bare("a"), bare("b")
    within, beyond = (summarize_equal(a, b, "tokens", equal(4.0, loss), 0.05) for loss in (4.04, 4.06))
    assert within.endswith("This is less than the noise of 0.050 nats, so it may be chance.")
    assert "chance" not in beyond


def test_an_unfinished_schedule_is_said_beside_the_numbers():
    text = summarize_equal(bare("a"), bare("b"), "tokens", equal(4.0, 4.5, (0.5, 1.0)), None)
    assert text.endswith("At that point a had completed 50 % of its schedule, and b 100 %.")


def test_the_summary_agrees_with_the_curves(folders):
    control, concepts = read_groups(folders)
    tokens, total, student, seconds, cost = summarize(concepts, control, SILENT)
    assert tokens.startswith(
        "At equal tokens (4k), in the validation during training, **concepts** is lower than **control** by 0.200 nats"
    )
    difference = equal_x(concepts, control, "total_flops").difference
    assert difference > 0
    assert f"**control** is lower than **concepts** by {difference:.3f} nats" in total
    for text in (student, seconds):
        assert "**control** is lower than **concepts** by 0.700 nats (4.200 against 4.900" in text
    assert cost == (
        "A token of **concepts** takes 2.00 × the student FLOPs of **control** (3.00 × with the teacher's)."
    )


def test_what_it_takes_to_match_is_said_as_a_part_of_what_the_other_spent(folders):
    head, rows = match_table(read_groups(folders))
    assert head[2:] == ["tokens", "FLOPs with the teacher", "student FLOPs", "seconds"]
    assert rows == [
        ["concepts", "control (4.200)", "87.5 % (−12.5 %)", "262.5 % (+162.5 %)", *["175.0 % (+75.0 %)"] * 2],
        ["control", "concepts (4.000)", *["not reached"] * 4],
    ]


@pytest.mark.parametrize(
    ("x", "seeds", "tried", "expected"),
    [
        (785.0, Spread(0.78, 0.012, 3), 3, "78.5 ± 1.2 % (−21.5 %)"),
        (785.0, Spread(0.78, 0.012, 2), 3, "78.5 ± 1.2 % (−21.5 %), 2 of 3 seeds"),
        (785.0, None, 1, "78.5 % (−21.5 %)"),
        (999.9, None, 2, "100.0 % (+0.0 %), 0 of 2 seeds"),
        (None, Spread(0.9, None, 1), 2, "not reached by the mean, but by 1 of 2 seeds"),
        (None, None, 2, "not reached"),
    ],
)
def test_seeds_that_do_not_match_are_said(x, seeds, tried, expected):
    assert match_cell(ToMatch("tokens", 4.0, x, 1000.0, seeds, tried)) == expected


def test_what_is_not_known_about_noise_is_said(folders):
    runs = read_groups(folders)
    assert "cannot show how large a difference chance makes" in summarize_noise(runs, SILENT)
    one_seed = summarize_noise(runs, Noise(scatter=0.01, seeds=None))
    assert one_seed.startswith("One seed each: differences below 0.010 nats may be chance")
    assert "another seed was not measured" in one_seed
    seeds = summarize_noise(runs, Noise(scatter=0.01, seeds=0.1, freedom=4))
    assert "over seeds is 0.100 nats (4 degrees of freedom)" in seeds
    assert f"must reach {2.78 * 0.1 * math.sqrt(2):.3f} nats for 1 against 1 seeds" in seeds


def test_what_blurs_a_comparison_is_said_loudly(tmp_path):
    odd = {"model__vocab_size": 600, "evaluation__batches": 20, "parallel__tensor": 2, "teacher__labels": "labels/"}
    run = write_run(tmp_path / "odd", [5.0, 4.0], teacher=1.0, **odd)
    plain = write_run(tmp_path / "plain", [5.0, 4.0])
    (run / "config.yaml").write_text((run / "config.yaml").read_text().replace("steps: 20", "steps: 99"))
    warnings = "\n".join(comparison_warnings(read_groups([plain, run])))
    assert "**Different model.vocab_size** (512 (plain), 600 (odd))" in warnings
    assert "**Validated on different numbers of sequences** (40 (plain), 80 (odd))" in warnings
    assert "the last validation of odd was at step 20 of 99" in warnings
    assert "Labels from a cache that no longer exists (odd): the FLOPs of labelling are not counted" in warnings
    assert "Seconds are not directly comparable: the runs differ in parallel.tensor" in warnings


def test_other_content_of_the_training_data_is_said_though_the_path_is_the_same(folders):
    for folder, content in zip(folders, ("a", "b"), strict=True):
        write_checkpoint(folder, inputs={"data.valid": "v", "data.train": content})
    (warning,) = comparison_warnings(read_groups(folders))
    assert warning.startswith("**Different data.train** (a (control), b (concepts))")


def test_a_clean_comparison_has_no_warnings(folders):
    assert comparison_warnings(read_groups(folders)) == []


def test_the_page_embeds_plots_that_exist_and_names_its_command(folders, tmp_path):
    report = write_report(read_groups(folders), tmp_path / "out", "python tools/compare_runs.py a b --out out")
    text = report.read_text()
    for name in PLOTS.values():
        assert f"](plots/{name}.png)" in text
        assert (report.parent / "plots" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert "concepts</text>" in (report.parent / "plots" / f"{name}.svg").read_text()
    assert "python tools/compare_runs.py a b --out out" in text
    assert "| control | 4.2000 / 66.69 | 4k | 8e15 | 0 | 80 s | 50 |" in text


def test_runs_without_a_teacher_are_compared_at_equal_flops_once(tmp_path):
    runs = read_groups([write_run(tmp_path / name, [5.0, 4.0]) for name in ("one", "two")])
    sentences = summarize(*runs, SILENT)
    assert [text.split(" (")[0] for text in sentences[:3]] == [
        "At equal tokens",
        "At equal student FLOPs",
        "At equal seconds",
    ]


def test_the_full_evaluation_is_in_the_table_and_is_quoted_where_both_have_it_at_their_end(folders):
    evaluate(folders[1], 4.1)
    control, concepts = read_groups(folders)
    head, rows = results_table([control, concepts])
    assert head[2] == "held-out loss / ppl (all 1,024 windows)"
    assert [row[2] for row in rows] == ["–", "4.1000 / 60.34"]
    assert "in the validation during training, **concepts** is" in summarize(concepts, control, SILENT)[0]

    evaluate(folders[0], 4.15)
    assert summarize(*reversed(read_groups(folders)), SILENT)[0] == (
        "At equal tokens (4k), over all 1,024 held-out windows, **concepts** is lower than **control** "
        "by 0.050 nats (4.100 against 4.150; perplexity 4.9 % lower)."
    )


def test_an_early_evaluation_and_other_windows_are_said_in_the_table(folders):
    evaluate(folders[0], 4.5, step=30)
    evaluate(folders[1], 4.1, windows=512)
    runs = read_groups(folders)
    head, rows = results_table(runs)
    assert head[2] == "held-out loss / ppl (all 512 or 1,024 windows)"
    assert [row[2] for row in rows] == ["4.5000 / 90.02 at step 30, 1,024 windows", "4.1000 / 60.34, 512 windows"]
    assert "in the validation during training" in summarize(*runs, SILENT)[0]


def test_the_last_command_is_quoted_where_it_is_known(folders):
    start(folders[0], (1, "cpu"), (2, "cpu"))
    text = compose(read_groups(folders), "command")
    expected = "# control: the last start of each process (2 × cpu)\nlauncher/pretrain.py --config 'my 1.yaml'\n"
    assert expected in text
    assert f"deepspeed launcher/pretrain.py --config {folders[1] / 'config.yaml'} run=FOLDER" in text


def test_other_hardware_makes_seconds_incomparable(folders):
    start(folders[0], (2, "cpu"), (2, "cpu"))
    start(folders[1], (2, "cpu"))
    assert comparison_warnings(read_groups(folders)) == []
    start(folders[1], (2, "cpu"), (1, "NVIDIA H200"))
    (warning,) = comparison_warnings(read_groups(folders))
    assert warning.startswith("**Seconds are not comparable**")
    assert warning.endswith("(2 × cpu (control), 2 × cpu, then 1 × NVIDIA H200 (concepts)).")


def test_a_report_is_replaced_only_by_force(folders, tmp_path):
    runs, out = read_groups(folders), tmp_path / "out"
    out.mkdir()
    (out / "comparison.md").write_text("mine")
    with pytest.raises(UserError, match="--force"):
        write_report(runs, out, "command")
    assert (out / "comparison.md").read_text() == "mine"
    write_report(runs, out, "command", force=True)
    assert (out / "comparison.md").read_text() == compose(runs, "command")


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e4, 1e308])
def test_runs_that_cannot_be_drawn_in_full_still_make_a_page(tmp_path, bad):
    # One validation, at step 0's cost; a loss that is not a number; no seconds at all.
    single = write_run(tmp_path / "single", [5.0])
    lost = write_run(tmp_path / "lost", [5.0, bad], cost=0.0)
    evaluate(lost, bad)
    text = write_report(read_groups([single, lost]), tmp_path / "out", "command").read_text()
    assert "At equal seconds: the validation points of lost and single do not overlap." in text


def test_a_lost_run_among_many_still_makes_a_page(tmp_path):
    folders = [write_run(tmp_path / f"run{n}", [5.0, 4.0], model__hidden_size=8 * n) for n in range(1, 5)]
    lost = write_run(tmp_path / "lost", [5.0, math.nan])
    text = write_report(read_groups([*folders, lost]), tmp_path / "out", "command").read_text()
    assert "| lost | not finite | not finite | not finite |" in text


def test_a_seed_that_is_lost_loses_the_spread_and_not_the_page(tmp_path):
    folders = write_seeds(tmp_path, "a", [4.0, 4.2]) + write_seeds(tmp_path, "b", [3.0, 3.2], model__context=8)
    metrics = folders[1] / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace('"valid_loss": 4.2', '"valid_loss": Infinity'))
    text = write_report(read_groups(folders), tmp_path / "out", "command").read_text()
    assert "inf / inf" in text
    assert "| b | a (inf) | not reached by the mean, but by 1 of 2 seeds |" in text


def test_many_groups_stand_in_rows_beside_the_first(tmp_path):
    folders = []
    for index, name in enumerate(("a", "b", "c", "d")):
        folders += write_seeds(tmp_path, name, [4.0 + index, 4.01 + index], model__hidden_size=8 * index + 8)
    text = compose(read_groups(folders), "command")
    assert text.startswith("# 4 methods, compared with a\n")
    assert "| b | **+1.000 (+171.8 %)** | **+1.000 (+171.8 %)** | **+1.000 (+171.8 %)** |" in text
    assert "| a | 2 | 4.0050 ± 0.0071 / 54.87 | 4k | 8e03 | 0 | 800 s | 5 |" in text
    assert "| run | `model.hidden_size` |" in text


def test_seeds_of_one_experiment_alone_make_a_page(tmp_path):
    text = compose(read_groups(write_seeds(tmp_path, "a", [4.0, 4.2])), "command")
    assert "4.1000 ± 0.1414" in text
    assert "to match" not in text


def test_two_runs_of_a_page_that_are_identical_are_said_to_be(tmp_path):
    folders = [write_run(tmp_path / name, [5.0, 4.0]) for name in ("one", "two")]
    assert "identical" not in compose(read_groups(folders), "command")  # nothing shows that their weights are
    for folder in folders:
        write_checkpoint(folder, wte=torch.zeros(3))
    expected = "- **one** and **two** are identical to the bit: 2 training and 2 validation lines, and the weights"
    assert expected in compose(read_groups(folders), "command")
    folders[1] = write_run(tmp_path / "three", [5.1, 4.0])
    assert "identical" not in compose(read_groups(folders), "command")


def test_names_that_would_touch_are_pushed_apart_in_their_order():
    assert _spread_out([0.0, 0.5, 0.51, 0.52], [0.1] * 4) == pytest.approx([0.0, 0.5, 0.6, 0.7])
    assert _spread_out([0.98, 0.99, 1.0], [0.1] * 3) == pytest.approx([0.8, 0.9, 1.0])


def command_line(*arguments):
    script = Path(__file__).parents[2] / "tools" / "compare_runs.py"
    return run_tool([script, *arguments], script.parent)


def test_the_command_line_prints_where_to_look_and_refuses_in_one_line(folders, tmp_path):
    done = command_line(*folders, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert str(tmp_path / "out" / "comparison.md") in done.stdout
    assert ["run", "control", "concepts"] in [line.split() for line in done.stdout.splitlines()]
    refused = command_line(folders[0], tmp_path / "nothing", "--out", tmp_path / "other")
    assert refused.returncode == 2
    assert refused.stderr.splitlines() == [
        f"error: {tmp_path / 'nothing'} is not a run folder: it has no config.yaml and no metrics.jsonl."
    ]


def test_the_command_line_answers_whether_two_runs_are_identical(folders):
    write_checkpoint(folders[0], wte=torch.zeros(3))
    same, other = command_line(folders[0], folders[0], "--identical"), command_line(*folders, "--identical")
    assert (same.returncode, other.returncode) == (0, 1)
    assert other.stdout == "first difference at step 10: loss 6.1 against 6.0.\n"
    assert command_line(*folders).stderr.startswith("error: give --out DIR")
