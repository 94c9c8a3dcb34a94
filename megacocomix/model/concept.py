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
from megacocomix.model.losses import row_chunks

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


def weighted_rows(weight_CD: torch.Tensor, index: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Σ_k value[…, k] · weight[index[…, k]]: int64 indices and values […, K] → […, D], in the weight's dtype.

    Sums are in fp32 (of an fp64 weight in fp64) and in a fixed order. In bf16, embedding_bag has no gradient of its
    values on a GPU before torch 2.13, and on a CPU that of its weight is summed in bf16.
    """
    index_NK, value_NK = index.flatten(0, -2), value.flatten(0, -2).to(weight_CD.dtype)
    return _WeightedRows.apply(weight_CD, index_NK, value_NK).unflatten(0, index.shape[:-1])


class _WeightedRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight_CD, index_NK, value_NK):
        ctx.save_for_backward(weight_CD, index_NK, value_NK)
        return F.embedding_bag(index_NK, weight_CD, mode="sum", per_sample_weights=value_NK)

    @staticmethod
    def backward(ctx, grad_ND):
        weight_CD, index_NK, value_NK = ctx.saved_tensors
        grad_ND = grad_ND.contiguous()
        needs_weight, _, needs_value = ctx.needs_input_grad
        return (
            _weight_gradient(grad_ND, index_NK, value_NK, len(weight_CD)) if needs_weight else None,
            None,
            _value_gradient(grad_ND, index_NK, weight_CD) if needs_value else None,
        )


def _weight_gradient(grad_ND, index_NK, value_NK, num_rows):
    """[C, D]. It is a weighted sum of rows too: row c sums the gradients of the positions that kept c."""
    # Each row is summed by one thread. Entries of value 0 add nothing, and a tensor rank has one with row 0 for each
    # concept of another rank: spread over all rows, they make no row long.
    spread_NK = torch.arange(index_NK.numel(), device=index_NK.device).view_as(index_NK) % num_rows
    kept, order = torch.where(value_NK == 0, spread_NK, index_NK).flatten().sort(stable=True)
    starts_C = torch.searchsorted(kept, torch.arange(num_rows, device=kept.device))
    position, value = order // index_NK.shape[1], value_NK.flatten()[order]
    return F.embedding_bag(position, grad_ND, starts_C, mode="sum", per_sample_weights=value)


def _value_gradient(grad_ND, index_NK, weight_CD):
    """[N, K]: the dot product of each kept row with its position's gradient."""
    grad_NK = torch.empty_like(index_NK, dtype=weight_CD.dtype, memory_format=torch.contiguous_format)
    # A CPU is faster if the gathered rows stay in its cache (4 MiB in fp32), a GPU if it has few kernels to launch.
    per_row = index_NK.shape[1] * weight_CD.shape[1] * (16 if weight_CD.device.type == "cpu" else 1)
    for rows in row_chunks(len(index_NK), per_row):
        gathered_NKD = F.embedding(index_NK[rows], weight_CD)
        grad_NK[rows] = torch.bmm(grad_ND[rows].unsqueeze(1), gathered_NKD.mT).squeeze(1)
    return grad_NK


class Compress(nn.Module):
    """Linear(C, D) on a vector with K non-zeros, as a weighted sum of K rows instead of a dense [C × D] product.

    `weight` is [C, D], one row per concept: the transpose of the reference's compress_layer.weight.
    """

    def __init__(self, num_concepts: int, hidden_size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_concepts, hidden_size))
        self.bias = nn.Parameter(torch.empty(hidden_size))

    def forward(self, value_BTK, index_BTK):
        return weighted_rows(self.weight, index_BTK, value_BTK) + self.bias


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
