import pytest
import torch

import tiny
from megacocomix.config.schema import ModelConfig
from megacocomix.errors import UserError
from megacocomix.model.gpt2 import GPT2, initialise
from megacocomix.model.losses import MASKED
from megacocomix.sae.file import load_sae
from megacocomix.teacher.attribution import Scores, attribute, select_labels
from megacocomix.teacher.labels import open_labeler
from megacocomix.teacher.load import load_teacher
from megacocomix.teacher.model import Teacher, gpt2_teacher

LOCATIONS = ["resid_post_mlp", "resid_post_attn", "resid_delta_mlp", "resid_delta_attn"]
TOKENS = torch.randint(tiny.VOCAB, (2, tiny.CONTEXT), generator=torch.Generator().manual_seed(9))


@pytest.fixture(scope="module")
def model():
    model = GPT2(ModelConfig(**tiny.SHAPE, dropout=0.0))
    initialise(model, 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5 if parameter.dim() > 1 else 1)
    return model


@pytest.fixture(scope="module")
def sae(tmp_path_factory):
    file = tmp_path_factory.mktemp("sae") / "sae.safetensors"
    tiny.make_sae(file, width=tiny.SHAPE["hidden_size"])
    return load_sae(file)


@pytest.mark.parametrize("location", LOCATIONS)
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_hook_point_changes_nothing(model, layer, location):
    teacher = Teacher(gpt2_teacher(model), layer, location)
    hidden = teacher.hidden(TOKENS)
    logits = model(TOKENS)[0]
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten())
    torch.testing.assert_close(teacher.loss(TOKENS), loss)
    torch.testing.assert_close(teacher.loss(TOKENS, replace=hidden), loss)
    assert not torch.isclose(teacher.loss(TOKENS, replace=hidden.flip(1)), loss)


@pytest.mark.parametrize("location", LOCATIONS)
def test_the_gradient_is_that_of_the_loss_at_the_location(model, location):
    teacher = Teacher(gpt2_teacher(model), 1, location)
    hidden, gradient = teacher.hidden_and_gradient(TOKENS)
    direction = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(2))
    step = 1e-2
    ahead, behind = (teacher.loss(TOKENS, hidden + sign * step * direction) for sign in (1, -1))
    # `loss` is the mean over the windows, the gradient each window's own.
    measured = (ahead - behind) / (2 * step) * len(TOKENS)
    assert measured.item() == pytest.approx((gradient * direction).sum().item(), rel=1e-2)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_attribution_in_chunks_equals_attribution_at_once(model, sae, monkeypatch):
    teacher = Teacher(gpt2_teacher(model), 1)
    whole = attribute(teacher, sae, TOKENS)
    monkeypatch.setattr("megacocomix.model.losses.CHUNK_ELEMENTS", 5 * 8 * 32)
    chunked = attribute(teacher, sae, TOKENS)
    assert torch.equal(whole.index, chunked.index)
    torch.testing.assert_close(whole.score, chunked.score)


def test_a_position_with_too_few_positive_scores_has_no_label():
    attribution = Scores(
        index=torch.tensor([[[10, 11, 12], [20, 21, 22], [30, 31, 32]]]),
        score=torch.tensor([[[0.1, 0.3, 0.2], [0.5, -0.1, 0.0], [0.0, 0.0, 0.0]]]),
    )
    assert select_labels(attribution, 2, mask_unlabelled=True).tolist() == [[[11, 12], [MASKED] * 2, [MASKED] * 2]]
    kept = select_labels(attribution, 2, mask_unlabelled=False)
    assert kept[0, 0].tolist() == [11, 12]
    assert kept[0, 1, 0].item() == 20
    assert (kept >= 0).all()


def test_the_last_position_of_a_window_is_never_labelled(model, sae):
    labels = select_labels(attribute(Teacher(gpt2_teacher(model), 1), sae, TOKENS), 3, mask_unlabelled=True)
    assert (labels[:, -1] == MASKED).all()
    assert (labels[:, :-1] >= 0).any()


@pytest.mark.parametrize(
    ("sae", "sections", "what"),
    [
        ({"width": 20}, {}, "width"),
        ({"latents": 50}, {}, "Nearest valid: 50"),
        ({"sae_layer": 2}, {}, "sae_layer 2"),
        ({"location": "resid_post_attn"}, {}, "location resid_post_attn"),
        ({"teacher_sha256": "0" * 64}, {}, "teacher_sha256"),
        ({"k": 2}, {}, "Nearest valid: 2"),
        ({}, {"model": {"context": 32}}, "Nearest valid: 16"),
        ({}, {"model": {"vocab_size": 90}}, "Nearest valid: 97"),
    ],
)
def test_a_teacher_or_autoencoder_that_does_not_fit_is_refused(folder, tmp_path, sae, sections, what):
    tiny.make_sae(tmp_path / "sae.safetensors", **sae)
    config = tiny.config(folder, **sections | {"teacher": {"sae": str(tmp_path / "sae.safetensors")}})
    with pytest.raises(UserError) as caught:
        open_labeler(config, torch.device("cpu"), 50256)
    assert len(caught.value.problems) == 1
    assert what in caught.value.problems[0]


@pytest.mark.parametrize("layer", [-1, 3])
def test_a_layer_that_the_teacher_does_not_have_is_refused(folder, layer):
    with pytest.raises(UserError, match="0 … 2"):
        load_teacher(folder / "teacher", layer)
