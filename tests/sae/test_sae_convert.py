"""An autoencoder that fits the teacher is converted. Others are refused, and the error names a place where they fit."""

import math
import re
import shutil
from dataclasses import replace

import pytest
import torch
from external_saes import SAELENS_5, write_saelens, write_sparsify

from megacocomix.data.tokenizer import load_tokenizer
from megacocomix.errors import UserError
from megacocomix.files import file_sha256
from megacocomix.sae.convert import SAEConversion, convert_sae, export_saelens
from megacocomix.sae.file import load_sae
from megacocomix.sae.formats import read_external_sae
from megacocomix.sae.model import SAE, SAEForm
from megacocomix.sae.saelens import write_saelens as write_ours
from megacocomix.teacher.load import load_teacher, teacher_tokenizer
from megacocomix.teacher.model import Teacher
from processes import run_tool


@pytest.fixture(scope="module")
def shipped(root):
    return load_sae(root / "assets/teacher/sae.safetensors")


@pytest.fixture(scope="module")
def source(shipped, tmp_path_factory):
    """The shipped autoencoder as OpenAI would have saved it, in a folder named after resid_post_mlp of block 3."""
    file = tmp_path_factory.mktemp("openai") / "resid_post_mlp_v5_32k/autoencoders/3.pt"
    file.parent.mkdir(parents=True)
    state = {
        "pre_bias": shipped.pre_bias.data,
        "encoder.weight": shipped.encoder.data,
        "latent_bias": shipped.latent_bias.data,
        "decoder.weight": shipped.decoder.data.T.contiguous(),
        "activation": "TopK",
        "activation_state_dict": {"k": 16, "postact_fn": "ReLU"},
    }
    torch.save(state, file)
    return file


@pytest.fixture
def unplaced(source, tmp_path):
    """The same file, whose name says nothing of its layer and location."""
    return shutil.copy(source, tmp_path / "sae.pt")


@pytest.fixture
def job(root, source, tmp_path):
    return SAEConversion(
        source=str(source),
        out=tmp_path / "sae.safetensors",
        teacher=str(root / "assets/teacher"),
        text=str(root / "assets/corpus/wiki_vital.jsonl.gz"),
        tokenizer=None,
        layer=None,
        location=None,
        context=None,
        center=None,
        input_scale=None,
        accept_fvu=None,
    )


def test_a_fitting_autoencoder_is_measured_and_recorded(root, job, shipped):
    done = convert_sae(job)
    assert set(done.fit) == {64, 256}
    for report in done.fit.values():
        assert report.fvu_standardized == pytest.approx(shipped.info["measured"]["fvu_standardized"], rel=0.3)
        assert report.l0 == pytest.approx(16, abs=0.1)
    sae = load_sae(job.out)
    assert all(torch.equal(value, shipped.state_dict()[name]) for name, value in sae.state_dict().items())
    assert (sae.info["sae_layer"], sae.info["location"], sae.info["context"]) == (3, "resid_post_mlp", 64)
    assert sae.info["teacher_sha256"] == file_sha256(root / "assets/teacher/model.safetensors")
    tokenizer = teacher_tokenizer(root / "assets/teacher")
    assert sae.info["tokenizer_sha256"] == tokenizer.sha256
    assert tokenizer.is_recorded_as(shipped.info["tokenizer_sha256"])  # by an earlier version
    assert sae.info["source"] == {"format": "openai", "file": "3.pt", "sha256": file_sha256(job.source)}
    assert sae.info["measured"]["windows_of_256"]["fvu_standardized"] == done.fit[256].fvu_standardized


def test_the_wrong_layer_is_refused_with_the_right_one_and_nothing_is_written(job, unplaced):
    with pytest.raises(UserError) as caught:
        convert_sae(replace(job, source=str(unplaced), layer=0, location="resid_post_mlp"))
    (line,) = caught.value.problems
    assert re.search(r"leaves \d\.\d+ of the variance unexplained on windows of \d+ tokens .most accepted: 0\.5.", line)
    assert "it fits better, with 0.0" in line
    assert "as --layer 3 --location resid_post_mlp" in line
    assert not job.out.exists()


def test_the_wrong_location_is_refused_and_accept_fvu_overrides(job, unplaced):
    wrong = replace(job, source=str(unplaced), layer=3, location="resid_delta_mlp")
    with pytest.raises(UserError, match="--location resid_post_mlp"):
        convert_sae(wrong)
    fvu = convert_sae(replace(wrong, accept_fvu=100.0)).fit[256].fvu_standardized
    assert fvu > 0.5
    assert load_sae(job.out).info["location"] == "resid_delta_mlp"


