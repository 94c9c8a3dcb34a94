"""The engine: bytes that it exchanges, waits for the device, threads of an offloaded update, who reads the weights."""

import pytest
import torch

from jobs import train_all
from layouts import config, layout, shard_small_parameters_too
from megacocomix.config.cost import exchanged_bytes
from processes import run_processes

pytestmark = pytest.mark.slow

# The fifth is counted: the third and the last are saved and validated, and DeepSpeed times none before the third.
STEPS = 6

STAGES = {
    f"zero {zero}, {more}": layout(2, 1, 1, zero, "cocomix", **more)[1]
    for zero, more in ((0, {}), (1, {}), (2, {}), (3, {"reshard_after_forward": False}), (3, {}))
}
OFFLOADED = layout(2, 1, 1, 1, "cocomix", offload_optimizer=True)[1]


# How often a rank receives the whole tensor, among many ranks.
TIMES = {"all_reduce": 2, "reduce": 1, "all_gather_into_tensor": 1, "reduce_scatter_tensor": 1, "broadcast": 1}


def count(configs):
    """For each config, of its last step but one: bytes of collectives, waits for the device; threads of the update."""
    import torch.distributed as dist
    from deepspeed.accelerator import get_accelerator

    from megacocomix.parallel import zero

    counted, found = {"bytes": 0, "waits": 0, "threads": set()}, []

    def counting(function, times):
        def called(*arguments, **options):
            tensors = [each for each in (*arguments, *options.values()) if isinstance(each, torch.Tensor)]
            counted["bytes"] += times * max(each.numel() * each.element_size() for each in tensors)
            return function(*arguments, **options)

        return called

    for name, times in TIMES.items():
        setattr(dist, name, counting(getattr(dist, name), times))
    get_accelerator().synchronize = lambda *_: counted.update(waits=counted["waits"] + 1)
    zero.cores_of_process = lambda: 3
    shard_small_parameters_too()

    def watch(event, trainer):
        if event != "step":
            return
        if trainer.state.step == STEPS - 1:
            found.append({**counted, "after": torch.get_num_threads()})
        counted.update(bytes=0, waits=0, threads=set())
        adam = trainer.engine._partition.adam
        adam.register_step_pre_hook(lambda *_: counted["threads"].add(torch.get_num_threads()))

    assert train_all(configs, watch) == [(0, [])] * len(configs)
    return found


@pytest.fixture(scope="module")
def counted(folder):
    sections = [*STAGES.values(), OFFLOADED]
    more = {"training": {"steps": STEPS}}
    configs = [config(folder, f"counted-{number}", each | more) for number, each in enumerate(sections)]
    return configs, run_processes(2, count, configs)


def test_a_step_exchanges_the_bytes_of_the_table(counted):
    configs, ranks = counted
    parameters = sum(parameter.numel() for parameter in whole(configs[0]).parameters())
    for made, of_rank_0 in zip(configs, ranks[0], strict=True):
        micro_batches = made.training.global_batch // (made.training.micro_batch * 2)
        expected = exchanged_bytes(made, parameters, micro_batches)
        # Besides, a step sends counts, losses and the norm. ZeRO 3 keeps some weights that are used again soon.
        lowest = 0.6 if made.parallel.zero == 3 and made.parallel.reshard_after_forward else 0.98
        assert lowest * expected < of_rank_0["bytes"] < 1.05 * expected, made.parallel


def whole(made):
    from megacocomix.model.gpt2 import assemble

    with torch.device("meta"):
        return assemble(made)


def test_no_step_waits_for_the_whole_device(counted):
    for of_rank in counted[1]:
        assert [each["waits"] for each in of_rank] == [0] * len(STAGES) + [0]


def test_an_offloaded_update_runs_on_the_cores_of_the_process_and_nothing_else_does(counted):
    for of_rank in counted[1]:
        assert [each["threads"] for each in of_rank] == [{1}] * len(STAGES) + [{3}]
        assert all(each["after"] == 1 for each in of_rank)
