"""The sharding plan: sharding and merging, padding, and what the concept head sends."""

import pytest
import torch
import torch.distributed as dist

import tiny
from megacocomix.config.schema import ModelConfig
from megacocomix.model.concept import Compress, TopK
from megacocomix.model.gpt2 import GPT2, initialise
from megacocomix.model.losses import MASKED, label_cross_entropy
from megacocomix.parallel.layers import GlobalTopK, PaddedTopK, RowParallelCompress, Shard, TensorGroup
from megacocomix.parallel.runtime import start_runtime, stop_runtime
from megacocomix.parallel.tensor import shard, shard_dim, shard_of, unshard
from processes import run_processes

TOKENS, WIDTH, KEPT = 16, 8, 5


def small_model():
    model = GPT2(ModelConfig(**tiny.SHAPE, dropout=0.0), tiny.method())
    initialise(model, 0)
    return model


@pytest.mark.parametrize("size", [1, 2, 4])
def test_what_is_sharded_merges_to_what_it_was(size):
    sharded_names = set()
    for name, parameter in small_model().named_parameters():
        shards = [shard(name, parameter.detach(), size, rank) for rank in range(size)]
        assert len({each.shape for each in shards}) == 1
        assert torch.equal(unshard(name, shards, parameter.shape), parameter)
        if shard_dim(name) is not None:
            sharded_names.add(name)
            assert size == 1 or shards[0].shape != parameter.shape
    whole = {name for name, _ in small_model().named_parameters()} - sharded_names
    assert {name.rpartition(".")[0].removeprefix("blocks.0.") for name in whole if "blocks.1" not in name} >= {
        "norm", "norm_1", "norm_2", "attention.out", "mlp.down", "embed.positions", "concept", "concept.compress",
    }  # fmt: skip
    assert len([name for name in sharded_names if ".0." in name]) == 6  # qkv, up: weight and bias; out, down: weight


