"""A frozen causal language model with a hook point, where the autoencoder reads its hidden state h.

No graph is built below the hook point, and above it only h is differentiated, never a weight. The hook takes one
module's output out of the forward pass and returns a leaf tensor in its place, so the model's own code stays unchanged.
The hook point is a residual location of block L (x is the residual stream):

resid_post_mlp: h is the block's output · resid_post_attn: h is x after the attention was added
resid_delta_mlp: h is the MLP's contribution · resid_delta_attn: h is the attention's contribution

At resid_post_attn h is x + contribution, and x does not depend on the leaf. So the gradient with respect to the
contribution equals the gradient with respect to h.
"""

from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from megacocomix.config.schema import Location
from megacocomix.errors import UserError
from megacocomix.model.gpt2 import GPT2
from megacocomix.model.heads import FrozenHead, frozen_head_loss
from megacocomix.model.losses import next_token_targets

ATTENTIONS = ("attention", "attn", "self_attn", "self_attention")
MLPS = ("mlp", "feed_forward")


@dataclass(frozen=True)
class TeacherModel:
    """The parts of a language model that a teacher needs. B batch, T tokens, D width, V vocabulary."""

    body: Callable[[Tensor], Tensor]
    """int64 [B, T] → the hidden state that the head reads, [B, T, D]."""
    head: nn.Linear
    """[…, D] → logits […, V]."""
    blocks: list[nn.Module]
    """The blocks in order; each returns the residual stream, alone or first in a tuple."""
    context: int
    """The largest number of tokens it can read."""
    sha256: str = ""
    """Hash of its weights files."""

    @cached_property
    def padded_head(self) -> FrozenHead:
        """`head`, with its padding. The weight of `head` becomes a view of the padded one. So there is no second copy
        of a weight that the embedding shares with it."""
        bias = self.head.bias
        padded = FrozenHead(self.head.weight.detach(), None if bias is None else bias.detach())
        self.head.weight.data = padded.weight[: padded.num_tokens]
        return padded


def gpt2_teacher(model: GPT2, sha256: str = "") -> TeacherModel:
    """A model of our class as a teacher. Freezes the model."""
    model.eval().requires_grad_(False)

    def body(tokens_BT: Tensor) -> Tensor:
        x_BTD = model.embed(tokens_BT)
        for block in model.blocks.values():
            x_BTD = block(x_BTD)
        return model.norm(x_BTD)

    return TeacherModel(body, model.head, list(model.blocks.values()), len(model.embed.positions.weight), sha256)


class _Stop(Exception):
    """Leaves the forward pass early, once h is known."""


