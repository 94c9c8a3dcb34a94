"""Live generation: what a client may ask for in JSON, and the events that it is answered with.

A text is generated plain and, where concepts are steered, steered beside it with the same seed, so that the two
differ by the steering alone. Nothing here knows how requests arrive or events leave.
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
from megacocomix.interpret.steering import PLACES, Edit, Place, check_distinct, parse_edit
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
    """What the server takes on."""

    max_new_tokens: int = 256
    max_waiting: int = 16
    """Generations in line behind the one that runs."""
    max_edits: int = 8
    max_bytes: int = 64 * 1024

    def most_new_tokens(self, student: OpenModel) -> int:
        """Of one text; a prompt of one token must fit the context with it."""
        return min(self.max_new_tokens, student.context - 1)


@dataclass(frozen=True)
class Task:
    """What a client asks for."""

    prompt: str
    sampling: Sampling
    edits: list[Edit]
    place: Place


def read_task(body: bytes, student: OpenModel, limits: Limits) -> Task:
    """The task in the JSON of a request. Raises UserError with one line that says what is wrong and what is valid."""
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
    if place not in PLACES:
        raise UserError(f"place {place!r} is none of {', '.join(PLACES)}.{nearest(place, PLACES)}")
    texts = fields.get("steer", [])
    if len(texts) > limits.max_edits:
        raise UserError(f"steer has {len(texts)} concepts: at most {limits.max_edits}.")
    if texts:
        check_mixes_concepts(student)
    edits = [parse_edit(text, student.model.config.num_concepts) for text in texts]
    check_distinct(edits)
    sampling = Sampling(num_new, **{key: fields[key] for key in SAMPLING if key in fields})
    return Task(fields["prompt"], sampling, edits, place)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number")


def _check_kind(key: str, value: object) -> None:
    if key not in KINDS:
        raise UserError(f"unknown key {key!r}.{nearest(key, KINDS)}")
    kind, name = KINDS[key]
    if kind is float and type(value) is int:
        is_valid = abs(value) < 2**53  # a float says it exactly
    else:
        is_valid = type(value) is kind and (kind is not float or math.isfinite(value))
    if not is_valid or (kind is list and not all(type(item) is str for item in value)):
        raise UserError(f"{key} must be {name}.")
    if kind is str:
        check_text(value, key)


def generate(student: OpenModel, task: Task) -> Iterator[dict]:
    """The events of a task, but for the last; each decoding step is done when its first event is asked for."""
    ids = student.tokenizer.encode_batch([task.prompt])[0]
    ids, num_cut = fit_prompt(ids, student.context, task.sampling.max_new_tokens, student.tokenizer.eot_id)
    yield {"event": "start", "prompt": token_texts(student.tokenizer, ids), "cut": num_cut}
    names = ["plain", "steered"] if task.edits else ["plain"]
    edits = [[], task.edits][: len(names)]
    streams = [_Stream(name, student, ids, task) for name in names]
    seeds = [task.sampling.seed] * len(names)
    prompts = [ids] * len(names)
    with closing(decode(student, prompts, task.sampling, edits, task.place, seeds=seeds)) as steps:
        for step_B in steps:
            for stream, step in zip(streams, step_B, strict=True):
                if step is not None:
                    yield from stream.take(step)


class _Stream:
    """A text that grows, as events."""

    def __init__(self, name: str, student: OpenModel, prompt: list[int], task: Task):
        self.name, self.num_tokens, self.sum_kl = name, 0, 0.0
        self.most = task.sampling.max_new_tokens
        self.selected = {edit.concept: 0 for edit in task.edits}
        self.text = TextStream(student.tokenizer, prompt)

    def take(self, step: Step) -> Iterator[dict]:
        """A step's token and, after the last, how the text ended. The end of text is a token without text."""
        self.num_tokens += 1
        self.sum_kl += step.kl
        for concept, _ in step.kept:
            if concept in self.selected:
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