@pytest.mark.parametrize(("whole", "size"), [(97, 1), (97, 2), (97, 4), (62, 4), (50257, 1), (50257, 8), (9, 8)])
def test_padded_shards_differ_by_one_row_and_store_a_multiple_of_64(whole, size):
    shards = [Shard.of(whole, size, rank, padded=True) for rank in range(size)]
    assert [each.start for each in shards[1:]] == [each.stop for each in shards[:-1]]
    assert (shards[0].start, shards[-1].stop) == (0, whole)
    assert max(each.owned for each in shards) - min(each.owned for each in shards) <= 1
    assert {each.stored for each in shards} == {-(-max(each.owned for each in shards) // 64) * 64}


def test_heads_are_never_divided():
    rows = shard_of("blocks.0.attention.qkv.weight", torch.Size([96, 32]), 4, 1)
    assert (rows.start, rows.stop, rows.stored) == (24, 48, 24)  # head 1 of 4: its 8 rows each of q, k and v


def test_on_one_rank_no_padding_is_among_the_kept_concepts_or_gets_a_gradient():
    logits = -1 - torch.rand(2, 3, 10, generator=torch.Generator().manual_seed(0))
    whole, extent = logits.clone().requires_grad_(), Shard.of(10, 1, 0, padded=True)
    own = with_padding(logits, extent)
    expected, found = TopK(KEPT)(whole), PaddedTopK(KEPT, extent.owned)(own)
    assert own.shape[-1] == 64 and all(map(torch.equal, found, expected))
    for kept in (expected, found):
        kept[0].square().sum().backward()
    assert torch.equal(without_padding(own.grad, extent), whole.grad)


class Bytes:
    """Counts what the collectives of a process put into its memory."""

    def __init__(self):
        self.received = 0
        self.originals = {}

    def __enter__(self):
        for name, argument in (("all_gather_into_tensor", 0), ("all_reduce", 0), ("reduce_scatter_tensor", 0)):
            self.originals[name] = getattr(dist, name)
            setattr(dist, name, self._counted(self.originals[name], argument))
        return self

    def __exit__(self, *error):
        for name, original in self.originals.items():
            setattr(dist, name, original)

    def _counted(self, function, argument):
        def counted(*arguments, **options):
            tensor = arguments[argument]
            self.received += tensor.numel() * tensor.element_size()
            return function(*arguments, **options)

        return counted


def with_padding(logits, extent):
    """A rank's logits as its head gives them: those of padding are 0, larger than any of `logits`."""
    own = logits[..., extent.start : extent.stop]
    return torch.nn.functional.pad(own, (0, extent.stored - extent.owned)).requires_grad_()


def without_padding(grad, extent):
    """The part of the logits' gradient that is not of padding."""
    assert not grad[..., extent.owned :].any()
    return grad[..., : extent.owned]


def sharded_head(logits, weight, bias, labels, sequence):
    """Top-k, compression and loss over the tensor ranks of this job, forward and backward."""
    runtime = start_runtime()
    size, rank = runtime.world, runtime.rank
    group = TensorGroup(dist.group.WORLD, rank, size, sequence=sequence)
    extent = Shard.of(len(weight), size, rank, padded=True)
    plain = Compress(*weight.shape)
    plain.weight = torch.nn.Parameter(shard("concept.compress.weight", weight, size, rank))
    plain.bias = torch.nn.Parameter(bias)
    top_k, compress = GlobalTopK(KEPT, group, extent), RowParallelCompress(plain, group, extent)
    own = with_padding(logits, extent)
    with Bytes() as forward:
        vector = compress(*top_k(own))
    with Bytes() as backward:
        vector.square().sum().backward()
    whole = group.all_gather_positions(vector.detach()) if sequence else vector.detach()
    results = {"vector": whole, "weight_grad": plain.weight.grad[: extent.owned]}
    results["grad"] = without_padding(own.grad, extent)
    own = with_padding(logits, extent)
    loss = label_cross_entropy(own, labels, range(extent.start, extent.stop), group.combine_losses)
    loss.backward()
    results |= {"loss": loss.detach(), "loss_grad": without_padding(own.grad, extent)}
    stop_runtime()
    return {name: value.numpy() for name, value in results.items()}, forward.received, backward.received


@pytest.mark.slow
@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("size", [2, 4])
def test_the_sharded_concept_head_is_exact_and_sends_k_candidates_a_rank_and_one_vector(size, sequence):
    generator = torch.Generator().manual_seed(0)
    logits = -torch.rand(2, TOKENS // 2, tiny.LATENTS, generator=generator)  # padding's 0 is larger than all
    weight, bias = torch.randn(tiny.LATENTS, WIDTH, generator=generator), torch.randn(WIDTH, generator=generator)
    labels = torch.randint(tiny.LATENTS, (2, TOKENS // 2, 4), generator=generator)
    labels[0, 3] = MASKED

    whole = logits.clone().requires_grad_()
    compress = Compress(tiny.LATENTS, WIDTH)
    compress.weight, compress.bias = torch.nn.Parameter(weight), torch.nn.Parameter(bias)
    vector = compress(*TopK(KEPT)(whole))
    vector.square().sum().backward()
    loss_logits = logits.clone().requires_grad_()
    loss = label_cross_entropy(loss_logits, labels)
    loss.backward()

    ranks = run_processes(size, sharded_head, logits, weight, bias, labels, sequence)
    found = [{name: torch.from_numpy(value) for name, value in results.items()} for results, _, _ in ranks]
    for results in found:
        torch.testing.assert_close(results["vector"], vector.detach())
        torch.testing.assert_close(results["loss"], loss.detach())
    for name, expected, dim in (
        ("grad", whole.grad, -1),
        ("weight_grad", compress.weight.grad, 0),
        ("loss_grad", loss_logits.grad, -1),
    ):
        torch.testing.assert_close(torch.cat([results[name] for results in found], dim), expected)
    for _, forward, backward in ranks:
        vector_bytes = WIDTH * 4
        assert forward == TOKENS * (KEPT * size * (4 + 4) + (vector_bytes / size if sequence else vector_bytes))
        assert backward == (TOKENS * vector_bytes if sequence else 0)
