import math

import pytest
from run_folders import valid_line, write_evaluation, write_run, write_seeds

from megacocomix.compare.curves import AXES, equal_end, equal_x, noise, x_to_match
from megacocomix.compare.groups import read_groups
from megacocomix.compare.runs import read_run
from megacocomix.errors import UserError


@pytest.fixture
def pair(tmp_path):
    """A control at 4.0 after 4000 tokens; a run at 3.5, for twice the student FLOPs and a teacher of half that."""
    control = write_run(tmp_path / "control", [valid_line(s, 8 - s / 10) for s in (0, 10, 20, 30, 40)])
    lines = [valid_line(0, 8.0, 4.0, 2.0), valid_line(20, 5.5, 4.0, 2.0), valid_line(40, 3.5, 4.0, 2.0)]
    return read_groups([write_run(tmp_path / "concepts", lines, method__name="cocomix"), control])


@pytest.mark.parametrize(
    ("axis", "x", "losses", "progress"),
    [
        ("tokens", 4000, (3.5, 4.0), (1.0, 1.0)),
        ("flops", 8000, (5.5, 4.0), (0.5, 1.0)),
        ("total_flops", 8000, (8 - 2.5 * 2 / 3, 4.0), (1 / 3, 1.0)),
        ("seconds", 800, (5.5, 4.0), (0.5, 1.0)),
    ],
)
def test_equal_x_is_the_largest_that_both_reached_interpolated_linearly(pair, axis, x, losses, progress):
    equal = equal_x(*pair, axis)
    assert equal.x == x
    assert equal.losses == pytest.approx(losses)
    assert equal.difference == pytest.approx(losses[0] - losses[1])
    assert equal.progress == pytest.approx(progress)


def test_the_difference_turns_its_sign_with_the_order_of_the_runs(pair):
    run, other = pair
    for axis in AXES:
        assert equal_x(run, other, axis).difference == -equal_x(other, run, axis).difference


def test_x_to_match_is_where_the_line_crosses_the_others_final_loss(pair):
    run, control = pair
    match = x_to_match(run, control, "tokens")
    assert (match.target, match.x, match.other_x, match.factor) == (4.0, 3500, 4000, 0.875)
    assert x_to_match(run, control, "flops").factor == 1.75
    assert x_to_match(run, control, "total_flops").factor == 2.625


def test_x_to_match_takes_the_first_crossing(tmp_path):
    bumpy = write_run(tmp_path / "bumpy", [valid_line(s, y) for s, y in ((10, 6), (20, 4), (30, 6), (40, 3))])
    level = write_run(tmp_path / "level", [valid_line(40, 5.0)])
    assert x_to_match(*read_groups([bumpy, level]), "tokens").x == 1500


def test_a_loss_never_reached_has_no_match(pair):
    match = x_to_match(pair[1], pair[0], "tokens")
    assert match.x is None
    assert match.factor is None


def test_runs_without_a_common_stretch_are_not_extrapolated(tmp_path):
    early = write_run(tmp_path / "early", [valid_line(10, 6.0), valid_line(20, 5.0)])
    late = write_run(tmp_path / "late", [valid_line(30, 4.0), valid_line(40, 3.0)])
    assert equal_x(*read_groups([early, late]), "tokens") is None


def test_the_last_line_of_a_repeated_step_wins(tmp_path):
    lines = [{"step": s, "tokens": s, "loss": float(s)} for s in (10, 20)]
    lines += [valid_line(20, 5.0), {"step": 20, "tokens": 20, "loss": 2.5}, valid_line(20, 4.0)]
    run = read_run(write_run(tmp_path / "run", lines))
    assert [(point.step, point.loss) for point in run.valid] == [(20, 4.0)]
    assert [(point.step, point.loss) for point in run.train] == [(10, 10.0), (20, 2.5)]


def test_what_a_run_wrote_after_its_checkpoint_is_forgotten_when_it_resumes(tmp_path):
    # Stopped after step 25, resumed from step 10 with another interval: 15 and 25 did not happen.
    lines = [valid_line(s, 9.0) for s in (5, 10, 15, 25)] + [valid_line(s, 3.0) for s in (12, 24)]
    run = read_run(write_run(tmp_path / "run", lines))
    assert [point.step for point in run.valid] == [5, 10, 12, 24]


