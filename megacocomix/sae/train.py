"""Train a TopK autoencoder on rows of a teacher's residual, in one process or in several that share each batch.

The method is that of Gao et al. 2024, "Scaling and evaluating sparse autoencoders" (arXiv 2406.04093), section 2 and
appendix A. Its unusual parts:

- The loss is a ratio, the fraction of variance unexplained (FVU): 1 means "no better than the mean row".
- Decoder rows keep unit norm. The part of their gradient that would only lengthen them is removed before a step,
  because it would fill Adam's moments. The drift that remains is divided out after the step.
- Latents that have not been active for a while are dead. They get a loss of their own (AuxK), because otherwise they
  would stay dead: they have to reconstruct the error of the active latents.
- Latents that stay dead are reset from time to time to the direction of a badly explained row (Bricken et al. 2023,
  "Towards Monosemanticity", appendix on resampling).

Shapes: N rows of a batch on this rank, D width, C latents, K latents kept per row.
"""

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megacocomix.errors import UserError
from megacocomix.model.concept import standardize
from megacocomix.sae.model import SAE, SAEForm


def shuffled_batches(
    read_block: Callable[[int], Tensor], batch_rows: int, block_batches: int, seed: int, start: int = 0
) -> Iterator[Tensor]:
    """An endless stream of batches [batch_rows, D], beginning with the batch of step `start`.

    `read_block(i)` returns block i, [block_batches × batch_rows, D]. Neighbouring rows come from one text and are
    alike, so the rows of a block are distributed to its batches at random. Every row is used once."""
    block, skip = divmod(start, block_batches)
    while True:
        rows = read_block(block)
        assert len(rows) == block_batches * batch_rows, (len(rows), block_batches, batch_rows)
        order = torch.randperm(len(rows), generator=seeded(seed, "block", block)).to(rows.device)
        for batch in order.split(batch_rows)[skip:]:
            yield rows[batch]
        block, skip = block + 1, 0


def seeded(*parts: object) -> torch.Generator:
    """A CPU generator whose seed depends only on `parts`."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


GRADIENT_CLIP = 1.0
# The value of Gao et al. Adam's usual 1e-8 would dwarf the tiny gradients of latents that are seldom kept.
ADAM_EPS = 6.25e-10
DECAY_FRACTION = 0.2


@dataclass(frozen=True)
class SAETraining:
    """Settings of a training run; each row is a token. Raises one UserError with every impossible value."""

    latents: int
    """C."""
    k: int
    """Latents kept per row."""
    steps: int
    """Optimizer steps."""
    batch_rows: int
    """Rows of a step, summed over all ranks."""
    lr: float
    """Largest learning rate; `default_lr` computes the usual one for C."""
    warmup_steps: int
    """Steps of linear warm-up. The last fifth of all steps decays linearly to zero."""
    aux_k: int
    """Dead latents that reconstruct the error of a row; `default_aux_k` computes the usual number for D."""
    dead_after_tokens: int
    """A latent is dead if it was not active on this many consecutive tokens."""
    resample_every: int
    """Steps between resets of dead latents, until the learning rate decays; 0 means never."""
    seed: int = 0
    """Seeds the initial directions, the shuffling and the resampling."""
    aux_coefficient: float = 1 / 32
    """Weight of the dead latents' loss; 0 turns it off."""
    block_batches: int = 16
    """Rows are shuffled over this many batches, so that a batch mixes many windows."""

    def __post_init__(self):
        least = {
            **dict.fromkeys(("latents", "k", "steps", "batch_rows", "aux_k", "dead_after_tokens", "block_batches"), 1),
            **dict.fromkeys(("warmup_steps", "aux_coefficient", "resample_every"), 0),
        }
        problems = [
            f"{name} is {getattr(self, name)}; it must be at least {bound}."
            for name, bound in least.items()
            if not getattr(self, name) >= bound  # "not >=" also refuses nan
        ]
        if self.k > self.latents:
            problems.append(f"k is {self.k}; it must not exceed the number of latents, {self.latents}.")
        if not 0 < self.lr < math.inf:
            problems.append(f"lr is {self.lr}; it must be positive and finite.")
        if problems:
            raise UserError(*problems)


def default_lr(num_latents: int) -> float:
    """2e-4 at 16,384 latents, times the inverse square root of their number (the scaling law of Gao et al.)."""
    return 2e-4 / math.sqrt(num_latents / 2**14)


def default_aux_k(width: int) -> int:
    """About half the width, as a power of two (Gao et al.): 512 for GPT-2's 768."""
    return 2 ** round(math.log2(max(2, width) / 2))


