"""Vocabulary and concepts are padded in memory: the padding stays 0, is on no disk, and aligns the heads' products."""

from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

import tiny
from jobs import train_all
from layouts import shard_small_parameters_too
from megacocomix.config.load import load_config
from megacocomix.model.gpt2 import assemble, initial_value
from megacocomix.model.heads import FrozenHead, aligned
from megacocomix.model.losses import next_token_targets
from megacocomix.parallel.grid import Grid
from megacocomix.parallel.runtime import start_runtime, stop_runtime
from megacocomix.parallel.stage import TIED, MicroBatch, StageModule
from megacocomix.parallel.tensor import shard, shard_of
from megacocomix.parallel.zero import STATES
from megacocomix.teacher.load import load_teacher_model
from megacocomix.teacher.model import Teacher, gpt2_teacher
from processes import run_processes

PADDED = (TIED, "concept.predict.weight", "concept.predict.bias", "concept.compress.weight")
STEPS, WIDTH = 3, 32


def elements_of_padding(each, trainer):
    """What a rank holds of the padding in one of its slices, flat."""
    stages, grid = trainer.stages, trainer.grid
    owned = shard_of(each.name, stages.whole_shapes[each.name], grid.tensor, grid.tensor_rank).owned
    return each.values[max(0, owned * each.shard_shape[1:].numel() - each.start) :]


def train_and_look(configs):
    """Outcomes, the number of elements of padding that this rank saw in each run's last step, and the largest."""
    seen = [{} for _ in configs]

    def look(event, trainer):
        if event == "gradients" and trainer.state.step == STEPS - 1:
            run = seen[[config.run for config in configs].index(trainer.config.run)]
            slices = [*trainer.engine.gradients()]
            slices += [each for state in STATES for each in trainer.engine.local_slices(state)]
            padding = [elements_of_padding(each, trainer) for each in slices if each.name in PADDED]
            run["number"] = sum(len(each) for each in padding)
            run["largest"] = max((each.abs().max().item() for each in padding if len(each)), default=0.0)

    shard_small_parameters_too()
    return train_all(configs, look), [(run["number"], run["largest"]) for run in seen]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tensor", "kinds"),
    [(1, [("fp32", 0), ("fp32", 1), ("fp32", 2), ("fp32", 3), ("bf16", 1)]), (2, [("fp32", 3), ("bf16", 1)])],
)
def test_padding_is_zero_after_steps_with_weight_decay_and_is_in_no_checkpoint(tmp_path, tensor, kinds):
    tiny.make_inputs(tmp_path)
    configs = [
        tiny.config(
            tmp_path,
            f"{precision}-{zero}",
            parallel={"zero": zero, "tensor": tensor},
            training={"steps": STEPS, "precision": precision},
            optimizer={"weight_decay": 0.3, "decay": "all"},
            method={"name": "cocomix+kd"},
            checkpoint={"every": STEPS},
        )
        for precision, zero in kinds
    ]
    ranks = run_processes(2, train_and_look, configs)
    assert [outcomes for outcomes, _ in ranks] == [[(0, [])] * len(configs)] * 2
    # Under ZeRO the data ranks together hold all padding, but not each of them some.
    for each_rank in zip(*(found for _, found in ranks), strict=True):
        assert sum(number for number, _ in each_rank) > 4 * WIDTH * (aligned(tiny.VOCAB) - tiny.VOCAB)
        assert max(largest for _, largest in each_rank) == 0
    whole = {name: parameter.shape for name, parameter in assemble(configs[0]).named_parameters()}
    for config in configs:
        stored = {}
        for file in (tmp_path / config.run / f"checkpoints/step-{STEPS:08d}").glob("*.safetensors"):
            with safe_open(file, "pt") as opened:
                stored |= {key: torch.Size(opened.get_slice(key).get_shape()) for key in opened.keys()}  # noqa: SIM118
        assert len(stored) == 3 * len(whole)
        assert all(shape == whole[key.rpartition("/")[2]] for key, shape in stored.items())