def test_a_truncated_last_line_is_skipped_with_a_warning(tmp_path, caplog):
    folder = write_run(tmp_path / "run", [valid_line(10, 5.0), '{"step": 20, "tokens": 2000, "valid_l'])
    assert [point.step for point in read_run(folder).valid] == [10]
    assert "the last line is truncated" in caplog.text


def test_lines_of_other_kinds_and_absent_costs_do_no_harm(tmp_path):
    lines = [{"event": "resumed"}, {"step": 10, "tokens": 100, "valid_loss": 4.0, "teacher_flops": None}]
    final = read_run(write_run(tmp_path / "run", lines)).final
    assert (final.loss, final.total_flops) == (4.0, 0.0)


def test_x_that_runs_backwards_is_refused(tmp_path):
    lines = [valid_line(10, 5.0), {**valid_line(20, 4.0), "seconds": 1.0}]
    with pytest.raises(UserError, match="seconds is lower at step 20"):
        read_run(write_run(tmp_path / "run", lines))


def test_folders_that_are_no_runs_are_refused_all_at_once(tmp_path):
    (tmp_path / "empty").mkdir()
    silent = write_run(tmp_path / "silent", [{"step": 1, "tokens": 1, "loss": 9.0}])
    with pytest.raises(UserError) as caught:
        read_groups([tmp_path / "empty", silent])
    assert [line.split(" ", 1)[1] for line in caught.value.problems] == [
        "is not a run folder: it has no config.yaml and no metrics.jsonl.",
        "has no validation line: there is no valid_loss to compare.",
    ]


def test_one_run_or_the_same_run_twice_is_refused(tmp_path):
    folder = write_run(tmp_path / "run", [valid_line(10, 5.0)])
    with pytest.raises(UserError, match="two or more"):
        read_groups([folder])
    with pytest.raises(UserError, match="twice"):
        read_groups([folder, folder / ".." / "run"])


def test_two_spellings_of_one_validation_folder_are_the_same_data(tmp_path):
    (tmp_path / "valid").mkdir()
    lines = [valid_line(10, 5.0)]
    one = write_run(tmp_path / "one", lines, data__valid=str(tmp_path / "valid"))
    two = write_run(tmp_path / "two", lines, data__valid=str(tmp_path / "one" / ".." / "valid"))
    assert len(read_groups([one, two])) == 2


def test_runs_of_one_name_are_told_apart_by_their_parents(tmp_path):
    lines = [valid_line(10, 5.0)]
    folders = [write_run(tmp_path / parent / "run", lines) for parent in ("first", "second")]
    assert [run.name for run in read_groups(folders)] == ["first/run", "second/run"]


def test_scatter_measures_noise_and_not_the_bend_of_a_curve(tmp_path):
    steps = range(1, 41)
    smooth = write_run(tmp_path / "smooth", [valid_line(s, 3 + 1e-4 * (s - 50) ** 2) for s in steps])
    jagged = write_run(tmp_path / "jagged", [valid_line(s, 3 + 0.01 * (-1) ** s) for s in steps], training__steps=9)
    short = write_run(tmp_path / "short", [valid_line(s, 3.0) for s in (10, 20)], training__steps=8)
    smooth, jagged, short = read_groups([smooth, jagged, short])
    assert noise([smooth, short]).size(smooth, short) == pytest.approx(0, abs=1e-9)
    assert noise([smooth, jagged]).scatter == pytest.approx(2 * math.sqrt(2) * 0.02 / math.sqrt(1.5), rel=0.05)
    assert noise([short, short]).size(short, short) is None


def test_seeds_measure_noise_by_students_t(tmp_path):
    folders = write_seeds(tmp_path, "a", [4.0, 4.2, 4.4]) + write_seeds(tmp_path, "b", [3.0, 3.2], model__context=8)
    a, b = read_groups(folders)
    known = noise([a, b])
    pooled = math.sqrt((2 * 0.2**2 + 1 * 0.02) / 3)
    assert (known.seeds, known.freedom) == (pytest.approx(pooled), 3)
    assert known.size(a, b) == pytest.approx(3.18 * pooled * math.sqrt(1 / 3 + 1 / 2))


