"""What a foreign autoencoder holds is computed as its own library computes it, or refused by name; never left out."""

import json
import re
from dataclasses import replace
from itertools import islice

import pytest
import torch
from external_saes import (
    LATENTS,
    SAELENS_0,
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
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from megacocomix.data.documents import read_documents
from megacocomix.data.sources import find_sources
from megacocomix.errors import UserError
from megacocomix.sae.convert import SAEConversion, convert_sae
from megacocomix.sae.file import load_sae, save_sae
from megacocomix.sae.formats import read_external_sae
from megacocomix.sae.model import SAE, SAEForm
from megacocomix.sae.saelens import write_saelens as export
from megacocomix.teacher.load import load_teacher, teacher_tokenizer

X = 1 + 2 * torch.randn(28, WIDTH, generator=torch.Generator().manual_seed(1))
AVERAGE = {"normalize_activations": "expected_average_only_in"}
STANDARD_6 = {key: value for key, value in SAELENS_6.items() if key not in ("k", "rescale_acts_by_decoder_norm")}
STANDARD_6["architecture"] = "standard"
UNDONE = {"apply_b_dec_to_input": False, "rescale_acts_by_decoder_norm": True}


def computed(sae):
    index, value = sae.encode(X)
    dense = torch.zeros(len(X), LATENTS).scatter_add(-1, index, value)
    return dense, sae.reconstruct(X)


def computes(sae, latents, reconstruction):
    for ours, theirs in zip(computed(sae), (latents, reconstruction), strict=True):
        torch.testing.assert_close(ours, theirs.float(), rtol=0, atol=1e-6 * theirs.abs().max().item())


def change(file, **changes):
    """Add tensors to a safetensors file, or replace them."""
    save_file(load_file(file) | changes, file)


def prefix(file, word):
    save_file({word + name: tensor for name, tensor in load_file(file).items()}, file)


def write_factor(folder, where):
    """The factor 0.25 of inputs, where version 6 and version 5 keep that of an unfinished training."""
    if where == "activation_scaler.json":
        (folder / where).write_text(json.dumps({"scaling_factor": 0.25, "has_whitening": False}))
    if where == "activations_store_state.safetensors":
        save_file({"estimated_norm_scaling_factor": torch.tensor(0.25)}, folder / where)


SCALER, STORE = "activation_scaler.json", "activations_store_state.safetensors"
FOLDERS = {
    "topk": (SAELENS_6, None),
    "standard": (STANDARD_6, None),
    "rescale": (SAELENS_6 | {"rescale_acts_by_decoder_norm": True}, None),
    "layer_norm": (SAELENS_6 | {"normalize_activations": "layer_norm"}, None),
    "norm_rescale": (SAELENS_6 | {"normalize_activations": "constant_norm_rescale"}, None),
    "b_dec kept": (SAELENS_6 | {"apply_b_dec_to_input": False}, None),
    "average, topk": (SAELENS_6 | AVERAGE, SCALER),
    "average, undone": (SAELENS_6 | AVERAGE | UNDONE, SCALER),
    "average, standard": (STANDARD_6 | AVERAGE, SCALER),
    "average, 5": (SAELENS_5 | AVERAGE, STORE),
    "topk, 5": (SAELENS_5 | {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 7}}, None),
}
# Number of active latents, their sum, norm of the reconstruction, and one of its elements, from SAELens 6.54.12:
# SAE.load_from_disk, then fold_activation_norm_scaling_factor for the averages.
SAELENS_SAYS = {
    "topk": (140, 3366.25, 1432.19, 10.9249),
    "standard": (1251, 12028, 2188.37, -19.7353),
    "rescale": (140, 16652.7, 1522.19, 3.83095),
    "layer_norm": (140, 1737.05, 1452.41, 32.9732),
    "norm_rescale": (140, 1831.87, 1801.82, 11.5581),
    "b_dec kept": (140, 3093.58, 1296.57, 9.01105),
    "average, topk": (140, 1423.92, 2394.37, 7.84227),
    "average, undone": (140, 15462.2, 1362.83, 0.949441),
    "average, standard": (1126, 4949.06, 3479.91, -54.1587),
    "average, 5": (1126, 4949.06, 3479.91, -54.1587),
    "topk, 5": (196, 4373.5, 1618.03, 0.696623),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_latents_and_reconstructions_are_those_that_saelens_gave(tmp_path, name):
    cfg, where = FOLDERS[name]
    write_saelens(tmp_path / "sae", cfg)
    write_factor(tmp_path / "sae", where)
    latents, reconstruction = computed(read_external_sae(tmp_path / "sae").sae)
    found = (latents > 0).sum(), latents.double().sum(), reconstruction.double().norm(), reconstruction[3, 5]
    assert [each.item() for each in found] == pytest.approx(SAELENS_SAYS[name], rel=1e-5)


@pytest.mark.parametrize("name", FOLDERS)
def test_an_installed_saelens_gives_the_same(tmp_path, name):
    sae_lens = pytest.importorskip("sae_lens")
    cfg, where = FOLDERS[name]
    write_saelens(tmp_path / "sae", cfg)
    write_factor(tmp_path / "sae", where)
    theirs = sae_lens.SAE.load_from_disk(tmp_path / "sae")
    if where:
        theirs.fold_activation_norm_scaling_factor(0.25)
    with torch.no_grad():
        latents = theirs.encode(X)
        computes(read_external_sae(tmp_path / "sae").sae, latents, theirs.decode(latents))


UNCENTERED = {"model_from_pretrained_kwargs": {"center_writing_weights": False}}


@pytest.mark.parametrize(
    "cfg", [SAELENS_6 | AVERAGE, SAELENS_5 | AVERAGE, SAELENS_1 | UNCENTERED | {"normalize_activations": True}]
)
def test_an_input_factor_that_is_not_recorded_has_to_be_given(tmp_path, cfg):
    weights = write_saelens(tmp_path / "sae", cfg)
    with pytest.raises(UserError, match=r"does not record .activation_scaler\.json.: give --input-scale X, or 1"):
        read_external_sae(tmp_path / "sae")
    latents, reconstruction = saelens_dense(weights, cfg, X * 0.25)
    computes(read_external_sae(tmp_path / "sae", 0.25).sae, latents, reconstruction / 0.25)
    computes(read_external_sae(tmp_path / "sae", 1.0).sae, *saelens_dense(weights, cfg, X))


@pytest.mark.parametrize(
    ("cfg", "recorded", "given", "message"),
    [
        (SAELENS_6 | AVERAGE, {"scaling_factor": None}, None, "give --input-scale"),
        (SAELENS_6 | AVERAGE, {"scaling_factor": 0.25}, 0.25, "records the factor 0.25 .* leave out --input-scale"),
        (SAELENS_6 | AVERAGE, {"scaling_factor": float("nan")}, None, "factor nan of the inputs"),
        (SAELENS_6 | AVERAGE, {"scaling_factor": -1}, None, "factor -1 of the inputs"),
        (SAELENS_6 | AVERAGE, {"scaling_factor": "1"}, None, "holds unexpected values"),
        (SAELENS_6, {"scaling_factor": 0.25}, None, "has the factor 0.25, but normalize_activations is none"),
        (SAELENS_6, {"scaling_factor": None, "has_whitening": True}, None, "states has_whitening"),
        (SAELENS_6 | AVERAGE, {"scaling_factor": 1, "has_whitening": True}, None, "states has_whitening"),
        (SAELENS_6, {"scaling_factor": None}, 0.0, "--input-scale 0.0 must be a positive number"),
        (SAELENS_6 | {"normalize_activations": "layer_norm"}, {}, 2.0, "scales each row by itself .standardize."),
        (
            SAELENS_6 | {"normalize_activations": "covariance_whitening"},
            {},
            None,
            "covariance_whitening .* Valid: none",
        ),
    ],
)
def test_contradictory_input_factors_are_refused(tmp_path, cfg, recorded, given, message):
    write_saelens(tmp_path / "sae", cfg)
    (tmp_path / "sae/activation_scaler.json").write_text(json.dumps(recorded))
    with pytest.raises(UserError, match=message):
        read_external_sae(tmp_path / "sae", given)


def test_a_finished_training_has_its_factor_in_the_weights(tmp_path):
    weights = write_saelens(tmp_path / "sae", SAELENS_6)
    (tmp_path / "sae/activation_scaler.json").write_text('{"scaling_factor": null, "has_whitening": false}')
    save_file({"sparsity": torch.zeros(LATENTS)}, tmp_path / "sae/sparsity.safetensors")
    (tmp_path / "sae/runner_cfg.json").write_text('{"architecture": "gated"}')
    computes(read_external_sae(tmp_path / "sae").sae, *saelens_dense(weights, SAELENS_6, X))


def test_an_input_scale_is_folded_into_any_format(tmp_path):
    state = write_openai(tmp_path / "5.pt", "ReLU")
    latents, reconstruction = openai_dense(state, X * 4, "ReLU")
    computes(read_external_sae(tmp_path / "5.pt", 4.0).sae, latents, reconstruction / 4)
    latents, reconstruction = sparsify_dense(write_sparsify(tmp_path / "h.1"), X * 4)
    computes(read_external_sae(tmp_path / "h.1", 4.0).sae, latents, reconstruction / 4)


def test_the_settings_of_the_published_gpt2_autoencoders_are_known(tmp_path):
    weights = write_saelens(tmp_path / "sae", SAELENS_0)
    sae = read_external_sae(tmp_path / "sae").sae
    cfg = SAELENS_0 | {"normalize_activations": "none", "apply_b_dec_to_input": True}
    latents, reconstruction = saelens_dense(weights, cfg, X - X.mean(-1, keepdim=True))
    computes(sae, latents, reconstruction + X.double().mean(-1, keepdim=True))


@pytest.mark.parametrize("name", ["threshold", "W_skip", "b_mag", "r_mag", "b_gate", "topk_threshold", "log_threshold"])
def test_a_foreign_tensor_is_refused_by_name(tmp_path, name):
    write_saelens(tmp_path / "lens", STANDARD_6, (name,))
    write_sparsify(tmp_path / "h.1", None, (name,))
    write_openai(tmp_path / "5.pt", changes={name: torch.ones(LATENTS)})
    for file in ("lens", "h.1", "5.pt"):
        with pytest.raises(UserError, match=name):
            read_external_sae(tmp_path / file)


def test_any_other_entry_of_openais_state_dict_is_refused(tmp_path):
    write_openai(tmp_path / "5.pt", changes={"input_scale": torch.ones(1), "normalize": True})
    with pytest.raises(UserError, match="input_scale normalize"):
        read_external_sae(tmp_path / "5.pt")
    write_openai(tmp_path / "6.pt", changes={"activation_state_dict": {"k": K, "temperature": 2}})
    with pytest.raises(UserError, match="activation_state_dict has temperature"):
        read_external_sae(tmp_path / "6.pt")


@pytest.mark.parametrize("word", ["_orig_mod.", "module.", "model.", "module._orig_mod."])
def test_prefixes_of_wrappers_are_removed(tmp_path, word):
    weights = write_saelens(tmp_path / "lens", STANDARD_6)
    prefix(tmp_path / "lens/sae_weights.safetensors", word)
    computes(read_external_sae(tmp_path / "lens").sae, *saelens_dense(weights, STANDARD_6, X))
    weights = write_sparsify(tmp_path / "h.1")
    prefix(tmp_path / "h.1/sae.safetensors", word)
    computes(read_external_sae(tmp_path / "h.1").sae, *sparsify_dense(weights, X))
    state = write_openai(tmp_path / "5.pt")
    torch.save({word + name: value for name, value in state.items()}, tmp_path / "5.pt")
    computes(read_external_sae(tmp_path / "5.pt").sae, *openai_dense(state, X))


def test_a_tensor_with_and_without_a_prefix_is_ambiguous(tmp_path):
    weights = write_saelens(tmp_path / "lens", STANDARD_6)
    change(tmp_path / "lens/sae_weights.safetensors", **{"module.W_enc": 2 * weights["W_enc"]})
    with pytest.raises(UserError, match="holds W_enc twice"):
        read_external_sae(tmp_path / "lens")


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32, torch.bool, torch.float8_e4m3fn])
def test_quantised_weights_are_refused_by_name(tmp_path, dtype):
    lens, sparsify = tmp_path / "lens", tmp_path / "h.1"
    quantised = write_saelens(lens, STANDARD_6)["W_enc"].to(dtype)
    change(lens / "sae_weights.safetensors", W_enc=quantised)
    write_sparsify(sparsify)
    change(sparsify / "sae.safetensors", **{"encoder.weight": quantised.T.contiguous()})
    write_openai(tmp_path / "5.pt", changes={"encoder.weight": quantised.T})
    for file, name in ((lens, "W_enc"), (sparsify, "encoder.weight"), (tmp_path / "5.pt", "encoder.weight")):
        with pytest.raises(UserError, match=rf"{name} is {dtype}: get it unquantised"):
            read_external_sae(file)


