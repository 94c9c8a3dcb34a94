"""Activation checkpointing: trade memory for a second forward pass of a block, or of its attention.

It composes with everything: what is run again includes its collectives, in the same order on all tensor ranks, and
under ZeRO-3 the gathering of its weights.
"""

import functools
from typing import Literal

from torch.utils.checkpoint import checkpoint

from megacocomix.model.gpt2 import GPT2


def recompute_blocks(part: GPT2, mode: Literal["none", "selective", "full"]) -> None:
    """With `full` each block keeps only its input and is run again in the backward pass, with `selective` each
    attention. Losses and gradients do not change."""
    if mode == "none":
        return
    for block in part.blocks.values():
        module = block if mode == "full" else block.attention
        module.forward = functools.partial(checkpoint, module.forward, use_reentrant=False)
