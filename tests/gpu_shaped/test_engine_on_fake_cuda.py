"""The DeepSpeed engine on fake CUDA, one rank of each layout: what it sends, where and in which dtype, and where the
host waits. The expected numbers are the formulas of docs/parallelism.md, written here once more."""

from collections import Counter
from functools import partial
from pathlib import Path
from typing import NamedTuple

import bounds
import pytest

CONFIG = Path(__file__).parents[2] / "configs" / "69m.yaml"
# The 69M model with a block a stage. Its vocabulary and concepts are multiples of 64 on every tensor rank: no padding.
B, T, D, INSERTION, V, C, KEPT = 4, 1024, 512, 1, 50688, 32768, 32
STEPS = 3  # DeepSpeed's timers begin with the third


class Layout(NamedTuple):
    zero: int
    precision: str = "bf16"
    tensor: int = 1
    pipeline: int = 1
    data: int = 2
    rank: int = 0
    micro: int = 2
    virtual: int = 1
    offload: bool = False
    sequence: bool | None = None
    reshard: bool | None = None
    method: str = "cocomix"

    def __str__(self):
        default = Layout(self.zero)._asdict()
        changed = [f"{name} {value}" for name, value in self._asdict().items() if value != default[name]]
        return ", ".join([f"zero {self.zero}", *changed])

    @property
    def world(self):
        return self.tensor * self.pipeline * self.data

    def group(self, name):
        """The first group that has the same ranks as the group `name` of this rank."""
        t, d, p = self.tensor, self.data, self.pipeline
        tensor_rank, data_rank, pipeline_rank = self.rank % t, self.rank // t % d, self.rank // (t * d)
        rank = lambda stage, copy, shard: (stage * d + copy) * t + shard
        groups = {
            "tensor": {rank(pipeline_rank, data_rank, each) for each in range(t)},
            "data": {rank(pipeline_rank, each, tensor_rank) for each in range(d)},
            "pipeline": {rank(each, data_rank, tensor_rank) for each in range(p)},
            "model": {rank(stage, data_rank, shard) for stage in range(p) for shard in range(t)},
            "tied": {rank(stage, data_rank, tensor_rank) for stage in (0, p - 1)},
            "world": set(range(self.world)),
        }
        return next(other for other, ranks in groups.items() if ranks == groups[name])

    @property
    def num_stages(self):
        return self.pipeline * self.virtual

    @property
    def num_blocks(self):
        return max(2, self.num_stages)

    @property
    def split_points(self):
        return list(range(1, self.num_stages)) or None

    @property
    def splits_positions(self):
        return self.tensor > 1 and self.sequence is not False

    @property
    def shards_gradients(self):
        """Whether a data rank holds a part of the sums of gradients. Stage 1 in bf16 has an optimizer of its own."""
        return self.zero > 1 or (self.zero == 1 and (self.precision == "fp32" or self.offload))

    @property
    def keeps_weights(self):
        """Whether ZeRO-3 gathers each weight once a step: the default under a pipeline."""
        return not (self.pipeline == 1 if self.reshard is None else self.reshard)

    @property
    def blocks(self):
        """The blocks of this rank's stages, stage → range."""
        starts = [0, *(self.split_points or []), self.num_blocks]
        mine = self.rank // (self.tensor * self.data)
        return {stage: range(*starts[stage : stage + 2]) for stage in range(mine, self.num_stages, self.pipeline)}

    @property
    def holds(self):
        """What else this rank has of the model."""
        blocks = [index for stage in self.blocks.values() for index in stage]
        wanted = {
            "embedding": 0,
            "head": self.num_blocks - 1,
            "concept": INSERTION if self.method == "cocomix" else None,
        }
        return {part for part, index in wanted.items() if index in blocks}


