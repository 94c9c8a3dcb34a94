"""A label cache holds the live teacher's labels, in complete shards, for one dataset, teacher, autoencoder and choice
of labels."""

import errno
import fcntl
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml

import tiny
from megacocomix.data.prepare import prepare_data
from megacocomix.data.tokens import TokenDataset, TokenShards
from megacocomix.errors import UserError
from megacocomix.model.losses import MASKED
from megacocomix.teacher import label_cache
from megacocomix.teacher.label_cache import CacheManifest, LabelCache, claim_shard, is_sound, shard_file, start_cache
from megacocomix.teacher.label_job import label_all
from megacocomix.teacher.labels import open_labeler
from megacocomix.teacher.targets import describe_labels, open_labels

CPU, EOT = torch.device("cpu"), 50256
MANIFEST = CacheManifest(
    data="d" * 64,
    teacher="t" * 64,
    sae="s" * 64,
    settings={"num_labels": 3, "source": "attribution"},
    context=16,
    num_windows=10,
    shard_windows=64,
    num_concepts=62,
    precision="fp32",
    teacher_context=16,
    flops_per_token=1.0,
)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(label_cache, "SMALLEST_SHARD", 64 * tiny.CONTEXT)  # four shards of the 200 windows


@pytest.fixture
def config(folder):
    return tiny.config(folder)


def train_windows(config):
    return TokenDataset(TokenShards.open(config.data.train), config.model.context, None)


def cached(config, cache):
    return config.model_copy(update={"teacher": config.teacher.model_copy(update={"labels": str(cache)})})


def test_cached_labels_are_the_live_ones(config, tmp_path):
    report = label_all(config, tmp_path / "cache", CPU)
    assert (report.num_labelled, report.num_held, report.num_windows) == (200, 200, 200)
    train, windows = train_windows(config), list(range(200))
    tokens = torch.from_numpy(train.batch(windows))
    live = open_labeler(config, CPU, EOT)(tokens)
    labels = open_labels(cached(config, tmp_path / "cache"), CPU, EOT, train)
    assert labels.labeler is None
    assert labels.live_share == 0
    shuffled = torch.randperm(200, generator=torch.Generator().manual_seed(0)).tolist()
    assert torch.equal(labels(shuffled, tokens[shuffled]), live[shuffled])
    assert (live == MASKED).any()
    ids = shard_file(tmp_path / "cache", 0).stat().st_size
    assert ids == 64 * tiny.CONTEXT * 3 * 2 + 32  # two bytes a label


def test_what_a_cache_lacks_is_labelled_live(config, tmp_path):
    label_all(config, tmp_path / "cache", CPU)
    shard_file(tmp_path / "cache", 1).unlink()
    train, windows = train_windows(config), [3, 70, 199, 127, 128]  # two of them in the second shard
    labels = open_labels(cached(config, tmp_path / "cache"), CPU, EOT, train)
    assert labels.live_share == pytest.approx(64 / 200)
    tokens = torch.from_numpy(train.batch(windows))
    assert torch.equal(labels(windows, tokens), open_labeler(config, CPU, EOT)(tokens))
    assert labels.cache.read(70) is None


def test_a_job_that_is_started_again_labels_only_what_is_missing_or_damaged(config, tmp_path, capsys):
    cache = tmp_path / "cache"
    label_all(config, cache, CPU)
    before = {shard: shard_file(cache, shard).read_bytes() for shard in range(4)}
    shard_file(cache, 2).unlink()
    damaged = bytearray(before[1])
    damaged[100] ^= 1
    shard_file(cache, 1).write_bytes(damaged)
    assert label_all(config, cache, CPU).num_labelled == 128
    assert "labels-00001.bin is damaged; it is labelled again" in capsys.readouterr().err
    assert {shard: shard_file(cache, shard).read_bytes() for shard in range(4)} == before
    assert label_all(config, cache, CPU).num_labelled == 0


