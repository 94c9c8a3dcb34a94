"""The teacher whose labels a student is compared with: the one it was trained on, or the one that the user names."""

from dataclasses import dataclass

from megacocomix.config import Location
from megacocomix.errors import UserError
from megacocomix.interpret.student import Student
from megacocomix.method import MethodConfig
from megacocomix.teacher.labels import ConceptLabeler, LabelSettings, open_labeler
from megacocomix.teacher.load import load_teacher, teacher_tokenizer
from megacocomix.teacher.sae import SAE
from megacocomix.teacher.sae_file import load_sae

METHOD = MethodConfig(name="cocomix").resolved()
"""How labels are chosen for a folder that does not say how it was trained."""


@dataclass(frozen=True)
class Guide:
    """A labeler, and the names of what it was opened from."""

    labeler: ConceptLabeler
    model: str
    sae: str

    def as_dict(self) -> dict:
        """What an inspection record says of it."""
        settings = self.labeler.settings
        chosen = {"label_source": settings.source, "label_sign": settings.sign}
        return {"model": self.model, "sae": self.sae, "num_labels": settings.num_labels, **chosen}


ALONE = "Or read it without its teacher: --no-teacher."


def open_guide(
    student: Student, teacher: str | None = None, sae: str | None = None, remedy: str | None = None
) -> Guide | None:
    """The teacher in `teacher` with the autoencoder `sae`, else the student's own; None where it has none.

    A run's labels are chosen as its config says. Raises one UserError with all that is missing or does not fit, and
    with what else the user can do about it, `remedy`.
    """
    if (teacher is None) != (sae is None):
        raise UserError("--teacher DIR and --sae FILE go together: labels are an autoencoder's reading of a teacher.")
    config = student.config
    if config is None or not config.method.learns_concepts:
        return _open_files(student, teacher, sae) if teacher else None
    if teacher:
        options = config.teacher.model_copy(update={"model": teacher, "sae": sae})
        config = config.model_copy(update={"teacher": options})
    try:
        labeler = open_labeler(config, student.device, student.tokenizer.eot_id)
    except UserError as error:
        raise UserError(*error.problems, *([remedy] if remedy else [])) from None
    return Guide(labeler, config.teacher.model, config.teacher.sae)


def guide_notes(student: Student, guide: Guide | None) -> list[str]:
    """What the reader of the labels must know; without a teacher that nobody declined, why there is none."""
    if guide is None and student.config is None:
        return [f"{student.path} does not say its teacher: --teacher DIR --sae FILE compares with its labels"]
    if guide is None:
        return [f"{student.path} was trained without concept labels: it is read without a teacher"]
    if (piece := guide.labeler.settings.piece) < student.context:
        return [f"{guide.model} reads {piece} tokens: of longer windows each {piece} are labelled by themselves"]
    return []


def _open_files(student: Student, model: str, file: str) -> Guide:
    sae = load_sae(file, student.device)
    if missing := [key for key in ("sae_layer", "location") if key not in sae.info]:
        raise UserError(
            f"--sae {file} does not say its {' and '.join(missing)}: convert it again with tools/convert_sae.py."
        )
    layer, location = sae.info["sae_layer"], sae.info["location"]
    teacher = load_teacher(model, layer, location, student.device)
    problems = []
    if sae.width != teacher.width:
        problems.append(f"--sae {file} reads width {sae.width}, but --teacher {model} has width {teacher.width}.")
    if sae.num_latents != student.model.config.num_concepts:
        problems.append(
            f"--sae {file} has {sae.num_latents} latents, but {student.path} predicts "
            f"{student.model.config.num_concepts} concepts: it was trained on another."
        )
    if sae.info.get("teacher_sha256", teacher.sha256) != teacher.sha256:
        problems.append(f"--sae {file} was trained on another teacher than --teacher {model}.")
    if student.tokenizer.vocab_size > teacher.vocab_size:
        problems.append(
            f"--teacher {model} has {teacher.vocab_size} tokens, but {student.path} reads "
            f"{student.tokenizer.vocab_size}."
        )
    theirs = teacher_tokenizer(model)
    for what, sha256 in (
        (f"--teacher {model}", theirs.sha256 if theirs else None),
        (f"--sae {file}", sae.info.get("tokenizer_sha256")),
    ):
        if sha256 not in (None, student.tokenizer.sha256):
            problems.append(f"{what} has another tokenizer than {student.path}: both must read the same tokens.")
    if problems:
        raise UserError(*problems)
    return Guide(ConceptLabeler(teacher, sae, _settings(student, teacher.context, sae, layer, location)), model, file)


def _settings(student: Student, teacher_context: int, sae: SAE, layer: int, location: Location) -> LabelSettings:
    return LabelSettings(
        num_labels=min(METHOD.num_labels, sae.form.k or METHOD.num_labels),
        source=METHOD.label_source,
        sign=METHOD.label_sign,
        mask_unlabelled=True,
        masked_token=None,
        piece=min(student.context, teacher_context),
        seed=None,
        sae_layer=layer,
        location=location,
    )
