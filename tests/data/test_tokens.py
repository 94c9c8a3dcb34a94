import json

import numpy as np
import pytest

from megacocomix.data.tokens import ShardWriter, TokenDataset, TokenShards
from megacocomix.errors import UserError

SETTINGS = {"tokenizer": {"name": "numbers", "sha256": "0", "eot_id": 0}, "vocab_size": 1000}


def write_split(folder, num_tokens=1000, shard_tokens=300, dtype="<u2"):
    writer = ShardWriter(folder, np.dtype(dtype), shard_tokens)
    writer.append(np.arange(num_tokens))
    writer.finish(SETTINGS)
    return folder


def test_reading_crosses_shards(tmp_path):
    shards = TokenShards.open(write_split(tmp_path / "train"), verify=True)
    assert len(shards) == 1000
    for start, count in ((0, 1000), (299, 2), (300, 300), (250, 700), (1000, 0)):
        tokens = shards.read(start, count)
        assert tokens.dtype == np.int64
        assert tokens.tolist() == list(range(start, start + count))
    with pytest.raises(IndexError):
        shards.read(999, 2)


def test_large_vocabularies_use_four_bytes(tmp_path):
    writer = ShardWriter(tmp_path, np.dtype("<u4"), 100)
    writer.append(np.array([100_000, 7]))
    writer.finish({**SETTINGS, "vocab_size": 200_000})
    assert TokenShards.open(tmp_path).read(0, 2).tolist() == [100_000, 7]


def test_truncated_shard_is_refused_by_name(tmp_path):
    folder = write_split(tmp_path / "train")
    with open(folder / "shard-00001.bin", "r+b") as file:
        file.truncate(500)
    with pytest.raises(UserError, match=r"shard-00001\.bin has 500 bytes, expected 600"):
        TokenShards.open(folder)
    (folder / "shard-00001.bin").unlink()
    with pytest.raises(UserError, match=r"shard-00001\.bin is missing"):
        TokenShards.open(folder)


def test_verify_finds_a_flipped_byte(tmp_path):
    folder = write_split(tmp_path / "train")
    data = bytearray((folder / "shard-00002.bin").read_bytes())
    data[17] ^= 1
    (folder / "shard-00002.bin").write_bytes(data)
    TokenShards.open(folder)
    with pytest.raises(UserError, match=r"shard-00002\.bin is damaged"):
        TokenShards.open(folder, verify=True)


def test_folders_without_a_usable_manifest_are_refused(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        TokenShards.open(tmp_path / "nowhere")
    folder = write_split(tmp_path / "train")
    with pytest.raises(UserError, match=f"give one of its splits: {folder}"):
        TokenShards.open(tmp_path)
    manifest = json.loads((folder / "manifest.json").read_text())
    for text, message in (("{", "damaged"), (json.dumps({**manifest, "version": 9}), "version 9")):
        (folder / "manifest.json").write_text(text)
        with pytest.raises(UserError, match=message):
            TokenShards.open(folder)
    (folder / "manifest.json").unlink()
    with pytest.raises(UserError, match="did not finish"):
        TokenShards.open(folder)


def test_fingerprint_follows_the_content_not_the_path(tmp_path):
    same, again = (TokenShards.open(write_split(tmp_path / name)) for name in ("a", "b"))
    other = TokenShards.open(write_split(tmp_path / "c", num_tokens=999))
    assert same.fingerprint == again.fingerprint != other.fingerprint
    assert (same.vocab_size, same.tokenizer_sha256) == (1000, "0")


def test_reference_bin_is_read_in_place(tmp_path):
    np.arange(50_000, 50_257).astype("<u2").tofile(tmp_path / "val.bin")
    shards = TokenShards.open(tmp_path / "val.bin")
    assert len(shards) == 257
    assert shards.read(255, 2).tolist() == [50_255, 50_256]
    assert shards.vocab_size is None and shards.tokenizer_sha256 is None and len(shards.fingerprint) == 64
    assert [file.name for file in tmp_path.iterdir()] == ["val.bin"]
    (tmp_path / "odd.bin").write_bytes(b"123")
    (tmp_path / "text.txt").write_bytes(b"1234")
    for name in ("odd.bin", "text.txt"):
        with pytest.raises(UserError, match=name):
            TokenShards.open(tmp_path / name)


def test_samples_do_not_depend_on_how_positions_are_grouped(tmp_path):
    """Any number of ranks, any batch size, any point of resuming: sample p of a seed is always the same."""
    dataset = TokenDataset(TokenShards.open(write_split(tmp_path / "train")), context=32, seed=3)
    whole = dataset.batch(range(100))  # 31 windows: more than three epochs
    assert whole.shape == (100, 32) and whole.dtype == np.int64
    for num_ranks in (1, 2, 3, 7):
        ranks = [dataset.batch(range(rank, 100, num_ranks)) for rank in range(num_ranks)]
        assert all((whole[rank::num_ranks] == rows).all() for rank, rows in enumerate(ranks))
    assert (dataset.batch(range(57, 100)) == whole[57:]).all()


def test_every_epoch_holds_every_window_once(tmp_path):
    dataset = TokenDataset(TokenShards.open(write_split(tmp_path / "train")), context=32, seed=3)
    assert dataset.num_windows == 31
    epochs = [dataset.batch(range(31 * epoch, 31 * epoch + 31))[:, 0].tolist() for epoch in range(3)]
    assert all(sorted(firsts) == list(range(0, 992, 32)) for firsts in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_validation_is_in_file_order(tmp_path):
    dataset = TokenDataset(TokenShards.open(write_split(tmp_path / "valid")), context=100, seed=None)
    assert dataset.batch(range(12))[:, 0].tolist() == [*range(0, 1000, 100), 0, 100]


def test_too_few_tokens_for_a_window_are_refused(tmp_path):
    shards = TokenShards.open(write_split(tmp_path / "train", num_tokens=20))
    with pytest.raises(UserError, match="20 tokens, fewer than one window of 21"):
        TokenDataset(shards, context=21, seed=0)


def test_a_writer_goes_on_from_its_last_flush(tmp_path):
    expected = write_split(tmp_path / "whole")
    writer = ShardWriter(tmp_path / "interrupted", np.dtype("<u2"), 300)
    writer.append(np.arange(450))
    progress = writer.flush()
    writer.append(np.arange(450, 700))  # never recorded: written again below
    writer.close()
    writer = ShardWriter(tmp_path / "interrupted", np.dtype("<u2"), 300, **progress)
    writer.append(np.arange(450, 1000))
    writer.finish(SETTINGS)
    for file in expected.iterdir():
        assert file.read_bytes() == (tmp_path / "interrupted" / file.name).read_bytes()
