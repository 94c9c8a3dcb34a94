"""A window's labels depend only on the window and the settings."""

from dataclasses import replace

import pytest
import torch

import tiny
from megacocomix.config.schema import ModelConfig
from megacocomix.errors import UserError
from megacocomix.model.gpt2 import GPT2, initialise
from megacocomix.model.losses import MASKED
from megacocomix.sae.model import SAE, SAEForm
from megacocomix.teacher import labels as labels_module
from megacocomix.teacher.attribution import attribute, score, select_labels
from megacocomix.teacher.labels import ConceptLabeler, LabelSettings, open_labeler
from megacocomix.teacher.model import Teacher, gpt2_teacher

WINDOWS = torch.randint(tiny.VOCAB, (11, tiny.CONTEXT), generator=torch.Generator().manual_seed(9))
SETTINGS = LabelSettings(
    num_labels=3,
    source="attribution",
    sign="positive",
    mask_unlabelled=True,
    masked_token=None,
    chunk=tiny.CONTEXT,
    seed=None,
    sae_layer=1,
    location="resid_post_mlp",
)


@pytest.fixture(scope="module")
def teacher():
    model = GPT2(ModelConfig(**tiny.SHAPE, dropout=0.0))
    initialise(model, 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5 if parameter.dim() > 1 else 1)
    return Teacher(gpt2_teacher(model), 1)


@pytest.fixture(scope="module")
def sae():
    sae = SAE(32, tiny.LATENTS, SAEForm(k=8)).requires_grad_(False)
    sae.encoder.normal_(generator=torch.Generator().manual_seed(3))
    sae.decoder.copy_(torch.nn.functional.normalize(sae.encoder, dim=-1))
    return sae


@pytest.mark.parametrize("source", ["attribution", "activation", "random"])
@pytest.mark.parametrize("group", [1, 2, 5, 32])
def test_a_window_gets_its_labels_to_the_bit_whatever_it_is_labelled_with(teacher, sae, source, group, monkeypatch):
    monkeypatch.setattr("megacocomix.model.losses.CHUNK_ELEMENTS", 11 * tiny.VOCAB)  # logits in chunks of 8 positions
    monkeypatch.setitem(labels_module.FORWARD_TOKENS, "cpu", group * tiny.CONTEXT)
    labeler = ConceptLabeler(teacher, sae, replace(SETTINGS, source=source, seed=1))
    together = labeler(WINDOWS)
    assert together.shape == (11, tiny.CONTEXT, 3)
    assert torch.equal(torch.cat([labeler(window[None]) for window in WINDOWS]), together)
    assert torch.equal(labeler(WINDOWS.flip(0)).flip(0), together)


def test_attribution_takes_the_chosen_side_of_zero(teacher, sae):
    scores = attribute(teacher, sae, WINDOWS)
    dense = torch.zeros(*WINDOWS.shape, tiny.LATENTS).scatter(-1, scores.index, scores.score)
    for sign, wanted in (("positive", dense), ("negative", -dense), ("absolute", dense.abs())):
        labels = ConceptLabeler(teacher, sae, replace(SETTINGS, sign=sign))(WINDOWS)
        top = wanted.topk(3)
        has_signal = top.values[..., -1] > 0
        assert torch.equal(labels[has_signal].sort(-1).values, top.indices[has_signal].sort(-1).values)
        assert (labels[~has_signal] == MASKED).all()
        assert 0 < has_signal.sum() < has_signal.numel()


def test_activation_takes_the_strongest_and_labels_the_last_position_too(teacher, sae):
    labels = ConceptLabeler(teacher, sae, replace(SETTINGS, source="activation"))(WINDOWS)
    index, value = sae.encode(teacher.hidden(WINDOWS))
    is_active = value[..., 2] > 0
    assert torch.equal(labels[is_active], index[..., :3][is_active])
    assert (labels[:, -1] != MASKED).any()


def test_random_draws_active_concepts_alike_and_others_with_another_seed(teacher, sae):
    draw = lambda seed: ConceptLabeler(teacher, sae, replace(SETTINGS, source="random", seed=seed))(WINDOWS)
    labels, again, other = draw(5), draw(5), draw(6)
    assert torch.equal(labels, again)
    assert not torch.equal(labels, other)
    index, value = sae.encode(teacher.hidden(WINDOWS))
    active = torch.zeros(*WINDOWS.shape, tiny.LATENTS, dtype=torch.bool).scatter(-1, index, value > 0)
    has_signal = labels[..., 0] != MASKED
    assert active[has_signal].gather(-1, labels[has_signal]).all()
    assert (labels[has_signal].sort(-1).values.diff() > 0).all()  # no concept twice
    strongest = index[..., 0][has_signal]
    share = (labels[has_signal] == strongest[:, None]).any(-1).float().mean()
    assert share == pytest.approx(3 / 8, abs=0.15)  # the strongest is not preferred


def test_what_is_drawn_does_not_depend_on_how_many_latents_a_neighbour_has(teacher, sae):
    relu = SAE(32, tiny.LATENTS, SAEForm("relu", normalization="none")).requires_grad_(False)
    relu.load_state_dict(sae.state_dict())
    whole = score(teacher, relu, WINDOWS, "random", 1)
    alone = score(teacher, relu, WINDOWS[:1], "random", 1)
    num = alone.score.shape[-1]
    is_active = alone.score > 0
    assert torch.equal(whole.score[:1, :, :num][is_active], alone.score[is_active])


