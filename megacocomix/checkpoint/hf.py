"""A next-token model of ours → a Hugging Face GPT-2 folder, proved to be the same model before it is called done."""

import json
import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from megacocomix.data.tokenizer import load_tokenizer, tokenizer_files
from megacocomix.errors import UserError
from megacocomix.model.gpt2 import LAYER_NORM_EPS
from megacocomix.model.hf_names import to_hf
from megacocomix.model.load import LoadedModel

LOGIT_TOLERANCE = 1e-4


def export_gpt2(source: LoadedModel, out: str | Path, tokenizer: str) -> float:
    """Write config.json, model.safetensors (fp32) and the tokenizer's files.

    transformers then loads the folder and both models read the same tokens; returns the largest difference of their
    logits. Raises UserError, and leaves nothing behind, when it exceeds LOGIT_TOLERANCE, when OUT exists, or when the
    model has concepts, which GPT-2 cannot express.
    """
    out = Path(out)
    if source.model.concept is not None:
        raise UserError(f"{source.path} has a concept module; GPT-2's Hugging Face class cannot express it.")
    if out.exists():
        raise UserError(f"--out {out} exists already; choose another folder.")
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        _write(source, partial, tokenizer)
        difference = _largest_difference(source, partial)
        if not difference <= LOGIT_TOLERANCE:
            raise UserError(
                f"{source.path}: the converted model differs by {difference:.1e} in its logits; not written."
            )
        os.rename(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return difference


def _write(source: LoadedModel, out: Path, tokenizer: str) -> None:
    shape, eot_id = source.shape, load_tokenizer(tokenizer).eot_id
    config = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "activation_function": "gelu_new",
        "n_layer": shape.num_layers,
        "n_embd": shape.hidden_size,
        "n_head": shape.num_heads,
        "n_positions": shape.context,
        "vocab_size": shape.vocab_size,
        "layer_norm_epsilon": LAYER_NORM_EPS,
        "attn_pdrop": shape.dropout,
        "embd_pdrop": shape.dropout,
        "resid_pdrop": shape.dropout,
        "bos_token_id": eot_id,
        "eos_token_id": eot_id,
        "tie_word_embeddings": True,
        "dtype": "float32",
    }
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    parameters = source.model.named_parameters()
    tensors = dict(to_hf(name, parameter.detach(), shape.num_heads) for name, parameter in parameters)
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    for name, file in tokenizer_files(tokenizer).items():
        shutil.copyfile(file, out / name)


@torch.no_grad()
def _largest_difference(source: LoadedModel, folder: Path) -> float:
    from transformers import GPT2LMHeadModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    shape = source.shape
    tokens = torch.randint(shape.vocab_size, (2, shape.context), generator=torch.Generator().manual_seed(0))
    theirs = GPT2LMHeadModel.from_pretrained(folder).eval()(tokens).logits
    return (source.model.eval()(tokens)[0] - theirs).abs().max().item()
