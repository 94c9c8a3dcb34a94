"""The steering curve: numbers as a plain reading gives them, a scale of 1 that changes nothing, and every mistake."""

import json
import math
import re
import sys
from collections import Counter
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

import tiny
from megacocomix.checkpoint.convert import write_native
from megacocomix.checkpoint.open import LoadedModel, open_source
from megacocomix.config.schema import ModelConfig
from megacocomix.errors import UserError
from megacocomix.hf.export import export_hf
from megacocomix.hf.open import open_model
from megacocomix.interpret.decode import Sampling, decode
from megacocomix.interpret.steering import Edit, Steering
from megacocomix.interpret.steering_curve import (
    CurveSettings,
    continue_texts,
    measure_steering,
    parse_concepts,
    parse_scales,
)
from megacocomix.interpret.steering_judge import Sums, Text, compare, judge, ranks, sign_test, summarise
from megacocomix.interpret.steering_plot import draw, table
from megacocomix.interpret.teacher_labels import open_teacher_labels
from megacocomix.model.gpt2 import GPT2, initialise

CONTEXT, VOCAB, LATENTS, EOT = 40, 4096, 2048, 1
FEW = CurveSettings(concepts=3, scales=(-4.0, 1.0, 8.0), prompts=2, prompt_tokens=5, new_tokens=6, batch=5)


@pytest.fixture(scope="module")
def place(tmp_path_factory, root):
    """A random student of the shipped teacher: exported, as a run, and its held-out tokens."""
    folder = tmp_path_factory.mktemp("steering")
    shape = ModelConfig(**tiny.SHAPE | {"context": CONTEXT, "vocab_size": VOCAB}, dropout=0.0)
    model = GPT2(shape, tiny.method(num_concepts=LATENTS))
    initialise(model, 0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.dim() > 1 else 1)  # so that concepts matter
    tokenizer = str(root / "assets/teacher/tokenizer.model")
    export_hf(LoadedModel(model.eval(), shape, None, "", "source"), folder / "exported", tokenizer)
    tokens = np.random.default_rng(0).integers(2, VOCAB, 7 * CONTEXT).astype(np.uint16)
    tokens.tofile(folder / "valid.bin")
    sections = tiny.values(folder)
    sections["model"] = {**tiny.SHAPE, "context": CONTEXT, "vocab_size": VOCAB}
    sections["method"] |= {"num_concepts": LATENTS, "target_size": 128}
    teacher, sae = str(root / "assets/teacher"), str(root / "assets/teacher/sae.safetensors")
    sections["teacher"] = {"model": teacher, "sae": sae, "sae_layer": 3}
    sections["data"] = {"train": str(folder / "valid.bin"), "valid": str(folder / "valid.bin"), "tokenizer": tokenizer}
    source = replace(open_source(folder / "exported"), config=tiny.build_config(sections))
    (folder / "run/checkpoints").mkdir(parents=True)
    write_native(source, folder / "run/checkpoints/step-00000007", tokenizer, {})
    return folder


@pytest.fixture(scope="module")
def student(place):
    return open_model(place / "run")


@pytest.fixture(scope="module")
def source(student):
    return open_teacher_labels(student)


@pytest.fixture(scope="module")
def result(place):
    """The measurement of the run, as its file has it."""
    found = measure_steering(place / "run", FEW)
    assert found["file"] == str(place / "run/evals/steering/step-00000007.json")
    return json.loads((place / "run/evals/steering/step-00000007.json").read_text())


def plainly(source, prompt, tokens, latent):
    """Mean activation, share of active tokens and perplexity of one text, read by itself."""
    teacher, sae = source.labeler.teacher, source.labeler.sae
    whole = torch.tensor([prompt + tokens])
    activations, losses = [], []
    for position in range(len(prompt), whole.shape[1]):
        index_K, value_K = sae.encode(teacher.hidden(whole[:, : position + 1])[0, -1])
        activations.append(sum(v for i, v in zip(index_K.tolist(), value_K.tolist(), strict=True) if i == latent))
        log_p_V = teacher.logits(whole[:, :position])[0, -1].log_softmax(-1)
        losses.append(-log_p_V[whole[0, position]].item())
    return activations, losses


