"""Memory and kernel launches of the recipes, counted on fake CUDA: one micro-batch of a stage, and labelling. Bytes are
those of tensors; the allocator's slack and the libraries' workspaces come on top."""

from pathlib import Path

import bounds
import pytest

CONFIGS = Path(__file__).parents[2] / "configs"


def run_micro_batch(recipe, sabotage=None):
    """In the process with fake CUDA: bytes and kernels of one micro-batch, forward and backward."""
    import torch
    from fake_cuda import job
    from recorders import HostWaits, Kernels, Memory
    from torch import nn

    import megacocomix.parallel.stage as stage
    from megacocomix.config.load import load_config
    from megacocomix.model.losses import next_token_targets

    config = load_config(CONFIGS / f"{recipe}.yaml", [])
    size, context = config.training.micro_batch, config.model.context
    if sabotage == "logits in fp32":
        real, kept = stage.label_cross_entropy, []
        stage.label_cross_entropy = lambda logits, *rest: (kept.append(logits.float()), real(logits, *rest))[1]
    if sabotage == "chunks of a half":
        import megacocomix.model.losses as losses

        losses.CHUNK_ELEMENTS = 1 << 23
    with job() as grid, HostWaits(), Memory() as memory:
        stages = stage.StageModule(config, grid)
        stages.set_parameters(
            lambda name: torch.empty(stages.whole_shapes[name]),
            lambda value: nn.Parameter(value.to("cuda", torch.bfloat16)),
        )
        for parameter in stages.parameters():  # DeepSpeed takes each gradient away as soon as it is there
            parameter.register_post_accumulate_grad_hook(lambda parameter: setattr(parameter, "grad", None))
        tokens = torch.randint(0, 100, (size, context), device="cuda")
        labels = torch.randint(0, 100, (size, context, config.method.num_labels), device="cuda")
        count = torch.ones((), dtype=torch.int64, device="cuda")
        batch = stage.MicroBatch(tokens, next_token_targets(tokens), 1000, labels, num_predicted=count)
        weights = memory.measure()
        memory.restart()
        with Kernels() as kernels:
            loss, _ = stages(0, None, batch)
            kept_for_backward = memory.measure() - weights
            loss.backward()
    return {
        "weights": weights,
        "kept for backward": kept_for_backward,
        "peak": memory.peak - weights,
        "launches": kernels.number,
    }


def label(sabotage=None):
    """In the process with fake CUDA: bytes and kernels of labelling 8,192 tokens by GPT-2 124M in two passes."""
    import torch
    from fake_cuda import job
    from recorders import HostWaits, Kernels, Memory

    from megacocomix.config.schema import ModelConfig
    from megacocomix.model.gpt2 import GPT2
    from megacocomix.sae.model import SAE, SAEForm
    from megacocomix.teacher.labels import ConceptLabeler, LabelSettings
    from megacocomix.teacher.load import gpt2_teacher
    from megacocomix.teacher.model import Teacher

    if sabotage == "logits in fp32":
        import megacocomix.teacher.model as teacher_model

        real, kept = teacher_model.frozen_head_loss, []

        def frozen_head_loss(hidden, *rest):
            kept.append(torch.empty(len(hidden), 50257, device="cuda"))
            return real(hidden, *rest)

        teacher_model.frozen_head_loss = frozen_head_loss
    if sabotage == "chunks of a half":
        import megacocomix.model.losses as losses

        losses.CHUNK_ELEMENTS = 1 << 23
    shape = ModelConfig(num_layers=12, hidden_size=768, num_heads=12, context=1024, vocab_size=50257, dropout=0.0)
    with job(), HostWaits(), Memory() as memory:
        torch.set_default_dtype(torch.bfloat16)
        with torch.device("cuda"):
            model = GPT2(shape)
        torch.set_default_dtype(torch.float32)
        with torch.device("cuda"):
            sae = SAE(768, 32768, SAEForm(k=32))
        settings = LabelSettings(4, "attribution", "positive", True, None, 1024, None, 5, "resid_post_mlp")
        labeler = ConceptLabeler(Teacher(gpt2_teacher(model), 5), sae, settings)
        tokens = torch.randint(0, 100, (8, 1024), device="cuda")
        weights = memory.measure()
        memory.restart()
        with Kernels() as kernels:
            labeler(tokens)
    return {"weights": weights, "peak": memory.peak - weights, "launches": kernels.number}


def check(found, most):
    assert found.keys() == most.keys()
    found = {key: number if key == "launches" else number / 2**20 for key, number in found.items()}
    wrong = {key: number for key, number in found.items() if not 0.5 * most[key] < number <= most[key]}
    assert not wrong, wrong


@pytest.mark.parametrize("recipe", bounds.MICRO_BATCH)
def test_a_micro_batch_stays_within_its_memory_and_launches(recipe, on_fake_cuda):
    check(on_fake_cuda(run_micro_batch, recipe), bounds.MICRO_BATCH[recipe])


def test_labelling_stays_within_its_memory_and_launches(on_fake_cuda):
    check(on_fake_cuda(label), bounds.LABELLING)


@pytest.mark.parametrize(("sabotage", "finding"), [("logits in fp32", "peak"), ("chunks of a half", "launches")])
def test_a_waste_is_found(sabotage, finding, on_fake_cuda):
    with pytest.raises(AssertionError, match=finding):
        check(on_fake_cuda(run_micro_batch, "69m", sabotage), bounds.MICRO_BATCH["69m"])
    with pytest.raises(AssertionError, match=finding):
        check(on_fake_cuda(label, sabotage), bounds.LABELLING)
