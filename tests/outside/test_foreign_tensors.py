"""Every tensor of a foreign model is used, or known to be harmless, or the folder is refused by name. All commands read
the same weights, those that transformers reads."""

import json
import logging
from pathlib import Path

import pytest
import torch
from external_checkpoints import huggingface_model, megatron_folder
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertLMHeadModel,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2LMHeadModel,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

import tiny
from megacocomix.checkpoint.convert import write_native
from megacocomix.checkpoint.external.source import Hints
from megacocomix.checkpoint.open import load_model, open_source, weights_sha256
from megacocomix.errors import UserError
from megacocomix.files import file_sha256
from megacocomix.hf.open import open_model
from megacocomix.teacher.load import load_teacher_model
from megacocomix.teacher.model import Teacher
from processes import run_tool

TOKENS = torch.arange(2 * tiny.CONTEXT).view(2, -1) * 7 % tiny.VOCAB
WRAPPERS = ("_orig_mod.", "module.", "model.", "module._orig_mod.", "_orig_mod.module.")
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 548118077\n"


def llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(**sizes, vocab_size=tiny.VOCAB, max_position_embeddings=tiny.CONTEXT)
    return LlamaForCausalLM(config).eval()


MODELS = {"gpt2": huggingface_model, "llama": llama}


def save(model, folder, change=lambda tensors: tensors):
    model.save_pretrained(folder)
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, {"format": "pt"})
    return folder


@torch.no_grad()
def all_logits(folder):
    """The logits of every command that runs a folder's model: evaluation, teacher and, for a GPT-2, conversion."""
    yield open_model(folder).model(TOKENS).logits
    yield Teacher(load_teacher_model(folder), 0).logits(TOKENS)
    if json.loads((folder / "config.json").read_text())["model_type"] == "gpt2":
        write_native(open_source(folder), folder / "native", "", {})
        yield load_model(folder / "native").model.eval()(TOKENS)[0]


def assert_all_read(folder, expected):
    for found in all_logits(folder):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def assert_all_refuse(folder, what):
    for read in (open_model, load_teacher_model, open_source):
        with pytest.raises(UserError, match=what) as refusal:
            read(folder)
        assert len(refusal.value.problems) == 1


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("kind", MODELS)
def test_names_that_a_wrapper_prefixed_are_read(tmp_path, kind, wrapper):
    model = MODELS[kind]()
    save(model, tmp_path, lambda tensors: {wrapper + name: tensor for name, tensor in tensors.items()})
    assert_all_read(tmp_path, model(TOKENS).logits)


@pytest.mark.parametrize("kind", MODELS)
def test_blocks_that_were_compiled_one_by_one_are_read(tmp_path, kind):
    model = MODELS[kind]()
    inner = lambda name: name.replace(".h.1.", ".h.1._orig_mod.").replace(".layers.1.", ".layers.1._orig_mod.")
    save(model, tmp_path, lambda tensors: {inner(name): tensor for name, tensor in tensors.items()})
    assert_all_read(tmp_path, model(TOKENS).logits)


def test_one_tensor_under_two_names_is_refused(tmp_path):
    name = "transformer.wte.weight"
    save(huggingface_model(), tmp_path, lambda t: t | {f"_orig_mod.{name}": t[name] + 1})
    assert_all_refuse(tmp_path, "are one tensor")


