"""On a GPU, the next step's targets are queued in slices, one before each of the student's forward passes."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

import tiny
from jobs import train
from megacocomix.errors import UserError
from megacocomix.parallel.pipeline import rank_order
from megacocomix.teacher import label_cache, labels
from megacocomix.teacher.label_cache import shard_file
from megacocomix.teacher.label_job import label_all
from megacocomix.teacher.model import Teacher
from megacocomix.training import batches as batches_module
from megacocomix.training.batches import Prefetcher, StepBatches
from megacocomix.training.inputs import open_inputs
from processes import run_processes

CPU = torch.device("cpu")


class Streams:
    """Stands for CUDA's streams on a CPU, and notes what is done in which order."""

    def __init__(self, monkeypatch):
        self.log, self.stack = [], ["main"]
        outer = self

        class Stream:
            def __init__(self, device):
                pass

            def wait_stream(self, other):
                outer.log.append("teacher waits")

        main = SimpleNamespace(wait_stream=lambda other: outer.log.append("main waits"))

        @contextmanager
        def use(stream):
            outer.stack.append("teacher")
            yield
            outer.stack.pop()

        monkeypatch.setattr(torch.cuda, "Stream", Stream)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: main)
        monkeypatch.setattr(torch.cuda, "stream", use)
        monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: outer.log.append("recorded"))


@pytest.fixture
def streams(monkeypatch):
    return Streams(monkeypatch)


def logged_steps(streams, num_passes, num_forwards):
    """The log of each step's take and forward passes; step i has num_passes[i] passes of the teacher."""

    def make(step):
        assert streams.stack == ["main", "teacher"]
        streams.log.append(f"read {step}")
        for _ in range(num_passes[step]):
            assert streams.stack == ["main", "teacher"]
            streams.log.append(f"pass {step}")
            yield
        return (torch.tensor([step]), None), "other"

    prefetcher, steps = Prefetcher(make, len(num_passes), CPU, num_forwards), []
    for step in range(len(num_passes)):
        streams.log.clear()
        (made, _), other = prefetcher(step)
        assert (made.item(), other) == (step, "other")
        for _ in range(num_forwards):
            streams.log.append("forward")
            prefetcher.prefetch()
        steps.append(list(streams.log))
    return steps


def between_forwards(log, what):
    """How often `what` occurs before the first forward pass, and after each."""
    counts = [0]
    for entry in log:
        counts = [*counts, 0] if entry == "forward" else [*counts[:-1], counts[-1] + (entry == what)]
    return counts


