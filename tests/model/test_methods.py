"""Baselines and ablations as combinations of options: which parameters get gradients, and which positions predict."""

import copy

import pytest
import torch
import torch.nn.functional as F

import tiny
from megacocomix.config.method import PRESETS
from megacocomix.config.schema import ModelConfig
from megacocomix.model.concept import interleave, predicting_slots
from megacocomix.model.distillation import hidden_distance, teacher_divergence
from megacocomix.model.gpt2 import GPT2, initialise
from megacocomix.model.heads import FrozenHead

SHAPE = ModelConfig(**tiny.SHAPE, dropout=0.0)
MODULE = {"pre_bias", "predict", "compress"}
# Parts of the concept module that get gradients from the next-token loss, and from the prediction's loss.
REACHED = {
    "ntp": (set(), set()),
    "kd": (set(), set()),
    "pause": ({"pause"}, set()),
    "kd+pause": ({"pause"}, set()),
    "cocomix": (MODULE, {"pre_bias", "predict"}),
    "cocomix+kd": (MODULE, {"pre_bias", "predict"}),
    "activation": (MODULE, {"pre_bias", "predict"}),
    "random": (MODULE, {"pre_bias", "predict"}),
    "add": (MODULE, {"pre_bias", "predict"}),
    "mix-only": (MODULE, {"pre_bias", "predict"}),
    "predict-only": (set(), {"pre_bias", "predict"}),
    "direct-hidden": ({"pre_bias", "predict_hidden", "project"}, {"pre_bias", "predict_hidden"}),
}
ELSEWHERE = [{"name": "cocomix", "insertion_layer": layer} for layer in (0, 2)]
EVERY = [{"name": "cocomix", "interleave_every": n} for n in (2, 3, 5, 16)]


def student(**options):
    model = GPT2(SHAPE, tiny.method(**options))
    initialise(model, 0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5 if parameter.dim() > 1 else 1)
    return model


def random_tokens(rows=2, length=tiny.CONTEXT):
    return torch.randint(tiny.VOCAB, (rows, length), generator=torch.Generator().manual_seed(5))


def reached(model, value):
    """Names of the parameters with a gradient."""
    gradients = torch.autograd.grad(value, list(model.parameters()), allow_unused=True)
    named = zip(dict(model.named_parameters()), gradients, strict=True)
    return {name for name, gradient in named if gradient is not None and gradient.abs().max() > 0}


def parts(names):
    return {name.split(".")[1] for name in names if name.startswith("concept.")}


@pytest.mark.parametrize("name", PRESETS)
def test_each_loss_reaches_the_parts_of_its_method_and_nothing_else(name):
    model = student(name=name)
    everything = {parameter for parameter, _ in model.named_parameters()}
    logits, prediction = model(random_tokens())
    by_next_token = reached(model, logits.square().mean())
    assert parts(by_next_token) == REACHED[name][0]
    assert {parameter for parameter in everything if not parameter.startswith("concept.")} <= by_next_token
    assert (prediction is None) == (not REACHED[name][1])
    if prediction is not None:
        by_prediction = reached(model, model(random_tokens())[1].square().mean())
        assert parts(by_prediction) == REACHED[name][1]
        assert not any(parameter.startswith(("blocks.1", "blocks.2", "norm")) for parameter in by_prediction)
    else:
        by_prediction = set()
    assert by_next_token | by_prediction == everything, "a parameter that nothing trains"


@pytest.mark.parametrize("options", [*({"name": name} for name in PRESETS), *EVERY, *ELSEWHERE], ids=str)
def test_changing_a_token_changes_nothing_before_it(options):
    model, tokens = student(**options), random_tokens()
    logits, predicted = model(tokens)
    for position in range(1, tiny.CONTEXT):
        changed = tokens.clone()
        changed[:, position] = (changed[:, position] + 1) % tiny.VOCAB
        other, other_predicted = model(changed)
        assert torch.equal(logits[:, :position], other[:, :position])
        if predicted is not None:
            before = position // options.get("interleave_every", 1)
            assert torch.equal(predicted[:, :before], other_predicted[:, :before])
        assert not torch.equal(logits[:, position], other[:, position])


@pytest.mark.parametrize("options", [*({"name": name} for name in PRESETS), *EVERY], ids=str)
@pytest.mark.parametrize("length", [1, 6, 7])
def test_a_window_of_any_length_gives_the_logits_of_a_longer_one(options, length):
    model, tokens = student(**options), random_tokens()
    torch.testing.assert_close(model(tokens[:, :length])[0], model(tokens)[0][:, :length], rtol=0, atol=1e-5)