def test_to_match_is_asked_of_the_mean_and_over_pairs_of_the_same_seed(tmp_path):
    # Each line falls by 1 from step 20 to 40. Seed 1 is 0.4 below its control, seed 2 0.2, so the means 0.3.
    control = write_seeds(tmp_path, "control", [4.0, 4.1])
    better = write_seeds(tmp_path, "better", [3.6, 3.9], model__hidden_size=80)
    control, better = read_groups(control + better)
    match = x_to_match(better, control, "tokens")
    assert match.factor == pytest.approx(0.85)
    assert (match.seeds.mean, match.seeds.n) == (pytest.approx((0.8 + 0.9) / 2), 2)
    assert match.seeds.std == pytest.approx(0.1 / math.sqrt(2))
    back = x_to_match(control, better, "tokens")
    assert (back.factor, back.seeds, back.num_seeds) == (None, None, 2)


def test_seeds_without_a_partner_are_asked_against_the_mean(tmp_path):
    control = write_seeds(tmp_path, "control", [4.0])
    better = write_seeds(tmp_path, "better", [3.6, 4.1], model__hidden_size=80)
    match = x_to_match(*reversed(read_groups(control + better)), "tokens")
    assert (match.seeds.mean, match.seeds.std, match.seeds.n, match.num_seeds) == (pytest.approx(0.8), None, 1, 2)


def test_the_evaluation_of_the_highest_step_on_the_runs_own_data_counts(tmp_path, caplog):
    folder = write_run(tmp_path / "run", [valid_line(20, 4.0)])
    assert read_run(folder).evaluation is None
    write_evaluation(folder, 20, 4.1)
    write_evaluation(folder, 9, 4.5)
    write_evaluation(folder, 30, 1.0, data="elsewhere")
    write_evaluation(folder, 40, None)
    (folder / "evals" / "truncated.json").write_text('{"step": 50')
    found = read_run(folder).evaluation
    assert (found.step, found.loss, found.windows) == (20, 4.1, 100)
    assert caplog.text.count("is skipped") == 2


@pytest.mark.parametrize("changes", [{"step": 10}, {"num_sequences": 99}, {"context": 8}, {"data": "elsewhere"}])
def test_full_evaluations_are_compared_at_the_end_and_over_the_same_windows_alone(tmp_path, changes):
    one, two, odd = (write_run(tmp_path / name, [valid_line(20, 4.0)]) for name in ("one", "two", "odd"))
    write_evaluation(one, 20, 4.125)
    write_evaluation(two, 20, 4.0)
    write_evaluation(odd, **{"step": 20, "loss": 4.0} | changes)
    one, two, odd = read_groups([one, two, odd])
    assert (equal_end(one, two).difference, equal_end(one, two).windows) == (0.125, 100)
    assert equal_end(one, odd) is None


def test_full_evaluations_after_different_numbers_of_tokens_are_not_at_equal_tokens(tmp_path):
    one, two = (write_run(tmp_path / str(step), [valid_line(step, 4.0)]) for step in (20, 30))
    write_evaluation(one, 20, 4.0)
    write_evaluation(two, 30, 4.0)
    assert equal_end(*read_groups([one, two])) is None


@pytest.mark.parametrize("text", [None, "{", "[]", '{"command": ["x"]}', '{"starts": [{"command": ["x"]}]}'])
def test_a_code_file_that_does_not_tell_of_starts_is_no_mistake(tmp_path, text):
    folder = write_run(tmp_path / "run", [valid_line(20, 4.0)])
    if text is not None:
        (folder / "code.json").write_text(text)
    assert read_run(folder).starts == ()


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf, None, 1e308])
def test_a_loss_that_is_no_use_is_compared_without_a_traceback(tmp_path, loss):
    lines = [{**valid_line(s, 4.0), "valid_loss": loss if s > 20 else 4.0} for s in (10, 20, 30, 40)]
    good = write_run(tmp_path / "good", [valid_line(s, 5 - s / 100) for s in (10, 20, 30, 40)])
    run, good = read_groups([write_run(tmp_path / "lost", lines), good])
    assert x_to_match(run, good, "tokens").x == 1000
    assert loss == 1e308 or x_to_match(good, run, "tokens").x is None
    assert loss == 1e308 or not math.isfinite(equal_x(run, good, "tokens").difference)
    assert noise([run, good]).seeds is None


@pytest.mark.parametrize("spent", [{"tokens": math.nan}, {"seconds": math.inf}, {"flops": 10**400}, {"step": math.inf}])
def test_spending_that_is_no_finite_number_is_refused_with_its_line(tmp_path, spent):
    folder = write_run(tmp_path / "run", [valid_line(10, 5.0), {**valid_line(20, 4.0), **spent}])
    with pytest.raises(UserError, match=r"metrics\.jsonl:2: a valid_loss line needs finite numbers"):
        read_run(folder)
