"""What the repository ships is what its pages say it is."""

import json
import re

import pytest
import torch

from megacocomix.data.prepare import prepare_data
from megacocomix.data.tokens import TokenDataset, TokenShards
from megacocomix.evaluation.perplexity import evaluate_folder
from megacocomix.files import file_sha256
from megacocomix.sae.file import load_sae
from megacocomix.sae.measure import measure_sae
from megacocomix.teacher.load import load_teacher

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def valid(root, tmp_path_factory):
    out = tmp_path_factory.mktemp("wiki")
    text, tokenizer = root / "assets/corpus/wiki_vital.jsonl.gz", root / "assets/teacher/tokenizer.model"
    prepare_data([str(text)], out, str(tokenizer), valid=0.05, workers=1)
    return out / "valid"


@pytest.fixture(scope="module")
def card(root):
    return (root / "assets/teacher/README.md").read_text()


def test_the_teacher_has_the_perplexity_of_its_card(root, valid, card):
    stated = float(re.search(r"loss, perplexity \| ([\d.]+)", card)[1])
    result = evaluate_folder(root / "assets/teacher", str(valid), 8)
    assert result["valid_loss"] == pytest.approx(stated, abs=1e-4)


def test_the_autoencoder_has_the_fvu_of_its_card_and_was_trained_on_this_teacher(root, valid, card):
    sae = load_sae(root / "assets/teacher/sae.safetensors")
    teacher = load_teacher(root / "assets/teacher", sae.info["sae_layer"], sae.info["location"])
    assert sae.info["teacher_sha256"] == teacher.sha256 == file_sha256(root / "assets/teacher/model.safetensors")
    assert f"{sae.info['measured']['fvu_standardized']:.4f}" == re.search(r"FVU\), standardised \| ([\d.]+)", card)[1]
    dataset = TokenDataset(TokenShards.open(valid), teacher.context, None)
    tokens = torch.from_numpy(dataset.batch(range(32)))
    report = measure_sae(sae, [teacher.hidden(tokens).flatten(0, 1)])
    assert report.fvu_standardized == pytest.approx(sae.info["measured"]["fvu_standardized"], rel=0.1)
    assert report.l0 == pytest.approx(16, abs=0.1)


def test_the_manifest_of_the_shipped_text_names_its_tokenizer_and_split(valid):
    manifest = json.loads((valid / "manifest.json").read_text())
    assert manifest["num_documents"] == 505
    assert manifest["num_tokens"] == 71205
