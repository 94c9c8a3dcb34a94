"""Measures how well steering works, over many concepts and scales: does the text follow the concept, and how much
fluency is lost? The paper shows only five examples (§3.2).

The student writes texts from the same prompts and seeds: unsteered, and with each concept steered by each scale. The
teacher writes them too, steered by the same edits in its own latents, as a bound on what steering can achieve.
steering_judge.py measures the texts.
"""

import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from megacocomix.checkpoint.format import checkpoint_step
from megacocomix.compare.plots import save
from megacocomix.data.check import check_tokens
from megacocomix.data.tokens import TokenDataset, check_token_ids
from megacocomix.errors import UserError
from megacocomix.evaluation.perplexity import open_held_out
from megacocomix.files import check_absent, write_json
from megacocomix.hf.open import OpenModel, check_mixes_concepts, open_model
from megacocomix.interpret.concepts import promoted_tokens
from megacocomix.interpret.decode import MOST_SEED, Sampling
from megacocomix.interpret.steering import MOST, Edit, Place, kept_concepts
from megacocomix.interpret.steering_judge import Text, judge, summarise
from megacocomix.interpret.steering_plot import draw
from megacocomix.interpret.teacher_labels import TeacherLabels, open_teacher_labels
from megacocomix.interpret.teacher_steering import Decode, decoders
from megacocomix.teacher.labels import FORWARD_TOKENS

FORMAT, VERSION = "megacocomix-steering", 1
COUNTED_WINDOWS = 64
"""Held-out windows on which concepts are counted, evenly spaced. If there are fewer, all of them."""


@dataclass(frozen=True)
class CurveSettings:
    """Which concepts are steered, and how. Raises one UserError with a line for each invalid value."""

    concepts: int | tuple[int, ...] = 50
    """A number of concepts, those that the student keeps most often; or their ids."""
    scales: tuple[float, ...] = (-10.0, -4.0, 0.0, 2.0, 4.0, 8.0, 10.0)
    place: Place = "before"
    prompts: int = 6
    prompt_tokens: int = 16
    new_tokens: int = 48
    seed: int = 0
    """Seed of the first prompt's texts. The texts of each further prompt have the next seed."""
    batch: int = 256
    """Texts that are decoded together."""
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
        """The seed of each prompt's texts."""
        return [(self.seed + prompt) % (MOST_SEED + 1) for prompt in range(self.prompts)]


def parse_concepts(text: str) -> int | tuple[int, ...]:
    """`50` is a number of concepts, `12,40,77` are ids; `12,` is a single id. Raises UserError."""
    try:
        ids = tuple(int(part) for part in text.split(",") if part.strip()) if text.isascii() else ()
    except ValueError:
        ids = ()
    if not ids:
        raise UserError(f"--concepts {text} is neither a number of concepts nor ids such as 12,40,77.")
    return tuple(dict.fromkeys(ids)) if "," in text else ids[0]


def parse_scales(text: str) -> tuple[float, ...]:
    """`8,-4,0` → (-4, 0, 8), in ascending order. Raises UserError."""
    try:
        scales = sorted({float(part) for part in text.split(",")})
    except ValueError:
        raise UserError(f"--scales {text} is no list of numbers such as -4,0,8.") from None
    return tuple(scales)


