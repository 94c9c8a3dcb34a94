"""Token files of other projects give the ids that their own project reads from them, or are refused by name before the
first step."""

import json
import os
import pickle
import struct
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

import tiny
from jobs import train
from megacocomix.data import binary
from megacocomix.data.check import token_problems
from megacocomix.data.tokenizer import load_tokenizer
from megacocomix.data.tokens import TokenShards, file_fingerprint
from megacocomix.errors import UserError
from processes import run_processes, run_tool

IDS = np.random.default_rng(0).integers(0, 50_257, 5000)
WIDE = np.random.default_rng(1).integers(0, 128_000, 5000)


def llm_c(path, ids, magic=20240520, version=1, dtype="<u2"):
    """As dev/data/data_common.py of llm.c writes it."""
    header = np.zeros(256, np.int32)
    header[:3] = magic, version, len(ids)
    path.write_bytes(header.tobytes() + ids.astype(dtype).tobytes())


def megatron(path, sequences, dtype="<u2", code=8, documents=None, order=None):
    """As megatron/core/datasets/indexed_dataset.py writes them; `order`: the sequences that the index lists."""
    path.write_bytes(b"".join(np.asarray(each).astype(dtype).tobytes() for each in sequences))
    lengths = np.array([len(each) for each in sequences])
    pointers = (np.cumsum(lengths) - lengths) * np.dtype(dtype).itemsize
    order = np.arange(len(sequences)) if order is None else np.array(order)
    bounds = np.arange(len(order) + 1) if documents is None else np.array(documents)
    head = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, len(order), len(bounds))
    arrays = lengths[order].astype("<i4"), pointers[order].astype("<i8"), bounds.astype("<i8")
    path.with_suffix(".idx").write_bytes(head + b"".join(array.tobytes() for array in arrays))


def read_all(path, dtype=None):
    shards = TokenShards.open(path, dtype)
    whole = shards.read(0, len(shards))
    assert (shards.read(1, len(shards) - 2) == whole[1:-1]).all()
    return whole


def problems(path, vocab_size=50_257, tokenizer=None, dtype=None):
    return list(token_problems(path.name, TokenShards.open(path, dtype), vocab_size, ("gpt2", tokenizer)))


@pytest.mark.parametrize(("dtype", "ids"), [("uint16", IDS), ("uint32", WIDE), ("int32", WIDE), ("int64", WIDE)])
def test_ids_without_a_header_are_read_with_the_type_given(tmp_path, dtype, ids):
    ids.astype(dtype).tofile(tmp_path / "train.bin")
    assert (read_all(tmp_path / "train.bin", dtype) == ids).all()


@pytest.mark.parametrize("ids", [IDS, WIDE, IDS % 300, IDS[:60]])
@pytest.mark.parametrize(("dtype", "looks"), [("uint32", "uint32"), ("int32", "uint32"), ("int64", "int64")])
def test_wider_ids_are_never_read_as_uint16(tmp_path, dtype, looks, ids):
    ids.astype(dtype).tofile(tmp_path / "train.bin")
    with pytest.raises(UserError, match=rf"holds {looks}, it seems, not uint16: its type is {looks} \(data\.dtype"):
        TokenShards.open(tmp_path / "train.bin")


def test_eight_byte_ids_are_not_read_as_four_byte_ids_either(tmp_path):
    WIDE.astype("int64").tofile(tmp_path / "train.bin")
    with pytest.raises(UserError, match="holds int64, it seems, not uint32"):
        TokenShards.open(tmp_path / "train.bin", "uint32")


@pytest.mark.parametrize(
    ("stored", "given"), [("uint16", "uint32"), ("uint16", "int64"), ("uint32", "int64"), (">u2", None)]
)
def test_ids_read_with_too_wide_a_type_or_in_another_byte_order_are_outside_the_vocabulary(tmp_path, stored, given):
    IDS[:4000].astype(stored).tofile(tmp_path / "train.bin")
    (problem,) = problems(tmp_path / "train.bin", dtype=given)
    assert "holds token" in problem and "the vocabulary ends at 50256" in problem


