#!/usr/bin/env python
"""Text from a run, a checkpoint or a Hugging Face folder, with its predicted concepts turned where you like.

    python tools/generate.py runs/tiny --prompt "The capital of"
    python tools/generate.py runs/tiny --prompt "The capital of" --steer 12=8 --steer 40=min:6
    python tools/generate.py runs/tiny --prompt "The capital of" --steer 12=8 --side-by-side
    python tools/generate.py runs/tiny --prompts prompts.txt --samples 4 --out texts.jsonl

--steer ID=SCALE multiplies the logit of a predicted concept (-10 to 10, as in the paper); ID=set:LOGIT, ID=min:LOGIT
and ID=max:LOGIT set and clamp it. Below the text stands what it did: how far the next-token distribution went from the
unsteered one at each step, and whether the concept was among those that the model keeps."""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from megacocomix.errors import UserError, run_cli

if TYPE_CHECKING:
    from megacocomix.interpret.decode import Sampling
    from megacocomix.interpret.generation import Decoder, Text

PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {127: 0x2421}
PICTURES |= dict.fromkeys([*range(0x80, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)], "·")
"""Control characters → what is shown in their place."""


def main() -> None:
    """Parse the command line, decode, print or write."""
    options = parse()
    if options.out and options.out.exists():
        raise UserError(f"--out {options.out} exists already: choose another name or delete it.")
    for name in ("samples", "batch"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} {getattr(options, name)} is not at least 1.")
    if not options.steer and (needless := options.side_by_side or options.place or options.at):
        name = "--side-by-side" if needless is True else "--place" if options.place else "--at"
        raise UserError(f"{name} is about a steered text: give --steer ID=SCALE.")
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
    parser.add_argument("model", metavar="RUN|FOLDER", help="a run, a checkpoint of ours or a Hugging Face folder")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", metavar="TEXT", help="the text to go on from; '' begins a document")
    source.add_argument("--prompts", type=Path, metavar="FILE", help="one a line, or .jsonl with a field prompt")
    parser.add_argument("--samples", type=int, default=1, metavar="N", help="texts for each prompt (default 1)")
    parser.add_argument("--batch", type=int, default=8, metavar="N", help="texts decoded together (default 8)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the texts here, as JSONL, and not to stdout")
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="(default 64)")
    sampling.add_argument("--temperature", type=float, default=1.0, metavar="X", help="0: greedy (default 1)")
    sampling.add_argument("--top-k", type=int, default=0, metavar="N", help="of the N most probable; 0: all")
    sampling.add_argument("--top-p", type=float, default=1.0, metavar="P", help="of those that together have P")
    sampling.add_argument("--min-p", type=float, default=0.0, metavar="P", help="with P times the most probable one's")
    sampling.add_argument("--seed", type=int, default=0, metavar="N", help="of the first text; the next have N+1 … ")
    steering = parser.add_argument_group("steering")
    steering.add_argument("--steer", action="append", default=[], metavar="ID=SCALE", help="may be given several times")
    steering.add_argument("--place", choices=("before", "after"), help="the largest logits are kept (default before)")
    steering.add_argument(
        "--at",
        metavar="decoded|all|LIST",
        help="tokens: from the prompt's last one on (default), all, or positions such as 0,4-9, from 0 at the first "
        "that is read",
    )
    steering.add_argument("--side-by-side", action="store_true", help="unsteered too, and the teacher with both")
    steering.add_argument(
        "--steer-teacher", action="append", metavar="ID=SCALE", help="what to turn there (default: the same)"
    )
    steering.add_argument("--teacher", metavar="DIR", help="where the folder does not say it; with --sae")
    steering.add_argument("--sae", metavar="FILE", help="autoencoder of --teacher")
    return parser.parse_args()


