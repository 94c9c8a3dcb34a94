"""The trainer finds a dictionary that is known, keeps its promises, and measures what it says."""

import itertools
import json
import math
import runpy
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from megacocomix.errors import UserError
from megacocomix.model.concept import standardize
from megacocomix.teacher.sae import TopKSAE
from megacocomix.teacher.sae_trainer import (
    SAETraining,
    default_aux_k,
    initial_sae,
    lr_factor,
    measure_sae,
    normalize_rows,
    remove_parallel_gradient,
    shuffle_rows,
    train_sae,
)

WIDTH = 32
SETTINGS = SAETraining(
    latents=128, k=3, steps=500, batch_rows=512, lr=3e-3, warmup_steps=20, aux_k=16, dead_after_tokens=10_000
)
SHORT = replace(SETTINGS, steps=12, batch_rows=64, dead_after_tokens=128, log_every=5)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def directions(num):
    return F.normalize(torch.randn(num, WIDTH, generator=torch.Generator().manual_seed(99)), dim=1)


def sparse_rows(seed, num_directions=64, active=3, rows=500):
    """Endless [rows, D]: each row is a sum of `active` of the true directions with weights from 1 to 2."""
    generator = torch.Generator().manual_seed(seed)
    true = directions(num_directions)
    while True:
        chosen = torch.rand(rows, num_directions, generator=generator).topk(active).indices
        weight = 1 + torch.rand(rows, active, generator=generator)
        yield torch.zeros(rows, num_directions).scatter_(1, chosen, weight) @ true


def ignore(record):
    pass


@pytest.fixture(scope="module")
def trained():
    records = []
    return train_sae(sparse_rows(seed=0), SETTINGS, records.append), records


def test_known_dictionary_is_reconstructed_on_rows_never_seen(trained):
    report = measure_sae(trained[0], itertools.islice(sparse_rows(seed=1), 8))
    assert report.num_rows == 4000
    assert report.l0 == pytest.approx(3, abs=0.01)
    assert report.fvu_standardized < 0.1
    assert report.fvu < 0.1


def test_known_directions_are_recovered(trained):
    # Standardising takes the mean of a row away, and so that component of each direction.
    true = directions(64)
    true = F.normalize(true - true.mean(1, keepdim=True), dim=1)
    cosine = (true @ trained[0].decoder.detach().T).amax(1)
    assert (cosine > 0.9).float().mean() >= 0.95


def test_decoder_rows_have_unit_norm_after_training(trained):
    torch.testing.assert_close(trained[0].decoder.norm(dim=1), torch.ones(128), rtol=0, atol=1e-6)


def test_log_shows_the_error_falling_to_what_is_measured(trained):
    sae, records = trained
    assert [record["step"] for record in records] == list(range(10, 501, 10))
    assert records[-1]["tokens"] == 500 * 512
    assert records[-1]["fvu"] < 0.2 * records[0]["fvu"]
    report = measure_sae(sae, itertools.islice(sparse_rows(seed=1), 8))
    assert records[-1]["fvu"] == pytest.approx(report.fvu_standardized, abs=0.02)
    assert records[-1]["dead_fraction"] == pytest.approx(report.dead_fraction, abs=0.1)


def test_auxiliary_loss_revives_dead_latents():
    # A learning rate this large kills latents that the data (256 directions, 256 latents) has work for.
    settings = SAETraining(
        latents=256, k=4, steps=250, batch_rows=256, lr=3e-2, warmup_steps=0, aux_k=16, dead_after_tokens=3000
    )
    reports = []
    for coefficient in (0, 1 / 32):
        rows = sparse_rows(seed=0, num_directions=256, active=4)
        sae = train_sae(rows, replace(settings, aux_coefficient=coefficient), ignore)
        held_out = itertools.islice(sparse_rows(seed=1, num_directions=256, active=4), 8)
        reports.append(measure_sae(sae, held_out))
    without, revived = reports
    assert without.dead_fraction > 0.2
    assert revived.dead_fraction < 0.05
    assert revived.fvu_standardized < without.fvu_standardized


def test_same_seed_gives_the_same_bits_and_another_seed_does_not():
    states = [train_sae(sparse_rows(seed=0), replace(SHORT, seed=seed), ignore).state_dict() for seed in (5, 5, 6)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0]["decoder"], states[2]["decoder"])


