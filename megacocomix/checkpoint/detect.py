"""What a model folder is, told by its files. Every command that takes a model asks here."""

from pathlib import Path
from typing import Literal, NamedTuple

from megacocomix.checkpoint.external.deepspeed import find_partitions
from megacocomix.checkpoint.external.megatron import find_ranks
from megacocomix.checkpoint.format import CHECKPOINT_FILE, latest_checkpoint
from megacocomix.errors import UserError


class Detected(NamedTuple):
    """A kind of model folder, and where the model lies."""

    kind: Literal["native", "hf", "megatron", "deepspeed"]
    """native: a checkpoint of ours. hf: Hugging Face's layout, which the published CoCoMix code writes too."""
    path: Path
    """Of a run the newest sound checkpoint, else the folder itself."""


def detect(path: str | Path) -> Detected:
    """Tell what a folder is:

    - a run or a checkpoint of ours: `checkpoints/`, `checkpoint.json`;
    - Megatron-LM, legacy layout: `mp_rank_XX/model_optim_rng.pt` (megatron.py);
    - Hugging Face: `config.json` with safetensors, whole or in shards (hf.py);
    - DeepSpeed ZeRO: `*_optim_states.pt` (deepspeed.py).

    Raises UserError where it is none of them, or where a run has no sound checkpoint.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"model folder {path} does not exist.")
    if (path / "checkpoints").is_dir():
        return Detected("native", latest_checkpoint(path))
    if (path / CHECKPOINT_FILE).is_file():
        return Detected("native", path)
    if find_ranks(path):
        return Detected("megatron", path)
    has_config = (path / "config.json").is_file()
    if has_config and any(path.glob("*.safetensors*")):
        return Detected("hf", path)
    if find_partitions(path):
        return Detected("deepspeed", path)
    if has_config or any(path.glob("model*.safetensors*")):
        return Detected("hf", path)
    raise UserError(
        f"{path} holds no model: expected a run or a checkpoint of ours, or a folder of Hugging Face, of the published "
        "CoCoMix code, of Megatron-LM (mp_rank_*) or of DeepSpeed (*_optim_states.pt)."
    )
