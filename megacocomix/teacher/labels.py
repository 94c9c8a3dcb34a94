"""Concept labels of token windows, from the live teacher: int64 [B, T, K_attr], MASKED at positions without labels."""

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from megacocomix.config.method import LabelSign, LabelSource
from megacocomix.config.schema import Config, Location, SAEPrecision
from megacocomix.data.tokenizer import load_tokenizer, tokenizer_mismatches
from megacocomix.errors import UserError
from megacocomix.model.flops import attention_flops
from megacocomix.model.losses import MASKED
from megacocomix.sae.file import load_sae
from megacocomix.sae.model import SAE
from megacocomix.teacher.attribution import score, select_labels
from megacocomix.teacher.load import load_teacher, teacher_tokenizer
from megacocomix.teacher.model import Teacher

# Tokens of one forward pass of the teacher: enough to keep a device busy, and few enough to keep the graph above the
# hook point small.
FORWARD_TOKENS = {"cpu": 512, "cuda": 4096}

Result = TypeVar("Result")
Passes = Generator[None, None, Result]
"""Work that can be done a forward pass of the teacher at a time: a generator that yields after each, and returns the
result."""


@dataclass(frozen=True)
class LabelSettings:
    """Everything that determines a window's labels, except data, teacher and autoencoder."""

    num_labels: int
    source: LabelSource
    sign: LabelSign
    mask_unlabelled: bool
    masked_token: int | None
    """Positions with this token are not labelled: the end of text, or None."""
    chunk: int
    """Tokens that are labelled together: the window, or the teacher's context if that is shorter."""
    seed: int | None
    """Seed of random labels."""
    sae_layer: int
    location: Location
    """The hook point, because the autoencoder's file may not record it."""
    sae_precision: SAEPrecision = "fp32"
    """In which the device multiplies by the encoder."""


class ConceptLabeler:
    """Labels token windows with the concepts of a teacher's autoencoder."""

    def __init__(self, teacher: Teacher, sae: SAE, settings: LabelSettings):
        self.teacher, self.sae, self.settings = teacher, sae.requires_grad_(False), settings
        sae.tf32 = settings.sae_precision == "tf32"

    def __call__(self, tokens_BT: Tensor) -> Tensor:
        """int64 [B, T] → int64 [B, T, K_attr] on the same device. A window's labels do not depend on the others."""
        return at_once(self.passes(tokens_BT))

    def passes(self, tokens_BT: Tensor) -> Passes[Tensor]:
        """The same, a forward pass at a time."""
        labels_BTk = yield from passes_in_chunks(tokens_BT, self.settings.chunk, self._label)
        if self.settings.masked_token is not None:
            labels_BTk[tokens_BT == self.settings.masked_token] = MASKED
        return labels_BTk

    def flops_per_token(self) -> float:
        """FLOPs of labelling a token, counted as in model/flops.py.

        Attribution takes a forward pass, and a backward pass above the hook point for activations only, which costs a
        linear layer once more and attention twice. The other sources take the forward pass below the hook point. All
        take the encoding, and attribution also K scores."""
        teacher, sae = self.teacher, self.sae
        linear, attention = 2 * teacher.num_block_weights, attention_flops(teacher.width, self.settings.chunk)
        encoding = 2 * sae.width * sae.num_latents
        if self.settings.source != "attribution":
            return (teacher.layer + 1) * (linear + attention) + encoding
        above = teacher.num_blocks - teacher.layer - 1
        head = 2 * teacher.width * teacher.vocab_size
        forward = teacher.num_blocks * (linear + attention) + head
        backward = above * (linear + 2 * attention) + head
        return forward + backward + encoding + 2 * sae.width * (sae.form.k or 0)

    def _label(self, tokens_GT: Tensor) -> Tensor:
        settings = self.settings
        scores = score(self.teacher, self.sae, tokens_GT, settings.source, settings.seed or 0)
        return select_labels(scores, settings.num_labels, settings.mask_unlabelled, settings.sign)


def at_once(passes: Passes[Result]) -> Result:
    """The result of all passes."""
    while True:
        try:
            next(passes)
        except StopIteration as end:
            return end.value