def label_as(config, cache, rank, world, results):
    torch.set_num_threads(1)
    label_cache.SMALLEST_SHARD = 8 * tiny.CONTEXT
    results.put((rank, label_all(config, cache, CPU, rank, world).num_labelled))


@pytest.mark.slow
def test_processes_share_the_work_and_the_result_is_that_of_one(config, tmp_path, monkeypatch):
    monkeypatch.setattr(label_cache, "SMALLEST_SHARD", 8 * tiny.CONTEXT)
    label_all(config, tmp_path / "one", CPU)
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    places = [(0, 3), (1, 3), (2, 3), (0, 1)]  # three of one job, and one started separately
    processes = [
        context.Process(target=label_as, args=(config, tmp_path / "many", *place, results), daemon=True)
        for place in places
    ]
    for process in processes:
        process.start()
    shares = [results.get(timeout=300)[1] for _ in processes]
    for process in processes:
        process.join(60)
    assert sum(shares) == 200
    one, many = ({file.name: file.read_bytes() for file in (tmp_path / name).glob("*.bin")} for name in ("one", "many"))
    assert one == many
    assert len(one) == 25
    assert not list((tmp_path / "many").glob("*.part"))


CHANGES = {
    "data.train had the hash": lambda folder: tiny.write_tokens(folder / "train.bin", 200 * tiny.CONTEXT, seed=5),
    "teacher.sae had the hash": lambda folder: tiny.make_sae(folder / "sae.safetensors", note="another"),
    "teacher.model had the hash": lambda folder: change_teacher(folder / "teacher/model.safetensors"),
}


def change_teacher(file):
    from safetensors.torch import load_file, save_file

    weights = load_file(file)
    weights["transformer.ln_f.bias"] = weights["transformer.ln_f.bias"] + 1
    save_file(weights, file, {"format": "pt"})


@pytest.mark.parametrize("complete", [True, False])
@pytest.mark.parametrize("what", CHANGES)
def test_a_stale_cache_is_an_error_that_names_what_changed(tmp_path, what, complete):
    tiny.make_inputs(tmp_path)
    config = tiny.config(tmp_path)
    label_all(config, tmp_path / "cache", CPU)
    if not complete:
        shard_file(tmp_path / "cache", 0).unlink()
    CHANGES[what](tmp_path)
    train = train_windows(config)
    with pytest.raises(UserError) as caught:
        open_labels(cached(config, tmp_path / "cache"), CPU, EOT, train)
    (line,) = caught.value.problems
    assert "is stale" in line
    assert what in line
    with pytest.raises(UserError, match="Choose another --out"):
        label_all(config, tmp_path / "cache", CPU)


@pytest.mark.parametrize(
    ("method", "change"),
    [
        ({"num_labels": 2}, "num_labels 3 there, 2 here"),
        ({"label_sign": "absolute"}, "sign positive there, absolute here"),
        ({"label_source": "activation"}, "source attribution there, activation here"),
        ({"label_end_of_text": False}, "masked_token None there, 50256 here"),
        ({"mask_unlabelled": False}, "mask_unlabelled True there, False here"),
    ],
)
def test_other_settings_are_named_with_both_values_and_hashes(folder, config, tmp_path, method, change):
    label_all(config, tmp_path / "cache", CPU)
    other = tiny.config(folder, method=method)
    with pytest.raises(UserError) as caught:
        open_labels(cached(other, tmp_path / "cache"), CPU, EOT, train_windows(other))
    (line,) = caught.value.problems
    assert change in line
    assert line.count("the hash") == 1
    assert line.count("…") == 2


