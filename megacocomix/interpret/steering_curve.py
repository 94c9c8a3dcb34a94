"""How well steering works, over many concepts and scales: does a text become what the concept is about, and what does
that cost in fluency? The paper shows five examples (§3.2).

From the same prompts and seeds there are texts of the student, unsteered and with each concept turned by each scale,
and of the teacher, steered by the same edits in its own latents, which says what can be expected at all.
steering_judge.py says what they are like.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from megacocomix.checkpoint.format import checkpoint_step
from megacocomix.compare.plots import save
from megacocomix.data.tokenizer import tokenizer_mismatches
from megacocomix.data.tokens import TokenDataset, TokenShards, check_token_ids
from megacocomix.errors import UserError
from megacocomix.files import write_json
from megacocomix.hf.open import OpenModel, check_mixes_concepts, open_model
from megacocomix.interpret.concepts import promoted_tokens
from megacocomix.interpret.decode import MOST_SEED, Sampling, Step, decode
from megacocomix.interpret.steering import MOST, Edit, Place, kept_concepts
from megacocomix.interpret.steering_judge import Text, judge, summarise
from megacocomix.interpret.steering_plot import draw
from megacocomix.interpret.teacher_labels import TeacherLabels, open_teacher_labels
from megacocomix.interpret.teacher_steering import decode_teacher
from megacocomix.teacher.labels import FORWARD_TOKENS

FORMAT, VERSION = "megacocomix-steering", 1
COUNTED_WINDOWS = 64
"""Held-out windows on which concepts are counted, evenly spaced; of fewer all."""


@dataclass(frozen=True)
class CurveSettings:
    """What is steered, and how. Raises one UserError with everything that cannot be."""

    concepts: int | tuple[int, ...] = 50
    """How many, those that the student keeps most often; or which."""
    scales: tuple[float, ...] = (-10.0, -4.0, 0.0, 2.0, 4.0, 8.0, 10.0)
    place: Place = "before"
    prompts: int = 6
    prompt_tokens: int = 16
    new_tokens: int = 48
    seed: int = 0
    """Of the first prompt's texts; the second's draw from the next one, and so on."""
    batch: int = 256
    """Texts at a time."""
    steers_teacher: bool = True

    def __post_init__(self):
        problems = [
            f"--{name.replace('_', '-')} {value} must be 1 or more."
            for name in ("prompts", "prompt_tokens", "new_tokens", "batch")
            if (value := getattr(self, name)) < 1
        ]
        if isinstance(self.concepts, int) and self.concepts < 1:
            problems.append(f"--concepts {self.concepts} must be 1 or more, or ids such as 12,40,77.")
        if not 0 <= self.seed <= MOST_SEED:
            problems.append(f"--seed {self.seed} must be from 0 to {MOST_SEED}.")
        for scale in self.scales:
            if not abs(scale) <= MOST:
                problems.append(f"--scales {scale:g}: a scale is from {-MOST:g} to {MOST:g}.")
        if problems:
            raise UserError(*problems)

    @property
    def seeds(self) -> list[int]:
        """Of the texts of each prompt."""
        return [(self.seed + prompt) % (MOST_SEED + 1) for prompt in range(self.prompts)]


def parse_concepts(text: str) -> int | tuple[int, ...]:
    """`50`: how many. `12,40,77`: which; of one alone `12,`. Raises UserError."""
    try:
        ids = tuple(int(part) for part in text.split(",") if part.strip()) if text.isascii() else ()
    except ValueError:
        ids = ()
    if not ids:
        raise UserError(f"--concepts {text} is neither a number of concepts nor ids such as 12,40,77.")
    return tuple(dict.fromkeys(ids)) if "," in text else ids[0]


def parse_scales(text: str) -> tuple[float, ...]:
    """`-4,0,8`, in ascending order. Raises UserError."""
    try:
        scales = sorted({float(part) for part in text.split(",")})
    except ValueError:
        raise UserError(f"--scales {text} is no list of numbers such as -4,0,8.") from None
    return tuple(scales)


Decoder = Callable[..., Iterator[list[Step | None]]]
"""`decode` or `decode_teacher`, of a model."""


def measure_steering(
    folder: str | Path,
    settings: CurveSettings,
    data: str | None = None,
    teacher: str | None = None,
    sae: str | None = None,
    out: str | None = None,
) -> dict:
    """Steer the model in `folder`, on prompts of `data` (default: its config's data.valid), judged by the teacher of
    its config or by `teacher` and `sae`. → The result as its JSON file has it, and `file`: FILE.json, beside which
    stand FILE.png and FILE.svg. Raises UserError.

    The file is `out`, which must not be there yet, or of a run RUN/evals/steering/STEP.json, which is replaced."""
    if out:
        _check_out(Path(out))
    student = open_model(folder)
    check_mixes_concepts(student)
    if not out and checkpoint_step(student.path) is None:
        raise UserError(f"{student.path} is no checkpoint in its run: say where the result goes, --out FILE.json.")
    source = open_teacher_labels(student, teacher, sae)
    if source is None:
        raise UserError(f"{student.path} has no teacher to judge its texts: give --teacher DIR --sae FILE.")
    _check_length(student, source, settings)
    data = data or (student.config.data.valid if student.config else None)
    if data is None:
        raise UserError(f"{student.path} does not say what it was validated on: give --data PATH.")
    shards = TokenShards.open(data)
    reader = str(student.path), student.tokenizer.sha256
    if problems := tokenizer_mismatches(reader, (data, shards.tokenizer_sha256)):
        raise UserError(*problems)
    dataset = TokenDataset(shards, student.context, None)
    if settings.prompts > dataset.num_windows:
        raise UserError(
            f"--prompts {settings.prompts}: {data} holds {dataset.num_windows} windows of {student.context} tokens. "
            f"Nearest valid: {dataset.num_windows}."
        )
    prompts = _windows(student, dataset, settings.prompts, data)[:, : settings.prompt_tokens].tolist()
    share_C = _kept_share(student, _windows(student, dataset, COUNTED_WINDOWS, data))
    concepts = _choose(student, settings.concepts, share_C)
    promoted = promoted_tokens(student, concepts).top_index
    labeler = source.labeler
    sides: dict[str, Decoder] = {"student": partial(decode, student)}
    if settings.steers_teacher:
        sides["teacher"] = partial(decode_teacher, labeler.teacher, labeler.sae, student.tokenizer)
    text = student.tokenizer.decode
    result = {
        "format": FORMAT,
        "version": VERSION,
        "model": str(student.path),
        "sha256": student.sha256,
        "teacher": {"model": source.model, "sha256": labeler.teacher.sha256, "sae": source.sae},
        "data": data,
        "data_fingerprint": shards.fingerprint,
        "settings": asdict(settings) | {"at": "decoded", "temperature": 1.0, "seeds": settings.seeds},
        "prompts": prompts,
        "concepts": [
            {
                "id": concept,
                "kept_share": float(share_C[concept]),
                "promotes": [text([token]) for token in row.tolist()],
            }
            for concept, row in zip(concepts, promoted, strict=True)
        ],
        "measured": {},
        "example": {"concept": concepts[0], "scale": settings.scales[-1], "prompt": text(prompts[0])},
        "seconds": {},
    }
    result["teacher"]["sae_sha256"] = labeler.sae.sha256
    for side, decoder in sides.items():
        start = time.perf_counter()
        texts = continue_texts(decoder, prompts, concepts, settings, f"steering the {side}")
        sums = judge(labeler.teacher, labeler.sae, student.tokenizer.vocab_size, prompts, texts, concepts, promoted)
        result["measured"][side] = summarise(sums, settings.scales)
        first = 1 + (len(settings.scales) - 1) * len(concepts)
        chosen = {"unsteered": texts[0], "steered": texts[first * settings.prompts]}
        result["example"][side] = {name: text(each.tokens) for name, each in chosen.items()}
        result["seconds"][side] = round(time.perf_counter() - start, 1)
    # Not in evals/ itself, where every file is a perplexity.
    file = Path(out) if out else student.path.parents[1] / "evals" / "steering" / f"{student.path.name}.json"
    write_json(file, result)
    save(draw(result), file)
    return result | {"file": str(file)}


def continue_texts(
    decoder: Decoder, prompts: list[list[int]], concepts: list[int], settings: CurveSettings, what: str
) -> list[Text]:
    """A text for each setting and prompt, settings in the order of `Sums`."""
    edits = [None, *(Edit(concept, scale) for scale in settings.scales for concept in concepts)]
    rows = [(edit, prompt) for edit in edits for prompt in range(len(prompts))]
    sampling, found, asked = Sampling(settings.new_tokens), [], set(concepts)
    with tqdm(total=len(rows) * settings.new_tokens, unit=" tokens", unit_scale=True, desc=what, disable=None) as bar:
        for start in range(0, len(rows), settings.batch):
            batch = rows[start : start + settings.batch]
            texts = [Text([], [], Counter()) for _ in batch]
            steps_of_all = decoder(
                [prompts[prompt] for _, prompt in batch],
                sampling,
                [[edit] if edit else [] for edit, _ in batch],
                place=settings.place,
                seeds=[settings.seeds[prompt] for _, prompt in batch],
            )
            for steps in steps_of_all:
                for text, step in zip(texts, steps, strict=True):
                    if step is not None:
                        text.tokens.append(step.token)
                        text.kl.append(step.kl)
                        text.kept.update(concept for concept, _ in step.kept if concept in asked)
                bar.update(len(batch))
            found += texts
    return found


def _check_out(file: Path) -> None:
    if file.suffix != ".json":
        raise UserError(f"--out {file} must end in .json; a PNG and an SVG of the same name stand beside it.")
    for each in (file, file.with_suffix(".png"), file.with_suffix(".svg")):
        if each.exists():
            raise UserError(f"--out {file}: {each} exists already: choose another name or delete it.")


def _check_length(student: OpenModel, source: TeacherLabels, settings: CurveSettings) -> None:
    context = min(student.context, source.labeler.teacher.context)
    if settings.prompt_tokens + settings.new_tokens > context:
        raise UserError(
            f"--prompt-tokens {settings.prompt_tokens} and --new-tokens {settings.new_tokens} are "
            f"{settings.prompt_tokens + settings.new_tokens} tokens together. Nearest valid: {context}, the most that "
            "student and teacher read."
        )


def _windows(student: OpenModel, dataset: TokenDataset, most: int, data: str) -> np.ndarray:
    """At most so many held-out windows, evenly spaced, int64 [B, T]."""
    count = min(most, dataset.num_windows)
    tokens_BT = dataset.batch([index * dataset.num_windows // count for index in range(count)])
    check_token_ids(tokens_BT, student.tokenizer.vocab_size, data)
    return tokens_BT


@torch.no_grad()
def _kept_share(student: OpenModel, windows_BT: np.ndarray) -> np.ndarray:
    """Of all concepts, the share of the windows' slots at which the student keeps them, [concepts]."""
    num_concepts = student.model.config.num_concepts
    count, num_slots = torch.zeros(num_concepts, dtype=torch.int64), 0
    has_slot_T = student.has_slot(torch.arange(student.context))
    group = max(1, FORWARD_TOKENS[student.device.type] // student.context)
    for tokens_GT in torch.from_numpy(windows_BT).split(group):
        with kept_concepts(student.model) as found:
            student.model(tokens_GT.to(student.device), use_cache=False, logits_to_keep=1)
        value_GTK, index_GTK = found[0]
        if not value_GTK.isfinite().all():
            raise UserError(f"{student.path} predicts concepts with logits that are not finite: it diverged.")
        index_NK = index_GTK.cpu()[:, has_slot_T].flatten(0, 1)
        count += index_NK.flatten().bincount(minlength=num_concepts)
        num_slots += len(index_NK)
    return (count / num_slots).numpy()


def _choose(student: OpenModel, asked: int | tuple[int, ...], share_C: np.ndarray) -> list[int]:
    """Which concepts are steered: those asked for, or as many as are kept at all, most often kept first."""
    if isinstance(asked, int):
        return [int(concept) for concept in np.argsort(-share_C, kind="stable")[:asked] if share_C[concept] > 0]
    if wrong := [concept for concept in asked if not 0 <= concept < len(share_C)]:
        valid = f"{student.path} has concepts 0 … {len(share_C) - 1}"
        raise UserError(*(f"--concepts {each}: {valid}." for each in wrong))
    return list(asked)