def test_a_token_outside_the_vocabulary_is_found_anywhere_in_the_file_before_step_1(tmp_path):
    tiny.make_inputs(tmp_path)
    tokens = np.fromfile(tmp_path / "train.bin", np.uint16)
    tokens[len(tokens) - 3] = tiny.VOCAB
    tokens.tofile(tmp_path / "train.bin")
    ((code, lines),) = run_processes(1, train, tiny.config(tmp_path))
    assert code == 2 and "train.bin holds token 97 (read as uint16)" in lines[0]
    assert not (tmp_path / "run").exists()


def test_a_vocabulary_of_more_than_65536_needs_the_type_of_raw_ids(tmp_path, root):
    (IDS % 1000).astype("<u2").tofile(tmp_path / "train.bin")
    large = load_tokenizer("gpt2")
    large = type(large)(**{name: getattr(large, name) for name in large.__dataclass_fields__} | {"vocab_size": 128_000})
    (problem,) = problems(tmp_path / "train.bin", 128_000, large)
    assert "128000 tokens do not fit uint16: give it, such as uint32 (data.dtype, --data-dtype)" in problem
    (IDS % 1000).astype("<u4").tofile(tmp_path / "train.bin")
    assert problems(tmp_path / "train.bin", 128_000, large, "uint32") == []


@pytest.mark.parametrize(("magic", "version", "dtype", "ids"), [(20240520, 1, "<u2", IDS), (20240801, 7, "<u4", WIDE)])
def test_llm_cs_files_are_read_after_their_header(tmp_path, magic, version, dtype, ids):
    llm_c(tmp_path / "train_000001.bin", ids, magic, version, dtype)
    assert (read_all(tmp_path / "train_000001.bin") == ids).all()
    content = (tmp_path / "train_000001.bin").read_bytes()
    for damage in (content[:-100], content + b"\0\0"):
        (tmp_path / "train_000001.bin").write_bytes(damage)
        with pytest.raises(UserError, match=r"5,000 tokens of \d bytes after a header of 1024"):
            TokenShards.open(tmp_path / "train_000001.bin")


@pytest.mark.parametrize("ids", [IDS.astype("<u2"), WIDE.astype("<i8"), WIDE.astype(">u4").reshape(50, 100)])
def test_numpys_files_are_read_with_their_type_and_shape(tmp_path, ids):
    np.save(tmp_path / "train.npy", ids)
    assert (read_all(tmp_path / "train.npy") == np.load(tmp_path / "train.npy").reshape(-1)).all()
    (tmp_path / "train.npy").rename(tmp_path / "train.bin")  # the content counts, not the name
    assert (read_all(tmp_path / "train.bin") == ids.reshape(-1)).all()


def test_numpys_files_of_other_values_are_refused(tmp_path):
    for values in (IDS.astype(float), np.asfortranarray(IDS.reshape(50, 100)), np.array([{}, 1], object)):
        np.save(tmp_path / "train.npy", values)
        with pytest.raises(UserError, match=r"train\.npy"):
            TokenShards.open(tmp_path / "train.npy")
    np.save(tmp_path / "train.npy", IDS)
    (tmp_path / "train.npy").write_bytes((tmp_path / "train.npy").read_bytes()[:-8])
    with pytest.raises(UserError, match=r"train\.npy"):
        TokenShards.open(tmp_path / "train.npy")


