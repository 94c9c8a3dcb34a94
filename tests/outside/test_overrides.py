"""Values of recipes, plans and the command line, by the core schema of YAML 1.2 (yaml.org/spec/1.2.2, section 10.3)."""

import json
import math

import pytest
import yaml

from megacocomix.checkpoint.format import CHECKPOINT_FORMAT, CHECKPOINT_VERSION
from megacocomix.checkpoint.open import model_tokenizer
from megacocomix.config.load import dump_config, load_config
from megacocomix.config.rules import check_config
from megacocomix.config.yaml_text import dump_yaml, parse_yaml
from megacocomix.errors import UserError
from megacocomix.interpret.names import read_names
from megacocomix.training.sweep import plan_jobs, read_plan

# The specification's table and its examples.
VALUES = {
    **dict.fromkeys(["null", "Null", "NULL", "~", ""]),
    **dict.fromkeys(["true", "True", "TRUE"], True),
    **dict.fromkeys(["false", "False", "FALSE"], False),
    **{"0": 0, "-19": -19, "+5": 5, "010": 10, "-007": -7, "0o7": 7, "0o10": 8, "0x3A": 58, "12345678901": 12345678901},
    **{"0.": 0.0, "-0.0": -0.0, ".5": 0.5, "+12e03": 12000.0, "-2E+05": -200000.0, "1e-4": 1e-4, "1.e+2": 100.0},
    **{".5e1": 5.0, "01.5": 1.5},
    **dict.fromkeys([".inf", "+.INF", ".Inf"], math.inf),
    "-.Inf": -math.inf,
}
# None of the core schema's values, though most of them are in YAML 1.1 or in Python.
TEXTS = [
    "yes", "no", "on", "off", "y", "n", "Yes", "NO", "tRUE", "nULL", "1:30", "1:30.5", "190:20:30", "1_000", "1_0.5",
    "0b11", "-0o7", "-0x1", "0o8", "1e", "1e+", ".", ".e5", "+.nan", "inf", "nan", ".iNF", "=", "<<", "2024-01-01",
    "2024-01-01T00:00:00Z", "12:00", "0x", "0xg", "1,5",
]  # fmt: skip
PATHS = ["runs/a #1", "007", "1e5", "010", "0o10", "2024-01-01", "1:30", "on", "null", "~", " a ", "'x'", '"x"', "a=b",
         "a: b", "a:b", "[x", "{x}", "- x", "*a", "&a", "!t", "%x", "@x", "`x", "|", ">", "?", "#", "é 漢 🙂", "a\tb",
         "\\n", "=", "true", ".inf", "0x1F", "x" * 300 + " " + "y" * 300]  # fmt: skip


@pytest.fixture
def tiny(root):
    return root / "configs/tiny.yaml"


def refusal(*arguments):
    with pytest.raises(UserError) as caught:
        load_config(*arguments)
    return caught.value.problems


@pytest.mark.parametrize("text", VALUES)
def test_a_value_of_the_core_schema_is_read_as_the_specification_says(text):
    for value in (
        parse_yaml(text, "text"),
        parse_yaml(f"[{text or '~'}]", "text")[0],
        parse_yaml(f"k: {text}", "")["k"],
    ):
        assert (type(value), value) == (type(VALUES[text]), VALUES[text])


def test_not_a_number_is_read():
    assert all(math.isnan(parse_yaml(text, "text")) for text in (".nan", ".NaN", ".NAN"))


@pytest.mark.parametrize("text", TEXTS)
def test_what_the_core_schema_does_not_know_is_text(text):
    assert parse_yaml(f"k: {text}", "text") == {"k": text}
    assert parse_yaml(f"{text}: k", "text") == {text: "k"} if text != "<<" else True


@pytest.mark.parametrize("text", ["!!int 1:30", "!!int 1_0", "!!bool yes", "!!float 1_0.5", "!!null x", "!!float x"])
def test_a_written_tag_does_not_bring_the_old_forms_back(text):
    with pytest.raises(UserError, match=r"not valid YAML: '.*' is no "):
        parse_yaml(text, "text")


def test_anchors_and_merge_keys_work_and_a_key_given_twice_is_an_error():
    merged = parse_yaml("a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\nc: {<<: [*a, {z: 010}]}", "text")
    assert merged == {"a": {"x": 1, "y": 2}, "b": {"x": 1, "y": 3}, "c": {"x": 1, "y": 2, "z": 10}}
    for text in ("a: 1\na: 2", "10: a\n010: b", "a: &a {x: 1}\nb: {<<: *a, <<: *a}"):
        with pytest.raises(UserError, match="is given twice"):
            parse_yaml(text, "text")


@pytest.mark.parametrize("path", PATHS)
def test_a_text_option_takes_the_text_as_it_is(tiny, path):
    assert load_config(tiny, [f"run={path}"]).run == path
    assert load_config(tiny, [f"data.train={path}"]).data.train == path


