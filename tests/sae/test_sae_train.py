"""The trainer finds a known dictionary, resumes to the same bits, and measures what its definitions say."""

import itertools
import json
import math
import os
import runpy
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from megacocomix.errors import UserError
from megacocomix.model.concept import standardize
from megacocomix.sae.file import load_sae
from megacocomix.sae.measure import measure_sae
from megacocomix.sae.model import SAE, SAEForm
from megacocomix.sae.train import (
    SAETrainer,
    SAETraining,
    default_aux_k,
    lr_factor,
    normalize_rows,
    remove_parallel_gradient,
    shuffled_batches,
)
from processes import run_processes

WIDTH = 32
SETTINGS = SAETraining(
    latents=128,
    k=3,
    steps=500,
    batch_rows=512,
    lr=3e-3,
    warmup_steps=20,
    aux_k=16,
    dead_after_tokens=10_000,
    resample_every=0,
)
# A learning rate this large kills latents that the data (256 directions, 256 latents) needs.
DEADLY = replace(SETTINGS, latents=256, k=4, steps=250, batch_rows=256, lr=3e-2, warmup_steps=0, dead_after_tokens=3000)
SHORT = replace(SETTINGS, steps=12, batch_rows=64, dead_after_tokens=128)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def directions(num):
    return F.normalize(torch.randn(num, WIDTH, generator=torch.Generator().manual_seed(99)), dim=1)


def sparse_rows(seed, num_directions=64, active=3, rows=500):
    """Endless batches [rows, D]: each row is a sum of `active` true directions with weights from 1 to 2."""
    generator = torch.Generator().manual_seed(seed)
    true = directions(num_directions)
    while True:
        chosen = torch.rand(rows, num_directions, generator=generator).topk(active).indices
        weight = 1 + torch.rand(rows, active, generator=generator)
        yield torch.zeros(rows, num_directions).scatter_(1, chosen, weight) @ true


def train_sae(settings, rows=None, trainer=None, steps=None):
    """The autoencoder and the records of its steps; a `trainer` that has begun is resumed."""
    rows = rows or sparse_rows(seed=0, rows=settings.batch_rows)
    trainer, records = trainer or SAETrainer(settings, WIDTH), []
    for batch in itertools.islice(rows, steps or settings.steps):
        if trainer.num_steps == 0:
            trainer.begin(batch)
        record = trainer.step(batch)
        records.append({key: float(value) for key, value in record.items()})
    return trainer.sae.requires_grad_(False), records


@pytest.fixture(scope="module")
def trained():
    return train_sae(SETTINGS)


def test_known_dictionary_is_reconstructed_on_rows_never_seen(trained):
    report = measure_sae(trained[0], itertools.islice(sparse_rows(seed=1), 8))
    assert report.num_rows == 4000
    assert report.l0 == pytest.approx(3, abs=0.01)
    assert report.fvu_standardized < 0.1
    assert report.fvu < 0.1


def test_known_directions_are_recovered(trained):
    # Standardising removes a row's mean, and so that component of each direction.
    true = directions(64)
    true = F.normalize(true - true.mean(1, keepdim=True), dim=1)
    cosine = (true @ trained[0].decoder.detach().T).amax(1)
    assert (cosine > 0.9).float().mean() >= 0.95


def test_decoder_rows_have_unit_norm_after_training(trained):
    torch.testing.assert_close(trained[0].decoder.norm(dim=1), torch.ones(128), rtol=0, atol=1e-6)


def test_log_shows_the_error_falling_to_what_is_measured(trained):
    sae, records = trained
    assert [record["step"] for record in records] == list(range(1, 501))
    assert records[-1]["tokens"] == 500 * 512
    assert records[-1]["fvu"] < 0.2 * records[0]["fvu"]
    report = measure_sae(sae, itertools.islice(sparse_rows(seed=1), 8))
    assert records[-1]["fvu"] == pytest.approx(report.fvu_standardized, abs=0.02)
    assert records[-1]["dead_fraction"] == pytest.approx(report.dead_fraction, abs=0.1)


def test_auxiliary_loss_revives_dead_latents():
    settings = replace(DEADLY, aux_coefficient=0)
    reports = []
    for changed in (settings, replace(settings, aux_coefficient=1 / 32)):
        sae, _ = train_sae(changed, sparse_rows(seed=0, num_directions=256, active=4, rows=256))
        held_out = itertools.islice(sparse_rows(seed=1, num_directions=256, active=4), 8)
        reports.append(measure_sae(sae, held_out))
    without, revived = reports
    assert without.dead_fraction > 0.2
    assert revived.dead_fraction < 0.05
    assert revived.fvu_standardized < without.fvu_standardized


