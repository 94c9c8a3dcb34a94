"""The teacher whose labels a student is compared with: the one it was trained with, or one that the user names."""

from dataclasses import dataclass

from megacocomix.config.method import MethodConfig
from megacocomix.data.tokenizer import tokenizer_mismatches
from megacocomix.errors import UserError
from megacocomix.hf.open import OpenModel
from megacocomix.sae.file import load_sae
from megacocomix.teacher.labels import ConceptLabeler, LabelSettings, open_labeler
from megacocomix.teacher.load import load_teacher, teacher_tokenizer

METHOD = MethodConfig(name="cocomix").resolved()
"""How labels are chosen for a folder that does not record how it was trained."""


@dataclass(frozen=True)
class TeacherLabels:
    """A labeler, and the teacher and the autoencoder it was opened from."""

    labeler: ConceptLabeler
    model: str
    sae: str

    def as_dict(self) -> dict:
        """Its entry in an inspection record."""
        settings = self.labeler.settings
        chosen = {"label_source": settings.source, "label_sign": settings.sign}
        return {"model": self.model, "sae": self.sae, "num_labels": settings.num_labels, **chosen}


ALONE = "Or read the text without the teacher: --no-teacher."


def open_teacher_labels(
    student: OpenModel, teacher: str | None = None, sae: str | None = None, remedy: str | None = None
) -> TeacherLabels | None:
    """Open `teacher` with the autoencoder `sae`, or by default the student's own. Returns None if it has none.

    The labels of a run are chosen as in its config. Raises one UserError with everything that is missing or does not
    match. `remedy` is a last line for that error: what else the user can do.
    """
    if (teacher is None) != (sae is None):
        raise UserError("--teacher DIR and --sae FILE go together: labels need a teacher and its autoencoder.")
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
    return TeacherLabels(labeler, config.teacher.model, config.teacher.sae)


def teacher_labels_notes(student: OpenModel, source: TeacherLabels | None) -> list[str]:
    """Notes on the labels for the user; without a teacher, why there is none."""
    if source is None and student.config is None:
        return [f"{student.path} does not record its teacher: --teacher DIR --sae FILE compares with its labels"]
    if source is None:
        return [f"{student.path} was trained without concept labels: it is read without a teacher"]
    if (chunk := source.labeler.settings.chunk) < student.context:
        return [f"{source.model} reads {chunk} tokens: longer windows are labelled in chunks of {chunk}"]
    return []


def _open_files(student: OpenModel, model: str, file: str) -> TeacherLabels:
    sae = load_sae(file, student.device)
    if missing := [key for key in ("sae_layer", "location") if key not in sae.info]:
        raise UserError(
            f"--sae {file} does not record its {' and '.join(missing)}: convert it again with tools/convert_sae.py."
        )
    layer, location = sae.info["sae_layer"], sae.info["location"]
    teacher = load_teacher(model, layer, location, student.device)
    problems = []
    if sae.width != teacher.width:
        problems.append(f"--sae {file} reads width {sae.width}, but --teacher {model} has width {teacher.width}.")
    if sae.num_latents != student.model.config.num_concepts:
        problems.append(
            f"--sae {file} has {sae.num_latents} latents, but {student.path} predicts "
            f"{student.model.config.num_concepts} concepts: it was trained with another autoencoder."
        )
    if sae.info.get("teacher_sha256", teacher.sha256) != teacher.sha256:
        problems.append(f"--sae {file} was trained on another teacher than --teacher {model}.")
    if student.tokenizer.vocab_size > teacher.vocab_size:
        problems.append(
            f"--teacher {model} has {teacher.vocab_size} tokens, but {student.path} reads "
            f"{student.tokenizer.vocab_size}."
        )
    theirs = teacher_tokenizer(model)
    problems += tokenizer_mismatches(
        (str(student.path), student.tokenizer),
        (f"--teacher {model}", theirs),
        (f"--sae {file}", sae.info.get("tokenizer_sha256")),
    )
    if problems:
        raise UserError(*problems)
    settings = LabelSettings(
        num_labels=min(METHOD.num_labels, sae.form.k or METHOD.num_labels),
        source=METHOD.label_source,
        sign=METHOD.label_sign,
        mask_unlabelled=True,
        masked_token=None,
        chunk=min(student.context, teacher.context),
        seed=None,
        sae_layer=layer,
        location=location,
    )
    return TeacherLabels(ConceptLabeler(teacher, sae, settings), model, file)
