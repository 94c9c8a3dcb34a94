"""Floating-point operations per token, from the shapes alone. A multiply-add counts as two.

Counted: linear layers; attention scores and mixing over all positions, masked or not (the convention of the scaling
literature; kernels that skip the masked half do less); the heads; the K compressed rows. Not counted: LayerNorm,
softmax, embedding look-ups, recomputation, and operations that the last block skips at positions that predict nothing.
A backward pass costs twice its forward pass.
"""

from megacocomix.config.schema import Config


def attention_flops(width: int, positions: int) -> float:
    """Forward FLOPs of one block's attention for one position among `positions`."""
    return 4 * positions * width


def block_flops(config: Config, index: int) -> float:
    """Forward FLOPs of one block per token. From insertion_layer on, a block also runs on the slots. The last block
    computes only keys and values for as many positions as there are slots."""
    model, method = config.model, config.method
    slots = method.num_slots(model.context) if index >= method.insertion_layer else 0
    positions = model.context + slots
    per_position = 2 * 12 * model.hidden_size**2 + attention_flops(model.hidden_size, positions)
    if index < model.num_layers - 1:
        return per_position * positions / model.context
    return per_position + 2 * 2 * model.hidden_size**2 * slots / model.context


def module_flops(config: Config) -> float:
    """Forward FLOPs of the concept module per token."""
    model, method = config.model, config.method
    share = method.num_slots(model.context) / model.context if method.interleaves else 1.0
    return share * 2 * model.hidden_size * _module_rows(config)


def _module_rows(config: Config) -> int:
    """Rows of hidden_size weights that the concept module multiplies at one position, without biases."""
    method, mixes = config.method, config.method.mix == "predicted"
    if method.predict == "concepts":
        return method.num_concepts + mixes * method.num_kept
    if method.predict == "hidden":
        return 4 * config.model.hidden_size + (4 + mixes) * method.target_size
    return 0


def head_flops(config: Config) -> float:
    """Forward FLOPs of the next-token head per token."""
    return 2 * config.model.hidden_size * config.model.vocab_size


def student_flops(config: Config) -> float:
    """Training FLOPs (forward and backward) of the student per token."""
    blocks = sum(block_flops(config, index) for index in range(config.model.num_layers))
    return 3 * (blocks + head_flops(config) + module_flops(config))
