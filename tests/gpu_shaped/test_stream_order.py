"""On CUDA, kernels of several streams run in any order that nobody forbids. Here the real trainer runs on a simulated
GPU (streams.py), which shows whether the order that it asks for is enough: with DeepSpeed's streams, the teacher's,
NCCL's, and copies to the host. Every check must also find what it is for: each run ends with steps in which one wait
or one `record_stream` is left out.
"""

from concurrent.futures import ThreadPoolExecutor

import pytest
from stream_runs import SABOTAGES, Run, take_batches, train

from processes import run_processes

pytestmark = pytest.mark.slow


def layout(zero, precision, method=None, held=False, **parallel):
    return {
        "parallel": {"zero": zero, "reshard_after_forward": not held} | parallel,
        "training": {"precision": precision},
        "method": method or {},
        "model": {"num_layers": 4},  # as many as stages
    }


KD, HIDDEN, BOTH = {"name": "kd"}, {"name": "direct-hidden"}, {"name": "cocomix+kd"}
STAGES = {"pipeline": 2, "virtual_stages": 2}
TENSOR = {"tensor": 2, "sequence": True}
CHECKPOINT = ("checkpoint does not wait for its gather", "checkpoint is written before it is copied")
PIPELINE = (
    "stage does not wait for its input",
    "validation does not wait for its input",
    "sent tensors are forgotten",
)
LOSSES = ("losses are read before they are copied",)
OFFLOAD = ("offloaded gradients are read before they are copied",)
TEACHER = ("student does not wait for the teacher", "targets are freed while the student reads them")

RUNS = {
    "zero 0": Run(layout(0, "fp32", BOTH)),
    "zero 1, bf16": Run(layout(1, "bf16"), sabotages=CHECKPOINT),
    "zero 1": Run(layout(1, "fp32"), sabotages=LOSSES),
    "zero 2, bf16": Run(layout(2, "bf16")),
    "zero 2": Run(layout(2, "fp32", HIDDEN)),
    "zero 3, bf16": Run(
        layout(3, "bf16", BOTH),
        sabotages=(
            "modules do not wait for gathered weights",
            "reduction does not wait for gradients",
            "gradients are freed while they are copied",
            "nothing waits for the reduction",
        ),
    ),
    "zero 3": Run(layout(3, "fp32"), sabotages=("validation does not wait for gathered weights",)),
    "zero 3 with weights held, bf16": Run(layout(3, "bf16", held=True)),
    "zero 3 with weights held": Run(layout(3, "fp32", KD, held=True)),
    "first stage of two, bf16": Run(layout(1, "bf16", pipeline=2), 4, 0, PIPELINE[::2]),
    "last stage of two, tensor 2": Run(layout(1, "fp32", HIDDEN, pipeline=2, **TENSOR), 8, 5, PIPELINE[:2]),
    "interleaved stages, first rank": Run(layout(1, "fp32", **STAGES), 4, 0, PIPELINE),
    "interleaved stages, last rank, bf16": Run(layout(3, "bf16", BOTH, **STAGES, **TENSOR), 8, 5, PIPELINE[:2]),
    "offload, zero 1": Run(layout(1, "fp32", offload_optimizer=True)),
    "offload, zero 2, bf16": Run(layout(2, "bf16", offload_optimizer=True)),
    "offload, zero 3, bf16": Run(layout(3, "bf16", offload_optimizer=True), sabotages=OFFLOAD),
}

# Teacher targets of each kind and of each label source, made by one rank for each copy of the model or by two.
SOURCES = [{"label_source": source} for source in ("attribution", "activation", "random")]
TARGETS = [{"method": method, "parallel": {"zero": 1}} for method in (*SOURCES, KD, HIDDEN, BOTH)]
TARGETS += [{"method": method, "parallel": {"zero": 1} | TENSOR} for method in (SOURCES[0], HIDDEN, BOTH)]

# How often the host may wait for the device in a step with two micro-batches. Ours: for the gradient norm; with offload
# also for the gradients, and to copy their norms to the device. DeepSpeed's: in stage 1 with bf16 it checks that norm
# twice. In stage 3 it also waits for old collectives, whose number depends on sizes.
OURS = 1
WAITS = {"zero 0": 1, "zero 1": 1, "zero 1, bf16": 3, "zero 2": 1, "zero 2, bf16": 1}


@pytest.fixture(scope="module")
def results(folder):
    """Outcomes of the runs, and what `take_batches` returns. A process each, because all that is patched is global; two
    at a time."""
    start = lambda *call: pool.submit(run_processes, 1, *call)
    with ThreadPoolExecutor(2) as pool:
        batches = start(take_batches, folder, TARGETS, TEACHER)
        trained = [start(train, folder, f"run-{i}", run) for i, run in enumerate(RUNS.values())]
        return {name: each.result()[0] for name, each in zip(RUNS, trained, strict=True)}, batches.result()[0]


@pytest.fixture(scope="module")
def outcomes(results):
    return results[0]


@pytest.fixture(scope="module")
def batches(results):
    return results[1]


@pytest.mark.parametrize("name", RUNS)
def test_training_validating_and_saving_have_no_race_and_reuse_no_memory_early(outcomes, name):
    assert outcomes[name].exit_code == 0
    assert outcomes[name].faults[None] == []


@pytest.mark.parametrize(("name", "sabotage"), [(name, each) for name, run in RUNS.items() for each in run.sabotages])
def test_a_missing_wait_in_training_is_found(outcomes, name, sabotage):
    assert outcomes[name].num_skipped[sabotage], "nothing was left out: the place has another name now"
    assert outcomes[name].faults[sabotage]


@pytest.mark.parametrize("index", range(len(TARGETS)))
def test_the_teachers_stream_has_no_race_and_each_missing_wait_is_found(batches, index):
    faults, num_skipped = batches[index]
    assert faults.pop(None) == []
    assert all(faults[sabotage] and num_skipped[sabotage] for sabotage in TEACHER)


def test_every_sabotage_is_tried():
    assert {*TEACHER, *(each for run in RUNS.values() for each in run.sabotages)} == set(SABOTAGES)


def test_the_host_waits_for_the_device_a_known_number_of_times_a_step(outcomes):
    for name, outcome in outcomes.items():
        ours = [number for place, number in outcome.waits.items() if "(megacocomix" in place.split(" < ")[0]]
        more = 2 * ("offload_optimizer" in RUNS[name].config["parallel"])
        assert sum(ours) <= OURS + more, (name, outcome.waits)
        assert name not in WAITS or outcome.waits.total() <= WAITS[name], (name, outcome.waits)
