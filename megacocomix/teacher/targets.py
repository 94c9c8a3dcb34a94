"""Teacher targets: labels, hidden states, and the outputs that the teacher's head reads. They are tensors that travel
with the batch. The teacher is never a part of the student's module tree.

N windows of T tokens; M of the tokens get a concept vector (model/concept.py); E width of the teacher.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from megacocomix.checkpoint.open import architecture_sha256, weights_sha256
from megacocomix.config.method import MethodConfig
from megacocomix.config.schema import Config
from megacocomix.data.tokens import TokenDataset
from megacocomix.errors import UserError
from megacocomix.files import file_sha256
from megacocomix.hub import local_folder
from megacocomix.model.concept import standardize
from megacocomix.model.flops import attention_flops
from megacocomix.model.heads import FrozenHead
from megacocomix.teacher.label_cache import CacheManifest, LabelCache, default_shard_windows
from megacocomix.teacher.labels import (
    ConceptLabeler,
    Passes,
    at_once,
    context_mismatches,
    encoder_precision,
    label_settings,
    open_labeler,
    open_teacher,
    passes_in_chunks,
)
from megacocomix.teacher.model import Teacher


@dataclass(frozen=True)
class ConceptLabels:
    """Labels of training windows, from a cache, a labeler, or both. Without a labeler the cache is complete."""

    labeler: ConceptLabeler | None
    cache: LabelCache | None
    teacher_sha256: str
    sae_sha256: str
    live_flops: float
    """FLOPs of labelling a token live, even if a cache makes that unnecessary."""

    @property
    def live_share(self) -> float:
        """Share of the windows that the live teacher labels."""
        return 1 - self.cache.num_held / self.cache.manifest.num_windows if self.cache else 1.0

    def __call__(self, windows: Sequence[int], tokens_NT: Tensor) -> Tensor:
        """Labels of these windows of the data, int64 [N, T, K_attr], on the device of their tokens, int64 [N, T]."""
        return at_once(self.passes(windows, tokens_NT))

    def passes(self, windows: Sequence[int], tokens_NT: Tensor) -> Passes[Tensor]:
        """The same, a forward pass of the teacher at a time."""
        if not self.cache:
            return (yield from self.labeler.passes(tokens_NT))
        found = [self.cache.read(window) for window in windows]
        missing = [row for row, labels in enumerate(found) if labels is None]
        if missing:
            labels_NTk = yield from self.labeler.passes(tokens_NT[missing])
            for row, labels_Tk in zip(missing, labels_NTk.cpu(), strict=True):
                found[row] = labels_Tk
        return torch.stack([torch.as_tensor(labels) for labels in found]).to(tokens_NT.device)


def open_labels(config: Config, device: torch.device, eot_id: int, train: TokenDataset) -> ConceptLabels:
    """The labels that a config asks for. Raises UserError for a teacher or an autoencoder that does not match, and for
    a cache of other inputs; each error line names one mismatch."""
    cache = None if config.teacher.labels == "live" else LabelCache(config.teacher.labels)
    if cache is None or not cache.is_complete:
        labeler = open_labeler(config, device, eot_id)
        if cache:
            _check(cache, wanted_cache(config, labeler, train))
        return ConceptLabels(labeler, cache, labeler.teacher.sha256, labeler.sae.sha256, labeler.flops_per_token())
    # A complete cache: teacher and autoencoder are not loaded, only their hashes are compared.
    found = cache.manifest
    # Labels that this device would make are right too, even if the config asks for what only a GPU has.
    precision = config.teacher.sae_precision
    if found.settings["sae_precision"] == encoder_precision(config, device):
        precision = encoder_precision(config, device)
    wanted = replace(
        found,
        data=train.shards.fingerprint,
        former_data=train.shards.former_fingerprint,
        teacher=weights_sha256(local_folder(config.teacher.model)),
        teacher_config=architecture_sha256(local_folder(config.teacher.model)),
        sae=file_sha256(config.teacher.sae),
        settings=asdict(label_settings(config, found.teacher_context, eot_id, precision)),
        context=train.context,
        num_windows=train.num_windows,
        num_concepts=config.method.num_concepts,
    )
    _check(cache, wanted)
    if problems := list(context_mismatches(config, found.teacher_context)):
        raise UserError(*problems)
    return ConceptLabels(None, cache, wanted.teacher, wanted.sae, found.flops_per_token)


def wanted_cache(config: Config, labeler: ConceptLabeler, train: TokenDataset) -> CacheManifest:
    """The manifest of a cache of all training windows of a run, made by its labeler."""
    return CacheManifest(
        data=train.shards.fingerprint,
        former_data=train.shards.former_fingerprint,
        teacher=labeler.teacher.sha256,
        teacher_config=architecture_sha256(local_folder(config.teacher.model)),
        sae=labeler.sae.sha256,
        settings=asdict(labeler.settings),
        context=train.context,
        num_windows=train.num_windows,
        shard_windows=default_shard_windows(train.num_windows, train.context),
        num_concepts=config.method.num_concepts,
        precision="bf16" if labeler.teacher.dtype == torch.bfloat16 else "fp32",
        teacher_context=labeler.teacher.context,
        flops_per_token=labeler.flops_per_token(),
    )


def describe_labels(config: Config, labels: ConceptLabels, student_flops: float, num_windows: int) -> str:
    """One line: whether labels are live or cached, and what each costs."""
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


def _check(cache: LabelCache, wanted: CacheManifest) -> None:
    if problems := list(cache.manifest.mismatches(cache.folder, wanted)):
        raise UserError(*problems)


class TeacherTargets(NamedTuple):
    """Teacher targets of some windows; None for those that the method does not use."""

    labels_NMk: Tensor | None = None
    """Concept labels, int64."""
    hidden_NME: Tensor | None = None
    """The hidden state at sae_layer, fp32. It has mean 0 and standard deviation 1, so that no position outweighs others
    by its norm."""
    outputs_NTE: Tensor | None = None
    """The hidden state that the teacher's head reads, in the teacher's dtype."""


@dataclass(frozen=True)
class TargetSource:
    """Makes a config's teacher targets. At least one of labels and teacher is given."""

    method: MethodConfig
    context: int
    labels: ConceptLabels | None
    teacher: Teacher | None
    """For hidden states and outputs."""
    teacher_config: str
    """Hash of the settings of the teacher's architecture."""

    def __call__(self, windows: Sequence[int], tokens_NT: Tensor) -> TeacherTargets:
        """The targets of these windows of the data, whose tokens are int64 [N, T], on their device."""
        return at_once(self.passes(windows, tokens_NT))

    def passes(self, windows: Sequence[int], tokens_NT: Tensor) -> Passes[TeacherTargets]:
        """The same, a forward pass of the teacher at a time."""
        every = self._every
        labels = hidden = outputs = None
        if self.labels:
            labels = (yield from self.labels.passes(windows, tokens_NT))[:, every - 1 :: every]
        if self.method.learns_hidden:
            read = lambda tokens_GT: standardize(self.teacher.hidden(tokens_GT))[0]
            hidden = (yield from passes_in_chunks(tokens_NT, self._chunk, read))[:, every - 1 :: every]
        if self.method.distills:
            outputs = yield from passes_in_chunks(tokens_NT, self._chunk, self.teacher.outputs)
        return TeacherTargets(labels, hidden, outputs)

    def zeros(self, tokens_NT: Tensor) -> TeacherTargets:
        """Targets of the same shapes, all zero."""
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
        """Size of the teacher's vocabulary; None if only cached labels are read."""
        teacher = self.teacher or (self.labels.labeler and self.labels.labeler.teacher)
        return teacher.vocab_size if teacher else None

    @property
    def head(self) -> FrozenHead | None:
        """The teacher's head; None if the student does not learn the teacher's distribution."""
        return self.teacher.head if self.method.distills else None

    @property
    def flops(self) -> float:
        """FLOPs of the live teacher for a token, averaged over the windows; counted as in model/flops.py."""
        labelling = self.labels.live_flops * self.labels.live_share if self.labels else 0.0
        return labelling + self.reading_flops

    @property
    def reading_flops(self) -> float:
        """The part of `flops` for hidden states and distributions. The head runs in the forward and in the backward
        pass of the divergence."""
        total = 0.0
        if self.teacher:
            block = 2 * self.teacher.num_block_weights + attention_flops(self.teacher.width, self._chunk)
            total += (self.teacher.layer + 1) * block * self.method.learns_hidden
            head = 2 * 2 * self.teacher.width * self.teacher.vocab_size
            total += (self.teacher.num_blocks * block + head) * self.method.distills
        return total

    def identity(self) -> dict[str, str]:
        """Hashes of teacher and autoencoder."""
        found = {"teacher.model": self.labels.teacher_sha256 if self.labels else self.teacher.sha256}
        found["teacher.model's config"] = self.teacher_config
        return found | ({"teacher.sae": self.labels.sae_sha256} if self.labels else {})

    @property
    def _every(self) -> int:
        return self.method.interleave_every

    @property
    def _chunk(self) -> int:
        return min(self.context, self.teacher.context)


