import textwrap

import pytest

from megacocomix.config.load import build_config, dump_config, load_config
from megacocomix.config.rules import check_config, layout_warnings
from megacocomix.config.schema import Config, section_type
from megacocomix.config.yaml_text import parse_yaml
from megacocomix.errors import UserError
from megacocomix.model.flops import student_flops
from megacocomix.training.optimizer import learning_rate

# The paper's appendix A: layers, width, control's width, insertion layer, lr, warm-up, steps, windows per step.
PAPER = {
    "69m": (8, 512, 624, 3, 6e-4, 130, 40000, 512),
    "386m": (24, 1024, 1072, 5, 3e-4, 130, 40000, 512),
    "1.38b": (24, 2048, 2096, 5, 2e-4, 65, 20000, 1024),
}
ACTIVATED = {"69m": (68.3, 69.4), "386m": (388.4, 386.3), "1.38b": (1380.8, 1373.4)}  # millions, method and control
# FLOPs per token, method / control. They would be 1.36, 1.82 and 1.81 if the last block computed all positions.
FORWARD_RATIO = {"69m": 1.30, "386m": 1.79, "1.38b": 1.78}


@pytest.fixture
def recipe(tmp_path, root):
    def write(change=lambda text: text):
        path = tmp_path / "recipe.yaml"
        path.write_text(change((root / "configs/tiny.yaml").read_text()))
        return path

    return write


def activated_parameters(config):
    """Parameters that one token uses, as the paper counts them: num_kept columns of the compress layer (appendix A)."""
    model, width, method = config.model, config.model.hidden_size, config.method
    rows = method.num_concepts + method.num_kept if method.predict == "concepts" else 0
    return model.num_layers * (12 * width**2 + 13 * width) + (model.vocab_size + model.context + 2 + rows) * width


def problems(path, *overrides, world=2):
    with pytest.raises(UserError) as caught:
        check_config(load_config(path, list(overrides)), world)
    return caught.value.problems


@pytest.mark.parametrize(
    ("name", "world"),
    [
        ("tiny", 1),
        ("tiny", 2),
        ("teacher", 1),
        ("teacher", 2),
        ("69m", 1),
        ("69m", 8),
        ("386m", 64),
        ("386m-openwebmath", 64),
        ("1.38b", 128),
    ],
)
def test_every_shipped_recipe_is_valid(root, name, world):
    check_config(load_config(root / f"configs/{name}.yaml"), world)
    check_config(load_config(root / f"configs/{name}.yaml", ["method.name=ntp"]), world)


@pytest.mark.parametrize("name", PAPER)
def test_the_recipes_carry_the_papers_numbers(root, name):
    layers, width, control, insertion, lr, warmup, steps, batch = PAPER[name]
    config = load_config(root / f"configs/{name}.yaml")
    model, method, optimizer, training = config.model, config.method, config.optimizer, config.training
    assert (model.num_layers, model.hidden_size, method.insertion_layer) == (layers, width, insertion)
    assert (optimizer.lr, optimizer.min_lr) == (lr, pytest.approx(lr / 10))
    assert (optimizer.warmup_steps, training.steps, training.global_batch) == (warmup, steps, batch)
    assert (method.num_concepts, method.num_kept, method.num_labels) == (32768, 32, 4)
    ntp = load_config(root / f"configs/{name}.yaml", ["method.name=ntp"])
    assert ntp.model.hidden_size == control
    assert [round(activated_parameters(c) / 1e6, 1) for c in (config, ntp)] == list(ACTIVATED[name])
    assert round(student_flops(config) / student_flops(ntp), 2) == FORWARD_RATIO[name]


def test_the_resolved_config_reads_back_the_same(root, tmp_path):
    for overrides in (
        [],
        ["method.name=ntp"],
        ["method.match_reference=true"],
        ["method.name=ntp", "model.hidden_size=64"],
    ):
        config = load_config(root / "configs/tiny.yaml", overrides)
        path = tmp_path / "resolved.yaml"
        path.write_text(dump_config(config))
        assert load_config(path) == config


def test_a_width_on_the_command_line_wins_over_the_controls(root):
    config = load_config(root / "configs/tiny.yaml", ["method.name=ntp", "model.hidden_size=64"])
    assert config.model.hidden_size == 64


