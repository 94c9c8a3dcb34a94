"""Opens a causal language model of any architecture as transformers' own class. transformers fills missing tensors with
random values, ignores others, and casts integers: here each of these is an error."""

import re
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from megacocomix.checkpoint.external.hf import OTHER_HEADS, check_complete
from megacocomix.checkpoint.tensors import FLOATS, WRAPPED, SafetensorFiles, sharded_files
from megacocomix.errors import UserError

# What wraps a whole model, whose own names may begin with `model.`.
WRAPPED_MODEL = re.compile(rf"{WRAPPED.pattern}|^model\.(?=(?:model|lm_head)\.)")
# Causal masks and positions that earlier versions of transformers stored for GPT-2, GPT-Neo, GPT-J, CodeGen and others.
BUFFERS = re.compile(r"(?:.*\.)?h\.\d+\.attn\.(?:attention\.)?(?:masked_)?bias|.*\.causal_mask|.*\.position_ids")


def load_causal_lm(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Load the model in eval mode on the CPU. No code from the folder is run. Raises UserError, also unless its tensors
    are exactly those of the model, and if a token can read those after it."""
    check_complete(folder)
    store = SafetensorFiles(sharded_files(folder), lambda name: WRAPPED_MODEL.sub("", name))
    for name, stored in store.dtypes.items():
        if stored not in FLOATS and not BUFFERS.fullmatch(name):
            raise UserError(f"{store.file_of(name)}: {name} is of type {stored}; {' '.join(FLOATS)} are read.")
    logging.disable_progress_bar()
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # it warns in a table of what the check below says in one line
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            key_mapping={WRAPPED_MODEL.pattern: ""},
        )
    except Exception as error:  # transformers raises many types
        reason = " ".join(str(error).split())
        raise UserError(f"{folder} cannot be loaded by transformers as a causal LM: {reason:.200}") from None
    finally:
        logging.set_verbosity(verbosity)
    unknown = set(loading["unexpected_keys"])
    if model.config.model_type == "gpt2":  # of which it does not even report names that contain "attn.bias"
        known = model.state_dict().keys()
        unknown |= {name for name in store.shapes if not {name, f"transformer.{name}"} & known}
    unknown = {name for name in unknown if not OTHER_HEADS.fullmatch(name) and not BUFFERS.fullmatch(name)}
    for what, names in (("lacks", set(loading["missing_keys"])), ("holds what is none of its model:", unknown)):
        if names:
            more = f" and {len(names) - 1} more tensors" if len(names) > 1 else ""
            raise UserError(f"{folder} {what} {min(names)}{more}: config.json and weights do not fit.")
    if not getattr(model.config.get_text_config(), "max_position_embeddings", None):
        raise UserError(f"{folder} does not record how many tokens it reads: set max_position_embeddings.")
    model.eval()
    if not _is_causal(model):
        raise UserError(f"{folder} is a {type(model).__name__} whose tokens read those after them: it is no causal LM.")
    return model


@torch.no_grad()
def _is_causal(model: PreTrainedModel) -> bool:
    """Whether another last token leaves the logits before it as they are."""
    tokens_BT = torch.arange(4).repeat(2, 1)
    tokens_BT[1, -1] = 0
    first, second = model(input_ids=tokens_BT, use_cache=False).logits[:, :-1].float()
    scale = first.nan_to_num().abs().max().item()  # weights that are not finite are named elsewhere
    return torch.allclose(first, second, rtol=1e-3, atol=1e-3 * scale, equal_nan=True)