def test_a_head_of_its_own_counts_although_the_config_says_that_it_is_tied(tmp_path):
    head = torch.randn(tiny.VOCAB, 32, generator=torch.Generator().manual_seed(5))
    save(huggingface_model(), tmp_path, lambda tensors: tensors | {"lm_head.weight": head})
    with torch.no_grad():
        expected = GPT2LMHeadModel.from_pretrained(tmp_path).eval()(TOKENS).logits
    assert (expected - huggingface_model()(TOKENS).logits).abs().max() > 1  # the two heads can be told apart
    torch.testing.assert_close(open_model(tmp_path).model(TOKENS).logits, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(Teacher(load_teacher_model(tmp_path), 0).logits(TOKENS), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(UserError, match="only a tied head is read"):  # our own model has none
        open_source(tmp_path)


def test_a_second_copy_of_the_tied_head_in_another_precision_is_harmless(tmp_path):
    half = lambda tensors: {name: tensor.half() for name, tensor in tensors.items()}
    head = lambda tensors: half(tensors) | {"lm_head.weight": half(tensors)["transformer.wte.weight"].float()}
    save(huggingface_model(), tmp_path, head)
    assert_all_read(tmp_path, huggingface_model().half().float()(TOKENS).logits)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("name", ["score.weight", "v_head.summary.bias"])
def test_the_head_of_another_task_is_harmless(tmp_path, kind, name):
    model = MODELS[kind]()
    save(model, tmp_path, lambda tensors: tensors | {name: torch.ones(3, 32)})
    assert_all_read(tmp_path, model(TOKENS).logits)


def test_the_masks_that_old_versions_stored_are_harmless(tmp_path):
    mask = torch.ones(tiny.CONTEXT, tiny.CONTEXT).tril()[None, None].to(torch.uint8)
    buffers = {"transformer.h.0.attn.bias": mask, "transformer.h.1.attn.masked_bias": torch.tensor(-1e4)}
    save(huggingface_model(), tmp_path, lambda tensors: tensors | buffers)
    assert_all_read(tmp_path, huggingface_model()(TOKENS).logits)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("name", ["extra.weight", "transformer.h.0.attn.c_attn.lora_A.weight", "h.9.attn.c_attn.bias"])
def test_an_unknown_tensor_is_refused_by_name(tmp_path, kind, name):
    save(MODELS[kind](), tmp_path, lambda tensors: tensors | {name: torch.ones(3, 32)})
    assert_all_refuse(tmp_path, name if kind == "gpt2" else f"{name}|is a llama model")


@pytest.mark.parametrize("kind", MODELS)
def test_integers_in_place_of_weights_are_refused(tmp_path, kind):
    name = {"gpt2": "transformer.h.1.mlp.c_fc.weight", "llama": "model.layers.1.mlp.up_proj.weight"}[kind]
    save(MODELS[kind](), tmp_path, lambda tensors: tensors | {name: (100 * tensors[name]).to(torch.int8)})
    assert_all_refuse(tmp_path, rf"{name} is of type I8|is a llama model")


def test_the_whole_file_wins_over_shards_beside_it_as_in_transformers(tmp_path, caplog):
    model, other = huggingface_model(0), huggingface_model(1)
    other.save_pretrained(tmp_path, max_shard_size="20KB")
    model.save_pretrained(tmp_path / "whole")
    (tmp_path / "whole/model.safetensors").rename(tmp_path / "model.safetensors")
    with torch.no_grad():
        expected = GPT2LMHeadModel.from_pretrained(tmp_path).eval()(TOKENS).logits
    torch.testing.assert_close(expected, model(TOKENS).logits, rtol=0, atol=0)
    with caplog.at_level(logging.WARNING):
        assert_all_read(tmp_path, expected)
    assert weights_sha256(tmp_path) == file_sha256(tmp_path / "model.safetensors")
    assert "the shards of model.safetensors.index.json beside it are not" in caplog.text


def test_files_that_the_index_does_not_list_are_no_part_of_a_models_hash(tmp_path):
    huggingface_model().save_pretrained(tmp_path, max_shard_size="20KB")
    before = weights_sha256(tmp_path)
    save_file({"x": torch.ones(1)}, tmp_path / "adapter.safetensors")
    assert weights_sha256(tmp_path) == before


def test_another_file_of_weights_that_a_config_names_is_refused(tmp_path):
    config = save(huggingface_model(), tmp_path) / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"transformers_weights": "other.safetensors"}))
    assert_all_refuse(tmp_path, "names its own file of weights, other.safetensors")


def test_a_teacher_whose_logits_are_capped_is_refused_in_bf16_too(tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    more = {"num_key_value_heads": 2, "head_dim": 8, "final_logit_softcapping": 30.0}
    torch.manual_seed(0)
    Gemma2ForCausalLM(Gemma2Config(**sizes, **more, vocab_size=tiny.VOCAB)).save_pretrained(tmp_path)
    for dtype in (torch.float32, torch.bfloat16):
        with pytest.raises(UserError, match="changes its logits after its head"):
            load_teacher_model(tmp_path, dtype=dtype)


def test_a_shard_without_a_tensor_that_the_index_lists_is_refused(tmp_path):
    huggingface_model().save_pretrained(tmp_path, max_shard_size="20KB")
    file = tmp_path / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    first, last = min(index["weight_map"].values()), max(index["weight_map"].values())
    name = next(name for name, shard in index["weight_map"].items() if shard == last)
    index["weight_map"][name] = first
    file.write_text(json.dumps(index))
    assert_all_refuse(tmp_path, f"{first} does not hold {name}")


def test_an_adapter_or_code_beside_the_weights_is_refused(tmp_path):
    save(huggingface_model(), tmp_path / "adapter")
    (tmp_path / "adapter/adapter_config.json").write_text('{"peft_type": "LORA"}')
    assert_all_refuse(tmp_path / "adapter", "holds an adapter of PEFT")
    config = save(huggingface_model(), tmp_path / "code") / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"auto_map": {"AutoModelForCausalLM": "m.Other"}}))
    assert_all_refuse(tmp_path / "code", "names code of its own")


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_a_git_lfs_pointer_is_named(tmp_path, file):
    save(huggingface_model(), tmp_path)
    (tmp_path / file).write_text(POINTER)
    assert_all_refuse(tmp_path, f"{file} is a git-lfs pointer, .* git lfs pull")


