"""The variables of launchers. Those of Open MPI 4.1.4, MPICH 4.0.2 and Slurm 22.05.8 were recorded from them, those of
MVAPICH, jsrun, PALS and Flux are from their manuals."""

import json
import os
import subprocess
import sys
import time
from unittest.mock import patch

import pytest
import yaml

import tiny
from jobs import train_all
from megacocomix.errors import UserError
from megacocomix.launchers import (
    OWN,
    check_alone,
    child_environment,
    find_place,
    is_bound_to_one_gpu,
    is_first,
    set_address,
    set_ranks,
)
from processes import run_processes

OPEN_MPI = {
    "OMPI_COMM_WORLD_SIZE": "{size}",
    "OMPI_COMM_WORLD_RANK": "{rank}",
    "OMPI_COMM_WORLD_LOCAL_RANK": "{rank}",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "{size}",
    "OMPI_COMM_WORLD_NODE_RANK": "{rank}",
    "OMPI_UNIVERSE_SIZE": "{size}",
    "PMIX_RANK": "{rank}",
    "PMIX_NAMESPACE": "1139736577",
}
MPICH = {
    "PMI_RANK": "{rank}",
    "PMI_SIZE": "{size}",
    "PMI_FD": "8",
    "MPI_LOCALRANKID": "{rank}",
    "MPI_LOCALNRANKS": "{size}",
}
MVAPICH2 = {
    "MV2_COMM_WORLD_RANK": "{rank}",
    "MV2_COMM_WORLD_SIZE": "{size}",
    "MV2_COMM_WORLD_LOCAL_RANK": "{rank}",
    "MV2_COMM_WORLD_LOCAL_SIZE": "{size}",
}
MVAPICH = {name.replace("MV2", "MVP"): value for name, value in MVAPICH2.items()}
JSRUN = {name.replace("MV2_COMM_WORLD", "JSM_NAMESPACE"): value for name, value in MVAPICH2.items()} | {
    "PMIX_RANK": "{rank}",
}
PALS = {
    "PALS_RANKID": "{rank}",
    "PALS_LOCAL_RANKID": "{rank}",
    "PALS_LOCAL_SIZE": "{size}",
    "PALS_APID": "0b1c",
    "PMI_RANK": "{rank}",
    "PMI_SIZE": "{size}",
    "PMI_LOCAL_RANK": "{rank}",
}
FLUX = {
    "FLUX_TASK_RANK": "{rank}",
    "FLUX_TASK_LOCAL_ID": "{rank}",
    "FLUX_JOB_SIZE": "{size}",
    "FLUX_JOB_NNODES": "1",
    "FLUX_JOB_ID": "ƒ3bXY",
    "PMI_RANK": "{rank}",
    "PMI_SIZE": "{size}",
}
SBATCH = {
    "SLURM_JOB_ID": "4",
    "SLURM_JOB_NODELIST": "vm",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
    "SLURM_NPROCS": "4",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "0",
    "SLURM_TASKS_PER_NODE": "4",
}
SRUN = SBATCH | {
    "SLURM_LOCALID": "{rank}",
    "SLURM_NTASKS": "{size}",
    "SLURM_PROCID": "{rank}",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "vm",
    "SLURM_STEP_NUM_NODES": "1",
    "SLURM_STEP_NUM_TASKS": "{size}",
    "SLURM_STEP_TASKS_PER_NODE": "{size}",
}
SRUN_PMI2 = SRUN | {"PMI_FD": "13", "PMI_JOBID": "3.0", "PMI_RANK": "{rank}", "PMI_SIZE": "{size}"}
LAUNCHERS = {
    "Open MPI": OPEN_MPI,
    "Open MPI in sbatch": SBATCH | OPEN_MPI,
    "Open MPI on the nodes of srun": SRUN | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"} | OPEN_MPI,
    "MPICH": MPICH,
    "MPICH in sbatch": SRUN | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"} | MPICH,
    "MVAPICH2": MVAPICH2,
    "MVAPICH": MVAPICH,
    "jsrun": JSRUN,
    "PALS": PALS,
    "Flux": FLUX,
    "srun": SRUN,
    "srun --mpi=pmi2": SRUN_PMI2,
}
TORCHRUN = {
    "RANK": "{rank}",
    "WORLD_SIZE": "{size}",
    "LOCAL_RANK": "{rank}",
    "LOCAL_WORLD_SIZE": "{size}",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29512",
}
DEEPSPEED = {"LOCAL_SIZE" if name == "LOCAL_WORLD_SIZE" else name: value for name, value in TORCHRUN.items()}


