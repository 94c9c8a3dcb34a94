"""Benchmark tasks during training: scored at their steps, by a process whose failure does not fail the run."""

import json
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

import tiny
from jobs import train_all
from megacocomix.checkpoint.format import list_checkpoints
from megacocomix.errors import EXIT_REQUEUE, UserError
from megacocomix.training.inputs import open_inputs
from processes import run_processes

pytest.importorskip("lm_eval")
TOKENIZER = Path(__file__).parents[2] / "assets/teacher/tokenizer.model"
PIQA = [{"goal": "Turn a ship", "sol1": "turn the wheel", "sol2": "turn the mast", "label": 0}] * 3


def make_config(folder, run, **evaluation):
    """A next-token run whose vocabulary is a real tokenizer's."""
    return tiny.config(
        folder,
        run,
        model={"vocab_size": 4096, "context": 64},
        method={"name": "ntp"},
        data={"tokenizer": str(TOKENIZER)},
        training={"steps": 4, "micro_batch": 4},
        checkpoint={"every": 4},
        evaluation={"every": 4, "tasks_data": str(folder / "eval"), **evaluation},
    )


@pytest.fixture(scope="module")
def documents(folder):
    (folder / "eval").mkdir()
    (folder / "eval/piqa.jsonl").write_text("".join(json.dumps(document) + "\n" for document in PIQA))
    return folder


def losses(config):
    lines = map(json.loads, (Path(config.run) / "metrics.jsonl").read_text().splitlines())
    return [(line["step"], line.get("loss"), line.get("valid_loss"), line["flops"]) for line in lines]


def interrupted(config):
    """Train with an evaluation that never ends, and a signal while it is under way."""
    from megacocomix.training import tasks

    tasks.evaluate_command = lambda *_, **__: [sys.executable, "-c", "import time; time.sleep(600)"]

    def interrupt():
        while not list_checkpoints(config.run):
            time.sleep(0.1)
        time.sleep(1)
        signal.raise_signal(signal.SIGTERM)

    threading.Thread(target=interrupt, daemon=True).start()
    started = time.monotonic()
    return train_all([config]), time.monotonic() - started


@pytest.mark.slow
def test_tasks_are_scored_at_their_steps_and_change_nothing_in_the_run(documents):
    scored = make_config(documents, "scored", tasks=["piqa"], tasks_every=2, tasks_limit=2)
    lacking = make_config(documents, "lacking", tasks=["wikitext"])
    plain = make_config(documents, "plain")
    assert run_processes(2, train_all, [scored, lacking, plain]) == [[(0, []), (1, []), (0, [])]] * 2
    files = sorted((Path(scored.run) / "evals/tasks").iterdir())
    assert [file.name for file in files] == ["step-00000002-limit-2.json", "step-00000004-limit-2.json"]
    for file in files:
        result = json.loads(file.read_text())["results"]["piqa"]
        assert result["num_samples"] == 2 and result["source"].startswith("local")
    assert losses(scored) == losses(plain) == losses(lacking)
    assert "wikitext is missing" in (Path(lacking.run) / "logs/tasks.log").read_text()
    assert "not all tasks were scored" in (Path(lacking.run) / "logs/rank-00000.log").read_text()


@pytest.mark.slow
def test_a_signal_ends_the_scoring_and_the_run_goes_on_later(documents):
    config = make_config(documents, "interrupted", tasks=["piqa"], tasks_every=2)
    [(outcomes, seconds), _] = run_processes(2, interrupted, config, timeout=120)
    assert outcomes == [(EXIT_REQUEUE, [])]
    assert seconds < 60
    assert [step for step, *_ in losses(config)] == [1, 2]
    assert run_processes(2, train_all, [config]) == [[(0, [])]] * 2
    assert [file.name for file in (Path(config.run) / "evals/tasks").iterdir()] == ["step-00000004.json"]


@pytest.mark.parametrize(
    ("evaluation", "message"),
    [
        ({"tasks": ["piqaa"]}, r"evaluation\.tasks piqaa is no task of lm-eval\. Did you mean piqa\?"),
        ({"tasks": ["piqa"], "tasks_data": "nowhere"}, r"evaluation\.tasks_data nowhere is not a folder"),
    ],
    ids=str,
)
def test_tasks_that_cannot_be_scored_are_refused_at_the_start(documents, evaluation, message):
    with pytest.raises(UserError, match=message):
        open_inputs(make_config(documents, "x", **evaluation), "cpu")