def megatron(folder, change=lambda content, rank: None, tensor=2):
    arguments = {"num_attention_heads": 4, "vocab_size": tiny.VOCAB, "tensor_model_parallel_size": tensor}
    megatron_folder(folder, huggingface_model(), 3.0, tensor, arguments=arguments)
    for rank, file in enumerate(sorted(folder.rglob("*.pt"))):
        content = torch.load(file, weights_only=False)
        change(content, rank)
        torch.save(content, file)
    return folder


def test_megatrons_second_copy_of_the_embedding_is_harmless_and_another_head_is_refused(tmp_path):
    def add_head(content, rank, factor=1):
        embedding = content["model"]["language_model"]["embedding"]["word_embeddings"]["weight"]
        content["model"]["word_embeddings_for_head"] = {"weight": factor * embedding}

    megatron(tmp_path / "copy", add_head)
    write_native(open_source(tmp_path / "copy"), tmp_path / "ours", "", {})
    expected = huggingface_model()(TOKENS).logits
    torch.testing.assert_close(load_model(tmp_path / "ours").model.eval()(TOKENS)[0], expected, rtol=1e-5, atol=1e-5)
    megatron(tmp_path / "other", lambda content, rank: add_head(content, rank, factor=2))
    with pytest.raises(UserError, match="only a tied head"):
        open_source(tmp_path / "other")


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda c, r: c["model"]["language_model"].update(output_layer={"weight": torch.ones(64, 32)}), "output_layer"),
        (lambda c, r: c["model"].update(lm_head={"bias": torch.ones(64)}), r"lm_head\.bias"),
        (lambda c, r: c["model"]["language_model"].update(pooler={"dense.bias": torch.ones(2)}), "pooler"),
        (lambda c, r: c.update(iteration=10 + r), "is of iteration 11, but .* of 10"),
        (lambda c, r: setattr(c["args"], "tensor_model_parallel_size", 4), "2 tensor ranks, but its args say 4"),
        (lambda c, r: setattr(c["args"], "use_rotary_position_embeddings", True), "use_rotary_position_embeddings"),
        (lambda c, r: setattr(c["args"], "window_size", (128, 0)), "window_size"),
        (lambda c, r: setattr(c["args"], "norm_epsilon", 1e-2), "norm_epsilon is 0.01"),
        (lambda c, r: setattr(c["args"], "num_layers", 5), "num_layers is 5 in its args, but 3 by its tensors"),
        (lambda c, r: c.update(checkpoint_version=3.0 - r), "has another checkpoint_version"),
        (lambda c, r: setattr(c["args"], "num_attention_heads", 4 + 4 * r), "other sizes in its args"),
        (lambda c, r: c["model"]["language_model"]["encoder"]["final_layernorm.bias"].add_(r), "differs between its"),
    ],
)
def test_whatever_else_is_in_a_megatron_checkpoint_is_refused_by_name(tmp_path, change, what):
    megatron(tmp_path / "megatron", change)
    with pytest.raises(UserError, match=what):
        open_source(tmp_path / "megatron")


def test_a_latest_that_names_no_folder_is_said(tmp_path):
    (tmp_path / "latest").write_text("global_step7")
    for read in (open_source, open_model):
        with pytest.raises(UserError, match=r"latest names global_step7, which holds no \*_optim_states\.pt"):
            read(tmp_path, *([Hints()] if read is open_source else []))


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"num_hidden_layers": 1}, "n_layer is 3, but num_hidden_layers is 1"),
        ({"max_position_embeddings": 8}, "n_positions is 16, but max_position_embeddings is 8"),
        ({"is_causal": False}, "is_causal is False"),
    ],
)
def test_what_transformers_obeys_in_a_config_is_obeyed_or_refused(tmp_path, changes, what):
    config = save(huggingface_model(), tmp_path) / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    with pytest.raises(UserError, match=what):
        open_source(tmp_path)
    with pytest.raises(UserError):
        open_model(tmp_path)


