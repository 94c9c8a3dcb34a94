"""An exported model with concepts is used as transformers' own models are: under autocast, by Trainer, by peft.

Right are: its own fp32 pass without autocast; transformers' GPT-2, which the same class without a concept module must
equal; transformers' loss.
"""

import copy
import logging
import os
import subprocess
import sys

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from external_checkpoints import huggingface_model
from peft import LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import StaticCache, Trainer, TrainingArguments
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.utils import logging as hf_logging

import tiny
from megacocomix.hf import modeling_cocomix
from megacocomix.hf.export import export_hf
from megacocomix.hf.modeling_cocomix import CocomixForCausalLM
from megacocomix.hf.open import open_model

# All concepts are kept: to keep few is discontinuous, and rounding may change which.
METHODS = {
    "concepts": {},
    "every 2": {"interleave_every": 2},
    "hidden": {"name": "direct-hidden"},
    "hidden every 3": {"name": "direct-hidden", "interleave_every": 3},
    "pause": {"name": "pause"},
    "add": {"name": "add"},
    "predict-only": {"name": "predict-only"},
}
GENERATION = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
FIRST, BLOCKS = 1, tiny.SHAPE["num_layers"]  # insertion_layer, and the number of blocks


def tokens(*shape, seed=0):
    return torch.randint(1, tiny.VOCAB, shape, generator=torch.Generator().manual_seed(seed))


TOKENS = tokens(4, tiny.CONTEXT)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def error(actual, expected):
    """The norm of the difference, relative to the norm expected."""
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


def gradients(model, **inputs):
    """→ (loss, all gradients in one vector)."""
    model.zero_grad()
    loss = model(labels=TOKENS, **inputs).loss
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}

    def folder(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp("exported") / "out"
            export_hf(tiny.loaded(num_kept=tiny.LATENTS, **METHODS[name]), made[name], "gpt2")
        return made[name]

    return folder


@pytest.fixture(params=METHODS)
def model(request, folders):
    return CocomixForCausalLM.from_pretrained(folders(request.param)).eval()


@pytest.fixture
def with_concepts(folders):
    return CocomixForCausalLM.from_pretrained(folders("concepts")).eval()


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """transformers' GPT-2, and our class without a concept module, which is then the same model. Without dropout."""
    gpt2 = huggingface_model()
    for module in gpt2.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    folder = tmp_path_factory.mktemp("gpt2")
    gpt2.save_pretrained(folder)
    ours = open_model(folder).model
    assert type(ours) is CocomixForCausalLM and ours.config.mix == "nothing"
    return gpt2.eval(), ours


# ---- precision


@pytest.mark.parametrize(("dtype", "most"), [(torch.bfloat16, 0.02), (torch.float16, 0.003)])
def test_under_autocast_logits_and_gradients_are_those_of_fp32_to_rounding(model, dtype, most):
    logits, (loss, gradient) = model(TOKENS).logits, gradients(model, input_ids=TOKENS)
    with torch.autocast("cpu", dtype):
        rounded = model(TOKENS).logits
        rounded_loss, rounded_gradient = gradients(model, input_ids=TOKENS)
    assert rounded.dtype == dtype and rounded_loss.dtype == torch.float32
    assert error(rounded, logits) < most and error(rounded_gradient, gradient) < most
    assert abs(rounded_loss - loss) < most * 0.2
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


@pytest.mark.parametrize(("dtype", "most"), [(torch.bfloat16, 0.03), (torch.float16, 0.004)])
def test_rounded_weights_give_the_logits_and_gradients_of_fp32_to_rounding(model, dtype, most):
    logits, (_, gradient) = model(TOKENS).logits, gradients(model, input_ids=TOKENS)
    rounded = copy.deepcopy(model).to(dtype)
    assert error(rounded(TOKENS).logits, logits) < most
    assert error(gradients(rounded, input_ids=TOKENS)[1], gradient) < most


def test_under_autocast_a_cache_gives_the_logits_of_the_whole_text(model):
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        whole = model(TOKENS, use_cache=False).logits
        first = model(TOKENS[:, :7], use_cache=True)
        rest = model(TOKENS[:, 7:], past_key_values=first.past_key_values)
    assert error(torch.cat((first.logits, rest.logits), 1), whole) < 0.02


@pytest.mark.parametrize("name", ["concepts", "every 2", "hidden", "pause"])
def test_torch_compile_sees_one_graph_and_changes_nothing(name, folders):
    model = CocomixForCausalLM.from_pretrained(folders(name)).eval()
    expected = gradients(model, input_ids=TOKENS)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    model.zero_grad()
    loss = compiled(input_ids=TOKENS, labels=TOKENS, use_cache=False).loss
    loss.backward()
    close(loss.detach(), expected[0])
    close(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]), expected[1])