def in_chunks(tokens_BT: Tensor, chunk: int, read: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply `read`, [G, T or less] → [G, T or less, …], to each `chunk` tokens of the windows separately, a few windows
    at a time. Returns [B, T, …]."""
    return at_once(passes_in_chunks(tokens_BT, chunk, read))


def passes_in_chunks(tokens_BT: Tensor, chunk: int, read: Callable[[Tensor], Tensor]) -> Passes[Tensor]:
    """`in_chunks`, one call of `read` at a time."""
    chunks = []
    for chunk_BT in tokens_BT.split(chunk, dim=1):
        chunks.append((yield from _in_groups(chunk_BT, read)))
    return chunks[0] if len(chunks) == 1 else torch.cat(chunks, dim=1)


def _in_groups(tokens_BT: Tensor, read: Callable[[Tensor], Tensor]) -> Passes[Tensor]:
    group = max(1, FORWARD_TOKENS[tokens_BT.device.type] // tokens_BT.shape[1])
    found = []
    for rows_GT in tokens_BT.split(group):
        # Always the same number of windows: libraries choose kernels by shape, and another kernel rounds differently,
        # which can swap two concepts with almost equal scores.
        full_GT = torch.cat([rows_GT, rows_GT[:1].expand(group - len(rows_GT), -1)])
        found.append(read(full_GT)[: len(rows_GT)])
        yield
    return torch.cat(found)


def teacher_dtype(config: Config, device: torch.device) -> torch.dtype:
    """The dtype in which the teacher computes on this device."""
    precision = config.teacher.precision or ("bf16" if torch.device(device).type == "cuda" else "fp32")
    return torch.bfloat16 if precision == "bf16" else torch.float32


def open_teacher(config: Config, device: torch.device) -> Teacher:
    """The teacher of a config. Raises one UserError with every mismatch of teacher and student."""
    options, method = config.teacher, config.method
    # If only the teacher's outputs are read, the hook point does not matter.
    layer, location = options.sae_layer, options.location
    if not (method.learns_concepts or method.learns_hidden):
        layer, location = 0, "resid_post_mlp"
    teacher = load_teacher(options.model, layer, location, device, teacher_dtype(config, device))
    problems = [*_teacher_mismatches(config, teacher), *_tokenizer_problems(config)]
    if problems:
        raise UserError(*problems)
    return teacher


def open_labeler(config: Config, device: torch.device, eot_id: int) -> ConceptLabeler:
    """Teacher and autoencoder of a config. Raises one UserError with every mismatch of the two, the tokenizer and the
    student."""
    options = config.teacher
    teacher = load_teacher(options.model, options.sae_layer, options.location, device, teacher_dtype(config, device))
    sae = load_sae(options.sae, device)
    problems = [
        *_precision_problems(options.sae_precision, torch.device(device)),
        *_sae_mismatches(config, teacher, sae),
        *_teacher_mismatches(config, teacher),
        *_tokenizer_problems(config, sae),
    ]
    if problems:
        raise UserError(*problems)
    settings = label_settings(config, teacher.context, eot_id, encoder_precision(config, device))
    return ConceptLabeler(teacher, sae, settings)


def encoder_precision(config: Config, device: torch.device) -> SAEPrecision:
    """The precision in which this device multiplies by the encoder."""
    return config.teacher.sae_precision if torch.device(device).type == "cuda" else "fp32"


def label_settings(config: Config, teacher_context: int, eot_id: int, sae_precision: SAEPrecision) -> LabelSettings:
    """The label settings of a config."""
    method = config.method
    return LabelSettings(
        num_labels=method.num_labels,
        source=method.label_source,
        sign=method.label_sign,
        mask_unlabelled=method.mask_unlabelled,
        masked_token=None if method.label_end_of_text else eot_id,
        chunk=min(config.model.context, teacher_context),
        seed=config.training.seed if method.label_source == "random" else None,
        sae_layer=config.teacher.sae_layer,
        location=config.teacher.location,
        sae_precision=sae_precision,
    )


def _precision_problems(precision: SAEPrecision, device: torch.device):
    if precision == "tf32" and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        yield (
            f"teacher.sae_precision is tf32, which {torch.cuda.get_device_name(device)} does not have. Nearest valid: "
            "fp32."
        )


def _sae_mismatches(config: Config, teacher: Teacher, sae: SAE):
    method, options = config.method, config.teacher
    path = options.sae
    if sae.width != teacher.width:
        yield f"teacher.sae {path} reads width {sae.width}, but the teacher {options.model} has width {teacher.width}."
    if sae.num_latents != method.num_concepts:
        yield (
            f"method.num_concepts is {method.num_concepts}, but teacher.sae {path} has {sae.num_latents} latents, so "
            f"labels run up to {sae.num_latents - 1}. Nearest valid: {sae.num_latents}."
        )
    if sae.form.k is not None and method.num_labels > sae.form.k:
        yield (
            f"method.num_labels is {method.num_labels}, but teacher.sae keeps {sae.form.k} latents a position. "
            f"Nearest valid: {sae.form.k}."
        )
    here = {"sae_layer": options.sae_layer, "location": options.location, "teacher_sha256": teacher.sha256}
    for key, value in here.items():
        if sae.info.get(key, value) != value:
            yield f"teacher.sae {path} was trained for {key} {sae.info[key]}, but this run has {value}."


def _teacher_mismatches(config: Config, teacher: Teacher):
    model, method = config.model, config.method
    yield from context_mismatches(config, teacher.context)
    if model.vocab_size < teacher.vocab_size:
        yield (
            f"model.vocab_size is {model.vocab_size}, but the teacher has {teacher.vocab_size} tokens. "
            f"Nearest valid: {teacher.vocab_size}."
        )
    if method.learns_hidden and method.target_size != teacher.width:
        yield (
            f"method.target_size is {method.target_size}, but the teacher {config.teacher.model} has width "
            f"{teacher.width}. Nearest valid: {teacher.width}."
        )


def context_mismatches(config: Config, teacher_context: int) -> Iterator[str]:
    """Yields an error line if windows are longer than the teacher's context and teacher.windowed is off."""
    if config.model.context > teacher_context and not config.teacher.windowed:
        yield (
            f"model.context is {config.model.context}, but the teacher reads {teacher_context} tokens. Nearest valid: "
            f"{teacher_context}, or teacher.windowed=true to label each {teacher_context} tokens separately."
        )


def _tokenizer_problems(config: Config, sae: SAE | None = None):
    """With another tokenizer, the student's token ids mean other tokens to the teacher."""
    try:
        student = load_tokenizer(config.data.tokenizer)
    except UserError:
        return  # reported when the data is opened
    theirs = teacher_tokenizer(config.teacher.model)
    holders = [(f"teacher.model {config.teacher.model}", theirs)]
    if sae:
        holders.append((f"teacher.sae {config.teacher.sae}", sae.info.get("tokenizer_sha256")))
    yield from tokenizer_mismatches((f"data.tokenizer {config.data.tokenizer}", student), *holders)
