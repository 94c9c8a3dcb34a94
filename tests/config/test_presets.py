"""method.name: the options that each name sets, on top of any recipe, and the combinations that are refused."""

import re

import pytest

import tiny
from megacocomix.config.load import build_config, load_config
from megacocomix.config.method import PRESETS
from megacocomix.config.rules import check_config
from megacocomix.errors import UserError
from megacocomix.model.flops import student_flops
from megacocomix.training.inputs import open_inputs

NO_TEACHER = ("ntp", "pause", "mix-only")
NO_AUTOENCODER = ("kd", "kd+pause", "direct-hidden")
WRITTEN = ["method.predict=hidden", "method.mix=pause", "method.placement=add", "method.label_source=random"]


@pytest.fixture
def written(root, tmp_path):
    """A recipe that writes out every option that a preset sets."""
    path = tmp_path / "recipe.yaml"
    text = (root / "configs/tiny.yaml").read_text()
    more = "predict: hidden, mix: pause, placement: add, label_source: random, concept_weight: 0.7, kd_weight: 0.3"
    more += ", interleave_every: 4, label_sign: negative"
    path.write_text(text.replace("{name: cocomix,", f"{{name: cocomix, {more},"))
    return path


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("recipe", ["tiny", "69m", "386m", "1.38b", "386m-openwebmath"])
def test_every_preset_is_valid_over_every_recipe_and_equals_its_options_one_by_one(root, recipe, name):
    path = root / f"configs/{recipe}.yaml"
    preset = load_config(path, [f"method.name={name}"])
    check_config(preset, 1)
    options = [f"method.{key}={value}" for key, value in PRESETS[name].items()]
    one_by_one = load_config(path, options)
    assert one_by_one.method.name == "cocomix"
    assert one_by_one.model_copy(update={"method": one_by_one.method.model_copy(update={"name": name})}) == preset


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_on_the_command_line_goes_over_the_recipe(written, name):
    config = load_config(written, [f"method.name={name}"])
    check_config(config, 1)
    assert {key: getattr(config.method, key) for key in PRESETS[name]} == PRESETS[name]
    assert config.method.interleave_every == (4 if config.method.interleaves else 1)


def test_a_preset_of_the_recipe_is_under_what_the_recipe_writes(written):
    method = load_config(written).method
    assert (method.name, method.mix, method.concept_weight, method.kd_weight) == ("cocomix", "pause", 0.7, 0.3)


def test_an_option_beside_the_preset_wins(written):
    method = load_config(written, ["method.name=kd", "method.mix=pause", "method.kd_weight=0.5"]).method
    assert (method.predict, method.mix, method.kd_weight) == ("nothing", "pause", 0.5)


@pytest.mark.parametrize("name", PRESETS)
def test_methods_without_a_head_are_as_wide_as_the_control(root, name):
    config = load_config(root / "configs/69m.yaml", [f"method.name={name}"])
    assert config.model.hidden_size == (624 if name in ("ntp", "kd", "pause", "kd+pause") else 512)
    assert (
        load_config(root / "configs/69m.yaml", [f"method.name={name}", "model.hidden_size=64"]).model.hidden_size == 64
    )


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_that_needs_a_teacher_reports_what_is_missing(tmp_path, name):
    values = tiny.values(tmp_path)
    values["method"]["name"] = name
    without = build_config({key: value for key, value in values.items() if key != "teacher"})
    no_sae = build_config(values | {"teacher": {"model": "somewhere"}})
    if name in NO_TEACHER:
        check_config(without, 1)
    else:
        with pytest.raises(UserError, match=re.escape(f"teacher is missing: method.name {name} (")):
            check_config(without, 1)
    if name in NO_TEACHER + NO_AUTOENCODER:
        check_config(no_sae, 1)
    else:
        with pytest.raises(UserError, match=r"teacher\.sae is missing"):
            check_config(no_sae, 1)


@pytest.mark.parametrize(
    ("method", "problem"),
    [
        ({"name": "ntp", "mix": "predicted"}, "Use method.mix=pause or method.mix=nothing"),
        ({"name": "predict-only", "concept_weight": 0.0}, "Use method.predict=nothing"),
        ({"name": "cocomix", "mix": "pause", "concept_weight": 0.0}, "Use method.predict=nothing"),
        ({"name": "add", "interleave_every": 2}, "has placement add. Use 1"),
        ({"name": "predict-only", "interleave_every": 2}, "mixes nothing in. Use 1"),
        ({"name": "cocomix", "interleave_every": 17}, "is not below model.context. Nearest valid: 15"),
        ({"name": "random", "label_sign": "negative"}, "method.label_source is random. Use positive"),
        ({"name": "pause", "insertion_layer": 3}, "Nearest valid: 2"),
        ({"name": "cocomix", "num_kept": 63}, "Nearest valid: 62"),
        ({"name": "coco"}, "name"),
    ],
    ids=str,
)
def test_a_composition_that_cannot_be_is_refused_with_what_can(tmp_path, method, problem):
    with pytest.raises(UserError) as caught:
        check_config(tiny.config(tmp_path, method=method), 1)
    assert any(problem in line for line in caught.value.problems)


def test_slots_that_a_tensor_ranks_positions_do_not_divide_into_are_refused(tmp_path):
    config = tiny.config(tmp_path, method={"interleave_every": 3}, parallel={"tensor": 2})
    with pytest.raises(UserError, match=r"interleave_every 3 does not divide the 8 .* Nearest valid: 2, or para"):
        check_config(config, 2)
    check_config(tiny.config(tmp_path, method={"interleave_every": 3}, parallel={"tensor": 2, "sequence": False}), 2)


def test_a_hidden_state_of_another_width_than_the_teachers_is_refused(folder):
    config = tiny.config(folder, method={"name": "direct-hidden", "target_size": 32})
    with pytest.raises(UserError, match=r"method\.target_size is 32, .* Nearest valid: 24"):
        open_inputs(config, "cpu")


@pytest.mark.parametrize("name", ["kd", "direct-hidden"])
def test_a_teacher_that_reads_fewer_tokens_than_the_student_is_refused_unless_windowed(folder, name):
    sections = {"model": {"context": 32}, "method": {"name": name}}
    with pytest.raises(UserError, match=r"the teacher reads 16 tokens"):
        open_inputs(tiny.config(folder, **sections), "cpu")
    open_inputs(tiny.config(folder, **sections, teacher={"windowed": True}), "cpu")


def test_the_table_of_costs_in_the_docs_is_what_is_counted(root):
    table = (root / "docs/methods.md").read_text().partition("<!-- costs -->")[2].partition("<!-- /costs -->")[0]
    rows = re.findall(r"^\| `(.+?)` \| (.+) \|$", table, re.M)
    assert len(rows) == 10
    for row, cells in rows:
        override = f"method.{row}" if "=" in row else f"method.name={row}"
        for recipe, cell in zip(("69m", "386m", "1.38b"), cells.split(" | "), strict=True):
            path = root / f"configs/{recipe}.yaml"
            costs = [student_flops(load_config(path, [each])) for each in (override, "method.name=ntp")]
            assert f"{costs[0] / costs[1]:.2f}" == cell, (row, recipe)
