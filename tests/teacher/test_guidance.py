"""What a student learns from its teacher travels as data: of the right positions, the same from a cache, in pieces."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import tiny
from megacocomix.method import PRESETS
from megacocomix.model.concept import standardize
from megacocomix.teacher.label_job import label_all
from megacocomix.validate import open_inputs

CPU = torch.device("cpu")


def guidance_of(folder, **sections):
    inputs = open_inputs(tiny.config(folder, **sections), CPU)
    windows = [3, 0, 7]
    return inputs.guidance, windows, torch.from_numpy(inputs.train.batch([0, 1, 2]))


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("name", PRESETS)
def test_signals_are_what_a_method_asks_for_and_zeros_have_their_shape(folder, name, every):
    every = 1 if name in ("ntp", "kd", "predict-only", "add") else every
    method = {"name": name, "interleave_every": every}
    guidance, windows, tokens = guidance_of(folder, method=method)
    if name in ("ntp", "pause", "mix-only"):
        assert guidance is None
        return
    signals, zeros = guidance(windows, tokens), guidance.zeros(tokens)
    asked = {"labels_NMk": guidance.method.learns_concepts, "hidden_NME": guidance.method.learns_hidden}
    asked["outputs_NTE"] = guidance.method.distills
    assert {key: getattr(signals, key) is not None for key in asked} == asked
    for signal, zero in zip(signals, zeros, strict=True):
        assert (signal is None) == (zero is None)
        if signal is not None:
            assert (signal.shape, signal.dtype) == (zero.shape, zero.dtype)
            assert not zero.any()
    for signal in signals[:2]:
        assert signal is None or signal.shape[1] == tiny.CONTEXT // every


def test_only_tokens_with_a_slot_have_labels_whether_live_or_cached(folder, tmp_path):
    config = tiny.config(folder)
    label_all(config, tmp_path / "cache", CPU)
    everywhere, windows, _ = guidance_of(folder)
    slotted, *_ = guidance_of(folder, method={"interleave_every": 3})
    cached, *_ = guidance_of(folder, method={"interleave_every": 3}, teacher={"labels": str(tmp_path / "cache")})
    windows_of_data = np.fromfile(folder / "train.bin", np.uint16).reshape(-1, tiny.CONTEXT)
    tokens = torch.from_numpy(windows_of_data[windows].astype(np.int64))
    expected = everywhere(windows, tokens).labels_NMk[:, 2::3]
    assert torch.equal(slotted(windows, tokens).labels_NMk, expected)
    assert torch.equal(cached(windows, tokens).labels_NMk, expected)
    assert slotted.flops > 0 and cached.flops == 0


def test_outputs_times_head_are_the_teachers_logits_and_hidden_states_are_standardised(folder):
    guidance, windows, tokens = guidance_of(folder, method={"name": "kd", "predict": "hidden", "mix": "predicted"})
    signals = guidance(windows, tokens)
    torch.testing.assert_close(F.linear(signals.outputs_NTE, *guidance.head), guidance.teacher.logits(tokens))
    torch.testing.assert_close(signals.hidden_NME, standardize(guidance.teacher.hidden(tokens))[0])
    assert not any(tensor.requires_grad for tensor in (*signals[1:], guidance.head.weight))


def test_a_window_longer_than_the_teachers_is_read_piece_by_piece(folder):
    sections = {"model": {"context": 2 * tiny.CONTEXT}, "teacher": {"windowed": True}}
    guidance, windows, tokens = guidance_of(folder, method={"name": "kd"}, **sections)
    outputs = guidance(windows, tokens).outputs_NTE
    first, second = (guidance.teacher.outputs(piece) for piece in tokens.split(tiny.CONTEXT, dim=1))
    torch.testing.assert_close(outputs, torch.cat((first, second), 1))


def test_a_teacher_is_loaded_without_an_autoencoder_where_none_is_needed(folder):
    for name in ("kd", "kd+pause", "direct-hidden"):
        guidance, *_ = guidance_of(folder, method={"name": name}, teacher={"sae": None})
        assert guidance.identity().keys() == {"teacher.model"}
