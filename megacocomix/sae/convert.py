"""Convert an autoencoder, and measure that it fits the teacher it is said to belong to before anything is written.

An autoencoder that is fed the wrong layer, location or normalisation still gives K latents a token; only the variance
that it leaves unexplained tells. It is measured on windows of 64 tokens, which many were trained on, and of the
teacher's whole context, which is what labelling feeds it."""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import get_args

import torch
from safetensors import SafetensorError
from torch import Tensor

from megacocomix.config.schema import Location
from megacocomix.data.documents import find_sources, read_documents
from megacocomix.data.tokenizer import load_tokenizer, tokenizer_mismatches
from megacocomix.data.tokens import check_token_ids
from megacocomix.errors import UserError
from megacocomix.hub import is_hub_name, local_folder
from megacocomix.sae.file import load_sae, save_sae
from megacocomix.sae.formats import ExternalSAE, read_external_sae, write_saelens
from megacocomix.sae.measure import SAEReport, measure_sae
from megacocomix.sae.model import SAE
from megacocomix.teacher.load import load_teacher_model, teacher_tokenizer
from megacocomix.teacher.model import Teacher, TeacherModel

SHORT_WINDOW = 64
FIT_TOKENS = 2**14
PROBE_TOKENS = 2**9
MOST_UNEXPLAINED = 0.5
CLEARLY_BETTER = 0.7


@dataclass(frozen=True)
class SAEConversion:
    """What `tools/convert_sae.py` was asked for; its --help says what each means."""

    source: str
    out: Path
    teacher: str | None
    text: str | None
    tokenizer: str | None
    layer: int | None
    location: Location | None
    context: int | None
    center: bool
    accept_fvu: float | None


@dataclass(frozen=True)
class Converted:
    """What was written, and how well it fits: a report by window length, empty where nothing was measured."""

    sae: SAE
    kind: str
    fit: dict[int, SAEReport]


def convert_sae(job: SAEConversion) -> Converted:
    """Read `source` (a path, or OWNER/NAME[/FOLDER] on the hub), measure it where a teacher and text are given, write
    our file. Raises UserError for what cannot be read, does not say where it belongs, or does not fit; then nothing is
    written."""
    if job.out.exists():
        raise UserError(f"--out {job.out} exists already: choose another name or delete it.")
    if job.text and not job.teacher:
        raise UserError("--text is read by a teacher: give --teacher DIR too.")
    found = _read(job.source)
    sae, info = found.sae, found.info
    if job.center:
        if sae.form.normalization != "none":
            raise UserError(
                f"--center is for an autoencoder that normalises nothing; this one does {sae.form.normalization}."
            )
        sae.form = replace(sae.form, normalization="center")
    info |= {
        key: value
        for key, value in (("sae_layer", job.layer), ("location", job.location), ("context", job.context))
        if value is not None
    }
    if missing := [option for key, option in (("sae_layer", "--layer"), ("location", "--location")) if key not in info]:
        raise UserError(f"{job.source} does not say where in its teacher it belongs: give {' and '.join(missing)}.")
    if info["sae_layer"] < 0:
        raise UserError(f"--layer {info['sae_layer']} must be at least 0.")
    fit = {}
    if job.teacher:
        model = load_teacher_model(local_folder(job.teacher, download=True))
        info |= {"teacher": Path(job.teacher).resolve().name, "teacher_sha256": model.sha256}
        if is_hub_name(job.teacher):
            info["revision"] = local_folder(job.teacher).name
        teacher = _cut(model, job, sae, info)
        if job.text:
            tokens, info["tokenizer_sha256"] = _read_tokens(job, model.context)
            check_token_ids(tokens, teacher.vocab_size, f"--text {job.text}")
            sae.info = info
            fit = measure_fit(teacher, sae, tokens)
            _check_fit(job, model, sae, tokens, fit)
            info["measured"] = {f"windows_of_{length}": asdict(report) for length, report in fit.items()}
    sae.info = info
    try:
        save_sae(sae, job.out, info)
    except (OSError, SafetensorError) as error:
        raise UserError(f"--out {job.out} cannot be written: {error}.") from None
    return Converted(sae, found.kind, fit)


def export_saelens(source: str, out: Path) -> SAE:
    """Our file → a new folder of SAELens. Raises UserError."""
    if out.exists():
        raise UserError(f"--out {out} exists already: choose another name or delete it.")
    sae = load_sae(source)
    try:
        write_saelens(sae, out)
    except (OSError, SafetensorError) as error:
        raise UserError(f"--out {out} cannot be written: {error}.") from None
    return sae


