"""Which kind of source a folder is.

A source is recognised by its files:

- a run or a checkpoint of ours (`checkpoints/`, `checkpoint.json`);
- a Hugging Face GPT-2 folder (`config.json`, `model.safetensors` whole or in shards);
- a folder that `--to hf` made of a model with concepts (model_type cocomix);
- a folder of the published CoCoMix code: the same with `transformer.concept_predictor` in it. Its config.json does not
  know of concepts; they stand in `config.yaml` there or one folder up, else in the hints;
- a Megatron-LM checkpoint in the legacy layout (`mp_rank_XX/model_optim_rng.pt`), see megatron.py;
- a DeepSpeed ZeRO checkpoint (`*_optim_states.pt`), see zero_files.py.
"""

from pathlib import Path

from megacocomix.checkpoint.convert.megatron import find_ranks, open_megatron
from megacocomix.checkpoint.convert.sources import NO_HINTS, Hints, Source, open_hf, open_ours
from megacocomix.checkpoint.convert.tensors import sharded_files
from megacocomix.checkpoint.convert.zero_files import find_partitions, open_zero
from megacocomix.errors import UserError
from megacocomix.model.load import CHECKPOINT_FILE, latest_checkpoint


def open_source(path: str | Path, hints: Hints = NO_HINTS) -> Source:
    """Recognise a folder and check that its tensors are those of its sizes. Raises UserError."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"model folder {path} does not exist.")
    if (path / "checkpoints").is_dir():
        path = latest_checkpoint(path)
    if (path / CHECKPOINT_FILE).is_file():
        return open_ours(path)
    if files := find_ranks(path):
        return open_megatron(path, files, hints)
    if (path / "config.json").is_file() and list(path.glob("model*.safetensors*")):
        return open_hf(path, hints)
    if folder := find_partitions(path):
        return open_zero(path, folder, hints)
    if (path / "config.json").is_file():
        sharded_files(path)  # says which file is missing
    raise UserError(
        f"{path} holds no model: expected a run or a checkpoint of ours, or a folder of Hugging Face GPT-2, of the "
        "published CoCoMix code, of Megatron-LM (mp_rank_*) or of DeepSpeed (*_optim_states.pt)."
    )
