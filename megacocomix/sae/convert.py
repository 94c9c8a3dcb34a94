"""Convert an autoencoder, after measuring that it fits its teacher.

An autoencoder that is fed the wrong layer, location or normalisation still returns K latents a token. Only the variance
that it leaves unexplained shows the error. The variance is measured on windows of 64 tokens, which many autoencoders
were trained on, and on windows of the teacher's whole context, which labelling uses."""

import math
from collections.abc import Iterator
from copy import copy
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor, nn

from megacocomix.config.schema import Location
from megacocomix.data.documents import read_documents
from megacocomix.data.sources import find_sources
from megacocomix.data.tokenizer import load_tokenizer, tokenizer_mismatches
from megacocomix.data.tokens import check_token_ids
from megacocomix.errors import UserError
from megacocomix.files import check_absent
from megacocomix.hub import is_hub_name, local_folder
from megacocomix.sae.external import ExternalSAE
from megacocomix.sae.file import load_sae, save_sae, writing_out
from megacocomix.sae.formats import read_external_sae
from megacocomix.sae.measure import SAEReport, measure_sae
from megacocomix.sae.model import CENTERED, SAE
from megacocomix.sae.saelens import write_saelens
from megacocomix.teacher.load import load_teacher_model, teacher_tokenizer
from megacocomix.teacher.model import Teacher, TeacherModel

SHORT_WINDOW = 64
FIT_TOKENS = 2**14
PROBE_TOKENS = 2**9
MOST_UNEXPLAINED = 0.5
CLEARLY_BETTER = 0.7
# What records the layer and location, by kind.
RECORDS = {
    "saelens": "hook_name (before 3.0: hook_point) in cfg.json, and its layer",
    "sparsify": "the name of its folder",
    "openai": "the names of its file and folders",
}
INPUT_SCALES = [2.0 ** (half / 2) for half in range(-16, 17) if half]


@dataclass(frozen=True)
class SAEConversion:
    """The options of `tools/convert_sae.py`; its --help explains them."""

    source: str
    out: Path
    teacher: str | None
    text: str | None
    tokenizer: str | None
    layer: int | None
    location: Location | None
    context: int | None
    center: bool | None
    input_scale: float | None
    accept_fvu: float | None


@dataclass(frozen=True)
class Converted:
    """The autoencoder that was written, and its fit: a report by window length, empty where nothing was measured."""

    sae: SAE
    kind: str
    fit: dict[int, SAEReport]


def convert_sae(job: SAEConversion) -> Converted:
    """Read `source` (a path, or OWNER/NAME[/FOLDER] on the hub), measure it if a teacher and text are given, and write
    our file. Raises UserError, and writes nothing, for an autoencoder that cannot be read, does not fit, or whose layer
    or location is unknown."""
    check_absent(job.out)
    if job.text and not job.teacher:
        raise UserError("--text is read by a teacher: give --teacher DIR too.")
    for name, least in {"layer": 0, "context": 1, "accept_fvu": 0}.items():
        if (value := getattr(job, name)) is not None and not value >= least:  # "not >=" also refuses nan
            raise UserError(f"--{name.replace('_', '-')} {value} must be at least {least}.")
    model = load_teacher_model(local_folder(job.teacher, download=True)) if job.teacher else None
    found = _read(job, model)
    sae, info = found.sae, dict(found.info)
    given = {"sae_layer": job.layer, "location": job.location, "context": job.context}
    for key, value in given.items():
        if value is not None and info.setdefault(key, value) != value:
            raise UserError(
                f"--{key.removeprefix('sae_')} {value} contradicts {job.source}, which records {info[key]}: leave the "
                "option out, or correct the record (cfg.json, or the names of the folders)."
            )
    if missing := [option for key, option in (("sae_layer", "--layer"), ("location", "--location")) if key not in info]:
        raise UserError(f"{job.source} does not record its layer and location: give {' and '.join(missing)}.")
    sae.info, fit = info, {}
    if model:
        info |= {"teacher": Path(job.teacher).resolve().name, "teacher_sha256": model.sha256}
        if is_hub_name(job.teacher):
            info["revision"] = local_folder(job.teacher).name
        teacher = _open_teacher(model, job, sae)
        if job.text:
            tokens, info["tokenizer_sha256"] = _read_tokens(job, model.context)
            check_token_ids(tokens, teacher.vocab_size, f"--text {job.text}")
            fit = measure_fit(teacher, sae, tokens)
            _check_fit(job, teacher, found, tokens, fit)
            info["measured"] = {f"windows_of_{length}": asdict(report) for length, report in fit.items()}
    with writing_out(job.out):
        save_sae(sae, job.out, info)
    return Converted(sae, found.kind, fit)


