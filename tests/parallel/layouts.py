"""Layouts of a tiny run, and what the ranks of a test's job do to compare them: train and keep every gradient."""

import itertools
import json
import os
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from jobs import train_all
from processes import run_processes

STEPS = 3
# Half of what weights begin with. Biases begin with 0: what rounding moves them by is not relative to what they are.
WEIGHT_FLOOR = 0.01
SMALL_WHOLE = "small_parameters_whole"  # not an option of ours: DeepSpeed's default, see below
TOKENIZER = Path(__file__).parents[2] / "assets/teacher/tokenizer.model"  # opens sooner than GPT-2's


def name_of(world: int, tensor: int, pipeline: int, zero: int, method: str, **more) -> str:
    """Such as `8: tensor 2 × pipeline 2 × data 2, ZeRO 3, cocomix`."""
    data = world // (tensor * pipeline)
    extras = "".join(f", {key} {str(value).lower()}" for key, value in more.items())
    return f"{world}: tensor {tensor} × pipeline {pipeline} × data {data}, ZeRO {zero}{extras}, {method}"


def run_name(name: str) -> str:
    """The run folder of a layout."""
    return re.sub(r"\W+", "-", name)


def layout(world: int, tensor: int, pipeline: int, zero: int, method: str, **more) -> tuple[str, dict]:
    """Name and the sections of its config."""
    training = {key: more[key] for key in ("recompute",) if key in more}
    parallel = {key: more[key] for key in more if key not in (*training, SMALL_WHOLE)}
    sections = {
        "parallel": {"tensor": tensor, "pipeline": pipeline, "zero": zero, **parallel},
        "method": {"name": method} if isinstance(method, str) else method,
        "training": training,
    }
    return name_of(world, tensor, pipeline, zero, method, **more), sections


def stages_of(pipeline: int) -> tuple[int, ...]:
    """ZeRO stages that are exact with this many pipeline ranks."""
    return (0, 1, 2, 3) if pipeline == 1 else (0, 1, 3)


def all_layouts(world: int) -> dict[str, dict]:
    """Every tensor × pipeline × data product of `world` processes in every ZeRO stage, and what else is a layout."""
    grids = [(t, p) for t, p in itertools.product((1, 2, 4), (1, 2, 4)) if world % (t * p) == 0]
    if world == 8:
        return dict(
            [
                layout(8, 2, 1, 3, "cocomix"),
                layout(8, 2, 2, 3, "cocomix"),
                layout(8, 2, 2, 1, "cocomix"),
                layout(8, 4, 2, 3, "ntp"),
                layout(8, 2, 4, 3, "cocomix"),
                layout(8, 1, 4, 3, "cocomix"),
            ]
        )
    named = [layout(world, t, p, zero, "cocomix") for t, p in grids for zero in stages_of(p)]
    named += [layout(world, t, p, 3, "ntp") for t, p in grids]
    if world == 2:
        named += [
            layout(2, 2, 1, 3, "cocomix", sequence=False),
            layout(2, 1, 1, 3, "cocomix", reshard_after_forward=False),
            layout(2, 1, 1, 3, "cocomix", offload_optimizer=True),
            layout(2, 1, 1, 2, "cocomix", offload_optimizer=True),
            layout(2, 1, 2, 1, "cocomix", offload_optimizer=True),
            layout(2, 1, 2, 3, "cocomix", reshard_after_forward=True),
            layout(2, 1, 2, 3, "cocomix", virtual_stages=2),
            layout(2, 1, 2, 1, "cocomix", virtual_stages=2),
            layout(2, 1, 2, 3, "cocomix", split_points=[3]),
            layout(2, 1, 2, 3, "cocomix", **{SMALL_WHOLE: True}),
            layout(2, 1, 1, 3, "cocomix", **{SMALL_WHOLE: True}),
        ]
    if world == 4:
        named += [
            layout(4, 2, 2, 3, "cocomix", recompute="selective"),
            layout(4, 2, 2, 3, "cocomix", recompute="full"),
            layout(4, 2, 1, 3, "cocomix", recompute="full"),
            layout(4, 2, 2, 3, "cocomix", virtual_stages=2),
            layout(4, 2, 2, 3, "cocomix", sequence=False),
        ]
    # Stages without a pipeline number their modules alike, and DeepSpeed checks that over all processes.
    return dict(sorted(named, key=lambda named: named[1]["parallel"]["pipeline"] > 1))


def covering_layouts() -> set[str]:
    """Names of the layouts that every run of the suite trains: at 4 processes every pair of a tensor, pipeline and data
    size and a ZeRO stage, at 2 the options that are no grid, a few at 8. The others are nightly."""
    grids = [(4, 1, 1, zero) for zero in (0, 1, 2, 3)] + [(4, 4, 1, zero) for zero in (0, 1, 2, 3)] + [(4, 2, 1, 2)]
    grids += [(4, t, p, zero) for t, p in ((2, 2), (1, 2), (1, 4)) for zero in (0, 1, 3)]
    names = {name_of(*grid, "cocomix") for grid in [*grids, (8, 2, 2, 3), (8, 2, 2, 1)]}
    names |= {name_of(4, 2, 2, 3, "ntp"), name_of(2, 1, 2, 3, "cocomix", **{SMALL_WHOLE: True})}
    for more in ({"recompute": "selective"}, {"recompute": "full"}, {"virtual_stages": 2}, {"sequence": False}):
        names.add(name_of(4, 2, 2, 3, "cocomix", **more))
    names |= {name_of(2, 1, 1, zero, "cocomix", offload_optimizer=True) for zero in (2, 3)}
    names |= {name_of(2, 1, 1, 3, "cocomix", reshard_after_forward=False)}
    for zero, more in (
        (1, {"offload_optimizer": True}),
        (1, {"virtual_stages": 2}),
        (3, {"reshard_after_forward": True}),
        (3, {"split_points": [3]}),
    ):
        names.add(name_of(2, 1, 2, zero, "cocomix", **more))
    return names