def test_a_size_under_two_names_is_that_of_transformers_or_refused(tmp_path):
    config = save(huggingface_model(), tmp_path) / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_attention_heads": 2}))
    with torch.no_grad():
        expected = GPT2LMHeadModel.from_pretrained(tmp_path).eval()(TOKENS).logits
    torch.testing.assert_close(open_model(tmp_path).model(TOKENS).logits, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(UserError, match="n_head is 4, but num_attention_heads is 2"):
        open_source(tmp_path)


def test_a_size_under_its_other_name_alone_is_read(tmp_path):
    config = save(huggingface_model(), tmp_path) / "config.json"
    values = json.loads(config.read_text())
    values["num_attention_heads"] = values.pop("n_head")
    config.write_text(json.dumps(values))
    assert_all_read(tmp_path, huggingface_model()(TOKENS).logits)


def test_a_model_whose_tokens_read_those_after_them_is_no_causal_lm(tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    BertLMHeadModel(BertConfig(**sizes, vocab_size=tiny.VOCAB)).save_pretrained(tmp_path / "encoder")
    BertLMHeadModel(BertConfig(**sizes, vocab_size=tiny.VOCAB, is_decoder=True)).save_pretrained(tmp_path / "decoder")
    with pytest.raises(UserError, match="is no causal LM"):
        open_model(tmp_path / "encoder")
    open_model(tmp_path / "decoder")


def test_the_masks_that_old_versions_stored_for_other_models_are_harmless(tmp_path):
    sizes = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]}
    torch.manual_seed(0)
    model = GPTNeoForCausalLM(GPTNeoConfig(**sizes, vocab_size=tiny.VOCAB, max_position_embeddings=16)).eval()
    mask = torch.ones(1, 1, 16, 16).tril().to(torch.uint8)
    buffers = {f"transformer.h.{layer}.attn.attention.bias": mask.clone() for layer in range(2)}
    save(model, tmp_path, lambda tensors: tensors | buffers)
    assert_all_read(tmp_path, model(TOKENS).logits)


def test_what_a_megatron_checkpoint_records_wins_over_what_is_asked_for(tmp_path):
    """The number of heads is in no tensor: a wrong one gives another model with the same weights."""
    megatron(tmp_path / "megatron")
    asked = open_source(tmp_path / "megatron", Hints(num_heads=2, vocab_size=90)).shape
    assert (asked.num_heads, asked.vocab_size) == (4, tiny.VOCAB)
    convert = f"tools/convert_checkpoint.py {tmp_path / 'megatron'} --to native --out {tmp_path / 'ours'}"
    refused = run_tool(f"{convert} --num-heads 2", Path(__file__).parents[2])
    assert refused.returncode == 2 and "records num_heads 4, but --num-heads is 2" in refused.stderr


def test_shards_in_a_sub_folder_are_those_that_the_index_names(tmp_path):
    model, other = huggingface_model(0), huggingface_model(1)
    other.save_pretrained(tmp_path, max_shard_size="20KB")
    model.save_pretrained(tmp_path / "sub", max_shard_size="20KB")
    index = json.loads((tmp_path / "sub/model.safetensors.index.json").read_text())
    index["weight_map"] = {name: f"sub/{file}" for name, file in index["weight_map"].items()}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_all_read(tmp_path, model(TOKENS).logits)
    (tmp_path / "model.safetensors.index.json").unlink()
    assert_all_refuse(tmp_path, r"holds no model\.safetensors\.index\.json, which lists model-00001-of")


def test_weights_that_are_not_finite_are_neither_evaluated_nor_converted(tmp_path):
    save(huggingface_model(), tmp_path, lambda t: t | {"transformer.ln_f.bias": torch.full((32,), torch.nan)})
    tiny.write_tokens(tmp_path / "val.bin", 64)
    command = f"tools/evaluate.py perplexity {tmp_path} --data {tmp_path / 'val.bin'}"
    found = run_tool(command, Path(__file__).parents[2])
    assert found.returncode == 2 and "holds weights that are not finite" in found.stderr
    with pytest.raises(UserError, match="the source gives numbers that are not finite"):
        write_native(open_source(tmp_path), tmp_path / "native", "", {})