def test_another_layer_or_location_is_named_though_the_autoencoder_does_not_record_its_own(folder, config, tmp_path):
    label_all(config, tmp_path / "cache", CPU)
    for teacher, change in (
        ({"sae_layer": 2}, "sae_layer 1 there, 2 here"),
        ({"location": "resid_delta_mlp"}, "location resid_post_mlp there, resid_delta_mlp here"),
    ):
        other = tiny.config(folder, teacher=teacher)
        with pytest.raises(UserError, match=change):
            open_labels(cached(other, tmp_path / "cache"), CPU, EOT, train_windows(other))


def test_labels_of_another_encoder_precision_are_refused_and_caches_that_record_none_hold_fp32(folder, tmp_path):
    fp32, tf32 = (tiny.config(folder, teacher={"sae_precision": name}) for name in ("fp32", "tf32"))
    cache, train = tmp_path / "cache", train_windows(fp32)
    label_all(tf32, cache, CPU)  # a CPU labels in fp32
    manifest = json.loads((cache / "manifest.json").read_text())
    assert manifest["settings"].pop("sae_precision") == "fp32"
    (cache / "manifest.json").write_text(json.dumps(manifest))
    open_labels(cached(fp32, cache), CPU, EOT, train)
    open_labels(cached(tf32, cache), CPU, EOT, train)  # this CPU would make the same labels
    with pytest.raises(UserError, match="sae_precision fp32 there, tf32 here"):
        open_labels(cached(tf32, cache), torch.device("cuda", 0), EOT, train)
    manifest["settings"]["sae_precision"] = "tf32"  # as made on a GPU
    (cache / "manifest.json").write_text(json.dumps(manifest))
    open_labels(cached(tf32, cache), CPU, EOT, train)
    with pytest.raises(UserError, match="sae_precision tf32 there, fp32 here"):
        open_labels(cached(fp32, cache), CPU, EOT, train)
    shard_file(cache, 0).unlink()
    with pytest.raises(UserError, match="sae_precision tf32 there, fp32 here"):
        open_labels(cached(tf32, cache), CPU, EOT, train)  # this CPU would label the missing windows in fp32


def test_a_cache_of_chunks_needs_the_windowed_option(folder, tmp_path):
    longer = tiny.config(folder, model={"context": 40}, teacher={"windowed": True})
    label_all(longer, tmp_path / "cache", CPU)
    assert open_labels(cached(longer, tmp_path / "cache"), CPU, EOT, train_windows(longer)).live_share == 0
    whole = tiny.config(folder, model={"context": 40})
    with pytest.raises(UserError, match=r"or teacher\.windowed=true"):
        open_labels(cached(whole, tmp_path / "cache"), CPU, EOT, train_windows(whole))


def test_a_cache_of_more_shards_than_a_process_may_open_is_read(tmp_path):
    start_cache(tmp_path, replace(MANIFEST, num_windows=3000, shard_windows=1))
    labels = np.zeros((1, 16, 3), dtype=np.int64)
    for shard in range(3000):
        with claim_shard(tmp_path, shard) as write:
            write(labels + shard % 62)
    cache = LabelCache(tmp_path)
    assert all((cache.read(window) == window % 62).all() for window in range(3000))


def test_another_window_length_is_named(folder, config, tmp_path):
    label_all(config, tmp_path / "cache", CPU)
    other = tiny.config(folder, model={"context": 8})
    with pytest.raises(UserError, match="window 16 there, 8 here"):
        open_labels(cached(other, tmp_path / "cache"), CPU, EOT, train_windows(other))


def test_one_cache_serves_every_student_seed_and_layout(folder, config, tmp_path):
    label_all(config, tmp_path / "cache", CPU)
    other = tiny.config(
        folder,
        model={"num_layers": 2, "hidden_size": 64},
        method={"insertion_layer": 0, "num_kept": 8, "concept_weight": 0.5},
        training={"seed": 1, "global_batch": 4, "micro_batch": 1},
        parallel={"tensor": 2},
    )
    assert open_labels(cached(other, tmp_path / "cache"), CPU, EOT, train_windows(other)).live_share == 0