def export_saelens(source: str, out: Path) -> SAE:
    """Our file → a new SAELens folder. Raises UserError."""
    check_absent(out)
    sae = load_sae(source)
    with writing_out(out):
        write_saelens(sae, out)
    return sae


def measure_fit(teacher: Teacher, sae: SAE, tokens_N: Tensor) -> dict[int, SAEReport]:
    """Reports on windows of 64 tokens and of the teacher's context, from the same tokens."""
    reports = {}
    for length in sorted({min(SHORT_WINDOW, teacher.context), teacher.context}):
        reports[length] = measure_sae(sae, _hidden_rows(teacher, tokens_N, length))
    return reports


def _read(job: SAEConversion, model: TeacherModel | None) -> ExternalSAE:
    has_layernorm = _has_layernorm(model) if model else None
    if Path(job.source).exists():
        return read_external_sae(Path(job.source), job.input_scale, job.center, has_layernorm)
    repository, folder = "/".join(job.source.split("/")[:2]), "/".join(job.source.split("/")[2:])
    if not is_hub_name(repository):
        raise UserError(f"{job.source} does not exist.")
    local = local_folder(repository, download=True, under=folder or None)
    found = read_external_sae(local, job.input_scale, job.center, has_layernorm)
    found.info["source"] |= {"repository": repository, "revision": local_folder(repository).name}
    return found


def _has_layernorm(model: TeacherModel) -> bool | None:
    """Whether the norms of a block are LayerNorm (True) or RMSNorm (False); None for others, and for both."""
    norms = {
        isinstance(part, nn.LayerNorm)
        for part in model.blocks[0].children()
        if isinstance(part, nn.LayerNorm) or "RMSNorm" in type(part).__name__
    }
    return norms.pop() if len(norms) == 1 else None


def _open_teacher(model: TeacherModel, job: SAEConversion, sae: SAE) -> Teacher:
    try:
        teacher = Teacher(model, sae.info["sae_layer"], sae.info["location"])
    except UserError as error:
        raise UserError(*(f"--teacher {job.teacher}: {line}" for line in error.problems)) from None
    if teacher.width != sae.width:
        raise UserError(
            f"{job.source} reads width {sae.width}, but the teacher {job.teacher} has width {teacher.width}."
        )
    return teacher