def metadata(cfg=STANDARD_6, **changes):
    return cfg | {"metadata": cfg["metadata"] | changes}


CENTERED = {"model_from_pretrained_kwargs": {"center_writing_weights": True}}


# As SAELENS_SAYS; X without the mean of each row, which is added to the reconstruction.
@pytest.mark.parametrize("normalize", ["constant_norm_rescale", "none"])
def test_a_centred_residual_is_centred_before_it_is_rescaled(tmp_path, normalize):
    cfg = metadata(SAELENS_6 | {"normalize_activations": normalize}, **CENTERED)
    weights = write_saelens(tmp_path / "sae", cfg)
    found = read_external_sae(tmp_path / "sae")
    mean = X.double().mean(-1, keepdim=True)
    latents, reconstruction = saelens_dense(weights, cfg, X - mean)
    computes(found.sae, latents, reconstruction + mean)
    if normalize == "constant_norm_rescale":
        latents, reconstruction = computed(found.sae)
        values = (latents > 0).sum(), latents.double().sum(), reconstruction.double().norm(), reconstruction[3, 5]
        assert [each.item() for each in values] == pytest.approx((140, 1758.98, 1442.15, 32.6125), rel=1e-5)
    found.sae.info = found.info
    save_sae(found.sae, tmp_path / "ours.safetensors", found.info)
    export(load_sae(tmp_path / "ours.safetensors"), tmp_path / "back")
    assert read_external_sae(tmp_path / "back").sae.form == found.sae.form