def filled(variables, rank=0, size=2):
    return {name: value.format(rank=rank, size=size) for name, value in variables.items()}


@pytest.fixture
def environment():
    """Sets the variables of a launcher, and no others."""

    def use(variables):
        kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
        os.environ.clear()
        os.environ.update(kept | variables)

    with patch.dict(os.environ):
        yield use


def refusal(call=find_place, *arguments):
    with pytest.raises(UserError) as caught:
        call(*arguments)
    (line,) = caught.value.problems
    return line


@pytest.mark.parametrize("variables", LAUNCHERS.values(), ids=LAUNCHERS)
def test_each_launcher_gives_the_variables_of_torchrun(environment, variables):
    ports = set()
    for rank in range(3):
        environment(filled(variables, rank, 3))
        set_address(set_ranks())
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR")
        assert [os.environ[name] for name in names] == [str(rank), "3", str(rank), "3", "127.0.0.1"]
        assert os.environ["OMP_NUM_THREADS"] == str(max(1, os.cpu_count() // 3))
        assert is_first() == (rank == 0)
        ports.add(os.environ["MASTER_PORT"])
        set_address(set_ranks())
        assert find_place()[:4] == (rank, 3, rank, 3)
    (port,) = ports
    assert 29500 <= int(port) < 30500


@pytest.mark.parametrize("variables", LAUNCHERS.values(), ids=LAUNCHERS)
def test_one_process_of_a_launcher_is_alone(environment, variables):
    environment(filled(variables, 0, 1))
    set_address(set_ranks())
    assert (os.environ["RANK"], os.environ["WORLD_SIZE"], os.environ.get("MASTER_ADDR")) == ("0", "1", None)


def test_two_jobs_on_a_host_meet_at_different_ports(environment):
    ports = set()
    for job in ("17", "18"):
        environment(filled(SRUN) | {"SLURM_JOB_ID": job})
        set_address(set_ranks())
        ports.add(os.environ["MASTER_PORT"])
    assert len(ports) == 2


@pytest.mark.parametrize("own", [TORCHRUN, DEEPSPEED], ids=["torchrun", "deepspeed"])
@pytest.mark.parametrize("outer", LAUNCHERS.values(), ids=LAUNCHERS)
def test_torchrun_and_deepspeed_win_over_the_launcher_that_started_them(environment, own, outer):
    """As `srun --ntasks-per-node=1 torchrun` on two nodes of four."""
    environment(filled(outer, 1, 2) | filled(own, 5, 8) | {"LOCAL_RANK": "1"})
    set_address(set_ranks())
    assert find_place()[:3] == (5, 8, 1)
    assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == ("127.0.0.1", "29512")


@pytest.mark.parametrize(
    "variables",
    [
        {},
        SBATCH,
        {name: value for name, value in SBATCH.items() if name not in ("SLURM_PROCID", "SLURM_LOCALID")},  # salloc
        filled(SRUN, 0, 1) | {"SLURM_PTY_PORT": "34889", "SLURM_STEP_ID": "4294967290"},  # salloc's interactive step
        {"WORLD_SIZE": "1"},
        {"RANK": "0", "WORLD_SIZE": "1"},
        {"RANK": "", "WORLD_SIZE": ""},
    ],
)
def test_a_plain_start_is_alone(environment, variables):
    environment(variables)
    assert find_place()[:2] == (0, 1)


def test_a_command_typed_in_a_shell_of_srun_pty_is_alone_and_a_task_is_not(environment):
    """An interactive shell gives its commands process groups of their own; the task is the shell."""
    with subprocess.Popen(["sleep", "60"], process_group=0) as shell:
        pty = filled(SRUN, 0, 4) | {"SLURM_PTY_PORT": "34889"}
        environment(pty | {"SLURM_TASK_PID": str(shell.pid)})
        assert find_place()[:2] == (0, 1)
        environment(pty | {"SLURM_TASK_PID": str(os.getpid())})  # srun --pty python, or a script
        assert find_place()[:2] == (0, 4)
        environment(pty | {"SLURM_PROCID": "3", "SLURM_TASK_PID": str(shell.pid)})
        assert find_place()[:2] == (3, 4)
        shell.kill()


@pytest.mark.parametrize(
    ("variables", "line"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2, but RANK is not set: export both, or neither."),
        ({"RANK": "1"}, "RANK is 1, but WORLD_SIZE is not set: export both, or neither."),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 is not below WORLD_SIZE=2."),
        ({"RANK": "0", "WORLD_SIZE": "two"}, "WORLD_SIZE='two' is not a whole number."),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK='-1' is not a whole number."),
        ({"RANK": "0", "WORLD_SIZE": "2.0"}, "WORLD_SIZE='2.0' is not a whole number."),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_SIZE is set, but OMPI_COMM_WORLD_RANK is not"),
        ({"OMPI_COMM_WORLD_RANK": "1"}, "OMPI_COMM_WORLD_RANK is set, but OMPI_COMM_WORLD_SIZE is not"),
        ({"PMIX_RANK": "0"}, "PMIX_RANK is set, but the number of processes is not"),
        ({"PALS_RANKID": "0"}, "PALS_RANKID is set, but PMI_SIZE is not"),
        ({"SLURM_STEP_NUM_TASKS": "2"}, "SLURM_STEP_NUM_TASKS is set, but SLURM_PROCID is not"),
        (
            filled(OPEN_MPI) | {"WORLD_SIZE": "3"},
            "WORLD_SIZE=3 contradicts OMPI_COMM_WORLD_RANK=0 and OMPI",
        ),
        (filled(OPEN_MPI) | {"RANK": "1"}, "RANK=1 contradicts OMPI_COMM_WORLD_RANK=0"),
        (filled(SRUN) | {"RANK": "0", "WORLD_SIZE": "1"}, "RANK=0 and WORLD_SIZE=1 contradicts SLURM_PROCID=0"),
        (filled(MPICH, 5), "PMI_RANK=5 is not below PMI_SIZE=2."),
        (filled(MPICH) | {"MPI_LOCALNRANKS": "3"}, "rank 0 of 3 on this host cannot be: PMI_SIZE=2 in all."),
        (filled(TORCHRUN) | {"LOCAL_RANK": "2"}, "rank 2 of 2 on this host cannot be: WORLD_SIZE=2 in all."),
        ({"LOCAL_RANK": "1"}, "rank 1 of 1 on this host cannot be: WORLD_SIZE=1 in all."),
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, "SLURM_PROCID=1 says that this is one of several processes"),
        ({"SM_HOSTS": '["algo-1","algo-2"]'}, "SM_HOSTS="),
        ({"LOCAL_WORLD_SIZE": "8"}, "LOCAL_WORLD_SIZE=8 says that this is one of several processes"),
        ({"PET_NNODES": "1:4"}, "PET_NNODES=1:4 says"),
        ({"HOROVOD_SIZE": "4"}, "HOROVOD_SIZE=4 says that this is one of several processes, but not which"),
        ({"PET_NNODES": "2", "PET_NODE_RANK": "1"}, "PET_NNODES=2 says"),
    ],
)
def test_unknown_and_contradictory_ranks_are_refused_with_one_line(environment, variables, line):
    environment(variables)
    assert refusal().startswith(line)


def test_exported_ranks_that_agree_with_the_launcher_are_taken(environment):
    environment(filled(OPEN_MPI, 1) | {"RANK": "1", "WORLD_SIZE": "2"})
    assert find_place()[:4] == (1, 2, 1, 2)
    environment(filled(OPEN_MPI, 1) | {"WORLD_SIZE": "2"})
    assert find_place()[:4] == (1, 2, 1, 2)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node07", "node07"),
        ("node[07-09]", "node07"),
        ("a,b", "a"),
        ("gpu[3,5-7],cpu1", "gpu3"),
        ("rack[1-2]n[08,10]", "rack1n08"),
        ("n[001-128]-ib.example.org", "n001-ib.example.org"),
    ],
)
def test_on_several_hosts_srun_names_the_first(environment, nodes, first):
    variables = {"SLURM_STEP_NODELIST": nodes, "SLURM_STEP_TASKS_PER_NODE": "2(x3),1", "SLURM_NODEID": "2"}
    environment(filled(SRUN, 5, 7) | variables | {"SLURM_LOCALID": "1"})
    set_address(set_ranks())
    assert (os.environ["MASTER_ADDR"], os.environ["LOCAL_WORLD_SIZE"], os.environ["LOCAL_RANK"]) == (first, "2", "1")