def test_weights_that_accelerate_keeps_elsewhere_give_the_same(model, tmp_path):
    expected = model(TOKENS).logits
    on_disk = copy.deepcopy(model)
    disk_offload(on_disk, tmp_path, execution_device="cpu")
    for offloaded in (cpu_offload(copy.deepcopy(model), execution_device="cpu"), on_disk):
        assert all(parameter.is_meta for parameter in offloaded.parameters())
        assert torch.equal(offloaded(TOKENS).logits, expected)


def test_a_hook_on_the_compress_layer_reads_the_concept_vectors(with_concepts):
    kept, vectors = [], []
    with_concepts.transformer.top_k.register_forward_hook(lambda _, __, output: kept.append(output))
    layer = with_concepts.transformer.compress_layer
    layer.register_forward_hook(lambda _, __, output: vectors.append(output))
    with_concepts(TOKENS)
    dense = torch.zeros(*TOKENS.shape, tiny.LATENTS).scatter(-1, kept[0].indices, kept[0].values)
    close(vectors[0], torch.nn.functional.linear(dense, layer.weight, layer.bias))


class Largest(TorchDispatchMode):
    """The largest tensor that was made, in numbers."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **kwargs or {})
        self.numbers = max([self.numbers, *(x.numel() for x in tree_leaves(made) if torch.is_tensor(x))])
        return made


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-6), (torch.bfloat16, 0.005)])
@pytest.mark.parametrize("num_concepts", [16, 500])  # more concepts: so few tokens that they read the columns in place
def test_concepts_are_mixed_as_by_a_dense_product_in_little_memory(dtype, most, num_concepts, monkeypatch):
    kept, width, most_gathered = 5, 48, 7 * 5 * 48
    monkeypatch.setattr(modeling_cocomix, "MAX_GATHERED", most_gathered)
    layer = modeling_cocomix.CocomixCompress(num_concepts, width, dtype=dtype)
    values, indices = torch.randn(2, 11, num_concepts).to(dtype).topk(kept)  # 22 tokens: the last chunk is one
    values.requires_grad_()
    grad = torch.randn(2, 11, width).to(dtype)
    with Largest() as made:
        found = layer(values, indices)
        gradients = torch.autograd.grad(found, (layer.weight, values), grad)
    assert made.numbers == max(most_gathered, num_concepts * width)  # the columns of all tokens: 22 · 5 · 48

    weight, kept_values = (x.detach().double().requires_grad_() for x in (layer.weight, values))
    dense = torch.zeros(2, 11, num_concepts, dtype=torch.double).scatter(-1, indices, kept_values)
    expected = torch.nn.functional.linear(dense, weight, layer.bias.double())
    for actual, right in zip(
        (found, *gradients), (expected, *torch.autograd.grad(expected, (weight, kept_values), grad)), strict=True
    ):
        assert error(actual.double(), right) < most
    with torch.no_grad():
        assert torch.equal(layer(values, indices), found)


# ---- gradient checkpointing


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_runs_each_block_again_and_gives_the_same_gradients(model, use_reentrant):
    runs = []
    for block in model.transformer.h:
        block.ln_1.register_forward_hook(lambda *_: runs.append(1))
    model.train()  # the tiny model has no dropout
    expected = gradients(model, input_ids=TOKENS)
    assert len(runs) == BLOCKS
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    found = gradients(model, input_ids=TOKENS)
    assert len(runs) == 3 * BLOCKS
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    with torch.autocast("cpu", torch.bfloat16):
        assert error(gradients(model, input_ids=TOKENS)[1], expected[1]) < 0.02


def test_gradient_checkpointing_keeps_no_cache_and_reads_none(with_concepts, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    hf_logging.warning_once.cache_clear()
    cache = with_concepts(TOKENS[:, :5], use_cache=True).past_key_values
    with_concepts.train().gradient_checkpointing_enable()
    result = with_concepts(TOKENS, labels=TOKENS, use_cache=True)
    result.loss.backward()
    assert result.past_key_values is None and "Caching is incompatible with gradient checkpointing" in caplog.text
    with pytest.raises(ValueError, match="past_key_values cannot be read under gradient checkpointing"):
        with_concepts(TOKENS[:, 5:], past_key_values=cache)
    assert with_concepts.eval()(TOKENS, use_cache=True).past_key_values.get_seq_length() == tiny.CONTEXT


# ---- transformers' conventions


@torch.no_grad()
def test_hidden_states_are_those_of_gpt2(pair):
    gpt2, ours = pair
    expected = gpt2(TOKENS, output_hidden_states=True).hidden_states
    found = ours(TOKENS, output_hidden_states=True).hidden_states
    assert len(found) == len(expected)
    for actual, right in zip(found, expected, strict=True):
        close(actual, right)
    assert ours(TOKENS).hidden_states is None
    ours.config.output_hidden_states = True
    assert len(ours(TOKENS).hidden_states) == len(expected)
    ours.config.output_hidden_states = False


@torch.no_grad()
def test_a_hidden_state_is_a_blocks_output_at_the_row_that_predicts(model):
    outputs = []
    for block in model.transformer.h:
        block.register_forward_hook(lambda _, __, output: outputs.append(output))
    result = model(TOKENS, output_hidden_states=True)
    states, every = result.hidden_states, model.config.interleave_every
    assert len(states) == BLOCKS + 1
    for number, (state, output) in enumerate(zip(states[1:-1], outputs[:-1], strict=True), start=1):
        if model.config.interleaves and number > FIRST:
            has_slot = (torch.arange(tiny.CONTEXT) + 1) % every == 0
            output = output[:, 2 * torch.arange(tiny.CONTEXT) + has_slot.long()]
        assert torch.equal(state, output)
    assert torch.equal(model.lm_head(states[-1]), result.logits)
    assert torch.equal(states[0], model.transformer.wte(TOKENS) + model.transformer.wpe.weight)
    generated = model.generate(TOKENS[:, :6], output_hidden_states=True, return_dict_in_generate=True, **GENERATION)
    whole = model(generated.sequences[:, :-1], output_hidden_states=True).hidden_states
    for layer in range(BLOCKS + 1):
        close(torch.cat([step[layer] for step in generated.hidden_states], 1), whole[layer])


def test_the_loss_is_that_of_transformers(model, pair):
    labels = TOKENS.clone()
    labels[0, 3:9] = labels[2] = -100
    for options in ({}, {"num_items_in_batch": 100}, {"num_items_in_batch": torch.tensor(7)}):
        result = model(TOKENS, labels=labels, **options)
        assert torch.equal(result.loss, ForCausalLMLoss(result.logits, labels, tiny.VOCAB, **options))
        gpt2, ours = (each(TOKENS, labels=labels, **options).loss for each in pair)
        close(ours, gpt2)


def test_without_return_dict_it_is_the_tuple_of_gpt2(pair, with_concepts):
    gpt2, ours = pair
    options = {"labels": TOKENS, "output_hidden_states": True, "return_dict": False, "use_cache": True}
    expected, found = gpt2(TOKENS, **options), ours(TOKENS, **options)
    assert [type(part) for part in found] == [type(part) for part in expected]
    close(found[0], expected[0])
    close(found[1], expected[1])
    with_concepts.config.return_dict = False
    result = with_concepts(TOKENS, output_concept_logits=True, use_cache=False)
    assert type(result) is tuple and [part.shape[-1] for part in result] == [tiny.VOCAB, tiny.LATENTS]


@torch.no_grad()
def test_logits_to_keep_takes_a_number_or_positions(pair, with_concepts):
    for kept in (1, 3, torch.tensor([2, 5])):
        close(pair[1](TOKENS, logits_to_keep=kept).logits, pair[0](TOKENS, logits_to_keep=kept).logits)
    close(with_concepts(TOKENS, logits_to_keep=3).logits, with_concepts(TOKENS).logits[:, -3:])


def test_embeddings_instead_of_tokens_give_the_same(model):
    embeds = model.get_input_embeddings()(TOKENS)
    mask = torch.ones_like(TOKENS)
    mask[1, :6] = mask[3, :1] = 0
    for options in ({}, {"attention_mask": mask}):
        expected = model(TOKENS, labels=TOKENS, **options)
        found = model(inputs_embeds=embeds, labels=TOKENS, **options)
        assert torch.equal(found.logits, expected.logits) and torch.equal(found.loss, expected.loss)
    for length in (6, 9):
        prompt, padding = TOKENS[:, :length], {"attention_mask": mask[:, :length]}
        expected = model.generate(prompt, **padding, **GENERATION)[:, length:]
        found = model.generate(inputs_embeds=embeds[:, :length], **padding, **GENERATION)
        assert torch.equal(found[:, -5:], expected)
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model(TOKENS, inputs_embeds=embeds)
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model()


def test_embeddings_get_the_gradients_of_gpt2(pair):
    found = []
    for each in pair:
        embeds = each.get_input_embeddings()(TOKENS).detach().requires_grad_()
        each(inputs_embeds=embeds, labels=TOKENS).loss.backward()
        found.append(embeds.grad)
    close(found[1], found[0])


@pytest.mark.parametrize(
    "name", ["position_ids", "token_type_ids", "head_mask", "encoder_hidden_states", "shift_labels", "lables"]
)
def test_an_argument_that_the_model_has_not_is_refused_by_name(with_concepts, name):
    value = torch.ones_like(TOKENS)
    with pytest.raises(ValueError, match=f"CocomixForCausalLM does not take {name}"):
        with_concepts(TOKENS, **{name: value})
    assert with_concepts(TOKENS, **{name: None}).logits.shape[1] == tiny.CONTEXT
    with pytest.raises(ValueError, match=name):
        with_concepts.generate(TOKENS[:, :3], **{name: value[:, :3]}, **GENERATION)


def test_attention_weights_are_refused_by_name_wherever_they_are_asked_for(with_concepts, folders):
    with pytest.raises(ValueError, match="does not take output_attentions"):
        with_concepts(TOKENS, output_attentions=True)
    with pytest.raises(ValueError, match="does not take output_attentions"):
        with_concepts.generate(TOKENS[:, :3], output_attentions=True, return_dict_in_generate=True, **GENERATION)
    eager = CocomixForCausalLM.from_pretrained(folders("concepts"), attn_implementation="eager").eval()
    eager.config.output_attentions = True
    with pytest.raises(ValueError, match="does not take output_attentions"):
        eager(TOKENS)
    close(eager(TOKENS, output_attentions=False).logits, with_concepts(TOKENS).logits)


def test_a_static_cache_is_refused_by_name(with_concepts):
    cache = StaticCache(config=with_concepts.config, max_cache_len=tiny.CONTEXT)
    with pytest.raises(ValueError, match="static caches are not supported"):
        with_concepts(TOKENS[:, :4], past_key_values=cache)


def test_a_resized_vocabulary_keeps_the_old_logits_stays_tied_and_survives_saving(model, tmp_path):
    before = model(TOKENS).logits
    model.resize_token_embeddings(tiny.VOCAB + 3)
    assert model.lm_head.weight is model.transformer.wte.weight and model.config.vocab_size == tiny.VOCAB + 3
    after = model(TOKENS + 3, labels=TOKENS + 3)
    assert after.logits.shape[-1] == tiny.VOCAB + 3 and after.loss.isfinite()
    close(model(TOKENS).logits[..., : tiny.VOCAB], before)
    model.save_pretrained(tmp_path)
    again = CocomixForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(again(TOKENS + 3).logits, after.logits)
    close(open_model(tmp_path, "cpu").model(TOKENS + 3).logits, after.logits)


# ---- Trainer


def examples(least):
    """16 texts whose labels leave out `least` tokens or more of the beginning, so that micro-batches count different
    numbers."""
    for row in range(16):
        text = tokens(tiny.CONTEXT, seed=row)
        labels = text.masked_fill(torch.arange(tiny.CONTEXT) < row % 6 * 2 + least, -100)
        yield {"input_ids": text, "attention_mask": torch.ones_like(text), "labels": labels}


def trained(model, folder, least=0, **options):
    """→ (the trained copy, the losses logged)."""
    defaults = {
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "learning_rate": 0.1,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0,
        "logging_steps": 1,
    }
    arguments = TrainingArguments(
        folder, use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no", **defaults | options
    )
    trainer = Trainer(copy.deepcopy(model), arguments, train_dataset=list(examples(least)))
    trainer.train()
    return trainer.model, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_trainer_accumulates_gradients_and_smooths_labels_as_it_does_for_gpt2(pair, tmp_path, smoothing):
    # Without the label of the first token, which no model predicts: Trainer counts it for GPT-2 alone.
    options = {"gradient_accumulation_steps": 2, "label_smoothing_factor": smoothing, "least": 1}
    (gpt2, expected), (ours, losses) = (trained(each, tmp_path, **options) for each in pair)
    assert losses == pytest.approx(expected, abs=1e-5)
    for name, parameter in ours.named_parameters():
        close(parameter, gpt2.get_parameter(name))


def test_trainer_takes_the_same_steps_with_and_without_accumulation(with_concepts, tmp_path):
    batch = {key: torch.stack([example[key] for example in examples(0)]) for key in ("input_ids", "labels")}
    whole, losses = trained(with_concepts, tmp_path, per_device_train_batch_size=16)
    assert losses[0] == pytest.approx(with_concepts(**batch).loss.item(), abs=1e-5)
    parts, part_losses = trained(with_concepts, tmp_path, gradient_accumulation_steps=8)
    assert part_losses == pytest.approx(losses, abs=1e-4)
    for name, parameter in parts.named_parameters():
        torch.testing.assert_close(parameter, whole.get_parameter(name), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_trainer_in_bf16_takes_the_steps_of_fp32_to_rounding(folders, name, tmp_path):
    model = CocomixForCausalLM.from_pretrained(folders(name))
    _, expected = trained(model, tmp_path)
    after, losses = trained(model, tmp_path, bf16=True, gradient_checkpointing=True)
    assert losses == pytest.approx(expected, abs=0.02) and after.dtype == torch.float32


ALONE = """
import sys
sys.modules["megacocomix"] = None  # an import of it fails, installed or not
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
folder, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules.")
text = torch.arange(1, 17)
data = [{"input_ids": text, "attention_mask": torch.ones_like(text), "labels": text}] * 8
arguments = TrainingArguments(out, use_cpu=True, bf16=True, report_to="none", disable_tqdm=True, max_steps=8,
    per_device_train_batch_size=2, gradient_accumulation_steps=2, learning_rate=1e-2, logging_steps=1,
    gradient_checkpointing=True, save_strategy="no")