@pytest.mark.parametrize(("num_passes", "num_forwards"), [(32, 8), (33, 8), (5, 4), (3, 8), (8, 1), (0, 4)])
def test_the_teachers_passes_are_spread_evenly_over_the_students(streams, num_passes, num_forwards):
    first, second, last = logged_steps(streams, [num_passes] * 3, num_forwards)
    for log, step in ((first, 0), (second, 1), (last, 2)):
        before, *after = between_forwards(log, f"pass {step + 1}")
        assert before == 0
        assert sum(after) == (num_passes if step < 2 else 0)
        assert max(after) <= -(-num_passes // num_forwards)
        assert log.count(f"read {step + 1}") == (step < 2)
    assert first.count("read 0") == 1 and first.count("pass 0") == num_passes
    assert not {"read 1", "pass 1", "teacher waits"} & set(second[: second.index("main waits")])
    assert second.index("main waits") < second.index("recorded") < second.index("forward")


def test_what_is_left_of_a_step_is_queued_when_it_is_taken(streams):
    first, second, *_ = logged_steps(streams, [0, 10, 10], 4)  # as with an incomplete cache
    assert between_forwards(first, "pass 1") == [0, 1, 1, 1, 1]
    assert second[:7] == ["pass 1"] * 6 + ["main waits"]
    assert between_forwards(second, "pass 2") == [0, 3, 3, 3, 1]


@pytest.mark.parametrize(("pipeline", "virtual", "data"), [(1, 1, 1), (1, 1, 2), (2, 1, 1), (2, 2, 1)])
def test_a_step_has_as_many_slices_as_forward_passes(folder, monkeypatch, pipeline, virtual, data):
    layout = {"pipeline": pipeline, "virtual_stages": virtual, "zero": 1}
    config = tiny.config(folder, model={"num_layers": 4}, training={"micro_batch": 1}, parallel=layout)
    grid = SimpleNamespace(device=torch.device("cuda"), data=data, data_rank=0, model=1, model_rank=0)
    monkeypatch.setattr(batches_module, "Prefetcher", lambda make, last, device, num_slices: num_slices)
    num_slices = StepBatches(config, grid, open_inputs(config, CPU), 6).ahead
    for rank in range(pipeline):
        assert num_slices == sum(each.is_forward for each in rank_order(rank, pipeline, virtual, 8 // data))


def count_prefetches(config):
    """Train; the calls of `prefetch` in each step, each before a forward pass."""
    log, counts = [], []

    def watch(event, trainer):
        if event == "step":
            if not trainer.state.step:
                trainer.batches.prefetch = lambda: log.append("slice")
                forward = trainer.stages.forward
                trainer.stages.forward = lambda *inputs: (log.append("forward"), forward(*inputs))[1]
            log.clear()
        elif event == "gradients":
            assert log == ["slice", "forward"] * (len(log) // 2)
            counts.append(len(log) // 2)

    assert train(config, watch) == (0, [])
    return counts


@pytest.mark.slow
def test_the_trainer_asks_for_a_slice_before_each_forward_pass_and_not_in_validation(folder):
    layout = {"pipeline": 2, "virtual_stages": 2, "zero": 1}
    config = tiny.config(folder, "counted", model={"num_layers": 4}, training={"steps": 3}, parallel=layout)
    assert run_processes(2, count_prefetches, config) == [[8] * 3] * 2


CASES = {
    "labels": {},
    "random": {"method": {"label_source": "random"}},
    "hidden": {"method": {"name": "direct-hidden"}},
    "labels and outputs": {"method": {"name": "cocomix+kd", "interleave_every": 2}},
    "windowed": {"model": {"context": 40}, "teacher": {"windowed": True}},
    "cached": {"teacher": {"labels": "whole"}},
    "partly cached": {"teacher": {"labels": "part"}},
}


@pytest.fixture(scope="module")
def caches(folder):
    """A complete cache of eight shards, and one without four of them."""
    before, label_cache.SMALLEST_SHARD = label_cache.SMALLEST_SHARD, 25 * tiny.CONTEXT
    for name in ("whole", "part"):
        label_all(tiny.config(folder), folder / name, CPU)
    label_cache.SMALLEST_SHARD = before
    for shard in (0, 1, 4, 6):
        shard_file(folder / "part", shard).unlink()
    return {name: str(folder / name) for name in ("whole", "part")}


@pytest.fixture
def count(monkeypatch):
    """A list that gets the number of tokens of every forward pass of a teacher; in groups of 32 tokens."""
    monkeypatch.setitem(labels.FORWARD_TOKENS, "cpu", 32)
    passes = []
    for name in ("hidden", "hidden_and_gradient", "outputs"):
        method = getattr(Teacher, name)
        note = lambda self, tokens, method=method: (passes.append(tokens.numel()), method(self, tokens))[1]
        monkeypatch.setattr(Teacher, name, note)
    return passes


def step_batches(config, model_rank=0, model=1):
    grid = SimpleNamespace(device=CPU, data=1, data_rank=0, model=model, model_rank=model_rank)
    return StepBatches(config, grid, open_inputs(config, CPU), 3)


@pytest.mark.parametrize("model_rank", [None, 0, 2])
@pytest.mark.parametrize("case", CASES)
def test_targets_made_in_slices_are_those_made_at_once_in_the_same_passes(
    folder, caches, streams, count, case, model_rank
):
    sections = {name: dict(options) for name, options in CASES[case].items()}
    if "labels" in sections.get("teacher", {}):
        sections["teacher"]["labels"] = caches[sections["teacher"]["labels"]]
    config = tiny.config(folder, **sections)
    batches = step_batches(config, *(() if model_rank is None else (model_rank, 3)))
    prefetcher, spread = Prefetcher(batches._make, 3, CPU, 4), []
    for step in range(3):
        count.clear()
        windows, targets, _ = labels.at_once(batches._make(step))
        at_once = sorted(count)
        count.clear()
        found_windows, found, error = prefetcher(step)
        assert error is None
        assert found_windows.indices == windows.indices
        assert torch.equal(found_windows.tokens_NT, windows.tokens_NT)
        for one, other in zip(found, targets, strict=True):
            assert (one is None) == (other is None)
            assert one is None or torch.equal(one, other)
        assert sorted(spread + count) == at_once
        spread = []
        for _ in range(4):
            count.clear()
            prefetcher.prefetch()
            spread += count
            assert len(count) <= prefetcher.slice_size


def test_a_damaged_shard_is_reported_with_the_step_that_needs_it(folder, caches, streams, tmp_path):
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for file in (folder / "whole").iterdir():
        (damaged / file.name).write_bytes(file.read_bytes())
    for file in damaged.glob("*.bin"):
        file.write_bytes(bytes([0, 0x40]) * (len(file.read_bytes()) // 2))  # no such concepts
    batches = step_batches(tiny.config(folder, teacher={"labels": str(damaged)}))
    prefetcher = Prefetcher(batches._make, 3, CPU, 4)
    for step in range(3):
        _, targets, error = prefetcher(step)
        assert isinstance(error, UserError) and "is damaged" in str(error)
        assert not targets.labels_NMk.any()
        prefetcher.prefetch()
