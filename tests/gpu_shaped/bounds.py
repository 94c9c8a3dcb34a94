"""Numbers that the tests of this folder hold the code to, measured once and recorded. A change that lowers one should
lower it here; a change that raises one should say why."""

# Waits of the host for the device in a step of our own code: for the gradient norm. With an offloaded optimizer, at
# most: also until the gradients are on the host, and for sums over tensor ranks and of the tied embedding, which come
# back from the device.
OUR_READS = {"megacocomix/parallel/zero.py:_finish_gradients": 1}
OUR_READS_OFFLOADED = {"megacocomix/parallel/zero.py:_finish_gradients": 2, "megacocomix/parallel/zero.py:_sum_all": 2}
# Copies of host tensors to the device for which the host waits, of our code and DeepSpeed's.
UPLOADS_OF_A_STEP = 4

# Whether DeepSpeed's throughput timer waits for the device at each forward pass and each step.
HAS_THROUGHPUT_TIMER = False


def deepspeed_reads(zero: int, offload: bool, is_bf16: bool, passes: int, num_tensors: int) -> int:
    """Reads of DeepSpeed's code in a step, at most. `passes` are the forward passes of a rank in a step."""
    reads = HAS_THROUGHPUT_TIMER * (passes + 1)
    if zero == 3:
        return reads + passes + 1  # after each backward pass, and for the weights that stay whole
    if zero == 1 and is_bf16 and not offload:
        return reads + 1  # its own norm
    return reads + offload * (num_tensors + 1)  # it looks for infinite values in each gradient


# Waits of the host in decoding a token of two texts, most of them for what is shown of the kept concepts.
READS_OF_A_TOKEN = {"steered": 11, "unsteered": 6, "without concepts": 3}
UPLOADS_OF_A_TOKEN = 1  # of noise, or of the steered positions

# A micro-batch of a recipe on one rank, with 3 % of slack: MiB of the weights in bf16, MiB above them that wait for the
# backward pass, MiB above them at most, and kernels started.
MICRO_BATCH = {
    "69m": {"weights": 168, "kept for backward": 6030, "peak": 7800, "launches": 1462},
    "386m": {"weights": 829, "kept for backward": 12620, "peak": 13580, "launches": 1462},
    "1.38b": {"weights": 2845, "kept for backward": 23880, "peak": 24840, "launches": 1511},
}
# The same of labelling 8,192 tokens by GPT-2 124M with 32,768 latents.
LABELLING = {"weights": 443, "peak": 568, "launches": 1258}
