"""Benchmarks: a checkpoint scores as its exported folder does, and what cannot be scored is named."""

import json
import math
import runpy
import sys

import pytest
import torch
from safetensors.torch import save_file

import tiny
from megacocomix.checkpoint import format as format_
from megacocomix.checkpoint.format import CHECKPOINT_FILE, CHECKPOINT_FORMAT, CHECKPOINT_VERSION
from megacocomix.checkpoint.open import load_model
from megacocomix.errors import UserError
from megacocomix.evaluation import harness
from megacocomix.evaluation.harness import evaluate_command, evaluate_tasks, parse_tasks
from megacocomix.evaluation.perplexity import evaluate_folder
from megacocomix.files import file_sha256
from megacocomix.hf.export import export_hf
from megacocomix.hf.open import open_model
from megacocomix.model.gpt2 import assemble, initialise

pytest.importorskip("lm_eval")

VOCAB, CONTEXT = 4096, 40
WORDS = "The old ship sailed north through heavy ice while its crew of nine kept watch and told each other stories."
LONG = " ".join([WORDS] * 4)  # more than the context
DOCUMENTS = {
    "lambada_openai": [{"text": "They went to sea. She took the wheel"}, {"text": LONG}, {"text": "One two"}],
    "wikitext": [{"page": f" = Ships = \n\n {LONG} , and 1 @,@ 000 more . \n"}, {"page": " = Ice = \n\n Cold . \n"}],
    "hellaswag": [
        {
            "activity_label": "Sailing",
            "ctx_a": "A crew is on deck.",
            "ctx_b": "it",
            "endings": ["watches the ice.", "sings [loud] songs.", "sleeps [title] It snows.", "reads."],
            "label": str(label),
        }
        for label in (0, 2)
    ],
    "piqa": [{"goal": "Turn a ship", "sol1": "turn the wheel", "sol2": "turn the mast", "label": 0}],
    "social_iqa": [
        {
            "context": "Ann told a story.",
            "question": "Why did Ann do this?",
            "answerA": "to cheer them",
            "answerB": "to eat",
            "answerC": "to leave",
            "label": "1",
        }
    ],
    "arc_easy": [
        {
            "id": "Q1",
            "question": "What is ice?",
            "choices": {"text": ["Frozen water", "A metal", "A gas"], "label": ["A", "B", "C"]},
            "answerKey": "A",
        }
    ],
    "winogrande": [
        {"sentence": "Ann beat Eve because _ was fast.", "option1": "Ann", "option2": "Eve", "answer": "1"},
        {"sentence": "Ann beat Eve because _ was slow.", "option1": "Ann", "option2": "Eve", "answer": "2"},
    ],
}
# What the standard tasks of version 0.4.13 ask of the first document of each.
PROMPTS = {
    "lambada_openai": [("They went to sea. She took the", " wheel")],
    "hellaswag": [
        ("Sailing: A crew is on deck. It", " watches the ice."),
        ("Sailing: A crew is on deck. It", " sings songs."),
        ("Sailing: A crew is on deck. It", " sleeps. It snows."),
        ("Sailing: A crew is on deck. It", " reads."),
    ],
    "piqa": [
        ("Question: Turn a ship\nAnswer:", " turn the wheel"),
        ("Question: Turn a ship\nAnswer:", " turn the mast"),
    ],
    "social_iqa": [
        ("Q: Ann told a story. Why did Ann do this?\nA:", " to cheer them"),
        ("Q: Ann told a story. Why did Ann do this?\nA:", " to eat"),
        ("Q: Ann told a story. Why did Ann do this?\nA:", " to leave"),
    ],
    "arc_easy": [
        ("Question: What is ice?\nAnswer:", " Frozen water"),
        ("Question: What is ice?\nAnswer:", " A metal"),
        ("Question: What is ice?\nAnswer:", " A gas"),
    ],
    "winogrande": [("Ann beat Eve because Ann", " was fast."), ("Ann beat Eve because Eve", " was fast.")],
    "wikitext": [(f" = Ships =\n\n{LONG}, and 1,000 more.\n",)],
}


