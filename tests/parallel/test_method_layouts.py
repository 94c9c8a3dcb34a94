"""Every preset, and slots after every n-th token, in every kind of layout: the model that one process trains."""

import pytest

import tiny
from layouts import config, largest_differences, layout, lines, run_jobs, run_name
from megacocomix.config.method import PRESETS

pytestmark = pytest.mark.slow

TOLERANCE = 1e-5
METHODS = {name: {"name": name} for name in PRESETS if name not in ("cocomix", "ntp")}  # those: test_layouts.py
METHODS |= {
    "every 2": {"name": "cocomix", "interleave_every": 2},
    "every 3": {"name": "cocomix", "interleave_every": 3},
    "pause every 4": {"name": "pause", "interleave_every": 4},
    "direct-hidden every 2": {"name": "direct-hidden", "interleave_every": 2},
    "direct-hidden l1": {"name": "direct-hidden", "hidden_loss": "l1"},
    "direct-hidden cosine": {"name": "direct-hidden", "hidden_loss": "cosine"},
    "hidden, not mixed in": {"name": "direct-hidden", "mix": "nothing"},
    "everything at once": {"name": "cocomix+kd", "mix": "pause", "label_sign": "absolute", "interleave_every": 2},
}
GRIDS = {2: [(2, 1, 1), (1, 1, 3), (1, 2, 3)], 4: [(2, 2, 3)]}  # processes: (tensor, pipeline, ZeRO)
LAYOUTS = {
    (name, world, *grid): layout(world, *grid, method, **({"sequence": False} if name == "every 3" else {}))[1]
    for name, method in METHODS.items()
    for world, grids in GRIDS.items()
    for grid in grids
}
for name in ("pause", "direct-hidden", "kd", "add"):
    LAYOUTS[name, 2, 2, 1, 3] = layout(2, 2, 1, 3, METHODS[name], sequence=False)[1]
for (name, *_), sections in LAYOUTS.items():
    if name == "every 3" and sections["parallel"]["tensor"] == 1:
        del sections["parallel"]["sequence"]


BF16 = ("kd+pause", "cocomix+kd", "direct-hidden", "add", "everything at once")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """All runs of this module: one job for each number of processes."""
    folder = tmp_path_factory.mktemp("methods")
    tiny.make_inputs(folder)
    jobs = {1: [config(folder, run_name(name), layout(1, 1, 1, 0, method)[1]) for name, method in METHODS.items()]}
    for world in GRIDS:
        runs = [config(folder, run_name(str(key)), value) for key, value in LAYOUTS.items() if key[1] == world]
        if world == 2:
            sections = {name: layout(2, 2, 1, 2, METHODS[name])[1] for name in BF16}
            runs += [config(folder, f"bf16-{run_name(name)}", each, "bf16") for name, each in sections.items()]
        jobs[world] = runs
    run_jobs(jobs)
    return folder


@pytest.mark.parametrize("key", LAYOUTS, ids=str)
def test_a_method_in_a_layout_trains_the_model_of_one_process(folder, key):
    found = largest_differences(folder, run_name(str(key)), run_name(key[0]))
    assert max(found.values()) < TOLERANCE, found


@pytest.mark.parametrize("name", BF16)
def test_a_method_in_bf16_stays_near_fp32(folder, name):
    found = largest_differences(folder, f"bf16-{run_name(name)}", run_name(name))
    assert 1e-6 < found["loss"] < 3e-2, found


@pytest.mark.parametrize("name", METHODS)
def test_a_run_logs_the_losses_of_its_method_and_no_others(folder, name):
    method = config(folder, "x", layout(1, 1, 1, 0, METHODS[name])[1]).method
    for line in lines(folder, run_name(name)):
        if "loss" in line:
            kinds = {"concept_loss": method.learns_concepts, "hidden_loss": method.learns_hidden}
            kinds |= {"kd_loss": method.distills}
            assert {key: line[key] is not None for key in kinds} == kinds