def measure_steering(
    folder: str | Path,
    settings: CurveSettings,
    data: str | None = None,
    teacher: str | None = None,
    sae: str | None = None,
    out: str | None = None,
    data_dtype: str | None = None,
) -> dict:
    """Steer the model in `folder` on prompts from `data` (default: its config's data.valid; `data_dtype` is the type of
    ids in a file without a header). The judge is the teacher of its config, or `teacher` and `sae`. Returns the content
    of the JSON file, and `file`, its path. FILE.png and FILE.svg are written beside it. Raises UserError.

    The file is `out`, which must not exist, or for a run RUN/evals/steering/STEP.json, which is replaced."""
    if out:
        _check_out(Path(out))
    student = open_model(folder)
    check_mixes_concepts(student)
    if not out and checkpoint_step(student.path) is None:
        raise UserError(f"{student.path} is no checkpoint in a run: give a file for the result, --out FILE.json.")
    source = open_teacher_labels(student, teacher, sae)
    if source is None:
        raise UserError(f"{student.path} has no teacher to judge its texts: give --teacher DIR --sae FILE.")
    _check_length(student, source, settings)
    shards, data = open_held_out(student.path, student.config, data, data_dtype)
    check_tokens(data, shards, student.vocab_size, (str(student.path), student.tokenizer))
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
    labeler, text = source.labeler, student.tokenizer.decode
    result = {
        "format": FORMAT,
        "version": VERSION,
        "model": str(student.path),
        "sha256": student.sha256,
        "teacher": {
            "model": source.model,
            "sha256": labeler.teacher.sha256,
            "sae": source.sae,
            "sae_sha256": labeler.sae.sha256,
        },
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
    for side, decode in decoders(student, source if settings.steers_teacher else None).items():
        start = time.perf_counter()
        texts = continue_texts(decode, prompts, concepts, settings, f"steering the {side}")
        sums = judge(labeler.teacher, labeler.sae, student.tokenizer.vocab_size, prompts, texts, concepts, promoted)
        result["measured"][side] = summarise(sums, settings.scales)
        first = 1 + (len(settings.scales) - 1) * len(concepts)
        chosen = {"unsteered": texts[0], "steered": texts[first * settings.prompts]}
        result["example"][side] = {name: text(each.tokens) for name, each in chosen.items()}
        result["seconds"][side] = round(time.perf_counter() - start, 1)
    # Not in evals/ itself, where every file is a validation loss.
    file = Path(out) if out else student.path.parents[1] / "evals" / "steering" / f"{student.path.name}.json"
    write_json(file, result)
    save(draw(result), file)
    return result | {"file": str(file)}


def continue_texts(
    decode: Decode, prompts: list[list[int]], concepts: list[int], settings: CurveSettings, what: str
) -> list[Text]:
    """A text for each setting and prompt. Settings are in the order of `Sums`."""
    edits = [None, *(Edit(concept, scale) for scale in settings.scales for concept in concepts)]
    rows = [(edit, prompt) for edit in edits for prompt in range(len(prompts))]
    sampling, found, steered = Sampling(settings.new_tokens), [], set(concepts)
    with tqdm(total=len(rows) * settings.new_tokens, unit=" tokens", unit_scale=True, desc=what, disable=None) as bar:
        for start in range(0, len(rows), settings.batch):
            batch = rows[start : start + settings.batch]
            texts = [Text([], [], Counter()) for _ in batch]
            batch_prompts = [prompts[prompt] for _, prompt in batch]
            batch_edits = [[edit] if edit else [] for edit, _ in batch]
            seeds = [settings.seeds[prompt] for _, prompt in batch]
            for steps in decode(batch_prompts, sampling, batch_edits, settings.place, seeds=seeds):
                for text, step in zip(texts, steps, strict=True):
                    if step:
                        text.tokens.append(step.token)
                        text.kl.append(step.kl)
                        text.kept.update(concept for concept, _ in step.kept if concept in steered)
                bar.update(len(batch))
            found += texts
    return found


def _check_out(file: Path) -> None:
    if file.suffix != ".json":
        raise UserError(f"--out {file} must end in .json; a PNG and an SVG of the same name are written beside it.")
    for suffix in (".json", ".png", ".svg"):
        check_absent(file.with_suffix(suffix))


def _check_length(student: OpenModel, source: TeacherLabels, settings: CurveSettings) -> None:
    context = min(student.context, source.labeler.teacher.context)
    if settings.prompt_tokens + settings.new_tokens > context:
        raise UserError(
            f"--prompt-tokens {settings.prompt_tokens} and --new-tokens {settings.new_tokens} are "
            f"{settings.prompt_tokens + settings.new_tokens} tokens together. Nearest valid: {context}, the most that "
            "both student and teacher read."
        )


def _windows(student: OpenModel, dataset: TokenDataset, most: int, data: str) -> np.ndarray:
    """At most `most` held-out windows, evenly spaced, int64 [B, T]."""
    count = min(most, dataset.num_windows)
    tokens_BT = dataset.batch([index * dataset.num_windows // count for index in range(count)])
    check_token_ids(tokens_BT, student.tokenizer.vocab_size, data)
    return tokens_BT


@torch.no_grad()
def _kept_share(student: OpenModel, windows_BT: np.ndarray) -> np.ndarray:
    """The share of the windows' slots at which the student keeps each concept, [C]."""
    num_concepts = student.model.config.num_concepts
    count, num_slots = torch.zeros(num_concepts, dtype=torch.int64), 0
    has_slot_T = student.has_slot(torch.arange(student.context))
    group = max(1, FORWARD_TOKENS[student.device.type] // student.context)
    for tokens_GT in torch.from_numpy(windows_BT).split(group):
        with kept_concepts(student.model) as found:
            student.model(tokens_GT.to(student.device), use_cache=False, logits_to_keep=1)
        value_GTK, index_GTK = found[0]
        if not value_GTK.isfinite().all():
            raise UserError(f"{student.path} predicts concepts with logits that are not finite: its training diverged.")
        index_NK = index_GTK.cpu()[:, has_slot_T].flatten(0, 1)
        count += index_NK.flatten().bincount(minlength=num_concepts)
        num_slots += len(index_NK)
    return (count / num_slots).numpy()


def _choose(student: OpenModel, wanted: int | tuple[int, ...], share_C: np.ndarray) -> list[int]:
    """The concepts to steer: the given ids, or at most the given number of concepts, most often kept first, without
    concepts that are never kept."""
    if isinstance(wanted, int):
        return [int(concept) for concept in np.argsort(-share_C, kind="stable")[:wanted] if share_C[concept] > 0]
    if wrong := [concept for concept in wanted if not 0 <= concept < len(share_C)]:
        valid = f"{student.path} has concepts 0 … {len(share_C) - 1}"
        raise UserError(*(f"--concepts {each}: {valid}." for each in wrong))
    return list(wanted)