def open_targets(config: Config, device: torch.device, eot_id: int, train: TokenDataset) -> TargetSource | None:
    """The teacher targets of a config; None if the method has no teacher. Raises UserError."""
    method = config.method
    if not method.has_teacher:
        return None
    labels = open_labels(config, device, eot_id, train) if method.learns_concepts else None
    teacher = None
    if method.learns_hidden or method.distills:
        # The labeler has a teacher already.
        labeler = labels.labeler if labels else None
        teacher = labeler.teacher if labeler else open_teacher(config, device)
    architecture = architecture_sha256(local_folder(config.teacher.model))
    return TargetSource(method, config.model.context, labels, teacher, architecture)


def describe_targets(config: Config, source: TargetSource, student_flops: float, num_windows: int) -> str:
    """A line for labels, and a line for the other targets: their kind and cost."""
    lines = []
    if source.labels:
        lines.append(describe_labels(config, source.labels, student_flops, num_windows))
    if source.teacher:
        kinds = ["its hidden state"] * source.method.learns_hidden + ["its distribution"] * source.method.distills
        flops = source.reading_flops
        lines.append(
            f"teacher: {' and '.join(kinds)} live, {flops / 1e6:.1f} MFLOP a token, {flops / student_flops:.0%} of the "
            "student's step"
        )
    return "\n".join(lines)