def _read_tokens(job: SAEConversion, context: int) -> tuple[Tensor, str]:
    """The first tokens of the text, int64 [N], and the hash of the tokenizer that made them."""
    theirs = teacher_tokenizer(local_folder(job.teacher))
    tokenizer = load_tokenizer(job.tokenizer) if job.tokenizer else theirs
    if tokenizer is None:
        raise UserError(f"--teacher {job.teacher} has no tokenizer: give --tokenizer, as data.tokenizer.")
    if problems := tokenizer_mismatches(
        (f"--teacher {job.teacher}", theirs), (f"--tokenizer {job.tokenizer}", tokenizer)
    ):
        raise UserError(*problems)
    ids: list[int] = []
    for document in read_documents(find_sources([job.text])):
        ids += [*tokenizer.encode_batch([document])[0], tokenizer.eot_id]
        if len(ids) >= FIT_TOKENS:
            break
    if len(ids) < context:
        raise UserError(f"--text {job.text} holds {len(ids)} tokens, fewer than one window of {context}.")
    return torch.tensor(ids[: max(FIT_TOKENS // context, 1) * context]), tokenizer.sha256


def _check_fit(
    job: SAEConversion, teacher: Teacher, found: ExternalSAE, tokens_N: Tensor, fit: dict[int, SAEReport]
) -> None:
    """Raises UserError if the autoencoder leaves too much variance unexplained. Without --accept-fvu it also raises if
    another block, location or scale of its input would fit clearly better ("clearly" because neighbours are alike)."""
    worst = max(fit, key=lambda length: (math.isnan(fit[length].fvu_standardized), fit[length].fvu_standardized))
    fvu = fit[worst].fvu_standardized
    bound = MOST_UNEXPLAINED if job.accept_fvu is None else job.accept_fvu
    if fvu <= bound and job.accept_fvu is not None:
        return
    sae, recorded = found.sae, found.info
    place = (sae.info["sae_layer"], sae.info["location"], "")
    fvus = _fit_everywhere(teacher.model, sae, tokens_N[:PROBE_TOKENS])
    here = fvus[place]
    if sae.form.normalization in ("none", "center"):
        scale, fvu_scaled = _fit_scaled(teacher, sae, tokens_N[:PROBE_TOKENS])
        # An L1 penalty shrinks latents, for which a somewhat larger input makes up.
        is_shrinkage = sae.form.activation == "relu" and 0.5 < scale < 2 and fvu_scaled > 0.5 * here
        if not is_shrinkage:
            total = scale * (found.recorded_factor or job.input_scale or 1)
            option = f" --input-scale {total:.3g}"
            if found.recorded_factor:  # beside a recorded factor the option is refused
                option = f' with {{"scaling_factor": {total:.3g}}} in activation_scaler.json'
            fvus[*place[:2], option] = fvu_scaled
    where = min(fvus, key=lambda place: (math.isnan(fvus[place]), fvus[place]))
    best, (layer, location, option) = fvus[where], where
    is_better = best < CLEARLY_BETTER * min(1.0, here)
    if fvu <= bound and not is_better:  # not "fvu > bound", which nan would pass
        return
    advice = "it fits no block of this teacher better"
    if is_better:
        advice = f"it fits better, with {best:.2f}, as --layer {layer} --location {location}{option}"
        if (recorded.get("sae_layer", layer), recorded.get("location", location)) != (layer, location):
            advice += f" (first correct {RECORDS[found.kind]}: another place is recorded)"
    raise UserError(
        f"{job.source} does not fit {job.teacher}: it leaves {fvu:.2f} of the variance unexplained on windows of "
        f"{worst} tokens (most accepted: {bound}); {advice}. --accept-fvu X accepts up to X."
    )


def _fit_everywhere(model: TeacherModel, sae: SAE, tokens_N: Tensor) -> dict[tuple[int, Location, str], float]:
    """The variance left unexplained by layer, location and option: with the mean kept and removed."""
    variants = {"": sae}
    if (kind := sae.form.normalization) in CENTERED:
        variants[" --center"] = centered = copy(sae)
        centered.form = replace(sae.form, normalization=CENTERED[kind])
    fvus = {}
    for layer, location in product(range(len(model.blocks)), get_args(Location)):
        try:
            teacher = Teacher(model, layer, location)
        except UserError:  # its blocks do not have this location
            continue
        rows = list(_hidden_rows(teacher, tokens_N, SHORT_WINDOW))
        for option, variant in variants.items():
            fvus[layer, location, option] = measure_sae(variant, rows).fvu_standardized
    return fvus


def _fit_scaled(teacher: Teacher, sae: SAE, tokens_N: Tensor) -> tuple[float, float]:
    """The scale of the input, other than 1, that leaves the least unexplained; and how much."""
    rows = list(_hidden_rows(teacher, tokens_N, SHORT_WINDOW))

    def unexplained(scale: float) -> tuple[bool, float]:
        fvu = measure_sae(sae, (row_ND * scale for row_ND in rows)).fvu_standardized
        return math.isnan(fvu), fvu

    best = min(INPUT_SCALES, key=unexplained)
    best = min((best * 2 ** (step / 4) for step in (-1, 0, 1)), key=unexplained)  # close enough to be used
    return best, unexplained(best)[1]


def _hidden_rows(teacher: Teacher, tokens_N: Tensor, length: int) -> Iterator[Tensor]:
    """Hidden states fp32 [rows, D] of whole windows of `length`, about a thousand tokens at a time."""
    windows = tokens_N[: len(tokens_N) // length * length].view(-1, length)
    for tokens_BT in windows.split(max(1, 1024 // length)):
        yield teacher.hidden(tokens_BT).flatten(0, 1).float()
