import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megacocomix.errors import UserError
from megacocomix.evaluation.curves import EqualX, Noise, Run, equal_x, read_runs
from megacocomix.evaluation.plots import PLOTS
from megacocomix.evaluation.report import (
    cautions,
    compose,
    equal_words,
    noise_words,
    results_table,
    words,
    write_report,
)

SILENT = Noise(scatter=None, seeds=None)


def write_run(folder, losses, cost=2.0, teacher=0.0, changes=None):
    """A run of len(losses) validations, 1000 tokens apart, and a training line before each."""
    folder.mkdir(parents=True)
    config = {
        "model": {"num_layers": 2, "hidden_size": 64, "context": 16, "vocab_size": 512},
        "method": {"name": "cocomix" if teacher else "ntp"},
        "data": {"train": "train", "valid": "valid"},
        "training": {"steps": 10 * len(losses), "global_batch": 4, "seed": 22},
        "evaluation": {"batches": 10},
    }
    for name, value in (changes or {}).items():
        section, key = name.split(".")
        config.setdefault(section, {})[key] = value
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    with open(folder / "metrics.jsonl", "w") as file:
        for index, loss in enumerate(losses, start=1):
            tokens = 1000 * index
            spent = {"step": 10 * index, "tokens": tokens, "seconds": cost * tokens / 100}
            spent |= {"flops": cost * 1e12 * tokens, "teacher_flops": teacher * 1e12 * tokens}
            print(json.dumps({**spent, "loss": loss + 0.1, "concept_loss": None, "mfu": None}), file=file)
            print(json.dumps({**spent, "valid_loss": loss}), file=file)
    return folder


def evaluate(folder, loss, step=40, windows=1024):
    """The full evaluation of a run, as tools/evaluate.py writes it."""
    values = {"data": "valid", "data_fingerprint": "f", "context": 16, "num_sequences": windows}
    (folder / "evals").mkdir(exist_ok=True)
    (folder / "evals" / f"step-{step:08}-f.json").write_text(json.dumps({**values, "step": step, "valid_loss": loss}))


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


def bare_run(name):
    return Run(name, Path(name), {}, (), ())


def equal(first, second, progress=(1.0, 1.0)):
    return EqualX("tokens", 4000.0, (first, second), progress)


@pytest.mark.parametrize(
    ("losses", "said"),
    [
        ((4.0, 4.031), "**a** is lower than **b** by 0.031 nats (4.000 against 4.031; perplexity 3.1 % lower)."),
        ((4.031, 4.0), "**b** is lower than **a** by 0.031 nats (4.000 against 4.031; perplexity 3.1 % lower)."),
        ((4.0, 4.0002), "**a** and **b** are level to three decimals (4.000 nats)."),
        ((float("nan"), 4.0), "the loss of a is not a finite number: nothing to compare."),
    ],
)
def test_the_words_name_the_lower_run_whichever_it_is(losses, said):
    text = equal_words(bare_run("a"), bare_run("b"), "tokens", equal(*losses), SILENT)
    assert text == f"At equal tokens (4k), in the validation during training, {said}"


def test_a_difference_within_the_noise_is_said_not_to_be_real():
    a, b, known = bare_run("a"), bare_run("b"), Noise(scatter=0.05, seeds=None)
    assert "less than 0.050: do not read it as real" in equal_words(a, b, "tokens", equal(4.0, 4.04), known)
    assert "real" not in equal_words(a, b, "tokens", equal(4.0, 4.06), known)


def test_an_unfinished_schedule_is_said_beside_the_numbers():
    text = equal_words(bare_run("a"), bare_run("b"), "tokens", equal(4.0, 4.5, (0.5, 1.0)), SILENT)
    assert text.endswith("There a was at 50 % of its schedule and b at 100 %.")


def test_the_words_agree_with_the_curves(folders):
    control, concepts = read_runs(folders)
    tokens, total, student, seconds, reaches, cost = words(concepts, control, SILENT)
    assert tokens.startswith(
        "At equal tokens (4k), in the validation during training, **concepts** is lower than **control** by 0.200 nats"
    )
    difference = equal_x(concepts, control, "total_flops").difference
    assert difference > 0
    assert f"**control** is lower than **concepts** by {difference:.3f} nats" in total
    for text in (student, seconds):
        assert "**control** is lower than **concepts** by 0.700 nats (4.200 against 4.900" in text
    assert reaches == (
        "**concepts** reaches the final loss of **control** (4.200) with "
        "0.88 × its tokens, 2.62 × its FLOPs with the teacher, 1.75 × its student FLOPs, 1.75 × its seconds."
    )
    assert cost == (
        "A token costs **concepts** 2.00 × the student FLOPs of **control** (3.00 × with the teacher counted)."
    )


def test_what_is_not_known_about_noise_is_said(folders):
    runs = read_runs(folders)
    assert "cannot tell how large a difference chance alone makes" in noise_words(runs, SILENT)
    one_seed = noise_words(runs, Noise(scatter=0.01, seeds=None))
    assert one_seed.startswith("One seed per run: differences below 0.010 nats should not be read as real")
    assert "another seed moves a run is not measured" in one_seed
    assert "up to 0.300 nats apart" in noise_words(runs, Noise(scatter=0.01, seeds=0.3))