def litdata_chunk():
    """Number of items, their places and the end, items."""
    items = [np.arange(size, dtype=np.int64).tobytes() for size in (10, 20, 30)]
    places = 4 * (len(items) + 2) + np.cumsum([0, *map(len, items)])
    return struct.pack("<I", len(items)) + places.astype("<u4").tobytes() + b"".join(items)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"LITPKDS" + struct.pack("<QBQ", 1, 8, 2**20) + IDS.tobytes(), "a packed data set of lit-gpt"),
        (litdata_chunk(), "a chunk of litdata"),
        (b"\x1f\x8b\x08" + IDS.tobytes(), "compressed with gzip"),
        (b"\x28\xb5\x2f\xfd" + IDS.tobytes(), "compressed with zstd"),
        (b"PK\x03\x04" + IDS.tobytes(), "a zip file"),
        (b"PAR1" + IDS.tobytes(), "a parquet file"),
        (b"MMIDIDX\x00\x00" + IDS.tobytes(), "an index of Megatron-LM"),
        (b'{"text": "some text"}\n' * 100, "is text, not token ids"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 10\n", "git-lfs pointer"),
        (b"", r"train\.bin"),
        (np.array([20240801, 8, 10], "<i4").tobytes().ljust(1044, b"\0"), "a file of llm.c of another version"),
        (np.array([20240522, 1, 10], "<i4").tobytes().ljust(1044, b"\0"), "a file of llm.c with HellaSwag"),
        (safetensors.torch.save({"input_ids": torch.arange(500)}), "a safetensors file"),
        (pickle.dumps(IDS.tolist()), "a pickle"),
        (b"train.txt".ljust(257, b"\0") + b"ustar\0" + b"00" + bytes(760), "a tar file"),
        (b"GGUF" + IDS.astype("<u2").tobytes(), "a GGUF file"),
        ("Die Häuser der Stadt, größer als früher. ".encode() * 200, "is text, not token ids"),
        (b"123", r"train\.bin has 3 bytes"),
    ],
)
def test_files_of_other_kinds_are_refused_by_name(tmp_path, content, what):
    (tmp_path / "train.bin").write_bytes(content)
    with pytest.raises(UserError, match=what) as refusal:
        TokenShards.open(tmp_path / "train.bin")
    assert len(refusal.value.problems) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["train.bin"]


def test_raw_ids_under_another_name_need_their_type(tmp_path):
    WIDE.astype("<u4").tofile(tmp_path / "part-000.npy")  # OLMo's
    with pytest.raises(UserError, match="For ids without a header give their type"):
        TokenShards.open(tmp_path / "part-000.npy")
    assert (read_all(tmp_path / "part-000.npy", "uint32") == WIDE).all()


@pytest.mark.parametrize(("code", "dtype"), [(1, "<u1"), (2, "<i1"), (3, "<i2"), (4, "<i4"), (5, "<i8"), (8, "<u2")])
def test_megatrons_files_are_read_with_the_type_in_their_index(tmp_path, code, dtype):
    sequences = np.array_split(IDS % 128, 40)
    megatron(tmp_path / "text.bin", sequences, dtype, code, documents=[0, 3, 3, 40])
    assert (read_all(tmp_path / "text.bin") == IDS % 128).all()


def test_megatrons_documents_come_in_the_indexs_order_without_those_that_it_leaves_out(tmp_path):
    sequences = np.split(IDS, [0, 700, 701, 1500, 3000, 4999])
    order = [4, 1, 2, 6, 0, 2]
    megatron(tmp_path / "text.bin", sequences, order=order)
    assert (read_all(tmp_path / "text.bin") == np.concatenate([sequences[each] for each in order])).all()
    assert "its index leaves out" in str(TokenShards.open(tmp_path / "text.bin").binary)


def index_of(path, change):
    index = bytearray(path.with_suffix(".idx").read_bytes())
    change(index)
    path.with_suffix(".idx").write_bytes(index)


def set_number(place, value, kind="<q"):
    return lambda index: struct.pack_into(kind, index, place, value)


