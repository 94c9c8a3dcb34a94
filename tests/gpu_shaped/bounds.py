"""Numbers that the tests of this folder hold the code to, measured once and recorded. A change that lowers one should
lower it here; a change that raises one should say why."""

# Waits of the host for the device in a step of our own code: for the gradient norm; offload also waits until the
# gradients are on the host.
OUR_READS = {"megacocomix/parallel/zero.py:_finish_gradients": 1}
OUR_READS_OFFLOADED = {"megacocomix/parallel/zero.py:_finish_gradients": 2}
# Copies of host tensors to the device for which the host waits, of our code and DeepSpeed's.
UPLOADS_OF_A_STEP = 3

# Whether DeepSpeed's throughput timer waits for the device at each forward pass and each step.
HAS_THROUGHPUT_TIMER = True


def deepspeed_reads(zero: int, offload: bool, is_bf16: bool, passes: int, num_tensors: int) -> int:
    """Reads of DeepSpeed's code in a step, at most. `passes` are the forward passes of a rank in a step."""
    reads = HAS_THROUGHPUT_TIMER * (passes + 1)
    if zero == 3:
        return reads + passes + 1  # after each backward pass, and for the weights that stay whole
    if zero == 1 and is_bf16 and not offload:
        return reads + 1  # its own norm
    # Stage 2 waits after each backward pass; offload looks for infinite values in each gradient.
    return reads + (zero == 2) * passes + offload * (num_tensors + 1)


# Collectives of host tensors with an offloaded optimizer, whose gradients and states are on the host: of a step, and of
# a checkpoint.
HOST_COLLECTIVES = {
    "start": set(),
    "step": {("all_reduce", "tensor", "float32"), ("all_reduce", "tied", "float32")},
    "save": {("all_reduce", "data", "float32"), ("all_gather", "tensor", "float32")},
}

# Waits of the host in decoding a token of two texts, most of them for what is shown of the kept concepts.
READS_OF_A_TOKEN = {"steered": 11, "unsteered": 6, "without concepts": 3}
UPLOADS_OF_A_TOKEN = 1  # of noise, or of the steered positions

# A micro-batch of a recipe on one rank, with 3 % of slack: MiB of the weights in bf16, MiB above them that wait for the
# backward pass, MiB above them at most, and kernels started.
MICRO_BATCH = {
    "69m": {"weights": 168, "kept for backward": 6030, "peak": 7800, "launches": 1304},
    "386m": {"weights": 829, "kept for backward": 12620, "peak": 13580, "launches": 1353},
    "1.38b": {"weights": 2845, "kept for backward": 23880, "peak": 24840, "launches": 1353},
}
# The same of labelling 8,192 tokens by GPT-2 124M with 32,768 latents.
LABELLING = {"weights": 443, "peak": 568, "launches": 1225}
