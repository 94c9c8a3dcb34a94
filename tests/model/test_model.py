import pytest
import torch
import torch.nn.functional as F

import tiny
from megacocomix.config.schema import ModelConfig
from megacocomix.model.concept import ConceptMixer, interleave, standardize
from megacocomix.model.gpt2 import GPT2, initial_value, initialise
from megacocomix.model.heads import FrozenHead, frozen_head_loss
from megacocomix.model.losses import MASKED, label_cross_entropy, next_token_targets

SHAPE = ModelConfig(**tiny.SHAPE, dropout=0.0)


def student(insertion_layer):
    model = GPT2(SHAPE, tiny.method(insertion_layer=insertion_layer))
    initialise(model, 0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5 if parameter.dim() > 1 else 1)
    return model


def test_a_concept_stands_right_after_its_token():
    x, c = torch.zeros(1, 3, 2), torch.ones(1, 3, 2)
    assert interleave(x, c)[0, :, 0].tolist() == [0, 1, 0, 1, 0, 1]


def test_compress_of_k_rows_equals_the_dense_product_in_value_and_gradient():
    mixer = ConceptMixer(8, tiny.method(num_concepts=50)).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.normal_(generator=generator)
    x = torch.randn(2, 5, 8, generator=generator, dtype=torch.double)

    def dense():
        normed, mean, std = standardize(x)
        logits = mixer.predict(normed.double() - mixer.pre_bias)
        kept = torch.zeros_like(logits).scatter(-1, logits.topk(4).indices, logits.topk(4).values)
        concept = (kept @ mixer.compress.weight + mixer.compress.bias + mixer.pre_bias) * std + mean
        return interleave(x, concept)

    parameters = list(mixer.parameters())
    sparse = mixer(x)[0]
    torch.testing.assert_close(sparse, dense())
    ours = torch.autograd.grad(sparse.square().sum(), parameters)
    theirs = torch.autograd.grad(dense().square().sum(), parameters)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("num_labels", [1, 4])
def test_label_cross_entropy_equals_the_mean_of_single_label_ones(num_labels, monkeypatch):
    monkeypatch.setattr("megacocomix.model.losses.CHUNK_ELEMENTS", 3 * 11)  # chunks of three rows
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, 11, generator=generator, requires_grad=True)
    labels = torch.stack([torch.randperm(11, generator=generator)[:num_labels] for _ in range(10)]).view(2, 5, -1)
    labels[1, 2] = MASKED
    each = [
        torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), labels[..., k].flatten(), ignore_index=-1, reduction="sum"
        )
        for k in range(num_labels)
    ]
    ours, theirs = label_cross_entropy(logits, labels), torch.stack(each).mean()
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(torch.autograd.grad(3 * ours, logits), torch.autograd.grad(3 * theirs, logits))


def test_label_cross_entropy_of_bf16_logits_sums_in_fp32():
    logits = torch.randn(4, 5000, generator=torch.Generator().manual_seed(0)).bfloat16()
    labels = torch.tensor([[1], [2], [3], [4]])
    exact = torch.nn.functional.cross_entropy(logits.double(), labels[:, 0], reduction="sum")
    assert label_cross_entropy(logits, labels).item() == pytest.approx(exact.item(), rel=1e-6)


def test_padding_of_logits_has_no_part_in_the_loss_and_a_gradient_of_zero():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 11, generator=generator, requires_grad=True)
    labels = torch.randint(11, (6, 3), generator=generator)
    wide = torch.cat((logits.detach(), torch.full((6, 2), 1e4)), dim=1).requires_grad_()
    losses = label_cross_entropy(logits, labels), label_cross_entropy(wide, labels, range(11))
    torch.testing.assert_close(*losses)
    expected, found = torch.autograd.grad(losses, (logits, wide))
    torch.testing.assert_close(found[:, :11], expected)
    assert not found[:, 11:].any()


@pytest.mark.parametrize("num_tokens", [64, 37])
def test_a_frozen_head_has_zeros_up_to_a_multiple_of_64_rows_which_are_no_tokens(num_tokens):
    weight, hidden = torch.randn(num_tokens, 16), torch.randn(3, 16)
    head = FrozenHead(weight, None)
    assert (head.num_tokens, head.weight.shape) == (num_tokens, (64, 16))
    assert not head.weight[num_tokens:].any()
    torch.testing.assert_close(head.logits(hidden), hidden @ weight.T)
    shard = head.rows(30, 60)
    torch.testing.assert_close(shard.logits(hidden), hidden @ weight[30:60].T)
    assert shard.weight.shape == (64, 16)


def test_the_last_position_of_a_window_has_no_target():
    targets = next_token_targets(torch.tensor([[5, 6, 7]]))
    assert targets[..., 0].tolist() == [[6, 7, MASKED]]


def test_a_parameters_initial_value_depends_on_seed_and_name_alone():
    shape = torch.Size([7, 5])
    first = initial_value("embed.tokens.weight", shape, seed=1, num_layers=2)
    torch.manual_seed(5)
    assert torch.equal(first, initial_value("embed.tokens.weight", shape, seed=1, num_layers=5))
    assert not torch.equal(first, initial_value("embed.positions.weight", shape, seed=1, num_layers=2))
    assert not torch.equal(first, initial_value("embed.tokens.weight", shape, seed=2, num_layers=2))


def test_the_models_heads_are_tied():
    model = student(1)
    assert model.head.weight is model.embed.tokens.weight
    assert [name for name, _ in model.named_parameters()].count("head.weight") == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_frozen_heads_loss_and_gradient_are_those_of_its_logits_in_slices_and_near_certainty(dtype, monkeypatch):
    monkeypatch.setattr("megacocomix.model.losses.CHUNK_ELEMENTS", 5 * 37)
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(37, 16, generator=generator), torch.randn(37, generator=generator)
    targets = torch.randint(37, (11,), generator=generator)
    hidden = torch.randn(11, 16, generator=generator)
    hidden[:4] = 0.6 * weight[targets[:4]]  # nearly certain of the right token
    targets[6] = MASKED
    exact = [each.to(dtype).double() for each in (hidden, weight, bias)]
    exact[0].requires_grad_()
    expected = torch.nn.functional.cross_entropy(
        exact[0] @ exact[1].T + exact[2], targets, ignore_index=MASKED, reduction="sum"
    )
    expected.backward()
    ours = hidden.to(dtype).requires_grad_()
    loss = frozen_head_loss(ours, FrozenHead(weight.to(dtype), bias.to(dtype)), targets)
    (0.5 * loss).backward()
    tolerance = 1e-4 if dtype == torch.float32 else 0.05
    assert loss.item() == pytest.approx(expected.item(), rel=tolerance)
    assert (ours.grad[6] == 0).all()
    for row in range(11):
        difference = (2 * ours.grad[row].double() - exact[0].grad[row]).norm()
        assert difference <= tolerance * exact[0].grad[row].norm() + 1e-12, row


def test_attention_with_a_mask_never_takes_the_kernel_of_cudnn(monkeypatch):
    attend, seen = F.scaled_dot_product_attention, []

    def record(q, k, v, mask, *arguments, **keywords):
        seen.append((mask is not None, torch.backends.cuda.cudnn_sdp_enabled()))
        return attend(q, k, v, mask, *arguments, **keywords)

    monkeypatch.setattr(F, "scaled_dot_product_attention", record)
    student(2)(torch.zeros(1, 8, dtype=torch.int64))
    assert set(seen) == {(False, True), (True, False)}
    assert torch.backends.cuda.cudnn_sdp_enabled()