@torch.no_grad()
def slow_kl(student, prompt, tokens, edits):
    """KL(steered ‖ unsteered) of each step, the whole text read anew."""
    found = []
    for length in range(len(prompt), len(prompt) + len(tokens)):
        whole = torch.tensor([(prompt + tokens)[:length]])
        where = torch.arange(length)[None] >= len(prompt) - 1
        with Steering([edits], "before").of(student.model, where):
            log_p = student.model(whole, use_cache=False).logits[0, -1].log_softmax(-1)
        log_q = student.model(whole, use_cache=False).logits[0, -1].log_softmax(-1)
        found.append((log_p.exp() * (log_p - log_q)).sum().item())
    return found


@torch.no_grad()
def promoted_ids(student, concept):
    """The 10 tokens whose rows of the head point most along the column, as the last LayerNorm passes it on."""
    column = student.model.transformer.compress_layer.weight[:, concept]
    seen = (column - column.mean()) * student.model.transformer.ln_f.weight
    return set((student.model.lm_head.weight @ seen).topk(10).indices.tolist())


def close(actual, expected):
    assert actual == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_texts_of_any_length_are_judged_token_by_token(source):
    generator = np.random.default_rng(1)
    prompts = [generator.integers(2, VOCAB, 4).tolist() for _ in range(2)]
    lengths = [6, 2, 1, 6, 3, 5]  # unsteered; the first concept; the second; each of both prompts
    texts = [Text(generator.integers(2, VOCAB, n).tolist(), [0.5] * n, Counter({7: n - 1})) for n in lengths]
    read = source.labeler.sae.encode(source.labeler.teacher.hidden(torch.tensor([prompts[0] + texts[0].tokens])))
    concepts = [int(read[0][0, -1, 0]), 7]  # one that is active somewhere
    promoted = np.array([[texts[0].tokens[0], texts[2].tokens[0], 0], [texts[3].tokens[1], 2, 0]])
    sums = judge(source.labeler.teacher, source.labeler.sae, VOCAB, prompts, texts, concepts, promoted)
    assert sums.tokens.tolist() == [8, 7, 8]
    assert sums.kl.tolist() == [4.0, 3.5, 4.0]
    assert sums.kept[:, 1].tolist() == [6, 5, 6]
    assert sums.activation[0, 0] > 0
    for setting in range(3):
        rows = [2 * setting, 2 * setting + 1]
        for place, concept in enumerate(concepts):
            found = [plainly(source, prompts[row % 2], texts[row].tokens, concept) for row in rows]
            activations = [value for each, _ in found for value in each]
            close(sums.activation[setting, place], sum(activations))
            assert sums.active[setting, place] == sum(value > 0 for value in activations)
            close(sums.loss[setting], sum(loss for _, each in found for loss in each))
            tokens_found = [token for row in rows for token in texts[row].tokens]
            assert sums.promoted[setting, place] == sum(token in promoted[place] for token in tokens_found)


@pytest.mark.parametrize("at", [("student", 0, 0), ("student", 2, 2), ("student", None, 1)])
def test_a_measured_number_is_that_of_a_plain_reading(result, student, source, at):
    side, scale, concept = at
    settings, ids = result["settings"], [each["id"] for each in result["concepts"]]
    edit = [] if scale is None else [Edit(ids[concept], settings["scales"][scale])]
    activations, losses, kls, tokens_found = [], [], [], []
    for prompt, seed in zip(result["prompts"], settings["seeds"], strict=True):
        sampling = Sampling(FEW.new_tokens, seed=seed)
        tokens = [steps[0].token for steps in decode(student, [prompt], sampling, [edit], cached=False)]
        found = plainly(source, prompt, tokens, ids[concept])
        activations += found[0]
        losses += found[1]
        kls += slow_kl(student, prompt, tokens, edit)
        tokens_found += tokens
    measured = result["measured"][side]
    got = measured["unsteered"] if scale is None else measured["steered"][scale]
    close(got["concepts"]["activation"][concept], np.mean(activations))
    close(got["concepts"]["active"][concept], np.mean(np.array(activations) > 0))
    promotes = promoted_ids(student, ids[concept])
    close(got["concepts"]["promoted"][concept], np.mean([token in promotes for token in tokens_found]))
    if scale is None:
        close(got["perplexity"], math.exp(np.mean(losses)))
    else:
        close(got["concepts"]["loss"][concept], np.mean(losses))
        close(got["concepts"]["kl"][concept], np.mean(kls))
        assert got["kl"] > 0


