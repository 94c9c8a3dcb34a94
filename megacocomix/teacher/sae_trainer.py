"""Training a TopK autoencoder on rows of a teacher's residual, and measuring what came out.

The recipe is that of Gao et al. 2024, "Scaling and evaluating sparse autoencoders" (arXiv 2406.04093),
section 2 and appendix A. What is unusual in it:

- the loss is a ratio, the fraction of variance unexplained (FVU): 1 means "no better than the mean row";
- decoder rows keep unit norm: the part of their gradient that would only lengthen them is removed before a
  step, else it would fill Adam's moments; the drift that is left is divided out after the step;
- latents that have not been active for a while get a loss of their own (AuxK), else they never would be
  again: they have to reconstruct what the active ones missed.

Nothing here knows where rows come from: they arrive as an iterator of [rows, D] tensors.

Shapes: N rows of a batch, D width, C latents, K latents kept per row.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from megacocomix.errors import UserError
from megacocomix.model.concept import standardize
from megacocomix.teacher.sae import TopKSAE

GRADIENT_CLIP = 1.0
# The value of Gao et al.: Adam's usual 1e-8 would swallow the tiny gradients of latents that are seldom kept.
ADAM_EPS = 6.25e-10
DECAY_FRACTION = 0.2


@dataclass(frozen=True)
class SAETraining:
    """One training run; a token is a row. Raises one UserError with every impossible value."""

    latents: int
    """C."""
    k: int
    """Latents kept per row."""
    steps: int
    """Optimizer steps."""
    batch_rows: int
    """N, rows of a step."""
    lr: float
    """Largest learning rate; `default_lr` gives the usual one for C."""
    warmup_steps: int
    """Steps of linear warm-up. The last fifth of all steps decays linearly to zero."""
    aux_k: int
    """Dead latents that reconstruct the error of a row; `default_aux_k` gives the usual number for D."""
    dead_after_tokens: int
    """A latent is dead when it was not active on this many consecutive tokens."""
    seed: int = 0
    """Of the initial directions and of the shuffling."""
    aux_coefficient: float = 1 / 32
    """Weight of the dead latents' loss; 0 lets them die."""
    buffer_batches: int = 16
    """Rows are drawn at random from a buffer of this many batches, so that a batch mixes many windows."""
    log_every: int = 10
    """Steps between two calls of `log`; the last step is always logged."""

    def __post_init__(self):
        least = {
            **dict.fromkeys(("latents", "k", "steps", "batch_rows", "aux_k", "dead_after_tokens", "log_every"), 1),
            **dict.fromkeys(("warmup_steps", "aux_coefficient"), 0),
            "buffer_batches": 2,
        }
        problems = [
            f"{name} is {getattr(self, name)}; it must be at least {bound}."
            for name, bound in least.items()
            if not getattr(self, name) >= bound  # written so that nan is refused too
        ]
        if self.k > self.latents:
            problems.append(f"k is {self.k}; it must not exceed the number of latents, {self.latents}.")
        if not 0 < self.lr < math.inf:
            problems.append(f"lr is {self.lr}; it must be positive and finite.")
        if problems:
            raise UserError(*problems)


@dataclass(frozen=True)
class SAEReport:
    """What `measure_sae` found on held-out rows."""

    fvu: float
    """Fraction of variance unexplained of the residual itself; rows of huge norm (first tokens) decide it."""
    fvu_standardized: float
    """The same of the standardised residual, where rows count alike: what training minimises; quote this."""
    l0: float
    """Mean number of active latents (value > 0) per row."""
    dead_fraction: float
    """Share of latents that were active on none of the rows. Few rows overstate it."""
    num_rows: int
    """Rows it was measured on."""


def default_lr(num_latents: int) -> float:
    """2e-4 at 16,384 latents, falling with the root of their number (the scaling law of Gao et al.)."""
    return 2e-4 / math.sqrt(num_latents / 2**14)


def default_aux_k(width: int) -> int:
    """About half the width, as a power of two (as Gao et al.): 512 for GPT-2's 768."""
    return 2 ** round(math.log2(max(2, width) / 2))


