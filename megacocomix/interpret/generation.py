"""Prompts → texts with what steering did to each: what tools/generate.py prints and writes."""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megacocomix.errors import UserError
from megacocomix.hf.open import OpenModel
from megacocomix.interpret.decode import At, Sampling, Step, decode
from megacocomix.interpret.steering import Edit, Place
from megacocomix.interpret.teacher_labels import TeacherLabels
from megacocomix.interpret.teacher_steering import decode_teacher
from megacocomix.interpret.token_text import token_texts

NO_EFFECT = 1e-6
"""Nats a token: a divergence below it is rounding."""


@dataclass
class Text:
    """A text as it grows from the tokens of its prompt, of which `num_cut` more did not fit; `by` is student or
    teacher."""

    prompt: str
    ids: list[int]
    num_cut: int
    by: str
    seed: int
    edits: Sequence[Edit] = ()
    steps: list[Step] = field(default_factory=list)

    def selected(self, concept: int) -> list[bool]:
        """Whether a concept was kept (of a teacher: was active), at each step."""
        return [any(kept == concept for kept, _ in step.kept) for step in self.steps]


@dataclass(frozen=True)
class Decoder:
    """Lets texts grow, and tells what became of them."""

    student: OpenModel
    source: TeacherLabels | None
    """The teacher, where it writes texts too."""
    sampling: Sampling
    place: Place
    at: At

    def run(self, texts: Sequence[Text]) -> Iterator[None]:
        """Add steps to the texts; stops after each one, so that what is new can be shown."""
        for by in ("student", "teacher"):
            if ours := [text for text in texts if text.by == by]:
                for steps in self._decode(by, ours):
                    for text, step in zip(ours, steps, strict=True):
                        if step is not None:
                            text.steps.append(step)
                    yield

    def _decode(self, by: str, texts: list[Text]) -> Iterator[list[Step | None]]:
        rows = {
            "prompts": [text.ids for text in texts],
            "edits": [text.edits for text in texts],
            "seeds": [text.seed for text in texts],
        }
        shared = {"sampling": self.sampling, "place": self.place, "at": self.at}
        if by == "student":
            return decode(self.student, **rows, **shared)
        labeler = self.source.labeler
        return decode_teacher(labeler.teacher, labeler.sae, self.student.tokenizer, **rows, **shared)

    def record(self, text: Text) -> dict:
        """A line of the JSONL output. `kl` (nats) and `selected` have a value for each new token."""
        ended = bool(text.steps) and text.steps[-1].is_end
        tokens = [step.token for step in text.steps]
        prompt = self.student.tokenizer.decode(text.ids)  # a tokenizer may write what begins a text otherwise
        line = {
            "prompt": text.prompt,
            "text": self.student.tokenizer.decode(text.ids + tokens[: len(tokens) - ended])[len(prompt) :],
            "by": text.by,
            "seed": text.seed,
            "tokens": tokens,
            "ends": "end of text" if ended else "max_new_tokens",
            "prompt_tokens_cut": text.num_cut,
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
        """Lines that say what the steering of a text did: altogether, and at each step; none for an unsteered one."""
        if not text.edits:
            return
        kls = [step.kl for step in text.steps]
        largest = max(range(len(kls)), key=kls.__getitem__)
        steering = f"{' '.join(map(str, text.edits))} {self.place} selection"
        word, of = "selected" if text.by == "student" else "active", f"of {len(kls)} steps"
        if text.by == "student" and (slots := sum(bool(step.kept) for step in text.steps)) < len(kls):
            of = f"of {slots} steps with a concept slot, of {len(kls)} in all"
        flags = {edit.concept: text.selected(edit.concept) for edit in text.edits}
        counts = ", ".join(f"{concept} {word} at {sum(each)} {of}" for concept, each in flags.items())
        if kls[largest] < NO_EFFECT:
            yield f"{steering} had no effect: {counts}"
            return
        mean = sum(kls) / len(kls)
        most = f"most {kls[largest]:.3f} at step {largest + 1}"
        yield f"{steering}: KL from unsteered {mean:.3f} nats a step, {most}; {counts}"
        pieces = token_texts(self.student.tokenizer, [step.token for step in text.steps])
        is_any = (any(each) for each in zip(*flags.values(), strict=True))
        each = (f"{piece!r} {kl:.2f}{'*' * flag}" for piece, kl, flag in zip(pieces, kls, is_any, strict=True))
        yield f"KL at each step, * where {word}: {' '.join(each)}"


def read_prompts(file: str | Path) -> list[str]:
    """Prompts of a .jsonl file (its `prompt` fields), or of any other text file, one a line that is not blank. Raises
    UserError."""
    try:
        # Not splitlines(), which also cuts at characters that JSON may hold in a string.
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
    """Raises UserError for what no tokenizer takes: a half of a character, as bytes that are not UTF-8 become on a
    command line."""
    if re.search("[\ud800-\udfff]", text):
        raise UserError(f"{what} holds half a character (a lone surrogate): it is not UTF-8 text.")


def parse_at(text: str, context: int) -> At:
    """`decoded`, `all`, or positions such as `0,4-9`, below `context`. Raises UserError."""
    if text in ("decoded", "all"):
        return text
    positions: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", part.strip(), re.ASCII)
        if not match or int(match[2] or match[1]) < int(match[1]):
            raise UserError(f"--at {text}: {part!r} is no position. Valid: decoded, all, or positions such as 0,4-9.")
        if int(match[2] or match[1]) >= context:
            raise UserError(f"--at {text}: the context has the positions 0 … {context - 1}.")
        positions.update(range(int(match[1]), int(match[2] or match[1]) + 1))
    return positions
