"""Opens DeepSpeed ZeRO checkpoints of a GPT-2, in Hugging Face's parameter names or ours.

DeepSpeed's own zero_to_fp32 merges the partitions. It calls torch.load with weights_only=False, which would run code in
a file's pickle. So every file is checked first, and torch is forced to read weights only: see pickles.py.
"""

import contextlib
import io
import re
from pathlib import Path

import torch
from torch import Tensor

from megacocomix.checkpoint.external.hf import check_complete, hf_shape, open_hf_named
from megacocomix.checkpoint.external.source import (
    NEXT_TOKEN,
    Hints,
    Source,
    check_tensors,
    method_from_hints,
    parameter_shapes,
)
from megacocomix.checkpoint.tensors import unwrapped_name
from megacocomix.config.schema import ModelConfig
from megacocomix.errors import UserError
from megacocomix.pickles import allow_list, weights_only


def find_partitions(path: Path) -> Path | None:
    """The folder with the partitions: `path`, or the folder inside it named by the file `latest`. None if there are no
    partitions. Raises UserError if the folder that `latest` names has none."""
    latest = path / "latest"
    newest = Path(latest.read_text(errors="replace").strip()).name if latest.is_file() else ""
    for folder in (path, path / newest):
        if folder.is_dir() and list(folder.glob("*_optim_states.pt")):
            return folder
    if newest:
        raise UserError(f"{latest} names {newest}, which holds no *_optim_states.pt of ZeRO: copy that folder too.")
    return None


def open_deepspeed(path: Path, hints: Hints) -> Source:
    """Merge the partitions (they stay on disk as far as DeepSpeed allows) and check the tensors. Raises UserError."""
    store = MergedPartitions(find_partitions(path))
    if "embed.tokens.weight" in store.shapes:
        return _open_ours(path, store, hints)
    if (path / "config.json").is_file():
        check_complete(path)
        shape = hf_shape(path)
    else:
        shape = _shape(path, store, "wte", "wpe", hints)
    return open_hf_named("DeepSpeed ZeRO checkpoint of a Hugging Face GPT-2", path, store, shape, hints)


def _open_ours(path: Path, store: "MergedPartitions", hints: Hints) -> Source:
    shape = _shape(path, store, "embed.tokens", "embed.positions", hints)
    predictor = store.shapes.get("concept.predict.weight")
    method = method_from_hints(predictor[0], shape.num_layers, hints, path) if predictor else NEXT_TOKEN
    check_tensors(store, parameter_shapes(shape, method, path), path, re.compile(r"head\.weight"))
    if "head.weight" in store.shapes and not torch.equal(store.read("head.weight"), store.read("embed.tokens.weight")):
        raise UserError(f"{path}: head.weight is not embed.tokens.weight; only a tied head is read.")
    read = lambda name: store.read(name).float()
    return Source("DeepSpeed ZeRO checkpoint of our model", path, shape, method, store.files, read, None)


def _shape(path: Path, store: "MergedPartitions", tokens: str, positions: str, hints: Hints) -> ModelConfig:
    if hints.num_heads is None:
        raise UserError(f"{path} does not record its number of attention heads: give --num-heads.")
    sizes = {}
    for module in (tokens, positions):
        found = [size for name, size in store.shapes.items() if f".{name}".endswith(f".{module}.weight")]
        if len(found) != 1 or len(found[0]) != 2:
            raise UserError(f"{path} lacks {module}.weight: it is no GPT-2.")
        sizes[module] = found[0]
    vocab_size, width = sizes[tokens]
    if hints.num_heads < 1 or width % hints.num_heads:
        raise UserError(f"{path}: --num-heads {hints.num_heads} does not divide its width {width}.")
    layers = {int(match[1]) for name in store.shapes if (match := re.search(r"(?:^|\.)(?:h|blocks)\.(\d+)\.", name))}
    return ModelConfig(
        num_layers=max(layers, default=0) + 1,
        hidden_size=width,
        num_heads=hints.num_heads,
        context=sizes[positions][0],
        vocab_size=vocab_size,
        dropout=0.0,
    )


class MergedPartitions:
    """fp32 weights as zero_to_fp32 merges them, each when it is read."""

    def __init__(self, folder: Path):
        # Imported here: the import takes seconds, chooses an accelerator and prints about it.
        from deepspeed.runtime.zero.config import ZeroStageEnum
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        self.folder, self.files = folder, sorted(folder.glob("*.pt"))
        for file in self.files:
            if re.search(r"mp_rank_(?!00)\d+", file.name):
                raise UserError(f"{file} is one of several tensor ranks; only ZeRO over data ranks is read.")
        with contextlib.ExitStack() as stack:
            for file in self.files:
                stack.enter_context(allow_list(file, ZeroStageEnum))
            stack.enter_context(weights_only())
            for redirect in (contextlib.redirect_stdout, contextlib.redirect_stderr):
                stack.enter_context(redirect(io.StringIO()))
            try:
                state = get_fp32_state_dict_from_zero_checkpoint(str(folder.parent), folder.name, lazy_mode=True)
            except Exception as error:  # DeepSpeed raises many types for a damaged file
                first = str(error).strip().split("\n")[0]
                raise UserError(f"{folder} cannot be merged by DeepSpeed's zero_to_fp32: {first:.150}.") from None
        self._tensors = {unwrapped_name(name): tensor for name, tensor in state.items()}
        if len(self._tensors) < len(state):
            raise UserError(f"{folder} holds two tensors of one name: {' '.join(sorted(state))[:150]}.")
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}
        self.dtypes = dict.fromkeys(self.shapes, "F32")  # zero_to_fp32 merges the fp32 master weights

    def file_of(self, name: str) -> Path:
        """The folder: every file in it holds a part of each tensor."""
        return self.folder

    def read(self, name: str) -> Tensor:
        """A whole tensor in fp32."""
        return self._tensors[name].contiguous().detach()