def train_sae(activations: Iterable[Tensor], settings: SAETraining, log: Callable[[dict[str, Any]], None]) -> TopKSAE:
    """Train on `settings.steps` batches of rows drawn from `activations`, [any number of rows, D] tensors.

    The same seed, rows, machine and number of threads give the same bits. The result is on the rows' device.
    `log` receives `step, tokens, seconds, fvu, aux_fvu, l0, dead_fraction, lr, grad_norm`, all of them of the
    training batch except `dead_fraction`, which follows `dead_after_tokens`. Raises UserError when the rows
    end before the steps do, RuntimeError when a gradient is not finite.
    """
    generator = torch.Generator().manual_seed(settings.seed)
    batches = shuffle_rows(activations, settings.batch_rows, settings.buffer_batches, generator)
    first_ND = next(batches, None)
    if first_ND is None:
        raise UserError(f"the activations hold less than one batch of {settings.batch_rows} rows.")

    sae = initial_sae(standardize(first_ND)[0], settings.latents, settings.k, generator)
    optimizer = torch.optim.Adam(sae.parameters(), lr=settings.lr, eps=ADAM_EPS)
    scheduler = LambdaLR(optimizer, lambda step: lr_factor(step, settings.steps, settings.warmup_steps))
    silent_tokens_C = torch.zeros(settings.latents, dtype=torch.int64, device=first_ND.device)

    start = time.perf_counter()
    for step, rows_ND in enumerate(islice(chain([first_ND], batches), settings.steps), start=1):
        normed_ND = standardize(rows_ND)[0]
        index_NK, value_NK = sae.encode_standardized(normed_ND)
        x_hat_ND = sae.decode(index_NK, value_NK)
        fvu = fraction_unexplained(x_hat_ND, normed_ND)

        active_NK = value_NK > 0
        silent_tokens_C += len(rows_ND)
        silent_tokens_C[index_NK[active_NK]] = 0
        dead = (silent_tokens_C >= settings.dead_after_tokens).nonzero().squeeze(1)
        aux_fvu = auxiliary_loss(sae, normed_ND, x_hat_ND.detach(), dead, settings.aux_k)

        (fvu + settings.aux_coefficient * aux_fvu).backward()
        remove_parallel_gradient(sae.decoder)
        grad_norm = torch.nn.utils.clip_grad_norm_(sae.parameters(), GRADIENT_CLIP, error_if_nonfinite=True)
        lr = scheduler.get_last_lr()[0]
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        normalize_rows(sae.decoder)

        if step % settings.log_every == 0 or step == settings.steps:
            log(
                {
                    "step": step,
                    "tokens": step * settings.batch_rows,
                    "seconds": time.perf_counter() - start,
                    "fvu": fvu.item(),
                    "aux_fvu": aux_fvu.item(),
                    "l0": active_NK.sum().item() / len(rows_ND),
                    "dead_fraction": len(dead) / settings.latents,
                    "lr": lr,
                    "grad_norm": grad_norm.item(),
                }
            )
    if step < settings.steps:
        raise UserError(f"the activations ended after {step} of {settings.steps} steps.")
    return sae


