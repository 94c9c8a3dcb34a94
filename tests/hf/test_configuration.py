"""The config of exported folders repeats our method options, because its file must not import this package."""

import pytest

from megacocomix.config.method import ARCHITECTURE, MethodConfig
from megacocomix.hf.configuration_cocomix import METHOD, VALID, CocomixConfig

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