def test_an_autoencoder_of_centred_activations_is_found_out(job, tmp_path, monkeypatch):
    """It reads the residual without its mean, as TransformerLens shows it. The error names --center."""
    shift, read = 30.0, Teacher.hidden  # a mean that matters: this teacher's own is small
    monkeypatch.setattr(Teacher, "hidden", lambda teacher, tokens: read(teacher, tokens) + shift)
    teacher = load_teacher(job.teacher, 3)
    rows = teacher.hidden(torch.randint(4096, (24, 64), generator=torch.Generator().manual_seed(0))).flatten(0, 1)
    centred = rows - rows.mean(-1, keepdim=True)
    _, _, directions = torch.linalg.svd(centred - centred.mean(0), full_matrices=False)
    sae = SAE(128, 192, SAEForm(k=96, normalization="none")).requires_grad_(False)
    sae.encoder.copy_(torch.cat([directions[:96], -directions[:96]]))
    sae.decoder.copy_(sae.encoder)
    sae.pre_bias.copy_(centred.mean(0))
    sae.info = {"sae_layer": 3, "location": "resid_post_mlp"}
    write_ours(sae, tmp_path / "lens")
    with pytest.raises(UserError, match=r"it fits better, with 0\.\d+, as --layer \d --location \w+ --center"):
        convert_sae(replace(job, source=str(tmp_path / "lens")))
    done = convert_sae(replace(job, source=str(tmp_path / "lens"), center=True))
    assert done.sae.form.normalization == load_sae(job.out).form.normalization == "center"
    with pytest.raises(UserError, match=r"--center is for an autoencoder that keeps the mean .* does standardize"):
        convert_sae(replace(job, center=True, out=tmp_path / "other.safetensors"))


def test_a_tokenizer_that_is_not_the_teachers_is_refused_with_both_hashes(job):
    with pytest.raises(UserError) as caught:
        convert_sae(replace(job, tokenizer="gpt2"))
    (line,) = caught.value.problems
    assert load_tokenizer("gpt2").sha256 in line
    assert teacher_tokenizer(job.teacher).sha256 in line


def test_without_text_it_is_written_unmeasured(job):
    done = convert_sae(replace(job, teacher=None, text=None))
    assert done.fit == {}
    assert "measured" not in load_sae(job.out).info


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": "nowhere"}, "nowhere does not exist"),
        ({"teacher": "nowhere"}, "nowhere does not exist"),
        ({"teacher": None}, "give --teacher"),
        ({"layer": 9, "location": "resid_post_mlp", "source": "unplaced"}, r"layer 9 is not one of 0 … 5"),
        ({"layer": 2}, r"--layer 2 contradicts .*3\.pt, which records 3"),
        (
            {"location": "resid_delta_mlp"},
            r"--location resid_delta_mlp contradicts .*, which records resid_post_mlp",
        ),
        ({"context": 256}, r"--context 256 contradicts .*3\.pt, which records 64"),
        ({"layer": -1}, "--layer -1 must be at least 0"),
        ({"context": 0}, "--context 0 must be at least 1"),
        ({"accept_fvu": math.nan}, "--accept-fvu nan must be at least 0"),
        ({"accept_fvu": -1.0}, r"--accept-fvu -1\.0 must be at least 0"),
        ({"text": "nowhere.txt"}, r"nowhere\.txt does not exist"),
    ],
)
def test_a_mistake_is_one_line(job, unplaced, changes, message):
    changes = {key: str(unplaced) if value == "unplaced" else value for key, value in changes.items()}
    with pytest.raises(UserError, match=message) as caught:
        convert_sae(replace(job, **changes))
    assert len(caught.value.problems) == 1
    assert not job.out.exists()


def test_another_width_is_refused(job, tmp_path):
    write_sparsify(tmp_path / "h.3")
    with pytest.raises(UserError, match=r"reads width 24, but the teacher .* has width 128"):
        convert_sae(replace(job, source=str(tmp_path / "h.3")))


def test_an_autoencoder_without_a_recorded_place_needs_options(job, tmp_path):
    write_saelens(tmp_path / "sae", {key: value for key, value in SAELENS_5.items() if key != "hook_name"})
    with pytest.raises(UserError, match="give --layer and --location"):
        convert_sae(replace(job, source=str(tmp_path / "sae")))


def test_an_existing_file_is_never_overwritten(job):
    job.out.write_text("mine")
    with pytest.raises(UserError, match="exists already"):
        convert_sae(job)
    assert job.out.read_text() == "mine"


def test_ours_goes_out_to_saelens(root, shipped, tmp_path):
    export_saelens(str(root / "assets/teacher/sae.safetensors"), tmp_path / "lens")
    back = read_external_sae(tmp_path / "lens")
    assert back.sae.form == shipped.form
    assert all(torch.equal(value, shipped.state_dict()[name]) for name, value in back.sae.state_dict().items())


def test_the_tool_prints_what_it_measured_and_refuses_with_one_line(root, job):
    command = [root / "tools/convert_sae.py", job.source, "--out", job.out]
    command += ["--teacher", job.teacher, "--text", job.text]
    done = run_tool(command, root)
    assert done.returncode == 0, done.stderr
    assert "windows of 64 tokens: variance unexplained 0.0" in done.stdout
    again = run_tool(command, root)
    assert again.returncode == 2
    assert again.stderr.splitlines() == [f"error: --out {job.out} exists already: choose another name or delete it."]
