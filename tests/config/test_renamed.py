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
        source = "override" if overrides else path
        assert line.startswith(f"{source}: {old} is now {RENAMED[old].key}")
        assert ("tools/upgrade_config.py" in error.value.problems[-1]) == (not overrides)


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
    assert list(upgrade(file)) == [] and file.read_text() == expected


def test_a_plan_of_a_sweep_is_translated_in_its_overrides(tmp_path):
    file = tmp_path / "plan.yaml"
    file.write_text(
        "overrides: [parallel.gather=per_step, 'training.init=a b']\nruns: {a: [\"parallel.cuts=[1,2]\"]}\n"
    )
    list(upgrade(file))
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
    ("old", "new"),
    [
        ("runs: {a: &b [training.init=x], c: *b}", "runs: {a: &b [training.init_from=x], c: *b}"),
        ("parallel: &a {cuts: *a}", "parallel: &a {split_points: *a}"),
        ("- 'training.init=it''s'", "- 'training.init_from=it''s'"),
        ("- &s training.init=y", "- &s training.init_from=y"),
        ("- >-\n  training.init=y\n", "- >-\n  training.init_from=y\n"),
        ("parallel: {gather: &g per_step}", "parallel: {reshard_after_forward: &g false}"),
        ("parallel: {gather: [per_step]}", "parallel: {reshard_after_forward: [per_step]}"),
        ("run: training.init=x", "run: training.init=x"),
        ("training.init=x", "training.init=x"),
        ("training:\r\n  init: a\r\n", "training:\r\n  init_from: a\r\n"),
    ],
)
def test_only_the_names_change(tmp_path, old, new):
    target, link = tmp_path / "plan.yaml", tmp_path / "link.yaml"
    target.write_bytes(old.encode())
    target.chmod(0o640)
    link.symlink_to(target)
    list(upgrade(link))
    assert target.read_bytes().decode() == new
    assert link.is_symlink() and target.stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize(
    ("manifest", "problem"),
    [
        ({"config": {"parallel": {"cuts": [1], "split_points": [2]}}, "inputs": {}}, "holds both parallel.cuts"),
        ({"config": {"parallel": 3}, "inputs": {}}, "is damaged"),
        ({"config": {"parallel": ["cuts"]}, "inputs": {}}, "is damaged"),
        ({"config": {}, "inputs": None}, "is damaged"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_others_are_upgraded(tmp_path, manifest, problem):
    sound = {"config": {"parallel": {"gather": ["x"]}, "training": {"init": "y"}}, "inputs": {}}
    for step, values in enumerate((manifest, sound), start=1):
        folder = tmp_path / f"run/checkpoints/step-{step:08d}"
        folder.mkdir(parents=True)
        (folder / "checkpoint.json").write_text(json.dumps(values))
    with pytest.raises(UserError) as error:
        list(upgrade(tmp_path / "run"))
    (line,) = error.value.problems
    assert problem in line and "step-00000001" in line
    assert json.loads((tmp_path / "run/checkpoints/step-00000001/checkpoint.json").read_text()) == manifest
    expected = {"parallel": {"reshard_after_forward": ["x"]}, "training": {"init_from": "y"}}
    assert json.loads((folder / "checkpoint.json").read_text())["config"] == expected


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "does not exist"),
        (b"a: [", "cannot be read as YAML"),
        (b"\xff\xfe\x00", "cannot be read as YAML"),
        (b"[" * 3000, "cannot be read as YAML"),
        (b"parallel: {cuts: [1], split_points: [1]}", "split_points is given twice"),
    ],
    ids=["gone", "broken", "binary", "deep", "both"],
)
def test_what_cannot_be_translated_is_one_line(tmp_path, content, problem):
    file = tmp_path / "x.yaml"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError) as error:
        list(upgrade(file))
    assert len(error.value.problems) == 1 and problem in str(error.value)
    assert content is None or file.read_bytes() == content