def test_a_full_disk_leaves_complete_shards_valid_and_is_reported(config, tmp_path, monkeypatch):
    cache, real, calls = tmp_path / "cache", os.fsync, []

    def full(handle):
        calls.append(handle)
        if len(calls) > 3:  # the manifest and two shards
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(handle)

    monkeypatch.setattr(os, "fsync", full)
    (problem,) = label_all(config, cache, CPU).problems
    assert "No space left on device" in problem
    assert "stay valid" in problem
    monkeypatch.undo()
    monkeypatch.setattr(label_cache, "SMALLEST_SHARD", 64 * tiny.CONTEXT)
    held = [shard for shard in range(4) if shard_file(cache, shard).is_file()]
    assert held == [0, 1]
    assert all(is_sound(cache, shard) for shard in held)
    assert not [*cache.glob("*.part"), *cache.glob("*.new")]
    assert LabelCache(cache).num_held == 128
    assert label_all(config, cache, CPU).num_labelled == 72


def test_a_shard_is_claimed_by_one_process_and_a_dead_ones_claim_is_free(tmp_path):
    start_cache(tmp_path, MANIFEST)
    labels = np.arange(10 * 16 * 3).reshape(10, 16, 3) % 62
    with open(tmp_path / "labels-00000.part", "ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with claim_shard(tmp_path, 0) as write:
            assert write is None
    with claim_shard(tmp_path, 0) as write:
        write(labels)
    for verify in (False, True):
        with claim_shard(tmp_path, 0, verify) as write:
            assert write is None
    assert np.array_equal(np.stack([LabelCache(tmp_path).read(window) for window in range(10)]), labels)
    assert sorted(file.name for file in tmp_path.glob("labels*")) == ["labels-00000.bin"]


def test_a_claim_that_writes_nothing_leaves_nothing(tmp_path):
    start_cache(tmp_path, MANIFEST)
    with claim_shard(tmp_path, 0) as write:
        assert write
    assert not list(tmp_path.glob("labels*"))


@pytest.mark.parametrize(("num_concepts", "num_bytes"), [(62, 2), (65535, 2), (65536, 4), (131072, 4)])
def test_ids_take_two_bytes_where_all_and_the_mask_fit(tmp_path, num_concepts, num_bytes):
    manifest = replace(MANIFEST, num_concepts=num_concepts)
    start_cache(tmp_path, manifest)
    labels = np.full((10, 16, 3), num_concepts - 1)
    labels[0, 0] = MASKED
    with claim_shard(tmp_path, 0) as write:
        write(labels)
    assert shard_file(tmp_path, 0).stat().st_size == 10 * 16 * 3 * num_bytes + 32
    assert np.array_equal(LabelCache(tmp_path).read(0), labels[0])


def test_bad_caches_are_one_line(tmp_path):
    with pytest.raises(UserError, match="is no label cache"):
        LabelCache(tmp_path)
    start_cache(tmp_path / "cache", MANIFEST)
    shard_file(tmp_path / "cache", 0).write_bytes(b"short")
    with pytest.raises(UserError, match="5 bytes, expected 992"):
        LabelCache(tmp_path / "cache")
    manifest = json.loads((tmp_path / "cache/manifest.json").read_text())
    for change in (
        {"data": None},
        {"num_windows": 1.5},
        {"shard_windows": 0},
        {"flops_per_token": "x"},
        {"settings": {}},
    ):
        (tmp_path / "cache/manifest.json").write_text(json.dumps(manifest | change))
        with pytest.raises(UserError, match="is damaged"):
            LabelCache(tmp_path / "cache")
    (tmp_path / "cache/manifest.json").write_text("{}")
    with pytest.raises(UserError, match="is damaged"):
        LabelCache(tmp_path / "cache")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"holds other files, such as notes\.txt"):
        start_cache(tmp_path / "other", MANIFEST)


