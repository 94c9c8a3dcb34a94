"""Load a teacher from a folder. GPT-2 of Hugging Face and our own runs use our modules. Any other Hugging Face causal
LM uses transformers' modules, if its blocks can be listed."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from megacocomix.checkpoint.open import LoadedModel, load_lm, recorded_tokenizer, weights_sha256
from megacocomix.config.schema import Location
from megacocomix.data.tokenizer import Tokenizer
from megacocomix.errors import UserError
from megacocomix.hub import local_folder
from megacocomix.teacher.model import Teacher, TeacherModel, gpt2_teacher

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_teacher(
    path: str | Path,
    layer: int,
    location: Location = "resid_post_mlp",
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Teacher:
    """The teacher in the folder `path`, with a hook point. Raises UserError for a folder without a model, a student
    with concepts (its residual stream changes length between blocks), and a layer or location that does not exist."""
    try:
        return Teacher(load_teacher_model(path, device, dtype), layer, location)
    except UserError as error:
        raise UserError(
            *(line if str(path) in line else f"teacher {path}: {line}" for line in error.problems)
        ) from None


def load_teacher_model(
    path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> TeacherModel:
    """A teacher's model, without a hook point. Raises UserError, also for weights that are not finite."""
    path = local_folder(path)
    lm = load_lm(path, dtype)
    if not isinstance(lm, LoadedModel):
        _check_finite(lm, path)
        return _hf_teacher(lm.requires_grad_(False).to(device), path)
    if lm.model.concept is not None:
        raise UserError(f"teacher {path} has a concept module; only next-token models can be teachers.")
    _check_finite(lm.model, path)
    return gpt2_teacher(lm.model.to(device=device, dtype=dtype), lm.sha256)


def _check_finite(model: nn.Module, path: Path) -> None:
    if not all(parameter.isfinite().all() for parameter in model.parameters()):
        raise UserError(f"teacher {path} holds weights that are not finite: get it again.")


def teacher_tokenizer(path: str | Path) -> Tokenizer | None:
    """`recorded_tokenizer` of a folder, or of a name on the hub."""
    return recorded_tokenizer(local_folder(path))


def _hf_teacher(lm: "PreTrainedModel", path: Path) -> TeacherModel:
    config = lm.config.get_text_config()
    base, head, blocks = lm.base_model, lm.get_output_embeddings(), _list_blocks(lm, config.num_hidden_layers)
    if not isinstance(head, nn.Linear) or blocks is None:
        what = "blocks" if blocks is None else "linear head"
        raise UserError(f"teacher {path} is a {type(lm).__name__}, whose {what} cannot be found.")
    body = lambda tokens_BT: base(input_ids=tokens_BT, use_cache=False).last_hidden_state
    with torch.no_grad():
        probe = torch.arange(4, device=head.weight.device)[None]
        logits, expected = head(body(probe)), lm(input_ids=probe, use_cache=False).logits
    tolerance = 2 * torch.finfo(logits.dtype).eps * expected.abs().max().item()
    settings = (getattr(config, key, None) for key in ("final_logit_softcapping", "logit_scale", "logits_scaling"))
    is_changed = any(value not in (None, 1) for value in settings)
    if is_changed or not torch.allclose(logits, expected, rtol=0, atol=tolerance):
        raise UserError(f"teacher {path} is a {type(lm).__name__}, which changes its logits after its head.")
    return TeacherModel(body, head, blocks, config.max_position_embeddings, weights_sha256(path))


def _list_blocks(model: nn.Module, num_blocks: int) -> list[nn.Module] | None:
    """The only ModuleList of `num_blocks` modules of one class; None if there are none or several."""
    lists = [
        list(module)
        for module in model.modules()
        if isinstance(module, nn.ModuleList) and len(module) == num_blocks and len(set(map(type, module))) == 1
    ]
    return lists[0] if len(lists) == 1 else None
