"""Benchmarks with EleutherAI's lm-evaluation-harness: its task definitions, its scores, our documents and our models.

Where the data folder has the documents of a task of the paper, it is the one of tasks/TASK.yaml, which asks and scores
as the harness's own does, and nothing needs the network; else it is the harness's own definition, on the hub's data
set, or on a file of the data folder in the columns of that data set. A task that can be had in no way is named as
missing, with the reason, and the others go on.
"""

import contextlib
import difflib
import functools
import json
import logging
import os
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from megacocomix.checkpoint.format import checkpoint_step
from megacocomix.checkpoint.open import weights_sha256
from megacocomix.errors import UserError, nearest
from megacocomix.evaluation.eval_data import read_documents
from megacocomix.files import write_json

if TYPE_CHECKING:
    from megacocomix.hf.open import OpenModel

log = logging.getLogger(__name__)

PAPER_TASKS = {
    "lambada_openai": "lambada",
    "wikitext": "wikitext",
    "hellaswag": "hellaswag",
    "piqa": "piqa",
    "social_iqa": "siqa",
    "arc_easy": "arc",
    "winogrande": "winogrande",
}
"""The tasks of the paper's table, and the folder of the harness that defines each."""

DEFAULT_DATA = "data/eval"
LOCAL_TASKS = Path(__file__).parent / "tasks"
# The standard error of a perplexity is estimated by drawing samples again; the harness's 100,000 times take minutes.
BOOTSTRAP_ITERS = 1000
# Results that agree in these may stand in one file.
SETTINGS = ("sha256", "harness", "limit", "num_fewshot")


def parse_tasks(text: str, option: str = "--tasks") -> list[str]:
    """Task names of "a,b", in order and each once; `paper` stands for those of the paper. Raises UserError, before
    anything runs, where the harness is not installed or does not know a name; it says `option`."""
    if not find_spec("lm_eval") or not find_spec("accelerate"):
        raise UserError(f"{option} needs lm-evaluation-harness: pip install 'megacocomix[eval]'.")
    names = [name.strip() for name in text.split(",") if name.strip()]
    names = list(dict.fromkeys(task for name in names for task in (PAPER_TASKS if name == "paper" else [name])))
    if not names:
        raise UserError(f"{option} names no task. Valid: paper {' '.join(PAPER_TASKS)}, or any that lm-eval knows.")
    if set(names) <= set(PAPER_TASKS):
        return names
    known, known_groups = _definitions(everything=True).all_subtasks, _definitions(everything=True).all_groups
    unknown = [name for name in names if name not in known]
    if unknown:
        if groups := [name for name in unknown if name in known_groups]:
            raise UserError(*(f"{option} {name} is a group of tasks: name those that you want." for name in groups))
        raise UserError(*(f"{option} {name} is no task of lm-eval.{_suggestion(name, known)}" for name in unknown))
    return names


def evaluate_tasks(
    folder: str | Path,
    tasks: Sequence[str],
    data: str | Path | None = None,
    batch: int = 8,
    limit: int | None = None,
    given: Path | None = None,
) -> dict:
    """Scores of the model in `folder` (a run's newest checkpoint, a checkpoint, a Hugging Face folder) in fp32.

    `data` is a folder of TASK.jsonl; `limit` takes the first so many documents of each task. After every task the
    results are written to `given`, and for a checkpoint in its run to RUN/evals/tasks/STEP.json; results of other tasks
    in these files stay if they are of the same weights and settings. Returns what this call found, and under `file` the
    file, if there is one. Raises UserError for a model that cannot be loaded, a task that does not exist, and a `given`
    that holds something else.
    """
    if batch < 1 or (limit is not None and limit < 1):
        raise UserError("--batch and --limit must be at least 1.")
    tasks = parse_tasks(",".join(tasks))
    # The harness announces its defaults task by task; what is wrong comes as an exception.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    from megacocomix.hf.open import open_model

    opened = open_model(folder)
    lm = _language_model(opened, batch)
    files = [file for file in (given, results_file(opened.path, limit)) if file]
    result = {
        "kind": "tasks",
        "model": str(opened.path),
        "sha256": opened.sha256,
        "step": checkpoint_step(opened.path),
        "harness": harness_version(),
        "precision": "fp32",
        "num_fewshot": 0,
        "limit": limit,
        "results": {},
        "missing": {},
    }
    if given and given.exists() and not _is_same(read_results(given) or {}, result):
        raise UserError(f"{given} exists and is no result of these weights and settings: choose another or delete it.")
    for task in tasks:
        try:
            result["results"][task] = _evaluate(lm, task, data, limit)
        except Exception as error:  # definitions, data sets and the hub raise whatever they do
            log.debug("%s is missing", task, exc_info=True)
            result["missing"][task] = _reason(error)
        for file in files if result["results"] else []:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_json(file, _merged(read_results(file), result))
    return result | ({"file": str(files[0])} if files and result["results"] else {})


