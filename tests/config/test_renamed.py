"""Options that had another name: refused with the new one named, and translated by one command."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

import tiny
from megacocomix.config.load import build_config, load_config
from megacocomix.config.renamed import RENAMED, upgrade
from megacocomix.errors import UserError
from processes import run_tool

OLD = {
    "parallel.cuts": ([2], "split_points", [2]),
    "parallel.stages_per_rank": (2, "virtual_stages", 2),
    "parallel.gather": ("per_step", "reshard_after_forward", False),
    "training.init": ("assets/teacher", "init_from", "assets/teacher"),
}
RECIPE = """\
# A recipe with a comment: gather is one of ours.
run: runs/old   # and another: é
parallel: {tensor: 1, pipeline: 2, stages_per_rank: 2, cuts: [1, 2, 3],
  gather: per_microbatch}  # over two lines
training:
  init: 'some where'
  seed: 22
"""


def test_every_renamed_option_is_listed_and_its_new_name_exists():
    assert set(RENAMED) == set(OLD)
    values = tiny.values(Path("x"))
    for old, (_, new, value) in OLD.items():
        section = old.partition(".")[0]
        assert RENAMED[old].key == f"{section}.{new}"
        found = build_config(values | {section: values.get(section, {}) | {new: value}})
        assert getattr(getattr(found, section), new) == value


@pytest.mark.parametrize("old", OLD)
def test_an_old_name_is_refused_in_a_file_and_on_the_command_line_with_the_new_one(root, tmp_path, old):
    section, key = old.split(".")
    value = yaml.safe_dump(OLD[old][0], default_flow_style=True).split("\n")[0]
    recipe = root / "configs/tiny.yaml"
    (tmp_path / "old.yaml").write_text(recipe.read_text().replace(f"{section}:", f"{section}: {{{key}: {value}}} #", 1))
    for path, overrides in ((recipe, [f"{old}={value}"]), (tmp_path / "old.yaml", [])):
        with pytest.raises(UserError) as error:
            load_config(path, overrides)
        line = next(line for line in error.value.problems if old in line)
        assert f"{old} is now {RENAMED[old].key}" in line and "tools/upgrade_config.py" in line


def test_a_recipe_keeps_its_comments_and_order(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(RECIPE)
    assert [line.partition(": ")[2] for line in upgrade(file)] == [
        f"{old} is now {RENAMED[old]}"
        for old in ("parallel.stages_per_rank", "parallel.cuts", "parallel.gather", "training.init")
    ]
    expected = RECIPE.replace("stages_per_rank", "virtual_stages").replace("cuts", "split_points")
    expected = expected.replace("gather: per_microbatch", "reshard_after_forward: true").replace("init:", "init_from:")
    assert file.read_text() == expected
    assert upgrade(file) == [] and file.read_text() == expected


def test_a_plan_of_a_sweep_is_translated_in_its_overrides(tmp_path):
    file = tmp_path / "plan.yaml"
    file.write_text(
        "overrides: [parallel.gather=per_step, 'training.init=a b']\nruns: {a: [\"parallel.cuts=[1,2]\"]}\n"
    )
    upgrade(file)
    assert yaml.safe_load(file.read_text()) == {
        "overrides": ["parallel.reshard_after_forward=false", "training.init_from=a b"],
        "runs": {"a": ["parallel.split_points=[1,2]"]},
    }


def test_a_run_is_translated_with_all_its_checkpoints_and_nothing_else_of_them(root, tmp_path):
    config = tiny.config(tmp_path, "run").model_dump(mode="json")
    for old, (value, new, _) in OLD.items():
        section, key = old.split(".")
        config[section][key] = value
        del config[section][new]
    manifest = {
        "state": {"step": 3},
        "config": config,
        "inputs": {"data.train": "x", "training.init": "y"},
        "files": {},
    }
    for step in (3, 6):
        folder = tmp_path / f"run/checkpoints/step-{step:08d}"
        folder.mkdir(parents=True)
        (folder / "checkpoint.json").write_text(json.dumps(manifest))
    (tmp_path / "run/config.yaml").write_text(yaml.safe_dump(config))
    shutil.copytree(folder, tmp_path / "alone")
    done = run_tool([root / "tools/upgrade_config.py", tmp_path / "run", tmp_path / "alone"], tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("checkpoint.json: parallel.cuts is now parallel.split_points") == 3
    expected = tiny.config(tmp_path, "run").model_dump(mode="json")
    for old, (_, new, value) in OLD.items():
        expected[old.partition(".")[0]][new] = value
    for file in tmp_path.glob("**/checkpoint.json"):
        assert json.loads(file.read_text()) == manifest | {
            "config": expected,
            "inputs": {"data.train": "x", "training.init_from": "y"},
        }
    assert yaml.safe_load((tmp_path / "run/config.yaml").read_text()) == expected


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "is not a recipe, run or checkpoint"),
        (b"a: [", "cannot be read as YAML"),
        (b"\xff\xfe\x00", "cannot be read as YAML"),
        (b"parallel: {cuts: [1], split_points: [1]}", "split_points is given twice"),
    ],
    ids=["gone", "broken", "binary", "both"],
)
def test_what_cannot_be_translated_is_one_line(tmp_path, content, problem):
    file = tmp_path / "x.yaml"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError) as error:
        upgrade(file)
    assert len(error.value.problems) == 1 and problem in str(error.value)
    assert content is None or file.read_bytes() == content
