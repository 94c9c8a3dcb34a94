"""AdamW, its parameter groups and its learning rate."""

import math

import torch
from torch import nn

from megacocomix.config.schema import OptimizerConfig


def parameter_groups(named: list[tuple[str, int, nn.Parameter]], config: OptimizerConfig) -> list[dict]:
    """AdamW's two groups, with and without weight decay, from (name, number of dims, parameter).

    Weight decay is for matrices: it spares biases, LayerNorm and pre_bias, all of which have one dim; with decay: all
    (the reference, trainer.py:86-93) it spares nothing.
    """
    decayed = [parameter for _, dims, parameter in named if config.decay == "all" or dims > 1]
    spared = [parameter for _, dims, parameter in named if not (config.decay == "all" or dims > 1)]
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": spared, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def build_optimizer(named: list[tuple[str, int, nn.Parameter]], config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over (name, number of dims, parameter); its learning rate is 0 until `set_learning_rate`."""
    fused = named[0][2].is_cuda
    return torch.optim.AdamW(parameter_groups(named, config), lr=0.0, betas=config.betas, eps=config.eps, fused=fused)


def learning_rate(step: int, config: OptimizerConfig, num_steps: int) -> float:
    """Rate of optimizer step `step` (0-based): linear from 0 over the warm-up, then half a cosine from lr to min_lr.

    The first step's rate is 0, as in the reference.
    """
    if step < config.warmup_steps:
        return config.lr * step / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, num_steps - config.warmup_steps)
    return config.min_lr + 0.5 * (config.lr - config.min_lr) * (1 + math.cos(math.pi * min(progress, 1.0)))


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the rate of every group."""
    for group in optimizer.param_groups:
        group["lr"] = rate
