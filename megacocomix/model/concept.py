"""The method on one screen: predict the concepts of a hidden state, compress them to one vector, put it after its
token.

Shapes: B batch, T tokens, D width, C concepts, K concepts kept. Formulas follow the published code
(modeling_gpt2_cocomix.py:74-81, 1269-1292), which wraps the paper's Eq. 3 in the normalisation of the teacher's
autoencoder.
"""

import torch
import torch.nn.functional as F
from torch import nn

STANDARDIZE_EPS = 1e-5


def standardize(x: torch.Tensor, eps: float = STANDARDIZE_EPS) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[…, D] → (x̂ […, D], mean […, 1], std […, 1]), all fp32: unbiased std, eps added to the std and not under its
    root."""
    x = x.float()
    mean = x.mean(-1, keepdim=True)
    centred = x - mean
    std = centred.std(-1, keepdim=True)
    return centred / (std + eps), mean, std


def interleave(x_BTD: torch.Tensor, concept_BTD: torch.Tensor) -> torch.Tensor:
    """[h_1, h_2, …] and [c_1, c_2, …] → [h_1, c_1, h_2, c_2, …], [B, 2T, D]: each concept right after its token."""
    return torch.stack((x_BTD, concept_BTD), dim=2).flatten(1, 2)


class KeepLargest(nn.Module):
    """Concept logits [B, T, C] → the K largest of each position (values, indices), [B, T, K]. Raw logits are kept,
    signs and all: no softmax, no ReLU."""

    def __init__(self, num_kept: int):
        super().__init__()
        self.num_kept = num_kept

    def forward(self, logits_BTC):
        return logits_BTC.topk(self.num_kept, dim=-1)


class Compress(nn.Module):
    """Linear(C, D) on a vector with K non-zeros, as a weighted sum of K rows: never a dense [C × D] product.

    `weight` is [C, D], a row a concept: the transpose of the reference's compress_layer.weight.
    """

    def __init__(self, num_concepts: int, hidden_size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_concepts, hidden_size))
        self.bias = nn.Parameter(torch.empty(hidden_size))

    def forward(self, value_BTK, index_BTK):
        index, value = index_BTK.flatten(0, 1), value_BTK.flatten(0, 1)
        rows = F.embedding_bag(index, self.weight, mode="sum", per_sample_weights=value)
        return rows.unflatten(0, index_BTK.shape[:2]) + self.bias


class ConceptMixer(nn.Module):
    """Predict → keep the K largest → compress → interleave (paper §2.2-2.3)."""

    def __init__(self, hidden_size: int, num_concepts: int, num_kept: int):
        super().__init__()
        self.pre_bias = nn.Parameter(torch.zeros(hidden_size))
        self.predict = nn.Linear(hidden_size, num_concepts)
        self.keep = KeepLargest(num_kept)
        self.compress = Compress(num_concepts, hidden_size)

    def forward(self, x_BTD):
        """[B, T, D] → ([B, 2T, D], concept logits [B, T, C])."""
        normed_BTD, mean, std = standardize(x_BTD)
        logits_BTC = self.predict(normed_BTD.to(x_BTD.dtype) - self.pre_bias)
        concept_BTD = (self.compress(*self.keep(logits_BTC)) + self.pre_bias) * std + mean
        return interleave(x_BTD, concept_BTD.to(x_BTD.dtype)), logits_BTC