def write_checkpoint(folder, step, method, tokenizer):
    """A checkpoint of random weights in a run: without optimizer states, which nothing here reads."""
    config = tiny.config(
        folder.parent,
        folder.name,
        method={"name": method},
        model={"vocab_size": VOCAB, "context": CONTEXT},
        data={"tokenizer": tokenizer},
    )
    model = assemble(config)
    initialise(model, step)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2) if parameter.dim() > 1 else parameter.add_(0.1)  # so that next tokens depend on the text
    checkpoint = folder / "checkpoints" / f"step-{step:08}"
    checkpoint.mkdir(parents=True)
    weights = checkpoint / "weights-00000.safetensors"
    save_file({name: parameter.detach().clone() for name, parameter in model.named_parameters()}, weights)
    manifest = {"format": CHECKPOINT_FORMAT, "version": CHECKPOINT_VERSION, "state": {}, "inputs": {}}
    manifest["config"] = config.model_dump(mode="json")
    manifest["files"] = {weights.name: {"bytes": weights.stat().st_size, "sha256": file_sha256(weights)}}
    (checkpoint / CHECKPOINT_FILE).write_text(json.dumps(manifest))
    return checkpoint


def values(found):
    """What was measured; of a perplexity its logarithm, the mean loss, which is what rounding is small against."""
    return {
        name: math.log(metric["value"]) if name.endswith("perplexity") else metric["value"]
        for name, metric in found["metrics"].items()
    }


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("eval")
    for task, documents in DOCUMENTS.items():
        (folder / f"{task}.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    return folder


@pytest.fixture(scope="module")
def tokenizer(root):
    return str(root / "assets/teacher/tokenizer.model")


@pytest.fixture
def run(tmp_path, tokenizer):
    write_checkpoint(tmp_path / "run", 2, "ntp", tokenizer)
    return tmp_path / "run"


def command(monkeypatch, capsys, root, *arguments):
    """tools/evaluate.py: its exit code, standard output and standard error."""
    tool = str(root / "tools/evaluate.py")
    monkeypatch.setattr(sys, "argv", [tool, *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(tool, run_name="__main__")
    return end.value.code, *capsys.readouterr()


@pytest.mark.parametrize("method", ["ntp", "cocomix"])
def test_a_checkpoint_scores_as_its_exported_folder_does(tmp_path, tokenizer, data, method):
    checkpoint = write_checkpoint(tmp_path / "run", 2, method, tokenizer)
    export_hf(load_model(checkpoint), tmp_path / "hf", tokenizer)
    native, exported = (evaluate_tasks(folder, list(DOCUMENTS), data) for folder in (checkpoint, tmp_path / "hf"))
    assert native["missing"] == exported["missing"] == {}
    assert list(native["results"]) == list(DOCUMENTS)
    for task, found in native["results"].items():
        expected = exported["results"][task]
        assert {**found, "metrics": None} == {**expected, "metrics": None}
        assert found["num_samples"] == len(DOCUMENTS[task])
        assert values(found) == pytest.approx(values(expected), rel=1e-6), task
    assert set(native["results"]["wikitext"]["metrics"]) == {"word_perplexity", "byte_perplexity", "bits_per_byte"}
    assert set(native["results"]["hellaswag"]["metrics"]) == {"acc", "acc_norm"}


@pytest.mark.parametrize("task", PROMPTS)
def test_local_documents_are_asked_as_the_standard_task_asks(data, task):
    definition, source = harness._load_task(task, data)
    assert source == f"local {file_sha256(data / f'{task}.jsonl')}"
    definition.set_config("num_fewshot", 0)
    definition.build_all_requests(limit=1)
    assert [request.args for request in definition.instances] == PROMPTS[task]


@pytest.mark.parametrize("task", DOCUMENTS)
def test_our_task_files_ask_and_score_as_the_harnesss_own_definitions_do(data, task):
    from collections import defaultdict

    from datasets import Dataset

    documents = Dataset.from_list(DOCUMENTS[task])
    own = harness._definitions(everything=False)
    changed = {"task": task, "custom_dataset": lambda **_: defaultdict(lambda: documents)}
    theirs = own.load({"group": "theirs", "task": [changed]})["tasks"][task]
    ours, _ = harness._load_task(task, data)
    scored = []
    for each in (ours, theirs):
        each.set_config("num_fewshot", 0)
        each.build_all_requests()
        answers = [(-float(index), index == 1) for index in range(len(each.instances))]
        by_document = defaultdict(list)
        for request, answer in zip(each.instances, answers, strict=True):
            by_document[request.doc_id].append(answer if each.OUTPUT_TYPE != "loglikelihood_rolling" else answer[0])
        scores = [each.process_results(each.instances[0].doc, results) for results in by_document.values()]
        requests = [(request.request_type, request.args) for request in each.instances]
        scored.append((requests, scores, each.aggregation().keys(), each.higher_is_better(), each.VERSION))
    assert len(scored[0][0]) >= len(DOCUMENTS[task])
    assert scored[0] == scored[1]


def test_our_task_files_work_for_the_harness_alone(data, monkeypatch, tmp_path):
    import datasets
    from lm_eval.tasks import TaskManager

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(data)  # the files are looked for in the folder that one is in
    found = TaskManager(include_defaults=False, include_path=str(harness.LOCAL_TASKS)).load(list(DOCUMENTS))["tasks"]
    for task, documents in DOCUMENTS.items():
        assert len(list(found[task].eval_docs)) == len(documents)


def test_a_folder_with_a_sentencepiece_model_alone_scores_the_same(tmp_path, run, tokenizer, data):
    export_hf(load_model(run), tmp_path / "hf", tokenizer)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "hf" / name).unlink()
    found, expected = (evaluate_tasks(folder, ["wikitext"], data)["results"] for folder in (run, tmp_path / "hf"))
    assert values(found["wikitext"]) == pytest.approx(values(expected["wikitext"]), rel=1e-6)


def test_a_runs_results_lie_in_its_evals_and_say_what_was_measured(run, data):
    result = evaluate_tasks(run, ["piqa"], data, limit=1)
    file = run / "evals/tasks/step-00000002-limit-1.json"
    assert result.pop("file") == str(file)
    assert json.loads(file.read_text()) == result
    metrics = {
        name: {"value": value["value"], "stderr": None} for name, value in result["results"]["piqa"]["metrics"].items()
    }
    assert result == {
        "kind": "tasks",
        "model": str(run / "checkpoints/step-00000002"),
        "sha256": load_model(run).sha256,
        "step": 2,
        "harness": harness.harness_version(),
        "precision": "fp32",
        "num_fewshot": 0,
        "limit": 1,
        "results": {
            "piqa": {
                "metrics": metrics,
                "num_samples": 1,
                "version": 1.0,
                "source": f"local {file_sha256(data / 'piqa.jsonl')}",
            }
        },
        "missing": {},
    }


def test_results_of_other_tasks_are_kept_for_the_same_settings_only(run, data):
    file = run / "evals/tasks/step-00000002.json"
    evaluate_tasks(run, ["piqa"], data)
    evaluate_tasks(run, ["winogrande"], data)
    assert list(json.loads(file.read_text())["results"]) == ["piqa", "winogrande"]
    evaluate_tasks(run, ["winogrande"], data, limit=1)
    limited = run / "evals/tasks/step-00000002-limit-1.json"
    assert list(json.loads(limited.read_text())["results"]) == ["winogrande"]
    evaluate_tasks(run, ["wikitext"], run)  # not available
    assert list(json.loads(file.read_text())["results"]) == ["piqa", "winogrande"]


def test_a_missing_task_is_named_the_others_go_on_and_the_exit_code_says_so(
    monkeypatch, capsys, root, tmp_path, run, data
):
    (tmp_path / "eval").mkdir()
    for task in ("piqa", "winogrande"):
        (tmp_path / "eval" / f"{task}.jsonl").write_bytes((data / f"{task}.jsonl").read_bytes())
    (tmp_path / "eval/arc_easy.jsonl").write_text("truncated")
    arguments = ["tasks", run, "--tasks", "wikitext,piqa,arc_easy,winogrande", "--tasks-data", tmp_path / "eval"]
    code, out, err = command(monkeypatch, capsys, root, *arguments)
    assert code == 2
    assert "piqa" in out and "winogrande" in out and "acc_norm" in out and "1 samples, local" in out
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 2
    assert "wikitext is missing: " in lines[0] and "wikitext.jsonl does not exist, and the hub's data set" in lines[0]
    assert "arc_easy is missing" in lines[1] and "arc_easy.jsonl is not one JSON object per line" in lines[1]
    kept = json.loads((run / "evals/tasks/step-00000002.json").read_text())
    assert list(kept["results"]) == ["piqa", "winogrande"] and list(kept["missing"]) == ["wikitext", "arc_easy"]


def test_every_checkpoint_is_evaluated_once(monkeypatch, capsys, root, run, tokenizer, data):
    arguments = ["tasks", run, "--tasks", "piqa", "--tasks-data", data, "--all-checkpoints"]
    code, out, _ = command(monkeypatch, capsys, root, *arguments)
    assert code == 0 and out.count("acc_norm") == 1 and "before" not in out
    write_checkpoint(run, 4, "ntp", tokenizer)
    code, out, _ = command(monkeypatch, capsys, root, *arguments)
    assert code == 0 and out.count("evaluated before") == 1 and out.count("written to") == 1
    assert (run / "evals/tasks/step-00000004.json").exists()
    # Other settings, and other documents, are another evaluation.
    assert "before" not in command(monkeypatch, capsys, root, *arguments, "--limit", "1")[1]
    changed = (data / "piqa.jsonl").read_text() * 2
    (run.parent / "eval").mkdir()
    (run.parent / "eval/piqa.jsonl").write_text(changed)
    arguments[arguments.index(data)] = run.parent / "eval"
    assert "before" not in command(monkeypatch, capsys, root, *arguments, "--limit", "1")[1]


def test_perplexity_of_every_checkpoint_too(monkeypatch, capsys, root, run):
    tiny.write_tokens(run.parent / "val.bin", 5 * CONTEXT)
    code, first, _ = command(monkeypatch, capsys, root, "perplexity", run, "--all-checkpoints")
    assert code == 0 and "before" not in first
    code, second, _ = command(monkeypatch, capsys, root, "perplexity", run, "--all-checkpoints")
    assert code == 0 and second.strip() == first.splitlines()[0] + " (evaluated before)"


def test_a_run_is_compared_with_its_hashes_once(monkeypatch, run):
    hashed = []
    monkeypatch.setattr(format_, "file_sha256", lambda file: hashed.append(file) or file_sha256(file))
    open_model(run)
    assert len(hashed) == len(set(hashed)) == 1


def test_an_exported_model_with_concepts_has_the_perplexity_of_its_checkpoint(tmp_path, tokenizer):
    tiny.write_tokens(tmp_path / "val.bin", 5 * CONTEXT)
    checkpoint = write_checkpoint(tmp_path / "run", 2, "cocomix", tokenizer)
    export_hf(load_model(checkpoint), tmp_path / "hf", tokenizer)
    data = str(tmp_path / "val.bin")
    found, expected = (evaluate_folder(folder, data, batch=2) for folder in (tmp_path / "hf", checkpoint))
    assert found["valid_loss"] == pytest.approx(expected["valid_loss"], rel=1e-6)
    assert found["num_sequences"] == 5 and "file" not in found


def test_out_takes_the_results_of_an_exported_folder(monkeypatch, capsys, root, tmp_path, run, tokenizer, data):
    export_hf(load_model(run), tmp_path / "hf", tokenizer)
    out_file = tmp_path / "results/hf.json"
    arguments = ["tasks", tmp_path / "hf", "--tasks", "piqa", "--tasks-data", data, "--out", out_file]
    code, out, _ = command(monkeypatch, capsys, root, *arguments)
    assert code == 0 and "results/hf.json" in out
    assert json.loads(out_file.read_text())["step"] is None
    out_file.write_text("mine")
    code, _, err = command(monkeypatch, capsys, root, *arguments)
    assert code == 2 and "exists" in err and out_file.read_text() == "mine"


@pytest.mark.parametrize(("name", "what"), [("helaswag", "Did you mean hellaswag?"), ("xyzzyx", "Valid: arc_easy")])
def test_an_unknown_task_is_refused_with_the_nearest_name(name, what):
    with pytest.raises(UserError, match=what):
        parse_tasks(f"piqa,{name}")


def test_paper_stands_for_the_papers_tasks():
    assert parse_tasks("paper") == list(harness.PAPER_TASKS)
    assert parse_tasks("piqa,paper")[0] == "piqa" and len(parse_tasks("piqa,paper")) == 7


def test_without_the_harness_it_is_said_how_to_get_it(monkeypatch):
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[eval\]'"):
        parse_tasks("piqa")


def test_a_tokenizer_of_another_vocabulary_is_refused(tmp_path, data):
    with pytest.raises(UserError, match="vocabulary of 4096, but its tokenizer one of 50257"):
        evaluate_tasks(write_checkpoint(tmp_path / "run", 2, "ntp", "gpt2"), ["piqa"], data)


def test_the_command_for_a_checkpoint_is_one_that_the_tool_takes(monkeypatch, capsys, root, run, data):
    arguments = evaluate_command(run / "checkpoints/step-00000002", "piqa", data, limit=1)
    assert arguments[:2] == [sys.executable, str(root / "tools/evaluate.py")]
    assert command(monkeypatch, capsys, root, *arguments[2:])[0] == 0
    assert (run / "evals/tasks/step-00000002-limit-1.json").exists()
