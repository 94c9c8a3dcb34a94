"""Converts external checkpoints to ours, and ours to the published code's: the same model, or nothing is written."""

import json
import os

import pytest
import torch
from external_checkpoints import huggingface_model, megatron_folder, published_folder
from safetensors.torch import load_file, save_file

import tiny
from jobs import train_all
from megacocomix.checkpoint.convert import write_native, write_reference
from megacocomix.checkpoint.external.source import Hints
from megacocomix.checkpoint.open import load_model, open_source
from megacocomix.checkpoint.parity import measure
from megacocomix.errors import UserError
from megacocomix.hf.export import export_hf
from megacocomix.hf.modeling_cocomix import CocomixForCausalLM
from processes import run_processes, run_tool

HEADS = tiny.SHAPE["num_heads"]
MEGATRON_ARGS = {"num_attention_heads": HEADS, "vocab_size": tiny.VOCAB, "layernorm_epsilon": 1e-5}
TOKENS = torch.arange(2 * tiny.CONTEXT).view(2, -1) * 7 % tiny.VOCAB


@pytest.fixture
def model():
    return huggingface_model()


@pytest.fixture
def published(tmp_path, request):
    return published_folder(tmp_path / "published", request.config.getoption("--golden"))


def to_native(path, out, **hints):
    return write_native(open_source(path, Hints(**hints)), out, "", {})


@torch.no_grad()
def logits(folder, tokens=TOKENS):
    return load_model(folder).model.eval()(tokens)[0]


def assert_refused(path, out, *what, **hints):
    """The error is one line that contains all of `what`, and nothing new is in the folder of `out`."""
    before = sorted(out.parent.iterdir())
    with pytest.raises(UserError) as refusal:
        to_native(path, out, **hints)
    assert len(refusal.value.problems) == 1 and "\n" not in str(refusal.value)
    for each in what:
        assert str(each) in str(refusal.value), refusal.value
    assert sorted(out.parent.iterdir()) == before