@pytest.mark.parametrize("variables", [OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, FLUX | {"FLUX_JOB_NNODES": "2"}])
def test_on_several_hosts_the_others_need_an_address(environment, variables):
    environment(filled(variables))
    assert "export MASTER_ADDR, the host of rank 0" in refusal(set_address, set_ranks())
    environment(filled(variables) | {"MASTER_ADDR": "node1"})
    set_address(set_ranks())
    assert (os.environ["MASTER_ADDR"], os.environ.get("LOCAL_WORLD_SIZE")) in (("node1", "1"), ("node1", None))


def test_a_process_that_srun_bound_to_one_gpu_uses_the_first_and_one_of_torchrun_does_not(environment):
    environment(filled(SRUN, 1) | {"CUDA_VISIBLE_DEVICES": "3"})
    assert is_bound_to_one_gpu()
    environment(filled(SRUN, 1) | {"CUDA_VISIBLE_DEVICES": "0,1"})
    assert not is_bound_to_one_gpu()
    for own in (filled(TORCHRUN, 1) | {"TORCHELASTIC_RUN_ID": "none"}, filled(DEEPSPEED, 1)):
        for outer in ({}, filled(SRUN)):
            environment(outer | own | {"CUDA_VISIBLE_DEVICES": "0"})
            assert not is_bound_to_one_gpu()


