"""Score benchmarks with EleutherAI's lm-evaluation-harness: its task definitions and metrics, our documents and models.

If the data folder has the documents of one of the paper's tasks, the task is defined by tasks/TASK.yaml. It has the
prompts and metrics of the harness's own definition and needs no network. Otherwise the harness's own definition is
used, on the data set from the hub, or on a file of the data folder with the same columns. A task that cannot be loaded
is reported as missing, with the reason, and the other tasks still run.
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
"""The tasks of the paper's table → the harness's folder that defines each."""

DEFAULT_DATA = "data/eval"
LOCAL_TASKS = Path(__file__).parent / "tasks"
# The standard error of a perplexity is estimated by resampling; the harness's default of 100,000 takes minutes.
BOOTSTRAP_ITERS = 1000
# Results may share a file if these are equal.
SETTINGS = ("sha256", "harness", "limit", "num_fewshot")


def parse_tasks(text: str, option: str = "--tasks") -> list[str]:
    """The task names in "a,b", in order and without duplicates; `paper` stands for the tasks of the paper.

    Raises UserError, which names `option`, if the harness is not installed or does not know a name.
    """
    if not find_spec("lm_eval") or not find_spec("accelerate"):
        raise UserError(f"{option} needs lm-evaluation-harness: pip install -e '.[eval]'.")
    names = [name.strip() for name in text.split(",") if name.strip()]
    names = list(dict.fromkeys(task for name in names for task in (PAPER_TASKS if name == "paper" else [name])))
    if not names:
        raise UserError(f"{option} names no task. Valid: paper {' '.join(PAPER_TASKS)}, or any task of lm-eval.")
    if set(names) <= set(PAPER_TASKS):
        return names
    definitions = _definitions(everything=True)
    known = definitions.all_subtasks
    if unknown := [name for name in names if name not in known]:
        if groups := [name for name in unknown if name in definitions.all_groups]:
            raise UserError(*(f"{option} {name} is a group of tasks: list single tasks of it." for name in groups))
        problems = []
        for name in unknown:  # the closest of all names, else the paper's: a list of all 13,000 would not help
            suggestion = nearest(name, {"paper", *PAPER_TASKS, *difflib.get_close_matches(name, known, n=1)})
            problems.append(f"{option} {name} is no task of lm-eval.{suggestion}")
        raise UserError(*problems)
    return names


class CannotScore(Exception):
    """A model cannot score these requests (context, continuation): no token of the continuation is left beside those of
    the context, the context has none, or the continuation is longer than the model's context. HFLM fails an assertion
    at the first of them, and other models of the harness differ in what they return."""

    def __init__(self, requests: set[tuple[str, str]]):
        super().__init__()
        self.requests = requests


def evaluate_tasks(
    folder: str | Path,
    tasks: Sequence[str],
    data: str | Path | None = None,
    batch: int = 8,
    limit: int | None = None,
    given: Path | None = None,
) -> dict:
    """Score the model in `folder` (a run's newest checkpoint, a checkpoint, or a Hugging Face folder) in fp32.

    `data` is a folder of TASK.jsonl files; with `limit`, only the first `limit` documents of each task are used. The
    results are written after every task: to `given`, and for a checkpoint in its run to RUN/evals/tasks/STEP.json.
    Results of other tasks in these files stay if they have the same weights and settings. Returns the results of this
    call, with the path of the file, if any, under `file`. Raises UserError if the model cannot be loaded, a task does
    not exist, or `given` holds something else.
    """
    if batch < 1 or (limit is not None and limit < 1):
        raise UserError("--batch and --limit must be at least 1.")
    tasks = parse_tasks(",".join(tasks))
    # The harness logs its defaults for every task; errors come as exceptions.
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
        raise UserError(f"{given} exists and is not of these weights and settings: choose another file or delete it.")
    for task in tasks:
        try:
            result["results"][task] = _evaluate(lm, task, data, limit)
        except Exception as error:  # definitions, data sets and the hub raise errors of any kind
            log.debug("%s is missing", task, exc_info=True)
            result["missing"][task] = _reason(error)
        for file in files if result["results"] else []:
            write_json(file, _merged(read_results(file), result))
    return result | ({"file": str(files[0])} if files and result["results"] else {})


def _language_model(opened: "OpenModel", batch: int):
    """The harness's backend for a transformers model."""
    from lm_eval.models.huggingface import HFLM

    class Backend(HFLM):
        """Raises CannotScore before anything is scored."""

        def loglikelihood(self, requests, disable_tqdm=False):
            if empty := {each.args for each in requests if not "".join(each.args)}:
                raise CannotScore(empty)
            return super().loglikelihood(requests, disable_tqdm)

        def _loglikelihood_tokens(self, requests, *args, **options):
            wrong = {
                texts
                for texts, context, continuation in requests
                if not context or not 1 <= len(continuation) <= self.max_length
            }
            if wrong:
                raise CannotScore(wrong)
            return super()._loglikelihood_tokens(requests, *args, **options)

    opened.model.config.use_cache = False  # every text is read once
    opened.model.config.pad_token_id = None  # avoids a warning; padding on the right does not affect a causal model
    return Backend(pretrained=opened.model, tokenizer=opened.hf_tokenizer, backend="causal", batch_size=batch)


def results_file(checkpoint: Path, limit: int | None) -> Path | None:
    """The results file of a checkpoint in its run, with a separate file for each `limit`; None for any other folder."""
    if checkpoint_step(checkpoint) is None:
        return None
    name = checkpoint.name + (f"-limit-{limit}" if limit else "")
    return checkpoint.parents[1] / "evals" / "tasks" / f"{name}.json"


def read_results(file: Path) -> dict | None:
    """The content that `evaluate_tasks` wrote; None if the file does not exist or is something else."""
    try:
        values = dict(json.loads(file.read_bytes()))
        is_ours = values["kind"] == "tasks" and isinstance(values["results"], dict)
        return values if is_ours and isinstance(values["missing"], dict) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def tasks_left(checkpoint: Path, tasks: Sequence[str], data: str | Path | None, limit: int | None) -> list[str]:
    """Those of `tasks` that the results file of a checkpoint in its run does not have yet, zero-shot, for the same
    weights, settings and documents. `data` None is the default folder."""
    data = data or DEFAULT_DATA
    found = read_results(results_file(checkpoint, limit))
    asked = {"sha256": weights_sha256(checkpoint), "harness": harness_version(), "limit": limit, "num_fewshot": 0}
    if not found or not _is_same(found, asked):
        return list(tasks)
    return [task for task in tasks if found["results"].get(task, {}).get("source") != _source(task, data)]


def evaluate_command(
    checkpoint: Path, tasks: str, data: str | Path | None = None, batch: int = 8, limit: int | None = None
) -> list[str]:
    """The command line that scores a checkpoint in a separate process and writes to its run's evals/tasks/."""
    tool = Path(__file__).resolve().parents[2] / "tools" / "evaluate.py"
    command = [sys.executable, str(tool), "tasks", str(checkpoint), "--tasks", tasks, "--batch", str(batch)]
    command += ["--tasks-data", str(data)] if data else []
    return command + (["--limit", str(limit)] if limit is not None else [])


def harness_version() -> str:
    """The name and version of the harness."""
    return f"lm-eval {version('lm_eval')}"


@functools.cache
def _definitions(everything: bool):
    """The harness's index of task definitions: the paper's tasks, or everything, which takes ten seconds."""
    import lm_eval.tasks

    if everything:
        return lm_eval.tasks.TaskManager()
    root = Path(lm_eval.tasks.__file__).parent
    folders = [root / folder for folder in PAPER_TASKS.values()]
    return lm_eval.tasks.TaskManager(include_defaults=False, include_path=folders)


def _load_task(name: str, data: str | Path | None):
    """The harness's task, with our documents if the data folder has them. → (task, source of the documents)."""
    import lm_eval.tasks
    from datasets import Dataset

    definitions = _definitions(everything=name not in PAPER_TASKS)
    found = read_documents(data, name) if data else None
    if not found:
        try:
            return definitions.load(name)["tasks"][name], "hub"
        except Exception as error:  # the hub, the data set and the definition raise errors of any kind
            first = f"{Path(data) / name}.jsonl does not exist, and " if data else ""
            raise UserError(f"{first}the hub's data set is not available ({_reason(error)}).") from error
    documents, _, sha256 = found
    dataset = Dataset.from_list(documents)
    if name in PAPER_TASKS:
        definitions = lm_eval.tasks.TaskManager(include_defaults=False, include_path=str(LOCAL_TASKS))
    # The definition gets the documents, which were verified against their hash, whichever split it scores, and no copy
    # of them stays in a cache. The task is in a group because the harness changes only members of a group.
    changed = {"task": name, "custom_dataset": lambda **_: defaultdict(lambda: dataset)}
    return definitions.load({"group": "local", "task": [changed]})["tasks"][name], f"local {sha256}"


def _source(name: str, data: str | Path | None) -> str | None:
    """The present source of a task's documents; None if the file is damaged."""
    try:
        found = read_documents(data, name) if data else None
    except UserError:
        return None
    return f"local {found[2]}" if found else "hub"


def _evaluate(lm, name: str, data: str | Path | None, limit: int | None) -> dict:
    from lm_eval import simple_evaluate

    left_out: list[int] = []
    with _quiet():
        task, source = _load_task(name, data)
        score = functools.partial(
            simple_evaluate,
            model=lm,
            tasks=[task],
            num_fewshot=0,  # the data folder does not have the training split, from which examples come
            bootstrap_iters=BOOTSTRAP_ITERS,
            log_samples=False,
            task_manager=_definitions(everything=name not in PAPER_TASKS),
        )
        chosen = {"limit": limit}
        while True:
            try:
                found = score(**chosen)
                break
            except CannotScore as error:  # once for each reason
                left_out += sorted({request.doc_id for request in task.instances if request.args in error.requests})
                scored = sorted({request.doc_id for request in task.instances} - set(left_out))
                if not scored:
                    raise UserError(f"none of its {len(left_out)} documents can be scored by this model.") from None
                chosen = {"samples": {name: scored}}
    result = {
        "metrics": _metrics(found["results"][name]),
        "num_samples": len(scored) if left_out else found["n-samples"][name]["effective"],
        "version": found["versions"][name],
        "source": source,
    }
    return result | ({"left_out": sorted(left_out)} if left_out else {})


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the harness from printing on stdout, which is for results, from drawing progress bars in a log, and from
    forking a process per core for its standard errors, because the threads of torch do not survive a fork."""
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
    """An error in one line."""
    text = " ".join(str(error).split())
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text:.200}"


def _merged(before: dict | None, result: dict) -> dict:
    """`result`, with those results of the earlier file that are of other tasks and the same weights and settings."""
    if not before or not _is_same(before, result):
        return result
    results = before["results"] | result["results"]
    missing = {task: why for task, why in (before["missing"] | result["missing"]).items() if task not in results}
    return result | {"results": results, "missing": missing}


def _is_same(found: dict, asked: dict) -> bool:
    """Whether both have the same weights and settings."""
    return all(found.get(key) == asked[key] for key in SETTINGS)
