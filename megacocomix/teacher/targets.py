"""Everything a student learns from its teacher, as data that travels with the batch: labels, hidden states, and what
the teacher's head reads. The teacher itself is never a part of the student's module tree.

N windows of T tokens; M of them get a vector (model/concept.py); E width of the teacher.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from megacocomix.checkpoint.open import weights_sha256
from megacocomix.config.method import MethodConfig
from megacocomix.config.schema import Config
from megacocomix.data.tokens import TokenDataset
from megacocomix.errors import UserError
from megacocomix.files import file_sha256
from megacocomix.hub import local_folder
from megacocomix.model.concept import standardize
from megacocomix.model.distillation import FrozenHead
from megacocomix.model.flops import attention_flops
from megacocomix.teacher.label_cache import CacheManifest, LabelCache, default_shard_windows
from megacocomix.teacher.labels import (
    ConceptLabeler,
    context_mismatches,
    in_chunks,
    label_settings,
    open_labeler,
    open_teacher,
)
from megacocomix.teacher.model import Teacher


@dataclass(frozen=True)
class ConceptLabels:
    """Labels of training windows. At least one of the two is there; without a labeler the cache is complete."""

    labeler: ConceptLabeler | None
    cache: LabelCache | None
    teacher_sha256: str
    sae_sha256: str
    live_flops: float
    """FLOPs a token of labelling live, also where the cache makes it unnecessary."""

    @property
    def live_share(self) -> float:
        """Share of the windows that the live teacher labels."""
        return 1 - self.cache.num_held / self.cache.manifest.num_windows if self.cache else 1.0

    def __call__(self, windows: Sequence[int], tokens_NT: Tensor) -> Tensor:
        """Labels of these windows of the data, whose tokens are int64 [N, T]: int64 [N, T, K_attr] on their device."""
        if not self.cache:
            return self.labeler(tokens_NT)
        found = [self.cache.read(window) for window in windows]
        missing = [row for row, labels in enumerate(found) if labels is None]
        if missing:
            for row, labels_Tk in zip(missing, self.labeler(tokens_NT[missing]).cpu(), strict=True):
                found[row] = labels_Tk
        return torch.stack([torch.as_tensor(labels) for labels in found]).to(tokens_NT.device)


def open_labels(config: Config, device: torch.device, eot_id: int, train: TokenDataset) -> ConceptLabels:
    """The labels that a config asks for. Raises UserError for a teacher or an autoencoder that does not fit, and for a
    cache that was made of something else; each line says of what."""
    if config.teacher.labels == "live":
        return _live(open_labeler(config, device, eot_id), None)
    cache = LabelCache(config.teacher.labels)
    there = cache.manifest
    if not cache.is_complete:
        labeler = open_labeler(config, device, eot_id)
        _check(cache, wanted_cache(config, labeler, train))
        return _live(labeler, cache)
    # Labels of the same teacher and autoencoder: neither is loaded.
    teacher, sae = weights_sha256(local_folder(config.teacher.model)), file_sha256(config.teacher.sae)
    settings = label_settings(config, there.teacher_context, eot_id).as_dict()
    of_here = {"data": train.shards.fingerprint, "teacher": teacher, "sae": sae, "settings": settings}
    sizes = {"context": train.context, "num_windows": train.num_windows, "num_concepts": config.method.num_concepts}
    _check(cache, CacheManifest(**{**vars(there), **of_here, **sizes}))
    if problems := list(context_mismatches(config, there.teacher_context)):
        raise UserError(*problems)
    return ConceptLabels(None, cache, teacher, sae, there.flops_per_token)


def wanted_cache(config: Config, labeler: ConceptLabeler, train: TokenDataset) -> CacheManifest:
    """The cache of all windows of a run's training data, as its labeler would make it."""
    return CacheManifest(
        data=train.shards.fingerprint,
        teacher=labeler.teacher.sha256,
        sae=labeler.sae.sha256,
        settings=labeler.settings.as_dict(),
        context=train.context,
        num_windows=train.num_windows,
        shard_windows=default_shard_windows(train.num_windows, train.context),
        num_concepts=config.method.num_concepts,
        precision="bf16" if labeler.teacher.dtype == torch.bfloat16 else "fp32",
        teacher_context=labeler.teacher.context,
        flops_per_token=labeler.flops_per_token(),
    )


def describe_labels(config: Config, labels: ConceptLabels, student_flops: float, num_windows: int) -> str:
    """One line: which of live and cached is used, and what each costs."""
    context, per_label = config.model.context, 2 if config.method.num_concepts < 2**16 else 4
    live = f"{labels.live_flops / 1e6:.1f} MFLOP a token, {labels.live_flops / student_flops:.0%} of the student's step"
    size = _size(num_windows * context * config.method.num_labels * per_label)
    if not labels.cache:
        return (
            f"labels: live, {live}; a cache of all {num_windows:,} windows would take {size} (tools/label_concepts.py)"
        )
    held = f"{labels.cache.folder}, labelled in {labels.cache.manifest.precision}"
    if not labels.live_share:
        return f"labels: cached in {held}, {size} read once an epoch; live they would cost {live}"
    return (
        f"labels: {1 - labels.live_share:.1%} of the windows cached in {held}; the others live, {live}. "
        "tools/label_concepts.py completes the cache"
    )


def _size(num_bytes: int) -> str:
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if num_bytes >= unit:
            return f"{num_bytes / unit:.1f} {name}"
    return f"{num_bytes} bytes"


