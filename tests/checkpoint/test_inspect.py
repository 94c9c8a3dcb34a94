"""A listing names the kind of a file, and does not change the file."""

import json

import pytest
import torch
from external_checkpoints import huggingface_model, megatron_folder, published_folder

import tiny
from megacocomix.checkpoint.convert import write_native
from megacocomix.checkpoint.inspect import list_checkpoint
from megacocomix.checkpoint.open import open_source
from megacocomix.errors import UserError
from megacocomix.files import file_sha256


@pytest.fixture
def folders(tmp_path, request):
    """One of each kind: kind → folder or file."""
    model = huggingface_model()
    model.save_pretrained(tmp_path / "hf")
    published_folder(tmp_path / "published", request.config.getoption("--golden"))
    megatron_folder(tmp_path / "megatron", model, 3.0, 2, arguments={"num_attention_heads": 4, "vocab_size": 97})
    write_native(open_source(tmp_path / "hf"), tmp_path / "ours", "", {})
    return {
        "Hugging Face folder": tmp_path / "hf",
        "folder of the published CoCoMix code": tmp_path / "published",
        "Megatron-LM checkpoint": tmp_path / "megatron",
        "megacocomix checkpoint": tmp_path / "ours",
        "safetensors file": tmp_path / "hf/model.safetensors",
        "file of torch.save": tmp_path / "megatron/iter_0000010/mp_rank_01/model_optim_rng.pt",
    }


def test_every_kind_is_named_with_its_tensors_hashes_and_health(folders, tmp_path):
    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")}
    for kind, path in folders.items():
        listing = list_checkpoint(path, health=True)
        assert listing.kind == kind
        assert len(listing.tensors) > 10 and not listing.unhealthy()
        assert all(file["sha256"] == file_sha256(file["name"]) for file in listing.files)
        assert json.loads(listing.as_json())["kind"] == kind
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")} == before
    config = list_checkpoint(folders["megacocomix checkpoint"]).config
    assert config["config"]["model"]["hidden_size"] == tiny.SHAPE["hidden_size"]


def test_nan_and_infinity_are_counted(tmp_path):
    model = huggingface_model()
    with torch.no_grad():
        model.transformer.wpe.weight[0, :3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    model.save_pretrained(tmp_path / "hf")
    (entry,) = list_checkpoint(tmp_path / "hf", health=True).unhealthy()
    assert (entry.name, entry.num_nan, entry.num_inf) == ("transformer.wpe.weight", 1, 2)
    assert list_checkpoint(tmp_path / "hf").unhealthy() == []  # not asked for


def test_what_is_no_checkpoint_is_refused_in_one_line(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"no tensors here")
    (tmp_path / "x.pt").write_bytes(b"nor here")
    for path, what in (
        (tmp_path, "holds no model"),
        (tmp_path / "none", "does not exist"),
        (tmp_path / "x.pt", "x.pt"),
    ):
        with pytest.raises(UserError, match=what):
            list_checkpoint(path)
    with pytest.raises(UserError, match="damaged"):
        list_checkpoint(tmp_path / "x.safetensors")
