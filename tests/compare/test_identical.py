import json
import shutil

import pytest
import torch
from run_folders import train_line, valid_line, write_checkpoint, write_run

from megacocomix.compare.identical import compare
from megacocomix.errors import UserError

LINES = [train_line(10, 5.0), train_line(20, 4.5, lr=0.1), valid_line(20, 4.6), train_line(30, 4.0)]


@pytest.fixture
def pair(tmp_path):
    """A run and its copy, which took longer."""
    run = write_run(tmp_path / "a", LINES)
    write_checkpoint(run, 20, wte=torch.zeros(3))
    write_checkpoint(run, 30, wte=torch.arange(6.0).view(2, 3), head__bias=torch.tensor([0.0, float("nan")]))
    write_run(tmp_path / "b", [{**line, "seconds": 7.0 * line["step"], "mfu": 0.5} for line in LINES])
    shutil.copytree(run / "checkpoints", tmp_path / "b" / "checkpoints")
    return run, tmp_path / "b"


def rewrite(run, lines):
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_copy_is_identical_however_long_it_took(pair):
    answer = compare(*pair)
    assert answer.identical
    assert answer.text == (
        "identical to the bit: 3 training and 1 validation lines, and the weights of both at step 30"
    )


@pytest.mark.parametrize(
    ("index", "change", "expected"),
    [
        (1, {"loss": 4.500000000000001}, "first difference at step 20: loss 4.5 against 4.500000000000001"),
        (1, {"lr": 0.2}, "first difference at step 20: lr 0.1 against 0.2"),
        (1, {"lr": None}, "first difference at step 20: lr 0.1 against no value"),
        (2, {"valid_loss": 4.0}, "first difference at step 20: valid_loss 4.6 against 4.0"),
        (3, {"hidden_loss": 1.0}, "first difference at step 30: hidden_loss no value against 1.0"),
    ],
)
def test_the_first_step_and_quantity_that_differ_are_named(pair, index, change, expected):
    lines = [dict(line) for line in LINES]
    lines[index] |= change
    rewrite(pair[1], lines)
    answer = compare(*pair)
    assert (answer.identical, answer.text) == (False, expected)


def test_lines_that_a_resume_made_void_do_not_count(pair):
    rewrite(pair[1], [*LINES[:3], train_line(30, 9.0), valid_line(25, 9.0), *LINES[1:]])
    assert compare(*pair).identical


def test_a_truncated_line_is_not_a_difference_of_its_own(pair):
    with open(pair[1] / "metrics.jsonl", "a") as file:
        file.write('{"step": 40, "lo')
    assert compare(*pair).identical


def test_a_run_that_goes_on_is_not_the_same(pair):
    rewrite(pair[0], [*LINES, train_line(40, 3.9)])
    answer = compare(*pair)
    assert not answer.identical
    assert answer.text == (
        "different lengths: 4 against 3 training lines, equal at every step that both have; "
        f"the first line that only {pair[0]} has is of step 40"
    )


def test_a_tensor_that_differs_is_named_with_by_how_much(pair):
    shutil.rmtree(pair[1] / "checkpoints" / "step-00000030")
    other = torch.arange(6.0).view(2, 3)
    other[1, 2] += 0.25
    write_checkpoint(pair[1], 30, wte=other, head__bias=torch.tensor([0.0, float("nan")]))
    answer = compare(*pair)
    assert not answer.identical
    assert answer.text.endswith("but at step 30 wte differs in 1 of 6 values, by up to 0.25")


def test_minus_zero_is_another_bit(pair):
    shutil.rmtree(pair[1] / "checkpoints" / "step-00000030")
    write_checkpoint(pair[1], 30, wte=torch.arange(6.0).view(2, 3), head__bias=torch.tensor([-0.0, float("nan")]))
    assert "head.bias differs in 1 of 2 values, by up to 0" in compare(*pair).text


def test_weights_are_compared_at_the_newest_step_that_both_kept(pair):
    shutil.rmtree(pair[1] / "checkpoints" / "step-00000030")
    assert compare(*pair).text.endswith("the weights of both at step 20")
    shutil.rmtree(pair[1] / "checkpoints")
    assert compare(*pair).text.endswith("but no step has a checkpoint in both runs, so weights were not compared")


def test_what_is_no_run_is_refused(pair, tmp_path):
    with pytest.raises(UserError, match=r"it has no metrics\.jsonl"):
        compare(pair[0], tmp_path)
    with pytest.raises(UserError, match="nothing to compare"):
        compare(pair[0], write_run(tmp_path / "empty", []))