def shuffle_rows(
    chunks: Iterable[Tensor], batch_rows: int, buffer_batches: int, generator: torch.Generator
) -> Iterator[Tensor]:
    """[any, D] tensors -> batches [batch_rows, D] of rows drawn without replacement from a bounded buffer.

    Neighbouring rows come from one text and are alike; drawn from the buffer, they leave at different times.
    Each row comes out once; what does not fill a batch at the end of the stream is dropped.
    """
    held, num_held = [], 0

    def draw(num_batches: int) -> Iterator[Tensor]:
        nonlocal held, num_held
        pool = torch.cat(held)
        pool = pool[torch.randperm(len(pool), generator=generator).to(pool.device)]
        num_drawn = num_batches * batch_rows
        held, num_held = [pool[num_drawn:]], len(pool) - num_drawn
        return iter(pool[:num_drawn].split(batch_rows))

    for chunk in chunks:
        held.append(chunk)
        num_held += len(chunk)
        if num_held >= buffer_batches * batch_rows:
            # Half stays behind: it mixes with what comes next.
            yield from draw(num_held // batch_rows // 2)
    if num_held >= batch_rows:
        yield from draw(num_held // batch_rows)


def initial_sae(normed_ND: Tensor, num_latents: int, k: int, generator: torch.Generator) -> TopKSAE:
    """Random unit directions, read and written alike (encoder = decoder), around the mean of some rows.

    The arithmetic mean will do where Gao et al. take the geometric median: standardised rows have one norm,
    so there are no outliers to guard against.
    """
    sae = TopKSAE(normed_ND.shape[1], num_latents, k)
    with torch.no_grad():
        sae.decoder.normal_(generator=generator)
        normalize_rows(sae.decoder)
        sae.encoder.copy_(sae.decoder)
        sae.pre_bias.copy_(normed_ND.mean(0))
    return sae.to(normed_ND.device)


def lr_factor(step: int, steps: int, warmup_steps: int) -> float:
    """The learning rate of 0-based `step` over the largest: up, flat, down to zero over the last fifth."""
    up = (step + 1) / max(1, warmup_steps)
    down = (steps - step) / (DECAY_FRACTION * steps)
    return min(1.0, up, down)


def fraction_unexplained(prediction_ND: Tensor, target_ND: Tensor) -> Tensor:
    """Squared error over the target's variance around its mean row, a scalar: 0 is perfect, 1 is the mean."""
    variance = (target_ND - target_ND.mean(0)).square().sum()
    error = (prediction_ND - target_ND).square().sum()
    return error / variance.clamp_min(torch.finfo(variance.dtype).tiny)


def auxiliary_loss(sae: TopKSAE, normed_ND: Tensor, x_hat_ND: Tensor, dead: Tensor, aux_k: int) -> Tensor:
    """AuxK: how badly the best `aux_k` of the `dead` latents (int64 ids) explain the rows' error, a scalar.

    `x_hat_ND` comes detached: the active latents are not to be bent until their errors please the dead.
    """
    if len(dead) == 0:
        return normed_ND.new_zeros(())
    pre_NC = F.linear(normed_ND - sae.pre_bias, sae.encoder[dead], sae.latent_bias[dead])
    value, position = pre_NC.topk(min(aux_k, len(dead)), dim=-1)
    error_ND = normed_ND - x_hat_ND
    # decode() adds pre_bias, which the error does not contain.
    return fraction_unexplained(sae.decode(dead[position], value.relu()) - sae.pre_bias, error_ND)


@torch.no_grad()
def remove_parallel_gradient(rows: Tensor) -> None:
    """Remove from each row's gradient what is parallel to the row, which is of unit norm; in place."""
    rows.grad -= (rows.grad * rows).sum(1, keepdim=True) * rows


@torch.no_grad()
def normalize_rows(rows: Tensor) -> None:
    """Bring each row to unit norm; in place."""
    rows.copy_(F.normalize(rows, dim=1))


class _RunningFVU:
    """Fraction of variance unexplained over a stream, in fp64: the residual's mean is far from zero."""

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
def measure_sae(sae: TopKSAE, activations: Iterable[Tensor]) -> SAEReport:
    """Measure on held-out rows [any, D] on the autoencoder's device. Raises UserError when there are none."""
    raw, standardized = _RunningFVU(), _RunningFVU()
    num_active = 0
    fired_C = torch.zeros(sae.num_latents, dtype=torch.bool, device=sae.decoder.device)
    for x_ND in activations:
        normed_ND, mean, std = standardize(x_ND)
        index_NK, value_NK = sae.encode_standardized(normed_ND)
        x_hat_ND = sae.decode(index_NK, value_NK)
        standardized.add(x_hat_ND, normed_ND)
        raw.add(x_hat_ND * std + mean, x_ND)
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