FIRST = 34 + 4 * 4  # the first pointer of four


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda index: index.clear(), "its header is incomplete"),
        (lambda index: index.__delitem__(slice(-8, None)), "its counts need"),
        (lambda index: index.extend(b"12345"), "its counts need"),
        (set_number(18, 3), "its counts need"),
        (set_number(9, 2), "MMIDIDX, version 1"),
        (set_number(17, 6, "<B"), "its type has the code 6"),
        (set_number(FIRST, 1), "sequence 0 is 1250 ids at byte 1"),
        (set_number(FIRST + 8, -2500), "sequence 1 is 1250 ids at byte -2500"),
        (set_number(FIRST + 8, 10_000), "sequence 1 is 1250 ids at byte 10000, but .* has 10000 bytes"),
        (set_number(34 + 12, -1, "<i"), "sequence 3 is -1 ids"),
        (set_number(FIRST + 32, 1), "its documents do not divide its 4 sequences"),
        (set_number(FIRST + 32 + 8, 5), "its documents do not divide its 4 sequences"),
    ],
)
def test_a_megatron_index_that_does_not_fit_is_refused(tmp_path, change, what):
    megatron(tmp_path / "text.bin", np.split(IDS, 4))
    index_of(tmp_path / "text.bin", change)
    with pytest.raises(UserError, match=what):
        TokenShards.open(tmp_path / "text.bin")


def test_a_half_copied_megatron_file_and_a_shorter_type_are_refused(tmp_path):
    megatron(tmp_path / "text.bin", np.split(IDS, 4))
    (tmp_path / "text.bin").write_bytes((tmp_path / "text.bin").read_bytes()[:5000])
    with pytest.raises(UserError, match="one of the two is incomplete, or of another data set"):
        TokenShards.open(tmp_path / "text.bin")
    megatron(tmp_path / "wide.bin", np.split(IDS, 4), "<u2", code=4)
    with pytest.raises(UserError, match="one of the two is incomplete, or of another data set"):
        TokenShards.open(tmp_path / "wide.bin")


def test_the_index_of_a_smaller_file_shows_where_its_documents_end(tmp_path):
    gpt2, ended = load_tokenizer("gpt2"), IDS % 1000
    ended[[99, 1499, 2999, 4999]] = gpt2.eot_id
    own = np.split(ended, [100, 1500, 3000])
    megatron(tmp_path / "text.bin", own, order=[3, 0])
    assert problems(tmp_path / "text.bin", tokenizer=gpt2) == []
    megatron(tmp_path / "other.bin", np.split(ended[:3000], [500, 1000]))
    (tmp_path / "other.idx").replace(tmp_path / "text.idx")
    (problem,) = problems(tmp_path / "text.bin", tokenizer=gpt2)
    assert "is it the index of another file?" in problem


def test_a_files_fingerprint_is_of_every_byte_and_found_again_without_reading_it(tmp_path, monkeypatch):
    file = tmp_path / "train.bin"
    (np.arange(3 * 2**20) % 50_000).astype("<u2").tofile(file)  # 6 MiB
    first = TokenShards.open(file).fingerprint
    assert not (tmp_path / ".train.bin.scan.json").exists()  # a file that may still be written
    with open(file, "r+b") as stream:
        stream.seek(3 * 2**20)
        stream.write(b"\1\2")
    os.utime(file, (time.time() - 3600,) * 2)
    changed = TokenShards.open(file)
    assert changed.fingerprint != first
    assert changed.former_fingerprint == changed.fingerprint_as(changed.former_fingerprint)  # what old runs recorded
    monkeypatch.setattr("megacocomix.data.binary._scan_chunk", None)
    assert TokenShards.open(file).fingerprint == changed.fingerprint
    cache = tmp_path / ".train.bin.scan.json"
    for damage in ("{", cache.read_text().replace('"smallest": 0', '"smallest": "0"'), "[]"):
        cache.write_text(damage)
        with pytest.raises(TypeError):  # it is read again
            TokenShards.open(file)


