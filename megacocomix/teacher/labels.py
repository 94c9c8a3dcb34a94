"""Concept labels of a batch, from the live teacher. Labels are data: int64 [B, T, K_attr], or MASKED where there is no
signal."""

import torch
from torch import Tensor

from megacocomix.config import Config, ModelConfig
from megacocomix.errors import UserError
from megacocomix.teacher.attribution import attribute, select_labels
from megacocomix.teacher.gpt2 import Teacher, load_teacher
from megacocomix.teacher.sae import TopKSAE


class ConceptLabeler:
    """Labels token windows with the concepts that a teacher's autoencoder marks as most influential."""

    def __init__(self, teacher: Teacher, sae: TopKSAE, num_labels: int, mask_unlabelled: bool):
        self.teacher, self.sae = teacher, sae.requires_grad_(False)
        self.num_labels, self.mask_unlabelled = num_labels, mask_unlabelled

    def __call__(self, tokens_BT: Tensor) -> Tensor:
        """int64 [B, T] → int64 [B, T, K_attr]."""
        return select_labels(attribute(self.teacher, self.sae, tokens_BT), self.num_labels, self.mask_unlabelled)

    def teacher_shape(self) -> ModelConfig:
        """The teacher's sizes, for counting its cost."""
        teacher = self.teacher
        return ModelConfig(
            num_layers=len(teacher.blocks),
            hidden_size=teacher.width,
            num_heads=teacher.width // teacher.blocks[0].attention.head_size,
            context=teacher.context,
            vocab_size=teacher.vocab_size,
            dropout=0.0,
        )


def open_labeler(config: Config, device: torch.device) -> ConceptLabeler:
    """Teacher and autoencoder of a config. Raises one UserError with everything in which the two, or the student, do
    not fit."""
    options = config.teacher
    teacher = load_teacher(options.model, options.sae_layer, options.location, device)
    sae = TopKSAE.load(options.sae, device)
    problems = list(_misfits(config, teacher, sae))
    if problems:
        raise UserError(*problems)
    return ConceptLabeler(teacher, sae, config.method.num_labels, config.method.mask_unlabelled)


def _misfits(config: Config, teacher: Teacher, sae: TopKSAE):
    model, method, options = config.model, config.method, config.teacher
    latents, width = sae.encoder.shape
    path = options.sae
    if width != teacher.width:
        yield f"teacher.sae {path} reads width {width}, but the teacher {options.model} has width {teacher.width}."
    if latents != method.num_concepts:
        yield (
            f"method.num_concepts is {method.num_concepts}, but teacher.sae {path} has {latents} latents, so labels "
            f"run up to {latents - 1}. Nearest valid: {latents}."
        )
    limits = (
        ("method.num_labels", method.num_labels <= sae.k, method.num_labels, "teacher.sae keeps latents", sae.k),
        ("model.context", model.context <= teacher.context, model.context, "the teacher reads tokens", teacher.context),
        (
            "model.vocab_size",
            model.vocab_size >= teacher.vocab_size,
            model.vocab_size,
            "the teacher has tokens",
            teacher.vocab_size,
        ),
    )
    for option, fits, value, what, limit in limits:
        if not fits:
            yield f"{option} is {value}, but {what}: {limit}. Nearest valid: {limit}."
    here = {"sae_layer": options.sae_layer, "location": options.location, "teacher_sha256": teacher.sha256}
    for key, value in here.items():
        if sae.info.get(key, value) != value:
            yield f"teacher.sae {path} was trained for {key} {sae.info[key]}, but this run has {value}."