def nightly_unless(condition: bool):
    """The marks of a parametrised case."""
    return () if condition else pytest.mark.nightly


def asked_for(request, name: str) -> list:
    """The values of the parameter `name` in the tests of the requesting module that are selected to run."""
    items = [item for item in request.session.items if item.path == request.path and hasattr(item, "callspec")]
    return list(dict.fromkeys(item.callspec.params[name] for item in items if name in item.callspec.params))


def config(folder: Path, run: str, sections: dict, precision: str = "fp32"):
    """The config of one run: sizes that divide by 4 tensor ranks where they must, and do not where they need not."""
    training = {"steps": STEPS, "global_batch": 8, "precision": precision, **sections["training"]}
    return tiny.config(
        folder,
        run,
        model={"num_layers": 4},
        method=sections["method"],
        parallel=sections["parallel"],
        data={"tokenizer": str(TOKENIZER)},
        training=training,
        optimizer={"warmup_steps": 0, "lr": 1e-3, "min_lr": 1e-4},
        checkpoint={"every": STEPS},
        evaluation={"every": STEPS, "batches": 1},
    )


def difference(ours, theirs, floor: float = 0.0) -> float:
    """Largest element of the difference, relative to the largest element, or to `floor` where that is larger."""
    return (ours - theirs).abs().max().item() / max(theirs.abs().max().item(), floor)


def shard_small_parameters_too() -> None:
    """DeepSpeed keeps these whole: in a tiny model, all of them. Runs of SMALL_WHOLE layouts leave it at that."""
    from megacocomix.parallel import zero

    options = zero.deepspeed_config

    def sharded(config, device):
        changed = options(config, device)
        if SMALL_WHOLE not in config.run:
            changed["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        return changed

    zero.deepspeed_config = sharded


def train_and_keep_gradients(configs: list) -> list[tuple[int, list[str]]]:
    """Train one config after the other. Every rank leaves the whole gradients of its stage, summed and not yet clipped,
    as RUN/gradients-STEP-RANK.st; the last stage's copy of the tied weight is there as `copy`."""
    from megacocomix.checkpoint.store import gather

    def keep(event, trainer):
        if event == "gradients":
            engine = trainer.engine
            kept = {("copy" if each.is_copy else each.name): gather(each, engine) for each in engine.gradients()}
            file = trainer.run / f"gradients-{trainer.state.step + 1}-{os.environ['RANK']}.st"
            save_file({name: value.clone() for name, value in kept.items()}, file)

    shard_small_parameters_too()
    return train_all(configs, keep)


def run_jobs(jobs: dict[int, list]) -> None:
    """Processes → configs that a job of so many trains, those without a pipeline first: stages without one number their
    modules alike, and DeepSpeed checks that over all processes."""
    for world, configs in jobs.items():
        ordered = sorted(configs, key=lambda made: made.parallel.pipeline > 1)
        outcomes = run_processes(world, train_and_keep_gradients, ordered, timeout=900)
        assert outcomes == [[(0, [])] * len(ordered)] * world


def lines(folder, run):
    return [json.loads(line) for line in (folder / run / "metrics.jsonl").read_text().splitlines()]


def gradients(folder, run, step):
    """Whole gradients by name; all ranks that know one know the same."""
    merged = {}
    for file in sorted((folder / run).glob(f"gradients-{step}-*.st")):
        for name, value in load_file(file).items():
            torch.testing.assert_close(merged.setdefault(name, value), value, rtol=0, atol=1e-6 * value.abs().max())
    return merged


def state(folder, run):
    """Weights and Adam moments after the last step."""
    merged = {}
    for file in (folder / run / f"checkpoints/step-{STEPS:08d}").glob("*.safetensors"):
        merged |= load_file(file)
    return merged


def largest_differences(folder, run, reference):
    """Of losses, gradient norms, gradients and weights against the reference run."""
    found = {"loss": 0.0, "norm": 0.0, "gradient": 0.0, "weights": 0.0, "moments": 0.0}
    for line, expected in zip(lines(folder, run), lines(folder, reference), strict=True):
        for key, kind in (
            ("loss", "loss"),
            ("concept_loss", "loss"),
            ("hidden_loss", "loss"),
            ("kd_loss", "loss"),
            ("valid_loss", "loss"),
            ("grad_norm", "norm"),
        ):
            if expected.get(key) is not None:
                found[kind] = max(found[kind], abs(line[key] - expected[key]) / abs(expected[key]))
    for step in range(1, STEPS + 1):
        ours, theirs = gradients(folder, run, step), gradients(folder, reference, step)
        if copy := ours.pop("copy", None) is not None:
            assert copy
        assert ours.keys() == theirs.keys()
        found["gradient"] = max(found["gradient"], *(difference(ours[name], theirs[name]) for name in theirs))
    ours, theirs = state(folder, run), state(folder, reference)
    assert ours.keys() == theirs.keys()
    for name in theirs:
        kind = "moments" if "/" in name else "weights"
        floor = WEIGHT_FLOOR if kind == "weights" else 0.0
        found[kind] = max(found[kind], difference(ours[name], theirs[name], floor))
    return found
