import json

import numpy as np
import pytest
import torch

import tiny
from megacocomix.data.prepare import prepare_data
from megacocomix.data.tokens import check_token_ids
from megacocomix.errors import UserError
from megacocomix.training.inputs import open_inputs
from megacocomix.training.run_folder import check_run_folder, write_run_folder

CPU = torch.device("cpu")


def refusal(config):
    with pytest.raises(UserError) as caught:
        open_inputs(config, CPU)
    return caught.value.problems


def prepared(folder):
    (folder / "text.txt").write_text("Words, words, words, and a few more of them. " * 20)
    prepare_data([str(folder / "text.txt")], folder / "shards", "gpt2", workers=1)
    return folder / "shards/train"


def test_everything_that_is_missing_is_in_one_report(folder):
    nowhere = str(folder / "nowhere")
    data = {"train": nowhere, "valid": nowhere, "tokenizer": nowhere}
    assert len(refusal(tiny.config(folder, data=data, teacher={"model": nowhere}))) == 4


def test_a_truncated_shard_is_refused_before_training(folder, tmp_path):
    train = prepared(tmp_path)
    shard = train / "shard-00000.bin"
    shard.write_bytes(shard.read_bytes()[:-2])
    problems = refusal(tiny.config(folder, data={"train": str(train)}, model={"vocab_size": 50257}))
    assert "shard-00000.bin" in problems[0]


def test_data_of_a_larger_vocabulary_than_the_models_is_refused(folder, tmp_path):
    problems = refusal(tiny.config(folder, data={"train": str(prepared(tmp_path))}))
    assert "Nearest valid: 50257" in problems[0]
    assert "the teacher's is 97" in problems[1]


def test_data_of_another_tokenizer_is_refused(folder, tmp_path, root):
    tokenizer = str(root / "assets/teacher/tokenizer.model")
    data = {"train": str(prepared(tmp_path)), "tokenizer": tokenizer}
    problems = refusal(tiny.config(folder, data=data, model={"vocab_size": 50257}))
    assert any("another tokenizer" in problem for problem in problems)


def test_fewer_tokens_than_one_window_are_refused(folder, tmp_path):
    tiny.write_tokens(tmp_path / "few.bin", tiny.CONTEXT - 1)
    assert "fewer than one window" in refusal(tiny.config(folder, data={"train": str(tmp_path / "few.bin")}))[0]


def test_a_token_outside_the_vocabulary_is_named():
    with pytest.raises(UserError, match=r"x\.bin holds token 97"):
        check_token_ids(np.array([[1, 97]]), 97, "x.bin")


def test_a_run_folder_of_another_config_is_refused_naming_each_difference(folder, tmp_path):
    first = tiny.config(tmp_path)
    write_run_folder(first, check_run_folder(first), {})
    before = (tmp_path / "run/config.yaml").read_text()
    with pytest.raises(UserError) as caught:
        check_run_folder(tiny.config(tmp_path, model={"num_layers": 4}, optimizer={"lr": 1.0}))
    text = "\n".join(caught.value.problems)
    assert "model.num_layers is 3 there, 4 here" in text
    assert "optimizer.lr is 0.01 there, 1.0 here" in text
    assert (tmp_path / "run/config.yaml").read_text() == before


def test_what_changes_no_weight_may_change_between_starts(tmp_path):
    first = tiny.config(tmp_path)
    write_run_folder(first, check_run_folder(first), {})
    check_run_folder(tiny.config(tmp_path, training={"stop_after": 2}, parallel={"zero": 1}, logging={"every": 7}))


def test_a_folder_that_is_no_run_is_not_taken_over(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/thesis.tex").write_text("precious")
    with pytest.raises(UserError, match="not a run folder"):
        check_run_folder(tiny.config(tmp_path))


@pytest.mark.parametrize(
    "change", [{"shards": []}, {"dtype": "int7"}, {"tokenizer": None}, {"shards": 5}, {"vocab_size": -1}]
)
def test_a_damaged_manifest_is_one_clear_line(folder, tmp_path, change):
    train = prepared(tmp_path)
    manifest = train / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | change))
    assert "manifest.json is damaged" in refusal(tiny.config(folder, data={"train": str(train)}))[0]


def test_a_damaged_record_of_starts_does_not_keep_a_run_from_going_on(tmp_path):
    config = tiny.config(tmp_path)
    write_run_folder(config, check_run_folder(config), {}).close()
    (tmp_path / "run/code.json").write_bytes(b"\xff{")
    write_run_folder(config, check_run_folder(config), {}).close()
    assert len(json.loads((tmp_path / "run/code.json").read_text())["starts"]) == 1


def test_two_jobs_cannot_train_in_one_folder(tmp_path):
    config = tiny.config(tmp_path)
    lock = write_run_folder(config, check_run_folder(config), {})
    with pytest.raises(UserError, match="another job"):
        write_run_folder(config, check_run_folder(config), {})
    lock.close()
    write_run_folder(config, check_run_folder(config), {}).close()


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"[", b"just text"])
def test_a_damaged_config_in_a_run_folder_is_one_clear_line(tmp_path, content):
    config = tiny.config(tmp_path)
    write_run_folder(config, check_run_folder(config), {}).close()
    (tmp_path / "run/config.yaml").write_bytes(content)
    with pytest.raises(UserError) as caught:
        check_run_folder(config)
    assert len(caught.value.problems) == 1
