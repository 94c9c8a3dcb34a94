"""Any causal language model whose blocks can be listed can be a teacher. No hook point changes the model."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

import tiny
from megacocomix.checkpoint.open import weights_sha256
from megacocomix.errors import UserError
from megacocomix.sae.model import SAE, SAEForm
from megacocomix.teacher.attribution import attribute
from megacocomix.teacher.load import load_teacher, load_teacher_model, teacher_tokenizer
from megacocomix.teacher.model import Teacher

TOKENS = torch.randint(tiny.VOCAB, (2, 12), generator=torch.Generator().manual_seed(9))
SIZES = {
    "vocab_size": tiny.VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 16,
}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, intermediate_size=48, num_key_value_heads=2)),
    "neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES, intermediate_size=48, use_parallel_residual=True)),
    "gemma": lambda: GemmaForCausalLM(GemmaConfig(**SIZES, intermediate_size=48, num_key_value_heads=2, head_dim=8)),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folders = {}
    for name, build in MODELS.items():
        torch.manual_seed(0)
        model = build().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(5 if parameter.dim() > 1 else 1)
        folders[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(folders[name], max_shard_size="20KB" if name == "llama" else "5GB")
    return folders


def check_hook_point(teacher, lm):
    """The teacher's loss is the model's, and its gradient is that of this loss."""
    with torch.no_grad():
        logits = lm(input_ids=TOKENS).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten())
    hidden, gradient = teacher.hidden_and_gradient(TOKENS)
    torch.testing.assert_close(hidden, teacher.hidden(TOKENS))
    torch.testing.assert_close(teacher.logits(TOKENS), logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(teacher.loss(TOKENS), loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(teacher.loss(TOKENS, replace=hidden), loss, rtol=1e-5, atol=1e-5)
    direction = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(2))
    ahead, behind = (teacher.loss(TOKENS, hidden + step * direction).double() for step in (1e-3, -1e-3))
    slope = (ahead - behind) / 2e-3 * len(TOKENS)
    assert slope.item() == pytest.approx((gradient * direction).sum().item(), rel=0.1, abs=5e-3)
    assert all(parameter.grad is None for parameter in teacher.model.head.parameters())


@pytest.mark.parametrize("location", ["resid_post_mlp", "resid_post_attn", "resid_delta_mlp", "resid_delta_attn"])
@pytest.mark.parametrize("layer", [0, 2])
def test_no_hook_point_changes_a_llama(saved, layer, location):
    check_hook_point(
        load_teacher(saved["llama"], layer, location), AutoModelForCausalLM.from_pretrained(saved["llama"])
    )


@pytest.mark.parametrize("location", ["resid_post_mlp", "resid_delta_mlp", "resid_delta_attn"])
def test_blocks_that_run_attention_and_mlp_in_parallel_have_hook_points(saved, location):
    check_hook_point(load_teacher(saved["neox"], 1, location), AutoModelForCausalLM.from_pretrained(saved["neox"]))


def test_a_stream_after_the_attention_that_does_not_exist_is_refused(saved):
    with pytest.raises(UserError, match="its MLP reads the same input as its attention"):
        load_teacher(saved["neox"], 1, "resid_post_attn")


def test_resid_post_mlp_works_whatever_the_blocks_do(saved):
    check_hook_point(load_teacher(saved["gemma"], 1), AutoModelForCausalLM.from_pretrained(saved["gemma"]))


def test_weights_in_several_files_have_one_hash_that_changes_with_any(saved):
    folder = saved["llama"]
    assert len(list(folder.glob("*.safetensors"))) > 1
    model = load_teacher_model(folder)
    assert model.sha256 == weights_sha256(folder)
    assert model.sha256 != load_teacher_model(saved["neox"]).sha256
    assert (model.context, len(model.blocks)) == (16, 3)


def test_a_tied_weight_is_padded_in_place_of_a_second_copy_and_the_teacher_keeps_its_vocabulary(tmp_path, saved):
    tiny.make_teacher(tmp_path / "gpt2")
    models = load_teacher_model(tmp_path / "gpt2"), load_teacher_model(saved["gemma"])
    bodies = [model.body(TOKENS) for model in models]
    for model, before in zip(models, bodies, strict=True):
        teacher = Teacher(model, 1)
        assert teacher.vocab_size == teacher.logits(TOKENS).shape[-1] == len(model.head.weight) == tiny.VOCAB
        assert teacher.head.weight.shape == (128, teacher.width) and not teacher.head.weight[tiny.VOCAB :].any()
        assert model.head.weight.data_ptr() == teacher.head.weight.data_ptr()
        assert Teacher(model, 0).head is teacher.head
        assert torch.equal(model.body(TOKENS), before)


def test_a_bf16_teacher_computes_in_bf16_and_is_scored_in_fp32(saved):
    teacher = load_teacher(saved["llama"], 1, dtype=torch.bfloat16)
    hidden, gradient = teacher.hidden_and_gradient(TOKENS)
    exact_hidden, exact_gradient = load_teacher(saved["llama"], 1).hidden_and_gradient(TOKENS)
    assert hidden.dtype == gradient.dtype == teacher.dtype == torch.bfloat16
    for rounded, exact in ((hidden, exact_hidden), (gradient, exact_gradient)):
        assert (rounded - exact).norm() < 0.1 * exact.norm()
    sae = SAE(32, 64, SAEForm(k=8)).requires_grad_(False)
    sae.encoder.normal_(generator=torch.Generator().manual_seed(0))
    sae.decoder.copy_(sae.encoder)
    assert attribute(teacher, sae, TOKENS).score.dtype == torch.float32


def test_a_gpt2_that_our_modules_cannot_run_is_run_by_transformers(tmp_path):
    untied = GPT2LMHeadModel(
        GPT2Config(vocab_size=97, n_positions=16, n_embd=32, n_layer=3, n_head=2, tie_word_embeddings=False)
    ).eval()
    untied.save_pretrained(tmp_path / "untied", max_shard_size="20KB")
    check_hook_point(load_teacher(tmp_path / "untied", 1), untied)
    classifier = GPT2ForSequenceClassification(
        GPT2Config(vocab_size=97, n_positions=16, n_embd=32, n_layer=3, n_head=2, num_labels=2)
    )
    classifier.save_pretrained(tmp_path / "classifier")
    expected = GPT2LMHeadModel.from_pretrained(tmp_path / "classifier").eval()
    check_hook_point(load_teacher(tmp_path / "classifier", 1), expected)


def test_missing_tensors_of_a_teacher_are_not_drawn(tmp_path, saved):
    tensors = load_file(saved["neox"] / "model.safetensors")
    del tensors["gpt_neox.layers.1.attention.dense.bias"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text((saved["neox"] / "config.json").read_text())
    with pytest.raises(UserError, match=r"lacks gpt_neox\.layers\.1\.attention\.dense\.bias: config\.json and weights"):
        load_teacher(tmp_path, 0)


@pytest.mark.parametrize("text", ["", "null", "- 1", "data: openwebtext", "data: {tokenizer: [1]}"])
def test_a_config_yaml_of_others_names_no_tokenizer(tmp_path, text):
    (tmp_path / "config.yaml").write_text(text)
    assert teacher_tokenizer(tmp_path) is None


def test_what_cannot_be_a_teacher_is_named(tmp_path, saved):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(UserError, match=r"holds no model\.safetensors"):
        load_teacher(tmp_path / "empty", 0)
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd/config.json").write_text(json.dumps({"model_type": "nonsense"}))
    (tmp_path / "odd/model.safetensors").write_bytes((saved["neox"] / "model.safetensors").read_bytes())
    with pytest.raises(UserError, match="cannot be loaded by transformers"):
        load_teacher(tmp_path / "odd", 0)
    with pytest.raises(UserError, match="layer 3 is not one of 0 … 2"):
        load_teacher(saved["llama"], 3)
    opt = OPTForCausalLM(OPTConfig(**SIZES, ffn_dim=48, word_embed_proj_dim=32)).eval()
    opt.save_pretrained(tmp_path / "opt")
    with pytest.raises(UserError, match=r"resid_delta_mlp cannot be found .*no module named mlp or feed_forward"):
        load_teacher(tmp_path / "opt", 1, "resid_delta_mlp")
    check_hook_point(load_teacher(tmp_path / "opt", 1), opt)


def test_weights_that_are_not_finite_are_refused(saved, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(saved["neox"])
    model.gpt_neox.layers[2].mlp.dense_h_to_4h.weight.data[0, 0] = torch.nan
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="weights that are not finite"):
        load_teacher(tmp_path, 1)


def test_contributions_that_are_scaled_before_they_are_added_are_refused(saved):
    """Also where one token's residual is hundreds of times the others'."""
    model = load_teacher_model(saved["llama"])
    block = model.blocks[1]
    original, mlp = block.forward, {}
    block.mlp.register_forward_hook(lambda _, __, output: mlp.update(output=output))

    def scaled(hidden_states, **rest):
        massive = torch.ones(hidden_states.shape[1], 1)
        massive[0] = 500
        return original(hidden_states * massive, **rest) - 0.5 * mlp["output"]

    block.forward = scaled
    with pytest.raises(UserError, match="its output is not its input"):
        Teacher(model, 1, "resid_delta_mlp")


def test_a_teacher_has_a_tokenizer_or_none(root, saved):
    assert teacher_tokenizer(saved["llama"]) is None
    assert teacher_tokenizer(root / "assets/teacher").vocab_size == 4096
