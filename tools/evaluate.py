#!/usr/bin/env python
"""Measure a model: validation perplexity on all held-out tokens, benchmark tasks, or how well concepts steer it.

python tools/evaluate.py perplexity runs/tiny
python tools/evaluate.py perplexity assets/teacher --data data/wiki/valid
python tools/evaluate.py tasks runs/tiny --tasks hellaswag,piqa --all-checkpoints
python tools/evaluate.py steering runs/tiny --concepts 20 --scales=-8,0,8
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megacocomix.data.binary import RAW_DTYPES
from megacocomix.errors import UserError, run_cli
from megacocomix.evaluation.eval_data import read_manifest
from megacocomix.evaluation.harness import (
    DEFAULT_DATA,
    evaluate_tasks,
    parse_tasks,
    read_results,
    results_file,
    tasks_left,
)
from megacocomix.evaluation.perplexity import all_checkpoints, earlier_evaluation, evaluate_folder
from megacocomix.files import check_absent, write_json


def main() -> None:
    """Parse the command line and run its sub-command."""
    options = vars(parse())
    options.pop("run")(**options)


def parse() -> argparse.Namespace:
    """The command line; `run` is the function of the sub-command."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter, allow_abbrev=False)
    commands = parser.add_subparsers(required=True, metavar="perplexity|tasks|steering")

    def command(name: str, run: Callable, help_: str, batch: int, unit: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=help_, description=help_, allow_abbrev=False)
        made.set_defaults(run=run)
        made.add_argument("model", metavar="RUN|FOLDER", help="a run, a native checkpoint or a Hugging Face folder")
        made.add_argument("--batch", type=int, default=batch, metavar="N", help=f"{unit} per batch (default {batch})")
        return made

    perplexity = command("perplexity", measure_perplexity, "validation perplexity on all held-out tokens", 8, "windows")
    tasks = command("tasks", measure_tasks, "benchmarks of lm-evaluation-harness", 8, "requests")
    steering = command(
        "steering", measure_steering, "how well concepts steer the text, judged by the teacher", 256, "texts"
    )
    perplexity.add_argument("--data", metavar="PATH", help="held-out tokens; by default data.valid of the run's config")
    tasks.add_argument("--tasks", default="paper", metavar="A,B", help="paper (default), or names of the harness")
    tasks.add_argument(
        "--tasks-data",
        metavar="DIR",
        help=f"their documents, by tools/fetch_eval_data.py (default {DEFAULT_DATA}); the others come from the hub",
    )
    tasks.add_argument("--limit", type=int, metavar="N", help="only the first N documents of each task")
    for each in (perplexity, steering):
        each.add_argument("--data-dtype", choices=RAW_DTYPES, help="type of the ids in a --data file without a header")
    for each in (perplexity, tasks):
        each.add_argument(
            "--all-checkpoints", action="store_true", help="every checkpoint of a run that is not done yet"
        )
        each.add_argument("--out", metavar="FILE", help="also write the result to this JSON file")
    steering.add_argument("--data", metavar="PATH", help="held-out tokens; by default data.valid of the run's config")
    steering.add_argument("--concepts", metavar="N|A,B", help="those most often kept (default 50), or these ids")
    steering.add_argument("--scales", metavar="A,B", help="written --scales=-4,0,8 (default -10,-4,0,2,4,8,10)")
    steering.add_argument("--place", choices=("before", "after"), help="edit before/after selection (default before)")
    steering.add_argument("--prompts", type=int, metavar="N", help="beginnings of held-out windows (default 6)")
    steering.add_argument("--prompt-tokens", type=int, metavar="N", help="tokens of each prompt (default 16)")
    steering.add_argument("--new-tokens", type=int, metavar="N", help="most tokens of each text (default 48)")
    steering.add_argument("--seed", type=int, metavar="N", help="seed of the first prompt's texts (default 0)")
    steering.add_argument("--teacher", metavar="DIR", help="the judge; by default the run's own teacher")
    steering.add_argument("--sae", metavar="FILE", help="the teacher's autoencoder, whose latents are the concepts")
    steering.add_argument(
        "--no-teacher-steering", action="store_true", help="do not steer the teacher beside the student"
    )
    steering.add_argument("--out", metavar="FILE", help="JSON; a PNG and an SVG stand beside it")
    return parser.parse_args()


