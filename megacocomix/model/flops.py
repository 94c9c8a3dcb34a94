"""Floating-point operations a token costs, from the shapes alone. A multiply-add is two.

Counted: linear layers, attention scores and mixing over the full S × S square (the convention of the scaling
literature; kernels that skip the masked half do less), the two heads, the K compressed rows. Not counted: LayerNorm,
softmax, embedding look-ups, recomputation. A backward pass costs twice its forward pass.
"""

from megacocomix.config import Config, ModelConfig


def linear_flops(model: ModelConfig) -> float:
    """Forward FLOPs of one block's linear layers for one position."""
    return 2 * 12 * model.hidden_size**2


def attention_flops(width: int, positions: int) -> float:
    """Forward FLOPs of one block's attention for one position among `positions`."""
    return 4 * positions * width


def block_flops(config: Config, index: int) -> float:
    """Forward FLOPs a token of one block; from insertion_layer on a block runs on 2T positions."""
    model = config.model
    per_token = 2 if config.concepts and index >= config.method.insertion_layer else 1
    return per_token * (linear_flops(model) + attention_flops(model.hidden_size, per_token * model.context))


def concept_flops(config: Config) -> float:
    """Forward FLOPs a token of the concept module."""
    return 2 * config.model.hidden_size * (config.method.num_concepts + config.method.num_kept)


def head_flops(config: Config) -> float:
    """Forward FLOPs a token of the next-token head."""
    return 2 * config.model.hidden_size * config.model.vocab_size


def student_flops(config: Config) -> float:
    """Training FLOPs (forward and backward) a token of the student."""
    blocks = sum(block_flops(config, index) for index in range(config.model.num_layers))
    return 3 * (blocks + head_flops(config) + (concept_flops(config) if config.concepts else 0))


def activated_parameters(config: Config) -> int:
    """Parameters a token touches, as the paper counts them: of the compress layer only num_kept rows (appendix A)."""
    model, method = config.model, config.method
    width = model.hidden_size
    base = model.num_layers * (12 * width**2 + 13 * width) + (model.vocab_size + model.context + 2) * width
    return base + ((method.num_concepts + method.num_kept) * width if config.concepts else 0)
