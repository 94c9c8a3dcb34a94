"""The autoencoder computes OpenAI's formula. Its file records everything, or is refused."""

import json
from types import SimpleNamespace

import pytest
import torch
from external_saes import LATENTS, WIDTH, K, openai_weights
from safetensors.torch import load_file, save_file

from megacocomix.errors import UserError
from megacocomix.sae import file as sae_file
from megacocomix.sae import model as sae_module
from megacocomix.sae.file import FORMAT, load_sae, save_sae
from megacocomix.sae.formats import from_openai
from megacocomix.sae.model import SAE, SAEForm

INFO = {
    "teacher": "tiny",
    "teacher_sha256": "ab",
    "sae_layer": 3,
    "location": "resid_post_mlp",
    "measured": {"l0": 5.0},
}


def dense_formula(state, x, k):
    """OpenAI's forward pass as published: dense latents, dense decoder."""
    mean = x.mean(-1, keepdim=True)
    std = (x - mean).std(-1, keepdim=True)
    pre = ((x - mean) / (std + 1e-5) - state["pre_bias"]) @ state["encoder.weight"].T + state["latent_bias"]
    top = pre.topk(k, dim=-1)
    latents = torch.zeros_like(pre).scatter(-1, top.indices, top.values.relu())
    return latents, (latents @ state["decoder.weight"].T + state["pre_bias"]) * std + mean


@pytest.fixture
def sae():
    return from_openai(openai_weights(), SAEForm(k=K), "state")


@pytest.fixture
def x():
    return 3 + 2 * torch.randn(4, 7, WIDTH, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def saved(sae, tmp_path):
    path = tmp_path / "new" / "folder" / "sae.safetensors"
    save_sae(sae, path, INFO)
    return path


def rewrite(path, header=None, weights=None):
    """Replace some header entries and tensors of a file; None removes an entry."""
    with sae_file.safe_open(path, "pt") as file:
        header = {**file.metadata(), **(header or {})}
    weights = {**load_file(path), **(weights or {})}
    keep = lambda entries: {name: value for name, value in entries.items() if value is not None}
    save_file(keep(weights), path, metadata=keep(header))


def test_encode_and_decode_equal_the_dense_formula(sae, x):
    latents, x_hat = dense_formula(openai_weights(), x, K)
    index, value = sae.encode(x)
    assert index.dtype == torch.int64
    assert index.shape == value.shape == (4, 7, K)
    torch.testing.assert_close(torch.zeros_like(latents).scatter(-1, index, value), latents, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(sae.reconstruct(x), x_hat, rtol=1e-6, atol=1e-5)


def test_latents_that_are_not_positive_are_zero(x):
    state = openai_weights()
    state["latent_bias"] -= 12
    latents, x_hat = dense_formula(state, x, K)
    sae = from_openai(state, SAEForm(k=K), "state")
    _, value = sae.encode(x)
    assert (value == 0).any()
    assert (value > 0).sum() == (latents > 0).sum()
    torch.testing.assert_close(sae.reconstruct(x), x_hat, rtol=1e-6, atol=1e-5)


def test_chunks_of_rows_change_nothing(sae, x, monkeypatch):
    index, value = sae.encode(x)
    monkeypatch.setattr(sae_module, "MAX_PRE_ACTIVATIONS", 3 * LATENTS)
    chunked_index, chunked_value = sae.encode(x)
    assert torch.equal(chunked_index, index)
    torch.testing.assert_close(chunked_value, value, rtol=1e-6, atol=1e-6)


def test_gradients_equal_those_of_the_dense_formula(sae, x):
    state = {name: weight.requires_grad_() for name, weight in openai_weights().items()}
    dense_formula(state, x, K)[1].square().sum().backward()
    sae.reconstruct(x).square().sum().backward()
    for name, weight in sae.named_parameters():
        dense = state[name if name.endswith("bias") else f"{name}.weight"].grad
        torch.testing.assert_close(weight.grad, dense.T if name == "decoder" else dense, rtol=1e-4, atol=1e-2)


def test_bf16_residuals_come_back_as_bf16(sae, x):
    assert sae.encode(x.bfloat16())[1].dtype == torch.float32
    assert sae.reconstruct(x.bfloat16()).dtype == torch.bfloat16


def test_file_gives_back_the_same_bits_frozen_and_what_was_recorded(sae, saved):
    loaded = load_sae(saved)
    assert (loaded.form, loaded.width, loaded.num_latents) == (SAEForm(k=K), WIDTH, LATENTS)
    assert loaded.info == INFO
    for name, weight in loaded.named_parameters():
        assert torch.equal(weight, sae.get_parameter(name))
        assert not weight.requires_grad
    assert [file.name for file in saved.parent.iterdir()] == [saved.name]


def test_missing_file_is_refused(tmp_path):
    with pytest.raises(UserError, match="no such SAE file"):
        load_sae(tmp_path / "sae.safetensors")


def test_file_that_is_not_safetensors_is_refused(tmp_path):
    path = tmp_path / "5.pt"
    torch.save(openai_weights(), path)
    with pytest.raises(UserError, match=r"5\.pt: not a readable safetensors file.*train_sae"):
        load_sae(path)


def test_truncated_file_is_refused(saved):
    saved.write_bytes(saved.read_bytes()[:-100])
    with pytest.raises(UserError, match="not a readable safetensors file"):
        load_sae(saved)


def test_safetensors_file_of_another_project_is_refused(tmp_path):
    path = tmp_path / "sae.safetensors"
    save_file(openai_weights(), path)
    with pytest.raises(UserError, match=f"format 'none', not '{FORMAT}'.*train_sae"):
        load_sae(path)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"format": "other"}, "format 'other'"),
        ({"version": "99"}, "version 99"),
        ({"version": "new"}, "header is damaged"),
        ({"version": "1"}, "version 1"),
        ({"activation": "jumprelu"}, "activation 'jumprelu'"),
        ({"activation": "relu"}, "belongs to the activation topk"),
        ({"normalization": json.dumps({"kind": "other"})}, "normalization 'other'"),
        ({"normalization": json.dumps({"kind": "standardize", "eps": 1e-5, "unbiased": False})}, "normalises with"),
        ({"k": None}, "header is damaged"),
        ({"k": str(LATENTS + 1)}, f"k is {LATENTS + 1}"),
        ({"info": "{"}, "header is damaged"),
    ],
)
def test_header_that_this_code_does_not_compute_is_refused(saved, header, message):
    rewrite(saved, header=header)
    with pytest.raises(UserError, match=message):
        load_sae(saved)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"encoder": None}, "tensors missing: encoder"),
        ({"pre_bias": torch.zeros(WIDTH + 1)}, "shapes of its tensors disagree"),
        ({"latent_bias": torch.zeros(LATENTS - 1)}, "shapes of its tensors disagree"),
        ({"decoder": torch.zeros(WIDTH, LATENTS)}, "shapes of its tensors disagree"),
        ({"encoder": torch.zeros(LATENTS)}, "shapes of its tensors disagree"),
        ({"decoder": torch.full((LATENTS, WIDTH), torch.nan)}, f"not finite .{LATENTS * WIDTH} of decoder."),
    ],
)
def test_tensors_that_disagree_are_refused(saved, weights, message):
    rewrite(saved, weights=weights)
    with pytest.raises(UserError, match=message):
        load_sae(saved)


