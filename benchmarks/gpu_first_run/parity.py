"""Parity: the demo's model in every precision and layout on this machine, against one CPU process."""

from collections.abc import Iterator
from math import isnan
from pathlib import Path

import torch

from benchmarks.gpu_first_run.cases import CASE_LIMIT, Case, run_cases
from benchmarks.gpu_first_run.jobs import Machine, own_process, python, run, torchrun
from benchmarks.gpu_first_run.report import Report
from megacocomix.config.load import load_config

# Largest relative differences in any step. fp32: on a CPU, layouts differ by 1e-7 in losses and 1e-5 in the norm, and
# kernels that sum in another order will too. bf16 rounds to 2^-9 everywhere: on a CPU it differs from fp32, and tensor
# ranks from one process, by 2e-4 and 6e-3. A gradient that misses a rank's share, or is counted twice, changes the norm
# by tens of percents.
TOLERANCE = {
    "fp32": {"loss": 2e-5, "concept_loss": 2e-5, "grad_norm": 1e-3},
    "bf16": {"loss": 1e-3, "concept_loss": 1e-3, "grad_norm": 0.05},
}
PARITY_STEPS = 4


def parity(machine: Machine, report: Report) -> None:
    """Train all cases and compare them, then resume those that were stopped, then compare labels."""
    add = lambda *row: report.add("parity", *row)
    text = machine.out / "inputs/wiki"
    words = ("assets/corpus/wiki_vital.jsonl.gz", "--out", text, "--tokenizer", "assets/teacher/tokenizer.model")
    command = python("tools/prepare_data.py", *words, "--valid", "0.05")
    if failure := run(command, machine.out / "logs/text", False, CASE_LIMIT):
        return add("shipped text", False, failure)
    on_cpu = [parity_case(machine, precision, f"CPU {precision}", ["parallel.zero=1"]) for precision in TOLERANCE]
    references = run_cases("reference", on_cpu, machine, 1, False)
    cases = {case.name: case for case in parity_cases(machine)}
    found = {}
    for job in ("parity", "parity, deterministic"):
        of_job = [case for name, case in cases.items() if ("deterministic" in name) == ("deterministic" in job)]
        found |= run_cases(job, of_job, machine, machine.world, machine.has_gpu)
    for precision, bounds in TOLERANCE.items():
        reference = machine.run_folder(f"CPU {precision}")
        if failure := references[f"CPU {precision}"].get("failure"):
            add(f"CPU {precision}", False, failure)
            continue
        for name in (name for name in cases if name.startswith(precision) and "stopped" not in name):
            if failure := found[name].get("failure"):
                add(name, False, failure)
                continue
            add(name, *compare(machine.run_folder(name), reference, bounds))
        if precision == "bf16":
            apart = compare(reference, machine.run_folder("CPU fp32"), bounds)
            add("bf16 against fp32, both on the CPU", *apart)
    for name in ("tensor 2", "tensor 2, sequence false", "pipeline 2", "tensor 2 × pipeline 2"):
        if f"bf16, {name}" not in cases:
            add(f"bf16, {name}", "n/a", f"needs {4 if '×' in name else 2} GPUs")
    for name in (name for name in cases if "stopped" in name):
        resume(machine, report, cases[name], found[name].get("failure"))
    own_process("labels", "parity", machine, report)


def parity_case(machine: Machine, precision: str, name: str, overrides: list[str]) -> Case:
    """A run of the demo's model on the shipped text, with as many samples a step on every layout."""
    text = machine.out / "inputs/wiki"
    common = [
        f"run={machine.run_folder(name)}",
        f"data.train={text}/train",
        f"data.valid={text}/valid",
        f"model.context={256 if machine.has_gpu else 64}",
        f"training.global_batch={4 * machine.world}",
        "training.micro_batch=2",
        f"training.steps={PARITY_STEPS}",
        f"training.precision={precision}",
        "teacher.precision=fp32",
        # eps: the key bias has a mathematically zero gradient, which a small eps would blow up to noise.
        *("optimizer.lr=1e-3", "optimizer.min_lr=1e-4", "optimizer.warmup_steps=1", "optimizer.eps=1e-5"),
        *(f"evaluation.every={PARITY_STEPS // 2}", "evaluation.batches=1", "logging.every=1"),
    ]
    return Case(name, "configs/tiny.yaml", common + overrides)


