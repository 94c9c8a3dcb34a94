"""Autoencoders of other projects compute the same in our format."""

import json
import pickle

import pytest
import torch
from external_saes import (
    LATENTS,
    SAELENS_1,
    SAELENS_5,
    SAELENS_6,
    SPARSIFY,
    WIDTH,
    K,
    openai_dense,
    saelens_dense,
    sparsify_dense,
    write_openai,
    write_saelens,
    write_sparsify,
)
from safetensors.torch import load_file, save_file

from megacocomix.errors import UserError
from megacocomix.sae.formats import read_external_sae
from megacocomix.sae.saelens import write_saelens as export

X = 1 + 2 * torch.randn(4, 7, WIDTH, generator=torch.Generator().manual_seed(1))


def computes(sae, latents, reconstruction):
    """Encode and decode agree with a dense fp64 formula to 1e-6 of the largest element."""
    index, value = sae.encode(X)
    dense = torch.zeros(latents.shape).scatter_add(-1, index, value)
    torch.testing.assert_close(dense, latents.float(), rtol=0, atol=1e-6 * latents.abs().max().item())
    scale = reconstruction.abs().max().item()
    torch.testing.assert_close(sae.reconstruct(X), reconstruction.float(), rtol=0, atol=1e-6 * scale)


@pytest.mark.parametrize(
    ("path", "activation", "where"),
    [
        ("resid_post_mlp_v5_32k/autoencoders/5.pt", "TopK", (5, "resid_post_mlp", 64)),
        ("resid_delta_mlp_v4/autoencoders/11.pt", "ReLU", (11, "resid_delta_mlp", 64)),
        ("resid_delta_mlp/autoencoders/0.pt", "ReLU", (0, "resid_delta_mlp", 64)),
        ("elsewhere/mine.pt", "TopK", (None, None, None)),
    ],
)
def test_openai_files_compute_the_same_and_record_where_they_belong(tmp_path, path, activation, where):
    state = write_openai(tmp_path / path, activation)
    found = read_external_sae(tmp_path / path)
    computes(found.sae, *openai_dense(state, X, activation))
    assert found.kind == "openai"
    assert found.sae.form.k == (K if activation == "TopK" else None)
    assert tuple(found.info.get(key) for key in ("sae_layer", "location", "context")) == where
    assert len(found.info["source"]["sha256"]) == 64


@pytest.mark.parametrize(
    ("changes", "extra"),
    [
        (SAELENS_6, ()),
        (SAELENS_6 | {"normalize_activations": "layer_norm"}, ()),
        (SAELENS_6 | {"normalize_activations": "constant_norm_rescale"}, ()),
        (SAELENS_6 | {"apply_b_dec_to_input": False}, ()),
        (SAELENS_6 | {"rescale_acts_by_decoder_norm": True}, ()),
        (SAELENS_6 | {"architecture": "standard", "k": None}, ()),
        (SAELENS_5, ()),
        (SAELENS_5 | {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 7}}, ()),
        (SAELENS_5 | {"finetuning_scaling_factor": True}, ("finetuning_scaling_factor",)),
        (SAELENS_1 | {"model_from_pretrained_kwargs": {"center_writing_weights": False}}, ("scaling_factor",)),
    ],
)
def test_saelens_folders_of_every_version_compute_the_same(tmp_path, changes, extra):
    weights = write_saelens(tmp_path / "sae", changes, extra)
    found = read_external_sae(tmp_path / "sae")
    computes(found.sae, *saelens_dense(weights, changes, X))
    # The input of block 4 is the output of block 3.
    assert (found.info["sae_layer"], found.info["location"]) == (3, "resid_post_mlp")
    assert (found.info["teacher"], found.info["context"]) == ("gpt2-small", 128)


@pytest.mark.parametrize(
    ("hook", "where"),
    [
        ("blocks.2.hook_resid_mid", (2, "resid_post_attn")),
        ("blocks.2.hook_mlp_out", (2, "resid_delta_mlp")),
        ("blocks.2.hook_attn_out", (2, "resid_delta_attn")),
    ],
)
def test_saelens_hooks_are_our_locations(tmp_path, hook, where):
    cfg = SAELENS_6 | {"metadata": SAELENS_6["metadata"] | {"hook_name": hook}}
    write_saelens(tmp_path / "sae", cfg)
    info = read_external_sae(tmp_path / "sae").info
    assert (info["sae_layer"], info["location"]) == where


