"""Every preset, and slots after every n-th token, in every kind of layout: the model that one process trains."""

import pytest

import tiny
from layouts import asked_for, config, largest_differences, layout, nightly_unless, run_jobs, run_name
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
# Each axis with the methods that own a collective over it: the teacher's head and hidden states over tensor ranks,
# teacher targets that travel to a stage, counts over data ranks, and slots that not every token has.
COVERING = {
    (2, 2, 1, 1): ("kd", "direct-hidden", "add", "every 3", "everything at once"),
    (2, 1, 1, 3): ("kd", "direct-hidden", "random", "every 2"),
    (2, 1, 2, 3): ("kd+pause", "direct-hidden cosine", "cocomix+kd"),
    (4, 2, 2, 3): ("direct-hidden every 2", "everything at once"),
}
CASES = [pytest.param(key, marks=nightly_unless(key[0] in COVERING.get(key[1:], ())), id=str(key)) for key in LAYOUTS]
BF16 = ("kd+pause", "cocomix+kd", "direct-hidden", "add", "everything at once")
BF16_CASES = [pytest.param(name, marks=nightly_unless(name in ("cocomix+kd", "everything at once"))) for name in BF16]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, request):
    """The runs that this module's tests ask for: one job for each number of processes."""
    folder = tmp_path_factory.mktemp("methods")
    tiny.make_inputs(folder)
    keys, bf16 = asked_for(request, "key"), asked_for(request, "bf16_method")
    methods = dict.fromkeys([*(key[0] for key in keys), *bf16])
    jobs = {1: [config(folder, run_name(name), layout(1, 1, 1, 0, METHODS[name])[1]) for name in methods]}
    for key in keys:
        jobs.setdefault(key[1], []).append(config(folder, run_name(str(key)), LAYOUTS[key]))
    for name in bf16:
        sections = layout(2, 2, 1, 2, METHODS[name])[1]
        jobs.setdefault(2, []).append(config(folder, f"bf16-{run_name(name)}", sections, "bf16"))
    run_jobs(jobs)
    return folder


@pytest.mark.parametrize("key", CASES)
def test_a_method_in_a_layout_trains_the_model_of_one_process(folder, key):
    found = largest_differences(folder, run_name(str(key)), run_name(key[0]))
    assert max(found.values()) < TOLERANCE, found


@pytest.mark.parametrize("bf16_method", BF16_CASES)
def test_a_method_in_bf16_stays_near_fp32(folder, bf16_method):
    found = largest_differences(folder, f"bf16-{run_name(bf16_method)}", run_name(bf16_method))
    assert 1e-6 < found["loss"] < 3e-2, found