@pytest.mark.parametrize(("value", "width"), [("96", 96), ("null", 1024)])
def test_the_controls_width_can_be_set_on_the_command_line(root, value, width):
    config = load_config(root / "configs/386m.yaml", ["method.name=ntp", f"model.control_hidden_size={value}"])
    assert config.model.hidden_size == width


def test_match_reference_switches_every_difference_and_a_written_value_wins(root):
    ours = load_config(root / "configs/tiny.yaml")
    assert (ours.model.dropout, ours.method.mask_unlabelled, ours.optimizer.decay) == (0.0, True, "matrices")
    theirs = load_config(root / "configs/tiny.yaml", ["method.match_reference=true"])
    assert (theirs.model.dropout, theirs.method.mask_unlabelled, theirs.optimizer.decay) == (0.1, False, "all")
    mixed = load_config(root / "configs/tiny.yaml", ["method.match_reference=true", "model.dropout=0.0"])
    assert mixed.model.dropout == 0.0


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "1.e-4", "0.0001", "1e+2", ".5e1"])
def test_scientific_notation_is_a_number(root, text):
    assert parse_yaml(text, "text") == float(text)
    assert load_config(root / "configs/tiny.yaml", [f"optimizer.lr={text}"]).optimizer.lr == float(text)


def test_an_unknown_key_names_the_nearest(recipe):
    found = problems(recipe(), "optimizer.warmup=3")[0]
    assert "optimizer.warmup is not an option. Did you mean warmup_steps?" in found
    assert "trainning is not an option. Did you mean training?" in problems(recipe(), "trainning.steps=3")[0]


def test_all_problems_come_in_one_report(recipe):
    found = problems(
        recipe(), "training.steps=-1", "model.dropout=2", "optimizer.lr=fast", "parallel.zero=4", "data.x=1"
    )
    assert len(found) == 5
    assert [key for key in ("steps", "dropout", "lr", "zero", "data.x") if not any(key in line for line in found)] == []


def test_values_are_not_coerced_silently(recipe):
    assert "training.steps" in problems(recipe(), "training.steps=yes")[0]
    assert "training.steps" in problems(recipe(), "training.steps='12'")[0]
    assert "training.steps" in problems(recipe(), "training.steps=1.5")[0]


@pytest.mark.parametrize(
    ("override", "what"),
    [
        ("model.num_heads=3", "Nearest valid: 2"),
        ("method.insertion_layer=4", "Nearest valid: 3"),
        ("method.num_kept=5000", "Nearest valid: 2048"),
        ("teacher=null", "teacher is missing"),
        ("optimizer.min_lr=1", "Nearest valid: 0.003"),
        ("optimizer.warmup_steps=9999", "warmup_steps"),
        ("training.stop_after=9999", "stop_after"),
        ("training.global_batch=17", "Nearest valid: 16"),
        ("training.micro_batch=32", "Nearest valid: 64"),
    ],
)
def test_rules_between_options_name_a_valid_value(recipe, override, what):
    found = problems(recipe(), override)
    assert len(found) == 1
    assert what in found[0]


@pytest.mark.parametrize(
    ("world", "overrides", "what"),
    [
        (2, "parallel.zero=0 training.precision=bf16", "Use parallel.zero=1"),
        (2, "parallel.zero=0 parallel.offload_optimizer=true", "Use parallel.zero=1, 2 or 3"),
        (2, "parallel.zero=2 parallel.pipeline=2", "Use parallel.zero=3 with parallel.reshard_after_forward=false"),
        (6, "parallel.tensor=4", "Nearest valid: tensor 3 × pipeline 1 × data 2"),
        (2, "parallel.tensor=2 model.num_heads=1", "does not divide model.num_heads 1. Nearest valid: 1"),
        (4, "parallel.tensor=4 model.num_heads=2", "Nearest valid: 2"),
        (4, "parallel.tensor=4 model.context=250", "Nearest valid: model.context=248, or parallel.sequence=false"),
        (2, "parallel.sequence=true", "Use false"),
        (4, "parallel.tensor=4 method.num_concepts=3 method.num_kept=2", "Nearest valid: parallel.tensor=3"),
        (2, "parallel.tensor=2 parallel.sequence=false model.dropout=0.1", "Use parallel.sequence=true"),
        (8, "parallel.pipeline=8", "8 stages, but model.num_layers is 4. Nearest valid: parallel.pipeline=4"),
        (4, "parallel.pipeline=4 parallel.virtual_stages=2 training.micro_batch=2", "valid: parallel.pipeline=2"),
        (1, "parallel.virtual_stages=2", "parallel.pipeline is 1. Use 1"),
        (2, "parallel.pipeline=2 parallel.zero=1 parallel.reshard_after_forward=false", "Use null"),
        (1, "parallel.split_points=[2]", "parallel.pipeline is 1. Use null"),
        (2, "parallel.pipeline=2 parallel.split_points=[4]", "Nearest valid: null"),
        (2, "parallel.pipeline=2 parallel.split_points=[1,2]", "Nearest valid: null"),
        (4, "parallel.pipeline=4 parallel.split_points=[2,1,3]", "Nearest valid: null"),
        (2, "parallel.pipeline=2 parallel.virtual_stages=2 training.micro_batch=8", "training.global_batch=16"),
        (8, "parallel.tensor=2 training.micro_batch=3", "× 4 data ranks. Nearest valid: 12"),
    ],
)
def test_a_layout_that_cannot_run_is_refused_with_one_that_can(recipe, world, overrides, what):
    found = problems(recipe(), *overrides.split(), world=world)
    assert len(found) == 1
    assert what in found[0]


