"""Live generation: a client's request in JSON, and the events that answer it.

Each request generates a plain text. If it steers concepts, a steered text is generated beside it with the same seed, so
that the two differ by the steering alone. This module does not know how requests arrive or how events are sent.
"""

import json
import math
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass

from megacocomix.errors import UserError, nearest
from megacocomix.hf.open import OpenModel, check_mixes_concepts
from megacocomix.interpret.decode import Sampling, Step, decode, fit_prompt
from megacocomix.interpret.generation import check_text
from megacocomix.interpret.steering import PLACES, Edit, Place, check_place, parse_edits
from megacocomix.interpret.token_text import TextStream, token_texts

KINDS = {
    "prompt": (str, "a string"),
    "max_new_tokens": (int, "a whole number"),
    "temperature": (float, "a number"),
    "top_k": (int, "a whole number"),
    "top_p": (float, "a number"),
    "min_p": (float, "a number"),
    "seed": (int, "a whole number"),
    "steer": (list, "a list of strings"),
    "place": (str, "a string"),
}
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "seed")


@dataclass(frozen=True)
class Limits:
    """What the server accepts."""

    max_new_tokens: int = 256
    max_waiting: int = 16
    """Generations that wait behind the running one."""
    max_edits: int = 8
    max_bytes: int = 64 * 1024

    def most_new_tokens(self, student: OpenModel) -> int:
        """New tokens of one text. At least one prompt token must fit in the context too."""
        return min(self.max_new_tokens, student.context - 1)


@dataclass(frozen=True)
class Task:
    """A client's request."""

    prompt: str
    sampling: Sampling
    edits: list[Edit]
    place: Place


def read_task(body: bytes, student: OpenModel, limits: Limits) -> Task:
    """Parse the JSON of a request. Raises UserError with one line: the problem and what is valid."""
    try:
        fields = json.loads(body, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise UserError(f"the body is not JSON: {error}.") from None
    if not isinstance(fields, dict):
        raise UserError('the body is not a JSON object, such as {"prompt": "The"}.')
    for key, value in fields.items():
        _check_kind(key, value)
    if "prompt" not in fields:
        raise UserError("prompt is missing.")
    most = limits.most_new_tokens(student)
    num_new = fields.get("max_new_tokens", min(Sampling.max_new_tokens, most))
    if not 1 <= num_new <= most:
        raise UserError(f"max_new_tokens {num_new} must be from 1 to {most}.")
    place = fields.get("place", PLACES[0])
    check_place(place)
    texts = fields.get("steer", [])
    if len(texts) > limits.max_edits:
        raise UserError(f"steer has {len(texts)} concepts: at most {limits.max_edits}.")
    if texts:
        check_mixes_concepts(student)
    edits = parse_edits(texts, student.model.config.num_concepts)
    sampling = Sampling(num_new, **{key: fields[key] for key in SAMPLING if key in fields})
    return Task(fields["prompt"], sampling, edits, place)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number")


def _check_kind(key: str, value: object) -> None:
    if key not in KINDS:
        raise UserError(f"unknown key {key!r}.{nearest(key, KINDS)}")
    kind, name = KINDS[key]
    if kind is float and type(value) is int:
        is_valid = abs(value) < 2**53  # a float holds it exactly
    else:
        is_valid = type(value) is kind and (kind is not float or math.isfinite(value))
    if not is_valid or (kind is list and not all(type(item) is str for item in value)):
        raise UserError(f"{key} must be {name}.")
    if kind is str:
        check_text(value, key)


def generate(student: OpenModel, task: Task) -> Iterator[dict]:
    """The events of a task except the last, `done`. A decoding step runs when its first event is requested."""
    ids = student.tokenizer.encode_batch([task.prompt])[0]
    ids, num_dropped = fit_prompt(ids, student.context, task.sampling.max_new_tokens, student.tokenizer.eot_id)
    yield {"event": "start", "prompt": token_texts(student.tokenizer, ids), "truncated": num_dropped}
    edits = {"plain": []} | ({"steered": task.edits} if task.edits else {})
    streams = [_Stream(name, student, ids, task) for name in edits]
    seeds = [task.sampling.seed] * len(edits)
    prompts = [ids] * len(edits)
    with closing(decode(student, prompts, task.sampling, [*edits.values()], task.place, seeds=seeds)) as steps:
        for step_B in steps:
            for stream, step in zip(streams, step_B, strict=True):
                if step:
                    yield from stream.take(step)


class _Stream:
    """The events of one growing text."""

    def __init__(self, name: str, student: OpenModel, prompt: list[int], task: Task):
        self.name, self.most = name, task.sampling.max_new_tokens
        self.num_tokens, self.sum_kl = 0, 0.0
        self.selected = {edit.concept: 0 for edit in task.edits}
        self.text = TextStream(student.tokenizer, prompt)

    def take(self, step: Step) -> Iterator[dict]:
        """The events of a step: its token and, after the last token, how the text ended. The end-of-text token has no
        text."""
        self.num_tokens += 1
        self.sum_kl += step.kl
        for concept in self.selected.keys() & dict(step.kept):
            self.selected[concept] += 1
        text = "" if step.is_end else self.text.push(step.token)
        is_last = step.is_end or self.num_tokens == self.most
        yield {
            "event": "token",
            "stream": self.name,
            "text": text + self.text.flush() if is_last else text,
            "kl": _rounded(step.kl),
            "kept": [[concept, _rounded(logit)] for concept, logit in step.kept],
        }
        if is_last:
            yield {
                "event": "end",
                "stream": self.name,
                "tokens": self.num_tokens,
                "mean_kl": _rounded(self.sum_kl / self.num_tokens),
                "reason": "end of text" if step.is_end else "length",
                "selected": self.selected,
            }


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")