@pytest.mark.parametrize("name", ["gpt2-small", "distilgpt2", "EleutherAI/pythia-70m-deduped", "opt-125m", "gpt-j-6B"])
def test_centred_weights_of_a_layernorm_teacher_centre_the_residual(tmp_path, name):
    write_saelens(tmp_path / "sae", metadata(model_name=name, **CENTERED))
    assert read_external_sae(tmp_path / "sae").sae.form.normalization == "center"
    assert read_external_sae(tmp_path / "sae", center=False).sae.form.normalization == "none"


@pytest.mark.parametrize("name", ["gemma-2-2b", "meta-llama/Llama-3.1-8B", "mistral-7b", "qwen2-0.5b", "mine", None])
def test_whether_the_residual_of_any_other_teacher_was_centred_has_to_be_given(tmp_path, name):
    write_saelens(tmp_path / "sae", metadata(model_name=name, **CENTERED))
    with pytest.raises(UserError, match=f"{name} is not known to have it: give --center if it has, --no-center"):
        read_external_sae(tmp_path / "sae")
    assert read_external_sae(tmp_path / "sae", center=True).sae.form.normalization == "center"
    assert read_external_sae(tmp_path / "sae", center=False).sae.form.normalization == "none"
    write_saelens(tmp_path / "norm", metadata(model_name=name, **CENTERED) | {"normalize_activations": "layer_norm"})
    assert read_external_sae(tmp_path / "norm").sae.form.normalization == "standardize"  # which centres anyway


