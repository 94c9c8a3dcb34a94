"""training.deterministic: the same computation gives the same bits on a GPU."""

import os

import torch

from megacocomix.errors import UserError

WORKSPACES = (":4096:8", ":16:8")
"""The values of CUBLAS_WORKSPACE_CONFIG with which cuBLAS is deterministic."""


def set_determinism(is_on: bool) -> None:
    """Make torch choose deterministic kernels, for the whole process, or no longer. An operation that has none raises
    an error. Call it before the processes connect: NCCL and cuBLAS read the environment only once. Raises UserError if
    that prevents it."""
    torch.use_deterministic_algorithms(is_on)
    # By default torch would then also fill every new tensor with NaN.
    torch.utils.deterministic.fill_uninitialized_memory = False
    if is_on and torch.cuda.is_available():
        # Sums that a switch computes (NVLink SHARP) may differ from call to call.
        os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
        workspace = os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", WORKSPACES[0])
        if workspace not in WORKSPACES:
            raise UserError(
                f"training.deterministic needs CUBLAS_WORKSPACE_CONFIG {' or '.join(WORKSPACES)}, but it is "
                f"{workspace:.40}: unset it."
            )
