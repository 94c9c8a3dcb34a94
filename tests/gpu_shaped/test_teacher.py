"""The teacher on fake CUDA: labels of every source, hidden states and outputs; and decoding with a cache and steering.
All of it stays on the device, in its precision, and waits for the device only where that is written down."""

import dataclasses
from pathlib import Path

import bounds
import pytest

CONFIG = Path(__file__).parents[2] / "configs" / "69m.yaml"
LAYERS, WIDTH, LATENTS, CONTEXT, VOCAB = 4, 96, 512, 256, 1000
WINDOWS = 2 * 4096 // CONTEXT + 1  # the last pass of the teacher is padded

PASSES = 3
# Options of the method, of the autoencoder, the hook point, and reads of a pass of the teacher.
LABELS = [
    ({}, {"k": 32}, "resid_post_mlp", {}),
    ({}, {"k": 32}, "resid_post_attn", {}),
    ({}, {"k": 32}, "resid_delta_mlp", {}),
    ({}, {"k": 32}, "resid_delta_attn", {}),
    ({"label_sign": "absolute"}, {"k": 32, "normalization": "center_rescale"}, "resid_post_mlp", {}),
    (
        {"name": "activation"},
        {"activation": "relu", "normalization": "none"},
        "resid_post_mlp",
        {"megacocomix/sae/model.py:encode_normalized": 1},
    ),
    (
        {"name": "random"},
        {"k": 32, "normalization": "rescale"},
        "resid_post_mlp",
        {"megacocomix/teacher/attribution.py:score": 1},
    ),
    ({"label_end_of_text": False, "mask_unlabelled": False}, {"k": 32}, "resid_post_mlp", {}),
]
# Options of the student, whether decoding is cached, where and at which tokens it is steered, the temperature.
DECODED = [
    ({}, True, "before", "decoded", 0.7),
    ({}, True, "after", [1, 2], 0.0),
    ({}, False, "before", "all", 0.7),
    ({}, True, None, "decoded", 0.7),
    ({"interleave_every": 4}, True, "after", "decoded", 0.7),
    ({"name": "ntp"}, True, None, "decoded", 0.0),
    ({"placement": "add"}, True, "before", "decoded", 0.7),
]


def make_teacher(location="resid_post_mlp"):
    import torch

    from megacocomix.config.schema import ModelConfig
    from megacocomix.model.gpt2 import GPT2
    from megacocomix.teacher.load import gpt2_teacher
    from megacocomix.teacher.model import Teacher

    shape = ModelConfig(
        num_layers=LAYERS, hidden_size=WIDTH, num_heads=4, context=CONTEXT, vocab_size=VOCAB, dropout=0.0
    )
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = GPT2(shape)
    torch.set_default_dtype(torch.float32)
    return Teacher(gpt2_teacher(model), 1, location)


def make_labeler(teacher, method, form, location="resid_post_mlp"):
    import torch

    from megacocomix.sae.model import SAE, SAEForm
    from megacocomix.teacher.labels import ConceptLabeler, LabelSettings

    with torch.device("cuda"):
        sae = SAE(WIDTH, LATENTS, SAEForm(**form))
    masked = None if method.label_end_of_text else VOCAB - 1
    settings = LabelSettings(
        4, method.label_source, method.label_sign, method.mask_unlabelled, masked, CONTEXT, 22, 1, location
    )
    return ConceptLabeler(teacher, sae, settings)


def make_targets(options, form, location, sabotage=None):
    """In the process with fake CUDA: a method's targets, and what the host waited for."""
    import torch
    from fake_cuda import job
    from recorders import HostWaits

    from megacocomix.config.load import load_config
    from megacocomix.teacher.targets import ConceptLabels, TargetSource

    if sabotage:
        globals()[sabotage]()
    config = load_config(CONFIG, [f"method.{key}={value}" for key, value in options.items()])
    method = config.method
    with job(), HostWaits(number=8) as waits:
        teacher = make_teacher(location)
        labels = None
        if method.learns_concepts:
            labels = ConceptLabels(make_labeler(teacher, method, form, location), None, "", "", 0.0)
        source = TargetSource(method, CONTEXT, labels, teacher, "")
        tokens = torch.randint(0, VOCAB, (WINDOWS, CONTEXT), device="cuda")
        waits.clear()
        made, zeros = source(range(WINDOWS), tokens), source.zeros(tokens)
        found = [None if each is None else [list(each.shape), str(each.dtype), each.device.type] for each in made]
        also = [None if each is None else [list(each.shape), str(each.dtype), each.device.type] for each in zeros]
    return {"made": found, "zeros": also, "reads": dict(waits.reads), "uploads": dict(waits.uploads)}