def version(name):
    return SAELENS_5 | {"sae_lens_training_version": name}


# How the wheels of 0.4.0, 1.8.0, 2.1.3, 3.1.0 … 3.19.1 and 3.19.2 … 6.54.12 load the teacher by default.
@pytest.mark.parametrize(
    ("cfg", "normalization"),
    [
        (SAELENS_1, "center"),
        (version("3.1.0"), "center"),
        (version("3.19.1"), "center"),
        (metadata(SAELENS_6, sae_lens_training_version="3.9.0"), "center"),  # an old one, saved again by 6
        (version("3.19.1") | UNCENTERED, "none"),
        (version("3.19.2"), "none"),
        (version("3.20.1"), "none"),
        (version("5.0.0-rc.1"), "none"),
        (SAELENS_6, "none"),
        (version("3.19.2") | CENTERED, "center"),
        (version(None) | CENTERED, "center"),
        (version(None) | UNCENTERED, "none"),
    ],
)
def test_where_centring_is_not_stated_it_is_what_the_version_does_by_default(tmp_path, cfg, normalization):
    write_saelens(tmp_path / "absent", cfg)
    assert read_external_sae(tmp_path / "absent").sae.form.normalization == normalization
    for name, empty in (("empty", {}), ("null", None)):
        if "model_from_pretrained_kwargs" not in cfg:
            write_saelens(tmp_path / name, cfg | {"model_from_pretrained_kwargs": empty})
            assert read_external_sae(tmp_path / name).sae.form.normalization == normalization


