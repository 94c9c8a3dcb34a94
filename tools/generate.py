#!/usr/bin/env python
"""Generate text with a run, a checkpoint or a Hugging Face folder, and steer its predicted concepts.

    python tools/generate.py runs/tiny --prompt "The capital of"
    python tools/generate.py runs/tiny --prompt "The capital of" --steer 12=8 --steer 40=min:6
    python tools/generate.py runs/tiny --prompt "The capital of" --steer 12=8 --side-by-side
    python tools/generate.py runs/tiny --prompts prompts.txt --samples 4 --out texts.jsonl

--steer ID=SCALE multiplies the logit of a predicted concept (-10 to 10, as in the paper); ID=set:LOGIT, ID=min:LOGIT
and ID=max:LOGIT set and clamp it. The effect is printed below the text: how far the next-token distribution moved from
the unsteered one at each step, and whether the model kept the concept."""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from megacocomix.errors import UserError, run_cli
from megacocomix.files import check_absent

if TYPE_CHECKING:
    from megacocomix.interpret.decode import Sampling
    from megacocomix.interpret.generation import Decoder, Text

PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {127: 0x2421}
PICTURES |= dict.fromkeys([*range(0x80, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)], "·")
"""Control characters → visible characters that are printed instead."""


def main() -> None:
    """Parse the command line, decode, print or write."""
    options = parse()
    if options.out:
        check_absent(options.out)
    for name in ("samples", "batch"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} {getattr(options, name)} is not at least 1.")
    if not options.steer and (needless := options.side_by_side or options.place or options.at):
        name = "--side-by-side" if needless is True else "--place" if options.place else "--at"
        raise UserError(f"{name} needs a steered text: give --steer ID=SCALE.")
    if (options.teacher or options.sae or options.steer_teacher) and not options.side_by_side:
        raise UserError("--teacher, --sae and --steer-teacher are for --side-by-side.")
    from megacocomix.interpret.decode import Sampling
    from megacocomix.interpret.generation import check_text, read_prompts

    if options.prompt is not None:
        check_text(options.prompt, "--prompt")
    prompts = [options.prompt] if options.prompt is not None else read_prompts(options.prompts)
    sampling = Sampling(
        options.max_new_tokens, options.temperature, options.top_k, options.top_p, options.min_p, options.seed
    )
    generate(options, prompts, sampling)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="RUN|FOLDER", help="a run, a native checkpoint or a Hugging Face folder")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", metavar="TEXT", help="text to continue; '' begins a document")
    source.add_argument("--prompts", type=Path, metavar="FILE", help="a prompt per line, or .jsonl with a field prompt")
    parser.add_argument("--samples", type=int, default=1, metavar="N", help="texts for each prompt (default 1)")
    parser.add_argument("--batch", type=int, default=8, metavar="N", help="texts decoded together (default 8)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the texts to this JSONL file instead of stdout")
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="(default 64)")
    sampling.add_argument("--temperature", type=float, default=1.0, metavar="X", help="0: greedy (default 1)")
    sampling.add_argument("--top-k", type=int, default=0, metavar="N", help="draw from the N most probable; 0: all")
    sampling.add_argument("--top-p", type=float, default=1.0, metavar="P", help="draw from the top that add up to P")
    sampling.add_argument("--min-p", type=float, default=0.0, metavar="P", help="draw from those ≥ P × the largest")
    sampling.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the first text; then N+1, …")
    steering = parser.add_argument_group("steering")
    steering.add_argument("--steer", action="append", default=[], metavar="ID=SCALE", help="edit; may be repeated")
    steering.add_argument("--place", choices=("before", "after"), help="edit before/after selection (default before)")
    steering.add_argument(
        "--at",
        metavar="decoded|all|LIST",
        help="steered tokens: from the prompt's last one on (default), all, or positions such as 0,4-9, from 0 at "
        "the first token that is read",
    )
    steering.add_argument("--side-by-side", action="store_true", help="also unsteered, and both by the teacher")
    steering.add_argument(
        "--steer-teacher", action="append", metavar="ID=SCALE", help="the teacher's (default: --steer)"
    )
    steering.add_argument("--teacher", metavar="DIR", help="teacher of a folder that does not record it; with --sae")
    steering.add_argument("--sae", metavar="FILE", help="autoencoder of --teacher")
    return parser.parse_args()


