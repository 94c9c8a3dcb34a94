#!/usr/bin/env python
"""Serve the page of a model's concepts together with the model: text is generated with steering sliders and streamed.

    python tools/serve.py runs/tiny --text notes.txt
    python tools/serve.py runs/tiny --inspection concepts.json --host 0.0.0.0

The page shows an inspection that tools/inspect_concepts.py --out wrote for the same weights, or reads --text now.
On 127.0.0.1 everyone on this machine can use it. Any other --host requires a token, which is in the printed address.
There is no encryption: use an SSH tunnel or a proxy if others can read the network traffic.

Ctrl-C or SIGTERM stops it. Exit codes: 0 stopped this way, 2 an error of the user."""

import argparse
import asyncio
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from megacocomix.errors import UserError, run_cli


def main() -> None:
    """Parse the command line, open the model, read the text, serve."""
    options = parse()
    check(options)

    from megacocomix.hf.open import check_has_concepts, open_model
    from megacocomix.interpret.inspection import inspect_files, read_inspection
    from megacocomix.interpret.live import Limits
    from megacocomix.interpret.page import render
    from megacocomix.interpret.server import address, choose_token, listen, make_app, serve

    listener = listen(options.host, options.port)
    token = choose_token(options.token, listener)
    record = read_inspection(options.inspection) if options.inspection else None
    student = open_model(options.model)
    check_has_concepts(student)
    if record is None:
        record = inspect_files(student, options)
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
    asyncio.run(serve(app, listener, lambda: print(f"{where} (Ctrl-C stops it)", flush=True)))


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="RUN|FOLDER", help="a run, a native checkpoint or an exported folder")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--text", nargs="+", metavar="FILE", help="text, of any kind that tools/prepare_data.py reads")
    source.add_argument("--inspection", metavar="FILE.json", help="output of tools/inspect_concepts.py --out")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1; 0.0.0.0: all)")
    parser.add_argument("--port", type=int, default=8080, help="(default 8080; 0: any free port)")
    parser.add_argument("--token", help="token to require (default: a new one; none on 127.0.0.1)")
    parser.add_argument(
        "--max-new-tokens", type=int, default=256, metavar="N", help="most tokens of one text (default 256)"
    )
    text = parser.add_argument_group("reading --text")
    text.add_argument("--tokens", type=int, metavar="N", help="tokens read at most (default 65536)")
    text.add_argument("--shown", type=int, metavar="N", help="tokens shown one by one (default 4096)")
    text.add_argument(
        "--teacher", metavar="DIR", help="teacher that the folder does not record, or that moved; with --sae"
    )
    text.add_argument("--sae", metavar="FILE", help="autoencoder of --teacher")
    text.add_argument("--no-teacher", action="store_true", default=None, help="read without the teacher")
    text.add_argument("--names", metavar="FILE", help="your own names, YAML or JSON, such as 12: website")
    parser.set_defaults(field="text")
    return parser.parse_args()


def check(options: argparse.Namespace) -> None:
    """Check the options before anything is loaded, and set the defaults of those for --text. Raises UserError."""
    of_text = ("tokens", "shown", "names", "teacher", "sae", "no_teacher")
    if options.inspection and (given := [name for name in of_text if getattr(options, name) is not None]):
        raise UserError(f"--{given[0].replace('_', '-')} is for --text: --inspection was read before.")
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


if __name__ == "__main__":
    run_cli(main)
