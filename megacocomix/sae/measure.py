"""Measure how well an autoencoder explains rows of a residual that it was not trained on."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from megacocomix.errors import UserError
from megacocomix.model.concept import STANDARDIZE_EPS, standardize
from megacocomix.sae.model import SAE


@dataclass(frozen=True)
class SAEReport:
    """Measurements on held-out rows."""

    fvu: float
    """Fraction of variance unexplained, of the residual itself. Rows of huge norm (first tokens) dominate it."""
    fvu_standardized: float
    """The same with each row standardised, so that all rows count alike. Training minimises this one; quote it."""
    l0: float
    """Mean number of active latents (value > 0) per row."""
    dead_fraction: float
    """Share of latents that were active on none of the rows. It is too high if there are few rows."""
    num_rows: int


class _RunningFVU:
    """Fraction of variance unexplained over a stream of rows. In fp64, because the residual's mean is far from zero."""

    def __init__(self):
        self.num_rows, self.total, self.squares, self.error = 0, 0.0, 0.0, 0.0

    def add(self, prediction_ND: Tensor, target_ND: Tensor) -> None:
        prediction_ND, target_ND = prediction_ND.double(), target_ND.double()
        self.num_rows += len(target_ND)
        self.total = self.total + target_ND.sum(0)
        self.squares += target_ND.square().sum().item()
        self.error += (prediction_ND - target_ND).square().sum().item()

    def value(self) -> float:
        variance = self.squares - self.total.square().sum().item() / self.num_rows
        return self.error / variance if variance > 0 else math.nan


@torch.no_grad()
def measure_sae(sae: SAE, activations: Iterable[Tensor]) -> SAEReport:
    """Measure on held-out rows [any, D] on the autoencoder's device. Raises UserError if there are none."""
    raw, standardized = _RunningFVU(), _RunningFVU()
    num_active = 0
    fired_C = torch.zeros(sae.num_latents, dtype=torch.bool, device=sae.decoder.device)
    for x_ND in activations:
        normed_ND, mean, scale = sae.form.normalize(x_ND)
        index_NK, value_NK = sae.encode_normalized(normed_ND)
        x_hat_ND = sae.decode(index_NK, value_NK) * scale + mean
        target_ND, row_mean, row_std = standardize(x_ND)
        standardized.add((x_hat_ND - row_mean) / (row_std + STANDARDIZE_EPS), target_ND)
        raw.add(x_hat_ND, x_ND)
        active_NK = value_NK > 0
        num_active += active_NK.sum().item()
        fired_C[index_NK[active_NK]] = True
    if raw.num_rows == 0:
        raise UserError("there are no held-out rows to measure the autoencoder on.")
    return SAEReport(
        fvu=raw.value(),
        fvu_standardized=standardized.value(),
        l0=num_active / raw.num_rows,
        dead_fraction=1 - fired_C.sum().item() / sae.num_latents,
        num_rows=raw.num_rows,
    )