def test_a_relu_autoencoder_labels_like_its_dense_formula(teacher, sae):
    relu = SAE(32, tiny.LATENTS, SAEForm("relu", normalization="none")).requires_grad_(False)
    relu.load_state_dict(sae.state_dict())
    labels = ConceptLabeler(teacher, relu, SETTINGS)(WINDOWS)
    hidden, gradient = teacher.hidden_and_gradient(WINDOWS)
    dense = ((hidden - relu.pre_bias) @ relu.encoder.T + relu.latent_bias).relu() * (gradient @ relu.decoder.T)
    top = dense.topk(3)
    has_signal = (top.values[..., -1] > 0) & (top.values.diff(dim=-1).abs().amin(-1) > 1e-6)
    assert has_signal.float().mean() > 0.5
    assert torch.equal(labels[has_signal].sort(-1).values, top.indices[has_signal].sort(-1).values)


def test_fewer_active_latents_than_labels_mask_the_position(teacher, sae):
    quiet = SAE(32, tiny.LATENTS, SAEForm("relu", normalization="none")).requires_grad_(False)
    labels = ConceptLabeler(teacher, quiet, SETTINGS)(WINDOWS)
    assert (labels == MASKED).all()
    kept = select_labels(score(teacher, quiet, WINDOWS, "attribution", 0), 3, mask_unlabelled=False)
    assert kept.shape == (11, tiny.CONTEXT, 3)


def test_end_of_text_is_masked_on_request(teacher, sae):
    windows = WINDOWS.clone()
    windows[:, 3] = 7
    labels = ConceptLabeler(teacher, sae, replace(SETTINGS, masked_token=7))(windows)
    without = ConceptLabeler(teacher, sae, SETTINGS)(windows)
    is_masked = windows == 7
    assert (labels[is_masked] == MASKED).all()
    assert (without[is_masked] != MASKED).any()
    assert torch.equal(labels[~is_masked], without[~is_masked])


def test_a_window_longer_than_the_teachers_is_labelled_chunk_by_chunk(teacher, sae):
    labeler = ConceptLabeler(teacher, sae, replace(SETTINGS, chunk=6))
    labels = labeler(WINDOWS)
    chunks = [labeler(chunk) for chunk in WINDOWS.split(6, dim=1)]
    assert torch.equal(labels, torch.cat(chunks, dim=1))
    assert (labels[:, [5, 11, 15]] == MASKED).all()  # the last position of each chunk has no next token
    one_left = ConceptLabeler(teacher, sae, replace(SETTINGS, chunk=5))(WINDOWS)
    assert (one_left[:, 15] == MASKED).all()


def test_a_context_longer_than_the_teachers_is_refused_or_windowed(folder):
    longer = {"model": {"context": 40}}
    with pytest.raises(UserError, match=r"teacher\.windowed=true"):
        open_labeler(tiny.config(folder, **longer), torch.device("cpu"), 0)
    labeler = open_labeler(tiny.config(folder, **longer, teacher={"windowed": True}), torch.device("cpu"), 0)
    assert labeler.settings.chunk == tiny.CONTEXT
    tokens = torch.randint(tiny.VOCAB, (2, 40), generator=torch.Generator().manual_seed(0))
    assert labeler(tokens).shape == (2, 40, 3)


def test_tokenizers_that_differ_are_refused_with_both_hashes(folder, tmp_path):
    tiny.make_sae(tmp_path / "sae.safetensors", tokenizer_sha256="0" * 64)
    config = tiny.config(folder, teacher={"sae": str(tmp_path / "sae.safetensors")})
    with pytest.raises(UserError) as caught:
        open_labeler(config, torch.device("cpu"), 0)
    (line,) = caught.value.problems
    assert "0" * 64 in line
    assert tiny_tokenizer_sha256() in line


def test_a_teacher_with_another_tokenizer_is_refused_with_both_hashes(root, tmp_path):
    config = tiny.config(tmp_path, teacher={"model": str(root / "assets/teacher")}, model={"vocab_size": 50257})
    config = config.model_copy(
        update={"teacher": config.teacher.model_copy(update={"sae": str(root / "assets/teacher/sae.safetensors")})}
    )
    with pytest.raises(UserError) as caught:
        open_labeler(config, torch.device("cpu"), 0)
    lines = [line for line in caught.value.problems if "must read the same tokens" in line]
    assert len(lines) == 2  # the teacher's and the autoencoder's
    assert all(tiny_tokenizer_sha256() in line for line in lines)


def test_what_labelling_costs_is_counted(teacher, sae):
    count = lambda source: ConceptLabeler(teacher, sae, replace(SETTINGS, source=source)).flops_per_token()
    linear, attention, head, encode = 2 * 12 * 32**2, 4 * tiny.CONTEXT * 32, 2 * 32 * tiny.VOCAB, 2 * 32 * tiny.LATENTS
    assert count("activation") == count("random") == 2 * (linear + attention) + encode
    backward = linear + 2 * attention + head  # one block above the hook point
    assert count("attribution") == 3 * (linear + attention) + head + backward + encode + 2 * 32 * 8


def tiny_tokenizer_sha256():
    from megacocomix.data.tokenizer import load_tokenizer

    return load_tokenizer("gpt2").sha256


def test_tf32_is_refused_on_a_gpu_that_lacks_it(monkeypatch):
    problems = lambda precision: list(labels_module._precision_problems(precision, torch.device("cuda", 0)))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    assert problems("tf32") == ["teacher.sae_precision is tf32, which Tesla V100 does not have. Nearest valid: fp32."]
    assert problems("fp32") == []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert problems("tf32") == []