# Every ZeRO stage × precision, each with offload where there is any, and every kind of grid: a covering set.
LAYOUTS = [
    Layout(0, "fp32", data=4),
    Layout(0, "fp32", tensor=2, pipeline=2, rank=7),
    Layout(1, data=8, rank=5),
    Layout(1, "fp32", tensor=2, rank=1),
    Layout(1, tensor=2, pipeline=2, virtual=2, data=4, rank=9, micro=4),
    Layout(1, tensor=4, sequence=False, rank=3),
    Layout(1, "fp32", pipeline=2, offload=True, rank=3),
    Layout(1, tensor=2, pipeline=4, offload=True, rank=2, micro=4),
    Layout(1, pipeline=4, data=4, rank=15, micro=4, method="ntp"),
    Layout(2, data=8),
    Layout(2, "fp32", tensor=2, sequence=False),
    Layout(2, tensor=2, offload=True, rank=2),
    Layout(3, data=8),
    Layout(3, "fp32", tensor=2, rank=3),
    Layout(3, reshard=False, data=8, rank=7, micro=4),
    Layout(3, offload=True),
    Layout(3, "fp32", pipeline=2, offload=True, rank=2),
    Layout(3, tensor=2, pipeline=2, rank=6, micro=4),
    Layout(3, pipeline=2, virtual=2, rank=1, micro=4, reshard=True),
]


def train(layout, sabotage=None):
    """In the process with fake CUDA: what a rank sends at the start, in its last step and for a checkpoint; where the
    host waits in that step; dtypes and devices."""
    import torch
    from fake_cuda import job
    from recorders import Collectives, HostWaits

    from megacocomix.checkpoint.store import gather_own_part
    from megacocomix.config.load import load_config
    from megacocomix.config.rules import check_config
    from megacocomix.model.losses import next_token_targets
    from megacocomix.parallel.pipeline import Pipeline
    from megacocomix.parallel.stage import MicroBatch, StageModule, hidden_shape
    from megacocomix.parallel.zero import STATES, Engine
    from megacocomix.training.optimizer import build_optimizer, set_learning_rate

    layout = Layout(*layout)
    if sabotage:
        globals()[sabotage]()
    options = {
        "model.num_layers": layout.num_blocks,
        "model.vocab_size": V,
        "model.control_hidden_size": D,
        "method.name": layout.method,
        "method.insertion_layer": INSERTION,
        "training.micro_batch": B,
        "training.global_batch": B * layout.data * layout.micro,
        "training.precision": layout.precision,
        "parallel.tensor": layout.tensor,
        "parallel.pipeline": layout.pipeline,
        "parallel.virtual_stages": layout.virtual,
        "parallel.split_points": layout.split_points,
        "parallel.zero": layout.zero,
        "parallel.offload_optimizer": layout.offload,
        "parallel.sequence": layout.sequence,
        "parallel.reshard_after_forward": layout.reshard,
    }
    texts = {key: "null" if value is None else str(value) for key, value in options.items()}
    config = load_config(CONFIG, [f"{key}={value}" for key, value in texts.items()])
    check_config(config, layout.world)
    dtype = torch.bfloat16 if layout.precision == "bf16" else torch.float32

    def batch(device):
        tokens = torch.randint(0, V, (B, T), device=device)
        labels = torch.randint(0, C, (B, T, 4), device=device) if config.method.learns_concepts else None
        count = torch.ones((), dtype=torch.int64, device=device)
        return MicroBatch(tokens, next_token_targets(tokens), 1000, labels, num_predicted=count)

    gradients = set()
    with job(layout.world, layout.rank, layout.tensor, layout.pipeline) as grid:
        with HostWaits(number=2) as waits, Collectives(grid) as collectives:
            stages = StageModule(config, grid)
            pipeline = Pipeline(grid, stages.num_stages, partial(hidden_shape, config), dtype)

            def on_gradients():
                gradients.update((str(each.values.dtype), each.values.device.type) for each in engine.gradients())

            whole_value = lambda name: torch.empty(stages.whole_shapes[name])
            optimizer = partial(build_optimizer, config=config.optimizer)
            engine = Engine(stages, whole_value, optimizer, config, grid, on_gradients)
            report = {"start": collectives.report()}
            for _ in range(STEPS):
                batches = [batch(grid.device) for _ in range(layout.micro)]
                collectives.clear()
                waits.clear()
                set_learning_rate(engine.optimizer, 1e-3)
                engine.train()
                engine.begin_step()
                losses = pipeline.train(engine, engine.before_backward, batches)
                engine.step()
            report |= {"step": collectives.report(), "reads": dict(waits.reads), "uploads": dict(waits.uploads)}
            report |= {"losses": [str(losses.dtype), losses.device.type], "gradients": sorted(gradients)}
            slices = [each.values for state in STATES for each in engine.local_slices(state)]
            report["states"] = sorted({(str(values.dtype), values.device.type) for values in slices})
            collectives.clear()
            saved = [tensor for tensors in gather_own_part(engine) for tensor in tensors.values()]
            report |= {"save": collectives.report(), "saved": sorted({(str(t.dtype), t.device.type) for t in saved})}
            engine.set_step(3)
    return report