def test_dead_latents_are_reset_to_directions_of_the_error():
    reports = []
    settings = replace(SETTINGS, steps=300, k=4, aux_coefficient=0, dead_after_tokens=5000)
    for changed in (settings, replace(settings, resample_every=60)):
        rows = sparse_rows(seed=0, num_directions=128, active=4, rows=512)
        trainer = SAETrainer(changed, WIDTH)
        trainer.begin(next(rows))
        trainer.sae.latent_bias.data[:64] = -100  # half of the latents can never be active
        trainer.begin = lambda rows: None
        sae, records = train_sae(changed, rows, trainer)
        reports.append(measure_sae(sae, itertools.islice(sparse_rows(seed=1, num_directions=128, active=4), 8)))
    without, resampled = reports
    assert without.dead_fraction >= 0.5
    assert resampled.dead_fraction < 0.1
    assert resampled.fvu_standardized < 0.95 * without.fvu_standardized
    steps = {record["step"]: record["resampled"] for record in records if record["resampled"]}
    assert steps[60] == 64
    assert set(steps) <= {60, 120, 180}  # never while the learning rate decays
    torch.testing.assert_close(sae.decoder.norm(dim=1), torch.ones(128), rtol=0, atol=1e-6)


def test_a_resumed_trainer_ends_with_the_same_bits():
    settings = replace(SHORT, resample_every=3, steps=16)
    read = lambda block: next(sparse_rows(seed=block, rows=4 * 64))
    rows = lambda start: shuffled_batches(read, 64, 4, seed=1, start=start)
    whole, _ = train_sae(settings, rows(0))
    first = SAETrainer(settings, WIDTH)
    train_sae(settings, rows(0), first, steps=7)
    state = {name: tensor.clone() for name, tensor in first.state().items()}
    second = SAETrainer(settings, WIDTH)
    second.load_state(state)
    resumed, records = train_sae(settings, rows(7), second, steps=9)
    assert records[0]["step"] == 8
    assert all(torch.equal(whole.state_dict()[name], resumed.state_dict()[name]) for name in whole.state_dict())


def train_part(settings):
    """On each rank: its half of every batch."""
    from megacocomix.parallel.runtime import start_runtime, stop_runtime

    torch.set_num_threads(1)
    runtime = start_runtime()
    rows = (batch.chunk(runtime.world)[runtime.rank] for batch in sparse_rows(seed=0, rows=settings.batch_rows))
    sae, records = train_sae(settings, rows)
    stop_runtime()
    return {name: value.numpy() for name, value in sae.state_dict().items()}, records


