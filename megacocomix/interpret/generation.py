"""Prompts → texts and the effect of steering on each; tools/generate.py prints and writes them."""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megacocomix.errors import UserError
from megacocomix.hf.open import OpenModel
from megacocomix.interpret.decode import At, Sampling, Step
from megacocomix.interpret.steering import Edit, Place
from megacocomix.interpret.teacher_labels import TeacherLabels
from megacocomix.interpret.teacher_steering import decoders
from megacocomix.interpret.token_text import token_texts

NO_EFFECT = 1e-6
"""Nats a token: a smaller divergence is rounding."""


@dataclass
class Text:
    """A text that grows from the tokens of its prompt."""

    prompt: str
    ids: list[int]
    num_dropped: int
    """Tokens dropped from the beginning of the prompt, because they did not fit."""
    by: str
    """student or teacher."""
    seed: int
    edits: Sequence[Edit] = ()
    steps: list[Step] = field(default_factory=list)

    def selected(self, concept: int) -> list[bool]:
        """Whether a concept was kept (in a teacher: was active), at each step."""
        return [any(kept == concept for kept, _ in step.kept) for step in self.steps]


@dataclass(frozen=True)
class Decoder:
    """Grows texts, and describes the result."""

    student: OpenModel
    source: TeacherLabels | None
    """The teacher, if it writes texts too."""
    sampling: Sampling
    place: Place
    at: At

    def run(self, texts: Sequence[Text]) -> Iterator[None]:
        """Append steps to the texts; yields after each step, so that the caller can show new tokens."""
        for by, decode in decoders(self.student, self.source).items():
            if chosen := [text for text in texts if text.by == by]:
                prompts, edits, seeds = zip(*((text.ids, text.edits, text.seed) for text in chosen), strict=True)
                for steps in decode(prompts, self.sampling, edits, self.place, self.at, seeds=seeds):
                    for text, step in zip(chosen, steps, strict=True):
                        if step:
                            text.steps.append(step)
                    yield

    def record(self, text: Text) -> dict:
        """A line of the JSONL output. `kl` (nats) and `selected` have a value for each new token."""
        ended = bool(text.steps) and text.steps[-1].is_end
        tokens = [step.token for step in text.steps]
        # Some tokenizers decode a token differently at the beginning of a text, so the prompt is decoded with it.
        prompt = self.student.tokenizer.decode(text.ids)
        line = {
            "prompt": text.prompt,
            "text": self.student.tokenizer.decode(text.ids + tokens[: len(tokens) - ended])[len(prompt) :],
            "by": text.by,
            "seed": text.seed,
            "tokens": tokens,
            "ends": "end of text" if ended else "max_new_tokens",
            "prompt_tokens_dropped": text.num_dropped,
        }
        if not text.edits:
            return line
        return line | {
            "steer": list(map(str, text.edits)),
            "place": self.place,
            "kl": [round(step.kl, 6) for step in text.steps],
            "selected": {str(edit.concept): text.selected(edit.concept) for edit in text.edits},
        }

    def effect(self, text: Text) -> Iterator[str]:
        """Lines on the effect of steering a text: one on all steps together, one on each step. None if unsteered."""
        if not text.edits:
            return
        kls = [step.kl for step in text.steps]
        largest = max(range(len(kls)), key=kls.__getitem__)
        steering = f"{' '.join(map(str, text.edits))} {self.place} selection"
        verb, of = "selected" if text.by == "student" else "active", f"of {len(kls)} steps"
        if text.by == "student" and (slots := sum(bool(step.kept) for step in text.steps)) < len(kls):
            of = f"of {slots} steps with a concept slot, of {len(kls)} in all"
        flags = {edit.concept: text.selected(edit.concept) for edit in text.edits}
        counts = ", ".join(f"{concept} {verb} at {sum(each)} {of}" for concept, each in flags.items())
        if kls[largest] < NO_EFFECT:
            yield f"{steering} had no effect: {counts}"
            return
        mean = sum(kls) / len(kls)
        most = f"most {kls[largest]:.3f} at step {largest + 1}"
        yield f"{steering}: KL from unsteered {mean:.3f} nats a step, {most}; {counts}"
        tokens = token_texts(self.student.tokenizer, [step.token for step in text.steps])
        is_any = (any(each) for each in zip(*flags.values(), strict=True))
        each = (f"{token!r} {kl:.2f}{'*' * flag}" for token, kl, flag in zip(tokens, kls, is_any, strict=True))
        yield f"KL at each step, * where {verb}: {' '.join(each)}"


def read_prompts(file: str | Path) -> list[str]:
    """The prompts in a .jsonl file (field `prompt`), or in any other text file, one per line that is not blank. Raises
    UserError."""
    try:
        # Not splitlines(), which also splits at characters that a JSON string may hold.
        lines = Path(file).read_bytes().decode("utf-8-sig").replace("\r\n", "\n").split("\n")
    except UnicodeDecodeError:
        raise UserError(f"--prompts {file} is not UTF-8 text.") from None
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise UserError(f"--prompts {file} holds no prompt.")
    if Path(file).suffix != ".jsonl":
        return [line for _, line in numbered]
    prompts = []
    for number, line in numbered:
        try:
            prompt = json.loads(line)["prompt"]
        except (ValueError, KeyError, TypeError, RecursionError):
            prompt = None
        if not isinstance(prompt, str):
            raise UserError(f'--prompts {file}, line {number} is not a JSON object such as {{"prompt": "Once upon"}}.')
        check_text(prompt, f"--prompts {file}, line {number}")
        prompts.append(prompt)
    return prompts


def check_text(text: str, what: str) -> None:
    """Raises UserError for a lone surrogate, which no tokenizer accepts. Python makes surrogates of command-line bytes
    that are not UTF-8."""
    if re.search("[\ud800-\udfff]", text):
        raise UserError(f"{what} holds half a character (a lone surrogate): it is not UTF-8 text.")


def parse_at(text: str, context: int) -> At:
    """`decoded`, `all`, or positions below `context` such as `0,4-9`. Raises UserError."""
    if text in ("decoded", "all"):
        return text
    positions: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", part.strip(), re.ASCII)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, -1)
        if last < first:
            raise UserError(f"--at {text}: {part!r} is no position. Valid: decoded, all, or positions such as 0,4-9.")
        if last >= context:
            raise UserError(f"--at {text}: the context has the positions 0 … {context - 1}.")
        positions.update(range(first, last + 1))
    return positions
