"""Parity with the published CoCoMix code, from a file of its inputs, weights and results (see tests/golden/README.md).

The case is read from the file: `python -m pytest tests/test_golden.py --golden FILE` proves parity on any such file.
"""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from megacocomix.checkpoint.hf_names import load_hf_weights, to_hf
from megacocomix.config.load import build_config
from megacocomix.model.gpt2 import GPT2, assemble
from megacocomix.model.losses import count_labelled, next_token_targets
from megacocomix.parallel.stage import MicroBatch, StageModule
from megacocomix.parallel.tensor import unshard
from megacocomix.sae.formats import from_openai
from megacocomix.sae.model import SAEForm
from megacocomix.teacher.attribution import attribute, select_labels
from megacocomix.teacher.model import Teacher, gpt2_teacher
from megacocomix.training.optimizer import build_optimizer, set_learning_rate

LOSS_TOLERANCE = 1e-6  # relative
TENSOR_TOLERANCE = 1e-5
ORDINARY_GRADIENT = 1e-6  # a hundred times Adam's eps


@pytest.fixture(scope="module")
def golden(request):
    path = request.config.getoption("--golden")
    with safe_open(path, "pt") as file:
        case = json.loads(file.metadata()["case"])
    return case, load_file(path)


@pytest.fixture(scope="module")
def config(golden):
    case, tensors = golden
    positions, _ = tensors["student.transformer.wpe.weight"].shape
    return build_config(
        {
            "run": "golden",
            "model": {
                "num_layers": case["s_layer"],
                "hidden_size": case["s_embd"],
                "num_heads": case["s_head"],
                "context": positions,
                "vocab_size": case["vocab"],
                "dropout": 0.0,
            },
            "method": {
                "name": "cocomix",
                "insertion_layer": case["insert"],
                "num_concepts": case["latents"],
                "num_kept": case["k"],
                "num_labels": case["k_attr"],
                "concept_weight": case["lam"],
                "match_reference": True,
            },
            "data": {"train": "", "valid": "", "tokenizer": "gpt2"},
            "optimizer": {"lr": case["lr"], "min_lr": case["lr"], "warmup_steps": 0},
            "training": {
                "steps": case["steps"],
                "global_batch": case["batch"],
                "micro_batch": case["batch"],
                "precision": "fp32",
            },
        }
    )


@pytest.fixture(scope="module")
def teacher(golden, config):
    case, tensors = golden
    shape = config.model.model_copy(
        update={
            "num_layers": case["t_layer"],
            "hidden_size": case["t_embd"],
            "num_heads": case["t_head"],
            "context": case["ctx"],
        }
    )
    model = GPT2(shape)
    load_hf_weights(model, lambda name: tensors[f"teacher.{name}"], case["t_head"])
    return Teacher(gpt2_teacher(model), case["sae_layer"], case["location"])


@pytest.fixture(scope="module")
def sae(golden):
    case, tensors = golden
    names = ("pre_bias", "encoder.weight", "latent_bias", "decoder.weight")
    return from_openai({name: tensors[f"sae.{name}"] for name in names}, SAEForm(k=case["k"]), "golden")


@pytest.fixture
def student(golden, config):
    case, tensors = golden
    model = assemble(config)
    load_hf_weights(model, lambda name: tensors[f"student.{name}"], case["s_head"])
    return model


def close(actual, expected, tolerance=TENSOR_TOLERANCE):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def in_hf_layout(named, num_heads):
    return dict(to_hf(name, tensor.detach(), num_heads) for name, tensor in named)


def without_key_bias(name, tensor):
    """The key third of the attention bias has a mathematically zero gradient, which AdamW blows up to noise."""
    if not name.endswith("attn.c_attn.bias"):
        return tensor
    query, _, value = tensor.chunk(3)
    return torch.cat((query, value))


def test_teacher_logits(golden, teacher):
    _, tensors = golden
    close(teacher.logits(tensors["input_ids"][0]), tensors["teacher_logits"])


