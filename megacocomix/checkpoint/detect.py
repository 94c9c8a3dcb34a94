"""Detects the kind of a model folder from its files. Every command that takes a model folder uses this."""

from pathlib import Path
from typing import Literal, NamedTuple

from megacocomix.checkpoint.external.deepspeed import find_partitions
from megacocomix.checkpoint.external.megatron import find_ranks
from megacocomix.checkpoint.format import CHECKPOINT_FILE, latest_checkpoint
from megacocomix.errors import UserError


class Detected(NamedTuple):
    """The kind of a model folder, and the folder that holds the model."""

    kind: Literal["native", "hf", "megatron", "deepspeed"]
    """native: our checkpoint format. hf: Hugging Face's layout, which the published CoCoMix code writes too."""
    path: Path
    """For a run, its newest sound checkpoint; else the folder itself."""
    is_verified: bool = False
    """Whether the files of a native checkpoint were compared with their hashes."""


def detect(path: str | Path | Detected) -> Detected:
    """Detect the kind of a folder (once: what was detected is returned as it is):

    - a run or a native checkpoint: `checkpoints/`, `checkpoint.json`;
    - Megatron-LM, legacy layout: `mp_rank_XX/model_optim_rng.pt` (megatron.py);
    - Hugging Face: `config.json` with safetensors, whole or in shards (hf.py);
    - DeepSpeed ZeRO: `*_optim_states.pt` (deepspeed.py).

    Raises UserError if it is none of them, or a run without a sound checkpoint.
    """
    if isinstance(path, Detected):
        return path
    path = Path(path)
    if not path.exists():
        raise UserError(f"model folder {path} does not exist.")
    if (path / "checkpoints").is_dir():
        return Detected("native", latest_checkpoint(path), is_verified=True)
    if (path / CHECKPOINT_FILE).is_file():
        return Detected("native", path)
    if find_ranks(path):
        return Detected("megatron", path)
    has_config = (path / "config.json").is_file()
    if has_config and any(path.glob("model*.safetensors*")):
        return Detected("hf", path)
    if find_partitions(path):
        return Detected("deepspeed", path)
    if has_config or any(path.glob("model*.safetensors*")):
        return Detected("hf", path)
    raise UserError(
        f"{path} holds no model: expected a run, a native checkpoint, or a folder of Hugging Face, the published "
        "CoCoMix code, Megatron-LM (mp_rank_*) or DeepSpeed (*_optim_states.pt)."
    )