@pytest.mark.parametrize("cfg", [version(None), version("main"), metadata(SAELENS_6, sae_lens_training_version=None)])
def test_where_no_version_is_recorded_centring_has_to_be_given(tmp_path, cfg):
    write_saelens(tmp_path / "sae", cfg)
    with pytest.raises(UserError, match=r"records neither .* give --center if the mean was removed, else --no-center"):
        read_external_sae(tmp_path / "sae")
    assert read_external_sae(tmp_path / "sae", center=True).sae.form.normalization == "center"
    assert read_external_sae(tmp_path / "sae", center=False).sae.form.normalization == "none"
    write_saelens(tmp_path / "norm", cfg | {"normalize_activations": "layer_norm"})
    assert read_external_sae(tmp_path / "norm").sae.form.normalization == "standardize"  # which centres anyway


@pytest.mark.parametrize("cfg", [metadata(model_name="mine", **CENTERED), version("3.1.0"), version(None)])
def test_the_norms_of_a_loaded_teacher_count_and_not_its_name(root, tmp_path, cfg):
    """TransformerLens centres the weights of a model with LayerNorm, and leaves one with RMSNorm as it is."""
    shape = {"vocab_size": 64, "max_position_embeddings": 16, "num_hidden_layers": 5, "num_attention_heads": 2}
    llama = LlamaConfig(hidden_size=WIDTH, intermediate_size=32, **shape)
    LlamaForCausalLM(llama).save_pretrained(tmp_path / "rms")
    neox = GPTNeoXConfig(hidden_size=WIDTH, intermediate_size=32, **shape)
    GPTNeoXForCausalLM(neox).save_pretrained(tmp_path / "layernorm")
    GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=16, n_embd=WIDTH, n_layer=5, n_head=2)).save_pretrained(
        tmp_path / "gpt2"
    )
    write_saelens(tmp_path / "sae", cfg)
    expected = {"rms": "none", "layernorm": "center", "gpt2": "center"}
    for name, normalization in expected.items():
        teacher = str(tmp_path / name)
        job = conversion(root, tmp_path / "sae", tmp_path / f"{name}.safetensors", teacher=teacher, text=None)
        if cfg == version(None) and name != "rms":
            with pytest.raises(UserError, match="records neither"):
                convert_sae(job)
        else:
            assert convert_sae(job).sae.form.normalization == normalization


def test_a_decoder_row_of_zeros_adds_nothing_where_latents_are_rescaled_by_its_norm(tmp_path):
    """SAELens 6.54.12 gives the same latents, but reconstructs NaN: 0 · (1 / 0). The values are its own without the
    latent, which is never active."""
    weights = write_saelens(tmp_path / "sae", SAELENS_6 | {"rescale_acts_by_decoder_norm": True})
    weights["W_dec"][3] = 0
    save_file(weights, tmp_path / "sae/sae_weights.safetensors")
    latents, reconstruction = computed(read_external_sae(tmp_path / "sae").sae)
    found = (latents > 0).sum(), latents.double().sum(), reconstruction.double().norm(), reconstruction[3, 5]
    assert [each.item() for each in found] == pytest.approx((140, 16612.6, 1528.22, 3.83095), rel=1e-5)


@pytest.mark.parametrize(
    ("hook", "layer", "location"),
    [
        ("transformer.h.4", 4, "resid_post_mlp"),
        ("model.layers.4", 4, "resid_post_mlp"),
        ("gpt_neox.layers.4", 4, "resid_post_mlp"),
        ("model.layers.4.mlp", 4, "resid_delta_mlp"),
        ("model.layers.4.self_attn", 4, "resid_delta_attn"),
        ("blocks.4.hook_out", 4, "resid_post_mlp"),
        ("blocks.4.hook_in", 3, "resid_post_mlp"),
        ("blocks.4.mlp.hook_out", 4, "resid_delta_mlp"),
        ("blocks.4.attn.hook_out", 4, "resid_delta_attn"),
    ],
)
def test_a_hook_may_have_the_name_of_a_module(tmp_path, hook, layer, location):
    write_saelens(tmp_path / "sae", metadata(hook_name=hook, model_class_name="AutoModelForCausalLM"))
    info = read_external_sae(tmp_path / "sae").info
    assert (info["sae_layer"], info["location"]) == (layer, location)
    write_saelens(tmp_path / "wrong", SAELENS_5 | {"hook_name": hook, "hook_layer": 7})
    with pytest.raises(UserError, match="hook_layer 7 contradicts the hook"):
        read_external_sae(tmp_path / "wrong")


@pytest.mark.parametrize("hook", ["transformer.wte", "model.layers.4.mlp.up_proj", "blocks.0.hook_in", "blocks.4.ln1"])
def test_a_hook_beside_the_residual_is_refused_by_name(tmp_path, hook):
    write_saelens(tmp_path / "sae", metadata(hook_name=hook))
    with pytest.raises(UserError, match=f"hook {hook} is not a residual location"):
        read_external_sae(tmp_path / "sae")