def test_what_blurs_a_comparison_is_said_loudly(tmp_path):
    odd = {"model.vocab_size": 600, "evaluation.batches": 20, "training.steps": 99, "parallel.tensor": 2}
    odd |= {"teacher.labels": "labels/"}
    run = write_run(tmp_path / "odd", [5.0, 4.0], teacher=1.0, changes=odd)
    said = "\n".join(cautions(read_runs([write_run(tmp_path / "plain", [5.0, 4.0]), run])))
    assert "**Different model.vocab_size** (plain: 512, odd: 600)" in said
    assert "**Validated on different numbers of sequences** (plain: 40, odd: 80)" in said
    assert "odd was validated last at step 20 of 99: not a finished run" in said
    assert "odd read its labels from a cache" in said
    assert "Seconds are not like for like: parallel.tensor differ" in said


def test_a_clean_comparison_has_no_cautions(folders):
    assert cautions(read_runs(folders)) == []


def test_the_page_embeds_plots_that_exist_and_names_its_command(folders, tmp_path):
    report = write_report(read_runs(folders), tmp_path / "out", "python tools/compare_runs.py a b --out out")
    text = report.read_text()
    for name in PLOTS.values():
        assert f"](plots/{name})" in text
        assert (report.parent / "plots" / name).read_bytes().startswith(b"\x89PNG")
    assert "python tools/compare_runs.py a b --out out" in text
    assert "| control | 4.2000 / 66.69 | 4k | 8e15 | 0 | 80 s | 50 |" in text


def test_runs_without_a_teacher_are_compared_at_equal_flops_once(tmp_path):
    runs = read_runs([write_run(tmp_path / name, [5.0, 4.0]) for name in ("one", "two")])
    said = words(*runs, SILENT)
    assert [text.split(" (")[0] for text in said[:3]] == [
        "At equal tokens",
        "At equal student FLOPs",
        "At equal seconds",
    ]


def test_the_full_evaluation_is_in_the_table_and_is_quoted_where_both_have_it_at_their_end(folders):
    evaluate(folders[1], 4.1)
    control, concepts = read_runs(folders)
    head, rows = results_table([control, concepts])
    assert head[2] == "held-out loss / ppl (all 1,024 windows)"
    assert [row[2] for row in rows] == ["–", "4.1000 / 60.34"]
    assert "in the validation during training, **concepts** is" in words(concepts, control, SILENT)[0]

    evaluate(folders[0], 4.15)
    assert words(*reversed(read_runs(folders)), SILENT)[0] == (
        "At equal tokens (4k), over all 1,024 held-out windows, **concepts** is lower than **control** "
        "by 0.050 nats (4.100 against 4.150; perplexity 4.9 % lower)."
    )


def test_an_early_evaluation_and_other_windows_are_said_in_the_table(folders):
    evaluate(folders[0], 4.5, step=30)
    evaluate(folders[1], 4.1, windows=512)
    runs = read_runs(folders)
    head, rows = results_table(runs)
    assert head[2] == "held-out loss / ppl (all 512 or 1,024 windows)"
    assert [row[2] for row in rows] == ["4.5000 / 90.02 at step 30, 1,024 windows", "4.1000 / 60.34, 512 windows"]
    assert "in the validation during training" in words(*runs, SILENT)[0]


def test_the_last_command_is_quoted_where_it_is_known(folders):
    start(folders[0], (1, "cpu"), (2, "cpu"))
    text = compose(read_runs(folders), "command")
    said = "# control, as each of its processes (2 × cpu) was started last\nlauncher/pretrain.py --config 'my 1.yaml'\n"
    assert said in text
    assert f"deepspeed launcher/pretrain.py --config {folders[1] / 'config.yaml'} run=FOLDER" in text


def test_other_hardware_makes_seconds_incomparable(folders):
    start(folders[0], (2, "cpu"), (2, "cpu"))
    start(folders[1], (2, "cpu"))
    assert cautions(read_runs(folders)) == []
    start(folders[1], (2, "cpu"), (1, "NVIDIA H200"))
    (said,) = cautions(read_runs(folders))
    assert said.startswith("**Seconds are not comparable**")
    assert said.endswith("(control: 2 × cpu, concepts: 2 × cpu, then 1 × NVIDIA H200).")


def test_a_report_is_replaced_only_by_force(folders, tmp_path):
    runs, out = read_runs(folders), tmp_path / "out"
    out.mkdir()
    (out / "report.md").write_text("mine")
    with pytest.raises(UserError, match="--force"):
        write_report(runs, out, "command")
    assert (out / "report.md").read_text() == "mine"
    write_report(runs, out, "command", force=True)
    assert (out / "report.md").read_text() == compose(runs, "command")


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e4, 1e308])
def test_runs_that_cannot_be_drawn_in_full_still_make_a_page(tmp_path, bad):
    # One validation, at step 0's cost; a loss that is not a number; no seconds at all.
    single = write_run(tmp_path / "single", [5.0])
    lost = write_run(tmp_path / "lost", [5.0, bad], cost=0.0)
    evaluate(lost, bad)
    text = write_report(read_runs([single, lost]), tmp_path / "out", "command").read_text()
    assert "At equal seconds: the validation points of lost and single share no stretch." in text


def test_the_command_line_prints_where_to_look_and_refuses_in_one_line(folders, tmp_path):
    script = Path(__file__).parents[2] / "tools" / "compare_runs.py"

    def run(*arguments):
        command = [sys.executable, str(script), *map(str, arguments), "--out", str(tmp_path / "out")]
        return subprocess.run(command, capture_output=True, text=True)

    done = run(*folders)
    assert done.returncode == 0, done.stderr
    assert str(tmp_path / "out" / "report.md") in done.stdout
    assert ["run", "control", "concepts"] in [line.split() for line in done.stdout.splitlines()]
    refused = run(folders[0], tmp_path / "nothing")
    assert refused.returncode == 2
    assert refused.stderr.splitlines() == [
        f"error: {tmp_path / 'nothing'} is not a run folder: it has no config.yaml and no metrics.jsonl."
    ]
