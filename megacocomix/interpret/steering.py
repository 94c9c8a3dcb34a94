"""Steering predicted concepts: edits of single concept logits, before or after the largest are kept, at chosen tokens.

A steered logit is clamp(scale × logit, low, high). This covers the paper's scale in −10 … 10 (§3.2), setting and
clamping. The edit changes the output of one module of the model, so cached decoding of one token at a time is steered
exactly as a whole window is. The paper does not state at which of two places it edits:

before: before the K largest are kept. A large scale forces a concept with a positive logit in. It pushes a concept with
        a negative logit further out, so such a concept is often better raised with `min`.
after:  after they are kept. The edit acts only where the model kept the concept by itself.
"""

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from megacocomix.errors import UserError, nearest
from megacocomix.hf.modeling_cocomix import CocomixForCausalLM

Place = Literal["before", "after"]
PLACES: tuple[str, ...] = get_args(Place)
MOST = 10.0
"""Largest scale, as in the paper."""
MOST_LOGIT = 1e6
"""Largest logit that can be set. Much larger ones overflow in the model."""
FORMS = "ID=SCALE, ID=set:LOGIT, ID=min:LOGIT, ID=max:LOGIT or ID=clamp:LOW:HIGH"
KINDS = ("set", "min", "max", "clamp")


@dataclass(frozen=True)
class Edit:
    """An edit of one concept's logit: clamp(scale × logit, low, high)."""

    concept: int
    scale: float = 1.0
    low: float = -math.inf
    high: float = math.inf

    def __call__(self, logit: Tensor) -> Tensor:
        """Logits of any shape → the steered logits. A scale of 1 changes no bit."""
        return (self.scale * logit).clamp(self.low, self.high)

    def __str__(self) -> str:
        """The edit in the form that `parse_edit` reads."""
        scale, low, high = (repr(value).removesuffix(".0") for value in (self.scale, self.low, self.high))
        if self.low == self.high:
            return f"{self.concept}=set:{low}"
        if self.low > -math.inf:
            return f"{self.concept}=min:{low}" if self.high == math.inf else f"{self.concept}=clamp:{low}:{high}"
        return f"{self.concept}=max:{high}" if self.high < math.inf else f"{self.concept}={scale}"


def parse_edits(texts: Sequence[str], num_concepts: int) -> list[Edit]:
    """Parse edits of different concepts. Raises UserError."""
    edits = [parse_edit(text, num_concepts) for text in texts]
    check_distinct(edits)
    return edits


def parse_edit(text: str, num_concepts: int) -> Edit:
    """Parse an edit: `12=8` scales the logit, `12=set:5` sets it, `12=min:5` raises it to at least 5, `12=max:5` lowers
    it to at most 5, `12=clamp:2:5` does both. Raises UserError."""
    name, equals, rest = (part.strip() for part in text.partition("="))
    if not equals or not re.fullmatch("[0-9]+", name):
        raise UserError(f"steer {text!r:.80} is not {FORMS}, such as 12=8.")
    if len(name) > 9 or int(name) >= num_concepts:
        raise UserError(f"steer {text!r:.80}: the model has concepts 0 … {num_concepts - 1}.")
    kind, number = rest.split(":", 1) if ":" in rest else ("scale", rest)
    if ":" in rest and kind not in KINDS:
        raise UserError(f"steer {text!r:.80}: {kind!r} is none of {', '.join(KINDS)}.{nearest(kind, KINDS)}")
    numbers = [_number(text, each) for each in number.split(":")]
    if len(numbers) != (2 if kind == "clamp" else 1):
        raise UserError(f"steer {text!r:.80} is not {FORMS}.")
    concept, most = int(name), MOST if kind == "scale" else MOST_LOGIT
    if beyond := [value for value in numbers if abs(value) > most]:
        limit = math.copysign(most, beyond[0])
        what = f"a {'scale' if kind == 'scale' else 'logit'} is from {-most:g} to {most:g}"
        raise UserError(f"steer {text!r:.80}: {what}. Nearest valid: {limit:g}.")
    if kind == "scale":
        return Edit(concept, scale=numbers[0])
    low, high = (numbers[0] if kind != "max" else -math.inf), (numbers[-1] if kind != "min" else math.inf)
    if low > high:
        raise UserError(f"steer {text!r:.80}: {low:g} is above {high:g}.")
    return Edit(concept, low=low, high=high)


def _number(text: str, number: str) -> float:
    try:
        value = float(number) if number.isascii() else math.nan
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UserError(f"steer {text!r:.80}: {number!r:.40} is not a number. Give {FORMS}.")
    return value


def check_distinct(edits: Sequence[Edit]) -> None:
    """Raises UserError for two edits of one concept, because their order would matter."""
    concepts = [edit.concept for edit in edits]
    if twice := sorted({concept for concept in concepts if concepts.count(concept) > 1}):
        raise UserError(f"concept {twice[0]} is steered twice: give one edit for each concept.")


def check_place(place: str) -> None:
    """Raises UserError for an unknown place."""
    if place not in PLACES:
        raise UserError(f"place {place!r} is none of {', '.join(PLACES)}.{nearest(place, PLACES)}")


class Steering:
    """The edits of the texts of a batch; `rows` has a list of edits for each text."""

    def __init__(self, rows: Sequence[Sequence[Edit]], place: Place):
        check_place(place)
        for edits in rows:
            check_distinct(edits)
        self.rows, self.place = rows, place

    @contextmanager
    def of(self, model: CocomixForCausalLM, where_BT: Tensor) -> Iterator[None]:
        """Inside the block, a forward pass of tokens [B, T] has its logits edited where `where_BT` is true."""
        body = model.transformer
        module = body.concept_predictor if self.place == "before" else body.top_k
        change = self._change_logits if self.place == "before" else self._change_kept
        with module.register_forward_hook(lambda _, __, output: change(output, where_BT)):
            yield

    def _change_logits(self, logits_BTC: Tensor, where_BT: Tensor) -> Tensor:
        logits_BTC = logits_BTC.clone()
        for row, edit in self._each():
            logit_T = logits_BTC[row, :, edit.concept]
            logits_BTC[row, :, edit.concept] = torch.where(where_BT[row], edit(logit_T), logit_T)
        return logits_BTC

    def _change_kept(self, kept: tuple[Tensor, Tensor], where_BT: Tensor) -> tuple[Tensor, Tensor]:
        value_BTK, index_BTK = kept[0].clone(), kept[1]
        for row, edit in self._each():
            is_it_TK = (index_BTK[row] == edit.concept) & where_BT[row, :, None]
            value_BTK[row] = torch.where(is_it_TK, edit(value_BTK[row]), value_BTK[row])
        return value_BTK, index_BTK

    def _each(self) -> Iterator[tuple[int, Edit]]:
        return ((row, edit) for row, edits in enumerate(self.rows) for edit in edits)


@contextmanager
def kept_concepts(model: CocomixForCausalLM) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Inside the block, each forward pass appends the concepts it kept: (logits, ids), [B, T, K]. Steering that was
    entered before is included. A model that keeps no concepts appends nothing."""
    found: list[tuple[Tensor, Tensor]] = []
    module = model.transformer.top_k
    hook = module.register_forward_hook(lambda _, __, output: found.append(output)) if module else nullcontext()
    with hook:
        yield found