def test_a_layer_may_be_text_and_a_revision_is_recorded(tmp_path):
    kwargs = {"model_from_pretrained_kwargs": {"revision": "step1000"}}
    write_saelens(tmp_path / "sae", SAELENS_5 | {"hook_layer": "4"} | kwargs)
    info = read_external_sae(tmp_path / "sae").info
    assert (info["sae_layer"], info["revision"]) == (3, "step1000")


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        (STANDARD_6 | {"decoder_gain": 2.0}, "keys that no version of SAELens has for this architecture: decoder_gain"),
        (
            STANDARD_6 | {"activation_fn": "topk", "activation_fn_kwargs": {"k": 5}},
            "activation_fn activation_fn_kwargs",
        ),
        (STANDARD_6 | {"metadata": None}, "metadata null in cfg.json is not an object"),  # as in SAELens
        (STANDARD_6 | {"metadata": []}, r"metadata \[\] in cfg.json is not an object"),
        (STANDARD_6 | {"finetuning_scaling_factor": True}, "no version .*: finetuning_scaling_factor"),
        (STANDARD_6 | {"k": 5}, "k 5 belongs to topk"),
        (STANDARD_6 | {"rescale_acts_by_decoder_norm": True}, "rescale_acts_by_decoder_norm belongs to .* topk"),
        (STANDARD_6 | {"dtype": "int8"}, "dtype int8 is not computed here"),
        (STANDARD_6 | {"use_error_term": True}, "use_error_term True"),
        (STANDARD_6 | {"apply_b_dec_to_input": "yes"}, "'yes' is neither true nor false"),
        (metadata(hook_head_index=3), "hook_head_index 3"),
        (metadata(hook_name_out="blocks.3.hook_mlp_out"), "hook_name_out blocks.3.hook_mlp_out"),
        (metadata(seqpos_slice=[4, 8]), r"positions \[4, 8\] of a window"),
        (metadata(model_from_pretrained_kwargs={"checkpoint_index": 3}), "loaded with checkpoint_index"),
        (metadata(model_from_pretrained_kwargs={"center_writing_weights": 1}), "1 is neither true nor false"),
        (SAELENS_5 | {"hook_layer": 9}, "hook_layer 9 contradicts the hook blocks.4.hook_resid_pre"),
        (SAELENS_5 | {"hook_head_index": 0}, "hook_head_index 0"),
        (SAELENS_5 | {"activation_fn": "topk", "k": 5}, "topk and activation_fn_str relu contradict"),
        (SAELENS_5 | {"activation_fn_kwargs": {"beta": 2}}, "activation_fn_kwargs beta"),
        (SAELENS_5 | {"architecture": "topk", "k": 5, "activation_fn_kwargs": {"k": 6}}, "k 5 and .* k 6 contradict"),
        *(
            (SAELENS_6 | {"architecture": kind}, f"{kind} with relu is not computed here. Valid: standard topk")
            for kind in ("gated", "jumprelu", "batchtopk", "matryoshka_batchtopk", "abstopk", "matching_pursuit")
        ),
        *(
            (SAELENS_6 | {"architecture": kind}, f"{kind} with relu is not computed here. Valid: standard topk")
            for kind in ("temporal", "transcoder", "skip_transcoder", "jumprelu_transcoder", "crosscoder", "mine")
        ),
    ],
)
def test_a_setting_that_is_not_computed_is_refused_by_name(tmp_path, cfg, message):
    write_saelens(tmp_path / "sae", cfg)
    with pytest.raises(UserError, match=message) as caught:
        read_external_sae(tmp_path / "sae")
    assert len(caught.value.problems) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder_pkm": True}, "keys that no version of sparsify has .*: encoder_pkm"),
        ({"activation": "binary"}, 'activation binary is not computed here; only "topk" is'),
        ({"skip_connection": True}, "skip_connection True"),
        ({"d_in": 7}, r"d_in 7, but its encoder is \[96, 24\]"),
        ({"num_latents": 7}, r"num_latents 7, but its encoder"),
    ],
)
def test_a_setting_of_sparsify_that_is_not_computed_is_refused_by_name(tmp_path, changes, message):
    write_sparsify(tmp_path / "h.1", SPARSIFY | changes)
    with pytest.raises(UserError, match=message):
        read_external_sae(tmp_path / "h.1")