def test_a_residual_that_was_centred_in_training_is_centred_here(tmp_path):
    cfg = SAELENS_6 | {
        "metadata": SAELENS_6["metadata"] | {"model_from_pretrained_kwargs": {"center_writing_weights": True}}
    }
    weights = write_saelens(tmp_path / "sae", cfg)
    sae = read_external_sae(tmp_path / "sae").sae
    latents, reconstruction = saelens_dense(weights, cfg, X - X.mean(-1, keepdim=True))
    computes(sae, latents, reconstruction + X.double().mean(-1, keepdim=True))


@pytest.mark.parametrize(
    ("folder", "where"),
    [
        ("layers.5", (5, "resid_post_mlp")),
        ("h.3", (3, "resid_post_mlp")),
        ("layers.0.mlp", (0, "resid_delta_mlp")),
        ("layers.2.attention", (2, "resid_delta_attn")),
        ("h.2.attn/seed1", (2, "resid_delta_attn")),
        ("mine", (None, None)),
    ],
)
def test_sparsify_folders_compute_the_same_and_record_where_they_belong(tmp_path, folder, where):
    weights = write_sparsify(tmp_path / folder)
    found = read_external_sae(tmp_path / folder)
    computes(found.sae, *sparsify_dense(weights, X))
    assert (found.info.get("sae_layer"), found.info.get("location")) == where


@pytest.mark.parametrize("normalization", ["none", "layer_norm", "constant_norm_rescale"])
@pytest.mark.parametrize("architecture", ["topk", "standard"])
def test_what_is_exported_for_saelens_reads_back_to_the_bit(tmp_path, architecture, normalization):
    cfg = SAELENS_6 | {"architecture": architecture, "normalize_activations": normalization}
    cfg["k"] = K if architecture == "topk" else None
    weights = write_saelens(tmp_path / "sae", cfg)
    found = read_external_sae(tmp_path / "sae")
    found.sae.info = found.info
    export(found.sae, tmp_path / "back")
    again = load_file(tmp_path / "back/sae_weights.safetensors")
    assert all(torch.equal(again[name], weights[name]) for name in weights)
    written = json.loads((tmp_path / "back/cfg.json").read_text())
    # By their formula, from what was written.
    computes(found.sae, *saelens_dense(again, written, X))
    same = ("architecture", "d_in", "d_sae", "normalize_activations", "apply_b_dec_to_input")
    assert {key: written[key] for key in same} == {key: cfg[key] for key in same}
    assert written["metadata"]["hook_name"] == "blocks.3.hook_resid_post"
    assert read_external_sae(tmp_path / "back").sae.form == found.sae.form


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (
            lambda path: write_saelens(path, SAELENS_6 | {"architecture": "jumprelu"}),
            "jumprelu with relu is not computed",
        ),
        (lambda path: write_saelens(path, SAELENS_5 | {"activation_fn_str": "tanh-relu"}), "tanh-relu is not computed"),
        (lambda path: write_saelens(path, SAELENS_6 | {"k": None}), "its k is missing"),
        (lambda path: write_saelens(path, SAELENS_6 | {"k": LATENTS + 1}), "k is 97"),
        (lambda path: write_saelens(path, SAELENS_6 | {"reshape_activations": "hook_z"}), "reshape_activations hook_z"),
        (
            lambda path: write_saelens(path, SAELENS_6 | {"normalize_activations": "whiten"}),
            "normalize_activations whiten",
        ),
        (
            lambda path: write_saelens(path, SAELENS_5 | {"hook_name": "blocks.3.attn.hook_z"}),
            "hook blocks.3.attn.hook_z is not a residual location",
        ),
        (lambda path: write_sparsify(path, SPARSIFY | {"activation": "groupmax"}), "activation groupmax"),
        (lambda path: write_sparsify(path, SPARSIFY | {"transcode": True}), "transcode True"),
        (lambda path: write_sparsify(path, SPARSIFY | {"signed": True}), "signed True"),
        (lambda path: write_sparsify(path, None, ("W_skip",)), "skip connection"),
        (lambda path: write_sparsify(path / "layers.3"), "Give one of its folders: .*layers.3"),
        (lambda path: path.mkdir(), "is no autoencoder"),
        (lambda path: write_saelens(path, SAELENS_6 | {"k": 16.7}), "whole number"),
        (lambda path: write_saelens(path, SAELENS_6 | {"k": True}), "whole number"),
        (lambda path: write_saelens(path, SAELENS_6 | {"d_in": 7}), "d_in 7, but W_enc"),
        (lambda path: write_saelens(path, SAELENS_6 | {"apply_b_dec_to_input": None}), "neither true nor false"),
        (
            lambda path: write_saelens(path, SAELENS_6 | {"metadata": "text"}),
            "metadata .text. .* is not an object",
        ),
        (lambda path: write_saelens(path, SAELENS_5 | {"hook_name": {}, "hook_point": 5}), "holds unexpected values"),
        (lambda path: write_saelens(path, SAELENS_6 | {"normalize_activations": []}), "holds unexpected values"),
    ],
)
def test_an_unsupported_computation_is_refused_with_its_name(tmp_path, write, message):
    write(tmp_path / "sae")
    with pytest.raises(UserError, match=message) as caught:
        read_external_sae(tmp_path / "sae")
    assert len(caught.value.problems) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation": "JumpReLU"}, "activation 'JumpReLU'"),
        ({"activation_state_dict": {"k": K, "postact_fn": "Identity"}}, "Identity after TopK"),
        ({"activation_state_dict": {}}, "its k is missing"),
        ({"decoder.linear.weight": torch.zeros(WIDTH, LATENTS)}, "tied"),
        ({"decoder.weight": None}, "tensors missing: decoder"),
        ({"encoder.weight": "text"}, "holds unexpected values"),
        ({"latent_bias": torch.zeros(LATENTS, dtype=torch.complex64)}, "latent_bias is torch.complex64"),
        ({"activation_state_dict": 5}, "holds unexpected values"),
        ({"latent_bias": torch.full((LATENTS,), torch.nan)}, "not finite .96 of latent_bias."),
        ({"pre_bias": torch.zeros(WIDTH + 1)}, "shapes of its tensors disagree"),
    ],
)
def test_an_openai_file_with_unexpected_values_is_refused(tmp_path, changes, message):
    write_openai(tmp_path / "5.pt", changes=changes)
    with pytest.raises(UserError, match=message):
        read_external_sae(tmp_path / "5.pt")


