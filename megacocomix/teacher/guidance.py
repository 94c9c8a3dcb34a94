"""Everything a student learns from its teacher, as data that travels with the batch: labels, hidden states, and what
the teacher's head reads. The teacher itself is never a part of the student's module tree.

N windows of T tokens; M of them get a vector (model/concept.py); E width of the teacher.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from megacocomix.config import Config
from megacocomix.data.tokens import TokenDataset
from megacocomix.method import MethodConfig
from megacocomix.model.concept import standardize
from megacocomix.model.distillation import FrozenHead
from megacocomix.model.flops import attention_flops
from megacocomix.teacher.cut import Teacher
from megacocomix.teacher.labels import in_pieces, open_teacher
from megacocomix.teacher.sources import ConceptLabels, describe_labels, open_labels


class Signals(NamedTuple):
    """What the teacher says of some windows; None where the method does not ask."""

    labels_NMk: Tensor | None = None
    """int64: concept labels."""
    hidden_NME: Tensor | None = None
    """fp32: the hidden state at sae_layer with mean 0 and standard deviation 1, so that no position outweighs others by
    its length."""
    outputs_NTE: Tensor | None = None
    """In the teacher's dtype: what its head reads."""


@dataclass(frozen=True)
class Guidance:
    """A config's teacher. At least one of labels and teacher is there."""

    method: MethodConfig
    context: int
    labels: ConceptLabels | None
    teacher: Teacher | None
    """For hidden states and outputs."""

    def __call__(self, windows: Sequence[int], tokens_NT: Tensor) -> Signals:
        """The signals of these windows of the data, whose tokens are int64 [N, T], on their device."""
        every = self._every
        labels = self.labels(windows, tokens_NT)[:, every - 1 :: every] if self.labels else None
        hidden = outputs = None
        if self.method.learns_hidden:
            read = lambda tokens_GT: standardize(self.teacher.hidden(tokens_GT))[0]
            hidden = in_pieces(tokens_NT, self._piece, read)[:, every - 1 :: every]
        if self.method.distills:
            outputs = in_pieces(tokens_NT, self._piece, self.teacher.outputs)
        return Signals(labels, hidden, outputs)

    def zeros(self, tokens_NT: Tensor) -> Signals:
        """Signals of this shape, all zero."""
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
        return Signals(labels, hidden, outputs)

    @property
    def vocab_size(self) -> int | None:
        """Words of the teacher; None where only cached labels are read."""
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
            block = 2 * self.teacher.num_block_weights + attention_flops(self.teacher.width, self._piece)
            total += (self.teacher.layer + 1) * block * self.method.learns_hidden
            head = 2 * 2 * self.teacher.width * self.teacher.vocab_size
            total += (self.teacher.num_blocks * block + head) * self.method.distills
        return total

    def identity(self) -> dict[str, str]:
        """Hashes of what the signals come from."""
        if not self.labels:
            return {"teacher.model": self.teacher.sha256}
        return {"teacher.model": self.labels.teacher_sha256, "teacher.sae": self.labels.sae_sha256}

    @property
    def _every(self) -> int:
        return self.method.interleave_every

    @property
    def _piece(self) -> int:
        return min(self.context, self.teacher.context)


def open_guidance(config: Config, device: torch.device, eot_id: int, train: TokenDataset) -> Guidance | None:
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
    return Guidance(method, config.model.context, labels, teacher)


def describe_guidance(config: Config, guidance: Guidance, student_flops: float, num_windows: int) -> str:
    """What is learned from the teacher and what that costs, a line each."""
    lines = []
    if guidance.labels:
        lines.append(describe_labels(config, guidance.labels, student_flops, num_windows))
    if guidance.teacher:
        what = ["its hidden state"] * guidance.method.learns_hidden + ["its distribution"] * guidance.method.distills
        flops = guidance.reading_flops
        lines.append(
            f"teacher: {' and '.join(what)} live, {flops / 1e6:.1f} MFLOP a token, {flops / student_flops:.0%} of the "
            "student's step"
        )
    return "\n".join(lines)