def test_everything_that_does_not_divide_is_reported_at_once(recipe):
    overrides = (
        "parallel.tensor=3 parallel.pipeline=5 model.context=100 training.micro_batch=7 parallel.split_points=[9]"
    )
    found = problems(recipe(), *overrides.split(), world=8)
    assert len(found) == 6
    named = ["the 8 processes", "num_heads 4", "model.context 100", "global_batch 8", "5 stages", "split_points [9]"]
    for what in named:
        assert any(what in line for line in found), what


def test_fewer_micro_batches_than_stages_are_warned_of_with_the_bubble(recipe):
    config = load_config(recipe(), ["parallel.pipeline=4", "training.micro_batch=4"])
    check_config(config, 4)
    (warning,) = layout_warnings(config, 4)
    assert "2 micro-batches for 4 pipeline stages: each rank waits 60%" in warning
    assert not list(layout_warnings(load_config(recipe(), ["parallel.pipeline=2"]), 2))


def test_null_defaults_of_the_layout_follow_it(recipe):
    parallel = load_config(recipe(), ["parallel.tensor=2", "parallel.pipeline=2"]).parallel
    assert (parallel.sequence, parallel.reshard_after_forward) == (True, False)
    parallel = load_config(recipe()).parallel
    assert (parallel.sequence, parallel.reshard_after_forward) == (False, True)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda text: text + "run: twice\n", "run is given twice"),
        (lambda text: text + "run2: [\n", "not valid YAML"),
        (lambda text: "just a line", "is not a config"),
        (lambda text: text.replace("22}", "!!bool maybe}"), "not valid YAML"),
        (lambda text: "[" * 3000, "not valid YAML"),
        (lambda text: "run: a\x07b", "not valid YAML"),
        (lambda text: "", "is not a config"),
        (lambda text: textwrap.dedent("run: x\n"), "model is missing"),
    ],
)
def test_a_malformed_recipe_is_one_clear_line(recipe, change, what):
    assert any(what in line for line in problems(recipe(change)))


@pytest.mark.parametrize("override", ["steps=3", "training.steps", "=3", "run.x=3"])
def test_a_malformed_override_is_one_clear_line(recipe, override):
    assert len(problems(recipe(), override)) == 1


def test_a_missing_recipe_is_one_clear_line(tmp_path):
    assert "cannot be read" in problems(tmp_path / "none.yaml")[0]


def test_a_config_is_immutable(root):
    with pytest.raises(ValueError, match="frozen"):
        load_config(root / "configs/tiny.yaml").training.steps = 3


def test_every_option_is_documented():
    for name, field in Config.model_fields.items():
        section = section_type(name)
        assert section.__doc__ if section else field.description, name
        for key, option in section.model_fields.items() if section else ():
            assert option.description, f"{name}.{key}"


def test_learning_rate_follows_the_references_curve(root):
    config = load_config(root / "configs/69m.yaml")
    rate = [learning_rate(step, config.optimizer, 40000) for step in (0, 65, 130, 20065, 40000)]
    assert rate == pytest.approx([0, 3e-4, 6e-4, 3.3e-4, 6e-5])


def test_build_config_reports_under_the_name_it_was_given():
    with pytest.raises(UserError, match="somewhere: model is missing"):
        build_config({"run": "x"}, "somewhere")
