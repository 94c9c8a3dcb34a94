"""The sparse autoencoder that turns a teacher's residual into a few concepts.

One class computes every supported kind of autoencoder; `SAEForm` holds the differences:

    xn    = normalize(x)                              none | center | standardize | rescale | center_rescale, by row
    pre   = encoder (xn - pre_bias) + latent_bias     C numbers
    value = ReLU of the K largest of pre (topk)       K numbers and their indices; the other latents are zero
            or of all positive ones (relu)            K is then the largest count of positive ones in a row
    x_hat = (sum of value * decoder[index] + pre_bias) * scale + mean

Shapes: N rows, D width of the teacher, C latents, K latents kept per row.

Only the pre-activations are dense in C, and only for a chunk of the rows at a time.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megacocomix.errors import UserError, nearest
from megacocomix.model.concept import STANDARDIZE_EPS, standardize

Activation = Literal["topk", "relu"]
Normalization = Literal["standardize", "center", "rescale", "center_rescale", "none"]
# What is computed if a row's mean is removed first.
CENTERED: dict[Normalization, Normalization] = {"none": "center", "rescale": "center_rescale"}

# The others of torch need a scale to be numbers (float8), or are none (integers, complex).
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# Largest number of pre-activations in memory at once: 128 MiB in fp32, or 1,024 rows of 32,768 latents.
MAX_PRE_ACTIVATIONS = 2**25


@dataclass(frozen=True)
class SAEForm:
    """What an autoencoder computes with its weights. Raises one UserError with every impossible value."""

    activation: Activation = "topk"
    k: int | None = None
    """Latents kept per row; for topk only."""
    normalization: Normalization = "standardize"
    """standardize: remove the mean, divide by the unbiased std (OpenAI's TopK, SAELens' layer_norm). center: remove the
    mean (what TransformerLens' centred weights do to the residual). rescale: multiply by √D / norm (SAELens'
    constant_norm_rescale). center_rescale: center, then rescale. none."""
    eps: float = STANDARDIZE_EPS
    """Added to the std, not to the variance under the root."""

    def __post_init__(self):
        problems: list[str] = []
        for name, kind in (("activation", Activation), ("normalization", Normalization)):
            if (value := getattr(self, name)) not in get_args(kind):
                problems.append(f"{name} {value!r} cannot be computed.{nearest(str(value), get_args(kind))}")
        if self.k is not None and type(self.k) is not int:
            problems.append(f"k is {self.k!r}; it must be a whole number.")
        if (self.activation == "topk") != (self.k is not None):
            problems.append(
                f"k is {self.k}; it belongs to the activation topk, but the activation is {self.activation}."
            )
        if problems:
            raise UserError(*problems)

    def normalize(self, x: Tensor) -> tuple[Tensor, Tensor | float, Tensor | float]:
        """[..., D] -> normed [..., D], and the mean and scale that undo it ([..., 1] or numbers); all fp32."""
        if self.normalization == "standardize":
            return standardize(x, self.eps)
        x, mean, scale = x.float(), 0.0, 1.0
        if self.normalization in ("center", "center_rescale"):
            mean = x.mean(-1, keepdim=True)
            x = x - mean
        if self.normalization in ("rescale", "center_rescale"):
            scale = x.norm(dim=-1, keepdim=True) / x.shape[-1] ** 0.5
            x = x / scale
        return x, mean, scale


def check_dtypes(weights: Mapping[str, Tensor], source: str) -> None:
    """Raises UserError for weights that are quantised, or not real numbers."""
    if wrong := [f"{name} is {weight.dtype}" for name, weight in weights.items() if weight.dtype not in DTYPES]:
        valid = " ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise UserError(f"{source}: {', '.join(wrong)}: get it unquantised. Valid: {valid}.")


class SAE(nn.Module):
    """Sparse autoencoder. Its parameters start at zero.

    The parameters are `pre_bias` [D], `encoder` [C, D], `latent_bias` [C] and `decoder` [C, D], fp32. The decoder has a
    row for each latent (the transpose of OpenAI's `decoder.weight`), because callers gather whole directions.

    `info` is what its file records about its origin; sae/file.py lists the keys. With `tf32` a GPU multiplies by the
    encoder in TF32: both factors are rounded to 10 bits of mantissa, and sums are fp32. A CPU ignores it. Raises
    UserError if `form.k` does not fit `num_latents`.
    """

    def __init__(self, width: int, num_latents: int, form: SAEForm):
        super().__init__()
        if form.k is not None and not 1 <= form.k <= num_latents:
            raise UserError(f"k is {form.k}; it must be from 1 to the number of latents, {num_latents}.")
        self.form = form
        self.info: dict[str, Any] = {}
        self.sha256 = ""
        self.tf32 = False
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

        A latent with value 0 is among the K largest but not positive: it is not active.
        """
        return self.encode_normalized(self.form.normalize(x)[0])

    def encode_normalized(
        self, normed: Tensor, edit: Callable[[Tensor], Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """`encode` for rows [..., D] that are already normalised. `edit` changes their pre-activations [rows, C] before
        the largest are chosen."""
        chunk_rows = max(1, MAX_PRE_ACTIVATIONS // self.num_latents)
        values, indices = [], []
        for normed_ND in normed.reshape(-1, self.width).split(chunk_rows):
            pre_NC = self._pre_activations(normed_ND - self.pre_bias)
            pre_NC = edit(pre_NC) if edit else pre_NC
            # With relu, every row of a chunk keeps as many latents as the row with the most; the surplus is zeros.
            k = self.form.k or max(1, int((pre_NC > 0).sum(-1).max()))
            value_NK, index_NK = pre_NC.topk(k, dim=-1)
            values.append(value_NK.relu())
            indices.append(index_NK)
        k = max(value.shape[-1] for value in values)
        value_NK = torch.cat([F.pad(value, (0, k - value.shape[-1])) for value in values])
        index_NK = torch.cat([F.pad(index, (0, k - index.shape[-1])) for index in indices])
        return index_NK.reshape(*normed.shape[:-1], k), value_NK.reshape(*normed.shape[:-1], k)

    def _pre_activations(self, centred_ND: Tensor) -> Tensor:
        if not (self.tf32 and centred_ND.is_cuda):
            return F.linear(centred_ND, self.encoder, self.latent_bias)
        with _tf32():
            return F.linear(centred_ND, self.encoder, self.latent_bias)

    def decode(self, index: Tensor, value: Tensor) -> Tensor:
        """`index` int64 and `value` [..., any K] -> reconstruction [..., D] in the normalised space."""
        num_kept = index.shape[-1]
        weights_NK = value.reshape(-1, num_kept)
        sum_ND = F.embedding_bag(index.reshape(-1, num_kept), self.decoder, per_sample_weights=weights_NK, mode="sum")
        return sum_ND.reshape(*index.shape[:-1], self.width) + self.pre_bias

    def reconstruct(self, x: Tensor) -> Tensor:
        """Residual [..., D] -> its reconstruction from the K latents, of the same shape, dtype and scale."""
        normed, mean, scale = self.form.normalize(x)
        x_hat = self.decode(*self.encode_normalized(normed)) * scale + mean
        return x_hat.to(x.dtype)

    @classmethod
    def from_weights(cls, weights: dict[str, Tensor], form: SAEForm, source: str) -> "SAE":
        """Build from the four tensors, as fp32. Tensors that are fp32 already are used as they are, never copied.
        Raises UserError for tensors that are missing, are others, disagree in shape, or hold values that are not finite
        numbers."""
        names = ("pre_bias", "encoder", "latent_bias", "decoder")
        if missing := [name for name in names if name not in weights]:
            raise UserError(f"{source}: tensors missing: {' '.join(missing)}.")
        if unread := sorted(set(weights) - set(names)):
            raise UserError(f"{source} holds tensors that are not read: {' '.join(unread)}.")
        check_dtypes(weights, source)
        shapes = {name: tuple(weights[name].shape) for name in names}
        if len(shapes["encoder"]) == 2:
            num_latents, width = shapes["encoder"]
            expected = ((width,), (num_latents, width), (num_latents,), (num_latents, width))
        if len(shapes["encoder"]) != 2 or tuple(shapes.values()) != expected:
            listing = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
            raise UserError(f"{source}: the shapes of its tensors disagree: {listing}.")
        if 0 in shapes["encoder"]:
            raise UserError(f"{source}: its tensors are empty.")
        bad = {name: int((~weights[name].isfinite()).sum()) for name in names}
        if where := ", ".join(f"{count} of {name}" for name, count in bad.items() if count):
            raise UserError(f"{source}: holds values that are not finite ({where}): get the file again.")
        with torch.device("meta"):
            sae = cls(width, num_latents, form)
        sae.load_state_dict({name: weights[name].float().contiguous() for name in names}, assign=True)
        return sae


@contextmanager
def _tf32() -> Iterator[None]:
    """A GPU multiplies fp32 matrices in TF32. Of torch's two settings this is the one that its kernels read; while they
    differ, reading the older one is an error."""
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "tf32"
    try:
        yield
    finally:
        matmul.fp32_precision = before
