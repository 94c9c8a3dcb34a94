"""Rows of a teacher's residual in an order that mixes many windows, as a pure function of (seed, rank, step): a run
that resumes needs one integer, its step."""

import hashlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor


def shuffled_batches(
    read_block: Callable[[int], Tensor], batch_rows: int, block_batches: int, seed: int, start: int = 0
) -> Iterator[Tensor]:
    """Batches [batch_rows, D] from the one of step `start` on, for ever.

    `read_block(i)` gives block i, [block_batches × batch_rows, D]: neighbouring rows come from one text and are alike,
    so the rows of a block are dealt to its batches at random. Every row comes out once."""
    block, skip = divmod(start, block_batches)
    while True:
        rows = read_block(block)
        assert len(rows) == block_batches * batch_rows, (len(rows), block_batches, batch_rows)
        order = torch.randperm(len(rows), generator=seeded(seed, "block", block)).to(rows.device)
        for batch in order.split(batch_rows)[skip:]:
            yield rows[batch]
        block, skip = block + 1, 0


def seeded(*parts: object) -> torch.Generator:
    """A CPU generator that depends on these parts alone."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