class Teacher:
    """A `TeacherModel` with a hook point at `location` of block `layer`. Raises UserError if the model does not have
    this layer, or its blocks do not have this location."""

    def __init__(self, model: TeacherModel, layer: int, location: Location = "resid_post_mlp"):
        if not 0 <= layer < len(model.blocks):
            raise UserError(
                f"the teacher has {len(model.blocks)} blocks; layer {layer} is not one of 0 … {len(model.blocks) - 1}."
            )
        self.model, self.layer, self.location = model, layer, location
        self.head = model.padded_head
        self.vocab_size, self.width = model.head.weight.shape
        self.context, self.sha256 = model.context, model.sha256
        self._block = model.blocks[layer]
        names = MLPS if location == "resid_delta_mlp" else ATTENTIONS
        self._hooked = self._block if location == "resid_post_mlp" else _part(self._block, location, names)
        self._check_location()

    @property
    def num_blocks(self) -> int:
        """Blocks of the whole model."""
        return len(self.model.blocks)

    @property
    def num_block_weights(self) -> int:
        """Number of weights in a block's matrices, for counting FLOPs."""
        return sum(parameter.numel() for parameter in self._block.parameters() if parameter.dim() > 1)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which the model computes."""
        return self.model.head.weight.dtype

    @torch.no_grad()
    def hidden(self, tokens_BT: Tensor) -> Tensor:
        """[B, T] → h, [B, T, D]. Nothing above the hook point is run."""
        found = []

        def take(hidden: Tensor) -> Tensor:
            found.append(hidden)
            raise _Stop

        with suppress(_Stop):
            self._run(tokens_BT, take)
        return found[0]

    def hidden_and_gradient(self, tokens_BT: Tensor) -> tuple[Tensor, Tensor]:
        """h and the gradient of each window's mean next-token loss with respect to it, both [B, T, D].

        The loss is that of the whole window, not only of the next token (reference concept_extractor.py:55-117, which
        also divides by B). No other gradient is computed, and parameters keep none.
        """
        leaves = []

        def make_leaf(hidden: Tensor) -> Tensor:
            leaves.append(hidden.detach().requires_grad_())
            return leaves[0]

        with torch.enable_grad():
            loss = self._loss(self._run(tokens_BT, make_leaf), tokens_BT)
        (gradient,) = torch.autograd.grad(loss, leaves)
        return leaves[0].detach(), gradient

    @torch.no_grad()
    def loss(self, tokens_BT: Tensor, replace: Tensor | None = None) -> Tensor:
        """Mean next-token loss, a scalar. If `replace` [B, T, D] is given, it takes the place of h."""
        hidden = self._run(tokens_BT, lambda hidden: hidden if replace is None else replace.to(hidden.dtype))
        return self._loss(hidden, tokens_BT) / len(tokens_BT)

    @torch.no_grad()
    def outputs(self, tokens_BT: Tensor) -> Tensor:
        """[B, T] → the hidden state that the head reads, [B, T, D]."""
        return self.model.body(tokens_BT)

    @torch.no_grad()
    def logits(self, tokens_BT: Tensor) -> Tensor:
        """[B, T] → [B, T, V]."""
        return self.head.logits(self.model.body(tokens_BT))

    @torch.no_grad()
    def next_logits(self, tokens_BT: Tensor, edit: Callable[[Tensor], Tensor]) -> Tensor:
        """[B, T] → logits of the token after each window, [B, V], with h [B, T, D] replaced by `edit(h)`."""
        return self.head.logits(self._run(tokens_BT, edit)[:, -1])

    def _run(self, tokens_BT: Tensor, edit: Callable[[Tensor], Tensor]) -> Tensor:
        """The body's output, with h replaced by `edit(h)` in the forward pass."""
        stream = []

        def at_hook_point(_, arguments, output):
            value = _first(output)
            if self.location == "resid_post_attn":
                before = stream[0].detach()
                value = edit(before + value) - before
            else:
                value = edit(value)
            return (value, *output[1:]) if isinstance(output, tuple) else value

        with _on_input(self._block, stream.append), self._hooked.register_forward_hook(at_hook_point):
            return self.model.body(tokens_BT)

    def _loss(self, hidden_BTD: Tensor, tokens_BT: Tensor) -> Tensor:
        """Sum over the windows of their mean next-token losses."""
        targets_BT = next_token_targets(tokens_BT).squeeze(-1)
        total = frozen_head_loss(hidden_BTD.flatten(0, 1), self.head, targets_BT.flatten())
        return total / max(1, tokens_BT.shape[1] - 1)

    @torch.no_grad()
    def _check_location(self) -> None:
        """Raises UserError unless block input + contributions = block output: some models scale or normalise their
        contributions. Some compute both from the same input, so the stream after the attention does not exist."""
        if self.location == "resid_post_mlp":
            return
        attention, mlp = (_part(self._block, self.location, names) for names in (ATTENTIONS, MLPS))
        seen = {}
        record = lambda name: lambda value: seen.update({name: value.float()})
        probe = torch.arange(min(4, self.context), device=self.model.head.weight.device)[None] % self.vocab_size
        with ExitStack() as hooks:
            hooks.enter_context(_on_input(self._block, record("in")))
            for name, module in {"attention": attention, "mlp": mlp, "out": self._block}.items():
                hooks.enter_context(_on_output(module, record(name)))
            self.model.body(probe)
            first_mlp = seen["mlp"]
            error = seen["in"] + seen["attention"] + first_mlp - seen["out"]
            # Token by token, and relative to the contributions: some tokens have a residual hundreds of times larger.
            rounding = 8 * torch.finfo(self.dtype).eps * seen["out"].norm(dim=-1)
            if (error.norm(dim=-1) > 1e-2 * (seen["attention"] + first_mlp).norm(dim=-1) + rounding).any():
                raise UserError(
                    f"location {self.location} does not exist in a {type(self._block).__name__}: its output is not "
                    "its input + attention + MLP. Use location resid_post_mlp."
                )
            hooks.enter_context(attention.register_forward_hook(_doubled))
            self.model.body(probe)
            if self.location == "resid_post_attn" and torch.equal(seen["mlp"], first_mlp):
                raise UserError(
                    f"location resid_post_attn does not exist in a {type(self._block).__name__}: its MLP reads "
                    "the same input as its attention. Use location resid_delta_attn or resid_post_mlp."
                )


def _on_input(block: nn.Module, use: Callable[[Tensor], None]) -> RemovableHandle:
    """Call `use` with the residual stream that enters the block."""
    read = lambda _, arguments, keywords: use(arguments[0] if arguments else keywords["hidden_states"])
    return block.register_forward_pre_hook(read, with_kwargs=True)


def _on_output(module: nn.Module, use: Callable[[Tensor], None]) -> RemovableHandle:
    return module.register_forward_hook(lambda _, __, output: use(_first(output)))


def _first(output: Tensor | tuple) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _doubled(_module, _arguments, output):
    return (2 * output[0], *output[1:]) if isinstance(output, tuple) else 2 * output


def _part(block: nn.Module, location: Location, names: tuple[str, ...]) -> nn.Module:
    """The block's module with one of these names, whose output is the attention's or the MLP's contribution."""
    for name in names:
        if isinstance(part := getattr(block, name, None), nn.Module):
            return part
    raise UserError(
        f"location {location} cannot be found in a {type(block).__name__}, which has no module named "
        f"{' or '.join(names)}. Use location resid_post_mlp."
    )