def generate(options: argparse.Namespace, prompts: list[str], sampling: "Sampling") -> None:
    """Decode a batch at a time, print each text or write it; the only text of a command is streamed."""
    from megacocomix.hf.open import check_mixes_concepts, open_model
    from megacocomix.interpret.decode import fit_prompt
    from megacocomix.interpret.generation import Decoder, Text, parse_at
    from megacocomix.interpret.steering import check_distinct, parse_edit
    from megacocomix.interpret.teacher_labels import open_teacher_labels

    student = open_model(options.model)
    if options.steer:
        check_mixes_concepts(student)
    at = parse_at(options.at or "decoded", student.context)
    num_concepts = student.model.config.num_concepts
    edits = [parse_edit(text, num_concepts) for text in options.steer]
    theirs = [parse_edit(text, num_concepts) for text in options.steer_teacher or options.steer]
    check_distinct(edits)
    check_distinct(theirs)
    source = open_teacher_labels(student, options.teacher, options.sae) if options.side_by_side else None
    if options.side_by_side and source is None:
        raise UserError(f"{options.model} does not say its teacher: give --teacher DIR --sae FILE.")
    context = min(student.context, source.labeler.teacher.context) if source else student.context
    encoded, eot_id = student.tokenizer.encode_batch(prompts), student.tokenizer.eot_id
    fitted = [fit_prompt(ids, context, sampling.max_new_tokens, eot_id) for ids in encoded]
    if cut := sum(num_cut > 0 for _, num_cut in fitted):
        print(
            f"{cut} of {len(prompts)} prompts do not fit the context of {context} tokens together with "
            f"{sampling.max_new_tokens} new ones: only their ends are read.",
            file=sys.stderr,
        )
    decoder = Decoder(student, source, sampling, options.place or "before", at)
    kinds = [("student", edits)]
    if options.side_by_side:
        kinds = [("student", []), ("student", edits), ("teacher", []), ("teacher", theirs)]
    texts = [
        Text(prompt, ids, num_cut, by, seed, turned)
        for (prompt, (ids, num_cut), seed) in numbered(prompts, fitted, options.samples, sampling.seed)
        for by, turned in kinds
    ]
    if options.out:
        write(options, decoder, texts)
    elif len(texts) == 1:
        show_streamed(decoder, texts[0])
    else:
        for start in range(0, len(texts), options.batch):
            batch = texts[start : start + options.batch]
            for _ in decoder.run(batch):
                pass
            for text in batch:
                show(decoder, text)


def numbered(prompts: list[str], fitted: list, samples: int, seed: int) -> Iterator[tuple]:
    """Each prompt as often as there are samples of it, every one with a seed of its own."""
    for index, (prompt, fit) in enumerate(zip(prompts, fitted, strict=True)):
        for sample in range(samples):
            yield prompt, fit, (seed + index * samples + sample) % 2**63


def write(options: argparse.Namespace, decoder: "Decoder", texts: list["Text"]) -> None:
    """A line a text, as soon as its batch is done; the file has its name once all are there."""
    from tqdm import tqdm

    options.out.parent.mkdir(parents=True, exist_ok=True)
    partial, num_done = options.out.with_name(options.out.name + ".partial"), 0
    try:
        with open(partial, "w") as file, tqdm(total=len(texts), unit="text", disable=None) as progress:
            for start in range(0, len(texts), options.batch):
                batch = texts[start : start + options.batch]
                for _ in decoder.run(batch):
                    pass
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
    """The text as it grows, then what steering did."""
    from megacocomix.interpret.token_text import TextStream

    stream = TextStream(decoder.student.tokenizer, text.ids)
    say(text.prompt, end="")
    for _ in decoder.run([text]):
        if not text.steps[-1].is_end:
            say(stream.push(text.steps[-1].token), end="")
    say(stream.flush())
    for line in decoder.effect(text):
        say(line)


def show(decoder: "Decoder", text: "Text") -> None:
    """A text that is done, under a line that says whose it is."""
    steered = f", steered {' '.join(map(str, text.edits))}" if text.edits else ""
    say(f"== {text.by}, seed {text.seed}{steered}")
    say(text.prompt + decoder.record(text)["text"])
    for line in decoder.effect(text):
        say(line)


def say(text: str, end: str = "\n") -> None:
    """Print what a model wrote; what a terminal would obey is shown as a picture of it."""
    print(text.translate(PICTURES), end=end, flush=True)


if __name__ == "__main__":
    run_cli(main)
