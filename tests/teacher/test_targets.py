"""Teacher targets are of the right positions, the same from a cache, and made in chunks."""

import numpy as np
import pytest
import torch

import tiny
from megacocomix.config.method import PRESETS
from megacocomix.model.concept import standardize
from megacocomix.teacher.label_job import label_all
from megacocomix.training.inputs import open_inputs

CPU = torch.device("cpu")


def targets_of(folder, **sections):
    inputs = open_inputs(tiny.config(folder, **sections), CPU)
    windows = [3, 0, 7]
    return inputs.targets, windows, torch.from_numpy(inputs.train.batch([0, 1, 2]))


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("name", PRESETS)
def test_targets_are_what_a_method_asks_for_and_zeros_have_their_shape(folder, name, every):
    every = 1 if name in ("ntp", "kd", "predict-only", "add") else every
    method = {"name": name, "interleave_every": every}
    source, windows, tokens = targets_of(folder, method=method)
    if name in ("ntp", "pause", "mix-only"):
        assert source is None
        return
    targets, zeros = source(windows, tokens), source.zeros(tokens)
    asked = {"labels_NMk": source.method.learns_concepts, "hidden_NME": source.method.learns_hidden}
    asked["outputs_NTE"] = source.method.distills
    assert {key: getattr(targets, key) is not None for key in asked} == asked
    for target, zero in zip(targets, zeros, strict=True):
        assert (target is None) == (zero is None)
        if target is not None:
            assert (target.shape, target.dtype) == (zero.shape, zero.dtype)
            assert not zero.any()
    for target in targets[:2]:
        assert target is None or target.shape[1] == tiny.CONTEXT // every


def test_only_tokens_with_a_slot_have_labels_whether_live_or_cached(folder, tmp_path):
    config = tiny.config(folder)
    label_all(config, tmp_path / "cache", CPU)
    everywhere, windows, _ = targets_of(folder)
    slotted, *_ = targets_of(folder, method={"interleave_every": 3})
    cached, *_ = targets_of(folder, method={"interleave_every": 3}, teacher={"labels": str(tmp_path / "cache")})
    windows_of_data = np.fromfile(folder / "train.bin", np.uint16).reshape(-1, tiny.CONTEXT)
    tokens = torch.from_numpy(windows_of_data[windows].astype(np.int64))
    expected = everywhere(windows, tokens).labels_NMk[:, 2::3]
    assert torch.equal(slotted(windows, tokens).labels_NMk, expected)
    assert torch.equal(cached(windows, tokens).labels_NMk, expected)
    assert slotted.flops > 0 and cached.flops == 0


def test_outputs_times_head_are_the_teachers_logits_and_hidden_states_are_standardised(folder):
    source, windows, tokens = targets_of(folder, method={"name": "kd", "predict": "hidden", "mix": "predicted"})
    targets = source(windows, tokens)
    torch.testing.assert_close(source.head.logits(targets.outputs_NTE), source.teacher.logits(tokens))
    torch.testing.assert_close(targets.hidden_NME, standardize(source.teacher.hidden(tokens))[0])
    assert not any(tensor.requires_grad for tensor in (*targets[1:], source.head.weight))


def test_a_window_longer_than_the_teachers_is_read_chunk_by_chunk(folder):
    sections = {"model": {"context": 2 * tiny.CONTEXT}, "teacher": {"windowed": True}}
    source, windows, tokens = targets_of(folder, method={"name": "kd"}, **sections)
    outputs = source(windows, tokens).outputs_NTE
    first, second = (source.teacher.outputs(chunk) for chunk in tokens.split(tiny.CONTEXT, dim=1))
    torch.testing.assert_close(outputs, torch.cat((first, second), 1))


def test_a_teacher_is_loaded_without_an_autoencoder_where_none_is_needed(folder):
    for name in ("kd", "kd+pause", "direct-hidden"):
        source, *_ = targets_of(folder, method={"name": name}, teacher={"sae": None})
        assert source.identity().keys() == {"teacher.model", "teacher.model's config"}