def test_an_earlier_fingerprint_counts_only_where_the_windows_are_those_of_then(tmp_path):
    """Earlier versions read an llm.c file with its header, and a Megatron file in its order on disk."""
    llm_c(tmp_path / "llm.bin", IDS)
    megatron(tmp_path / "order.bin", np.split(IDS, 4), order=[1, 0, 2, 3])
    megatron(tmp_path / "same.bin", np.split(IDS, 4))
    IDS.astype("<i4").tofile(tmp_path / "wide.bin")
    for name, dtype, is_same in (
        ("llm.bin", None, False),
        ("order.bin", None, False),
        ("wide.bin", "int32", False),
        ("same.bin", None, True),
    ):
        shards = TokenShards.open(tmp_path / name, dtype)
        recorded = file_fingerprint(tmp_path / name)
        assert (shards.fingerprint_as(recorded) == recorded) == is_same


def test_the_order_of_an_index_is_part_of_the_fingerprint(tmp_path):
    prints = set()
    for order in ([0, 1, 2], [2, 1, 0], [0, 1]):
        megatron(tmp_path / "text.bin", np.split(IDS[:3000], 3), order=order)
        prints.add(TokenShards.open(tmp_path / "text.bin").fingerprint)
    assert len(prints) == 3


def test_the_commands_take_the_type_of_raw_ids(tmp_path, root):
    """--data-dtype, and data.dtype of a run's config."""
    tiny.make_inputs(tmp_path)
    for name in ("train.bin", "val.bin"):
        np.fromfile(tmp_path / name, np.uint16).astype(np.uint32).tofile(tmp_path / name)
    config = tiny.config(tmp_path, data={"dtype": "uint32"}, training={"steps": 2})
    assert run_processes(1, train, config) == [(0, [])]
    evaluate = f"{root}/tools/evaluate.py perplexity {tmp_path / 'run'}"
    own = run_tool(evaluate, tmp_path)
    assert own.returncode == 0, own.stderr
    given = run_tool(f"{evaluate} --data {tmp_path / 'val.bin'} --data-dtype uint32", tmp_path)
    assert given.returncode == 0 and given.stdout.split(" over ")[0] == own.stdout.split(" over ")[0]
    missing = run_tool(f"{evaluate} --data {tmp_path / 'val.bin'}", tmp_path)
    assert missing.returncode == 2 and "its type is uint32 (data.dtype, --data-dtype)" in missing.stderr
    sae = f"{root}/tools/train_sae.py --teacher {tmp_path / 'teacher'} --data {tmp_path / 'train.bin'} --layer 1"
    sae += f" --latents 64 --k 4 --steps 2 --batch-rows 32 --out {tmp_path / 'new.safetensors'}"
    assert "its type is uint32" in run_tool(sae, tmp_path).stderr
    assert run_tool(f"{sae} --data-dtype uint32", tmp_path).returncode == 0


def record_inputs(folder, inputs):
    """Change what the checkpoint of step 3 recorded."""
    file = folder / "run/checkpoints/step-00000003/checkpoint.json"
    checkpoint = json.loads(file.read_text())
    checkpoint["inputs"] |= inputs
    file.write_text(json.dumps(checkpoint))


def train_with_rank_1_unable_to_read_whole_files(config):
    if os.environ["RANK"] == "1":
        binary._scan_chunk = None
    return train(config)


def test_one_process_of_a_job_reads_a_file_whole_and_the_others_get_what_it_found(tmp_path):
    """Also if nothing can be kept beside it, as for a file that is still warm; under any spelling of its path."""
    tiny.make_inputs(tmp_path)
    config = tiny.config(tmp_path, data={"train": f"{tmp_path}/./train.bin"}, training={"steps": 1})
    assert run_processes(2, train_with_rank_1_unable_to_read_whole_files, config) == [(0, [])] * 2
    assert not list(tmp_path.glob(".*.scan.json"))