trainer = Trainer(model, arguments, train_dataset=data, eval_dataset=data)
trainer.train()
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
assert losses[-1] < 0.7 * losses[0], losses
assert trainer.evaluate()["eval_loss"] < losses[0]
trainer.save_model(out)
again = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
assert type(again).__module__.startswith("transformers_modules.") and again.dtype == torch.float32
assert all(torch.equal(tensor, trainer.model.state_dict()[name]) for name, tensor in again.state_dict().items())
"""


def test_trainer_alone_trains_a_folder_in_bf16_and_saves_one_that_loads_alone(folders, tmp_path):
    command = [sys.executable, "-I", "-c", ALONE, folders("concepts"), tmp_path / "out"]
    subprocess.run(command, check=True, env=os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules")})


# ---- peft


@pytest.mark.parametrize(
    ("name", "modules"),
    [
        ("concepts", ["c_attn", "c_proj", "concept_predictor", "compress_layer"]),
        ("every 2", ["compress_layer"]),
        ("hidden", ["up", "down", "project_layer"]),
        ("pause", "all-linear"),
        ("add", "all-linear"),
    ],
)
def test_lora_trains_every_adapter_and_saved_loaded_and_merged_ones_give_the_same(folders, name, modules, tmp_path):
    base = CocomixForCausalLM.from_pretrained(folders(name)).eval()
    before = base(TOKENS).logits
    lora = LoraConfig(r=4, lora_alpha=16, target_modules=modules, task_type="CAUSAL_LM")
    model = get_peft_model(copy.deepcopy(base), lora)
    close(model(TOKENS).logits, before)
    adapters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(adapters, lr=1e-2)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = model(TOKENS, labels=TOKENS, attention_mask=torch.ones_like(TOKENS)).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.2
    assert all(adapter.grad is not None and adapter.grad.any() for adapter in adapters)

    model.eval().save_pretrained(tmp_path / "adapters")
    tuned = model(TOKENS).logits
    assert error(tuned, before) > 0.1
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapters").eval()
    assert torch.equal(again(TOKENS).logits, tuned)
    merged = again.merge_and_unload()
    close(merged(TOKENS).logits, tuned)
    merged.save_pretrained(tmp_path / "merged")
    close(open_model(tmp_path / "merged", "cpu").model(TOKENS).logits, tuned)
    options = {"use_cache": False} | GENERATION
    assert torch.equal(model.generate(input_ids=TOKENS[:, :6], **GENERATION), merged.generate(TOKENS[:, :6], **options))


def test_trainer_trains_lora_in_bf16_with_gradient_checkpointing(with_concepts, tmp_path):
    modules = ["c_attn", "concept_predictor", "compress_layer"]
    model = get_peft_model(with_concepts, LoraConfig(r=4, target_modules=modules, task_type="CAUSAL_LM"))
    options = {"max_steps": 12, "learning_rate": 1e-2, "optim": "adamw_torch", "gradient_checkpointing": True}
    _, losses = trained(model, tmp_path, bf16=True, gradient_accumulation_steps=2, **options)
    assert sum(losses[-3:]) < sum(losses[:3]) - 0.3


@pytest.mark.parametrize("name", METHODS)
def test_prefix_tuning_is_refused_by_name_where_concepts_are_interleaved(folders, name):
    model = CocomixForCausalLM.from_pretrained(folders(name))
    tuned = get_peft_model(model, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    inputs = {"input_ids": TOKENS[:, :9], "labels": TOKENS[:, :9]}
    if not model.config.interleaves:
        tuned(**inputs).loss.backward()
        assert all(p.grad is not None and p.grad.any() for p in tuned.parameters() if p.requires_grad)
        return
    with pytest.raises(ValueError, match=r"keys have 8 numbers, not 16\. Prefix tuning cannot be used"):
        tuned(**inputs)