def _language_model(opened: "OpenModel", batch: int):
    """The harness's backend for models of transformers."""
    from lm_eval.models.huggingface import HFLM

    tokenizer = opened.hf_tokenizer
    opened.model.config.use_cache = False  # every text is read once
    opened.model.config.pad_token_id = None  # padding is on the right, which a causal model needs no warning of
    return HFLM(pretrained=opened.model, tokenizer=tokenizer, backend="causal", batch_size=batch)


def results_file(checkpoint: Path, limit: int | None) -> Path | None:
    """Where the results of a checkpoint in its run are kept, those of the first documents apart from those of all; None
    for any other folder."""
    if checkpoint_step(checkpoint) is None:
        return None
    name = checkpoint.name + (f"-limit-{limit}" if limit else "")
    return checkpoint.parents[1] / "evals" / "tasks" / f"{name}.json"


def read_results(file: Path) -> dict | None:
    """What `evaluate_tasks` wrote; None where there is no such file, or it is another one."""
    try:
        values = dict(json.loads(file.read_bytes()))
        is_ours = values["kind"] == "tasks" and isinstance(values["results"], dict)
        return values if is_ours and isinstance(values["missing"], dict) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def tasks_left(checkpoint: Path, tasks: Sequence[str], data: str | Path | None, limit: int | None) -> list[str]:
    """Those of `tasks` that the results of a checkpoint in its run lack for its weights, these settings and the same
    documents (`data` None: of the default folder), without examples in the prompts."""
    data = data or DEFAULT_DATA
    found = read_results(results_file(checkpoint, limit))
    asked = {"sha256": weights_sha256(checkpoint), "harness": harness_version(), "limit": limit, "num_fewshot": 0}
    if not found or not _is_same(found, asked):
        return list(tasks)
    return [task for task in tasks if found["results"].get(task, {}).get("source") != _source(task, data)]


def evaluate_command(
    checkpoint: Path, tasks: str, data: str | Path | None = None, batch: int = 8, limit: int | None = None
) -> list[str]:
    """The command line that evaluates a checkpoint in a process of its own and writes to its run's evals/tasks/."""
    tool = Path(__file__).resolve().parents[2] / "tools" / "evaluate.py"
    command = [sys.executable, str(tool), str(checkpoint), "--tasks", tasks, "--batch", str(batch)]
    command += ["--tasks-data", str(data)] if data else []
    return command + (["--limit", str(limit)] if limit is not None else [])


def harness_version() -> str:
    """Name and version of the harness."""
    return f"lm-eval {version('lm_eval')}"


def _suggestion(name: str, known: Sequence[str]) -> str:
    """The closest of all names; where none is close, the paper's, and not all 13,000."""
    return nearest(name, {"paper", *PAPER_TASKS, *difflib.get_close_matches(name, known, n=1)})


@functools.cache
def _definitions(everything: bool):
    """The harness's index of task definitions; of everything it takes ten seconds."""
    import lm_eval.tasks

    if everything:
        return lm_eval.tasks.TaskManager()
    root = Path(lm_eval.tasks.__file__).parent
    folders = [root / folder for folder in PAPER_TASKS.values()]
    return lm_eval.tasks.TaskManager(include_defaults=False, include_path=folders)


