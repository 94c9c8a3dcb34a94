"""Exported folders of every preset: the same logits, also with a cache or padding, and the same model read back."""

import pytest
import torch
from transformers import GPT2LMHeadModel

import tiny
from megacocomix.checkpoint.convert import write_native, write_reference
from megacocomix.checkpoint.open import LoadedModel, load_model, open_source
from megacocomix.config.method import PRESETS
from megacocomix.config.schema import ModelConfig
from megacocomix.errors import UserError
from megacocomix.hf.export import export_hf
from megacocomix.hf.modeling_cocomix import CocomixForCausalLM
from megacocomix.model.gpt2 import GPT2, initialise

SHAPE = ModelConfig(**tiny.SHAPE | {"context": 40}, dropout=0.0)
METHODS = {name: {"name": name} for name in PRESETS if name not in ("cocomix", "cocomix+kd", "activation", "random")}
METHODS |= {f"every {n}": {"name": "cocomix", "interleave_every": n} for n in (2, 3, 7)}
METHODS["pause every 4"] = {"name": "pause", "interleave_every": 4}
METHODS["hidden every 3"] = {"name": "direct-hidden", "interleave_every": 3}
PLAIN = ("ntp", "kd")


@pytest.fixture(scope="module", params=METHODS)
def pair(request, tmp_path_factory):
    """Our model, its exported folder, and the model that transformers loads from it."""
    model = GPT2(SHAPE, tiny.method(**METHODS[request.param]))
    initialise(model, 0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(5) if parameter.dim() > 1 else parameter.add_(0.1 * len(name) / 20)
    folder = tmp_path_factory.mktemp("methods") / "out"
    parity = export_hf(LoadedModel(model.eval(), SHAPE, None, "", "source"), folder, "gpt2")
    assert parity.logit < 1e-5
    model_class = GPT2LMHeadModel if request.param in PLAIN else CocomixForCausalLM
    return model, folder, model_class.from_pretrained(folder).eval()


def tokens(*shape):
    return torch.randint(1, SHAPE.vocab_size, shape, generator=torch.Generator().manual_seed(0))


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 9, 40])
def test_logits_are_those_of_our_model(pair, length):
    ours, _, theirs = pair
    close(theirs(tokens(2, length)).logits, ours(tokens(2, length))[0])


@torch.no_grad()
def test_a_cache_filled_in_chunks_changes_nothing(pair):
    ours, _, theirs = pair
    token_ids, cache, found = tokens(2, 40), None, []
    for start, stop in ((0, 5), (5, 6), (6, 7), (7, 20), (20, 40)):
        result = theirs(token_ids[:, start:stop], past_key_values=cache, use_cache=True)
        cache = result.past_key_values
        found.append(result.logits)
    close(torch.cat(found, 1), ours(token_ids)[0])


@torch.no_grad()
def test_padding_on_the_left_changes_nothing(pair):
    ours, _, theirs = pair
    if isinstance(theirs, GPT2LMHeadModel):
        pytest.skip("transformers' own model")
    token_ids = tokens(2, 20)
    padded = torch.cat((torch.zeros(2, 6, dtype=torch.long), token_ids), dim=1)
    mask = (torch.arange(26) >= 6).long().expand(2, -1)
    close(theirs(padded, attention_mask=mask).logits[:, 6:], ours(token_ids)[0])


@torch.no_grad()
def test_a_folder_read_back_is_the_same_model_to_the_bit(pair, tmp_path):
    ours, folder, _ = pair
    difference = write_native(open_source(folder), tmp_path / "native", "gpt2", {})
    assert difference.logit < 1e-4
    back = load_model(tmp_path / "native").model
    for name, parameter in ours.named_parameters():
        assert torch.equal(parameter, dict(back.named_parameters())[name]), name
    assert torch.equal(back(tokens(2, 30))[0], ours(tokens(2, 30))[0])


def test_what_the_published_code_has_not_is_not_written_in_its_form(pair, request, tmp_path):
    if request.node.callspec.params["pair"] == "mix-only":
        pytest.skip("the published module, trained otherwise")
    with pytest.raises(UserError, match="--to hf"):
        write_reference(open_source(pair[1]), tmp_path / "reference")
    assert not list(tmp_path.iterdir())