def read_every_loss():
    import megacocomix.parallel.stage as stage

    real = stage.label_cross_entropy

    def label_cross_entropy(*arguments):
        loss = real(*arguments)
        loss.item()
        return loss

    stage.label_cross_entropy = label_cross_entropy


def reduce_on_the_host(group="WORLD"):
    import torch
    import torch.distributed as dist

    from megacocomix.parallel.pipeline import Pipeline

    real = Pipeline.train

    def train(self, *arguments):
        losses = real(self, *arguments)
        dist.all_reduce(torch.zeros(1), group=dist.group.WORLD if group == "WORLD" else self.grid.data_group)
        return losses

    Pipeline.train = train


def reduce_on_the_host_where_only_nccl_is():
    reduce_on_the_host("data")


def reduce_in_bf16():
    import megacocomix.parallel.zero as zero

    real = zero.deepspeed_config
    in_bf16 = {"communication_data_type": "bf16", "data_types": {"grad_accum_dtype": "bf16"}}
    zero.deepspeed_config = lambda *arguments: real(*arguments) | in_bf16


def gather_losses_twice():
    from megacocomix.parallel.layers import TensorGroup

    real = TensorGroup.combine_losses
    TensorGroup.combine_losses = lambda *arguments: (real(*arguments), real(*arguments))[0]


def gather_transposed():
    import torch.distributed as dist

    from megacocomix.parallel.layers import TensorGroup

    def all_gather(self, x):
        gathered = x.new_empty(*x.shape, self.size).movedim(-1, 0)
        dist.all_gather_into_tensor(gathered, x, group=self.group)
        return gathered

    TensorGroup.all_gather = all_gather


# The fault, and what the test then says.
SABOTAGES = {
    "read_every_loss": "stage.py:_cross_entropy",
    "reduce_on_the_host": "all_reduce world float32 on the cpu",
    "reduce_on_the_host_where_only_nccl_is": "'all_reduce', 'nccl', 'cpu'",
    "reduce_in_bf16": "all_reduce data bfloat16",
    "gather_losses_twice": "all_gather tensor float32",
    "gather_transposed": "is_contiguous",
}


class Sent:
    """(kind, group, dtype) → [number, bytes] of collectives; bytes are those of the whole tensor."""

    def __init__(self, layout):
        self.layout, self.counts = layout, {}

    def add(self, kind, group, dtype, number, size):
        """`number` more collectives, of `size` bytes in total."""
        count = self.counts.setdefault((kind, self.layout.group(group), dtype), [0, 0])
        count[0] += number
        count[1] += size

    def add_activations(self, dtype, number, size):
        """Of `size` bytes each, forward and backward: with sequence parallelism an all-gather and a reduce-scatter,
        without it one all-reduce."""
        for kind in ("all_gather", "reduce_scatter") if self.layout.splits_positions else ("all_reduce",):
            self.add(kind, "tensor", dtype, number, number * size)


class Share(NamedTuple):
    """Numbers of parameters and of tensors of a rank's shard: those split over the tensor ranks, and the others."""

    split: int
    whole: int
    split_tensors: int
    whole_tensors: int

    def __add__(self, other):
        return Share(*map(sum, zip(self, other, strict=True)))


