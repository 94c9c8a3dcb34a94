"""Stages, schedule and losses on fake CUDA, in jobs of 1 to 512 ranks: the recipes, and every kind of method."""

from functools import partial
from pathlib import Path

import pytest

CONFIGS = Path(__file__).parents[2] / "configs"
# (recipe, ranks, rank, options)
JOBS = [
    ("69m", 1, 0, {}),
    ("386m", 8, 3, {}),
    ("1.38b", 64, 0, {"training.recompute": "selective"}),
    ("386m", 512, 511, {"parallel.tensor": 2, "training.micro_batch": 2}),
    ("1.38b", 512, 300, {"parallel.tensor": 4, "parallel.pipeline": 2}),
    ("1.38b", 64, 63, {"parallel.tensor": 8, "parallel.pipeline": 4, "training.recompute": "full"}),
    ("69m", 8, 2, {"parallel.pipeline": 4, "parallel.virtual_stages": 2}),
    ("69m", 4, 1, {"parallel.tensor": 4, "parallel.sequence": "false"}),
    ("69m", 4, 3, {"parallel.tensor": 2, "parallel.pipeline": 2, "training.precision": "fp32", "model.dropout": 0.1}),
    ("69m", 6, 5, {"parallel.tensor": 2, "training.global_batch": 48, "method.interleave_every": 4}),
    ("69m", 2, 1, {"method.name": "ntp", "parallel.tensor": 2, "model.hidden_size": 640, "model.num_heads": 10}),
    ("69m", 4, 3, {"method.name": "cocomix+kd", "parallel.tensor": 2, "parallel.pipeline": 2}),
    ("69m", 2, 0, {"method.name": "kd+pause"}),
    ("69m", 4, 2, {"method.name": "direct-hidden", "parallel.tensor": 2, "parallel.pipeline": 2}),
    ("69m", 2, 0, {"method.name": "direct-hidden", "method.hidden_loss": "cosine"}),
    ("69m", 2, 1, {"method.name": "add", "parallel.tensor": 2}),
    ("69m", 2, 0, {"method.name": "predict-only"}),
    ("69m", 2, 0, {"method.name": "mix-only", "parallel.pipeline": 2}),
]
TEACHER_WIDTH, TEACHER_VOCAB = 768, 50257


def run_stages(recipe, world, rank, options, sabotage=None):
    """In the process with fake CUDA: what the stages of one rank give, and whether each fits."""
    import torch
    from fake_cuda import job
    from recorders import Collectives, HostWaits
    from torch import nn

    from megacocomix.config.load import load_config
    from megacocomix.config.rules import check_config
    from megacocomix.model.distillation import FrozenHead
    from megacocomix.model.losses import next_token_targets
    from megacocomix.parallel.pipeline import Pipeline
    from megacocomix.parallel.stage import MicroBatch, StageModule, hidden_shape

    config = load_config(CONFIGS / f"{recipe}.yaml", [f"{key}={value}" for key, value in options.items()])
    check_config(config, world)
    method, parallel, context = config.method, config.parallel, config.model.context
    dtype = torch.bfloat16 if config.training.precision == "bf16" else torch.float32
    labels_device = "cpu" if sabotage == "labels on the host" else "cuda"

    def batch():
        size = config.training.micro_batch
        tokens, slots = torch.randint(0, 100, (size, context), device="cuda"), context // method.interleave_every
        labels = hidden = outputs = None
        if method.learns_concepts:
            labels = torch.randint(0, 100, (size, slots, method.num_labels), device=labels_device)
        if method.learns_hidden:
            hidden = torch.zeros(size, slots, method.target_size, device="cuda")
        if method.distills:
            outputs = torch.zeros(size, context, TEACHER_WIDTH, device="cuda", dtype=torch.bfloat16)
        count = torch.ones((), dtype=torch.int64, device="cuda")
        return MicroBatch(tokens, next_token_targets(tokens), 1000, labels, hidden, outputs, count)

    outputs = []
    with job(world, rank, parallel.tensor, parallel.pipeline) as grid, HostWaits() as waits:
        with Collectives(grid) as collectives:
            head = None
            if method.distills:
                head = FrozenHead(torch.zeros(TEACHER_VOCAB, TEACHER_WIDTH, device="cuda", dtype=torch.bfloat16), None)
            stages = StageModule(config, grid, head)
            placed = torch.float32 if sabotage == "weights in fp32" else dtype
            stages.set_parameters(
                lambda name: torch.empty(stages.whole_shapes[name]),
                lambda value: nn.Parameter(value.to("cuda", placed)),
            )

            def forward(stage, x, batch):
                y, losses = stages(stage, x, batch)
                is_last = stage == stages.num_stages - 1
                shape, kind = ((), torch.float32) if is_last else (hidden_shape(config, stage + 1), dtype)
                outputs.append([list(y.shape), str(y.dtype), y.device.type])
                assert (y.shape, y.dtype, y.device.type) == (shape, kind, "cuda"), outputs[-1]
                return (y.to(torch.float64) if sabotage == "hidden states in fp64" else y), losses

            waits.clear()
            pipeline = Pipeline(grid, stages.num_stages, partial(hidden_shape, config), dtype)
            micro = parallel.pipeline if parallel.pipeline > 1 else 1
            losses = pipeline.train(forward, lambda: None, [batch() for _ in range(micro)])
            gradients = {(str(p.grad.dtype), p.grad.device.type) for p in stages.parameters() if p.grad is not None}
            missing = [name for name, p, _ in stages.named_shards() if p.grad is None]
            stages.eval()
            evaluated = pipeline.evaluate(forward, [batch() for _ in range(2)])
    return {
        "losses": [[str(each.dtype), each.device.type, each.numel()] for each in (losses, evaluated)],
        "gradients": sorted(gradients),
        "missing": missing,
        "outputs": len(outputs),
        "dtypes": sorted({(each.group, each.dtype) for each in collectives.number}),
        "devices": sorted({each.device for each in collectives.number}),
        "reads": dict(waits.reads),
        "uploads": dict(waits.uploads),
    }


def check(options, report):
    precision = options.get("training.precision", "bf16")
    dtype = {"bf16": "bfloat16", "fp32": "float32"}[precision]
    assert report["outputs"]
    assert report["losses"] == 2 * [["torch.float64", "cuda", 3]]
    assert report["gradients"] == [[f"torch.{dtype}", "cuda"]]
    assert report["missing"] == []
    assert set(report["devices"]) <= {"cuda"}
    groups = {"tensor": {dtype, "float32", "int32"}, "pipeline": {dtype, "float32"}}
    assert all(kind in groups.get(group, ()) for group, kind in report["dtypes"]), report["dtypes"]
    assert report["reads"] == report["uploads"] == {}


def name(case):
    recipe, world, rank, options = case
    return ", ".join([f"{recipe} rank {rank} of {world}", *(f"{key} {value}" for key, value in options.items())])


@pytest.mark.parametrize("case", JOBS, ids=name)
def test_stages_stay_on_the_device_in_their_precision_and_never_wait(case, on_fake_cuda):
    check(case[3], on_fake_cuda(run_stages, *case))


@pytest.mark.parametrize("sabotage", ["labels on the host", "weights in fp32", "hidden states in fp64"])
def test_a_fault_is_found(sabotage, on_fake_cuda):
    options = {"parallel.pipeline": 2}
    with pytest.raises((AssertionError, RuntimeError), match=r"device|dtype|float"):
        check(options, on_fake_cuda(run_stages, "69m", 2, 0, options, sabotage))