@pytest.mark.parametrize("options", [{"name": "cocomix"}, {"name": "pause"}, *EVERY], ids=str)
def test_what_the_last_block_skips_changes_no_logit_and_no_gradient(options):
    """The reference is a last block that computes all positions; the ones that predict are selected afterwards."""
    model, tokens = student(**options).double(), random_tokens()
    whole = copy.deepcopy(model)
    every, last = whole.every, whole.blocks[whole.last_block]
    skipping, picked = type(last).forward, []

    def compute_everything(x, asked):
        picked.append(asked)
        y = skipping(last, x)
        return y[:, predicting_slots(y.shape[1], asked, y.device)]

    last.forward = compute_everything
    results = []
    for each in (model, whole):
        logits, _ = each(tokens)
        loss = F.cross_entropy(logits.flatten(0, 1), tokens.roll(-1, 1).flatten())
        results.append((logits, torch.autograd.grad(loss, list(each.parameters()))))
    assert picked == [every]
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("every", [1, 2, 3, 7])
@pytest.mark.parametrize("length", [1, 6, 7, 16])
def test_a_vector_stands_right_after_every_nth_token_and_predicts_in_its_place(every, length):
    x = torch.arange(1.0, length + 1).view(1, -1, 1)
    mixed = interleave(x, -x[:, every - 1 :: every], every)[0, :, 0].tolist()
    expected = [value for t in range(1, length + 1) for value in ([t, -t] if t % every == 0 else [t])]
    assert mixed == expected
    slots = predicting_slots(len(mixed), every, x.device).tolist()
    assert [mixed[slot] for slot in slots] == [-t if t % every == 0 else t for t in range(1, length + 1)]


def distributions(vocab_size=11, width=6, rows=7):
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(rows, 13, generator=generator)
    head = FrozenHead(torch.randn(vocab_size, width, generator=generator), torch.randn(vocab_size, generator=generator))
    return logits.requires_grad_(), torch.randn(rows, width, generator=generator), head


@pytest.mark.parametrize("vocab_size", [13, 11])  # the student has 13 tokens
def test_divergence_is_forward_kl_over_the_whole_vocabulary_with_its_gradient(vocab_size, monkeypatch):
    monkeypatch.setattr("megacocomix.model.losses.CHUNK_ELEMENTS", 2 * 13)  # chunks of two rows
    logits, outputs, head = distributions(vocab_size)
    counts = torch.tensor([True, True, False, True, True, False, True])
    ours = teacher_divergence(logits, outputs, head, counts)
    teacher = head.logits(outputs).softmax(-1)
    student = logits[:, :vocab_size].sub(logits.logsumexp(-1, keepdim=True))
    expected = F.kl_div(student, teacher, reduction="none").sum(-1)[counts].sum()
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(*(torch.autograd.grad(3 * loss, logits)[0] for loss in (ours, expected)))


@pytest.mark.parametrize("split", [6, 11, 12])
def test_divergence_of_a_sharded_vocabulary_is_that_of_the_whole(split):
    """Two shards, each given the sums of both. The second has fewer of the teacher's tokens, or none."""
    logits, outputs, head = distributions()
    counts = torch.ones(7, dtype=torch.bool)
    whole = teacher_divergence(logits, outputs, head, counts)
    ranges, sums = [slice(0, split), slice(split, 13)], []

    def collect(x):
        sums.append(x)
        return torch.stack([x, x])

    shards = [(logits[:, each], outputs, head.rows(each.start, each.stop), counts) for each in ranges]
    for shard in shards:
        teacher_divergence(*shard, all_gather=collect)
    sharded = [teacher_divergence(*shard, all_gather=lambda _: torch.stack(sums[:2])) for shard in shards]
    torch.testing.assert_close(sharded, [whole, whole])
    (expected,) = torch.autograd.grad(whole, logits)
    torch.testing.assert_close(sum(torch.autograd.grad(each, logits)[0] for each in sharded), expected)


def test_padding_of_the_students_logits_has_no_part_in_the_divergence_and_a_gradient_of_zero():
    logits, outputs, head = distributions()
    counts = torch.ones(7, dtype=torch.bool)
    wide = torch.cat((logits.detach(), torch.full((7, 2), 1e4)), dim=1).requires_grad_()
    losses = teacher_divergence(logits, outputs, head, counts), teacher_divergence(wide, outputs, head, counts, 13)
    torch.testing.assert_close(*losses)
    expected, found = torch.autograd.grad(losses, (logits, wide))
    torch.testing.assert_close(found[:, :13], expected)
    assert not found[:, 13:].any()


def test_a_student_that_is_its_teacher_has_no_divergence_and_no_gradient():
    _, outputs, head = distributions()
    logits = head.logits(outputs).requires_grad_()
    loss = teacher_divergence(logits, outputs, head, torch.ones(7, dtype=torch.bool))
    assert abs(loss.item()) < 1e-5
    assert torch.autograd.grad(loss, logits)[0].abs().max() < 1e-6


def test_hidden_distances_are_means_over_the_width_and_sums_over_positions():
    a, b = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]), torch.tensor([[[0.0, 4.0], [3.0, 4.0]]])
    assert hidden_distance(a, b, "l1").item() == pytest.approx(1.5)
    assert hidden_distance(a, b, "l2").item() == pytest.approx(2.5)
    assert hidden_distance(a, b, "cosine").item() == pytest.approx(1 - 2 / 5**0.5, abs=1e-6)
