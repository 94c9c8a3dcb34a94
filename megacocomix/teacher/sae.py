"""The TopK sparse autoencoder that turns a teacher's residual into a few concepts, and its one file format.

The form is that of OpenAI's GPT-2 autoencoders, which CoCoMix labels with; theirs convert without loss:

    xn    = standardize(x)                            each row: mean removed, divided by its std
    pre   = encoder (xn - pre_bias) + latent_bias     C numbers
    value = ReLU of the K largest of pre              K numbers and their indices; the other latents are zero
    x_hat = (sum of value * decoder[index] + pre_bias) * std + mean

Shapes: N rows, D width of the teacher, C latents, K latents kept per row.

Nothing here is ever dense in C except the pre-activations, and those only for a slice of the rows at a time.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from megacocomix.errors import UserError
from megacocomix.files import file_sha256
from megacocomix.model.concept import STANDARDIZE_EPS, standardize

FORMAT = "megacocomix-sae"
VERSION = 1

# What `standardize` does. It is written into every file: fed with another normalisation an autoencoder still
# runs and still gives K latents a row; they just mean nothing.
NORMALIZATION = {"kind": "standardize", "eps": STANDARDIZE_EPS, "unbiased": True}

# Most pre-activations held at once: 128 MiB in fp32, which is 1,024 rows of 32,768 latents.
MAX_PRE_ACTIVATIONS = 2**25


class TopKSAE(nn.Module):
    """Sparse autoencoder that keeps at most K latents a row. Its parameters start at zero.

    `pre_bias` [D], `encoder` [C, D], `latent_bias` [C] and `decoder` [C, D], fp32. The decoder has a row for
    each latent, the transpose of OpenAI's `decoder.weight`, because whoever uses it gathers whole directions.

    `info` is what its file says about where it comes from; `save` lists the keys. Raises UserError when `k`
    does not fit `num_latents`.
    """

    def __init__(self, width: int, num_latents: int, k: int):
        super().__init__()
        if not 1 <= k <= num_latents:
            raise UserError(f"k is {k}; it must be from 1 to the number of latents, {num_latents}.")
        self.k = k
        self.info: dict[str, Any] = {}
        self.sha256 = ""
        self.pre_bias = nn.Parameter(torch.zeros(width))
        self.encoder = nn.Parameter(torch.zeros(num_latents, width))
        self.latent_bias = nn.Parameter(torch.zeros(num_latents))
        self.decoder = nn.Parameter(torch.zeros(num_latents, width))

    @property
    def num_latents(self) -> int:
        """C."""
        return self.decoder.shape[0]

    @property
    def width(self) -> int:
        """D, the width of the residual it reads."""
        return self.decoder.shape[1]

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Residual [..., D], any float type -> `index` int64 and `value` fp32, both [..., K], largest first.

        A latent with value 0 was among the K largest without being positive: it is not active.
        """
        return self.encode_standardized(standardize(x)[0])

    def encode_standardized(self, normed: Tensor) -> tuple[Tensor, Tensor]:
        """`encode` for rows [..., D] that are already standardised."""
        chunk_rows = max(1, MAX_PRE_ACTIVATIONS // self.num_latents)
        values, indices = [], []
        for normed_ND in normed.reshape(-1, self.width).split(chunk_rows):
            pre_NC = F.linear(normed_ND - self.pre_bias, self.encoder, self.latent_bias)
            value_NK, index_NK = pre_NC.topk(self.k, dim=-1)
            values.append(value_NK.relu())
            indices.append(index_NK)
        shape = (*normed.shape[:-1], self.k)
        return torch.cat(indices).reshape(shape), torch.cat(values).reshape(shape)

    def decode(self, index: Tensor, value: Tensor) -> Tensor:
        """`index` int64 and `value` [..., any K] -> reconstruction [..., D] in the standardised space."""
        num_kept = index.shape[-1]
        sum_ND = F.embedding_bag(
            index.reshape(-1, num_kept),
            self.decoder,
            per_sample_weights=value.reshape(-1, num_kept),
            mode="sum",
        )
        return sum_ND.reshape(*index.shape[:-1], self.width) + self.pre_bias

    def reconstruct(self, x: Tensor) -> Tensor:
        """Residual [..., D] -> what the K latents keep of it, same shape, type and scale."""
        normed, mean, std = standardize(x)
        x_hat = self.decode(*self.encode_standardized(normed)) * std + mean
        return x_hat.to(x.dtype)

    def save(self, path: str | Path, info: Mapping[str, Any]) -> None:
        """Write one safetensors file: fp32 weights, and everything about them in its header.

        `info` is stored as JSON. Its keys: `teacher` (a name), `teacher_sha256`, `sae_layer`, `location`,
        `context` (tokens of a window it was trained on), `tokenizer_sha256`, `measured` (numbers by name).
        Folders are made; the file is written aside and renamed, so that no reader ever meets half of it.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        header = {
            "format": FORMAT,
            "version": str(VERSION),
            "activation": "topk",
            "k": str(self.k),
            "normalization": json.dumps(NORMALIZATION),
            "info": json.dumps(dict(info)),
        }
        weights = {name: weight.detach().float().cpu().contiguous() for name, weight in self.named_parameters()}
        aside = path.with_name(path.name + ".part")
        save_file(weights, aside, metadata=header)
        os.replace(aside, path)

    @classmethod
    def load(cls, path: str | Path, device: str | torch.device = "cpu") -> Self:
        """Read a file that `save` wrote, frozen (no gradients), straight onto `device`.

        Raises UserError for a missing file, one that is not safetensors, another format, a newer version,
        another activation or normalisation, and tensors that are missing or disagree in shape. Whether its
        width, layer and location are those of the teacher at hand is for the caller to compare.
        """
        path = Path(path)
        if not path.is_file():
            raise UserError(f"{path}: no such SAE file.")
        try:
            with safe_open(path, framework="pt", device=str(device)) as file:
                header = file.metadata() or {}
                k, info = _read_header(path, header)
                weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is not a dict
        except SafetensorError as error:
            raise UserError(
                f"{path}: not a readable safetensors file ({error}). Train one with tools/train_sae.py."
            ) from None
        sae = cls._from_weights(weights, k, str(path)).requires_grad_(False)
        sae.info = info
        sae.sha256 = file_sha256(path)
        return sae

    @classmethod
    def from_openai(cls, state: Mapping[str, Tensor], k: int) -> Self:
        """Build from OpenAI's layout: `pre_bias`, `encoder.weight`, `latent_bias`, `decoder.weight` [D, C].

        Other entries, such as their activation statistics, are ignored. Raises UserError for tensors that are
        missing or disagree in shape.
        """
        weights = {name.removesuffix(".weight"): weight for name, weight in state.items()}
        if "decoder" in weights:
            weights["decoder"] = weights["decoder"].T.contiguous()
        return cls._from_weights(weights, k, "the OpenAI autoencoder")

    @classmethod
    def _from_weights(cls, weights: Mapping[str, Tensor], k: int, source: str) -> Self:
        """Adopt the tensors themselves: no second copy of them exists at any moment."""
        names = ("pre_bias", "encoder", "latent_bias", "decoder")
        if missing := [name for name in names if name not in weights]:
            raise UserError(f"{source}: tensors missing: {' '.join(missing)}.")
        shapes = {name: tuple(weights[name].shape) for name in names}
        if len(shapes["encoder"]) == 2:
            num_latents, width = shapes["encoder"]
            expected = ((width,), (num_latents, width), (num_latents,), (num_latents, width))
        if len(shapes["encoder"]) != 2 or tuple(shapes.values()) != expected:
            listing = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
            raise UserError(f"{source}: the shapes of its tensors disagree: {listing}.")
        with torch.device("meta"):
            sae = cls(width, num_latents, k)
        sae.load_state_dict({name: weights[name].float() for name in names}, assign=True)
        return sae


def _read_header(path: Path, header: Mapping[str, str]) -> tuple[int, dict[str, Any]]:
    """K and `info` from a file's header, once everything in it is something this code computes."""
    found = header.get("format", "none")
    if found != FORMAT:
        raise UserError(
            f"{path}: its header names the format '{found}', not '{FORMAT}'. Train one with tools/train_sae.py."
        )
    try:
        version, k = int(header["version"]), int(header["k"])
        activation, normalization = header["activation"], json.loads(header["normalization"])
        info = json.loads(header["info"])
    except (KeyError, ValueError) as error:
        raise UserError(f"{path}: its header is damaged ({error}).") from None
    if version > VERSION:
        raise UserError(f"{path}: version {version} of the format; this code reads up to {VERSION}.")
    if activation != "topk":
        raise UserError(f"{path}: activation '{activation}'; only 'topk' is supported.")
    if normalization != NORMALIZATION:
        raise UserError(f"{path}: normalises with {normalization}; only {NORMALIZATION} is supported.")
    return k, info