def test_a_child_in_a_pod_or_a_service_is_no_rank_either(environment):
    environment(filled(TORCHRUN) | {"PET_NNODES": "2", "SKYPILOT_NUM_NODES": "2", "SM_HOSTS": '["a","b"]'})
    environment(child_environment())
    assert find_place()[:2] == (0, 1)
    check_alone("evaluate.py")


def test_flux_tasks_need_not_be_spread_evenly(environment):
    environment(filled(FLUX, 3, 5) | {"FLUX_JOB_NNODES": "2"})
    assert find_place()[:3] == (3, 5, 3)


def test_a_child_of_a_rank_is_no_rank(environment):
    for variables in (*LAUNCHERS.values(), TORCHRUN, DEEPSPEED):
        environment(filled(variables, 1) | {"KEPT": "yes"})
        child = child_environment()
        assert child["KEPT"] == "yes"
        environment(child)
        assert find_place()[:2] == (0, 1)


@pytest.fixture(scope="module")
def recipe(folder):
    file = folder / "tiny.yaml"
    file.write_text(yaml.safe_dump(tiny.values(folder)))
    return file


def start(command, variables, size=2):
    """Start `command` as `size` processes; returns their exit codes, outputs and error outputs."""
    base = {name: os.environ[name] for name in ("PATH", "HOME", "HF_HUB_OFFLINE") if name in os.environ}
    base |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, *map(str, command)],
            env=base | filled(variables, rank, size),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    try:
        outputs = [process.communicate(timeout=200) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], *zip(*outputs, strict=True)


def losses(folder, run):
    lines = [json.loads(line) for line in (folder / run / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line.get("loss"), line.get("valid_loss"), line.get("grad_norm")) for line in lines]


def train_as(launcher, config):
    """A rank of run_processes, with the variables of the launcher instead."""
    rank = int(os.environ["RANK"])
    for name in OWN:
        os.environ.pop(name, None)
    os.environ.update(filled(launcher, rank))
    return train_all([config])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Open MPI", "MPICH", "srun"])
def test_two_processes_of_a_launcher_train_the_run_of_torchrun(folder, name):
    if not (folder / "torchrun").exists():
        run_processes(2, train_all, [tiny.config(folder, "torchrun")])
    job = {"PMIX_NAMESPACE": str(time.time_ns()), "SLURM_JOB_ID": str(time.time_ns())}
    launcher = LAUNCHERS[name] | {key: job[key] for key in job if key in LAUNCHERS[name]}
    run_processes(2, train_as, launcher, tiny.config(folder, name))
    assert 'world": 2' in (folder / name / "code.json").read_text()
    assert losses(folder, name) == losses(folder, "torchrun")


