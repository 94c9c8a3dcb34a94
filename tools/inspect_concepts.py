#!/usr/bin/env python
"""Inspect a model's concepts: read a text with the model and with its teacher, and report for each concept how often it
is kept, how well that agrees with the teacher's labels, where it is strongest, and which tokens it promotes.

python tools/inspect_concepts.py runs/tiny --text assets/corpus/wiki_vital.jsonl.gz --html runs/tiny/concepts.html
python tools/inspect_concepts.py runs/tiny --text notes.txt --no-teacher --concept 12 --concept 40

P@k: of the positions where a concept is among the k largest predicted, the share where the teacher labels it.
R@k: of the positions that the teacher labels with it, the share where it is among the k largest predicted.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from megacocomix.errors import UserError, run_cli

SHARES = ("precision_1", "recall_1", "precision_4", "recall_4")


def main() -> None:
    """Parse the command line, read, inspect, print and write."""
    options = parse()
    check(options)

    from megacocomix.hf.open import check_has_concepts, open_model
    from megacocomix.interpret.inspection import inspect_files, write_inspection

    student = open_model(options.model)
    check_has_concepts(student)
    num_concepts = student.model.config.num_concepts
    if wrong := [concept for concept in options.concept if not 0 <= concept < num_concepts]:
        raise UserError(*(f"--concept {each} is no concept. Valid: 0 … {num_concepts - 1}." for each in wrong))
    record = inspect_files(student, options)
    if options.out:
        write_inspection(options.out, record)
    if options.html:
        from megacocomix.files import write_text
        from megacocomix.interpret.page import render

        write_text(options.html, render(record, None))
    # Printed last, because the reader of a pipe, such as head, may close it early.
    print("\n".join(cards(record, options.concept) if options.concept else table(record, options.top)))
    for file in filter(None, (options.out, options.html)):
        print(f"written to {file}")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="RUN|FOLDER", help="a run, a native checkpoint or an exported folder")
    parser.add_argument(
        "--text", nargs="+", required=True, metavar="FILE", help="any kind that tools/prepare_data.py reads"
    )
    parser.add_argument("--field", default="text", help="field of a row that has the text (default text)")
    parser.add_argument("--tokens", type=int, default=65536, metavar="N", help="tokens read at most (default 65536)")
    parser.add_argument("--shown", type=int, default=4096, metavar="N", help="tokens shown one by one (default 4096)")
    parser.add_argument("--teacher", metavar="DIR", help="teacher of an exported folder, or in place of the config's")
    parser.add_argument("--sae", metavar="FILE", help="autoencoder of --teacher; its latents are the concepts")
    parser.add_argument("--no-teacher", action="store_true", help="read without the teacher")
    parser.add_argument("--names", metavar="FILE", help="your own names, YAML or JSON, such as 12: website")
    parser.add_argument(
        "--concept", type=int, action="append", default=[], metavar="ID", help="print everything about this concept"
    )
    parser.add_argument("--top", type=int, default=20, metavar="N", help="concepts in the table (default 20)")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write everything here")
    parser.add_argument("--html", type=Path, metavar="FILE.html", help="write a page to open in a browser")
    return parser.parse_args()


def check(options: argparse.Namespace) -> None:
    """Check the options before anything is loaded. Raises one UserError with all problems."""
    problems = [
        f"--{name} {getattr(options, name)} must be 1 or more."
        for name in ("tokens", "shown", "top")
        if getattr(options, name) < 1
    ]
    if options.no_teacher and (options.teacher or options.sae):
        problems.append("--no-teacher goes with neither --teacher nor --sae.")
    if options.out and options.out == options.html:
        problems.append(f"--out and --html are both {options.out}: choose two names.")
    for name in ("out", "html"):
        file = getattr(options, name)
        if file and file.exists():
            problems.append(f"--{name} {file} exists already: choose another name or delete it.")
    if problems:
        raise UserError(*problems)
    for file in filter(None, (options.out, options.html)):
        file.parent.mkdir(parents=True, exist_ok=True)


def table(record: dict, num_rows: int) -> Iterator[str]:
    """One line per concept, most often kept first, then the totals."""
    rows = record["concepts"][:num_rows]
    width = max((len(entry["name"]) for entry in rows), default=4)
    yield f"concept     kept    P@1    R@1    P@4    R@4  {'name':{width}}  promotes"
    for entry in rows:
        shares = "".join(f"{percent(entry[key], 0):>7}" for key in SHARES)
        promotes = " ".join(f"‘{shown(token)}’" for token, _ in entry["promotes"][:5])
        kept = percent(entry["kept_share"], 1)
        yield f"{entry['id']:>7}  {kept:>7}{shares}  {shown(entry['name']):{width}}  {promotes}".rstrip()
    if (more := len(record["concepts"]) - num_rows) > 0:
        yield f"… and {more:,} more that are kept or labelled"
    yield from totals(record)


def totals(record: dict) -> Iterator[str]:
    """Lines on all concepts together."""
    total, num_concepts = record["totals"], record["num_concepts"]
    share = lambda count: f"{count:,} ({percent(count / num_concepts, 1)})"
    yield f"{record['model']}: {record['num_tokens']:,} tokens in {record['num_windows']:,} windows"
    yield f"of {num_concepts:,} concepts, {record['num_kept']} are kept at each position"
    yield f"  never kept in this text: {share(total['never_kept'])}"
    if total["small_columns"] is not None:
        yield f"  compress column of norm below 0.01 (at 386M the paper has 5.8 %): {share(total['small_columns'])}"
    if record["teacher"]:
        yield f"  never a label in this text: {share(total['never_labelled'])}"
        yield f"  never active in the teacher in this text: {share(total['teacher_dead'])}"
    if record["teacher"] and record["teacher"]["num_labelled"]:
        yield (
            f"labelled positions: {record['teacher']['num_labelled']:,}; the largest concept is a label at "
            f"{percent(total['hit_1'], 1)} of them, one of the 4 largest at {percent(total['hit_4'], 1)}; of the "
            f"labels {percent(total['recall_4'], 1)} are among the 4 largest"
        )


def cards(record: dict, concepts: list[int]) -> Iterator[str]:
    """All data on single concepts."""
    entries = {entry["id"]: entry for entry in record["concepts"]}
    for concept in concepts:
        entry = entries.get(concept)
        if entry is None:
            yield f"concept {concept}: never kept in this text, and never a label"
            continue
        yield f"concept {concept}: {shown(entry['name'])}"
        share = percent(entry["kept_share"], 2)
        yield f"  kept at {entry['kept']:,} positions ({share}), the largest at {entry['top_1']:,}"
        if entry["kept"]:
            yield f"  logit where kept: mean {entry['mean_logit']:g}, largest {entry['max_logit']:g}"
        if entry["column_norm"] is not None:
            yield f"  norm of its compress column: {entry['column_norm']:g}"
        if record["teacher"]:
            yield f"  labels {entry['labelled']:,} positions; active in the teacher at {entry['active']:,}"
            yield "  " + ", ".join(f"{key[0].upper()}@{key[-1]} {percent(entry[key], 1)}" for key in SHARES)
        for key in ("promotes", "suppresses"):
            if entry[key]:
                yield f"  {key}: " + " ".join(f"‘{shown(token)}’" for token, _ in entry[key])
        for context in entry["contexts"]:
            mark = {True: "label", False: "no label", None: ""}[context["labelled"]]
            text = f"{context['before']}⟦{context['token']}⟧{context['after']}"
            yield f"  {context['logit']:>8g}  {mark:8}  {shown(text)}"


def percent(share: float | None, digits: int) -> str:
    """A share in per cent; – for None."""
    return "–" if share is None else f"{100 * share:.{digits}f} %"


def shown(text: str) -> str:
    """Text on one line of a terminal, with line ends as ⏎ and other control characters as ·."""
    return "".join("⏎" if c == "\n" else c if c.isprintable() else "·" for c in text)


if __name__ == "__main__":
    run_cli(main)
