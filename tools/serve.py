#!/usr/bin/env python
"""Serve the page of a model's concepts, with the model behind it: generation with steering sliders, streamed.

    python tools/serve.py runs/tiny --text notes.txt
    python tools/serve.py runs/tiny --inspection concepts.json --host 0.0.0.0

The page shows what tools/inspect_concepts.py --out wrote of the same weights, or what is read of --text now.
On 127.0.0.1 anybody on this machine can use it. Any other --host asks for a token, which stands in the address that is
printed; there is no encryption, so put it behind an SSH tunnel or a proxy where others can listen.

Ctrl-C or SIGTERM ends it. Exit codes: 0 ended so, 2 a mistake to mend."""

import argparse
import asyncio
import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from megacocomix.errors import UserError, run_cli

if TYPE_CHECKING:
    from megacocomix.hf.open import OpenModel

if TYPE_CHECKING:
    pass


def main() -> None:
    """Parse the command line, open the model, read the text, serve."""
    options = parse()
    check(options)

    from megacocomix.hf.open import check_has_concepts, open_model
    from megacocomix.interpret.inspection import read_inspection
    from megacocomix.interpret.live import Limits
    from megacocomix.interpret.page import render
    from megacocomix.interpret.server import address, choose_token, listen, make_app, serve

    listener = listen(options.host, options.port)
    token = choose_token(options.token, listener)
    record = read_inspection(options.inspection) if options.inspection else None
    student = open_model(options.model)
    check_has_concepts(student)
    if record is None:
        record = inspect_text(student, options)
    elif record["sha256"] != student.sha256:
        raise UserError(
            f"--inspection {options.inspection} is of {record['model']} (SHA-256 {record['sha256'][:12]}…), not of "
            f"{student.path} ({student.sha256[:12]}…): make it again with tools/inspect_concepts.py --out."
        )
    limits = Limits(options.max_new_tokens)
    live = {
        "context": student.context,
        "max_new_tokens": limits.most_new_tokens(student),
        "num_concepts": student.model.config.num_concepts,
    }
    app = make_app(student, render(record, live), token, limits)
    where = f"serving {student.path} at {address(listener, token)}"
    asyncio.run(serve(app, listener, lambda: print(f"{where} (Ctrl-C ends it)", flush=True)))


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="RUN|FOLDER", help="a run, a checkpoint of ours or an exported folder")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--text", nargs="+", metavar="FILE", help="read this: .txt, .jsonl, .jsonl.gz, .parquet")
    source.add_argument("--inspection", metavar="FILE.json", help="what tools/inspect_concepts.py --out wrote")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; default 127.0.0.1, 0.0.0.0: all")
    parser.add_argument("--port", type=int, default=8080, help="default 8080; 0: any that is free")
    parser.add_argument("--token", help="to ask for; default: a new one, and none on 127.0.0.1")
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="of one text; default 256")
    text = parser.add_argument_group("reading --text")
    text.add_argument("--tokens", type=int, metavar="N", help="tokens read at most (default 65536)")
    text.add_argument("--shown", type=int, metavar="N", help="tokens shown one by one (default 4096)")
    text.add_argument("--teacher", metavar="DIR", help="where the folder does not say it, or it moved; with --sae")
    text.add_argument("--sae", metavar="FILE", help="autoencoder of --teacher")
    text.add_argument(
        "--no-teacher", action="store_true", default=None, help="read the student alone, without its teacher's labels"
    )
    text.add_argument("--names", metavar="FILE", help="names of your own, YAML or JSON, such as 12: website")
    return parser.parse_args()


def check(options: argparse.Namespace) -> None:
    """Everything that can be said before anything is loaded; and the defaults of what is for --text alone."""
    of_text = ("tokens", "shown", "names", "teacher", "sae", "no_teacher")
    if options.inspection and (given := [name for name in of_text if getattr(options, name) is not None]):
        raise UserError(f"--{given[0].replace('_', '-')} is for --text: --inspection shows what was read before.")
    options.tokens = 65536 if options.tokens is None else options.tokens
    options.shown = 4096 if options.shown is None else options.shown
    problems = [
        f"--{name.replace('_', '-')} {getattr(options, name)} must be 1 or more."
        for name in ("max_new_tokens", "tokens", "shown")
        if getattr(options, name) < 1
    ]
    if options.no_teacher and (options.teacher or options.sae):
        problems.append("--no-teacher goes with neither --teacher nor --sae.")
    if problems:
        raise UserError(*problems)


def inspect_text(student: "OpenModel", options: argparse.Namespace) -> dict:
    """The inspection record of --text."""
    from megacocomix.interpret.inspection import inspect
    from megacocomix.interpret.names import read_names
    from megacocomix.interpret.reading import cut_windows, read_windows
    from megacocomix.interpret.teacher_labels import ALONE, open_teacher_labels, teacher_labels_notes

    names = read_names(options.names, student.model.config.num_concepts) if options.names else {}
    windows = cut_windows(student, options.text, options.tokens)
    source = None if options.no_teacher else open_teacher_labels(student, options.teacher, options.sae, ALONE)
    for note in windows.notes + ([] if options.no_teacher else teacher_labels_notes(student, source)):
        print(f"note: {note}", flush=True)
    return inspect(student, read_windows(student, windows, source), names, options.shown)


if __name__ == "__main__":
    run_cli(main)
