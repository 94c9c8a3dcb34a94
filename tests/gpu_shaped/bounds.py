"""Numbers that the tests of this folder hold the code to, measured once and recorded. A change that lowers one should
lower it here; a change that raises one should say why."""

# Waits of the host for the device in a step of our own code: for the gradient norm; offload also waits until the
# gradients are on the host.
OUR_READS = {"megacocomix/parallel/zero.py:_finish_gradients": 1}
OUR_READS_OFFLOADED = {"megacocomix/parallel/zero.py:_finish_gradients": 2}


def deepspeed_reads(zero: int, offload: bool, is_bf16: bool, passes: int, num_parameters: int) -> int:
    """The same, of DeepSpeed's code. `passes` are the forward passes of a rank in a step."""
    timer = passes + 1
    if zero == 1 and is_bf16 and not offload:
        return timer + 1
    if zero == 3:
        return timer + passes + 1
    return timer + (zero == 2) * passes + offload * (num_parameters + 2)


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
