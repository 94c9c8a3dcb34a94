"""Floating-point operations a token costs, from the shapes alone. A multiply-add is two.

Counted: linear layers, attention scores and mixing over all positions that a kernel without knowledge of the mask would
visit (the convention of the scaling literature; kernels that skip the masked half do less), the heads, the K compressed
rows. Not counted: LayerNorm, softmax, embedding look-ups, recomputation, and what the last block never computes for
positions that predict nothing. A backward pass costs twice its forward pass.
"""

from megacocomix.config.schema import Config, ModelConfig


def linear_flops(model: ModelConfig) -> float:
    """Forward FLOPs of one block's linear layers for one position."""
    return 2 * 12 * model.hidden_size**2


def attention_flops(width: int, positions: int) -> float:
    """Forward FLOPs of one block's attention for one position among `positions`."""
    return 4 * positions * width


def block_flops(config: Config, index: int) -> float:
    """Forward FLOPs a token of one block. From insertion_layer on it runs on the slots too; in the last block only as
    many positions as there are tokens need more than keys and values."""
    model, method = config.model, config.method
    slots = method.num_slots(model.context) if index >= method.insertion_layer else 0
    positions = model.context + slots
    all_of_it = linear_flops(model) + attention_flops(model.hidden_size, positions)
    if index < model.num_layers - 1:
        return all_of_it * positions / model.context
    return all_of_it + 2 * 2 * model.hidden_size**2 * slots / model.context


def module_flops(config: Config) -> float:
    """Forward FLOPs a token of the concept module."""
    model, method = config.model, config.method
    width, mixes = model.hidden_size, method.mix == "predicted"
    share = method.num_slots(model.context) / model.context if method.interleaves else 1.0
    if method.predict == "concepts":
        return share * 2 * width * (method.num_concepts + mixes * method.num_kept)
    if method.predict == "hidden":
        return share * 2 * width * (4 * width + 4 * method.target_size + mixes * method.target_size)
    return 0.0


def head_flops(config: Config) -> float:
    """Forward FLOPs a token of the next-token head."""
    return 2 * config.model.hidden_size * config.model.vocab_size


def student_flops(config: Config) -> float:
    """Training FLOPs (forward and backward) a token of the student."""
    blocks = sum(block_flops(config, index) for index in range(config.model.num_layers))
    return 3 * (blocks + head_flops(config) + module_flops(config))


def activated_parameters(config: Config) -> int:
    """Parameters a token touches, as the paper counts them: of the compress layer only num_kept rows (appendix A)."""
    model, method = config.model, config.method
    width, mixes = model.hidden_size, method.mix == "predicted"
    base = model.num_layers * (12 * width**2 + 13 * width) + (model.vocab_size + model.context + 2) * width
    if method.predict == "concepts":
        return base + (method.num_concepts + mixes * method.num_kept) * width
    if method.predict == "hidden":
        return base + (4 * width + 4 * method.target_size + mixes * method.target_size) * width
    return base + (method.mix == "pause") * width
