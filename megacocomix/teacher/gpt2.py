"""A frozen GPT-2 cut in two at the autoencoder: a lower part that never builds a graph, an upper part differentiated
only with respect to its input.

The cut can be at any residual location of block L (h is what the autoencoder reads, x the residual stream):
resid_post_mlp: h is the block's output · resid_post_attn: h is x after the attention was added
resid_delta_mlp: h is the MLP's contribution · resid_delta_attn: h is the attention's contribution.
"""

from pathlib import Path

import torch
from torch import Tensor

from megacocomix.config import Location
from megacocomix.errors import UserError
from megacocomix.model.gpt2 import GPT2
from megacocomix.model.load import load_model
from megacocomix.model.losses import label_cross_entropy, next_token_targets


class Teacher:
    """B batch, T tokens, D the teacher's width, V its vocabulary."""

    def __init__(self, model: GPT2, layer: int, location: Location = "resid_post_mlp", sha256: str = ""):
        self.model = model.eval().requires_grad_(False)
        self.layer, self.location, self.sha256 = layer, location, sha256
        self.vocab_size, self.width = model.embed.tokens.weight.shape
        self.context = model.embed.positions.weight.shape[0]
        self.blocks = list(model.blocks.values())

    @torch.no_grad()
    def hidden(self, tokens_BT: Tensor) -> Tensor:
        """[B, T] → what the autoencoder reads, [B, T, D], without a graph."""
        return self._lower(tokens_BT)[0]

    def hidden_and_gradient(self, tokens_BT: Tensor) -> tuple[Tensor, Tensor]:
        """h and the gradient of the mean next-token loss over the window with respect to it, both [B, T, D].

        The loss is that of the whole window, not of the next token alone (reference concept_extractor.py:55-117); no
        other gradient is computed, and none is kept on a parameter.
        """
        with torch.no_grad():
            hidden, skipped = self._lower(tokens_BT)
        hidden.requires_grad_()
        with torch.enable_grad():
            loss = self._loss(self._upper(hidden, skipped), tokens_BT)
        (gradient,) = torch.autograd.grad(loss, hidden)
        return hidden.detach(), gradient

    @torch.no_grad()
    def loss(self, tokens_BT: Tensor, replace: Tensor | None = None) -> Tensor:
        """Mean next-token loss, a scalar; with h replaced where `replace` [B, T, D] is given."""
        hidden, skipped = self._lower(tokens_BT)
        return self._loss(self._upper(hidden if replace is None else replace, skipped), tokens_BT)

    @torch.no_grad()
    def logits(self, tokens_BT: Tensor) -> Tensor:
        """[B, T] → [B, T, V]."""
        return self.model(tokens_BT)[0]

    def _lower(self, tokens_BT: Tensor) -> tuple[Tensor, Tensor | None]:
        """(h, the residual stream that h is added to, where h is a contribution)."""
        x = self.model.embed(tokens_BT)
        for block in self.blocks[: self.layer]:
            x = block(x)
        block = self.blocks[self.layer]
        attention = block.attention(block.norm_1(x))
        if self.location == "resid_delta_attn":
            return attention, x
        x = x + attention
        if self.location == "resid_post_attn":
            return x, None
        contribution = block.mlp(block.norm_2(x))
        if self.location == "resid_delta_mlp":
            return contribution, x
        return x + contribution, None

    def _upper(self, hidden: Tensor, skipped: Tensor | None) -> Tensor:
        x = hidden if skipped is None else skipped + hidden
        if self.location in ("resid_delta_attn", "resid_post_attn"):
            block = self.blocks[self.layer]
            x = x + block.mlp(block.norm_2(x))
        for block in self.blocks[self.layer + 1 :]:
            x = block(x)
        return self.model.head(self.model.norm(x))

    @staticmethod
    def _loss(logits_BTV: Tensor, tokens_BT: Tensor) -> Tensor:
        num_targets = tokens_BT.shape[0] * (tokens_BT.shape[1] - 1)
        return label_cross_entropy(logits_BTV, next_token_targets(tokens_BT)) / num_targets


def load_teacher(path: str | Path, layer: int, location: Location = "resid_post_mlp", device: str = "cpu") -> Teacher:
    """A teacher from a Hugging Face GPT-2 folder or a run of ours. Raises UserError for a layer that it does not have,
    or a student with concepts, whose residual stream changes length half-way."""
    loaded = load_model(path)
    if loaded.model.concept is not None:
        raise UserError(f"teacher {path} has a concept module; only next-token models can be teachers.")
    if not 0 <= layer < loaded.shape.num_layers:
        raise UserError(
            f"teacher {path} has {loaded.shape.num_layers} blocks; layer {layer} is not one of "
            f"0 … {loaded.shape.num_layers - 1}."
        )
    return Teacher(loaded.model.to(device), layer, location, loaded.sha256)
