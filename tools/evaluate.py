#!/usr/bin/env python
"""Validation perplexity of a run's newest checkpoint, or of any model folder, on all held-out tokens; or benchmarks;
or how well concepts steer it.

python tools/evaluate.py runs/tiny
python tools/evaluate.py assets/teacher --data data/wiki/valid
python tools/evaluate.py runs/tiny --tasks paper --limit 100
python tools/evaluate.py runs/tiny --tasks hellaswag,piqa --all-checkpoints
python tools/evaluate.py runs/tiny --steering --concepts 20 --scales=-8,0,8
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

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
from megacocomix.files import write_json

STEERING = ("concepts", "scales", "place", "prompts", "prompt_tokens", "new_tokens", "seed", "teacher", "sae")
STEERING += ("no_teacher_steering",)


def main() -> None:
    """Parse the command line, evaluate, print."""
    options = parse()
    given = {name: value for name in STEERING if (value := getattr(options, name)) is not None}
    if options.steering:
        return steer(options, given)
    if given:
        raise UserError(f"--{next(iter(given)).replace('_', '-')} is only for --steering.")
    options.batch = 8 if options.batch is None else options.batch
    without = {"--limit": options.limit, "--tasks-data": options.tasks_data} if options.tasks is None else {}
    without |= {"--data": options.data} if options.tasks is not None else {}
    if alone := [option for option, value in without.items() if value is not None]:
        raise UserError(f"{alone[0]} is {'only for' if options.tasks is None else 'not for'} --tasks.")
    if options.out:
        Path(options.out).parent.mkdir(parents=True, exist_ok=True)
    if options.out and options.all_checkpoints:
        raise UserError("--out is one file; of --all-checkpoints each result is kept in the run's evals.")
    if options.tasks_data and not Path(options.tasks_data).is_dir():
        raise UserError(
            f"--tasks-data {options.tasks_data} does not exist: make it with tools/fetch_eval_data.py --out DIR."
        )
    options.tasks_data = options.tasks_data or DEFAULT_DATA
    tasks = parse_tasks(options.tasks) if options.tasks is not None else []
    problems = []
    for folder in all_checkpoints(options.model) if options.all_checkpoints else [Path(options.model)]:
        try:
            problems += evaluate_on_tasks(folder, tasks, options) if tasks else validate(folder, options)
        except UserError as error:
            if not options.all_checkpoints:
                raise
            problems += error.problems  # the other checkpoints go on
    if problems:
        raise UserError(*problems)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("model", metavar="RUN|FOLDER", help="a run, a checkpoint of ours or a Hugging Face folder")
    parser.add_argument("--data", metavar="PATH", help="held-out tokens; by default data.valid of the run's config")
    parser.add_argument(
        "--batch", type=int, metavar="N", help="windows or texts at a time (default 8; 256 of --steering)"
    )
    parser.add_argument("--tasks", metavar="A,B", help="benchmarks instead: paper, or names of lm-evaluation-harness")
    parser.add_argument(
        "--tasks-data",
        metavar="DIR",
        help="their documents, by tools/fetch_eval_data.py (default data/eval); what is not there comes from the hub",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N documents of each task")
    parser.add_argument("--all-checkpoints", action="store_true", help="every checkpoint of a run that is not done yet")
    parser.add_argument("--out", metavar="FILE", help="also write the result of a Hugging Face folder here, as JSON")
    parser.add_argument(
        "--steering", action="store_true", help="how well steering works instead, judged by the teacher"
    )
    steering = parser.add_argument_group("of --steering alone")
    steering.add_argument("--concepts", metavar="N|A,B", help="those most often kept (default 50), or these ids")
    steering.add_argument("--scales", metavar="A,B", help="written --scales=-4,0,8 (default =-10,-4,0,2,4,8,10)")
    steering.add_argument("--place", choices=("before", "after"), help="the largest are kept; default before")
    steering.add_argument("--prompts", type=int, metavar="N", help="beginnings of held-out windows (default 6)")
    steering.add_argument("--prompt-tokens", type=int, metavar="N", help="of each (default 16)")
    steering.add_argument("--new-tokens", type=int, metavar="N", help="of each text at most (default 48)")
    steering.add_argument("--seed", type=int, metavar="N", help="of the first prompt's texts (default 0)")
    steering.add_argument("--teacher", metavar="DIR", help="who judges; by default the run's own teacher")
    steering.add_argument("--sae", metavar="FILE", help="the teacher's autoencoder, whose latents are the concepts")
    steering.add_argument(
        "--no-teacher-steering", action="store_true", default=None, help="do not steer the teacher beside the student"
    )
    return parser.parse_args()


def steer(options: argparse.Namespace, given: dict) -> None:
    """Steering; `given` are those of its options that were given."""
    from megacocomix.interpret.steering_curve import CurveSettings, measure_steering, parse_concepts, parse_scales
    from megacocomix.interpret.steering_plot import table

    for name in ("tasks", "tasks_data", "limit", "all_checkpoints"):
        if getattr(options, name) is not (False if name == "all_checkpoints" else None):
            raise UserError(f"--{name.replace('_', '-')} is not for --steering.")
    files = {name: given.pop(name, None) for name in ("teacher", "sae")}
    given |= {} if options.batch is None else {"batch": options.batch}
    for name, read in (("concepts", parse_concepts), ("scales", parse_scales)):
        given |= {name: read(given[name])} if name in given else {}
    settings = CurveSettings(steers_teacher=not given.pop("no_teacher_steering", False), **given)
    result = measure_steering(options.model, settings, options.data, **files, out=options.out)
    print("\n".join(table(result)))
    print(f"written to {result['file']}, and as a picture beside it")


def validate(folder: Path, options: argparse.Namespace) -> list[str]:
    """Validation perplexity; nothing can be missing."""
    if options.out and Path(options.out).exists():
        raise UserError(f"--out {options.out} exists already: choose another name or delete it.")
    result = earlier_evaluation(folder, options.data) if options.all_checkpoints else None
    done = " (evaluated before)" if result else ""
    result = result or evaluate_folder(folder, options.data, options.batch)
    print(
        f"{folder}: valid loss {result['valid_loss']:.4f}, perplexity {result['valid_ppl']:.2f} over "
        f"{result['num_sequences']:,} windows of {result['context']} tokens of {result['data']}{done}"
    )
    if options.out:
        write_json(options.out, result)
        print(f"written to {options.out}")
    elif "file" in result and not done:
        print(f"written to {result['file']}")
    return []


def evaluate_on_tasks(folder: Path, tasks: list[str], options: argparse.Namespace) -> list[str]:
    """Benchmarks. → A line for each task that is missing."""
    if options.all_checkpoints:
        left = tasks_left(folder, tasks, options.tasks_data, options.limit)
        if done := [task for task in tasks if task not in left]:
            print(f"{folder}: {' '.join(done)} evaluated before")
            print("\n".join(lines(read_results(results_file(folder, options.limit)), done)))
        if not left:
            return []
        tasks = left
    file = Path(options.out) if options.out else None
    result = evaluate_tasks(folder, tasks, options.tasks_data, options.batch, options.limit, given=file)
    limit = f", the first {options.limit} documents" if options.limit else ""
    print(f"{result['model']}: {result['num_fewshot']}-shot, {result['precision']}, {result['harness']}{limit}")
    print("\n".join(lines(result, tasks)))
    print("\n".join(notes(result, Path(options.tasks_data))), end="")
    if "file" in result:
        print(f"written to {result['file']}")
    return [f"{folder}: {task} is missing: {reason}" for task, reason in result["missing"].items()]


def lines(result: dict, tasks: list[str]) -> Iterator[str]:
    """A line a task: its metrics, how many documents, and where they are from."""
    width = max(map(len, tasks))
    for task, found in result["results"].items():
        if task in tasks:
            source = "local" if found["source"].startswith("local") else "hub"
            metrics = "  ".join(map(words, found["metrics"], found["metrics"].values()))
            yield f"{task:{width}}  {metrics}  ({found['num_samples']:,} samples, {source})"


def words(name: str, metric: dict) -> str:
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