@functools.cache
def _local_definitions():
    """The task files beside this one."""
    import lm_eval.tasks

    return lm_eval.tasks.TaskManager(include_defaults=False, include_path=str(LOCAL_TASKS))


def _load_task(name: str, data: str | Path | None):
    """The harness's task, with our documents where we have them. → (task, where its documents are from)."""
    from datasets import Dataset

    definitions = _definitions(everything=name not in PAPER_TASKS)
    found = read_documents(data, name) if data else None
    if not found:
        try:
            return definitions.load(name)["tasks"][name], "hub"
        except Exception as error:  # the hub, the data set's reader and the definition raise whatever they do
            first = f"{Path(data) / name}.jsonl does not exist, and " if data else ""
            raise UserError(f"{first}the hub's data set cannot be had ({_reason(error)}).") from error
    documents, _, sha256 = found
    dataset = Dataset.from_list(documents)
    if name in PAPER_TASKS:
        definitions = _local_definitions()
    # Whichever split the definition scores, it gets the documents, which were compared with their hash, and no copy of
    # them is left in a cache. Only the members of a group can be changed.
    changed = {"task": name, "custom_dataset": lambda **_: defaultdict(lambda: dataset)}
    return definitions.load({"group": "local", "task": [changed]})["tasks"][name], f"local {sha256}"


def _source(name: str, data: str | Path | None) -> str | None:
    """Where the documents of a task would be from now; None where the file is damaged."""
    try:
        found = read_documents(data, name) if data else None
    except UserError:
        return None
    return f"local {found[2]}" if found else "hub"


def _evaluate(lm, name: str, data: str | Path | None, limit: int | None) -> dict:
    from lm_eval import simple_evaluate

    with _quiet():
        task, source = _load_task(name, data)
        found = simple_evaluate(
            model=lm,
            tasks=[task],
            num_fewshot=0,  # the training split, where examples come from, is not in the data folder
            limit=limit,
            bootstrap_iters=BOOTSTRAP_ITERS,
            log_samples=False,
            task_manager=_definitions(everything=name not in PAPER_TASKS),
        )
    return {
        "metrics": _metrics(found["results"][name]),
        "num_samples": found["n-samples"][name]["effective"],
        "version": found["versions"][name],
        "source": source,
    }


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the harness off stdout, which is for results; its progress bars off a log; and from forking a process a
    core for its standard errors, which the threads of torch do not survive."""
    with ExitStack() as stack:
        screen = sys.stderr if sys.stderr.isatty() else stack.enter_context(open(os.devnull, "w"))
        stack.enter_context(contextlib.redirect_stdout(screen))
        stack.enter_context(contextlib.redirect_stderr(screen))
        before = os.environ.get("DISABLE_MULTIPROC")
        os.environ["DISABLE_MULTIPROC"] = "1"
        try:
            yield
        finally:
            del os.environ["DISABLE_MULTIPROC"]
            if before is not None:
                os.environ["DISABLE_MULTIPROC"] = before


def _metrics(values: dict) -> dict[str, dict[str, float | None]]:
    """{"acc,none": 0.5, "acc_stderr,none": 0.1, "alias": …} → {"acc": {"value": 0.5, "stderr": 0.1}}."""
    metrics = {}
    for key, value in values.items():
        name, comma, chosen = key.partition(",")
        if not comma or name.endswith("_stderr"):
            continue
        stderr = values.get(f"{name}_stderr,{chosen}")
        metrics[name if chosen == "none" else key] = {
            "value": float(value),
            "stderr": float(stderr) if isinstance(stderr, int | float) else None,
        }
    return metrics


def _reason(error: Exception) -> str:
    """One line."""
    text = " ".join(str(error).split())
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text:.200}"


def _merged(before: dict | None, result: dict) -> dict:
    """`result`, and of the file before it the tasks that were not asked now."""
    if not before or not _is_same(before, result):
        return result
    results = before["results"] | result["results"]
    missing = {task: why for task, why in (before["missing"] | result["missing"]).items() if task not in results}
    return result | {"results": results, "missing": missing}


def _is_same(found: dict, asked: dict) -> bool:
    """Whether both are of the same weights and settings."""
    return all(found.get(key) == asked[key] for key in SETTINGS)
