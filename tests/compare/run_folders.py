"""Run folders as a training writes them, without the training."""

import json
import math

import yaml


def config(**changes):
    """A resolved config; `section__key=value` changes one setting."""
    values = {
        "model": {"num_layers": 2, "hidden_size": 64, "context": 16, "vocab_size": 512},
        "method": {"name": "ntp"},
        "data": {"train": "shards/train", "valid": "shards/valid", "tokenizer": "gpt2"},
        "training": {"steps": 40, "global_batch": 4, "seed": 22},
        "evaluation": {"batches": 10},
    }
    for name, value in changes.items():
        section, key = name.split("__")
        values.setdefault(section, {})[key] = value
    return values


def spent(step, cost=2.0, teacher=0.0):
    """What a run has spent that spends `cost` FLOPs a token on the student and takes a second for 10 of them."""
    tokens = 100 * step
    flops = {"flops": cost * tokens, "teacher_flops": teacher * tokens}
    return {"step": step, "tokens": tokens, **flops, "seconds": cost * tokens / 10}


def valid_line(step, loss, cost=2.0, teacher=0.0):
    """A validation line."""
    return {**spent(step, cost, teacher), "valid_loss": loss, "valid_ppl": math.exp(loss)}


def train_line(step, loss, **more):
    """A training line."""
    return {**spent(step), "loss": loss, "concept_loss": None, "mfu": None, **more}


def write_run(folder, lines, **changes):
    """config.yaml and metrics.jsonl; a line that is text is written as it is."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({"run": str(folder), **config(**changes)}))
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text)
    return folder


def write_seeds(folder, name, losses, **changes):
    """Runs NAME-s1, NAME-s2 … that end with these losses at step 40."""
    lines = [[valid_line(20, loss + 1), valid_line(40, loss)] for loss in losses]
    return [write_run(folder / f"{name}-s{n}", each, training__seed=n, **changes) for n, each in enumerate(lines, 1)]


def write_evaluation(folder, step, loss, **changes):
    """RUN/evals/NAME.json as tools/evaluate.py writes it."""
    values = {"data": "shards/valid", "data_fingerprint": "f1", "context": 16, "num_sequences": 100}
    values |= {"step": step, "valid_loss": loss, "valid_ppl": 1.0} | changes
    (folder / "evals").mkdir(exist_ok=True)
    (folder / "evals" / f"{len(list((folder / 'evals').iterdir()))}.json").write_text(json.dumps(values))


def write_tasks(folder, step=40, sources=None, **metrics):
    """RUN/evals/tasks/step-N.json; `task__metric=value`. `sources`: task → where it was read from."""
    results = {}
    for name, value in metrics.items():
        task, metric = name.split("__")
        result = results.setdefault(task, {"metrics": {}, "num_samples": 9, "version": 1, "source": "hub"})
        result["metrics"][metric] = {"value": value, "stderr": 0.01}
        result["source"] = (sources or {}).get(task, "hub")
    values = {"kind": "tasks", "step": step, "harness": "lm-eval 0.4.13", "precision": "fp32", "num_fewshot": 0}
    file = folder / "evals" / "tasks" / f"step-{step:08}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({**values, "limit": None, "results": results, "missing": {}}))


def write_checkpoint(folder, step=40, inputs=None, **tensors):
    """RUN/checkpoints/step-N with weights, in two files, and hashes of what was read."""
    from safetensors.torch import save_file

    checkpoint = folder / "checkpoints" / f"step-{step:08}"
    checkpoint.mkdir(parents=True)
    names = [name.replace("__", ".") for name in tensors]
    files = {}
    for index, each in enumerate((names[::2], names[1::2])):
        file = checkpoint / f"weights-{index:05}.safetensors"
        save_file({name: tensors[name.replace(".", "__")] for name in each}, file)
        files[file.name] = {"bytes": file.stat().st_size, "sha256": ""}
    about = {"format": "megacocomix-checkpoint", "version": 1, "state": {}, "config": {}, "inputs": inputs or {}}
    (checkpoint / "checkpoint.json").write_text(json.dumps({**about, "files": files}))
    return checkpoint
