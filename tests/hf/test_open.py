"""One opener: what a folder holds decides the class, and what does not fit its config is never filled with noise."""

import json

import pytest
import torch
from external_checkpoints import huggingface_model
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import tiny
from megacocomix.errors import UserError
from megacocomix.hf.configuration_cocomix import METHOD, SIZES
from megacocomix.hf.export import export_hf
from megacocomix.hf.modeling_cocomix import CocomixForCausalLM
from megacocomix.hf.open import open_model

TOKENS = torch.arange(12).view(2, 6)


def change_weights(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("method", ["ntp", "cocomix", "kd+pause"])
def test_an_exported_folder_is_opened_as_our_class_with_the_same_weights(tmp_path, method):
    loaded = tiny.loaded(name=method)
    export_hf(loaded, tmp_path / "out", "gpt2")
    opened = open_model(tmp_path / "out")
    assert type(opened.model) is CocomixForCausalLM and not opened.model.training
    assert (opened.path, opened.config, len(opened.sha256)) == (tmp_path / "out", None, 64)
    torch.testing.assert_close(opened.model(TOKENS).logits, loaded.model(TOKENS)[0], rtol=1e-5, atol=1e-5)


def test_gpt2_is_our_class_and_one_that_our_modules_cannot_run_keeps_its_own(tmp_path):
    huggingface_model().save_pretrained(tmp_path / "tied")
    assert type(open_model(tmp_path / "tied").model) is CocomixForCausalLM
    untied = GPT2LMHeadModel(
        GPT2Config(vocab_size=97, n_positions=16, n_embd=32, n_layer=2, n_head=2, tie_word_embeddings=False)
    ).eval()
    untied.save_pretrained(tmp_path / "untied")
    opened = open_model(tmp_path / "untied")
    assert type(opened.model) is GPT2LMHeadModel
    torch.testing.assert_close(opened.model(TOKENS).logits, untied(TOKENS).logits, rtol=0, atol=0)


def test_another_architecture_is_opened_by_transformers(tmp_path):
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=64, max_position_embeddings=16, **shape)).eval()
    llama.save_pretrained(tmp_path / "llama")
    opened = open_model(tmp_path / "llama")
    assert opened.context == 16
    torch.testing.assert_close(opened.model(TOKENS).logits, llama(TOKENS).logits, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda t: t.pop("transformer.h.1.mlp.c_fc.bias"), "lacks transformer.h.1.mlp.c_fc.bias"),
        (lambda t: t.update({"transformer.h.9.ln_1.bias": torch.zeros(32)}), "holds transformer.h.9.ln_1.bias"),
    ],
    ids=["missing", "extra"],
)
def test_weights_that_do_not_fit_are_refused_without_a_table(tmp_path, capfd, change, what):
    huggingface_model().save_pretrained(tmp_path / "hf")
    change_weights(tmp_path / "hf", change)
    capfd.readouterr()
    with pytest.raises(UserError, match=what):
        open_model(tmp_path / "hf")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("key", "value", "what"),
    [
        ("n_head", 5, "num_heads 5 does not divide hidden_size 32"),
        ("insertion_layer", 9, "insertion_layer 9 is not one of the 3 blocks"),
        ("num_kept", 99, "num_kept 99 exceeds num_concepts"),
        ("interleave_every", 99, "interleave_every 99 is not below model.context"),
    ],
)
def test_sizes_that_do_not_fit_each_other_are_refused(tmp_path, key, value, what):
    export_hf(tiny.loaded(), tmp_path / "out", "gpt2")
    file = tmp_path / "out/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    with pytest.raises(UserError, match=what) as error:
        open_model(tmp_path / "out")
    assert all(str(tmp_path / "out") in problem for problem in error.value.problems)


def change_config(folder, change):
    file = folder / "config.json"
    values = json.loads(file.read_text())
    change(values)
    file.write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("values", "what"),
    [
        ({"cocomix_format": 2}, "cocomix_format 2; 1 can be read"),
        ({"predict": "words"}, "predict"),
        ({"predict": None}, "lacks predict"),
        ({"placement": "ad"}, "placement"),
        ({"num_kept": "4"}, "num_kept"),
        ({"num_kept": 4.0}, "num_kept"),
        ({"n_layer": "3"}, "num_layers"),
        ({"quantization_config": {"load_in_8bit": True}}, "quantization_config"),
        ({"activation_function": "relu"}, "activation_function is 'relu'"),
    ],
)
def test_a_value_that_we_do_not_know_is_refused_by_its_name(tmp_path, values, what):
    export_hf(tiny.loaded(), tmp_path / "out", "gpt2")
    change_config(tmp_path / "out", lambda config: config.update(values))
    with pytest.raises(UserError, match=what) as error:
        open_model(tmp_path / "out")
    assert len(error.value.problems) == 1 and str(tmp_path / "out") in error.value.problems[0]


@pytest.mark.parametrize("key", [*METHOD, *SIZES])
def test_a_missing_option_or_size_is_refused_by_its_name(tmp_path, key):
    export_hf(tiny.loaded(), tmp_path / "out", "gpt2")
    change_config(tmp_path / "out", lambda config: config.pop(key))
    with pytest.raises(UserError, match=key):
        open_model(tmp_path / "out")


def test_a_folder_of_the_first_exports_opens_as_what_it_was(tmp_path):
    export_hf(tiny.loaded(), tmp_path / "out", "gpt2")
    expected = open_model(tmp_path / "out").model(TOKENS).logits
    later = ("cocomix_format", "predict", "mix", "placement", "interleave_every", "target_size")
    change_config(tmp_path / "out", lambda config: [config.pop(key) for key in later])
    assert torch.equal(open_model(tmp_path / "out").model(TOKENS).logits, expected)
    assert torch.equal(CocomixForCausalLM.from_pretrained(tmp_path / "out").eval()(TOKENS).logits, expected)


@pytest.mark.parametrize("content", [b"\xff\xfe", b"a: [", b"a: 1\na: 2"], ids=["binary", "broken", "twice"])
def test_an_unreadable_config_yaml_one_folder_up_is_ignored(tmp_path, content):
    huggingface_model().save_pretrained(tmp_path / "hf")
    (tmp_path / "config.yaml").write_bytes(content)
    assert type(open_model(tmp_path / "hf").model) is CocomixForCausalLM


def test_weights_of_another_architecture_that_do_not_fit_are_refused(tmp_path):
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=64, **shape)).save_pretrained(tmp_path / "llama")
    change_weights(tmp_path / "llama", lambda tensors: tensors.pop("model.layers.1.input_layernorm.weight"))
    with pytest.raises(UserError, match=r"lacks model.layers.1.input_layernorm.weight: config.json and weights"):
        open_model(tmp_path / "llama")
