"""The collectives of torch.distributed on the simulated GPU of streams.py: what they compute without other ranks."""

import torch
import torch.distributed as dist


def patch_collectives(gpu):
    """Of all ranks' tensors, those of the other ranks are taken to be equal to this rank's."""
    plainly = torch._C._DisableTorchDispatch

    def in_place(name):
        def call(tensor, *args, group=None, async_op=False, **kwargs):
            return gpu.collective(name, group, [], [tensor], async_op)

        return call

    def all_gather_into_tensor(output_tensor, input_tensor, group=None, async_op=False):
        with plainly():
            output_tensor.view(-1, input_tensor.numel()).copy_(input_tensor.reshape(1, -1).clone())
        return gpu.collective("all_gather", group, [input_tensor], [output_tensor], async_op)

    def reduce_scatter_tensor(output, input, op=None, group=None, async_op=False):
        with plainly():
            output.view(-1).copy_(input.reshape(-1, output.numel())[dist.get_rank(group)].clone())
        return gpu.collective("reduce_scatter", group, [input], [output], async_op)

    def all_gather(tensor_list, tensor, group=None, async_op=False):
        with plainly():
            for each in tensor_list:
                each.copy_(tensor.clone())
        return gpu.collective("all_gather", group, [tensor], list(tensor_list), async_op)

    def batch_isend_irecv(messages):
        sent = [message.tensor for message in messages if message.op is dist.isend]
        received = [message.tensor for message in messages if message.op is not dist.isend]
        with plainly():
            for tensor in received:
                tensor.fill_(0.01)
        return [gpu.collective("send and receive", messages[0].group, sent, received, True, keeps=False)]

    def all_gather_object(objects, own, group=None):
        objects[:] = [own] * len(objects)

    made = {
        "all_reduce": in_place("all_reduce"),
        "broadcast": in_place("broadcast"),
        "reduce": in_place("reduce"),
        "all_gather_into_tensor": all_gather_into_tensor,
        "all_gather_single": all_gather_into_tensor,  # torch 2.13's name of it
        "reduce_scatter_tensor": reduce_scatter_tensor,
        "reduce_scatter_single": reduce_scatter_tensor,
        "all_gather": all_gather,
        "batch_isend_irecv": batch_isend_irecv,
        "all_gather_object": all_gather_object,
        "broadcast_object_list": lambda *args, **kwargs: None,
        "barrier": lambda *args, **kwargs: None,
    }
    for name, function in made.items():
        for module in (dist, dist.distributed_c10d):
            if hasattr(module, name):
                setattr(module, name, function)
