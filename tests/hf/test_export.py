import json

import pytest
import torch
from transformers import GPT2LMHeadModel

import tiny
from megacocomix.checkpoint.hf_names import from_hf, to_hf
from megacocomix.checkpoint.open import LoadedModel, load_model
from megacocomix.config.schema import ModelConfig
from megacocomix.errors import UserError
from megacocomix.hf.export import export_hf
from megacocomix.model.gpt2 import GPT2, initialise

SHAPE = ModelConfig(**tiny.SHAPE, dropout=0.0)


def loaded(method=None):
    model = GPT2(SHAPE, method)
    initialise(model, 0)
    return LoadedModel(model, SHAPE, None, "", "source")


def test_transformers_computes_the_same_logits_and_we_read_it_back_to_the_bit(tmp_path):
    source = loaded()
    assert export_hf(source, tmp_path / "hf", "gpt2").logit < 1e-5
    back = load_model(tmp_path / "hf").model.state_dict()
    for name, tensor in source.model.state_dict().items():
        assert torch.equal(tensor, back[name]), name


def test_in_bf16_transformers_reads_the_rounded_weights(tmp_path):
    source = loaded()
    parity = export_hf(source, tmp_path / "hf", "gpt2", "bfloat16")
    assert parity.logit < 1e-5 and parity.rounding != 0
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path / "hf")
    assert theirs.dtype == torch.bfloat16
    assert torch.equal(theirs.transformer.wte.weight, source.model.embed.tokens.weight.bfloat16())


def test_every_parameter_goes_to_the_published_names_and_back():
    model = loaded(tiny.method()).model
    theirs = dict(to_hf(name, p.detach(), SHAPE.num_heads) for name, p in model.named_parameters())
    assert "transformer.compress_layer.weight" in theirs
    for name, parameter in model.named_parameters():
        assert torch.equal(from_hf(name, theirs.__getitem__, SHAPE.num_heads), parameter), name


def test_a_model_that_would_not_be_the_same_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr("megacocomix.checkpoint.hf_names.LAYER_NORM_EPS", 1e-2)
    with pytest.raises(UserError, match="differs by"):
        export_hf(loaded(), tmp_path / "hf", "gpt2")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_not_overwritten(tmp_path):
    (tmp_path / "hf").mkdir()
    with pytest.raises(UserError, match="exists already"):
        export_hf(loaded(), tmp_path / "hf", "gpt2")


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"model_type": "llama"}, "only gpt2"),
        ({"activation_function": "relu"}, "activation_function"),
        ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon"),
        ({"n_embd": 40}, r"is of shape \[97, 32\], expected \[97, 40\]"),
        ({"n_layer": 4}, r"lacks transformer\.h\.3"),
    ],
)
def test_an_external_folder_that_we_would_misread_is_refused(tmp_path, change, what):
    export_hf(loaded(), tmp_path / "hf", "gpt2")
    file = tmp_path / "hf/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(UserError, match=what):
        load_model(tmp_path / "hf")


def test_folders_without_a_model_are_refused(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        load_model(tmp_path / "none")
    with pytest.raises(UserError, match="holds no model"):
        load_model(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match="no checkpoint yet"):
        load_model(tmp_path)
