"""Where a run's labels come from: the label cache where it holds a window, else the live teacher."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megacocomix.config import Config
from megacocomix.data.tokens import TokenDataset
from megacocomix.errors import UserError
from megacocomix.files import file_sha256
from megacocomix.hub import local_folder
from megacocomix.model.load import weights_sha256
from megacocomix.teacher.label_cache import CacheManifest, LabelCache, default_shard_windows
from megacocomix.teacher.labels import ConceptLabeler, context_misfits, label_settings, open_labeler


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
    if problems := list(context_misfits(config, there.teacher_context)):
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
    if problems := list(cache.manifest.misfits(cache.folder, wanted)):
        raise UserError(*problems)