@pytest.mark.slow
def test_ranks_that_share_each_batch_train_what_one_process_trains():
    settings = replace(SHORT, resample_every=5, dead_after_tokens=640, latents=64)
    alone, alone_records = train_sae(replace(settings, resample_every=0))
    (first, records), (second, _) = run_processes(2, train_part, replace(settings, resample_every=0))
    for name, value in alone.state_dict().items():
        assert np.array_equal(first[name], second[name])
        torch.testing.assert_close(torch.from_numpy(first[name]), value, rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(alone_records, records, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    # Resampled rows are rank 0's, so they differ from one process's; the ranks still agree.
    (first, records), (second, _) = run_processes(
        2, train_part, replace(settings, dead_after_tokens=64, resample_every=2)
    )
    assert sum(record["resampled"] for record in records) > 0
    assert all(np.array_equal(first[name], second[name]) for name in first)


def test_same_seed_gives_the_same_bits_and_another_seed_does_not():
    states = [train_sae(replace(SHORT, seed=seed))[0].state_dict() for seed in (5, 5, 6)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0]["decoder"], states[2]["decoder"])


def begun(rows, **settings):
    trainer = SAETrainer(replace(SETTINGS, **settings), rows.shape[1])
    trainer.begin(rows)
    return trainer.sae.requires_grad_(False)


def test_parallel_component_of_the_gradient_is_removed_and_no_other():
    rows = torch.nn.Parameter(directions(10))
    across = torch.randn(10, WIDTH, generator=torch.Generator().manual_seed(0))
    across -= (across * rows.detach()).sum(1, keepdim=True) * rows.detach()
    rows.grad = across + 5 * rows.detach()
    remove_parallel_gradient(rows)
    torch.testing.assert_close(rows.grad, across, rtol=0, atol=1e-5)


def test_autoencoder_starts_tied_and_centred():
    rows = next(sparse_rows(seed=0))
    normed = standardize(rows)[0]
    sae = begun(rows, latents=50, k=4)
    assert torch.equal(sae.encoder, sae.decoder)
    torch.testing.assert_close(sae.pre_bias, normed.mean(0))
    torch.testing.assert_close(sae.decoder.norm(dim=1), torch.ones(50))


def test_learning_rate_rises_stays_and_falls_to_zero():
    factors = [lr_factor(step, 100, 10) for step in range(101)]
    assert factors[:10] == pytest.approx([i / 10 for i in range(1, 11)])
    assert set(factors[9:81]) == {1.0}
    assert factors[80:] == pytest.approx([i / 20 for i in range(20, -1, -1)])


def test_each_row_of_a_block_comes_out_once_and_far_from_its_neighbours():
    read = lambda block: torch.arange(block * 128, (block + 1) * 128).reshape(128, 1)
    found = list(itertools.islice(shuffled_batches(read, batch_rows=16, block_batches=8, seed=0), 24))
    assert {len(batch) for batch in found} == {16}
    rows = torch.cat(found).flatten().tolist()
    assert sorted(rows) == list(range(3 * 128))
    assert [sorted(rows[i : i + 128])[0] for i in (0, 128, 256)] == [0, 128, 256]
    assert min(len({row // 16 for row in batch.flatten().tolist()}) for batch in found) >= 4


def test_batches_from_a_later_step_are_those_that_would_have_come():
    read = lambda block: torch.arange(block * 12, (block + 1) * 12).reshape(12, 1)
    whole = list(itertools.islice(shuffled_batches(read, 3, 4, seed=7), 20))
    for start in (1, 4, 11):
        later = list(itertools.islice(shuffled_batches(read, 3, 4, seed=7, start=start), 20 - start))
        assert all(map(torch.equal, later, whole[start:]))


def test_rows_that_are_not_finite_stop_the_training():
    with pytest.raises(UserError, match="a gradient is not finite in step 1"):
        train_sae(SHORT, iter([torch.full((64, WIDTH), math.nan)] * 20))


def test_report_equals_its_definitions():
    rows = 100 + torch.randn(300, WIDTH, generator=torch.Generator().manual_seed(3)) * torch.arange(WIDTH)
    sae = begun(rows, latents=40, k=6)
    report = measure_sae(sae, rows.split(70))
    x, x_hat = rows.double(), sae.reconstruct(rows).double()
    index, value = sae.encode(rows)
    assert report.fvu == pytest.approx(((x - x_hat) ** 2).sum().item() / ((x - x.mean(0)) ** 2).sum().item(), rel=1e-4)
    assert report.l0 == (value > 0).sum().item() / 300
    assert report.dead_fraction == pytest.approx(1 - len(index[value > 0].unique()) / 40)


def test_perfect_and_mean_reconstructions_score_zero_and_one():
    rows = standardize(torch.randn(200, 4, generator=torch.Generator().manual_seed(0)))[0]
    mean_only = SAE(4, 8, SAEForm(k=1)).requires_grad_(False)
    mean_only.pre_bias.copy_(rows.mean(0))
    assert measure_sae(mean_only, [rows]).fvu_standardized == pytest.approx(1, abs=1e-3)
    perfect = SAE(4, 8, SAEForm(k=8)).requires_grad_(False)
    perfect.decoder.copy_(torch.cat([torch.eye(4), -torch.eye(4)]))
    perfect.encoder.copy_(perfect.decoder)
    assert measure_sae(perfect, [rows]).fvu_standardized == pytest.approx(0, abs=1e-6)


def test_nothing_to_measure_on_is_an_error():
    with pytest.raises(UserError, match="no held-out rows"):
        measure_sae(SAE(WIDTH, 8, SAEForm(k=2)), [])


def test_every_impossible_setting_is_reported_at_once():
    with pytest.raises(UserError) as caught:
        replace(SETTINGS, steps=0, k=200, lr=math.nan, block_batches=0)
    assert [problem.split()[0] for problem in caught.value.problems] == ["steps", "block_batches", "k", "lr"]


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
    sae = load_sae(out)
    assert (sae.width, sae.num_latents, sae.form.k) == (48, 64, 4)
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
        (["--save-every", 0], "--save-every 0"),
        (["--batch-rows", 10**12], "is more than a batch can be"),
        (["--latents", 10**13], "do not fit into memory"),
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
    assert "train.bin holds token 300 (read as uint16), but the vocabulary ends at 210" in capsys.readouterr().err


def test_tool_stopped_by_a_signal_resumes_to_the_same_bits(teacher_and_data, root, tmp_path, monkeypatch, capsys):
    arguments = [*teacher_and_data, "--layer", 3, "--latents", 64, "--k", 4, "--steps", 40, "--batch-rows", 64]
    assert run_tool(root, monkeypatch, *arguments, "--out", tmp_path / "whole.safetensors") == 0
    out, step = tmp_path / "sae.safetensors", SAETrainer.step

    def stopped(trainer, rows):
        if trainer.num_steps == 24:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(trainer, rows)

    monkeypatch.setattr(SAETrainer, "step", stopped)
    assert run_tool(root, monkeypatch, *arguments, "--out", out) == 75
    assert "start the same command again" in capsys.readouterr().out
    monkeypatch.setattr(SAETrainer, "step", step)
    assert not out.exists()
    others = ("--k", 5, "k 4 there, 5 here"), ("--layer", 2, "layer 3 there, 2 here"), ("--seed", 1, "seed 0 there")
    for option, value, message in others:
        assert run_tool(root, monkeypatch, *arguments, "--out", out, option, value) == 2
        assert message in capsys.readouterr().err
    assert run_tool(root, monkeypatch, *arguments, "--out", out) == 0
    whole, resumed = load_file(tmp_path / "whole.safetensors"), load_file(out)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    logs = [(tmp_path / f"{name}.safetensors.jsonl").read_text() for name in ("whole", "sae")]
    lines = [{json.loads(line)["step"]: line for line in log.splitlines()} for log in logs]
    assert {step: lines[1][step] for step in lines[0]} == lines[0]
    assert not Path(f"{out}.resume").exists()
    assert Path(f"{out}.png").read_bytes().startswith(b"\x89PNG")


def test_a_tool_that_could_not_write_its_file_only_measures_again(
    teacher_and_data, root, tmp_path, monkeypatch, capsys
):
    arguments = [*teacher_and_data, "--layer", 3, "--latents", 64, "--k", 4, "--steps", 20, "--batch-rows", 64]
    arguments += ["--out", tmp_path / "sae.safetensors"]

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("megacocomix.sae.job.save_sae", full)
        assert run_tool(root, monkeypatch, *arguments) == 2
    assert "No space left on device. Free some space" in capsys.readouterr().err.replace("[Errno 28] ", "")
    monkeypatch.setattr(SAETrainer, "step", lambda *_: pytest.fail("it trained again"))
    assert run_tool(root, monkeypatch, *arguments) == 0
    assert load_sae(tmp_path / "sae.safetensors").info["measured"]["num_rows"] > 0


def run_ranks(job, stop_at):
    """Train as one of two ranks; rank 1 alone is told to stop before step `stop_at`."""
    from megacocomix.parallel.runtime import start_runtime, stop_runtime
    from megacocomix.sae.job import SAERun

    torch.set_num_threads(1)
    runtime = start_runtime()
    run, step = SAERun(job, runtime.device, runtime.rank, runtime.world), SAETrainer.step

    def stopped(trainer, rows):
        if trainer.num_steps == stop_at and runtime.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(trainer, rows)

    SAETrainer.step = stopped
    torch.distributed.barrier()
    is_finished = run.train()
    stop_runtime()
    return is_finished, {name: value.numpy() for name, value in run.trainer.sae.state_dict().items()}


@pytest.mark.slow
def test_ranks_that_one_signal_stopped_resume_to_the_same_bits(teacher_and_data, tmp_path):
    from megacocomix.sae.job import SAEJob

    _, teacher, _, data = map(str, teacher_and_data)
    job = SAEJob(teacher, data, None, 3, "resid_post_mlp", 64, 4, str(tmp_path / "a"), 40, 64, None, 0, 500, None)
    whole = run_processes(2, run_ranks, job, -1)
    stopped = run_processes(2, run_ranks, replace(job, out=str(tmp_path / "b")), 23)
    resumed = run_processes(2, run_ranks, replace(job, out=str(tmp_path / "b")), -1)
    assert [each[0] for each in whole + stopped + resumed] == [True, True, False, False, True, True]
    for (_, ours), (_, theirs) in zip(resumed, whole, strict=True):
        assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)
