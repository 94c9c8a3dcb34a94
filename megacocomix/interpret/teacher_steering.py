"""The same concept turned in the teacher, for comparison (paper §3.2): a latent of its autoencoder is changed, and what
that changes of the reconstruction is added to the residual. The reconstruction's error is the same before and after, so
it cancels: latents that stay as they are leave the teacher as it was, to the bit.

before: the latent's pre-activation is edited before the largest are kept.
after:  its activation is edited where it was kept.

Shapes: B texts, G of them of one length, N tokens, M of them steered, D width, C latents, K active latents.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from megacocomix.data.tokenizer import Tokenizer
from megacocomix.errors import UserError
from megacocomix.interpret.decode import At, Kept, Sampling, Step, decode_with, kept_rows
from megacocomix.interpret.steering import Edit, Place, Steering
from megacocomix.sae.model import SAE
from megacocomix.teacher.model import Teacher


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
    """`decode`, of the teacher: `Step.kept` are its active latents. There is no cache: each step reads all tokens.
    Raises UserError where prompt and new tokens do not fit its context."""
    longest = max(map(len, prompts)) + sampling.max_new_tokens
    if longest > teacher.context:
        raise UserError(f"{longest} tokens of prompt and new text do not fit the teacher: it reads {teacher.context}.")
    edits = edits or [[] for _ in prompts]
    steering = Steering(edits, place) if any(edits) else None
    steered = _TeacherReader(teacher, sae, steering, tokenizer.vocab_size)
    plain = _TeacherReader(teacher, sae, None, tokenizer.vocab_size) if steering else None
    return decode_with(steered, plain, tokenizer, prompts, sampling, at, seeds)


class _TeacherReader:
    """A teacher, whose models know no padding: texts are read in groups of one length."""

    def __init__(self, teacher: Teacher, sae: SAE, steering: Steering | None, vocab_size: int):
        self.teacher, self.sae, self.steering, self.vocab_size = teacher, sae, steering, vocab_size
        self.device = sae.decoder.device

    def read(self, tokens_BN, position_BN, where_BN):
        logits_BV = torch.empty(len(tokens_BN), self.vocab_size, device=self.device)
        kept_B: list[list[Kept]] = [[] for _ in tokens_BN]
        num_padding_B = (position_BN < 0).sum(-1)
        for padding in num_padding_B.unique().tolist():
            rows = (num_padding_B == padding).nonzero().flatten().tolist()
            turned = _Turned(self.sae, self.steering, rows, where_BN[rows, padding:])
            found_GV = self.teacher.next_logits(tokens_BN[rows, padding:], turned)
            logits_BV[rows] = found_GV[:, : self.vocab_size].float()
            for row, active in zip(rows, turned.active_G, strict=True):
                kept_B[row] = [(latent, value) for latent, value in active if value > 0]
        return logits_BV, kept_B


class _Turned:
    """h [G, N, D] → h with latents changed; `active_G` has then the latents that were kept at each last token."""

    def __init__(self, sae: SAE, steering: Steering | None, rows: list[int], where_GN: Tensor):
        self.sae, self.where_GN = sae, where_GN
        self.place = steering.place if steering else "before"
        self.edits = [steering.rows[row] if steering else [] for row in rows]

    def __call__(self, hidden_GND: Tensor) -> Tensor:
        normed_GND, _, scale = self.sae.form.normalize(hidden_GND)
        self.active_G = kept_rows(*self.sae.encode_normalized(normed_GND[:, -1]))
        delta_GND = torch.zeros_like(normed_GND)
        for row, edits in enumerate(self.edits):
            chosen_M = self.where_GN[row].nonzero().flatten()
            if not edits or not len(chosen_M):
                continue
            normed_MD = normed_GND[row, chosen_M]
            before = self.sae.encode_normalized(normed_MD)
            after = self._changed(normed_MD, before, edits)
            delta_GND[row, chosen_M] = self.sae.decode(*after) - self.sae.decode(*before)
            if self.where_GN[row, -1]:
                (self.active_G[row],) = kept_rows(*(each[-1:] for each in after))
        return hidden_GND + (delta_GND * scale).to(hidden_GND.dtype)

    def _changed(
        self, normed_MD: Tensor, before: tuple[Tensor, Tensor], edits: Sequence[Edit]
    ) -> tuple[Tensor, Tensor]:
        if self.place == "before":
            return self.sae.encode_normalized(normed_MD, lambda pre_MC: _edited(pre_MC, edits))
        index_MK, value_MK = before
        for edit in edits:
            is_it_MK = (index_MK == edit.concept) & (value_MK > 0)
            value_MK = torch.where(is_it_MK, edit(value_MK).relu(), value_MK)
        return index_MK, value_MK


def _edited(pre_MC: Tensor, edits: Sequence[Edit]) -> Tensor:
    pre_MC = pre_MC.clone()
    for edit in edits:
        pre_MC[:, edit.concept] = edit(pre_MC[:, edit.concept])
    return pre_MC