def test_parallel_component_of_the_gradient_is_removed_and_no_other():
    rows = torch.nn.Parameter(directions(10))
    across = torch.randn(10, WIDTH, generator=torch.Generator().manual_seed(0))
    across -= (across * rows.detach()).sum(1, keepdim=True) * rows.detach()
    rows.grad = across + 5 * rows.detach()
    remove_parallel_gradient(rows)
    torch.testing.assert_close(rows.grad, across, rtol=0, atol=1e-5)


def test_autoencoder_starts_tied_and_centred():
    normed = standardize(next(sparse_rows(seed=0)))[0]
    sae = initial_sae(normed, num_latents=50, k=4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(sae.encoder, sae.decoder)
    torch.testing.assert_close(sae.pre_bias, normed.mean(0))
    torch.testing.assert_close(sae.decoder.norm(dim=1), torch.ones(50))


def test_learning_rate_rises_stays_and_falls_to_zero():
    factors = [lr_factor(step, 100, 10) for step in range(101)]
    assert factors[:10] == pytest.approx([i / 10 for i in range(1, 11)])
    assert set(factors[9:81]) == {1.0}
    assert factors[80:] == pytest.approx([i / 20 for i in range(20, -1, -1)])


def test_each_row_comes_out_once_and_far_from_its_neighbours():
    chunks = torch.arange(1000).reshape(50, 20, 1).float()
    batches = list(shuffle_rows(chunks, batch_rows=16, buffer_batches=8, generator=torch.Generator().manual_seed(0)))
    assert {len(batch) for batch in batches} == {16}
    rows = torch.cat(batches).flatten().tolist()
    assert len(rows) == len(set(rows)) == 1000 // 16 * 16
    sources = [len({row // 20 for row in batch.flatten().tolist()}) for batch in batches[:-1]]
    assert min(sources) >= 4


def test_rows_that_end_early_are_reported_with_the_step():
    with pytest.raises(UserError, match="ended after 7 of 12 steps"):
        train_sae(itertools.islice(sparse_rows(seed=0, rows=64), 7), SHORT, ignore)
    with pytest.raises(UserError, match="less than one batch of 64 rows"):
        train_sae(iter([torch.randn(63, WIDTH)]), SHORT, ignore)


def test_rows_that_are_not_finite_stop_the_training():
    with pytest.raises(RuntimeError, match="non-finite"):
        train_sae(iter([torch.full((64, WIDTH), math.nan)] * 20), SHORT, ignore)


def test_report_equals_its_definitions():
    rows = 100 + torch.randn(300, WIDTH, generator=torch.Generator().manual_seed(3)) * torch.arange(WIDTH)
    sae = initial_sae(standardize(rows)[0], num_latents=40, k=6, generator=torch.Generator().manual_seed(0))
    report = measure_sae(sae, rows.split(70))
    x, x_hat = rows.double(), sae.reconstruct(rows).double()
    index, value = sae.encode(rows)
    assert report.fvu == pytest.approx(((x - x_hat) ** 2).sum().item() / ((x - x.mean(0)) ** 2).sum().item(), rel=1e-4)
    assert report.l0 == (value > 0).sum().item() / 300
    assert report.dead_fraction == pytest.approx(1 - len(index[value > 0].unique()) / 40)


def test_perfect_and_mean_reconstructions_score_zero_and_one():
    rows = standardize(torch.randn(200, 4, generator=torch.Generator().manual_seed(0)))[0]
    mean_only = TopKSAE(4, 8, 1).requires_grad_(False)
    mean_only.pre_bias.copy_(rows.mean(0))
    assert measure_sae(mean_only, [rows]).fvu_standardized == pytest.approx(1, abs=1e-3)
    perfect = TopKSAE(4, 8, 8).requires_grad_(False)
    perfect.decoder.copy_(torch.cat([torch.eye(4), -torch.eye(4)]))
    perfect.encoder.copy_(perfect.decoder)
    assert measure_sae(perfect, [rows]).fvu_standardized == pytest.approx(0, abs=1e-6)


def test_nothing_to_measure_on_is_an_error():
    with pytest.raises(UserError, match="no held-out rows"):
        measure_sae(TopKSAE(WIDTH, 8, 2), [])


def test_every_impossible_setting_is_reported_at_once():
    with pytest.raises(UserError) as caught:
        replace(SETTINGS, steps=0, k=200, lr=math.nan, buffer_batches=1)
    assert [problem.split()[0] for problem in caught.value.problems] == ["steps", "buffer_batches", "k", "lr"]


def test_dead_latents_of_gpt2_that_learn_from_an_error_are_512():
    assert default_aux_k(768) == 512


def test_rows_of_any_length_become_unit():
    rows = torch.nn.Parameter(directions(10) * 7)
    normalize_rows(rows)
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(10))


@pytest.fixture
def teacher_and_data(tmp_path, root):
    """The golden file's teacher (6 blocks, 211 ids) as a Hugging Face folder, and tokens in the reference's .bin."""
    golden = load_file(root / "tests" / "golden" / "small.safetensors")
    weights = {name.removeprefix("teacher."): weight for name, weight in golden.items() if name.startswith("teacher.")}
    positions, width = weights["transformer.wpe.weight"].shape
    vocab_size = len(weights["transformer.wte.weight"])
    (tmp_path / "teacher").mkdir()
    save_file(weights, tmp_path / "teacher" / "model.safetensors", metadata={"format": "pt"})
    config = {"model_type": "gpt2", "n_layer": 6, "n_embd": width, "n_head": 4, "n_positions": positions}
    config |= {"vocab_size": vocab_size, "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5}
    (tmp_path / "teacher" / "config.json").write_text(json.dumps(config))
    tokens = np.random.default_rng(0).integers(vocab_size, size=100 * positions)
    tokens.astype("<u2").tofile(tmp_path / "train.bin")
    return ["--teacher", str(tmp_path / "teacher"), "--data", str(tmp_path / "train.bin")]


def run_tool(root, monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["train_sae.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as left:
        runpy.run_path(str(root / "tools" / "train_sae.py"), run_name="__main__")
    return left.value.code


def test_tool_records_what_it_trained_on_and_never_overwrites(teacher_and_data, root, tmp_path, monkeypatch, capsys):
    out = tmp_path / "saes" / "sae.safetensors"
    arguments = [*teacher_and_data, "--layer", 3, "--latents", 64, "--k", 4, "--out", out]
    arguments += ["--steps", 20, "--batch-rows", 128, "--lr", 3e-3]
    assert run_tool(root, monkeypatch, *arguments) == 0
    sae = TopKSAE.load(out)
    assert (sae.width, sae.num_latents, sae.k) == (48, 64, 4)
    assert (sae.info["sae_layer"], sae.info["location"], sae.info["context"]) == (3, "resid_post_mlp", 64)
    assert len(sae.info["teacher_sha256"]) == 64
    measured = sae.info["measured"]
    assert measured["num_rows"] == 5 * 64
    assert measured["fvu_standardized"] < 1
    assert measured["loss_recovered"] > 0
    assert len((tmp_path / "saes" / "sae.safetensors.jsonl").read_text().splitlines()) == 2

    before = out.read_bytes()
    assert run_tool(root, monkeypatch, *arguments) == 2
    assert "exists already" in capsys.readouterr().err
    assert out.read_bytes() == before


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--layer", 6], "layer 6 is not one of 0 … 5"),
        (["--layer", -1], "layer -1 is not one of 0 … 5"),
        (["--k", 65], "k is 65"),
        (["--steps", 0], "steps is 0"),
        (["--teacher", "nowhere"], "nowhere does not exist"),
        (["--data", "nowhere"], "nowhere does not exist"),
        (["--valid", "nowhere"], "nowhere does not exist"),
    ],
)
def test_tool_answers_a_mistake_with_one_line(teacher_and_data, root, tmp_path, monkeypatch, capsys, wrong, message):
    out = tmp_path / "sae.safetensors"
    arguments = [*teacher_and_data, "--layer", 3, "--latents", 64, "--k", 4, "--out", out, *wrong]
    assert run_tool(root, monkeypatch, *arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
    assert not out.exists()


def test_tool_refuses_ids_that_the_teacher_does_not_know(teacher_and_data, root, tmp_path, monkeypatch, capsys):
    np.full(640, 300, dtype="<u2").tofile(tmp_path / "train.bin")
    arguments = [*teacher_and_data, "--layer", 3, "--latents", 64, "--k", 4, "--out", tmp_path / "sae.safetensors"]
    assert run_tool(root, monkeypatch, *arguments) == 2
    assert "the data holds the id 300, but the teacher's vocabulary ends at 210" in capsys.readouterr().err
