"""The processes of a run: this process's rank and device. Works under plain python and all of launchers.py."""

import os
import random
import socket
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from megacocomix.errors import UserError, print_errors
from megacocomix.launchers import is_bound_to_one_gpu, is_first, set_address, set_ranks

# Of every collective. NCCL's own is shorter than what rank 0 may need to download a teacher or to verify data.
TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True)
class Runtime:
    """This process among the `world` processes of the job."""

    rank: int
    world: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes the shared files."""
        return self.rank == 0


def start_runtime() -> Runtime:
    """Join the job that the launcher's environment describes, or start a job of one process. Raises UserError if that
    environment is contradictory, or the other processes cannot be reached."""
    place = set_ranks()  # in the environment, where DeepSpeed reads them
    set_address(place)
    rank, world, local_rank = place.rank, place.size, place.local_rank or 0
    device = local_device(local_rank)
    has_gpu = device.type == "cuda"
    # Without DS_ACCELERATOR, DeepSpeed would choose an accelerator itself.
    os.environ["DS_ACCELERATOR"] = device.type
    if has_gpu:
        os.environ["LOCAL_RANK"] = str(device.index)
        torch.cuda.set_device(device)
    if "OMPI_COMM_WORLD_LOCAL_RANK" in os.environ:  # DeepSpeed asserts that it is the same
        os.environ["OMPI_COMM_WORLD_LOCAL_RANK"] = os.environ["LOCAL_RANK"]
    # CPU tensors always use gloo: signals and counts must not wait for a GPU stream.
    backend = "cpu:gloo,cuda:nccl" if has_gpu else "gloo"
    if world == 1:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    else:
        try:
            dist.init_process_group(backend, timeout=TIMEOUT)
            if has_gpu:  # NCCL connects at its first use: here, where a failure gets its message
                dist.all_reduce(torch.zeros(1, device="cuda"))
                torch.cuda.synchronize()
        except (dist.DistError, ValueError, RuntimeError) as error:
            if "EADDRINUSE" in str(error):
                port = os.environ["MASTER_PORT"]
                raise UserError(f"MASTER_PORT {port} of this host is in use: export another one.") from None
            problem = UserError(_describe_failure(rank, world, error))
            if rank:  # rank 0's is printed by the command, and this may be the only rank that has one
                print_errors(problem)
            raise problem from None
    return Runtime(rank, world, device)


def local_device(local_rank: int) -> torch.device:
    """The device of a process, by its rank on this host. Raises UserError if the host has too few GPUs."""
    if not torch.cuda.is_available() or os.environ.get("DS_ACCELERATOR") == "cpu":
        return torch.device("cpu")
    index = 0 if is_bound_to_one_gpu() else local_rank
    if index < torch.cuda.device_count():
        return torch.device("cuda", index)
    problem = UserError(f"this host has {torch.cuda.device_count()} GPUs, fewer than the processes started on it.")
    if not is_first():  # the command prints that of the first process, and this may be the only one that has one
        print_errors(problem)
    raise problem


def _describe_failure(rank: int, world: int, error: Exception) -> str:
    names = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
    chosen = " and ".join(f"{name} ({os.environ.get(name, 'not set')})" for name in names)
    interfaces = " ".join(name for _, name in socket.if_nameindex())
    return (
        f"rank {rank} of {world} on {socket.gethostname()} could not connect to the others at "
        f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}: {' '.join(str(error).split()):.300} "
        f"If rank 0 runs there, export on every host {chosen}: the network interface that reaches the others. "
        f"This host has {interfaces}."
    )


@contextmanager
def errors_on_all_ranks() -> Iterator[None]:
    """A UserError that any rank raises in this context is raised on all ranks, and so is a file that it cannot read. If
    one rank failed alone, the others would wait for it in their next collective."""
    problems = []
    try:
        yield
    except UserError as error:
        problems = error.problems
    except OSError as error:
        problems = [f"{error.filename or 'a file'}: {error.strerror or error}."]
    everyones = [None] * dist.get_world_size()
    dist.all_gather_object(everyones, (socket.gethostname(), problems))
    where = defaultdict(dict)
    for rank, (host, lines) in enumerate(everyones):
        for line in lines:
            where[line][rank] = host
    if where:
        everywhere = len(everyones)
        raise UserError(
            *(line if len(at) == everywhere else f"{line} ({name_ranks(at)})" for line, at in where.items())
        )


def name_ranks(hosts: dict[int, str]) -> str:
    """{1: "a", 2: "a", 3: "b"} → "ranks 1 2 on a, rank 3 on b"."""
    ranks = defaultdict(list)
    for rank, host in hosts.items():
        ranks[host].append(str(rank))
    return ", ".join(f"rank{'s' if len(on) > 1 else ''} {' '.join(on)} on {host}" for host, on in ranks.items())


def stop_runtime() -> None:
    """Leave the job together. A launcher kills the other processes as soon as one exits with an error."""
    dist.barrier()
    dist.destroy_process_group()


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed dropout for one step on one rank. The seed depends only on the arguments, so a resumed run needs no stored
    generator state. Dropout masks depend on the layout; nothing else that is random does."""
    torch.manual_seed(random.Random(f"{seed}/{step}/{rank}").getrandbits(63))