def test_a_scale_of_1_is_the_unsteered_text_to_the_bit(result):
    for side in ("student", "teacher"):
        measured = result["measured"][side]
        same = measured["steered"][result["settings"]["scales"].index(1.0)]
        for name, values in measured["unsteered"]["concepts"].items():
            assert same["concepts"][name] == values
        assert same["perplexity"] == pytest.approx(measured["unsteered"]["perplexity"], rel=1e-12)
        assert same["kl"] == 0
        assert (same["activation"]["equal"], same["activation"]["p_value"]) == (3, 1)
        assert same["rank"]["mean"] == 0.5


def test_texts_of_a_prompt_share_their_seed_whatever_the_batch(student):
    prompts = [[5, 6, 7, 8, 9], [9, 8, 7, 6, 5]]
    settings = replace(FEW, scales=(8.0,), new_tokens=20)
    texts = continue_texts(partial(decode, student), prompts, [3, 4], settings, "")
    assert len(texts) == 2 * (1 + 2)
    tokens_found = [text.tokens for text in texts]
    assert tokens_found[:2] != tokens_found[2:4] or tokens_found[:2] != tokens_found[4:]  # else nothing is shown
    together = continue_texts(partial(decode, student), prompts, [3, 4], replace(settings, batch=100), "")
    assert [text.tokens for text in together] == tokens_found
    alone = continue_texts(partial(decode, student), prompts, [4], replace(settings, batch=1), "")
    assert [text.tokens for text in alone] == [*tokens_found[:2], *tokens_found[4:]]


def test_concepts_are_those_kept_most_often(result, place, student):
    tokens = np.fromfile(place / "valid.bin", np.uint16).astype(np.int64).reshape(-1, CONTEXT)
    logits = student.model(torch.from_numpy(tokens), use_cache=False, output_concept_logits=True).concept_logits
    count = logits.topk(4).indices.flatten().bincount(minlength=LATENTS)
    assert [count[each["id"]].item() for each in result["concepts"]] == count.topk(3).values.tolist()
    for each in result["concepts"]:
        close(each["kept_share"], count[each["id"]].item() / tokens.size)
        assert len(each["promotes"]) == 10
    starts = [0, 3]  # evenly among the 7 windows
    assert result["prompts"] == tokens[starts, :5].tolist()


def sums_of(own, others, unsteered):
    """Two concepts at one scale whose latents' means are these, 10 tokens each."""
    activation = 10 * np.array([unsteered, [own[0], others[0]], [others[1], own[1]]])
    zeros, ones = np.zeros((3, 2)), np.ones(3)
    return Sums(10 * ones, 20 * ones, 5 * ones, activation, zeros, zeros, zeros)


def test_success_is_counted_against_the_unsteered_text_and_the_other_concept():
    found = summarise(sums_of(own=[3.0, 0.5], others=[2.0, 1.0], unsteered=[1.0, 2.0]), [8.0])
    (at,) = found["steered"]
    own, others = at["activation"], at["others"]
    assert (own["raised"], own["lowered"], own["equal"], own["p_value"]) == (1, 1, 0, 1)
    assert (own["mean"], own["difference"], own["ratio"]) == (1.75, 0.25, 1.75 / 1.5)
    close(own["standard_error"], 1.75 / math.sqrt(1))  # of 2 and −1.5
    # On the first concept's text the second's latent is read, and the other way round.
    assert (others["raised"], others["lowered"], others["equal"]) == (0, 0, 2)
    # The first's latent is 1 on the text of the second, the second's 2 on that of the first.
    assert at["concepts"]["rank"] == [1.0, 0.0]
    close([at["perplexity"], at["kl"]], [math.exp(2), 0.5])
    assert at["promoted"]["ratio"] is None


def test_ranks_count_ties_as_a_half():
    assert ranks(np.array([[2.0, 5.0, 1.0], [2.0, 6.0, 1.0], [1.0, 6.0, 0.0]])).tolist() == [0.75, 0.75, 0.0]
    assert np.isnan(ranks(np.ones((1, 1)))).all()


@pytest.mark.parametrize(
    ("raised", "lowered", "p"),
    [(0, 0, 1), (1, 0, 1), (5, 5, 1), (5, 0, 2 / 32), (0, 6, 2 / 64), (8, 2, 2 * 56 / 1024), (21, 29, 0.322223)],
)
def test_sign_test(raised, lowered, p):
    assert sign_test(raised, lowered) == pytest.approx(p, rel=1e-4)