def decode_texts(options, cached, place, at, temperature, sabotage=None):
    """In the process with fake CUDA: reads and uploads of each step of decoding."""
    import torch
    from fake_cuda import job
    from recorders import HostWaits

    import tiny
    from megacocomix.interpret.decode import Sampling, decode
    from megacocomix.interpret.steering import Edit

    if sabotage:
        globals()[sabotage]()
    real = tiny.student(**options)
    with job(), HostWaits(number=3, boolean=True) as waits:
        with torch.device("cuda"):
            model = type(real.model)(real.model.config).eval()
        student = dataclasses.replace(real, model=model)
        student.__dict__["tokenizer"] = tiny.letters()
        edits = [[], [Edit(3, scale=4.0), Edit(5, low=2.0)]] if place else None
        sampling = Sampling(4, temperature=temperature, top_k=5, top_p=0.9, min_p=0.1)
        found = []
        for steps in decode(student, [[1, 2, 3], [4]], sampling, edits, place or "before", at, cached):
            assert len(steps) == 2
            found.append([dict(waits.reads), dict(waits.uploads)])
            waits.clear()
    return found


@pytest.mark.parametrize(("options", "form", "location", "reads"), LABELS)
def test_labels_are_made_on_the_device_and_wait_where_recorded(options, form, location, reads, on_fake_cuda):
    report = on_fake_cuda(make_targets, {"name": "cocomix"} | options, form, location)
    check_targets(report, [[WINDOWS, CONTEXT, 4], "torch.int64", "cuda"], None, None)
    assert report["reads"] == {place: PASSES * number for place, number in reads.items()}


@pytest.mark.parametrize("method", ["cocomix", "cocomix+kd", "kd", "direct-hidden"])
def test_targets_are_made_on_the_device_in_their_precision(method, on_fake_cuda):
    report = on_fake_cuda(make_targets, {"name": method, "target_size": WIDTH}, {"k": 32}, "resid_post_mlp")
    labels = [[WINDOWS, CONTEXT, 4], "torch.int64", "cuda"] if "cocomix" in method else None
    hidden = [[WINDOWS, CONTEXT, WIDTH], "torch.float32", "cuda"] if method == "direct-hidden" else None
    outputs = [[WINDOWS, CONTEXT, WIDTH], "torch.bfloat16", "cuda"] if "kd" in method else None
    check_targets(report, labels, hidden, outputs)
    assert report["reads"] == report["uploads"] == {}


def check_targets(report, *expected):
    assert report["made"] == report["zeros"] == list(expected)


@pytest.mark.parametrize(("options", "cached", "place", "at", "temperature"), DECODED)
def test_a_decoded_token_waits_as_often_as_recorded(options, cached, place, at, temperature, on_fake_cuda):
    steps = on_fake_cuda(decode_texts, options, cached, place, at, temperature)
    kind = "steered" if place else "without concepts" if options.get("name") == "ntp" else "unsteered"
    assert len(steps) == 4
    for reads, uploads in steps[1:]:
        assert sum(reads.values()) <= bounds.READS_OF_A_TOKEN[kind], reads
        assert sum(uploads.values()) <= bounds.UPLOADS_OF_A_TOKEN, uploads


def read_a_score():
    import megacocomix.teacher.labels as labels

    real = labels.select_labels

    def select_labels(scores, *arguments):
        if scores.score.max() < 0:
            raise AssertionError
        return real(scores, *arguments)

    labels.select_labels = select_labels


def score_on_the_host():
    import megacocomix.teacher.labels as labels

    real = labels.score
    labels.score = lambda *arguments: real(*arguments)._replace(score=real(*arguments).score.cpu())


def read_every_logit():
    from megacocomix.interpret.decode import _StudentReader

    real = _StudentReader.read

    def read(self, *arguments):
        logits, kept = real(self, *arguments)
        logits.max().item()
        return logits, kept

    _StudentReader.read = read


@pytest.mark.parametrize(("sabotage", "finding"), [("read_a_score", "labels.py"), ("score_on_the_host", "device")])
def test_a_fault_in_labelling_is_found(sabotage, finding, on_fake_cuda):
    with pytest.raises((AssertionError, RuntimeError), match=finding):
        assert on_fake_cuda(make_targets, {"name": "cocomix"}, {"k": 32}, "resid_post_mlp", sabotage)["reads"] == {}


def test_a_fault_in_decoding_is_found(on_fake_cuda):
    steps = on_fake_cuda(decode_texts, {}, True, "before", "decoded", 0.7, "read_every_logit")
    assert sum(steps[1][0].values()) > bounds.READS_OF_A_TOKEN["steered"]