@pytest.mark.parametrize("path", PATHS)
def test_a_run_folder_reads_back_every_text(tiny, tmp_path, path):
    config = load_config(tiny, [f"run={path}", f"evaluation.tasks=[{dump_yaml(path).splitlines()[0]}]"])
    stored = tmp_path / "config.yaml"
    stored.write_text(dump_config(config))
    assert load_config(stored) == config
    assert yaml.safe_load(stored.read_text()) == config.model_dump(mode="json") | {
        "optimizer": config.optimizer.model_dump() | {"betas": [0.9, 0.95]}
    }


@pytest.mark.parametrize("path", [path for path in PATHS if path not in ("1e5", "0o10")])
def test_a_run_folder_of_earlier_versions_reads_back_every_text(tiny, tmp_path, path):
    """They were written as YAML 1.1, in which 1e5 and 0o10 need no quotes."""
    config = load_config(tiny, [f"run={path}"])
    stored = tmp_path / "config.yaml"
    stored.write_text(yaml.safe_dump(config.model_dump(mode="json"), default_flow_style=None, width=120))
    assert load_config(stored) == config


@pytest.mark.parametrize("text", ["null", "Null", "NULL", "~", ""])
def test_an_optional_text_is_null_for_the_spellings_of_null(tiny, text):
    assert load_config(tiny, [f"teacher.sae={text}"]).teacher.sae is None


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("training.seed=010", 10),
        ("training.steps=0o10", 8),
        ("training.stop_after=null", None),
        ("optimizer.lr=1e-4", 1e-4),
        ("optimizer.lr=1", 1),
        ("optimizer.betas=[.9, 9.9e-1]", (0.9, 0.99)),
        ("parallel.split_points=[010, 0x10]", [10, 16]),
        ("parallel.zero=01", 1),
        ("logging.wandb=TRUE", True),
        ("parallel.sequence=~", False),
        ("training.precision=fp32", "fp32"),
        (
            "evaluation.tasks=[no, 007, 1e3, 'a #b', null, 2024-01-01]",
            ["no", "007", "1e3", "a #b", "null", "2024-01-01"],
        ),
        ("evaluation.tasks=[]", []),
    ],
)
def test_an_override_has_its_options_type(tiny, override, value):
    section, key = override.partition("=")[0].split(".")
    assert getattr(getattr(load_config(tiny, [override]), section), key) == value


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("training.steps=1:30", "override: training.steps = '1:30': input should be a valid integer."),
        ("training.steps=1_000", "override: training.steps = '1_000': input should be a valid integer."),
        ("training.steps=10 #x", "override: training.steps = '10 #x': input should be a valid integer."),
        ("training.steps=", "override: training.steps = None: input should be a valid integer."),
        ("training.steps=1e3", "override: training.steps = 1000.0: input should be a valid integer."),
        ("logging.wandb=yes", "override: logging.wandb = 'yes': input should be a valid boolean."),
        ("logging.wandb=on", "override: logging.wandb = 'on': input should be a valid boolean."),
        ("parallel.split_points=[1_0]", "override: parallel.split_points.0 = '1_0': input should be a valid integer."),
        ("evaluation.tasks=piqa", "override: evaluation.tasks = 'piqa': input should be a valid list."),
        ("evaluation.tasks=[piqa", "override evaluation.tasks:1: not valid YAML: "),
        ("teacher=x", "override: teacher = 'x': input should be a valid dictionary or instance of TeacherConfig."),
        ("training.steps=" + "9" * 5000, "override training.steps: not valid YAML: "),
    ],
)
def test_a_value_of_another_type_is_one_line(tiny, override, line):
    (problem,) = refusal(tiny, [override])
    assert problem.startswith(line)


def test_an_empty_run_is_refused(tiny):
    with pytest.raises(UserError, match="run is empty: name a folder"):
        check_config(load_config(tiny, ["run="]), 1)


def test_the_overrides_of_a_plan_are_read_the_same(tiny, tmp_path):
    plan = tmp_path / "plan.yaml"
    plan.write_text(
        f"config: {tiny}\nout: 2024-01-01\nseeds: [010]\noverrides: ['teacher.model=a #1']\n"
        "runs:\n  on: [training.steps=030]\n  010-x: ['evaluation.tasks=[007]', data.train=1e5]\n"
    )
    on, other = plan_jobs(read_plan(plan))
    assert (on.name, on.config.run, on.config.training.steps) == ("on-s10", "2024-01-01/on-s10", 30)
    assert (other.config.teacher.model, other.config.data.train, other.config.evaluation.tasks) == (
        "a #1",
        "1e5",
        ["007"],
    )


def test_names_of_concepts_may_be_words_that_were_booleans(tmp_path):
    names = tmp_path / "names.yaml"
    names.write_text("010: on\n9: 2024-01-01\n")
    assert read_names(names, 64) == {10: "on", 9: "2024-01-01"}


def test_the_tokenizer_of_a_checkpoint_is_read_as_json(tmp_path):
    manifest = {"format": CHECKPOINT_FORMAT, "version": CHECKPOINT_VERSION, "files": {}, "state": {}, "inputs": {}}
    name = "tokenizers/\U0001f642 #1"
    (tmp_path / "checkpoint.json").write_text(json.dumps(manifest | {"config": {"data": {"tokenizer": name}}}))
    assert model_tokenizer(tmp_path) == name
