"""Exports our model as a Hugging Face folder, which must give the same logits and loss before it gets its name.

A next-token model becomes transformers' own GPT2LMHeadModel. A model with concepts also gets the two code files of
`megacocomix.hf`. It loads with trust_remote_code where this package is not installed.
"""

import copy
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

import megacocomix.hf
from megacocomix.checkpoint.hf_names import COCOMIX_FORMAT, gpt2_config, to_hf, write_hf_weights
from megacocomix.checkpoint.open import LoadedModel
from megacocomix.checkpoint.tensors import DTYPES
from megacocomix.config.method import ARCHITECTURE
from megacocomix.data.tokenizer import export_tokenizer, load_tokenizer
from megacocomix.errors import UserError
from megacocomix.files import check_absent, write_aside, write_json
from megacocomix.model.gpt2 import INIT_STD

if TYPE_CHECKING:
    from megacocomix.hf.modeling_cocomix import CocomixForCausalLM

LOGIT_TOLERANCE, LOSS_TOLERANCE = 1e-4, 1e-5
REMOTE_CODE = ("configuration_cocomix.py", "modeling_cocomix.py")


@dataclass(frozen=True)
class Parity:
    """Differences between source and folder on the same `num_tokens` random tokens: the largest difference of a logit,
    and the difference of the mean next-token loss. `rounding` is the change of the loss by storing the weights in bf16
    (0 in fp32)."""

    num_tokens: int
    logit: float
    loss: float
    rounding: float


def export_hf(source: LoadedModel, out: str | Path, tokenizer: str, dtype: str = "float32") -> Parity:
    """Write config.json, generation_config.json, model.safetensors in `dtype`, the tokenizer's files and, for a model
    with concepts, the code. Then load the folder with transformers and compare the two models.

    Raises UserError if they differ by more than LOGIT_TOLERANCE or LOSS_TOLERANCE, or if `out` exists. Then nothing is
    left behind.
    """
    check_absent(out)
    with write_aside(out) as partial:
        partial.mkdir()
        _write(source, partial, tokenizer, dtype)
        parity = _compare(source, partial, dtype)
        if not (parity.logit <= LOGIT_TOLERANCE and parity.loss <= LOSS_TOLERANCE):
            raise UserError(
                f"{source.path}: the converted model differs by {parity.logit:.1e} in its logits and by "
                f"{parity.loss:.1e} in its loss; not written."
            )
    return parity


def _write(source: LoadedModel, out: Path, tokenizer: str, dtype: str) -> None:
    eot_id = load_tokenizer(tokenizer).eot_id
    special = {"bos_token_id": eot_id, "eos_token_id": eot_id, "pad_token_id": eot_id}
    write_json(out / "config.json", _config(source) | special | {"dtype": dtype})
    write_json(out / "generation_config.json", special)
    export_tokenizer(tokenizer, out)
    if source.model.concept is not None:
        for name in REMOTE_CODE:
            shutil.copyfile(Path(megacocomix.hf.__file__).parent / name, out / name)
    parameters = {name: parameter.detach() for name, parameter in source.model.named_parameters()}
    shapes = {name: parameter.shape for name, parameter in parameters.items()}
    write_hf_weights(out / "model.safetensors", shapes, parameters.__getitem__, source.shape.num_heads, dtype)


def to_cocomix(source: LoadedModel) -> "CocomixForCausalLM":
    """Our model, with concepts or without, as the transformers class that exported folders carry. It has a cache. In
    memory, in fp32, in eval mode."""
    from megacocomix.hf.configuration_cocomix import CocomixConfig
    from megacocomix.hf.modeling_cocomix import CocomixForCausalLM

    values = {key: value for key, value in _config(source).items() if key not in ("architectures", "auto_map")}
    values |= {"model_type": "cocomix", "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    if source.model.concept is None:
        values |= {"predict": "nothing", "mix": "nothing", "insertion_layer": 0}
    model = CocomixForCausalLM(CocomixConfig(**values))
    state = dict(to_hf(name, value.detach(), source.shape.num_heads) for name, value in source.model.named_parameters())
    model.load_state_dict(state | {"lm_head.weight": state["transformer.wte.weight"]})
    return model.eval()


def _config(source: LoadedModel) -> dict:
    """config.json without the ids of special tokens."""
    sizes = gpt2_config(source.shape) | {"initializer_range": INIT_STD}
    if source.model.concept is None:
        return {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "activation_function": "gelu_new"} | sizes
    return {
        "architectures": ["CocomixForCausalLM"],
        "model_type": "cocomix",
        "auto_map": {
            "AutoConfig": "configuration_cocomix.CocomixConfig",
            "AutoModelForCausalLM": "modeling_cocomix.CocomixForCausalLM",
        },
        "cocomix_format": COCOMIX_FORMAT,
        **{key: getattr(source.model.method, key) for key in ARCHITECTURE},
    } | sizes


@torch.no_grad()
def _compare(source: LoadedModel, folder: Path, dtype: str) -> Parity:
    """Both models read the same tokens in fp64. In fp32, rounding alone would sometimes swap the last kept concept with
    the first dropped one. The source's weights are rounded to `dtype` first, as the folder's are."""
    shape = source.shape
    tokens = torch.randint(shape.vocab_size, (2, shape.context), generator=torch.Generator().manual_seed(0))
    ours = copy.deepcopy(source.model).eval()
    exact_loss = _loss(ours.double()(tokens)[0], tokens) if dtype != "float32" else None
    logits = ours.to(DTYPES[dtype][0]).double()(tokens)[0]
    loss = _loss(logits, tokens)
    del ours
    their_logits = _load(folder, source.model.concept is not None).double()(tokens, use_cache=False).logits
    return Parity(
        num_tokens=tokens.numel(),
        logit=(their_logits - logits).abs().max().item(),
        loss=abs(_loss(their_logits, tokens) - loss),
        rounding=loss - exact_loss if exact_loss is not None else 0.0,
    )


def _loss(logits_BTV: torch.Tensor, tokens_BT: torch.Tensor) -> float:
    return F.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), tokens_BT[:, 1:].flatten()).item()


def _load(folder: Path, has_concepts: bool) -> torch.nn.Module:
    from transformers import GPT2LMHeadModel
    from transformers.utils import logging

    from megacocomix.hf.modeling_cocomix import CocomixForCausalLM

    logging.disable_progress_bar()
    # The class itself, of which the folder holds a copy: AutoModel would leave another copy in the user's cache.
    model_class = CocomixForCausalLM if has_concepts else GPT2LMHeadModel
    return model_class.from_pretrained(folder, dtype=torch.float32).eval()
