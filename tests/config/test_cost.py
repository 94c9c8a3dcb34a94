"""What a ZeRO stage costs, against rows of docs/parallelism.md worked out by hand, and the advice that follows."""

import re

import pytest

import tiny
from megacocomix.config.cost import GIB, STAGES, cheaper_layout, exchanged_bytes, state_bytes
from megacocomix.config.load import load_config
from megacocomix.config.rules import check_config

PARAMETERS = 1_448_000_000  # of the 1.38b recipe


def recipe(root, *overrides, name="1.38b"):
    return load_config(root / f"configs/{name}.yaml", list(overrides))


@pytest.mark.parametrize(
    ("options", "states", "exchanged"),
    [  # bytes a parameter on 8 data ranks, with 4 micro-batches a step
        (["parallel.zero=0", "training.precision=fp32"], 4 + 4 + 8, 8),
        (["parallel.zero=1"], 2 + 4 + 12 / 8, 8 + 2),
        (["parallel.zero=2"], 2 + 4 / 8 + 12 / 8, 8 * 4 + 2),
        (["parallel.zero=3", "parallel.reshard_after_forward=true"], (2 + 4 + 12) / 8, 4 * 4 + 4 * 4),
        (["parallel.zero=3", "parallel.reshard_after_forward=false"], 2 + (2 + 4 + 12) / 8, 2 + 4 * 4),
        (["parallel.zero=1", "parallel.offload_optimizer=true"], 2 + 4, 8 + 2),
        (["parallel.zero=1", "training.precision=fp32"], 4 + 4 + 12 / 8, 8 + 4),
    ],
    ids=str,
)
def test_a_stage_costs_what_the_row_of_the_docs_says(root, options, states, exchanged):
    if "parallel.reshard_after_forward" not in " ".join(options):
        options = [*options, "parallel.reshard_after_forward=null"]
    config = recipe(root, *options)
    assert state_bytes(config, 1000, data=8) == states * 1000
    assert exchanged_bytes(config, 1000, micro_batches=4) == exchanged * 1000


def test_the_advice_names_the_stage_its_states_and_what_it_saves(root):
    # 1024 windows, 8 at a time on 8 ranks: 16 micro-batches. 1.448e9 · (2 + 4 + 12/8) = 10.1 GiB.
    assert cheaper_layout(recipe(root, "parallel.reshard_after_forward=true"), 8, PARAMETERS, 80 * GIB) == (
        "parallel.zero=1 would exchange up to 14.5 GB a step and rank instead of 185 GB; its states take 10.1 GiB of "
        "the device's 80 GiB"
    )
    assert cheaper_layout(recipe(root), 8, PARAMETERS, 80 * GIB) == (
        "parallel.zero=1 parallel.reshard_after_forward=null would exchange up to 14.5 GB a step and rank instead of "
        "95.6 GB; its states take 10.1 GiB of the device's 80 GiB"
    )


def test_states_fit_if_they_take_half_of_the_device(root):
    config, states = recipe(root), PARAMETERS * (2 + 4 + 12 / 8)
    assert cheaper_layout(config, 8, PARAMETERS, int(2 * states) + 2) is not None
    assert cheaper_layout(config, 8, PARAMETERS, int(2 * states) - 2) is None
    # What fits a smaller device: weights gathered once a step.
    advice = cheaper_layout(recipe(root, "parallel.reshard_after_forward=true"), 8, PARAMETERS, int(1.9 * states))
    assert advice.startswith("parallel.zero=3 parallel.reshard_after_forward=false would exchange")
    assert "its states take 5.7 GiB" in advice


@pytest.mark.parametrize(("name", "world"), [("69m", 8), ("386m", 8), ("386m-openwebmath", 64), ("1.38b", 1)])
def test_there_is_none_where_nothing_is_cheaper(root, name, world):
    assert cheaper_layout(recipe(root, name=name), world, PARAMETERS, 80 * GIB) is None


@pytest.mark.parametrize("data", [2, 8, 64])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_the_stages_are_in_the_order_of_their_memory(root, precision, data):
    stages = STAGES if precision == "fp32" else STAGES[1:]  # stage 0 does not exist in bf16
    sizes = [
        state_bytes(
            recipe(
                root,
                f"parallel.zero={zero}",
                f"training.precision={precision}",
                f"parallel.reshard_after_forward={'null' if zero < 3 else str(reshards).lower()}",
            ),
            1000,
            data,
        )
        for zero, reshards in stages
    ]
    assert sizes == sorted(sizes, reverse=True)


def test_a_larger_stage_is_never_advised(root):
    # With one micro-batch, ZeRO 3 would exchange fewer bytes than ZeRO 1, in many more messages.
    assert cheaper_layout(recipe(root, "training.global_batch=512", name="386m"), 64, PARAMETERS, 80 * GIB) is None


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("pipeline", [1, 2])
def test_what_is_advised_can_run(root, zero, precision, pipeline):
    fixed = [f"training.precision={precision}", f"parallel.pipeline={pipeline}", "parallel.tensor=2"]
    present = [f"parallel.zero={zero}", "parallel.reshard_after_forward=null"]
    config = recipe(root, *fixed, *present)
    advice = cheaper_layout(config, 16, PARAMETERS // 2, 80 * GIB)
    if zero <= (precision == "bf16"):  # the first stage that this precision has
        assert advice is None
        return
    options = re.findall(r"parallel\.\S+=\S+", advice)
    check_config(recipe(root, *fixed, *present, *options), 16)
    assert options[0] == f"parallel.zero={int(precision == 'bf16')}"


def test_nothing_is_advised_that_a_run_on_one_data_rank_cannot_use(tmp_path):
    assert cheaper_layout(tiny.config(tmp_path, parallel={"tensor": 2}), 2, 1000, 80 * GIB) is None
