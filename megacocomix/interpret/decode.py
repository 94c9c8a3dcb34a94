"""Decoding token by token, in batches, with a cache and with steering; the effect of the steering is measured.

The unsteered model reads the same tokens in a second pass with its own cache. At each step, the divergence between the
two next-token distributions measures the effect of the steering at that step, whatever was sampled before.

Shapes: B texts, T tokens of a pass, N tokens so far, K concepts kept, V vocabulary.
"""

import math
from collections.abc import Collection, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.generation import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from megacocomix.data.tokenizer import Tokenizer
from megacocomix.errors import UserError
from megacocomix.hf.open import OpenModel, check_is_cocomix, check_mixes_concepts
from megacocomix.interpret.steering import Edit, Place, Steering, kept_concepts

MOST_SEED = 2**63 - 1
LEAST_TEMPERATURE = 1e-4
"""Logits divided by a smaller temperature may overflow."""
At = Literal["decoded", "all"] | Collection[int]
"""Which tokens are steered. decoded: the prompt's last token and all new tokens, which predict new tokens. all: the
rest of the prompt too. Otherwise positions; position 0 is the first token of the prompt after truncation."""


@dataclass(frozen=True)
class Sampling:
    """How next tokens are drawn. Raises one UserError with a line for each invalid value."""

    max_new_tokens: int = 64
    temperature: float = 1.0
    """0: always take the most probable token."""
    top_k: int = 0
    """Draw from this many of the most probable tokens; 0: from all."""
    top_p: float = 1.0
    """Draw from the most probable tokens whose probabilities add up to this."""
    min_p: float = 0.0
    """Draw from tokens with at least this share of the largest probability."""
    seed: int = 0

    def __post_init__(self):
        valid = {
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "temperature": (
                self.temperature == 0 or (math.isfinite(self.temperature) and self.temperature >= LEAST_TEMPERATURE),
                f"at least {LEAST_TEMPERATURE}, or 0 for greedy",
            ),
            "top_k": (self.top_k >= 0, "at least 1, or 0 for all"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "min_p": (0 <= self.min_p < 1, "at least 0 and below 1"),
            "seed": (0 <= self.seed <= MOST_SEED, f"from 0 to {MOST_SEED}"),
        }
        problems = [
            f"{key} {getattr(self, key)} must be {rule}." for key, (is_valid, rule) in valid.items() if not is_valid
        ]
        if problems:
            raise UserError(*problems)

    def warpers(self) -> LogitsProcessorList:
        """The changes to the logits before a token is drawn: those of transformers, in its order."""
        warpers = LogitsProcessorList()
        if self.temperature not in (0.0, 1.0):
            warpers.append(TemperatureLogitsWarper(float(self.temperature)))
        if self.top_k:
            warpers.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1:
            warpers.append(TopPLogitsWarper(float(self.top_p)))
        if self.min_p:
            warpers.append(MinPLogitsWarper(self.min_p))
        return warpers


Kept = tuple[int, float]
"""A concept and its logit."""


class Step(NamedTuple):
    """One new token of one text."""

    token: int
    kl: float
    """KL(steered ‖ unsteered) of the next-token distributions in nats, before temperature and other warpers."""
    kept: list[Kept]
    """Concepts kept at the position that predicted it, largest first, with their logits after steering. Empty where
    that position has no slot."""
    is_end: bool
    """Whether the token is the end of text. The text gets no steps after it."""


def fit_prompt(ids: list[int], context: int, max_new_tokens: int, eot_id: int) -> tuple[list[int], int]:
    """Truncate a prompt at its beginning so that the new tokens fit in the context. Returns its last tokens and the
    number of tokens dropped. An empty prompt becomes one end-of-text token, which begins a document. Raises UserError
    when the new tokens leave no room for a prompt."""
    if max_new_tokens >= context:
        raise UserError(
            f"max_new_tokens {max_new_tokens} leaves no room for a prompt in the context of {context} tokens. "
            f"Nearest valid: {context - 1}."
        )
    ids = ids or [eot_id]
    kept = ids[-(context - max_new_tokens) :]
    return kept, len(ids) - len(kept)


def decode(
    student: OpenModel,
    prompts: Sequence[list[int]],
    sampling: Sampling,
    edits: Sequence[Sequence[Edit]] | None = None,
    place: Place = "before",
    at: At = "decoded",
    cached: bool = True,
    seeds: Sequence[int] | None = None,
) -> Iterator[list[Step | None]]:
    """Yields, for each new token, a list with one Step per prompt; a text that has ended has None. Closing the iterator
    stops decoding.

    `edits` has a list for each prompt. Each text has its own random generator, seeded by `seeds` (default: the
    sampling's seed, then that plus 1, plus 2, …). So the draws of a text do not depend on its batch, and texts of one
    seed differ only where their distributions differ. With `cached` false, every step reads all tokens again. Raises
    UserError when the model cannot be steered.
    """
    edits = edits or [[] for _ in prompts]
    check_mixes_concepts(student) if any(edits) else check_is_cocomix(student)
    steering = Steering(edits, place) if any(edits) else None
    steered = _StudentReader(student, steering, cached)
    plain = _StudentReader(student, None, cached) if steering else None
    return decode_with(steered, plain, student.tokenizer, prompts, sampling, at, seeds)


class Reader(Protocol):
    """A model that reads texts which grow by one token per step. A reader serves one batch."""

    device: torch.device

    def read(self, tokens_BN: Tensor, position_BN: Tensor, where_BN: Tensor) -> tuple[Tensor, list[list[Kept]]]:
        """All tokens so far, their positions (negative: padding, on the left) and which of them are steered → logits
        [B, V] of the next token, and the concepts kept at the last token, largest first."""


@torch.no_grad()
def decode_with(
    steered: Reader,
    plain: Reader | None,
    tokenizer: Tokenizer,
    prompts: Sequence[list[int]],
    sampling: Sampling,
    at: At,
    seeds: Sequence[int] | None,
) -> Iterator[list[Step | None]]:
    """`decode` for any reader. With `plain`, measures the divergence from it."""
    seeds = seeds or [(sampling.seed + row) % (MOST_SEED + 1) for row in range(len(prompts))]
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    warpers, device, width = sampling.warpers(), steered.device, max(map(len, prompts))
    # Padding is on the left, so that all texts grow at their right end.
    rows = [[tokenizer.eot_id] * (width - len(ids)) + ids for ids in prompts]
    tokens_BN = torch.tensor(rows, device=device)
    first_B1 = torch.tensor([[width - len(ids)] for ids in prompts], device=device)
    is_running = [True] * len(prompts)
    for _ in range(sampling.max_new_tokens):
        position_BN = torch.arange(tokens_BN.shape[1], device=device) - first_B1
        where_BN = _chosen(position_BN, at, width - 1 - first_B1)
        logits_BV, kept_B = steered.read(tokens_BN, position_BN, where_BN)
        if not logits_BV.isfinite().all():
            raise UserError("the model's logits are not finite: its training diverged, or its weights are damaged.")
        kl_B = [0.0] * len(prompts)
        if plain:
            log_p_BV = logits_BV.log_softmax(-1)
            log_q_BV = plain.read(tokens_BN, position_BN, where_BN)[0].log_softmax(-1)
            kl_B = (log_p_BV.exp() * (log_p_BV - log_q_BV)).sum(-1).clamp(min=0).tolist()
        next_B = _draw(warpers(tokens_BN, logits_BV), sampling.temperature == 0, generators)
        steps: list[Step | None] = []
        for row, token in enumerate(next_B.tolist()):
            is_end = token == tokenizer.eot_id
            steps.append(Step(token, kl_B[row], kept_B[row], is_end) if is_running[row] else None)
            is_running[row] = is_running[row] and not is_end
        yield steps
        if not any(is_running):
            return
        tokens_BN = torch.cat((tokens_BN, next_B[:, None]), dim=1)


class _StudentReader:
    """A student; with a cache it reads only the new tokens."""

    def __init__(self, student: OpenModel, steering: Steering | None, cached: bool):
        self.student, self.steering, self.device = student, steering, student.device
        self.cache = DynamicCache() if cached else None

    def read(self, tokens_BN, position_BN, where_BN):
        start = self.cache.get_seq_length() if self.cache is not None else 0
        model, has_padding = self.student.model, bool((position_BN < 0).any())
        steer = self.steering.of(model, where_BN[:, start:]) if self.steering else nullcontext()
        with steer, kept_concepts(model) as found:
            out = model(
                tokens_BN[:, start:],
                attention_mask=(position_BN >= 0).long() if has_padding else None,
                past_key_values=self.cache,
                use_cache=self.cache is not None,
                logits_to_keep=1,
            )
        # The embedding may be padded to more rows than there are tokens.
        logits_BV = out.logits[:, -1, : self.student.tokenizer.vocab_size].float()
        if not found:
            return logits_BV, [[] for _ in tokens_BN]
        value_BK, index_BK = (each[:, -1] for each in found[0])
        has_slot_B = self.student.has_slot(position_BN[:, -1]).tolist()
        return logits_BV, [
            row if has_slot else [] for row, has_slot in zip(kept_rows(index_BK, value_BK), has_slot_B, strict=True)
        ]


def kept_rows(index_BK: Tensor, value_BK: Tensor) -> list[list[Kept]]:
    """(id, value) pairs of each text, largest first. Sorts again, because steering may have changed the order."""
    order_BK = value_BK.argsort(dim=-1, descending=True, stable=True)
    index, value = index_BK.gather(-1, order_BK).tolist(), value_BK.gather(-1, order_BK).tolist()
    return [list(zip(*pair, strict=True)) for pair in zip(index, value, strict=True)]


def _chosen(position_BN: Tensor, at: At, last_B1: Tensor) -> Tensor:
    """Which tokens are steered; `last_B1` is the position of each prompt's last token."""
    if at == "all":
        return position_BN >= 0
    if at == "decoded":
        return position_BN >= last_B1
    return torch.isin(position_BN, torch.tensor(sorted(at), device=position_BN.device))


def _draw(logits_BV: Tensor, is_greedy: bool, generators: list[torch.Generator]) -> Tensor:
    """int64 [B]. The argmax of p / exponential noise is token i with probability p_i. A seed's noise does not depend on
    the distribution, so equal distributions give the same token."""
    if is_greedy:
        return logits_BV.argmax(-1)
    size = logits_BV.shape[-1]
    noise_BV = torch.stack([torch.empty(size).exponential_(generator=generator) for generator in generators])
    return (logits_BV.softmax(-1) / noise_BV.to(logits_BV.device)).argmax(-1)