@pytest.mark.parametrize("name", ["scaling_factor", "finetuning_scaling_factor"])
def test_a_finetuning_factor_counts_where_its_version_applies_it(tmp_path, name):
    on, off = SAELENS_5 | {"finetuning_scaling_factor": True}, SAELENS_5
    weights = write_saelens(tmp_path / "on", on, (name,))
    computes(read_external_sae(tmp_path / "on").sae, *saelens_dense(weights, on, X))
    write_saelens(tmp_path / "off", off, (name,))
    with pytest.raises(UserError, match=f"{name} that is not 1, but finetuning_scaling_factor is not true"):
        read_external_sae(tmp_path / "off")
    change(tmp_path / "off/sae_weights.safetensors", **{name: torch.ones(LATENTS)})
    ones = load_file(tmp_path / "off/sae_weights.safetensors")
    computes(read_external_sae(tmp_path / "off").sae, *saelens_dense(ones, off, X))
    write_saelens(tmp_path / "both", on, ("scaling_factor", "finetuning_scaling_factor"))
    with pytest.raises(UserError, match="holds both"):
        read_external_sae(tmp_path / "both")


def test_git_lfs_pointers_are_named_as_such(tmp_path):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    (tmp_path / "5.pt").write_text(pointer)
    write_saelens(tmp_path / "lens", STANDARD_6)
    (tmp_path / "lens/sae_weights.safetensors").write_text(pointer)
    write_sparsify(tmp_path / "h.1")
    (tmp_path / "h.1/cfg.json").write_text(pointer)
    for file in ("5.pt", "lens", "h.1"):
        with pytest.raises(UserError, match="is a git-lfs pointer, not the file itself: run git lfs pull"):
            read_external_sae(tmp_path / file)
    with pytest.raises(UserError, match="is a git-lfs pointer"):
        load_sae(tmp_path / "5.pt")


def test_a_folder_of_two_formats_is_refused(tmp_path):
    write_saelens(tmp_path / "both", STANDARD_6)
    write_sparsify(tmp_path / "h.1")
    (tmp_path / "h.1/sae.safetensors").rename(tmp_path / "both/sae.safetensors")
    with pytest.raises(UserError, match=r"holds both sae_weights\.safetensors and sae\.safetensors"):
        read_external_sae(tmp_path / "both")


def test_our_own_file_is_read_whole(tmp_path):
    sae = SAE(WIDTH, LATENTS, SAEForm(k=K))
    save_sae(sae, tmp_path / "ours.safetensors", {})
    header = {"format": "megacocomix-sae", "version": "2", "activation": "topk", "k": "5", "info": "{}"}
    header["normalization"] = '{"kind": "none"}'
    weights = load_file(tmp_path / "ours.safetensors")
    save_file(weights | {"threshold": torch.ones(LATENTS)}, tmp_path / "a.safetensors", metadata=header)
    with pytest.raises(UserError, match="holds tensors that are not read: threshold"):
        load_sae(tmp_path / "a.safetensors")
    save_file(weights, tmp_path / "b.safetensors", metadata=header | {"input_scale": "2"})
    with pytest.raises(UserError, match="its header has input_scale"):
        load_sae(tmp_path / "b.safetensors")
    weights["encoder"] = weights["encoder"].to(torch.int8)
    save_file(weights, tmp_path / "c.safetensors", metadata=header)
    with pytest.raises(UserError, match=r"encoder is torch\.int8"):
        load_sae(tmp_path / "c.safetensors")


@pytest.fixture(scope="module")
def quartered(root):
    """A TopK autoencoder, trained a little, on a quarter of the residual after block 3 of the shipped teacher."""
    teacher, tokenizer = load_teacher(root / "assets/teacher", 3), teacher_tokenizer(root / "assets/teacher")
    documents = islice(read_documents(find_sources([str(root / "assets/corpus/wiki_vital.jsonl.gz")])), 200)
    tokens = torch.tensor([token for ids in tokenizer.encode_batch([*documents]) for token in ids][: 384 * 64])
    rows = torch.cat([teacher.hidden(part) for part in tokens.view(-1, 64).split(64)]).flatten(0, 1).float() / 4
    torch.manual_seed(0)
    sae = SAE(128, 256, SAEForm(k=8, normalization="none"))
    with torch.no_grad():
        sae.decoder.copy_(torch.nn.functional.normalize(torch.randn(256, 128)))
        sae.encoder.copy_(sae.decoder)
        sae.pre_bias.copy_(rows.mean(0))
    optimizer = torch.optim.Adam(sae.parameters(), lr=3e-3)
    for _ in range(500):
        batch = rows[torch.randint(len(rows), (512,))]
        optimizer.zero_grad()
        (sae.reconstruct(batch) - batch).square().sum(-1).mean().backward()
        optimizer.step()
    sae.info = {"sae_layer": 3, "location": "resid_post_mlp"}
    return sae