@pytest.mark.parametrize("k", [0, LATENTS + 1])
def test_k_outside_the_latents_is_refused(k):
    with pytest.raises(UserError, match=f"k is {k}; it must be from 1"):
        SAE(WIDTH, LATENTS, SAEForm(k=k))


@pytest.mark.parametrize("normalization", ["none", "center", "rescale", "standardize"])
@pytest.mark.parametrize("activation", ["topk", "relu"])
def test_every_form_comes_back_from_its_file_and_reconstructs(x, tmp_path, activation, normalization):
    form = SAEForm(activation, K if activation == "topk" else None, normalization)
    sae = from_openai(openai_weights(), form, "state")
    save_sae(sae, tmp_path / "sae.safetensors", {})
    loaded = load_sae(tmp_path / "sae.safetensors")
    assert loaded.form == form
    assert torch.equal(loaded.reconstruct(x), sae.reconstruct(x))
    normed, mean, scale = form.normalize(x)
    torch.testing.assert_close(normed * scale + mean, x, rtol=1e-4, atol=1e-4)


def test_relu_keeps_every_positive_latent_and_no_other(x, monkeypatch):
    state = openai_weights()
    sae = from_openai(state, SAEForm("relu", normalization="none"), "state")
    monkeypatch.setattr(sae_module, "MAX_PRE_ACTIVATIONS", 3 * LATENTS)  # chunks differ in how many they keep
    dense = ((x - state["pre_bias"]) @ state["encoder.weight"].T + state["latent_bias"]).relu()
    index, value = sae.encode(x)
    assert index.shape[-1] == (dense > 0).sum(-1).max()
    rebuilt = torch.zeros_like(dense).scatter_add(-1, index, value)
    torch.testing.assert_close(rebuilt, dense, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize(
    ("tf32", "is_cuda", "inside"), [(True, True, "tf32"), (False, True, "none"), (True, False, "none")]
)
@pytest.mark.parametrize("fails", [False, True])
def test_tf32_is_set_around_the_encoder_of_a_gpu_alone_and_always_taken_back(
    sae, monkeypatch, tf32, is_cuda, inside, fails
):
    found, matmul = [], torch.backends.cuda.matmul

    def linear(*_):
        found.append(matmul.fp32_precision)
        if fails:
            raise MemoryError

    monkeypatch.setattr(sae_module.F, "linear", linear)
    sae.tf32 = tf32
    try:
        sae._pre_activations(SimpleNamespace(is_cuda=is_cuda))
    except MemoryError:
        assert fails
    assert (found, matmul.fp32_precision) == ([inside], "none")
    assert not matmul.allow_tf32  # of the older setting; reading it is an error if the two differ