def test_an_earlier_runs_fingerprint_of_its_data_still_resumes(tmp_path):
    tiny.make_inputs(tmp_path)
    first = tiny.config(tmp_path, training={"stop_after": 3})
    assert run_processes(1, train, first) == [(0, [])]
    names = {"data.train": "train.bin", "data.valid": "val.bin"}
    record_inputs(tmp_path, {key: file_fingerprint(tmp_path / name) for key, name in names.items()})
    assert run_processes(1, train, tiny.config(tmp_path)) == [(0, [])]
    tiny.write_tokens(tmp_path / "val.bin", 10 * tiny.CONTEXT, seed=2)
    ((code, lines),) = run_processes(1, train, tiny.config(tmp_path))
    assert code == 2 and "the content of data.valid has changed" in lines[0]


def test_a_teachers_config_is_part_of_its_identity(tmp_path):
    tiny.make_inputs(tmp_path)
    assert run_processes(1, train, tiny.config(tmp_path, training={"stop_after": 3})) == [(0, [])]
    file = tmp_path / "teacher/config.json"
    values = json.loads(file.read_text())
    file.write_text(json.dumps(values | {"transformers_version": "9", "_name_or_path": "elsewhere"}))
    assert run_processes(1, train, tiny.config(tmp_path, training={"stop_after": 4})) == [(0, [])]
    file.write_text(json.dumps(values | {"n_head": values["n_head"] * 2}))
    ((code, lines),) = run_processes(1, train, tiny.config(tmp_path))
    assert code == 2 and "the content of teacher.model's config has changed" in lines[0]


def test_a_type_for_files_without_a_header_leaves_those_with_one_alone(tmp_path):
    """A run may train on one and validate on the other."""
    llm_c(tmp_path / "train.bin", IDS)
    assert (read_all(tmp_path / "train.bin", "uint32") == IDS).all()


def test_files_without_a_token_are_refused(tmp_path):
    np.save(tmp_path / "none.npy", IDS[:0])
    llm_c(tmp_path / "none.bin", IDS[:0])
    for name in ("none.npy", "none.bin"):
        with pytest.raises(UserError, match="holds no token"):
            TokenShards.open(tmp_path / name)


def test_the_index_beside_the_file_that_a_link_leads_to_counts(tmp_path):
    (tmp_path / "data").mkdir()
    megatron(tmp_path / "data/text.bin", np.split(IDS, 4), "<i4", 4, order=[1, 0])
    (tmp_path / "train.bin").symlink_to(tmp_path / "data/text.bin")
    assert (read_all(tmp_path / "train.bin") == np.concatenate([IDS[1250:2500], IDS[:1250]])).all()


def test_changed_shards_of_our_own_are_not_trained_on(tmp_path):
    tiny.make_inputs(tmp_path)
    tokens = np.fromfile(tmp_path / "train.bin", np.uint16)
    data = {split: str(tmp_path / split) for split in ("train", "valid")}
    for folder in data.values():
        tiny.write_shards(Path(folder), tokens)
    assert run_processes(1, train, tiny.config(tmp_path, data=data, training={"stop_after": 1})) == [(0, [])]
    shard = tmp_path / "train/shard-00000.bin"
    shard.write_bytes(shard.read_bytes()[::-1])
    ((code, lines),) = run_processes(1, train, tiny.config(tmp_path, data=data))
    assert code == 2 and "shard-00000.bin is damaged: its SHA-256 differs" in lines[0]


def test_a_run_on_raw_ids_does_not_resume_with_another_tokenizer(tmp_path):
    tiny.make_inputs(tmp_path)
    assert run_processes(1, train, tiny.config(tmp_path, training={"stop_after": 3})) == [(0, [])]
    record_inputs(tmp_path, {"data.tokenizer": "another, end of text 0"})
    ((code, lines),) = run_processes(1, train, tiny.config(tmp_path))
    assert code == 2 and "the content of data.tokenizer has changed" in lines[0]
