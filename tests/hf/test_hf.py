"""The exported CoCoMix folder: it is the same model, needs no package of ours, and its cache changes no result."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import tiny
from megacocomix.checkpoint.hf_names import load_hf_weights
from megacocomix.checkpoint.open import LoadedModel
from megacocomix.config.schema import ModelConfig
from megacocomix.errors import UserError
from megacocomix.hf import modeling_cocomix
from megacocomix.hf.configuration_cocomix import CocomixConfig
from megacocomix.hf.export import export_hf
from megacocomix.hf.modeling_cocomix import CocomixForCausalLM
from megacocomix.model.gpt2 import GPT2, initialise

CONTEXT = 340
SHAPE = ModelConfig(**tiny.SHAPE | {"context": CONTEXT}, dropout=0.0)
FIRST, SECOND, LAST = 0, 1, SHAPE.num_layers - 1
EVERYWHERE = pytest.mark.parametrize("exported", [FIRST, SECOND, LAST], indirect=True)
# GPT-2's end of text is none of the tiny vocabulary.
GENERATION = {"pad_token_id": 0, "eos_token_id": None, "return_dict_in_generate": True, "output_logits": True}

ALONE = """
import sys
sys.modules["megacocomix"] = None  # an import of it fails, installed or not
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
assert type(model).__module__.startswith("transformers_modules.")
tokens = load_file(sys.argv[2])["tokens"]
save_file({"logits": model(tokens).logits.detach().contiguous()}, sys.argv[3])
"""


def student(insertion_layer):
    """A random student whose next tokens depend on much of what it read."""
    model = GPT2(SHAPE, tiny.method(insertion_layer=insertion_layer))
    initialise(model, 0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(5) if parameter.dim() > 1 else parameter.add_(0.1 * len(name) / 20)
    return LoadedModel(model.eval(), SHAPE, None, "", "source")


def tokens(*shape, seed=0):
    """Random tokens, none of them 0: generation would take that for padding."""
    return torch.randint(1, SHAPE.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def generate(model, prompts, **options):
    """→ (tokens [B, N], logits [B, new, V])."""
    result = model.generate(prompts, **GENERATION | options)
    return result.sequences, torch.stack(result.logits, 1)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}

    def folder(insertion_layer):
        if insertion_layer not in made:
            made[insertion_layer] = tmp_path_factory.mktemp("hf") / "out"
            export_hf(student(insertion_layer), made[insertion_layer], "gpt2")
        return made[insertion_layer]

    return folder


@pytest.fixture
def exported(request, folders):
    return CocomixForCausalLM.from_pretrained(folders(getattr(request, "param", SECOND))).eval()


def logits_without_this_package(folder, token_ids, tmp_path):
    """In a fresh process that has only transformers and torch."""
    save_file({"tokens": token_ids.contiguous()}, tmp_path / "tokens")
    command = [sys.executable, "-I", "-c", ALONE, folder, tmp_path / "tokens", tmp_path / "logits"]
    subprocess.run(command, check=True, env=os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules")})
    return load_file(tmp_path / "logits")["logits"]


def test_a_fresh_process_without_this_package_computes_the_same_logits(folders, tmp_path):
    token_ids = tokens(2, CONTEXT)
    with torch.no_grad():
        expected, _ = student(SECOND).model(token_ids)
    close(logits_without_this_package(folders(SECOND), token_ids, tmp_path), expected)


def test_the_published_codes_weights_give_its_logits_from_the_exported_folder(request, tmp_path):
    golden = request.config.getoption("--golden")
    tensors = load_file(golden)
    with safe_open(golden, "pt") as file:
        case = json.loads(file.metadata()["case"])
    context, width = tensors["student.transformer.wpe.weight"].shape
    shape = ModelConfig(
        num_layers=case["s_layer"],
        hidden_size=width,
        num_heads=case["s_head"],
        context=context,
        vocab_size=case["vocab"],
        dropout=0.0,
    )
    method = tiny.method(num_concepts=case["latents"], num_kept=case["k"], insertion_layer=case["insert"])
    model = GPT2(shape, method)
    load_hf_weights(model, lambda name: tensors[f"student.{name}"], case["s_head"])
    export_hf(LoadedModel(model, shape, None, "", golden), tmp_path / "hf", "gpt2")
    written = load_file(tmp_path / "hf/model.safetensors")
    for name, tensor in written.items():
        assert torch.equal(tensor, tensors[f"student.{name}"]), name
    close(logits_without_this_package(tmp_path / "hf", tensors["input_ids"][0], tmp_path), tensors["logits"])


@EVERYWHERE
def test_logits_concept_logits_and_loss_are_those_of_our_model(exported):
    ours, token_ids = student(exported.config.insertion_layer).model, tokens(2, 50)
    with torch.no_grad():
        logits, concept_logits = ours(token_ids)
        result = exported(token_ids, labels=token_ids, output_concept_logits=True)
    close(result.logits, logits)
    close(result.concept_logits, concept_logits)
    close(result.loss, torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), token_ids[:, 1:].flatten()))


@EVERYWHERE
def test_a_cache_changes_nothing_over_300_tokens(exported):
    prompt, options = tokens(1, 12), {"max_new_tokens": 310, "do_sample": False}
    with_cache, logits = generate(exported, prompt, use_cache=True, **options)
    assert len(with_cache[0].unique()) > 10
    without_cache, expected = generate(exported, prompt, use_cache=False, **options)
    assert torch.equal(with_cache, without_cache)
    close(logits, expected)


def test_the_comparison_notices_the_mask_of_the_published_code(exported, monkeypatch):
    """Its cached decoding lets the two new slots attend to the first two keys: causal from the top left."""

    def from_the_top_left(keys, num_queries):
        return torch.ones(num_queries, keys.shape[1], dtype=torch.bool).tril()[None, None]

    monkeypatch.setattr(modeling_cocomix, "visible_slots", from_the_top_left)
    options = {"max_new_tokens": 5, "do_sample": False}
    _, logits = generate(exported, tokens(1, 12), use_cache=True, **options)
    _, expected = generate(exported, tokens(1, 12), use_cache=False, **options)
    assert (logits - expected).abs().max() > 0.01


def test_sampling_with_one_seed_gives_the_same_tokens_with_and_without_cache(exported):
    drawn = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        sequences, _ = generate(exported, tokens(2, 7), use_cache=use_cache, max_new_tokens=40, do_sample=True)
        drawn.append(sequences)
    assert torch.equal(*drawn)


@EVERYWHERE
@pytest.mark.parametrize("use_cache", [True, False])
def test_a_prompt_padded_on_the_left_is_continued_as_if_alone(exported, use_cache):
    lengths, options = (3, 11, 20), {"max_new_tokens": 20, "do_sample": False, "use_cache": use_cache}
    prompts = [tokens(1, length, seed=length) for length in lengths]
    pad = [torch.zeros(1, max(lengths) - length, dtype=torch.long) for length in lengths]
    batch = torch.cat([torch.cat(pair, 1) for pair in zip(pad, prompts, strict=True)])
    mask = torch.cat([torch.cat((p, torch.ones_like(t)), 1) for p, t in zip(pad, prompts, strict=True)])
    sequences, logits = generate(exported, batch, attention_mask=mask, **options)
    for row, prompt in enumerate(prompts):
        alone, expected = generate(exported, prompt, **options)
        assert torch.equal(sequences[row, -20:], alone[0, -20:])
        close(logits[row], expected[0])


@EVERYWHERE
def test_beam_search_finds_the_same_with_and_without_cache(exported):
    options = {"max_new_tokens": 25, "do_sample": False, "num_beams": 4}
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, :4] = 0
    found = [
        exported.generate(tokens(2, 9), attention_mask=mask, use_cache=use_cache, pad_token_id=0, **options)
        for use_cache in (True, False)
    ]
    assert torch.equal(*found)
    assert not torch.equal(found[0], exported.generate(tokens(2, 9), attention_mask=mask, max_new_tokens=25))


@EVERYWHERE
def test_the_cache_can_be_taken_up_again_and_cropped(exported):
    prompt = tokens(1, 10)
    plain, _ = generate(exported, prompt, max_new_tokens=30, do_sample=False)
    half = exported.generate(prompt, **GENERATION | {"max_new_tokens": 15, "do_sample": False})
    cache = half.past_key_values
    assert {cache.get_seq_length(layer) for layer in range(SHAPE.num_layers)} == {24}  # all but the last token
    whole, _ = generate(exported, half.sequences, past_key_values=cache, max_new_tokens=15, do_sample=False)
    assert torch.equal(whole, plain)
    # Guesses several tokens at a time, and crops those that it guessed wrong.
    looked_up, _ = generate(exported, prompt, max_new_tokens=30, do_sample=False, prompt_lookup_num_tokens=3)
    assert torch.equal(looked_up, plain)


def test_a_prompt_as_long_as_the_context_works_and_one_more_is_an_error(exported):
    sequences, logits = generate(exported, tokens(1, CONTEXT), max_new_tokens=1, do_sample=False)
    assert sequences.shape == (1, CONTEXT + 1)
    close(logits[0, 0], student(SECOND).model(tokens(1, CONTEXT))[0][0, -1].detach())
    with pytest.raises(ValueError, match=f"{CONTEXT + 1} tokens do not fit the context of {CONTEXT}"):
        generate(exported, sequences, max_new_tokens=1)
    with pytest.raises(ValueError, match="do not fit"):
        generate(exported, tokens(1, CONTEXT), max_new_tokens=2, do_sample=False)


def test_what_the_model_cannot_do_is_a_clear_error(exported):
    with pytest.raises(ValueError, match=r"attention_mask is \[1, 3\], not \[1, 5\]"):
        exported(tokens(1, 5), attention_mask=torch.ones(1, 3))
    with pytest.raises(ValueError, match="static caches are not supported"):
        generate(exported, tokens(1, 5), max_new_tokens=3, cache_implementation="static")
    for change in ({"n_head": 5}, {"insertion_layer": 12}, {"num_kept": 0}):
        with pytest.raises(ValueError, match=next(iter(change))):
            CocomixConfig(**change)


def test_bf16_weights_are_the_rounded_ones(folders, tmp_path):
    parity = export_hf(student(SECOND), tmp_path / "bf16", "gpt2", "bfloat16")
    assert parity.logit < 1e-5 and parity.rounding != 0
    exact, rounded = (load_file(folder / "model.safetensors") for folder in (folders(SECOND), tmp_path / "bf16"))
    assert exact.keys() == rounded.keys()
    for name, tensor in rounded.items():
        assert tensor.dtype == torch.bfloat16 and torch.equal(tensor, exact[name].bfloat16()), name
    model = CocomixForCausalLM.from_pretrained(tmp_path / "bf16")
    assert model.dtype == torch.bfloat16
    sequences, logits = generate(model, tokens(2, 9), max_new_tokens=9)
    assert sequences.shape == (2, 18) and logits.isfinite().all()


@pytest.mark.parametrize("fault", ["num_kept", "insertion_layer", "layer_norm_epsilon"])
def test_a_folder_that_would_not_be_the_same_model_is_not_left_behind(tmp_path, monkeypatch, fault):
    from megacocomix.hf import export as hf

    right = hf._config
    wrong = {"num_kept": 3, "insertion_layer": 2, "layer_norm_epsilon": 1e-3}
    monkeypatch.setattr(hf, "_config", lambda source: right(source) | {fault: wrong[fault]})
    with pytest.raises(UserError, match="differs by"):
        export_hf(student(SECOND), tmp_path / "hf", "gpt2")
    assert list(tmp_path.iterdir()) == []


def test_an_exported_folder_becomes_ours_again_to_the_bit(folders, tmp_path):
    from megacocomix.checkpoint.convert import write_native
    from megacocomix.checkpoint.open import load_model, open_source

    write_native(open_source(folders(SECOND)), tmp_path / "again", "gpt2", {})
    again, source = load_model(tmp_path / "again").model, student(SECOND).model
    assert again.insertion_layer == SECOND
    assert all(torch.equal(parameter, source.get_parameter(name)) for name, parameter in again.named_parameters())


def test_saved_again_by_transformers_it_is_the_same(exported, tmp_path):
    exported.save_pretrained(tmp_path)
    again = CocomixForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(again(tokens(1, 9)).logits, exported(tokens(1, 9)).logits)