class SAETrainer:
    """An autoencoder in training: call `step` for each batch, and save `state` to resume later. With several ranks,
    each passes its part of a batch and all hold the same weights. The number of ranks changes rounding, and which rows
    are shuffled together."""

    def __init__(self, settings: SAETraining, width: int, device: torch.device | str = "cpu"):
        self.settings = settings
        self.sae = SAE(width, settings.latents, SAEForm(k=settings.k)).to(device)
        self.silent_tokens_C = torch.zeros(settings.latents, dtype=torch.int64, device=device)
        self.num_steps = 0
        self.optimizer = torch.optim.Adam(self.sae.parameters(), lr=settings.lr, eps=ADAM_EPS)

    @torch.no_grad()
    def begin(self, rows_ND: Tensor) -> None:
        """Initialise with random unit directions (encoder = decoder) around the mean of some rows.

        Gao et al. use the geometric median. The arithmetic mean is enough here: standardised rows all have the same
        norm, so there are no outliers.
        """
        sae = self.sae
        directions = torch.empty(sae.decoder.shape).normal_(generator=seeded(self.settings.seed, "directions"))
        sae.decoder.copy_(F.normalize(directions, dim=1))
        sae.encoder.copy_(sae.decoder)
        sae.pre_bias.copy_(_mean_row(standardize(rows_ND)[0]))

    def step(self, rows_ND: Tensor) -> dict[str, Any]:
        """One optimizer step on this rank's part of a batch. Returns `step, tokens, fvu, aux_fvu, l0, dead_fraction,
        resampled, lr, grad_norm` of the whole batch; values on the device stay tensors. Raises UserError if a gradient
        is not finite."""
        settings, sae = self.settings, self.sae
        normed_ND = standardize(rows_ND)[0]
        index_NK, value_NK = sae.encode_normalized(normed_ND)
        x_hat_ND = sae.decode(index_NK, value_NK)
        fvu = fraction_unexplained(x_hat_ND, normed_ND)

        active_NK = value_NK > 0
        fired_C = torch.zeros_like(self.silent_tokens_C)
        fired_C[index_NK[active_NK]] = 1
        self.silent_tokens_C += settings.batch_rows
        self.silent_tokens_C[all_reduce(fired_C) > 0] = 0
        dead = self.dead()
        aux_fvu = auxiliary_loss(sae, normed_ND, x_hat_ND.detach(), dead, settings.aux_k)

        (fvu + settings.aux_coefficient * aux_fvu).backward()
        for parameter in sae.parameters():
            all_reduce(parameter.grad)
        remove_parallel_gradient(sae.decoder)
        try:
            grad_norm = torch.nn.utils.clip_grad_norm_(sae.parameters(), GRADIENT_CLIP, error_if_nonfinite=True)
        except RuntimeError:
            raise UserError(
                f"a gradient is not finite in step {self.num_steps + 1}: lower the learning rate, or take more rows."
            ) from None
        lr = settings.lr * lr_factor(self.num_steps, settings.steps, settings.warmup_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad()
        normalize_rows(sae.decoder)
        self.num_steps += 1
        is_due = settings.resample_every and self.num_steps % settings.resample_every == 0
        is_due = is_due and self.num_steps < (1 - DECAY_FRACTION) * settings.steps
        resampled = self._resample(dead, normed_ND - x_hat_ND.detach()) if is_due else 0
        return {
            "step": self.num_steps,
            "tokens": self.num_steps * settings.batch_rows,
            "fvu": all_reduce(fvu.detach()),
            "aux_fvu": all_reduce(aux_fvu.detach()),
            "l0": all_reduce(active_NK.sum()) / settings.batch_rows,
            "dead_fraction": len(dead) / settings.latents,
            "resampled": resampled,
            "lr": lr,
            "grad_norm": grad_norm,
        }

    def dead(self) -> Tensor:
        """Ids of the dead latents, int64."""
        return (self.silent_tokens_C >= self.settings.dead_after_tokens).nonzero().squeeze(1)

    def state(self) -> dict[str, Tensor]:
        """Everything that the next step depends on, except settings and rows."""
        tensors = {"silent_tokens": self.silent_tokens_C, "num_steps": torch.tensor(self.num_steps)}
        for name, parameter in self.sae.named_parameters():
            tensors[name] = parameter.detach()
            tensors |= {f"{name}.{key}": value for key, value in self.optimizer.state.get(parameter, {}).items()}
        return {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}

    @torch.no_grad()
    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Resume from tensors that `state` returned."""
        self.silent_tokens_C.copy_(tensors["silent_tokens"])
        self.num_steps = int(tensors["num_steps"])
        for name, parameter in self.sae.named_parameters():
            parameter.copy_(tensors[name])
            moments = {key.rpartition(".")[2]: value for key, value in tensors.items() if key.startswith(f"{name}.")}
            on_device = {key: value if key == "step" else value.to(parameter.device) for key, value in moments.items()}
            self.optimizer.state[parameter] = on_device

    @torch.no_grad()
    def _resample(self, dead: Tensor, error_ND: Tensor) -> int:
        """Reset dead latents to the error directions of some of rank 0's rows, with the encoder norm and bias of the
        average living latent. Rows are drawn in proportion to their squared error. Returns the number of resets."""
        num = min(len(dead), len(error_ND))
        if num == 0 or len(dead) == self.settings.latents:
            return 0
        chance_N = error_ND.square().sum(1).double().cpu()
        generator = seeded(self.settings.seed, "resample", self.num_steps)
        direction_MD = F.normalize(error_ND[chance_N.multinomial(num, generator=generator).to(dead.device)], dim=1)
        if _world() > 1:
            dist.broadcast(direction_MD, src=0)
        is_alive_C = torch.ones(self.settings.latents, dtype=torch.bool, device=dead.device)
        is_alive_C[dead] = False
        dead = dead[torch.randperm(len(dead), generator=generator)[:num].to(dead.device)]
        sae = self.sae
        values = {
            "decoder": direction_MD,
            "encoder": direction_MD * sae.encoder[is_alive_C].norm(dim=1).mean(),
            "latent_bias": sae.latent_bias[is_alive_C].mean(),
        }
        for name, value in values.items():
            parameter = sae.get_parameter(name)
            parameter[dead] = value
            moments = self.optimizer.state[parameter]
            moments["exp_avg"][dead] = 0
            # Not 0: Adam's bias correction no longer acts, so the first steps would be three times too large.
            moments["exp_avg_sq"][dead] = moments["exp_avg_sq"][is_alive_C].mean(0)
        self.silent_tokens_C[dead] = 0
        return num


def lr_factor(step: int, steps: int, warmup_steps: int) -> float:
    """The learning rate of 0-based `step` divided by the largest: it rises, stays, and falls to 0 in the last fifth."""
    up = (step + 1) / max(1, warmup_steps)
    down = (steps - step) / (DECAY_FRACTION * steps)
    return min(1.0, up, down)


def all_reduce(tensor: Tensor) -> Tensor:
    """Sum over the ranks, in place."""
    if _world() > 1:
        dist.all_reduce(tensor)
    return tensor


def _world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _mean_row(rows_ND: Tensor) -> Tensor:
    return all_reduce(rows_ND.sum(0)) / all_reduce(torch.tensor(len(rows_ND), device=rows_ND.device))


def fraction_unexplained(prediction_ND: Tensor, target_ND: Tensor) -> Tensor:
    """Squared error divided by the target's variance around its mean row, a scalar: 0 is perfect, 1 is no better than
    the mean. With several ranks it is this rank's summand; the gradients add up too."""
    variance = all_reduce((target_ND - _mean_row(target_ND)).square().sum())
    error = (prediction_ND - target_ND).square().sum()
    return error / variance.clamp_min(torch.finfo(variance.dtype).tiny)


def auxiliary_loss(sae: SAE, normed_ND: Tensor, x_hat_ND: Tensor, dead: Tensor, aux_k: int) -> Tensor:
    """AuxK: the fraction of the rows' error that the best `aux_k` of the `dead` latents (int64 ids) leave unexplained.

    `x_hat_ND` must be detached: this loss must not change the active latents.
    """
    if len(dead) == 0:
        return normed_ND.new_zeros(())
    pre_NC = F.linear(normed_ND - sae.pre_bias, sae.encoder[dead], sae.latent_bias[dead])
    value, position = pre_NC.topk(min(aux_k, len(dead)), dim=-1)
    error_ND = normed_ND - x_hat_ND
    # decode() adds pre_bias, which is not part of the error.
    return fraction_unexplained(sae.decode(dead[position], value.relu()) - sae.pre_bias, error_ND)


@torch.no_grad()
def remove_parallel_gradient(rows: Tensor) -> None:
    """Remove from each row's gradient the part parallel to the row, which has unit norm; in place."""
    rows.grad -= (rows.grad * rows).sum(1, keepdim=True) * rows


@torch.no_grad()
def normalize_rows(rows: Tensor) -> None:
    """Scale each row to unit norm; in place."""
    rows.copy_(F.normalize(rows, dim=1))