class Bomb:
    def __reduce__(self):
        return (print, ("the pickle ran",))


def test_no_pickle_is_ever_run(tmp_path, capsys):
    write_openai(tmp_path / "5.pt", changes={"extra": Bomb()})
    with pytest.raises(UserError, match=r"print.*nothing of it was run"):
        read_external_sae(tmp_path / "5.pt")
    (tmp_path / "6.pt").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(UserError, match="nothing of it was run"):
        read_external_sae(tmp_path / "6.pt")
    assert "the pickle ran" not in capsys.readouterr().out


def test_damaged_files_are_named(tmp_path):
    write_openai(tmp_path / "5.pt")
    (tmp_path / "5.pt").write_bytes((tmp_path / "5.pt").read_bytes()[:-200])
    with pytest.raises(UserError, match=r"5\.pt is truncated or damaged"):
        read_external_sae(tmp_path / "5.pt")
    write_sparsify(tmp_path / "h.1")
    file = tmp_path / "h.1/sae.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(UserError, match=r"sae\.safetensors is truncated or damaged"):
        read_external_sae(tmp_path / "h.1")
    write_saelens(tmp_path / "lens", SAELENS_6)
    (tmp_path / "lens/cfg.json").write_text("{")
    with pytest.raises(UserError, match=r"cfg\.json is truncated or damaged"):
        read_external_sae(tmp_path / "lens")


def test_half_precision_weights_become_fp32(tmp_path):
    weights = write_sparsify(tmp_path / "h.1")
    halved = {name: value.bfloat16() for name, value in weights.items()}
    save_file(halved, tmp_path / "h.1/sae.safetensors")
    sae = read_external_sae(tmp_path / "h.1").sae
    assert sae.decoder.dtype == torch.float32
    assert torch.equal(sae.decoder, halved["W_dec"].float())
