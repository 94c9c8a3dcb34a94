"""Which launcher started this process, and as which of how many, by the environment. torchrun and deepspeed set RANK,
WORLD_SIZE, MASTER_ADDR and so on; here the variables of the others become these. Imports no torch, which must be
imported after the number of threads is set."""

import os
import re
import zlib
from typing import NamedTuple

from megacocomix.errors import UserError

OWN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
# Launcher → the variables of rank, size, rank on this host, size on this host. One that may have been started by
# another is before it: mpirun starts its processes through srun, and Flux and PALS set those of PMI too. Recorded from
# Open MPI 4.1, MPICH 4.0 and Slurm 22.05; the others from their manuals.
VARIABLES = {
    "Open MPI": tuple(f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")),
    "MVAPICH2": tuple(f"MV2_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")),
    "MVAPICH": tuple(f"MVP_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")),
    "jsrun": tuple(f"JSM_NAMESPACE_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")),
    "MPICH or Intel MPI": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    "PALS": ("PALS_RANKID", "PMI_SIZE", "PALS_LOCAL_RANKID", "PALS_LOCAL_SIZE"),
    "Flux": ("FLUX_TASK_RANK", "FLUX_JOB_SIZE", "FLUX_TASK_LOCAL_ID", ""),
    "srun": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", ""),
    "PMI": ("PMI_RANK", "PMI_SIZE", "PMI_LOCAL_RANK", "PMI_LOCAL_SIZE"),
    "PMIx": ("PMIX_RANK", "", "PMIX_LOCAL_RANK", ""),
}
# The variables that only this launcher sets, where these are not rank and size. A batch script of Slurm has
# SLURM_PROCID=0 and SLURM_NTASKS too; only srun sets SLURM_STEP_NUM_TASKS.
MARKS = {
    "MPICH or Intel MPI": ("MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    "PALS": ("PALS_RANKID",),
    "srun": ("SLURM_STEP_NUM_TASKS",),
}
# The number of processes or hosts that other launchers and services set. Their ranks are not read.
SIZES = (
    "LOCAL_WORLD_SIZE",
    "LOCAL_SIZE",
    "HOROVOD_SIZE",
    "MPIRUN_NPROCS",
    "MPISIZE",
    "MP_PROCS",
    "PET_NNODES",
    "SKYPILOT_NUM_NODES",
)
# The variables that name the job, the same in all its processes.
JOBS = {
    "Open MPI": ("PMIX_NAMESPACE",),
    "PALS": ("PALS_APID",),
    "Flux": ("FLUX_JOB_ID",),
    "srun": ("SLURM_JOB_ID", "SLURM_STEP_ID"),
}


class Place(NamedTuple):
    """A process among those that were started together."""

    rank: int
    size: int
    local_rank: int | None = None
    """Rank among those on this host; None if unknown."""
    local_size: int | None = None
    launcher: str = "torchrun or deepspeed"


def set_ranks() -> Place:
    """Set RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE, and share the host's cores between its processes. Raises
    UserError if the variables contradict each other, or this is one of several processes but which is unknown."""
    place = find_place()
    if place.local_rank is None and place.size > 1 and place.launcher in VARIABLES:
        raise UserError(f"{place.launcher} does not give the rank on this host: export LOCAL_RANK.")
    os.environ.update(RANK=str(place.rank), WORLD_SIZE=str(place.size), LOCAL_RANK=str(place.local_rank or 0))
    if place.local_size:
        os.environ["LOCAL_WORLD_SIZE"] = str(place.local_size)
    # Otherwise torch would use every core in each process.
    os.environ.setdefault("OMP_NUM_THREADS", str(cores_of_process()))
    return place


def cores_of_process() -> int:
    """This process's share of the host's cores, of those that it may use. Call it after set_ranks."""
    share = (os.cpu_count() or 1) // (_number("LOCAL_WORLD_SIZE") or 1)
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else share
    return max(1, min(share, allowed))


def set_address(place: Place) -> None:
    """Set MASTER_ADDR and MASTER_PORT, where all processes meet, if the launcher has not. Raises UserError if they are
    on several hosts and rank 0's is unknown."""
    if place.size == 1:
        return
    launcher = _launcher()
    if "MASTER_ADDR" not in os.environ:
        nodes = os.environ.get("SLURM_STEP_NODELIST") if launcher == "srun" else None
        if place.local_size != place.size and not nodes:
            raise UserError(
                f"{place.size} processes, which may be on several hosts, do not know where to meet: export "
                "MASTER_ADDR, the host of rank 0."
            )
        os.environ["MASTER_ADDR"] = "127.0.0.1" if place.local_size == place.size else _first_host(nodes)
    # From the job, so that two jobs on a host do not meet each other; else torch's default.
    job = "/".join(os.environ.get(name, "") for name in JOBS.get(launcher, ()))
    os.environ.setdefault("MASTER_PORT", str(29500 + zlib.crc32(job.encode()) % 1000))


def check_alone(command: str) -> None:
    """Raise UserError if this is one of several processes, for a command whose processes would do the same work and
    write the same files."""
    # RANK and WORLD_SIZE alone are those of a pod, or exported for a launcher that is still to be started.
    is_started = any(map(os.environ.get, ("LOCAL_WORLD_SIZE", "LOCAL_SIZE")))
    place = find_place() if is_started else _started_place()
    if place and place.size > 1:
        raise UserError(f"{command} works in one process, but {place.launcher} started {place.size}.")


def is_bound_to_one_gpu() -> bool:
    """Whether the launcher shows each process one GPU, which is then its only one, as srun --gpus-per-task=1 does.
    torchrun and deepspeed show all processes the same."""
    is_direct = _launcher() and not {"TORCHELASTIC_RUN_ID", "LOCAL_SIZE"} & os.environ.keys()
    return bool(is_direct) and "," not in os.environ.get("CUDA_VISIBLE_DEVICES", ",")


def is_first() -> bool:
    """Whether this is rank 0, or nothing says which rank it is: the process that prints errors."""
    for find in (find_place, _started_place):
        try:
            place = find()
        except UserError:
            continue
        return place is None or place.rank == 0
    return True


def child_environment() -> dict[str, str]:
    """The environment for a process that is no rank of this job."""
    launchers = {name for names in VARIABLES.values() for name in names}
    return {name: value for name, value in os.environ.items() if name not in launchers.union(OWN, SIZES, ["SM_HOSTS"])}


def find_place() -> Place:
    """Read the variables. RANK and WORLD_SIZE win over the launcher's if the size on this host is with them: torchrun
    and deepspeed set all three, and may themselves be started by srun or mpirun. Raises UserError."""
    rank, size, local_rank = map(_number, OWN[:3])
    local_size = _number("LOCAL_WORLD_SIZE") or _number("LOCAL_SIZE")
    if None not in (rank, size, local_size):
        return _checked(Place(rank, size, local_rank, local_size), "RANK", "WORLD_SIZE")
    started = _started_place()
    if rank is None and size in (None, 1) and started is None:
        _check_no_other()
        return _checked(Place(0, 1, local_rank, 1), "RANK", "WORLD_SIZE")
    if started and started.size > 1:
        if rank not in (None, started.rank) or size not in (None, started.size):
            names = VARIABLES[started.launcher]
            own = " and ".join(f"{name}={value}" for name in OWN[:2] if (value := os.environ.get(name)))
            raise UserError(
                f"{own} contradicts {names[0]}={started.rank} and {names[1]}={started.size} of {started.launcher}: "
                "unset one of them."
            )
        return started._replace(local_rank=started.local_rank if local_rank is None else local_rank)
    if rank is None and size in (None, 1):
        return started._replace(local_rank=local_rank or 0)
    if rank is None or size is None:
        given, missing = ("WORLD_SIZE", "RANK") if rank is None else ("RANK", "WORLD_SIZE")
        raise UserError(f"{given} is {os.environ[given]}, but {missing} is not set: export both, or neither.")
    return _checked(Place(rank, size, local_rank, 1 if size == 1 else None), "RANK", "WORLD_SIZE")


def _check_no_other() -> None:
    """Raises UserError if a variable says that this is one of several, and none says which."""
    numbers = {name: re.findall("[0-9]+", os.environ.get(name, "")) for name in SIZES}
    found = next((name for name, each in numbers.items() if each and int(each[-1]) > 1), None)  # PET_NNODES=1:4
    if "SLURM_STEP_NUM_TASKS" not in os.environ and _number("SLURM_PROCID"):  # a batch script is 0
        found = "SLURM_PROCID"
    if len(re.findall(r'"', os.environ.get("SM_HOSTS", ""))) > 2:
        found = "SM_HOSTS"
    if found:
        raise UserError(
            f"{found}={os.environ[found]:.60} says that this is one of several processes, but not which: start "
            "torchrun on each host, or export RANK, WORLD_SIZE and LOCAL_RANK."
        )


def _launcher() -> str | None:
    """The innermost launcher of VARIABLES that has set its own."""
    marks = {launcher: MARKS.get(launcher, names[:2]) for launcher, names in VARIABLES.items()}
    return next((launcher for launcher, names in marks.items() if any(map(os.environ.get, names))), None)


def _started_place() -> Place | None:
    """The place that the innermost launcher gives; None if there is none."""
    launcher = _launcher()
    if launcher is None or (launcher == "srun" and _is_in_interactive_shell()):
        return None
    names = VARIABLES[launcher]
    rank, size, local_rank, local_size = (_number(name) if name else None for name in names)
    if rank is None or size is None:
        given, missing = (names[1], names[0]) if rank is None else (names[0], names[1] or "the number of processes")
        raise UserError(f"{given} is set, but {missing} is not: export RANK, WORLD_SIZE and LOCAL_RANK.")
    if launcher == "Flux" and (nodes := _number("FLUX_JOB_NNODES")):
        local_size = size if nodes == 1 else None
    if launcher == "srun":
        local_size = _tasks_on_this_node()
    return _checked(Place(rank, size, local_rank, 1 if size == 1 else local_size, launcher), names[0], names[1])


def _is_in_interactive_shell() -> bool:
    """Whether this was started by hand, in a shell of `srun --pty`: its other tasks, if there are any, have ended. Such
    a shell gives each command a process group of its own, a script does not."""
    if "SLURM_PTY_PORT" not in os.environ or _number("SLURM_PROCID"):
        return False
    try:
        return os.getpgid(_number("SLURM_TASK_PID") or 0) != os.getpgrp()
    except OSError:  # of a container, which has other numbers
        return False


def _tasks_on_this_node() -> int | None:
    """From SLURM_STEP_TASKS_PER_NODE, such as `2(x3),1`."""
    parts = re.findall(r"(\d+)(?:\(x(\d+)\))?", os.environ.get("SLURM_STEP_TASKS_PER_NODE", ""))
    counts = [int(count) for count, times in parts for _ in range(int(times or 1))]
    node = 0 if len(counts) == 1 else _number("SLURM_NODEID")
    return counts[node] if node is not None and node < len(counts) else None


def _first_host(nodes: str) -> str:
    """The first of a list such as `rack[1-2]n[07,09-12],login`."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)[0]
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first)


def _number(name: str) -> int | None:
    """The whole number of a variable; None if it is not set."""
    text = os.environ.get(name, "").strip()
    if text and not re.fullmatch("[0-9]{1,9}", text):
        raise UserError(f"{name}={text!r:.40} is not a whole number.")
    return int(text) if text else None


def _checked(place: Place, rank: str, size: str) -> Place:
    """Raises UserError unless the ranks are below the sizes."""
    if place.rank >= place.size:
        raise UserError(f"{rank}={place.rank} is not below {size}={place.size}.")
    if None not in (place.local_rank, place.local_size) and not place.local_rank < place.local_size <= place.size:
        raise UserError(
            f"rank {place.local_rank} of {place.local_size} on this host cannot be: {size}={place.size} in all."
        )
    return place
