"""The processes as a grid of pipeline × data × tensor ranks, and their process groups.

The world's group has a backend for CPU tensors and one for the device's, all others only the latter: gloo connects all
ranks of a group with each other.

Tensor ranks are neighbours, because they communicate most and should share a node. Then come data ranks, then pipeline
ranks: rank = (pipeline_rank × data + data_rank) × tensor + tensor_rank.
"""

import torch
import torch.distributed as dist

from megacocomix.config.rules import grid_problem
from megacocomix.parallel.runtime import TIMEOUT, Runtime


class Grid:
    """This process's place in the grid. DeepSpeed gets its groups from this object too, as its `mpu`."""

    def __init__(self, runtime: Runtime, tensor: int = 1, pipeline: int = 1):
        assert not grid_problem(runtime.world, tensor, pipeline)
        self.runtime, self.device = runtime, runtime.device
        self.tensor, self.pipeline, self.data = tensor, pipeline, runtime.world // (tensor * pipeline)
        self.model = tensor * pipeline
        ranks_PDT = torch.arange(runtime.world).view(pipeline, self.data, tensor)
        self.tensor_rank = runtime.rank % tensor
        self.data_rank = runtime.rank // tensor % self.data
        self.pipeline_rank = runtime.rank // (tensor * self.data)
        self._backend = dict(pair.split(":") for pair in dist.get_backend_config().split(","))[runtime.device.type]
        # The same ranks share one group, with its sockets, buffers and threads.
        made = {tuple(range(runtime.world)): dist.group.WORLD}
        self.tensor_group = self._join(ranks_PDT.reshape(-1, tensor), made)
        self.data_group = self._join(ranks_PDT.transpose(1, 2).reshape(-1, self.data), made)
        # The ranks that together hold one copy of the model. They see the same samples.
        self.model_group = self._join(ranks_PDT.transpose(0, 1).reshape(self.data, -1), made)
        # The first and the last stage hold the tied embedding.
        tied_ranks = ranks_PDT[[0, -1]].permute(1, 2, 0).reshape(-1, 2)
        self.tied_group = self._join(tied_ranks, made) if pipeline > 1 else None
        # Messages between stages have a group of their own: NCCL works off a group's communication in order, and a
        # message waits for its sender.
        own = {} if pipeline > 1 else made
        self.pipeline_group = self._join(ranks_PDT.permute(1, 2, 0).reshape(-1, pipeline), own)

    @property
    def model_rank(self) -> int:
        """Rank in the model group, unique over pipeline and tensor ranks."""
        return self.pipeline_rank * self.tensor + self.tensor_rank

    def pipeline_peer(self, pipeline_rank: int) -> int:
        """The global rank of the process with this data and tensor rank and another pipeline rank."""
        return (pipeline_rank * self.data + self.data_rank) * self.tensor + self.tensor_rank

    def _join(self, groups: torch.Tensor, made: dict[tuple, dist.ProcessGroup]) -> dist.ProcessGroup | None:
        """Make these groups, in the same order on every rank, and add them to `made`, which holds those that exist
        already. Returns the one that contains this rank."""
        mine = None
        for ranks in map(tuple, groups.tolist()):
            if ranks not in made:
                made[ranks] = dist.new_group(list(ranks), TIMEOUT, self._backend)
            if self.runtime.rank in ranks:
                mine = made[ranks]
        return mine

    # The methods that DeepSpeed calls, with the names of Megatron's mpu.

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self.data_group

    def get_data_parallel_world_size(self) -> int:
        return self.data

    def get_data_parallel_rank(self) -> int:
        return self.data_rank

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self.model_group

    def get_model_parallel_world_size(self) -> int:
        return self.model

    def get_model_parallel_rank(self) -> int:
        return self.model_rank

    def get_tensor_model_parallel_group(self) -> dist.ProcessGroup:
        return self.tensor_group

    def get_tensor_model_parallel_world_size(self) -> int:
        return self.tensor

    def get_tensor_model_parallel_rank(self) -> int:
        return self.tensor_rank

    def get_pipeline_model_parallel_group(self) -> dist.ProcessGroup:
        return self.pipeline_group

    def get_pipeline_model_parallel_world_size(self) -> int:
        return self.pipeline

    def get_pipeline_model_parallel_rank(self) -> int:
        return self.pipeline_rank
