"""The concept module: predict the concepts of a hidden state, compress them to one vector, insert it after its token.
Baselines and ablations omit or replace parts of it.

Shapes: B batch, T tokens, D width, C concepts, K concepts kept, E width of the teacher, M tokens that get a vector (all
T, or every n-th one if `every` is n), S = T + M positions. The formulas follow the published code
(modeling_gpt2_cocomix.py:74-81, 1269-1292). It wraps the paper's Eq. 3 in the normalisation of the teacher's
autoencoder.
"""

import torch
import torch.nn.functional as F
from torch import nn

from megacocomix.config.method import MethodConfig

STANDARDIZE_EPS = 1e-5


def standardize(x: torch.Tensor, eps: float = STANDARDIZE_EPS) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[…, D] → (x̂ […, D], mean […, 1], std […, 1]), all fp32. The std is unbiased; eps is added to the std itself, not
    under its root."""
    x = x.float()
    mean = x.mean(-1, keepdim=True)
    centred = x - mean
    std = centred.std(-1, keepdim=True)
    return centred / (std + eps), mean, std


def interleave(x_BTD: torch.Tensor, vector_BMD: torch.Tensor, every: int = 1) -> torch.Tensor:
    """[h_1, h_2, …] and [c_1, c_2, …] → [h_1, c_1, h_2, c_2, …], [B, S, D]. Each vector comes right after its token. If
    `every` is n, only every n-th token has one."""
    num_slotted = vector_BMD.shape[1] * every
    grouped = x_BTD[:, :num_slotted].unflatten(1, (-1, every))
    mixed_BSD = torch.cat((grouped, vector_BMD.unsqueeze(2)), dim=2).flatten(1, 2)
    return torch.cat((mixed_BSD, x_BTD[:, num_slotted:]), dim=1)


def predicting_slots(num_slots: int, every: int, device: torch.device) -> torch.Tensor:
    """Which of S interleaved positions predict the next token, int64 [T]: a token's slot if it has one (reference
    modeling_gpt2_cocomix.py:1358), else the token itself."""
    tokens_T = torch.arange(num_slots - num_slots // (every + 1), device=device)
    return tokens_T + (tokens_T + 1) // every


def take_predicting(x_BSD: torch.Tensor, every: int) -> torch.Tensor:
    """The positions that predict the next token, [B, T, D]."""
    return x_BSD[:, 1::2] if every == 1 else x_BSD[:, predicting_slots(x_BSD.shape[1], every, x_BSD.device)]


class TopK(nn.Module):
    """Concept logits [B, T, C] → the K largest of each position (values, indices), [B, T, K]. The values are raw
    logits, of either sign: no softmax, no ReLU."""

    def __init__(self, num_kept: int):
        super().__init__()
        self.num_kept = num_kept

    def forward(self, logits_BTC):
        return logits_BTC.topk(self.num_kept, dim=-1)


class Compress(nn.Module):
    """Linear(C, D) on a vector with K non-zeros, as a weighted sum of K rows instead of a dense [C × D] product.

    `weight` is [C, D], one row per concept: the transpose of the reference's compress_layer.weight.
    """

    def __init__(self, num_concepts: int, hidden_size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_concepts, hidden_size))
        self.bias = nn.Parameter(torch.empty(hidden_size))

    def forward(self, value_BTK, index_BTK):
        index, value = index_BTK.flatten(0, 1), value_BTK.flatten(0, 1)
        rows = F.embedding_bag(index, self.weight, mode="sum", per_sample_weights=value)
        return rows.unflatten(0, index_BTK.shape[:2]) + self.bias


class HiddenPredictor(nn.Module):
    """Predicts the teacher's hidden state from the student's by two layers around a GELU: [B, M, D] → [B, M, E] (paper
    §3.3; the width between them, 4·D, is our choice)."""

    def __init__(self, hidden_size: int, target_size: int):
        super().__init__()
        self.up = nn.Linear(hidden_size, 4 * hidden_size)
        self.down = nn.Linear(4 * hidden_size, target_size)

    def forward(self, x_BMD):
        return self.down(F.gelu(self.up(x_BMD), approximate="tanh"))


class ConceptMixer(nn.Module):
    """Predict → keep the K largest → compress → interleave (paper §2.2-2.3).

    With method.predict hidden, a linear layer `project` replaces keeping and compressing. With method.mix pause, one
    learned vector replaces all of them.
    """

    def __init__(self, hidden_size: int, method: MethodConfig):
        super().__init__()
        self.interleaves, self.every = method.interleaves, method.interleave_every
        self.predict = self.top_k = self.compress = self.predict_hidden = self.project = None
        if method.predict != "nothing":
            self.pre_bias = nn.Parameter(torch.zeros(hidden_size))
        if method.predict == "concepts":
            self.predict = nn.Linear(hidden_size, method.num_concepts)
            if method.mix == "predicted":
                self.top_k = TopK(method.num_kept)
                self.compress = Compress(method.num_concepts, hidden_size)
        elif method.predict == "hidden":
            self.predict_hidden = HiddenPredictor(hidden_size, method.target_size)
            if method.mix == "predicted":
                self.project = nn.Linear(method.target_size, hidden_size)
        # A matrix of one row, so that it is initialised and decays as an embedding does.
        self.pause = nn.Parameter(torch.empty(1, hidden_size)) if method.mix == "pause" else None

    def forward(self, x_BTD):
        """[B, T, D] → (next block's input, [B, S, D] or [B, T, D]; the prediction: concept logits [B, M, C], a hidden
        state [B, M, E], or None)."""
        x_BMD, prediction, vector_BMD = x_BTD[:, self.every - 1 :: self.every], None, None
        if self.pause is not None:
            vector_BMD = self.pause.expand_as(x_BMD)
        if predict := self.predict or self.predict_hidden:
            normed_BMD, mean, std = standardize(x_BMD)
            prediction = predict(normed_BMD.to(x_BTD.dtype) - self.pre_bias)
        if self.compress is not None:
            vector_BMD = (self.compress(*self.top_k(prediction)) + self.pre_bias) * std + mean
        elif self.project is not None:
            vector_BMD = (self.project(prediction) + self.pre_bias) * std + mean
        if vector_BMD is None:
            return x_BTD, prediction
        vector_BMD = vector_BMD.to(x_BTD.dtype)
        mixed = interleave(x_BTD, vector_BMD, self.every) if self.interleaves else x_BTD + vector_BMD
        return mixed, prediction
