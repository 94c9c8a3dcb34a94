"""The order of samples as a pure function of (seed, epoch, index): nothing to store, nothing to shuffle.

A run that resumes needs one integer, its position, and sees the same samples on any number of ranks. The
function is a small Feistel cipher over the smallest power of two that holds `size`; numbers that fall outside
are enciphered again until they fall inside ("cycle walking"), which keeps it a bijection. Its memory is O(1).
"""

NUM_ROUNDS = 8  # four suffice for halves of many bits; small data sets have halves of few
MASK = 2**64 - 1


def permuted_index(seed: int, epoch: int, index: int, size: int) -> int:
    """Which of `size` items stands at place `index` of this epoch: a bijection of range(size).

    Never change what it returns: a run that resumes relies on it.
    """
    assert 0 <= index < size, f"index {index} outside of range({size})"
    bits = (size - 1).bit_length()
    low_bits = bits // 2
    low_mask, high_mask = (1 << low_bits) - 1, (1 << (bits - low_bits)) - 1
    key = _mix(_mix(seed) + epoch)
    round_keys = [_mix(key + i) for i in range(NUM_ROUNDS)]
    while True:
        high, low = index >> low_bits, index & low_mask
        for even_key, odd_key in zip(round_keys[::2], round_keys[1::2], strict=True):
            high ^= _mix(even_key ^ low) & high_mask
            low ^= _mix(odd_key ^ high) & low_mask
        index = high << low_bits | low
        if index < size:
            return index


def _mix(value: int) -> int:
    """SplitMix64's finaliser: every bit of the input changes about half of the 64 bits of the output."""
    value = (value + 0x9E3779B97F4A7C15) & MASK
    value = ((value ^ value >> 30) * 0xBF58476D1CE4E5B9) & MASK
    value = ((value ^ value >> 27) * 0x94D049BB133111EB) & MASK
    return value ^ value >> 31