def parity_cases(machine: Machine) -> Iterator[Case]:
    """The runs that are compared with one CPU process. A run that is stopped in the middle is resumed later."""
    layouts = {
        "ZeRO 1": ["parallel.zero=1"],
        "ZeRO 2": ["parallel.zero=2"],
        "ZeRO 3": ["parallel.zero=3", "parallel.reshard_after_forward=true"],
        "ZeRO 3, reshard false": ["parallel.zero=3", "parallel.reshard_after_forward=false"],
        "ZeRO 1, offload": ["parallel.zero=1", "parallel.offload_optimizer=true"],
    }
    if machine.world >= 2:
        layouts |= {
            "tensor 2": ["parallel.zero=1", "parallel.tensor=2"],
            "tensor 2, sequence false": ["parallel.zero=1", "parallel.tensor=2", "parallel.sequence=false"],
            "pipeline 2": ["parallel.zero=1", "parallel.pipeline=2"],
        }
    if machine.world >= 4:
        layouts["tensor 2 × pipeline 2"] = ["parallel.zero=1", "parallel.tensor=2", "parallel.pipeline=2"]
    for zero in (0, 3):
        yield parity_case(machine, "fp32", f"fp32, ZeRO {zero}", [f"parallel.zero={zero}"])
    for name, overrides in layouts.items():
        yield parity_case(machine, "bf16", f"bf16, {name}", overrides)
    half = f"training.stop_after={PARITY_STEPS // 2}"
    yield parity_case(machine, "bf16", "bf16, ZeRO 1, stopped", ["parallel.zero=1", half])
    overrides = ["parallel.zero=1", "training.deterministic=true"]
    yield parity_case(machine, "bf16", "bf16, deterministic", overrides)
    yield parity_case(machine, "bf16", "bf16, deterministic, stopped", [*overrides, half])


def compare(ours: Path, theirs: Path, bounds: dict[str, float]) -> tuple[bool, str, str]:
    """Whether the losses and gradient norms of two runs agree in every step, the largest relative differences, and the
    bounds."""
    from megacocomix.compare.runs import read_metrics

    one, other = (read_metrics(folder / "metrics.jsonl")["loss"] for folder in (ours, theirs))
    if one.keys() != other.keys():
        return False, f"{len(one)} steps against {len(other)}", "the same steps"
    distances = {key: [abs(one[at][key] - other[at][key]) / abs(other[at][key]) for at in other] for key in bounds}
    unlike = {key: max(values, key=lambda value: (isnan(value), value)) for key, values in distances.items()}
    is_right = all(unlike[key] <= bound for key, bound in bounds.items())  # false for NaN
    show = lambda values, form: ", ".join(
        f"{key.removesuffix('_loss')} {value:{form}}" for key, value in values.items()
    )
    return is_right, show(unlike, ".1e"), "at most " + show(bounds, "g")


def resume(machine: Machine, report: Report, case: Case, failure: str | None) -> None:
    """Start the command of a stopped run again, as a user would, and compare it with the run that was not stopped."""
    from megacocomix.compare.identical import compare as identical

    stopped, whole = machine.run_folder(case.name), machine.run_folder(case.name.removesuffix(", stopped"))
    name, logs = f"resume: {case.name.removesuffix(', stopped')}", machine.out / "logs" / stopped.name
    words = ["--config", case.recipe, *(word for word in case.overrides if "stop_after" not in word)]
    command = torchrun(machine.world, logs, "launcher/pretrain.py", *words)
    if failure := failure or run(command, logs, machine.has_gpu, CASE_LIMIT):
        return report.add("parity", name, False, failure)
    answer = identical(whole, stopped)
    if not machine.has_gpu or "deterministic" in case.name:
        report.add("parity", name, answer.identical, answer.text, "identical to the bit")
    else:
        is_right, value, expected = compare(stopped, whole, TOLERANCE["bf16"])
        bits = "identical to the bit" if answer.identical else value
        report.add("parity", name, is_right, bits, f"{expected}; to the bit only with training.deterministic")


def compare_labels(machine: Machine, report: Report) -> None:
    """The share of positions to which this device gives the CPU's labels, in a process of its own. At the start of
    training a concept loss hardly depends on its labels, so the losses do not show this."""
    from megacocomix.data.tokens import TokenDataset, TokenShards
    from megacocomix.teacher.labels import open_labeler

    labels = {}
    for device, precision in (("cpu", "fp32"), (machine.device.type, "fp32"), (machine.device.type, "bf16")):
        overrides = [*parity_case(machine, "fp32", "labels", []).overrides, f"teacher.precision={precision}"]
        config = load_config("configs/tiny.yaml", overrides)
        windows = TokenDataset(TokenShards.open(config.data.valid), config.model.context, None).read(range(32))
        made = open_labeler(config, torch.device(device), 0)(torch.from_numpy(windows).to(device))
        labels[device, precision] = made.sort(-1).values.cpu()
    truth = labels["cpu", "fp32"]
    for precision in TOLERANCE:
        share = (labels[machine.device.type, precision] == truth).all(-1).float().mean().item()
        # fp32: only concepts whose scores are within rounding of each other may swap.
        is_right = share > 0.99 if precision == "fp32" else "figure"
        expected = "over 99%" if precision == "fp32" else "about 90%: scores within bf16's rounding swap"
        report.add(
            "parity", f"labels of a {precision} teacher", is_right, f"{share:.2%} as on the CPU in fp32", expected
        )
