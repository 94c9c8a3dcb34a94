import json
import math

import pytest
from run_folders import train_line, valid_line, write_checkpoint, write_evaluation, write_run, write_seeds

from megacocomix.compare.groups import Spread, differing_settings, read_groups
from megacocomix.compare.runs import read_run
from megacocomix.config.effective import row_of_the_paper, settings_in_effect
from megacocomix.config.method import PRESETS, MethodConfig
from megacocomix.errors import UserError

COCOMIX = {"method__name": "cocomix"}


def read(folders):
    return [(group.name, [run.name for run in group.runs]) for group in read_groups(folders)]


def test_runs_that_differ_in_nothing_but_the_seed_are_one_group_named_by_what_their_names_share(tmp_path):
    folders = write_seeds(tmp_path, "ntp", [4.0, 4.2]) + write_seeds(tmp_path, "cocomix", [3.0, 3.5], **COCOMIX)
    assert read(folders) == [("ntp", ["ntp-s1", "ntp-s2"]), ("cocomix", ["cocomix-s1", "cocomix-s2"])]
    ntp = read_groups(folders)[0]
    assert ntp.spread == Spread(pytest.approx(4.1), pytest.approx(0.2 / math.sqrt(2)), 2)
    assert [(point.step, point.loss) for point in ntp.valid] == [(20, pytest.approx(5.1)), (40, pytest.approx(4.1))]


def test_seeds_in_other_names_are_one_group_named_by_the_method(tmp_path):
    lines = [valid_line(40, 4.0)]
    folders = [write_run(tmp_path / name, lines, training__seed=seed) for seed, name in enumerate(("first", "other"))]
    assert read(folders) == [("ntp", ["first", "other"])]


def test_seeds_in_the_names_of_parents_are_left_out_of_a_groups_name(tmp_path):
    lines = [valid_line(40, 4.0)]
    folders = [write_run(tmp_path / f"seed{seed}" / "ntp", lines, training__seed=seed) for seed in (1, 2)]
    assert read(folders) == [("ntp", ["seed1/ntp", "seed2/ntp"])]


def test_the_same_experiment_before_and_after_a_change_is_two_groups(tmp_path):
    before, after = (write_seeds(tmp_path, name, [4.0, 4.1]) for name in ("before", "after"))
    mixed = [before[0], after[0], after[1], before[1]]
    assert read(mixed) == [("before", ["before-s1", "before-s2"]), ("after", ["after-s1", "after-s2"])]


def test_one_run_and_its_copy_are_not_two_seeds(tmp_path):
    folders = [write_run(tmp_path / name, [valid_line(40, 4.0)]) for name in ("one", "two")]
    assert len(read_groups(folders)) == 2


def test_the_mean_ends_where_its_shortest_run_does(tmp_path):
    long = write_run(tmp_path / "a-s1", [valid_line(s, 5 - s / 40) for s in (10, 20, 30)], training__seed=1)
    short = write_run(tmp_path / "a-s2", [valid_line(s, 5 - s / 20) for s in (10, 20)], training__seed=2)
    (group,) = read_groups([long, short])
    assert [point.step for point in group.valid] == [10, 20]
    assert group.spread.mean == pytest.approx(4.25)


def test_runs_without_a_common_step_stay_apart(tmp_path):
    folders = [write_run(tmp_path / f"a-s{step}", [valid_line(step, 4.0)], training__seed=step) for step in (1, 2)]
    assert len(read_groups(folders)) == 2


def test_the_same_content_under_other_paths_does_not_part_seeds(tmp_path):
    same = {"data.valid": "v" * 64, "data.train": "t" * 64}
    folders = [
        write_run(
            tmp_path / f"a-s{seed}", [valid_line(40, 4.0)], training__seed=seed, data__train=f"{seed}/train",
            data__valid=f"{seed}/valid",
        )
        for seed in (1, 2)
    ]  # fmt: skip
    for folder in folders:
        write_checkpoint(folder, inputs=same)
    assert read(folders) == [("a", ["a-s1", "a-s2"])]


def test_other_content_of_the_validation_data_is_refused_with_both_hashes(tmp_path):
    folders = [write_run(tmp_path / name, [valid_line(10, 5.0)]) for name in ("one", "two", "three", "four")]
    write_checkpoint(folders[0], inputs={"data.valid": "a" * 64})
    write_checkpoint(folders[1], inputs={"data.valid": "b" * 64})
    write_evaluation(folders[2], 10, 5.0, data_fingerprint="b" * 64)
    with pytest.raises(UserError) as caught:
        read_groups(folders[:3])
    assert str(caught.value) == (
        "validation losses on different data cannot be compared: data.valid is "
        f"shards/valid with hash {'a' * 16} (one); shards/valid with hash {'b' * 16} (two, three)."
    )
    # What does not record a hash is taken for what is at the same path.
    assert len(read_groups([folders[0], folders[3]])) == 2