def conversion(root, source, out, **changes):
    options = dict.fromkeys(("tokenizer", "layer", "location", "context", "input_scale", "accept_fvu"))
    options |= {"source": str(source), "out": out, "center": None, "teacher": str(root / "assets/teacher")}
    return SAEConversion(**options | {"text": str(root / "assets/corpus/wiki_vital.jsonl.gz")} | changes)


def test_a_wrong_scale_of_the_input_is_seen_and_named(root, quartered, tmp_path):
    export(quartered, tmp_path / "sae")
    cfg = json.loads((tmp_path / "sae/cfg.json").read_text()) | AVERAGE
    (tmp_path / "sae/cfg.json").write_text(json.dumps(cfg))
    wrong = conversion(root, tmp_path / "sae", tmp_path / "wrong.safetensors", input_scale=1.0)
    with pytest.raises(UserError, match=r"it fits better, with 0\.\d+, as --layer 3 .* --input-scale 0\.2"):
        convert_sae(wrong)
    right = conversion(root, tmp_path / "sae", tmp_path / "right.safetensors", input_scale=0.25)
    given = convert_sae(right).fit
    (tmp_path / "sae/activation_scaler.json").write_text('{"scaling_factor": 0.25}')
    assert convert_sae(conversion(root, tmp_path / "sae", tmp_path / "read.safetensors")).fit == given


def test_a_wrong_factor_that_is_recorded_is_corrected_as_the_error_says(root, quartered, tmp_path):
    """Beside a recorded factor --input-scale is refused. Version 5 records it in another file."""
    export(quartered, tmp_path / "sae")
    cfg = json.loads((tmp_path / "sae/cfg.json").read_text()) | AVERAGE
    (tmp_path / "sae/cfg.json").write_text(json.dumps(cfg))
    save_file({"estimated_norm_scaling_factor": torch.tensor(2.0)}, tmp_path / "sae" / STORE)
    job = conversion(root, tmp_path / "sae", tmp_path / "out.safetensors")
    with pytest.raises(UserError, match=r"--location resid_post_mlp with .* in activation_scaler\.json") as caught:
        convert_sae(job)
    advised = re.search(r"with (\{.*\}) in activation_scaler\.json", caught.value.problems[0])[1]
    assert json.loads(advised)["scaling_factor"] == pytest.approx(0.25, rel=0.2)
    (tmp_path / "sae" / SCALER).write_text(advised)
    assert convert_sae(job).fit[64].fvu_standardized < 0.5


def test_a_wrong_layer_that_is_recorded_is_corrected_as_the_error_says(root, quartered, tmp_path):
    """Beside a recorded layer another --layer is refused."""
    export(quartered, tmp_path / "sae")
    text = (tmp_path / "sae/cfg.json").read_text()
    (tmp_path / "sae/cfg.json").write_text(text.replace("blocks.3.", "blocks.0."))
    job = conversion(root, tmp_path / "sae", tmp_path / "out.safetensors", input_scale=0.25)
    advice = r"--layer 3 --location resid_post_mlp \(first correct hook_name .* in cfg\.json, and its layer: another"
    with pytest.raises(UserError, match=advice):
        convert_sae(job)
    (tmp_path / "sae/cfg.json").write_text(text)
    assert convert_sae(replace(job, layer=3, location="resid_post_mlp")).sae.info["sae_layer"] == 3


def test_an_option_that_contradicts_the_record_is_refused_with_both(root, tmp_path):
    write_saelens(tmp_path / "sae", SAELENS_6)
    job = {"root": root, "source": tmp_path / "sae", "out": tmp_path / "out.safetensors", "teacher": None, "text": None}
    given = {"layer": 3, "location": "resid_post_mlp", "context": 128}
    for option, wrong in (("layer", 2), ("location", "resid_post_attn"), ("context", 64)):
        with pytest.raises(UserError, match=f"--{option} {wrong} contradicts .*, which records {given[option]}"):
            convert_sae(conversion(**job, **given | {option: wrong}))
    assert convert_sae(conversion(**job, **given)).sae.info["sae_layer"] == 3
