"""A frozen causal language model, cut at the autoencoder: below the cut no graph is built, above it only the hidden
state is differentiated, never a weight.

The cut is a hook that takes one module's output out of the forward pass and hands a leaf back, so the model itself is
untouched, whoever wrote it. The cut can be at any residual location of block L (h is what the autoencoder reads, x the
residual stream):

resid_post_mlp: h is the block's output · resid_post_attn: h is x after the attention was added
resid_delta_mlp: h is the MLP's contribution · resid_delta_attn: h is the attention's contribution

h after the attention is x + contribution, and x does not depend on the leaf: the gradient with respect to the
contribution is the one with respect to h.
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megacocomix.config.schema import Location
from megacocomix.errors import UserError
from megacocomix.model.losses import frozen_head_loss, next_token_targets

ATTENTIONS = ("attention", "attn", "self_attn", "self_attention")
MLPS = ("mlp", "feed_forward")


@dataclass(frozen=True)
class TeacherModel:
    """What a teacher needs of a language model. B batch, T tokens, D width, V vocabulary."""

    body: Callable[[Tensor], Tensor]
    """int64 [B, T] → the hidden state that the head reads, [B, T, D]."""
    head: nn.Linear
    """[…, D] → logits […, V]."""
    blocks: list[nn.Module]
    """The blocks in order; each returns the residual stream, alone or first in a tuple."""
    context: int
    """Most tokens it can read."""
    sha256: str = ""
    """Of its weights files."""


class _Stop(Exception):
    """Everything that was asked for is known: leave the forward pass."""


class Teacher:
    """A `TeacherModel` with a cut at `location` of block `layer`. Raises UserError for a layer that it does not have,
    or a location that cannot be told apart in blocks of its kind."""

    def __init__(self, model: TeacherModel, layer: int, location: Location = "resid_post_mlp"):
        if not 0 <= layer < len(model.blocks):
            raise UserError(
                f"the teacher has {len(model.blocks)} blocks; layer {layer} is not one of 0 … {len(model.blocks) - 1}."
            )
        self.model, self.layer, self.location = model, layer, location
        self.vocab_size, self.width = model.head.weight.shape
        self.context, self.sha256 = model.context, model.sha256
        self._block = model.blocks[layer]
        names = MLPS if location == "resid_delta_mlp" else ATTENTIONS
        self._site = self._block if location == "resid_post_mlp" else _part(self._block, location, names)
        self._check_location()

    @property
    def num_blocks(self) -> int:
        """Blocks of the whole model."""
        return len(self.model.blocks)

    @property
    def num_block_weights(self) -> int:
        """Weights of a block's matrices, for counting what a token costs."""
        return sum(parameter.numel() for parameter in self._block.parameters() if parameter.dim() > 1)

    @property
    def dtype(self) -> torch.dtype:
        """What the model computes in."""
        return self.model.head.weight.dtype

    @torch.no_grad()
    def hidden(self, tokens_BT: Tensor) -> Tensor:
        """[B, T] → what the autoencoder reads, [B, T, D]; nothing above the cut is run."""
        found = []

        def take(hidden: Tensor) -> Tensor:
            found.append(hidden)
            raise _Stop

        with suppress(_Stop):
            self._run(tokens_BT, take)
        return found[0]

    def hidden_and_gradient(self, tokens_BT: Tensor) -> tuple[Tensor, Tensor]:
        """h and the gradient of each window's mean next-token loss with respect to it, both [B, T, D].

        The loss is that of the whole window, not of the next token alone (reference concept_extractor.py:55-117, which
        also divides by B); no other gradient is computed, and none is kept on a parameter.
        """
        leaves = []

        def cut(hidden: Tensor) -> Tensor:
            leaves.append(hidden.detach().requires_grad_())
            return leaves[0]

        with torch.enable_grad():
            loss = self._loss(self._run(tokens_BT, cut), tokens_BT)
        (gradient,) = torch.autograd.grad(loss, leaves)
        return leaves[0].detach(), gradient

    @torch.no_grad()
    def loss(self, tokens_BT: Tensor, replace: Tensor | None = None) -> Tensor:
        """Mean next-token loss, a scalar; with h replaced where `replace` [B, T, D] is given."""
        hidden = self._run(tokens_BT, lambda hidden: hidden if replace is None else replace.to(hidden.dtype))
        return self._loss(hidden, tokens_BT) / len(tokens_BT)

    @torch.no_grad()
    def outputs(self, tokens_BT: Tensor) -> Tensor:
        """[B, T] → the hidden state that the head reads, [B, T, D]."""
        return self.model.body(tokens_BT)

    @torch.no_grad()
    def logits(self, tokens_BT: Tensor) -> Tensor:
        """[B, T] → [B, T, V]."""
        return self.model.head(self.model.body(tokens_BT))

    @torch.no_grad()
    def next_logits(self, tokens_BT: Tensor, edit: Callable[[Tensor], Tensor]) -> Tensor:
        """[B, T] → logits of the token after each window, [B, V], with h [B, T, D] replaced by `edit(h)`."""
        return self.model.head(self._run(tokens_BT, edit)[:, -1])

    def _run(self, tokens_BT: Tensor, edit: Callable[[Tensor], Tensor]) -> Tensor:
        """The body's output, with h replaced by `edit(h)` on the way."""
        stream = []

        def at_block(_, arguments, keywords):
            stream.append(arguments[0] if arguments else keywords["hidden_states"])

        def at_site(_, arguments, output):
            value = _first(output)
            if self.location == "resid_post_attn":
                before = stream[0].detach()
                value = edit(before + value) - before
            else:
                value = edit(value)
            return (value, *output[1:]) if isinstance(output, tuple) else value

        handles = [
            self._block.register_forward_pre_hook(at_block, with_kwargs=True),
            self._site.register_forward_hook(at_site),
        ]
        try:
            return self.model.body(tokens_BT)
        finally:
            for handle in handles:
                handle.remove()

    def _loss(self, hidden_BTD: Tensor, tokens_BT: Tensor) -> Tensor:
        """Sum over the windows of their mean next-token losses."""
        head, targets_BT = self.model.head, next_token_targets(tokens_BT).squeeze(-1)
        total = frozen_head_loss(hidden_BTD.flatten(0, 1), head.weight, head.bias, targets_BT.flatten())
        return total / max(1, tokens_BT.shape[1] - 1)

    @torch.no_grad()
    def _check_location(self) -> None:
        """A contribution is only one if block input + contributions = block output; some models scale or normalise
        theirs, and some compute both from the same input, so that no stream after the attention exists."""
        if self.location == "resid_post_mlp":
            return
        names = {
            "attention": _part(self._block, self.location, ATTENTIONS),
            "mlp": _part(self._block, self.location, MLPS),
        }
        seen = {}
        keep = lambda name: lambda _, __, output: seen.__setitem__(name, _first(output).float())
        handles = [module.register_forward_hook(keep(name)) for name, module in names.items()]
        handles.append(self._block.register_forward_hook(keep("out")))
        handles.append(
            self._block.register_forward_pre_hook(
                lambda _, arguments, keywords: seen.__setitem__(
                    "in", (arguments[0] if arguments else keywords["hidden_states"]).float()
                ),
                with_kwargs=True,
            )
        )
        probe = torch.arange(min(4, self.context), device=self.model.head.weight.device)[None] % self.vocab_size
        try:
            self.model.body(probe)
            mlp = seen["mlp"]
            error = seen["in"] + seen["attention"] + mlp - seen["out"]
            # Token by token, and against what was added: some tokens have a residual hundreds of times the others'.
            rounding = 8 * torch.finfo(self.dtype).eps * seen["out"].norm(dim=-1)
            if (error.norm(dim=-1) > 1e-2 * (seen["attention"] + mlp).norm(dim=-1) + rounding).any():
                raise UserError(
                    f"location {self.location} is not to be had of a {type(self._block).__name__}: its output is not "
                    "its input + attention + MLP. Use location resid_post_mlp."
                )
            handles.append(names["attention"].register_forward_hook(_doubled))
            self.model.body(probe)
            if self.location == "resid_post_attn" and torch.equal(seen["mlp"], mlp):
                raise UserError(
                    f"location resid_post_attn is not to be had of a {type(self._block).__name__}: its MLP reads "
                    "the same input as its attention. Use location resid_delta_attn or resid_post_mlp."
                )
        finally:
            for handle in handles:
                handle.remove()


def _first(output: Tensor | tuple) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _doubled(_module, _arguments, output):
    return (2 * output[0], *output[1:]) if isinstance(output, tuple) else 2 * output


def _part(block: nn.Module, location: Location, names: tuple[str, ...]) -> nn.Module:
    """The module of one of these names, whose output is the block's attention or MLP contribution."""
    for name in names:
        if isinstance(part := getattr(block, name, None), nn.Module):
            return part
    raise UserError(
        f"location {location} cannot be told apart in a {type(block).__name__}, which has no module named "
        f"{' or '.join(names)}. Use location resid_post_mlp."
    )