def test_a_job_whose_ranks_are_contradictory_trains_nothing_and_says_so_once(root, folder, recipe):
    command = [root / "launcher/pretrain.py", "--config", recipe, f"run={folder / 'never'}"]
    codes, _, err = start(command, OPEN_MPI | {"WORLD_SIZE": "3"})
    assert (codes, len("".join(err).splitlines())) == ([2, 2], 1)
    assert "WORLD_SIZE=3 contradicts OMPI_COMM_WORLD_RANK=0" in err[0]
    assert not (folder / "never").exists()


def test_a_command_for_one_process_runs_in_a_pod_that_has_the_variables_of_a_job(environment):
    environment({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "job-0"})
    check_alone("compare_runs.py")


@pytest.mark.parametrize("tool", ["prepare_data.py x.txt --out x --tokenizer gpt2", "upgrade_config.py x"])
def test_a_command_for_one_process_is_refused_in_several_and_says_so_once(root, tool):
    name, *arguments = tool.split()
    codes, _, err = start([root / "tools" / name, *arguments], MPICH)
    assert codes == [2, 2]
    assert "".join(err) == f"error: {name} works in one process, but MPICH or Intel MPI started 2.\n"


@pytest.fixture
def exported(environment, tmp_path, monkeypatch):
    """What the deepspeed launcher of one kind, on a host with or without a GPU, sends to the processes of two hosts:
    the command that it would run."""
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
    from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator
    from deepspeed.launcher import runner

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runner, "DEEPSPEED_ENVIRONMENT_PATHS", ["."])  # without that of the home folder
    monkeypatch.setattr(runner.signal, "signal", lambda *handler: None)
    (tmp_path / "hosts").write_text("node1 slots=2\nnode2 slots=2\n")

    def launch(launcher, accelerator, variables):
        environment(variables)
        monkeypatch.setattr(runner, "get_accelerator", {"cpu": CPU_Accelerator, "cuda": CUDA_Accelerator}[accelerator])
        for kind in (runner.PDSHRunner, runner.OpenMPIRunner, runner.SlurmRunner):
            monkeypatch.setattr(kind, "backend_exists", lambda self: True)
        with patch.object(runner.subprocess, "Popen") as popen:
            popen.return_value.returncode = 0
            where = ["--hostfile", "hosts", "--no_ssh_check", "--master_addr", "node1", "--launcher", launcher]
            runner.main([*where, "pretrain.py"])
        return " ".join(popen.call_args.args[0])

    return launch


SET_BY_USERS = (
    "GLOO_SOCKET_IFNAME",
    "NCCL_SOCKET_IFNAME",
    "HF_HUB_OFFLINE",
    "WANDB_MODE",
    "OMP_NUM_THREADS",
    "TRITON_CACHE_DIR",
    "TOKENIZERS_PARALLELISM",
    "TORCH_NCCL_ASYNC_ERROR_HANDLING",
)


@pytest.mark.parametrize(
    ("launcher", "accelerator", "names"),
    [
        ("pdsh", "cuda", {"NCCL_SOCKET_IFNAME"}),
        ("openmpi", "cuda", {"NCCL_SOCKET_IFNAME"}),
        ("pdsh", "cpu", set()),
        ("openmpi", "cpu", set()),
    ],
)
def test_deepspeed_exports_nccl_alone_and_that_only_from_a_host_with_a_gpu(exported, launcher, accelerator, names):
    command = exported(launcher, accelerator, dict.fromkeys(SET_BY_USERS, "x1"))
    assert {name for name in SET_BY_USERS if f"{name}=x1" in command} == names
    assert "PYTHONPATH=" in command


@pytest.mark.parametrize("launcher", ["pdsh", "openmpi", "slurm"])
def test_deepspeed_exports_what_is_in_deepspeed_env(exported, tmp_path, launcher):
    (tmp_path / ".deepspeed_env").write_text("".join(f"{name}=x1\n" for name in SET_BY_USERS))
    command = exported(launcher, "cpu", {})
    assert {name for name in SET_BY_USERS if f"{name}=x1" in command} == set(SET_BY_USERS)


def test_deepspeed_through_slurm_exports_everything(exported):
    assert "--export=ALL," in exported("slurm", "cpu", {})


def test_a_line_of_deepspeed_env_that_sets_nothing_ends_the_launcher(exported, tmp_path):
    (tmp_path / ".deepspeed_env").write_text("GLOO_SOCKET_IFNAME=x1\n\n")
    with pytest.raises(ValueError, match="not enough values"):
        exported("pdsh", "cpu", {})