def test_without_hashes_other_paths_are_refused(tmp_path):
    one = write_run(tmp_path / "one", [valid_line(10, 5.0)])
    two = write_run(tmp_path / "two", [valid_line(10, 5.0)], data__valid="elsewhere/valid")
    with pytest.raises(UserError, match=r"shards/valid with unknown hash \(one\); elsewhere/valid"):
        read_groups([one, two])


def test_settings_that_a_next_token_run_does_not_use_are_no_difference(tmp_path):
    lines = [valid_line(10, 5.0)]
    one = write_run(tmp_path / "one", lines, method__num_kept=32, teacher__model="gpt2")
    two = write_run(tmp_path / "two", lines, model__hidden_size=80)
    assert differing_settings(read_groups([one, two])) == {"model.hidden_size": [64, 80]}


@pytest.mark.parametrize(
    ("name", "used", "unused"),
    [
        ("kd", "teacher.model", "teacher.sae"),
        ("kd", "method.kd_weight", "method.num_kept"),
        ("mix-only", "method.num_kept", "method.label_source"),
        ("mix-only", "method.placement", "teacher.model"),
        ("predict-only", "method.num_labels", "method.num_kept"),
        ("predict-only", "method.insertion_layer", "method.placement"),
        ("pause", "method.placement", "method.num_concepts"),
        ("add", "method.placement", "method.interleave_every"),
        ("direct-hidden", "method.hidden_loss", "method.label_sign"),
        ("direct-hidden", "teacher.sae_layer", "teacher.labels"),
        ("activation", "method.label_source", "method.label_sign"),
        ("cocomix", "method.label_sign", "method.hidden_loss"),
    ],
)
def test_a_setting_counts_where_the_composition_uses_it(name, used, unused):
    method = MethodConfig(name=name, **PRESETS[name])
    teacher = {"model": "gpt2", "sae": "sae", "sae_layer": 5, "labels": "live"}
    settings = settings_in_effect({"method": method.model_dump(), "teacher": teacher}, method)
    assert used in settings
    assert unused not in settings


@pytest.mark.parametrize(
    ("name", "changes", "row"),
    [
        ("ntp", {}, "NTP"),
        ("kd", {}, "KD"),
        ("pause", {}, "NTP + pause"),
        ("kd+pause", {}, "KD + pause"),
        ("cocomix", {}, "CoCoMix"),
        ("cocomix", {"interleave_every": 2}, None),
        ("cocomix", {"concept_weight": 0.0}, "mix only"),
        ("cocomix", {"mix": "nothing"}, "predict only"),
        ("cocomix", {"predict": "nothing", "mix": "nothing"}, "NTP"),
        ("cocomix+kd", {}, None),
        ("add", {}, "add"),
        ("direct-hidden", {"hidden_loss": "cosine"}, "hidden, cosine"),
        ("activation", {}, "activation labels"),
        ("random", {}, "random labels"),
    ],
)
def test_the_row_of_the_paper_follows_from_the_settings_and_not_from_the_name(name, changes, row):
    assert row_of_the_paper(MethodConfig(name=name, **PRESETS[name] | changes)) == row


def test_the_config_of_an_earlier_version_is_read_with_what_its_method_meant(tmp_path):
    run = read_run(write_run(tmp_path / "run", [valid_line(10, 5.0)], **COCOMIX, method__label_source="activation"))
    assert row_of_the_paper(run.method) == "activation labels"
    assert run.setting("method.predict") == "concepts"


def test_an_unknown_method_is_refused_in_one_line(tmp_path):
    odd = write_run(tmp_path / "odd", [valid_line(10, 5.0)], method__predict="tokens")
    with pytest.raises(UserError, match=r"config\.yaml: method\.predict: ") as caught:
        read_groups([odd, write_run(tmp_path / "other", [valid_line(10, 5.0)])])
    assert len(caught.value.problems) == 1


def test_what_a_label_cache_cost_is_counted_once_for_every_token_seen(tmp_path):
    lines = [valid_line(10, 5.0), valid_line(20, 4.0), valid_line(40, 3.0, teacher=1.0)]
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "manifest.json").write_text(json.dumps({"flops_per_token": 4.0, "num_windows": 100, "context": 16}))
    run = read_run(write_run(tmp_path / "run", lines, **COCOMIX, teacher__labels=str(cache)))
    # 1,000 tokens, then more than the cache's 1,600; at last a quarter was labelled live.
    assert [point.teacher_flops for point in run.valid] == [4000, 6400, 4000 + 0.75 * 6400]
    distilled = write_run(tmp_path / "kd", lines, method__name="cocomix+kd", teacher__labels=str(cache))
    assert read_run(distilled).final.teacher_flops == 4000 + 6400
    assert read_run(write_run(tmp_path / "gone", lines, **COCOMIX, teacher__labels="gone")).final.teacher_flops == 4000


def test_a_run_that_was_never_validated_is_refused(tmp_path):
    silent = write_run(tmp_path / "silent", [train_line(1, 9.0)])
    with pytest.raises(UserError, match="has no validation line"):
        read_groups([silent, write_run(tmp_path / "other", [valid_line(10, 5.0)])])