def generate(options: argparse.Namespace, prompts: list[str], sampling: "Sampling") -> None:
    """Decode in batches, and print or write each text. A single text is streamed."""
    from megacocomix.hf.open import check_is_cocomix, check_mixes_concepts, open_model
    from megacocomix.interpret.decode import fit_prompt
    from megacocomix.interpret.generation import Decoder, Text, parse_at
    from megacocomix.interpret.steering import parse_edits
    from megacocomix.interpret.teacher_labels import open_teacher_labels

    student = open_model(options.model)
    check_mixes_concepts(student) if options.steer else check_is_cocomix(student)
    at = parse_at(options.at or "decoded", student.context)
    num_concepts = student.model.config.num_concepts
    edits = parse_edits(options.steer, num_concepts)
    teacher_edits = parse_edits(options.steer_teacher or options.steer, num_concepts)
    source = open_teacher_labels(student, options.teacher, options.sae) if options.side_by_side else None
    if options.side_by_side and source is None:
        raise UserError(f"{options.model} does not record its teacher: give --teacher DIR --sae FILE.")
    context = min(student.context, source.labeler.teacher.context) if source else student.context
    encoded, eot_id = student.tokenizer.encode_batch(prompts), student.tokenizer.eot_id
    fitted = [fit_prompt(ids, context, sampling.max_new_tokens, eot_id) for ids in encoded]
    if num_truncated := sum(num_dropped > 0 for _, num_dropped in fitted):
        print(
            f"{num_truncated} of {len(prompts)} prompts do not fit the context of {context} tokens together with "
            f"{sampling.max_new_tokens} new ones: only their ends are read.",
            file=sys.stderr,
        )
    decoder = Decoder(student, source, sampling, options.place or "before", at)
    kinds = [("student", edits)]
    if options.side_by_side:
        kinds = [("student", []), ("student", edits), ("teacher", []), ("teacher", teacher_edits)]
    # Each sample of each prompt has its own seed.
    samples = [sample for sample in zip(prompts, fitted, strict=True) for _ in range(options.samples)]
    texts = [
        Text(prompt, ids, num_dropped, by, (sampling.seed + index) % 2**63, text_edits)
        for index, (prompt, (ids, num_dropped)) in enumerate(samples)
        for by, text_edits in kinds
    ]
    if options.out:
        write(options, decoder, texts)
    elif len(texts) == 1:
        show_streamed(decoder, texts[0])
    else:
        for batch in decoded_batches(options, decoder, texts):
            for text in batch:
                show(decoder, text)


def decoded_batches(options: argparse.Namespace, decoder: "Decoder", texts: list["Text"]) -> Iterator[list["Text"]]:
    """The texts in batches, each after it is decoded."""
    for start in range(0, len(texts), options.batch):
        batch = texts[start : start + options.batch]
        for _ in decoder.run(batch):
            pass
        yield batch


def write(options: argparse.Namespace, decoder: "Decoder", texts: list["Text"]) -> None:
    """Write a line per text as soon as its batch is done, to FILE.partial. FILE appears once all texts are written. A
    failure keeps FILE.partial."""
    from tqdm import tqdm

    options.out.parent.mkdir(parents=True, exist_ok=True)
    partial, num_done = options.out.with_name(options.out.name + ".partial"), 0
    try:
        with open(partial, "w") as file, tqdm(total=len(texts), unit="text", disable=None) as progress:
            for batch in decoded_batches(options, decoder, texts):
                for text in batch:
                    line = {"model": str(decoder.student.path)} | decoder.record(text)
                    file.write(json.dumps(line, allow_nan=False) + "\n")
                file.flush()
                num_done += len(batch)
                progress.update(len(batch))
    except BaseException:
        print(f"{num_done} of {len(texts)} texts are in {partial}", file=sys.stderr)
        raise
    partial.rename(options.out)
    print(f"{len(texts)} texts written to {options.out}")


def show_streamed(decoder: "Decoder", text: "Text") -> None:
    """Print a text while it grows, then the effect of steering."""
    from megacocomix.interpret.token_text import TextStream

    stream = TextStream(decoder.student.tokenizer, text.ids)
    show_text(text.prompt, end="")
    for _ in decoder.run([text]):
        if not text.steps[-1].is_end:
            show_text(stream.push(text.steps[-1].token), end="")
    show_text(stream.flush())
    for line in decoder.effect(text):
        show_text(line)


def show(decoder: "Decoder", text: "Text") -> None:
    """Print a finished text under a heading, then the effect of steering."""
    steered = f", steered {' '.join(map(str, text.edits))}" if text.edits else ""
    show_text(f"== {text.by}, seed {text.seed}{steered}")
    show_text(text.prompt + decoder.record(text)["text"])
    for line in decoder.effect(text):
        show_text(line)


def show_text(text: str, end: str = "\n") -> None:
    """Print a model's text. Control characters become visible, so that the terminal does not obey them."""
    print(text.translate(PICTURES), end=end, flush=True)


if __name__ == "__main__":
    run_cli(main)