class Recorder(TorchDispatchMode):
    """Keeps the operands of every matrix product that has a head's size, and counts new bf16 tensors of its logits."""

    def __init__(self, columns):
        super().__init__()
        self.columns, self.products, self.logits = columns, [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = [each for each in args if torch.is_tensor(each)]
        if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            products = [each for each in (*tensors, result) if each.dim() == 2]
            if any(max(each.shape) >= self.columns for each in products):
                self.products.append([(*each.shape, *each.stride(), each.storage_offset()) for each in products])
        is_new = torch.is_tensor(result) and all(
            each.untyped_storage()._cdata != result.untyped_storage()._cdata for each in tensors
        )
        if is_new and result.dtype == torch.bfloat16 and result.dim() and result.shape[-1] >= self.columns:
            self.logits.append(str(function))
        return result


def record_step(config, tensor, distills):
    """A step of one micro-batch in bf16, forward and backward: products of the heads, and new tensors of logits."""
    grid = Grid(start_runtime(), tensor)
    vocab_size, generator = config.model.vocab_size, torch.Generator().manual_seed(0)
    head = FrozenHead(torch.randn(vocab_size, 24, generator=generator).bfloat16(), None) if distills else None
    stages = StageModule(config, grid, head)
    stages.set_parameters(
        lambda name: initial_value(name, stages.whole_shapes[name], 0, 3),
        lambda value: torch.nn.Parameter(value.bfloat16()),
    )
    tokens = torch.randint(vocab_size, (2, tiny.CONTEXT), generator=generator)
    outputs = torch.randn(2, tiny.CONTEXT, 24, generator=generator).bfloat16() if distills else None
    batch = MicroBatch(
        tokens,
        next_token_targets(tokens),
        labels_BMk=None if config.method.name == "ntp" else tokens[..., None] % tiny.LATENTS,
        outputs_BTE=outputs,
    )
    with Recorder(shard_of(TIED, stages.whole_shapes[TIED], tensor, grid.tensor_rank).owned) as seen:
        loss, _ = stages(0, None, batch)
        loss.backward()
    stop_runtime()
    return seen.products, seen.logits


def are_aligned(operands):
    """Sizes, strides and offsets are multiples of 8 elements, which are 16 bytes in bf16."""
    return all(number % 8 == 0 for numbers in operands for number in numbers if number != 1)


def large_vocabulary(tmp_path, tensor, **method):
    """A vocabulary that is larger than every other size, and odd."""
    parallel = {"tensor": tensor, "zero": 1}
    return tiny.config(tmp_path, model={"vocab_size": 1001}, method=method, parallel=parallel)


@pytest.mark.slow
@pytest.mark.parametrize("tensor", [1, 2])
def test_a_step_makes_one_tensor_of_logits_and_one_of_their_gradient(tmp_path, tensor):
    config = large_vocabulary(tmp_path, tensor, name="ntp")
    for _, logits in run_processes(tensor, record_step, config, tensor, False):
        assert len(logits) == 2, logits


@pytest.mark.slow
@pytest.mark.parametrize("tensor", [1, 2])
def test_every_product_of_the_heads_is_of_aligned_operands(tmp_path, tensor):
    config = large_vocabulary(tmp_path, tensor, name="cocomix+kd")
    for products, _ in run_processes(tensor, record_step, config, tensor, True):
        assert len(products) == 5  # logits and both of their gradients; the teacher's logits twice
        assert all(map(are_aligned, products)), products


@pytest.mark.parametrize("name", ["ours", "llama"])
def test_a_teachers_head_gives_logits_and_their_gradient_by_aligned_products(name, tmp_path):
    if name == "ours":
        model = gpt2_teacher(tiny.loaded(vocab_size=1001, name="ntp").model.bfloat16())
    else:
        sizes = {"vocab_size": 1001, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2}
        lm = LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=48, max_position_embeddings=16))
        lm.save_pretrained(tmp_path)
        model = load_teacher_model(tmp_path, dtype=torch.bfloat16)
    teacher = Teacher(model, 1)
    with Recorder(1001) as seen:
        teacher.hidden_and_gradient(torch.arange(2 * tiny.CONTEXT).view(2, -1))
    assert len(seen.products) == 2
    assert all(map(are_aligned, seen.products)), seen.products


def test_a_preset_with_a_vocabulary_of_gpt2_stores_47_more_rows_and_no_more_concepts(root):
    config = load_config(root / "configs/69m.yaml")
    grid = SimpleNamespace(tensor=1, tensor_rank=0, pipeline=1, pipeline_rank=0, data=1)
    stages, stored = StageModule(config, grid), {}
    stages.set_parameters(
        lambda name: torch.empty(stages.whole_shapes[name], device="meta"), lambda value: torch.nn.Parameter(value)
    )
    for name, parameter, _ in stages.named_shards():
        stored[name] = parameter.shape
    assert stored.pop(TIED) == (50304, config.model.hidden_size)
    assert stored.items() <= stages.whole_shapes.items()


def test_a_shard_of_one_rank_is_the_parameter_and_its_padding():
    whole = torch.randn(97, 3)
    own = shard(TIED, whole, 1, 0)
    assert own.shape == (128, 3) and torch.equal(own[:97], whole) and not own[97:].any()
    whole = torch.randn(64, 3)
    assert shard(TIED, whole, 1, 0).data_ptr() == whole.data_ptr()