def measure_fit(teacher: Teacher, sae: SAE, tokens_N: Tensor) -> dict[int, SAEReport]:
    """Reports on windows of 64 tokens and of the teacher's context, from the same tokens."""
    reports = {}
    for length in sorted({min(SHORT_WINDOW, teacher.context), teacher.context}):
        rows = (teacher.hidden(tokens_BT).flatten(0, 1).float() for tokens_BT in _windows(tokens_N, length))
        reports[length] = measure_sae(sae, rows)
    return reports


def _read(source: str) -> ExternalSAE:
    repository, folder = "/".join(source.split("/")[:2]), "/".join(source.split("/")[2:])
    if not Path(source).exists() and is_hub_name(repository):
        path = local_folder(repository, download=True, under=folder or None)
        found = read_external_sae(path)
        found.info["source"] |= {"repository": repository, "revision": local_folder(repository).name}
        return found
    if not Path(source).exists():
        raise UserError(f"{source} does not exist.")
    return read_external_sae(Path(source))


def _cut(model: TeacherModel, job: SAEConversion, sae: SAE, info: dict) -> Teacher:
    try:
        teacher = Teacher(model, info["sae_layer"], info["location"])
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
        raise UserError(f"--teacher {job.teacher} carries no tokenizer: give --tokenizer, as data.tokenizer.")
    if problems := tokenizer_mismatches(
        (f"--teacher {job.teacher}", theirs and theirs.sha256), (f"--tokenizer {job.tokenizer}", tokenizer.sha256)
    ):
        raise UserError(*problems)
    documents = read_documents(find_sources([job.text]))
    ids: list[int] = []
    for document in documents:
        ids += [*tokenizer.encode_batch([document])[0], tokenizer.eot_id]
        if len(ids) >= FIT_TOKENS:
            break
    if len(ids) < context:
        raise UserError(f"--text {job.text} holds {len(ids)} tokens, fewer than one window of {context}.")
    return torch.tensor(ids[: max(FIT_TOKENS // context, 1) * context]), tokenizer.sha256


def _check_fit(job: SAEConversion, model: TeacherModel, sae: SAE, tokens_N: Tensor, fit: dict[int, SAEReport]) -> None:
    """Refuse what leaves too much unexplained, or would leave clearly less of another block or location: neighbouring
    blocks are alike. A bound that was asked for is the only one."""
    worst = max(fit, key=lambda length: (math.isnan(fit[length].fvu_standardized), fit[length].fvu_standardized))
    fvu = fit[worst].fvu_standardized
    bound = MOST_UNEXPLAINED if job.accept_fvu is None else job.accept_fvu
    if fvu <= bound and job.accept_fvu is not None:
        return
    places = dict(_places(model, sae, tokens_N[:PROBE_TOKENS]))
    where = min(places, key=lambda place: (math.isnan(places[place]), places[place]))
    best, here = places[where], places[_place(sae.info["sae_layer"], sae.info["location"])]
    is_better = best < CLEARLY_BETTER * min(1.0, here)
    if fvu <= bound and not is_better:  # not "fvu > bound", which nan would pass
        return
    advice = f"it fits better, with {best:.2f}, as {where}" if is_better else "it fits no block of this teacher better"
    raise UserError(
        f"{job.source} does not fit {job.teacher}: it leaves {fvu:.2f} of the variance unexplained on windows of "
        f"{worst} tokens (most accepted: {bound}); {advice}. --accept-fvu X takes it up to X."
    )


def _place(layer: int, location: Location, option: str = "") -> str:
    return f"--layer {layer} --location {location}{option}"


def _places(model: TeacherModel, sae: SAE, tokens_N: Tensor) -> Iterator[tuple[str, float]]:
    """How well it would fit every block, location, and other treatment of the mean: (options, variance unexplained)."""
    forms = {"": sae.form}
    if sae.form.normalization == "none":
        forms[" --center"] = replace(sae.form, normalization="center")
    kept = sae.form
    try:
        for layer, location in (
            (layer, location) for layer in range(len(model.blocks)) for location in get_args(Location)
        ):
            try:
                teacher = Teacher(model, layer, location)
            except UserError:
                continue
            rows = [teacher.hidden(tokens).flatten(0, 1).float() for tokens in _windows(tokens_N, SHORT_WINDOW)]
            for option, sae.form in forms.items():
                report = measure_sae(sae, chain(rows))
                yield _place(layer, location, option), report.fvu_standardized
    finally:
        sae.form = kept


def _windows(tokens_N: Tensor, length: int) -> Iterator[Tensor]:
    """Whole windows [B, length], about a thousand tokens at a time."""
    whole = tokens_N[: len(tokens_N) // length * length].view(-1, length)
    yield from whole.split(max(1, 1024 // length))
