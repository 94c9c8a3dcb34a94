"""Steering the same concept in the teacher, for comparison (paper §3.2): a latent of the teacher's autoencoder is
edited, and the resulting change of the reconstruction is added to the residual. The reconstruction error is the same
before and after the edit, so it cancels: unedited latents leave the teacher as it was, to the bit.

before: the latent's pre-activation is edited before the largest are kept.
after:  its activation is edited where it was kept.

Shapes: B texts, G of them of one length, N tokens, M of them steered, D width, C latents, K active latents.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from megacocomix.data.tokenizer import Tokenizer
from megacocomix.errors import UserError
from megacocomix.hf.open import OpenModel
from megacocomix.interpret.decode import At, Kept, Sampling, Step, decode, decode_with, kept_rows
from megacocomix.interpret.steering import Edit, Place, Steering
from megacocomix.interpret.teacher_labels import TeacherLabels
from megacocomix.sae.model import SAE
from megacocomix.teacher.model import Teacher

Decode = Callable[..., Iterator[list[Step | None]]]
"""`decode` of one model. Takes prompts, sampling, edits, place, at and seeds."""


def decoders(student: OpenModel, source: TeacherLabels | None) -> dict[str, Decode]:
    """`decode` of the student and, if given, of the teacher."""
    found = {"student": partial(decode, student)}
    if source:
        found["teacher"] = partial(decode_teacher, source.labeler.teacher, source.labeler.sae, student.tokenizer)
    return found


def decode_teacher(
    teacher: Teacher,
    sae: SAE,
    tokenizer: Tokenizer,
    prompts: Sequence[list[int]],
    sampling: Sampling,
    edits: Sequence[Sequence[Edit]] | None = None,
    place: Place = "before",
    at: At = "decoded",
    seeds: Sequence[int] | None = None,
) -> Iterator[list[Step | None]]:
    """`decode` of the teacher. `Step.kept` has its active latents. There is no cache: each step reads all tokens again.
    Raises UserError when prompt and new tokens do not fit its context."""
    longest = max(map(len, prompts)) + sampling.max_new_tokens
    if longest > teacher.context:
        raise UserError(f"prompt and new text have {longest} tokens, but the teacher reads {teacher.context} at most.")
    edits = edits or [[] for _ in prompts]
    steering = Steering(edits, place) if any(edits) else None
    steered = _TeacherReader(teacher, sae, steering, tokenizer.vocab_size)
    plain = _TeacherReader(teacher, sae, None, tokenizer.vocab_size) if steering else None
    return decode_with(steered, plain, tokenizer, prompts, sampling, at, seeds)


class _TeacherReader:
    """A teacher. Teachers have no padding, so texts are read in groups of equal length."""

    def __init__(self, teacher: Teacher, sae: SAE, steering: Steering | None, vocab_size: int):
        self.teacher, self.sae, self.steering, self.vocab_size = teacher, sae, steering, vocab_size
        self.device = sae.decoder.device

    def read(self, tokens_BN, position_BN, where_BN):
        logits_BV = torch.empty(len(tokens_BN), self.vocab_size, device=self.device)
        kept_B: list[list[Kept]] = [[] for _ in tokens_BN]
        num_padding_B = (position_BN < 0).sum(-1)
        for padding in num_padding_B.unique().tolist():
            rows = (num_padding_B == padding).nonzero().flatten().tolist()
            edit = partial(self._edit_hidden, kept_B, rows, where_BN[rows, padding:])
            found_GV = self.teacher.next_logits(tokens_BN[rows, padding:], edit)
            logits_BV[rows] = found_GV[:, : self.vocab_size].float()
        return logits_BV, kept_B

    def _edit_hidden(self, kept_B: list[list[Kept]], rows: list[int], where_GN: Tensor, hidden_GND: Tensor) -> Tensor:
        """h → h with edited latents. Writes the latents that are active at the last token of each row to `kept_B`."""
        normed_GND, _, scale = self.sae.form.normalize(hidden_GND)
        active_G = kept_rows(*self.sae.encode_normalized(normed_GND[:, -1]))
        delta_GND = torch.zeros_like(normed_GND)
        for place, row in enumerate(rows):
            edits = self.steering.rows[row] if self.steering else []
            chosen_M = where_GN[place].nonzero().flatten()
            if not edits or not len(chosen_M):
                continue
            normed_MD = normed_GND[place, chosen_M]
            before = self.sae.encode_normalized(normed_MD)
            after = self._edit_latents(normed_MD, before, edits)
            delta_GND[place, chosen_M] = self.sae.decode(*after) - self.sae.decode(*before)
            if where_GN[place, -1]:
                (active_G[place],) = kept_rows(*(each[-1:] for each in after))
        for row, active in zip(rows, active_G, strict=True):
            kept_B[row] = [(latent, value) for latent, value in active if value > 0]
        return hidden_GND + (delta_GND * scale).to(hidden_GND.dtype)

    def _edit_latents(
        self, normed_MD: Tensor, before: tuple[Tensor, Tensor], edits: Sequence[Edit]
    ) -> tuple[Tensor, Tensor]:
        if self.steering.place == "before":
            return self.sae.encode_normalized(normed_MD, lambda pre_MC: _edit_columns(pre_MC, edits))
        index_MK, value_MK = before
        for edit in edits:
            is_it_MK = (index_MK == edit.concept) & (value_MK > 0)
            value_MK = torch.where(is_it_MK, edit(value_MK).relu(), value_MK)
        return index_MK, value_MK


def _edit_columns(pre_MC: Tensor, edits: Sequence[Edit]) -> Tensor:
    pre_MC = pre_MC.clone()
    for edit in edits:
        pre_MC[:, edit.concept] = edit(pre_MC[:, edit.concept])
    return pre_MC