def _live(labeler: ConceptLabeler, cache: LabelCache | None) -> ConceptLabels:
    return ConceptLabels(labeler, cache, labeler.teacher.sha256, labeler.sae.sha256, labeler.flops_per_token())


def _check(cache: LabelCache, wanted: CacheManifest) -> None:
    if problems := list(cache.manifest.mismatches(cache.folder, wanted)):
        raise UserError(*problems)


class TeacherTargets(NamedTuple):
    """What the student learns of some windows from its teacher; None where the method does not ask for it."""

    labels_NMk: Tensor | None = None
    """int64: concept labels."""
    hidden_NME: Tensor | None = None
    """fp32: the hidden state at sae_layer with mean 0 and standard deviation 1, so that no position outweighs others by
    its length."""
    outputs_NTE: Tensor | None = None
    """In the teacher's dtype: what its head reads."""


@dataclass(frozen=True)
class TargetSource:
    """Where a config's teacher targets come from. At least one of labels and teacher is there."""

    method: MethodConfig
    context: int
    labels: ConceptLabels | None
    teacher: Teacher | None
    """For hidden states and outputs."""

    def __call__(self, windows: Sequence[int], tokens_NT: Tensor) -> TeacherTargets:
        """The targets of these windows of the data, whose tokens are int64 [N, T], on their device."""
        every = self._every
        labels = self.labels(windows, tokens_NT)[:, every - 1 :: every] if self.labels else None
        hidden = outputs = None
        if self.method.learns_hidden:
            read = lambda tokens_GT: standardize(self.teacher.hidden(tokens_GT))[0]
            hidden = in_chunks(tokens_NT, self._chunk, read)[:, every - 1 :: every]
        if self.method.distills:
            outputs = in_chunks(tokens_NT, self._chunk, self.teacher.outputs)
        return TeacherTargets(labels, hidden, outputs)

    def zeros(self, tokens_NT: Tensor) -> TeacherTargets:
        """Targets of this shape, all zero."""
        num_windows, num_tokens = tokens_NT.shape
        num_slots, method = num_tokens // self._every, self.method
        labels = hidden = outputs = None
        if self.labels:
            labels = tokens_NT.new_zeros(num_windows, num_slots, method.num_labels)
        if method.learns_hidden:
            hidden = torch.zeros(num_windows, num_slots, self.teacher.width, device=tokens_NT.device)
        if method.distills:
            size, dtype = (num_windows, num_tokens, self.teacher.width), self.teacher.dtype
            outputs = torch.zeros(size, dtype=dtype, device=tokens_NT.device)
        return TeacherTargets(labels, hidden, outputs)

    @property
    def vocab_size(self) -> int | None:
        """Size of the teacher's vocabulary; None where only cached labels are read."""
        teacher = self.teacher or (self.labels.labeler and self.labels.labeler.teacher)
        return teacher.vocab_size if teacher else None

    @property
    def head(self) -> FrozenHead | None:
        """The teacher's head, where the student learns its distribution."""
        if not self.method.distills:
            return None
        head = self.teacher.model.head
        return FrozenHead(head.weight.detach(), None if head.bias is None else head.bias.detach())

    @property
    def flops(self) -> float:
        """FLOPs a token that the teacher costs live, averaged over the windows; counted as in model/flops.py."""
        return self.labelling_flops + self.reading_flops

    @property
    def labelling_flops(self) -> float:
        """Those of the labels."""
        return self.labels.live_flops * self.labels.live_share if self.labels else 0.0

    @property
    def reading_flops(self) -> float:
        """Those of hidden states and distributions. The head is run in the forward and in the backward pass of the
        divergence."""
        total = 0.0
        if self.teacher:
            block = 2 * self.teacher.num_block_weights + attention_flops(self.teacher.width, self._chunk)
            total += (self.teacher.layer + 1) * block * self.method.learns_hidden
            head = 2 * 2 * self.teacher.width * self.teacher.vocab_size
            total += (self.teacher.num_blocks * block + head) * self.method.distills
        return total

    def identity(self) -> dict[str, str]:
        """Hashes of what the targets come from."""
        if not self.labels:
            return {"teacher.model": self.teacher.sha256}
        return {"teacher.model": self.labels.teacher_sha256, "teacher.sae": self.labels.sae_sha256}

    @property
    def _every(self) -> int:
        return self.method.interleave_every

    @property
    def _chunk(self) -> int:
        return min(self.context, self.teacher.context)


def open_targets(config: Config, device: torch.device, eot_id: int, train: TokenDataset) -> TargetSource | None:
    """What a config's student learns from its teacher; None where that is nothing. Raises UserError."""
    method = config.method
    if not method.has_teacher:
        return None
    labels = open_labels(config, device, eot_id, train) if method.learns_concepts else None
    teacher = None
    if method.learns_hidden or method.distills:
        # One that labels live is there already.
        labeler = labels.labeler if labels else None
        teacher = labeler.teacher if labeler else open_teacher(config, device)
    return TargetSource(method, config.model.context, labels, teacher)


def describe_targets(config: Config, source: TargetSource, student_flops: float, num_windows: int) -> str:
    """What is learned from the teacher and what that costs, a line each."""
    lines = []
    if source.labels:
        lines.append(describe_labels(config, source.labels, student_flops, num_windows))
    if source.teacher:
        what = ["its hidden state"] * source.method.learns_hidden + ["its distribution"] * source.method.distills
        flops = source.reading_flops
        lines.append(
            f"teacher: {' and '.join(what)} live, {flops / 1e6:.1f} MFLOP a token, {flops / student_flops:.0%} of the "
            "student's step"
        )
    return "\n".join(lines)