def test_the_cost_of_labels_is_reported_for_live_partial_and_cached(config, tmp_path):
    train = train_windows(config)
    describe = lambda labels: describe_labels(config, labels, 1e6, train.num_windows)
    live = open_labels(config, CPU, EOT, train)
    assert "labels: live" in describe(live)
    assert "MFLOP a token" in describe(live)
    assert "a cache of all 200 windows would take" in describe(live)
    label_all(config, tmp_path / "cache", CPU)
    complete = open_labels(cached(config, tmp_path / "cache"), CPU, EOT, train)
    assert "labels: cached in" in describe(complete)
    assert "live they would cost" in describe(complete)
    assert complete.live_flops == live.live_flops
    shard_file(tmp_path / "cache", 3).unlink()
    assert "96.0% of the windows cached" in describe(open_labels(cached(config, tmp_path / "cache"), CPU, EOT, train))


def test_flipped_bits_in_a_shard_are_found_when_they_are_read_and_fixed_by_the_job(config, tmp_path):
    label_all(config, tmp_path / "cache", CPU)
    file = shard_file(tmp_path / "cache", 1)
    content = bytearray(file.read_bytes())
    content[1] ^= 0x40  # an id far beyond the 62 concepts
    file.write_bytes(content)
    train = train_windows(config)
    labels = open_labels(cached(config, tmp_path / "cache"), CPU, EOT, train)
    with pytest.raises(UserError, match=r"labels-00001\.bin is damaged"):
        labels([64], torch.from_numpy(train.batch([64])))
    assert label_all(config, tmp_path / "cache", CPU).num_labelled == 64


def test_data_of_another_tokenizer_is_refused_before_anything_is_labelled(root, folder, tmp_path):
    prepare_data([str(text_file(tmp_path))], tmp_path / "data", "gpt2", 0.0, 1)
    tokenizer = str(root / "assets/teacher/tokenizer.model")
    config = tiny.config(folder, data={"train": str(tmp_path / "data/train"), "tokenizer": tokenizer})
    with pytest.raises(UserError, match="another tokenizer"):
        label_all(config, tmp_path / "cache", CPU)
    assert not (tmp_path / "cache").exists()


def text_file(folder):
    (folder / "text.txt").write_text("some words " * 200)
    return folder / "text.txt"


def test_a_config_without_concepts_has_nothing_to_label(folder, tmp_path):
    with pytest.raises(UserError, match="no concepts to label"):
        label_all(tiny.config(folder, method={"name": "ntp"}), tmp_path / "cache", CPU)


def start_tool(root, config_file, cache, *overrides):
    command = [sys.executable, root / "tools/label_concepts.py", "--config", config_file, "--out", cache, *overrides]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_the_tool_stops_on_a_signal_is_killed_and_resumes(root, tmp_path):
    tiny.make_inputs(tmp_path)
    tiny.write_tokens(tmp_path / "train.bin", 10 * 2**16 + 5)  # ten shards
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tiny.values(tmp_path)))
    cache = tmp_path / "cache"
    for number, code in ((signal.SIGTERM, 75), (signal.SIGKILL, -signal.SIGKILL)):
        begun = len(list(cache.glob("*.bin")))
        process = start_tool(root, tmp_path / "config.yaml", cache)
        deadline = time.monotonic() + 120
        while len(list(cache.glob("*.bin"))) < begun + 2 and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
        assert process.returncode == code, err
        assert ("stopped on a signal" in out) == (number == signal.SIGTERM)
        held = [shard for shard in range(10) if shard_file(cache, shard).is_file()]
        assert begun + 2 <= len(held) < 10
        assert all(is_sound(cache, shard) for shard in held)
    process = start_tool(root, tmp_path / "config.yaml", cache)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert LabelCache(cache).is_complete
    process = start_tool(root, tmp_path / "config.yaml", cache, "method.num_labels=2")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "num_labels 3 there, 2 here" in err
    assert "Traceback" not in err
