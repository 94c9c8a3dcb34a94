"""The commands that people type: every one in the README runs, every mistake is one line and a non-zero exit."""

import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest

from megacocomix.config.load import load_config
from megacocomix.config.rules import check_config
from processes import run_tool

# The README's runs, cut short.
SHORT = "training.steps=3 training.global_batch=4 training.micro_batch=2 optimizer.warmup_steps=1 evaluation.batches=1"
ENVIRONMENT = os.environ | {
    "PATH": f"{os.path.dirname(sys.executable)}{os.pathsep}{os.environ['PATH']}",
    "WANDB_MODE": "offline",
}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory, root):
    """The files of the repository in a folder of their own, where commands may write."""
    folder = tmp_path_factory.mktemp("checkout") / "megacocomix"
    listed = subprocess.run(["git", "ls-files"], cwd=root, capture_output=True, text=True, check=True).stdout
    for name in listed.splitlines():
        if (root / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(root / name, folder / name)
    return folder


def run(command, folder, timeout=400):
    """Started as it is typed; what `run_tool` returns."""
    process = subprocess.Popen(
        command if isinstance(command, list) else shlex.split(command),
        cwd=folder,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        raise
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def readme_commands(root):
    blocks = re.findall(r"```sh\n(.*?)```", (root / "README.md").read_text(), re.DOTALL)
    return [line.partition("  #")[0] for block in blocks for line in block.splitlines() if line]


@pytest.mark.slow
def test_every_readme_command_runs(checkout, root):
    commands = readme_commands(root)
    assert len(commands) >= 12
    for command in commands:
        program = command.split()[0]
        if program == "source":
            continue
        if program == "make":
            command = command.replace("make", "make --dry-run")
        elif "configs/1.38b.yaml" in command:  # needs a cluster; here, that its config is valid on one
            arguments = shlex.split(command.split("configs/1.38b.yaml")[1])
            check_config(load_config(root / "configs/1.38b.yaml", arguments), world=64)
            continue
        elif "sweep.py" in command:  # an hour
            command = f"{command} --dry-run"
        # Two need the network, one serves until it is stopped (tests/interpret/test_server.py stops it).
        elif any(word in command for word in ("fetch_eval_data", "evaluate.py tasks", "serve.py")):
            command = f"{command} --help"
        elif "pretrain.py" in command:
            command = f"{command} {SHORT}"
        if "train_sae.py" in command:
            command = command.replace("--steps 100", "--steps 5")
        if "data/labels" in command:  # fewer windows to label, for both who write and read them
            command = f"{command} data.train=data/wiki/valid"
        is_tool = program == "python" and "pretrain.py" not in command  # the others are started as they are typed
        done = run_tool(command.split(maxsplit=1)[1], checkout) if is_tool else run(command, checkout)
        assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    assert (checkout / "runs/comparison/comparison.md").exists()
    assert list(checkout.glob("runs/tiny/evals/step-00000003-*.json"))


def test_a_reader_that_leaves_early_is_no_traceback():
    program = "from megacocomix.errors import run_cli; run_cli(lambda: [print('x' * 99) for _ in range(9999)] and 0)"
    command = f"{shlex.quote(sys.executable)} -c {shlex.quote(program)} | head -1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.count("\n"), done.stderr) == (1, 1, "")


MISTAKES = {
    "no recipe": ("launcher/pretrain.py --config configs/none.yaml", "configs/none.yaml cannot be read"),
    "unknown option": ("launcher/pretrain.py --config configs/tiny.yaml training.step=3", "Did you mean steps?"),
    "no data": ("launcher/pretrain.py --config configs/tiny.yaml data.train=nowhere run=runs/no-data", "nowhere"),
    "no run": ("tools/evaluate.py perplexity runs/none", "runs/none"),
    "nothing to compare": ("tools/compare_runs.py assets --out runs/x", "assets"),
    "no text": ("tools/prepare_data.py none.txt --out data/x --tokenizer gpt2", "none.txt"),
    "no teacher": (
        "tools/train_sae.py --teacher none --data data/x --layer 1 --latents 8 --k 2 --out x.safetensors",
        "none does not exist",
    ),
    "no autoencoder": ("tools/convert_sae.py configs --out x.safetensors", "configs is no autoencoder"),
    "nothing to label": (
        "tools/label_concepts.py --config configs/tiny.yaml --out x method.name=ntp",
        "no concepts to label",
    ),
    "a cache that is none": (
        "launcher/pretrain.py --config configs/tiny.yaml data.train=data/none teacher.labels=configs run=runs/none",
        "data/none does not exist",
    ),
    "no concepts": ("tools/generate.py assets/teacher --prompt x --steer 3=8", "assets/teacher predicts no concepts"),
    "nothing to inspect": ("tools/inspect_concepts.py assets/teacher --text README.md", "predicts no concepts"),
    "nothing to serve": ("tools/serve.py assets/teacher --text README.md", "predicts no concepts"),
    "a curve of nothing": ("tools/evaluate.py steering assets/teacher", "predicts no concepts"),
    "an old name": (
        "launcher/pretrain.py --config configs/tiny.yaml parallel.gather=per_step",
        "parallel.gather is now parallel.reshard_after_forward (per_step is now false, per_microbatch is now true)",
    ),
    "nothing to upgrade": ("tools/upgrade_config.py assets", "no config.yaml and no checkpoint.json"),
    "nothing to convert": ("tools/convert_checkpoint.py assets --out x --to hf", "holds no model"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_clear_line_and_exit_2(checkout, mistake):
    command, what = MISTAKES[mistake]
    done = run_tool(command, checkout)
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2, done.stderr
    assert any(what in line for line in lines), done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun --nproc-per-node 2", "deepspeed --num_accelerators 2"])
def test_a_mistake_is_said_once_by_a_job_of_several_processes(checkout, launcher):
    command = f"{launcher} launcher/pretrain.py --config configs/tiny.yaml data.valid=nowhere run=runs/no-valid"
    done = run(command, checkout)
    assert done.returncode != 0
    assert (done.stdout + done.stderr).count("error: nowhere") == 1
    assert not (checkout / "runs/no-valid").exists()


@pytest.mark.slow
def test_a_finished_run_started_again_changes_nothing(checkout):
    if not (checkout / "data/wiki").exists():
        prepare = next(line for line in readme_commands(checkout) if "prepare_data" in line)
        assert run_tool(prepare.split(maxsplit=1)[1], checkout).returncode == 0
    command = f"launcher/pretrain.py --config configs/tiny.yaml run=runs/again method.name=ntp {SHORT}"
    assert run_tool(command, checkout).returncode == 0
    before = (checkout / "runs/again/metrics.jsonl").read_text()
    done = run_tool(command, checkout)
    assert done.returncode == 0
    assert "finished already" in done.stdout
    assert (checkout / "runs/again/metrics.jsonl").read_text() == before