def share(layout, saved=False):
    """What this rank has of the model; `saved`: without the last stage's copy of the embedding."""
    t, found = layout.tensor, Share(0, 0, 0, 0)
    for blocks in layout.blocks.values():
        for _ in blocks:
            found += Share((12 * D**2 + 7 * D) // t, 6 * D, 6, 6)
    if "embedding" in layout.holds:
        found += Share(V * D // t, T * D, 1, 1)
    if "concept" in layout.holds:
        found += Share((2 * C * D + C) // t, 2 * D, 3, 2)
    if "head" in layout.holds:
        found += Share(0, 2 * D, 0, 2)
        if "embedding" not in layout.holds and not saved:
            found += Share(V * D // t, 0, 1, 0)
    return found


def expected_in_step(layout):
    """What docs/parallelism.md says that one rank sends in a step."""
    sent, t, m, holds = Sent(layout), layout.tensor, layout.micro, layout.holds
    dtype, b = ("bfloat16", 2) if layout.precision == "bf16" else ("float32", 4)
    split, whole, *_ = share(layout)
    total = split + whole
    mixes = layout.method == "cocomix"
    positions = lambda block: 2 * T if mixes and block >= INSERTION else T
    blocks = [block for stage in layout.blocks.values() for block in stage]
    if t > 1:
        for block in blocks:
            last = block == layout.num_blocks - 1  # computes only T of its S positions, after the keys and values
            S, after = positions(block), T if last else positions(block)
            for count in (S, after, after, after):
                sent.add_activations(dtype, m, B * count * D * b)
        heads = ("embedding" in holds) + ("head" in holds) + 2 * ("concept" in holds)
        sent.add_activations(dtype, m * heads, B * T * D * b)
        if "concept" in holds:
            sent.add("all_gather", "tensor", dtype, m, m * B * T * KEPT * t * b)
            sent.add("all_gather", "tensor", "int32", m, m * B * T * KEPT * t * 4)
        losses = ("head" in holds) + ("concept" in holds)
        if losses:
            sent.add("all_gather", "tensor", "float32", m * losses, m * losses * 8 * B * T * t)
        if layout.splits_positions:
            sent.add("all_reduce", "tensor", "float32", 1, 4 * whole)
    for stage, own in layout.blocks.items():
        into = B * (2 * T if mixes and own.start > INSERTION else T) * D * b // (t if layout.splits_positions else 1)
        out = B * (2 * T if mixes and own.stop > INSERTION else T) * D * b // (t if layout.splits_positions else 1)
        for size in [into] * (stage > 0) + [out] * (stage < layout.num_stages - 1):
            sent.add("send", "pipeline", dtype, m, m * size)
            sent.add("receive", "pipeline", dtype, m, m * size)
    if layout.pipeline > 1 and holds & {"embedding", "head"}:
        sent.add("all_reduce", "tied", "float32", 1, V * D // t * 4 // (layout.data if layout.zero == 3 else 1))
    if layout.zero == 0:
        sent.add("all_reduce", "data", "float32", 1, 4 * total)
    elif layout.zero == 3:
        sent.add("reduce_scatter", "data", "float32", m * layout.virtual, m * 4 * total)
        sent.add("all_gather", "data", dtype, 0, b * total)  # at most; see check_step
    else:
        reductions = m if layout.zero == 2 else 1
        sent.add("all_reduce", "data", "float32", reductions, reductions * 4 * total)
        sent.add("all_gather", "data", dtype, 2, b * total)  # with and without weight decay
    sent.add("all_reduce", "world", "float64", 1, 8)
    if layout.zero == 1 and not layout.shards_gradients:
        sent.add("all_reduce", "model", "float32", 1, 4)  # DeepSpeed's own norm, which is not used
    return sent.counts


def check(layout, report):
    state_device = "cpu" if layout.offload else "cuda"
    for kind, group, dtype, device, _, _ in [*report["start"], *report["step"], *report["save"]]:
        assert device == "cuda" or kind == "barrier", f"{kind} {group} {dtype} on the {device}"
    weights = "bfloat16" if layout.precision == "bf16" else "float32"
    started = {tuple(row[:3]) for row in report["start"] if row[0] != "barrier"}
    expected = {("broadcast", "data", "uint8"), ("all_gather", "data", weights), ("all_reduce", "pipeline", "float32")}
    assert started <= expected
    check_step(layout, report["step"])
    check_save(layout, report["save"])
    assert report["losses"] == ["torch.float64", "cuda"]
    assert report["gradients"] == report["states"] == [["torch.float32", state_device]]
    assert report["saved"] in ([], [["torch.float32", "cpu"]])
    check_waits(layout, report)


def check_step(layout, rows):
    found = {tuple(row[:3]): row[4:] for row in rows}
    expected = expected_in_step(layout)
    assert found.keys() == expected.keys(), [" ".join(key) for key in found.keys() ^ expected.keys()]
    for key, (number, size) in expected.items():
        found_number, found_size = found[key]
        slack = 1e-3 * size + 4096  # partitions are padded
        least, most = size - slack, size + slack
        if key[:2] == ("all_gather", "data") and layout.zero == 3:
            modules = sum(share(layout)[2:])  # at most: one for each tensor
            most = size * (1 if layout.keeps_weights else 2 * layout.micro) + slack
            assert found_number <= modules * (1 if layout.keeps_weights else 2 * layout.micro) + 1, key
        elif key == ("all_reduce", "tensor", "float32") and layout.splits_positions and layout.shards_gradients:
            least = 0  # only of the gradients that this data rank holds
            assert found_number == number, " ".join(key)
        else:
            assert found_number == number, " ".join(key)
        assert least <= found_size <= most, (key, found_size, size)


def check_save(layout, rows):
    """Each state of each parameter is summed over the data ranks, then gathered over the tensor ranks."""
    split, whole, split_tensors, whole_tensors = share(layout, saved=True)
    expected = {}
    if layout.zero:
        expected["all_reduce", "data", "float32"] = 3 * (split_tensors + whole_tensors), 3 * 4 * (split + whole)
    if layout.tensor > 1:
        expected["all_gather", "tensor", "float32"] = 3 * split_tensors, 3 * 4 * split * layout.tensor
    expected = {(kind, layout.group(group), dtype): number for (kind, group, dtype), number in expected.items()}
    assert {tuple(row[:3]): tuple(row[4:]) for row in rows} == expected


def check_waits(layout, report):
    reads = Counter()
    for place, number in report["reads"].items():
        reads[place.split("/")[0]] += number
    ours = {place: number for place, number in report["reads"].items() if place.startswith("megacocomix")}
    if layout.offload:
        assert all(number <= bounds.OUR_READS_OFFLOADED.get(place, 0) for place, number in ours.items()), ours
    else:
        assert ours == bounds.OUR_READS
    passes = layout.micro * layout.virtual
    tensors = sum(share(layout)[2:])
    most = bounds.deepspeed_reads(layout.zero, layout.offload, layout.precision == "bf16", passes, tensors)
    assert reads["deepspeed"] <= most, report["reads"]
    assert set(reads) <= {"megacocomix", "deepspeed"}, report["reads"]
    assert sum(report["uploads"].values()) <= bounds.UPLOADS_OF_A_STEP, report["uploads"]
    assert any("timer.py" in place for place in report["reads"]) == bounds.HAS_THROUGHPUT_TIMER


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_rank_sends_what_the_formulas_say_on_the_device_and_waits_once(layout, on_fake_cuda):
    check(layout, on_fake_cuda(train, layout))


def test_layouts_cover_each_stage_with_each_precision_offload_and_kind_of_grid():
    assert {(each.zero, each.precision) for each in LAYOUTS} == {
        (zero, precision) for zero in range(4) for precision in ("bf16", "fp32") if (zero, precision) != (0, "bf16")
    }
    assert {each.zero for each in LAYOUTS if each.offload} == {1, 2, 3}
    for zero in (0, 1, 3):
        assert any(each.tensor > 1 and each.pipeline > 1 for each in LAYOUTS if each.zero == zero)
    assert {each.zero for each in LAYOUTS if each.virtual > 1} == {1, 3}
    assert {each.keeps_weights for each in LAYOUTS if each.zero == 3} == {True, False}


@pytest.mark.parametrize("sabotage", SABOTAGES)
def test_a_fault_is_found(sabotage, on_fake_cuda):
    layout = Layout(1, tensor=2)
    with pytest.raises((AssertionError, RuntimeError), match=SABOTAGES[sabotage]):
        check(layout, on_fake_cuda(train, layout, sabotage))