def test_nothing_to_compare_with_is_no_ratio():
    assert compare(np.array([1.0, 2.0]), np.zeros(2))["ratio"] is None
    assert compare(np.array([1.0]), np.ones(1))["standard_error"] is None


def test_the_picture_and_the_table_say_what_the_result_says(result, place):
    for suffix in ("png", "svg"):
        assert (place / f"run/evals/steering/step-00000007.{suffix}").stat().st_size > 10_000
    figure = draw(result)
    lines = [[line for line in panel.get_lines() if not line.get_label().startswith("_")] for panel in figure.axes]
    assert [line.get_label() for line in lines[2]] == ["student", "teacher"]
    for line, side in zip(lines[2], ("student", "teacher"), strict=True):
        assert list(line.get_ydata()) == [at["perplexity"] for at in result["measured"][side]["steered"]]
    text = "\n".join(table(result))
    at = result["measured"]["student"]["steered"][2]
    assert f"8  {at['activation']['raised']}/{at['activation']['lowered']}" in re.sub(" +", "  ", text)
    del result["measured"]["teacher"], result["example"]["teacher"]
    assert [panel.get_lines()[0].get_label() for panel in draw(result).axes] == ["student"] * 3
    assert "teacher unsteered" not in "\n".join(table(result))


def test_an_exported_folder_needs_a_teacher_data_and_a_place_for_the_result(place, root):
    exported, out = str(place / "exported"), str(place / "exported.json")
    files = {"teacher": str(root / "assets/teacher"), "sae": str(root / "assets/teacher/sae.safetensors")}
    for options, message in (
        ({"out": out}, "give --teacher DIR --sae FILE"),
        ({"out": out, **files}, "give --data PATH"),
        ({"data": str(place / "valid.bin"), **files}, "--out FILE.json"),
    ):
        with pytest.raises(UserError, match=message):
            measure_steering(exported, FEW, **options)
    settings = replace(FEW, steers_teacher=False, concepts=(40, 12, 7), place="after")
    found = measure_steering(exported, settings, str(place / "valid.bin"), out=out, **files)
    assert [each["id"] for each in found["concepts"]] == [40, 12, 7]
    assert list(found["measured"]) == ["student"]
    with pytest.raises(UserError, match="exists already"):
        measure_steering(exported, settings, str(place / "valid.bin"), out=out, **files)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"concepts": (3, 2048)}, r"--concepts 2048: .* has concepts 0 … 2047\."),
        ({"prompts": 8}, "--prompts 8: .* holds 7 windows of 40 tokens. Nearest valid: 7"),
        ({"prompt_tokens": 35}, "--prompt-tokens 35 and --new-tokens 6 are 41 tokens together. Nearest valid: 40"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(place, options, message):
    with pytest.raises(UserError, match=message):
        measure_steering(place / "run", replace(FEW, **options))


def test_settings_say_everything_that_cannot_be_at_once():
    with pytest.raises(UserError) as refused:
        CurveSettings(concepts=0, scales=(1.0, -11.0, math.nan), prompts=0, new_tokens=-1, seed=-1)
    named = [line.split()[0] for line in refused.value.problems]
    assert named == ["--prompts", "--new-tokens", "--concepts", "--seed", "--scales", "--scales"]


def test_lists_are_read_as_they_are_typed():
    assert parse_concepts("50") == 50
    assert parse_concepts("12,40,12") == (12, 40)
    assert parse_concepts("12,") == (12,)
    assert parse_scales("8,-4,0,8") == (-4.0, 0.0, 8.0)
    for read, text in ((parse_concepts, "a"), (parse_concepts, ","), (parse_scales, "1;2"), (parse_scales, "")):
        with pytest.raises(UserError, match="such as"):
            read(text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch", "0"], "error: --batch 0 must be 1 or more."),
        (["--scales=20"], "error: --scales 20: a scale is from -10 to 10."),
        (["--concepts", "x"], "error: --concepts x is neither"),
        (["--out", "curve.png"], "error: --out curve.png must end in .json"),
    ],
)
def test_options_that_cannot_be_are_refused(monkeypatch, capsys, root, options, message):
    monkeypatch.syspath_prepend(root / "tools")
    import evaluate

    monkeypatch.setattr(sys, "argv", ["evaluate.py", "steering", "runs/none", *options])
    with pytest.raises(SystemExit) as left:
        evaluate.run_cli(evaluate.main)
    assert left.value.code == 2
    assert capsys.readouterr().err.startswith(message)