def measure_perplexity(
    model: str, batch: int, data: str | None, data_dtype: str | None, all_checkpoints: bool, out: str | None
) -> None:
    """Validation perplexity."""

    def measure(folder: Path) -> None:
        result = earlier_evaluation(folder, data, data_dtype) if all_checkpoints else None
        done = " (evaluated before)" if result else ""
        result = result or evaluate_folder(folder, data, batch, data_dtype)
        print(
            f"{folder}: valid loss {result['valid_loss']:.4f}, perplexity {result['valid_ppl']:.2f} over "
            f"{result['num_sequences']:,} windows of {result['context']} tokens of {result['data']}{done}"
        )
        if out:
            write_json(out, result)
            print(f"written to {out}")
        elif "file" in result and not done:
            print(f"written to {result['file']}")

    if out:
        check_absent(out)
    for_each_folder(model, all_checkpoints, out, measure)


def measure_tasks(
    model: str,
    batch: int,
    tasks: str,
    tasks_data: str | None,
    limit: int | None,
    all_checkpoints: bool,
    out: str | None,
) -> None:
    """Benchmarks. Raises UserError with a line for each task that is missing."""
    names = parse_tasks(tasks)
    if tasks_data and not Path(tasks_data).is_dir():
        raise UserError(f"--tasks-data {tasks_data} does not exist: make it with tools/fetch_eval_data.py --out DIR.")
    data = tasks_data or DEFAULT_DATA

    def measure(folder: Path) -> None:
        left = tasks_left(folder, names, data, limit) if all_checkpoints else names
        if done := [task for task in names if task not in left]:
            print(f"{folder}: {' '.join(done)} evaluated before")
            print("\n".join(table(read_results(results_file(folder, limit)), done)))
        if not left:
            return
        result = evaluate_tasks(folder, left, data, batch, limit, given=Path(out) if out else None)
        first = f", the first {limit} documents" if limit else ""
        print(f"{result['model']}: {result['num_fewshot']}-shot, {result['precision']}, {result['harness']}{first}")
        print("\n".join(table(result, left)))
        print("\n".join(notes(result, Path(data))), end="")
        if "file" in result:
            print(f"written to {result['file']}")
        if missing := result["missing"]:
            raise UserError(*(f"{folder}: {task} is missing: {reason}" for task, reason in missing.items()))

    for_each_folder(model, all_checkpoints, out, measure)


def measure_steering(
    model: str,
    data: str | None,
    data_dtype: str | None,
    teacher: str | None,
    sae: str | None,
    out: str | None,
    no_teacher_steering: bool,
    **settings,
) -> None:
    """How well steering works, over many concepts and scales."""
    from megacocomix.interpret import steering_curve
    from megacocomix.interpret.steering_plot import table

    settings = {name: value for name, value in settings.items() if value is not None}
    for name, read in (("concepts", steering_curve.parse_concepts), ("scales", steering_curve.parse_scales)):
        settings |= {name: read(settings[name])} if name in settings else {}
    curve = steering_curve.CurveSettings(steers_teacher=not no_teacher_steering, **settings)
    result = steering_curve.measure_steering(model, curve, data, teacher, sae, out, data_dtype)
    print("\n".join(table(result)))
    print(f"written to {result['file']}, and as a picture beside it")


def for_each_folder(model: str, every_checkpoint: bool, out: str | None, measure: Callable[[Path], None]) -> None:
    """Measure one folder, or all checkpoints of a run: there, one that fails does not keep the others from being
    measured. Raises one UserError with every problem."""
    if out and every_checkpoint:
        raise UserError("--out is one file; of --all-checkpoints each result is kept in the run's evals.")
    problems = []
    for folder in all_checkpoints(model) if every_checkpoint else [Path(model)]:
        try:
            measure(folder)
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(*problems)


def table(result: dict, tasks: list[str]) -> Iterator[str]:
    """A line a task: its metrics, how many documents, and where they are from."""
    width = max(map(len, tasks))
    for task, found in result["results"].items():
        if task in tasks:
            source = "local" if found["source"].startswith("local") else "hub"
            metrics = "  ".join(map(describe_metric, found["metrics"], found["metrics"].values()))
            yield f"{task:{width}}  {metrics}  ({found['num_samples']:,} samples, {source})"
            if left_out := found.get("left_out"):
                few = " ".join(map(str, left_out[:10])) + (" …" if len(left_out) > 10 else "")
                number = f"{len(left_out):,} of the documents (from 0: {few})"
                yield f"{task}: left out, as this model cannot score them: {number}"


def describe_metric(name: str, metric: dict) -> str:
    """A metric, with its standard error where there is one."""
    stderr = f" ± {metric['stderr']:.4f}" if metric["stderr"] is not None else ""
    return f"{name} {metric['value']:.4f}{stderr}"


def notes(result: dict, data: Path) -> Iterator[str]:
    """What differs between local documents and the hub's."""
    manifest = read_manifest(data)
    for task, found in result["results"].items():
        if task in manifest and manifest[task].note and found["source"] == f"local {manifest[task].sha256}":
            yield f"{task}: {manifest[task].note}\n"


if __name__ == "__main__":
    run_cli(main)
