"""Activation checkpointing: trade memory for a second forward pass of a block."""

import functools
from typing import Literal

from torch.utils.checkpoint import checkpoint

from megacocomix.model.gpt2 import GPT2


def recompute_blocks(model: GPT2, mode: Literal["none", "full"]) -> None:
    """With `full`, each block keeps only its input and is run again in the backward pass. Losses and gradients do not
    change."""
    if mode == "full":
        for block in model.blocks.values():
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