def test_the_published_codes_folder_becomes_ours_and_goes_back_to_the_bit(tmp_path, published):
    tokens, expected = published
    difference = to_native(tmp_path / "published", tmp_path / "ours")
    assert difference.logit < 1e-5 and difference.loss < 1e-6
    torch.testing.assert_close(logits(tmp_path / "ours", tokens), expected, rtol=1e-5, atol=1e-5)
    write_reference(open_source(tmp_path / "ours"), tmp_path / "back")
    first, second = (load_file(tmp_path / folder / "model.safetensors") for folder in ("published", "back"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert "concept" not in (tmp_path / "back/config.json").read_text()
    assert open_source(tmp_path / "back").method == open_source(tmp_path / "published").method


@torch.no_grad()
def test_the_published_codes_weights_go_through_ours_to_hugging_face_with_the_same_logits(tmp_path, published):
    tokens, expected = published
    to_native(tmp_path / "published", tmp_path / "ours")
    export_hf(load_model(tmp_path / "ours"), tmp_path / "hf", "gpt2")
    theirs = CocomixForCausalLM.from_pretrained(tmp_path / "hf").eval()(tokens).logits
    torch.testing.assert_close(theirs, expected, rtol=1e-5, atol=1e-5)


def test_concept_settings_come_from_flags_where_no_file_has_them(tmp_path, published):
    settings = tmp_path / "published/config.yaml"
    recorded = open_source(tmp_path / "published").method
    settings.rename(tmp_path / "config.yaml")  # where the published code looks next
    assert open_source(tmp_path / "published").method == recorded
    assert_refused(tmp_path / "published", tmp_path / "x", "insert_layer_index is 2", insertion_layer=1)
    (tmp_path / "config.yaml").unlink()
    assert_refused(tmp_path / "published", tmp_path / "x", "--insertion-layer")
    assert_refused(tmp_path / "published", tmp_path / "x", "--num-kept", insertion_layer=2)
    assert_refused(tmp_path / "published", tmp_path / "x", "is not below its 4 blocks", insertion_layer=4, num_kept=16)
    given = {"insertion_layer": recorded.insertion_layer, "num_kept": recorded.num_kept}
    assert open_source(tmp_path / "published", Hints(**given)).method == recorded


@pytest.mark.parametrize("form", ["whole", "sharded", "without head"])
def test_a_hugging_face_folder_becomes_ours(tmp_path, model, form):
    saved = model.transformer if form == "without head" else model
    saved.save_pretrained(tmp_path / "hf", **({"max_shard_size": "20KB"} if form == "sharded" else {}))
    assert (tmp_path / "hf/model.safetensors.index.json").exists() == (form == "sharded")
    assert to_native(tmp_path / "hf", tmp_path / "ours").logit < 1e-5
    torch.testing.assert_close(logits(tmp_path / "ours"), model(TOKENS).logits, rtol=1e-5, atol=1e-5)
    config = load_model(tmp_path / "ours").config
    assert config.method.name == "ntp" and config.data.train == "" and config.teacher is None


@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize(
    ("version", "names"), [(0, "transformer"), (1.0, "transformer"), (2.0, "encoder"), (3.0, "encoder")]
)
def test_a_megatron_checkpoint_becomes_ours(tmp_path, model, version, names, tensor):
    arguments, hints = (MEGATRON_ARGS, {}) if version else (None, {"num_heads": HEADS, "vocab_size": tiny.VOCAB})
    megatron_folder(tmp_path / "megatron", model, version, tensor, arguments=arguments, transformer=names)
    assert to_native(tmp_path / "megatron", tmp_path / "ours", **hints).logit < 1e-5
    torch.testing.assert_close(logits(tmp_path / "ours"), model(TOKENS).logits, rtol=1e-5, atol=1e-5)
    one = open_source(tmp_path / "megatron/iter_0000010", Hints(**hints))  # an iteration by itself
    assert one.shape.vocab_size == tiny.VOCAB


class Runs:
    """Pickles as a function call, as in a hostile file."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("kind", ["megatron", "zero model", "zero optimizer"])
def test_a_pickle_that_wants_to_run_code_is_refused_and_not_run(tmp_path, kind, zipped):
    content = {"model": {"language_model": {}}, "args": Runs(tmp_path / "was-run")}
    hostile = {
        "megatron": "iter_0000010/mp_rank_00/model_optim_rng.pt",
        "zero model": "global_step1/zero_pp_rank_0_mp_rank_00_model_states.pt",
        "zero optimizer": "global_step1/zero_pp_rank_0_mp_rank_00_optim_states.pt",
    }[kind]
    file = tmp_path / "source" / hostile
    file.parent.mkdir(parents=True)
    if kind == "megatron":
        (tmp_path / "source/latest_checkpointed_iteration.txt").write_text("10")
    else:
        (tmp_path / "source/latest").write_text("global_step1")
        torch.save({}, tmp_path / "source/global_step1/zero_pp_rank_0_mp_rank_00_model_states.pt")
        torch.save({}, tmp_path / "source/global_step1/zero_pp_rank_0_mp_rank_00_optim_states.pt")
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    assert_refused(tmp_path / "source", tmp_path / "ours", *((file, "system") if zipped else (file.parent.name,)))
    assert not (tmp_path / "was-run").exists()
    torch.load(file, weights_only=False)
    assert (tmp_path / "was-run").exists()  # the trap itself works


def damage(file, change):
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda t: t.pop("transformer.h.1.mlp.c_fc.bias"), "lacks transformer.h.1.mlp.c_fc.bias"),
        (lambda t: t.update({"transformer.h.9.ln_1.bias": torch.zeros(32)}), "holds transformer.h.9.ln_1.bias"),
        (lambda t: t.update({"transformer.ln_f.bias": torch.zeros(31)}), "transformer.ln_f.bias is of shape [31]"),
        (lambda t: t.update({"lm_head.weight": torch.zeros(97, 32)}), "only a tied head"),
    ],
    ids=["missing", "extra", "shape", "untied"],
)
def test_a_tensor_that_does_not_fit_is_named_with_its_file(tmp_path, model, change, what):
    model.save_pretrained(tmp_path / "hf")
    damage(tmp_path / "hf/model.safetensors", change)
    assert_refused(tmp_path / "hf", tmp_path / "ours", what, tmp_path / "hf")


def test_truncated_and_missing_files_are_named(tmp_path, model):
    model.save_pretrained(tmp_path / "hf", max_shard_size="20KB")
    shard = sorted((tmp_path / "hf").glob("model-*.safetensors"))[1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-100])
    assert_refused(tmp_path / "hf", tmp_path / "ours", shard)
    shard.unlink()
    assert_refused(tmp_path / "hf", tmp_path / "ours", shard, "does not exist")
    megatron_folder(tmp_path / "megatron", model, 3.0, 2, arguments=MEGATRON_ARGS)
    file = tmp_path / "megatron/iter_0000010/mp_rank_01/model_optim_rng.pt"
    file.write_bytes(file.read_bytes()[:-1000])
    assert_refused(tmp_path / "megatron", tmp_path / "ours", file)
    file.unlink()
    file.parent.rename(file.parent.with_name("mp_rank_02"))
    (file.parent.with_name("mp_rank_02") / file.name).touch()
    assert_refused(tmp_path / "megatron", tmp_path / "ours", "no mp_rank_01")


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda model: model["encoder"].pop("layers.1.mlp.dense_h_to_4h.bias"), "lacks encoder.layers.1.mlp"),
        (
            lambda model: model["encoder"].update({"layers.1.mlp.gate": torch.ones(2)}),
            "holds encoder.layers.1.mlp.gate",
        ),
        (
            lambda model: model["encoder"].update({"final_layernorm.bias": torch.ones(2)}),
            "final_layernorm.bias is of shape",
        ),
        (lambda model: model.pop("embedding"), "no language_model"),
    ],
    ids=["missing", "extra", "shape", "section"],
)
def test_a_megatron_tensor_that_does_not_fit_is_named(tmp_path, model, change, what):
    megatron_folder(tmp_path / "megatron", model, 3.0, 1, arguments=MEGATRON_ARGS)
    file = tmp_path / "megatron/iter_0000010/mp_rank_00/model_optim_rng.pt"
    content = torch.load(file, weights_only=False)
    change(content["model"]["language_model"])
    torch.save(content, file)
    assert_refused(tmp_path / "megatron", tmp_path / "ours", what, tmp_path / "megatron")


@pytest.mark.parametrize("change", [{"swiglu": True}, {"layernorm_epsilon": 1e-6}, {"bias_gelu_fusion": False}])
def test_a_megatron_model_that_is_no_gpt2_is_refused(tmp_path, model, change):
    megatron_folder(tmp_path / "megatron", model, 3.0, 1, arguments=MEGATRON_ARGS | change)
    assert_refused(tmp_path / "megatron", tmp_path / "ours", *change)


def test_a_result_that_is_another_model_is_removed(tmp_path, model, monkeypatch):
    megatron_folder(tmp_path / "megatron", model, 2.0, 2, arguments=MEGATRON_ARGS)
    monkeypatch.setattr("megacocomix.checkpoint.external.megatron._by_head", lambda rows, version, heads: rows)
    assert to_native(tmp_path / "megatron", tmp_path / "right").logit < 1e-5
    for rank in (0, 1):
        file = tmp_path / f"megatron/iter_0000010/mp_rank_{rank:02d}/model_optim_rng.pt"
        torch.save(torch.load(file, weights_only=False) | {"checkpoint_version": 1.0}, file)
    assert_refused(tmp_path / "megatron", tmp_path / "ours", "logits of the converted model differ by")


def test_the_comparison_notices_a_model_that_gives_nan(tmp_path, model):
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.bias[3] = torch.nan
    model.save_pretrained(tmp_path / "hf")
    assert_refused(tmp_path / "hf", tmp_path / "ours", "gives numbers that are not finite")


def test_a_plain_model_is_not_written_as_the_published_codes(tmp_path, model):
    model.save_pretrained(tmp_path / "hf")
    with pytest.raises(UserError, match="no concept module"):
        write_reference(open_source(tmp_path / "hf"), tmp_path / "out")


def test_both_sides_of_the_comparison_run_on_their_own_code(tmp_path, published):
    source = open_source(tmp_path / "published")
    to_native(tmp_path / "published", tmp_path / "ours")
    result = open_source(tmp_path / "ours")
    assert source.read_hf is not None and result.read_hf is None
    assert 0 < measure(source, result).logit < 1e-5  # not the same arithmetic twice


@pytest.mark.slow
def test_the_command_prints_the_differences_and_refuses_in_one_line(tmp_path, root, model):
    def convert(*arguments):
        return run_tool([root / "tools/convert_checkpoint.py", *arguments], tmp_path)

    model.save_pretrained(tmp_path / "hf")
    done = convert(tmp_path / "hf", "--out", tmp_path / "ours", "--to", "native")
    assert done.returncode == 0 and "max |Δlogit|" in done.stdout and "transformers' GPT-2 blocks" in done.stdout
    again = convert(tmp_path / "hf", "--out", tmp_path / "ours", "--to", "native")
    assert again.returncode == 2 and "exists already" in again.stderr and len(again.stderr.splitlines()) == 1
    manifest = json.loads((tmp_path / "ours/checkpoint.json").read_text())
    assert manifest["converted_from"]["kind"] == "Hugging Face GPT-2" and manifest["state"]["step"] == 0


def save_with_deepspeed(folder, stage, of_ours):
    """Train a model for one step in ZeRO `stage` and save it with DeepSpeed. Returns its logits."""
    import deepspeed

    from megacocomix.config.schema import ModelConfig
    from megacocomix.model.gpt2 import GPT2, initialise
    from megacocomix.parallel.runtime import start_runtime, stop_runtime

    start_runtime()
    torch.manual_seed(0)
    if of_ours:
        model = GPT2(ModelConfig(**tiny.SHAPE, dropout=0.0))
        initialise(model, 0)
    else:
        model = huggingface_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    options = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": stage},
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=options, dist_init_required=False)
    forward = lambda: engine(TOKENS)[0] if of_ours else engine(TOKENS).logits
    engine.backward(forward().square().mean())
    engine.step()
    engine.save_checkpoint(str(folder))
    with torch.no_grad():
        expected = forward()
    stop_runtime()
    return expected.tolist()


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "world", "of_ours"), [(3, 1, False), (2, 2, False), (3, 2, True)])
def test_a_zero_checkpoint_becomes_ours(tmp_path, stage, world, of_ours):
    expected = torch.tensor(run_processes(world, save_with_deepspeed, tmp_path / "zero", stage, of_ours)[0])
    assert_refused(tmp_path / "zero", tmp_path / "ours", "--num-heads")
    assert to_native(tmp_path / "zero", tmp_path / "ours", num_heads=HEADS).logit < 1e-5
    torch.testing.assert_close(logits(tmp_path / "ours"), expected, rtol=1e-5, atol=1e-5)
    file = sorted((tmp_path / "zero").glob("*/*_optim_states.pt"))[0]
    file.write_bytes(file.read_bytes()[:-1000])
    assert_refused(tmp_path / "zero", tmp_path / "again", file, num_heads=HEADS)


@pytest.mark.slow
def test_a_run_begins_with_the_weights_of_training_init(folder, tmp_path, model):
    huggingface_model(seed=3).save_pretrained(tmp_path / "hf")
    init = {"init_from": str(tmp_path / "hf"), "steps": 1}
    frozen = {"lr": 1e-12, "min_lr": 0.0, "warmup_steps": 0}
    configs = {
        "plain": tiny.config(folder, "plain", training=init, optimizer=frozen, method={"name": "ntp"}),
        "with concepts": tiny.config(folder, "with-concepts", training=init, optimizer=frozen),
        "other sizes": tiny.config(folder, "x", training=init, model={"num_layers": 2, "num_heads": 2}),
        "nothing there": tiny.config(folder, "y", training={"init_from": str(folder / "none")}),
        "concepts into none": tiny.config(
            folder, "z", training={"init_from": str(folder / "with-concepts")}, method={"name": "ntp"}
        ),
        "again": tiny.config(folder, "plain", training=init, optimizer=frozen, method={"name": "ntp"}),
    }
    outcomes = dict(zip(configs, run_processes(2, train_all, list(configs.values()))[0], strict=True))
    assert outcomes["plain"] == outcomes["with concepts"] == outcomes["again"] == (0, [])
    given = open_source(tmp_path / "hf")
    for run in ("plain", "with-concepts"):
        trained = open_source(folder / run)
        for name in given.shapes:
            torch.testing.assert_close(trained.read(name), given.read(name), rtol=0, atol=1e-9)
    code, problems = outcomes["other sizes"]
    assert code == 2 and len(problems) == 2
    assert (
        "model.num_layers 2 does not fit training.init_from" in problems[0]
        and "Nearest valid: model.num_layers=3" in problems[0]
    )
    assert outcomes["nothing there"][0] == 2 and "training.init_from: model folder" in outcomes["nothing there"][1][0]
    assert outcomes["concepts into none"][0] == 2 and "has a concept module" in outcomes["concepts into none"][1][0]
    damage(tmp_path / "hf/model.safetensors", lambda tensors: tensors["transformer.ln_f.bias"].add_(1))
    code, problems = run_processes(1, train_all, [configs["again"]])[0][0]
    assert code == 2 and "the content of training.init_from has changed" in problems[0]
