"""AdamW, its parameter groups and its learning rate."""

import math

import torch
from torch import nn

from megacocomix.config.schema import OptimizerConfig


def build_optimizer(named: list[tuple[str, int, nn.Parameter]], config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over (name, number of dims, parameter); its learning rate is 0 until `set_learning_rate`.

    Weight decay applies to matrices, not to biases, LayerNorm and pre_bias, which all have one dim. With `decay: all`
    (the reference, trainer.py:86-93) it applies to everything.
    """
    decayed, others = {"params": [], "weight_decay": config.weight_decay}, {"params": [], "weight_decay": 0.0}
    for _, dims, parameter in named:
        group = decayed if config.decay == "all" or dims > 1 else others
        group["params"].append(parameter)
    groups = [group for group in (decayed, others) if group["params"]]
    return torch.optim.AdamW(groups, lr=0.0, betas=config.betas, eps=config.eps, fused=named[0][2].is_cuda)


def learning_rate(step: int, config: OptimizerConfig, num_steps: int) -> float:
    """Learning rate of optimizer step `step` (0-based): linear from 0 over the warm-up, then half a cosine from lr to
    min_lr. The first step's rate is 0, as in the reference."""
    if step < config.warmup_steps:
        return config.lr * step / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, num_steps - config.warmup_steps)
    return config.min_lr + 0.5 * (config.lr - config.min_lr) * (1 + math.cos(math.pi * min(progress, 1.0)))


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of every group."""
    for group in optimizer.param_groups:
        group["lr"] = rate
