"""The config of exported folders repeats our method options, because its file must not import this package."""

import json

import pytest

from megacocomix.checkpoint.hf_names import COCOMIX_FORMAT
from megacocomix.config.method import ARCHITECTURE, MethodConfig
from megacocomix.hf.configuration_cocomix import FORMAT, METHOD, SIZES, VALID, CocomixConfig
from megacocomix.hf.modeling_cocomix import CocomixForCausalLM

OTHER = {
    "predict": "hidden",
    "mix": "pause",
    "placement": "add",
    "interleave_every": 3,
    "insertion_layer": 2,
    "num_concepts": 64,
    "num_kept": 8,
    "target_size": 24,
}


def test_options_defaults_and_valid_values_are_those_of_the_method_section():
    assert tuple(METHOD) == ARCHITECTURE
    method = MethodConfig(name="cocomix").resolved()
    assert {key: getattr(method, key) for key in METHOD} == METHOD
    assert {key: getattr(CocomixConfig(), key) for key in METHOD} == METHOD
    for key, values in VALID.items():
        for value in values:
            MethodConfig(name="cocomix", **{key: value})


@pytest.mark.parametrize("values", [{}, OTHER], ids=["defaults", "others"])
def test_options_survive_dicts_and_files(tmp_path, values):
    config, expected = CocomixConfig(**values), METHOD | values
    config.save_pretrained(tmp_path)
    for again in (
        CocomixConfig.from_dict(config.to_dict()),
        CocomixConfig(**config.to_diff_dict()),
        CocomixConfig.from_pretrained(tmp_path),
    ):
        assert {key: getattr(again, key) for key in METHOD} == expected
        assert {key: again.to_dict()[key] for key in METHOD} == expected
    assert CocomixConfig.from_dict(config.to_dict(), num_kept=5).num_kept == 5


@pytest.mark.parametrize("key", [*METHOD, *SIZES])
def test_a_file_that_lacks_an_option_or_a_size_is_refused_by_its_name(tmp_path, key):
    CocomixConfig().save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    del values[key]
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=f"lacks {key}"):
        CocomixConfig.from_pretrained(tmp_path)


def test_a_file_of_the_first_exports_has_the_defaults_of_the_options_it_does_not_record():
    first = {key: value for key, value in CocomixConfig(num_kept=5).to_dict().items() if key not in METHOD}
    del first["cocomix_format"]
    options = {"insertion_layer": 2, "num_concepts": 64, "num_kept": 5}
    config = CocomixConfig.from_dict(first | options)
    assert {key: getattr(config, key) for key in METHOD} == METHOD | options


@pytest.mark.parametrize(
    ("values", "what"),
    [
        ({"cocomix_format": 2}, "cocomix_format 2; this code reads 1"),
        ({"predict": "words"}, "predict 'words' is none of"),
        ({"mix": None}, "mix None is not of type str"),
        ({"placement": "ad"}, "placement 'ad' is none of"),
        ({"num_kept": "8"}, "num_kept '8' is not of type int"),
        ({"interleave_every": 1.0}, "interleave_every 1.0 is not of type int"),
        ({"interleave_every": 0}, "interleave_every 0 must be from 1"),
        ({"n_layer": "12"}, "n_layer '12' is not of type int"),
        ({"hidden_size": 100, "n_head": 12}, "n_embd 100 is not divisible"),
        ({"activation_function": "relu"}, "activation_function is 'relu'"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
        ({"n_inner": 5}, "n_inner is 5"),
    ],
)
def test_a_value_that_the_model_cannot_have_is_refused_wherever_it_is_given(tmp_path, values, what):
    with pytest.raises(ValueError, match=what):
        CocomixConfig(**values)
    with pytest.raises(ValueError, match=what):
        CocomixConfig.from_dict(CocomixConfig().to_dict() | values)
    config = CocomixConfig()
    for key, value in values.items():
        setattr(config, key, value)
    with pytest.raises(ValueError, match=what):
        CocomixForCausalLM(config)


def test_the_format_is_the_one_that_is_exported():
    assert FORMAT == COCOMIX_FORMAT == CocomixConfig().to_dict()["cocomix_format"]