def test_attribution(golden, teacher, sae):
    _, tensors = golden
    tokens = tensors["input_ids"][0]
    index, score = attribute(teacher, sae, tokens)
    # The reference's loss is the mean over the batch, ours over each window.
    dense = torch.zeros_like(tensors["attribution"]).scatter(-1, index, score / len(tokens))
    assert tensors["attribution"].abs().max() > 0
    scale = tensors["attribution"].abs().max()
    close(dense / scale, tensors["attribution"] / scale)


def test_no_teacher_parameter_gets_a_gradient(golden, teacher, sae):
    _, tensors = golden
    attribute(teacher, sae, tensors["input_ids"][0])
    modules = [teacher.model.head, *teacher.model.blocks]
    assert all(parameter.grad is None for module in modules for parameter in module.parameters())


def test_labels_where_the_reference_had_a_choice(golden, config, teacher, sae):
    case, tensors = golden
    assert any((tensors[f"label_margin.{step}"] > 0).any() for step in range(case["steps"]))
    for step in range(case["steps"]):
        attribution = attribute(teacher, sae, tensors["input_ids"][step])
        labels = select_labels(attribution, config.method.num_labels, config.method.mask_unlabelled)
        decided = tensors[f"label_margin.{step}"] > 0
        expected = tensors[f"labels.{step}"][decided]
        assert torch.equal(labels[decided].sort(-1).values, expected.sort(-1).values)


def test_student_logits_and_concept_logits(golden, student):
    _, tensors = golden
    logits, concept_logits = student(tensors["input_ids"][0])
    close(concept_logits, tensors["concept_logits"])
    close(logits, tensors["logits"])


def test_losses_gradients_and_weights_over_the_steps(golden, config, student):
    case, tensors = golden
    weights = dict(student.named_parameters())
    alone = SimpleNamespace(tensor=1, tensor_rank=0, pipeline=1, pipeline_rank=0, data=1)
    stages = StageModule(config, alone)
    stages.set_parameters(lambda name: weights[name].detach(), lambda value: torch.nn.Parameter(value.clone()))
    named = {name: parameter for name, parameter, _ in stages.named_shards()}
    whole = lambda name, own: (name, unshard(name, [own], stages.whole_shapes[name]))
    optimizer = build_optimizer([(name, p.dim(), p) for name, p in named.items()], config.optimizer)
    set_learning_rate(optimizer, config.optimizer.lr)
    for step in range(case["steps"]):
        tokens, labels = tensors["input_ids"][step], tensors[f"labels.{step}"]
        batch = MicroBatch(
            tokens,
            next_token_targets(tokens),
            num_targets=tokens.shape[0] * (tokens.shape[1] - 1),
            labels_BMk=labels,
            num_predicted=count_labelled(labels),
        )
        optimizer.zero_grad()
        loss, losses = stages(0, None, batch)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(named.values(), config.optimizer.clip)
        next_token, concept, _ = losses.float()
        measured = torch.stack((next_token, concept, next_token + config.method.concept_weight * concept, norm))
        torch.testing.assert_close(measured, tensors[f"loss.{step}"], rtol=LOSS_TOLERANCE, atol=0)
        if step == 0:
            gradients = (whole(name, parameter.grad) for name, parameter in named.items())
            for name, gradient in in_hf_layout(gradients, case["s_head"]).items():
                close(gradient, tensors[f"grad0_clipped.{name}"])
        optimizer.step()
    for name, weight in in_hf_layout((whole(*each) for each in named.items()), case["s_head"]).items():
        gradient = tensors[f"grad0_clipped.{name}"]
        actual, expected, gradient = (
            without_key_bias(name, tensor) for tensor in (weight, tensors[f"student_after.{name}"], gradient)
        )
        assert (actual - expected).norm() <= TENSOR_TOLERANCE * expected.norm(), name
        # Adam divides a gradient near its eps by about that eps: the rounding of such an element becomes a visible part
        # of the learning rate. Every other element is held to the tolerance by itself.
        ordinary = gradient.abs() >= ORDINARY_GRADIENT
        close(actual[ordinary], expected[ordinary])
        close(actual, expected, 10 * TENSOR_TOLERANCE)
