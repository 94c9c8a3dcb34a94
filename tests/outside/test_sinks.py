"""Weights & Biases and TensorBoard are optional: a run neither ends nor waits long because of them, and after a resume
they hold every step once."""

import json
import os
import resource
import shutil
import sys
import time
from types import SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import tiny
from jobs import train, train_all
from megacocomix.training import sinks
from megacocomix.training.metrics import is_validated
from megacocomix.training.sinks import Sinks
from processes import run_processes


class Wandb:
    """A stub of the module. `fails` names what raises or hangs, online or always."""

    Settings = SimpleNamespace

    def __init__(self, fails=(), starting_step=0, always=False):
        self.fails, self.starting_step, self.always = fails, starting_step, always
        self.starts, self.rows, self.closed = [], [], 0

    def login(self, prompt, verify):
        return bool(self._do("login", True))

    def teardown(self):
        self._do("teardown", False)

    def init(self, **options):
        mode = options["mode"] or os.environ.get("WANDB_MODE", "online")  # None: the user's own settings
        self.starts.append(options | {"mode": mode})
        is_online = mode == "online"
        self._do("init", is_online)

        def log(row, step):
            self._do("log", is_online)
            self.rows.append((mode, step, row))

        def finish():
            self._do("finish", is_online)
            self.closed += 1

        state = {"disabled": mode == "disabled", "offline": mode == "offline"}
        return SimpleNamespace(log=log, finish=finish, starting_step=self.starting_step if is_online else 0, **state)

    def _do(self, what, is_online):
        if what in self.fails and (is_online or self.always):
            if what == "finish":
                time.sleep(60)
            raise RuntimeError(f"{what}\nfailed.")
        return True


@pytest.fixture
def make(tmp_path, monkeypatch):
    """Make the sinks of a run with a stub of wandb; the list of the lines that they report is their `lines`."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(sinks, "MARGIN_SECONDS", 0.1)
    monkeypatch.setattr(sinks, "FINISH_SECONDS", 0.1)
    (tmp_path / "run").mkdir()

    def make(wandb, first_step=0, logged=(), **logging):
        monkeypatch.setitem(sys.modules, "wandb", wandb)
        config = tiny.config(tmp_path, "run", logging={"wandb": wandb is not False} | logging)
        lines = []
        made = Sinks(tmp_path / "run", config, first_step, list(logged), lines.append)
        made.lines = lines
        return made

    return make


def row(step, **values):
    return {"step": step, **(values or {"loss": 1.0})}


@pytest.mark.parametrize("what", ["login", "init", "log", "finish"])
def test_what_fails_online_goes_on_offline_with_the_same_id_and_is_said_once(make, what):
    wandb = Wandb([what])
    made = make(wandb)
    for step in (1, 2):
        made.log(row(step))
    begun = time.monotonic()
    made.close()
    assert time.monotonic() - begun < 10
    (line,) = made.lines
    assert line.startswith("warning: Weights & Biases failed: ")
    assert "\n" not in line
    if what == "finish":
        assert [step for _, step, _ in wandb.rows] == [1, 2]
        assert "off until the next start" in line
        return
    assert f"{what} failed; it goes on offline, wandb sync" in line
    assert [(mode, step) for mode, step, _ in wandb.rows] == [("offline", 1), ("offline", 2)]
    assert len({start["id"] for start in wandb.starts}) == 1
    assert wandb.closed == 1


@pytest.mark.parametrize("what", [["init"], ["log"], ["teardown", "log"]])
def test_what_fails_offline_too_is_off_and_is_said_once(make, what):
    made = make(Wandb(what, always=True))
    made.log(row(1))
    made.log(row(2))
    made.close()
    (line,) = made.lines
    assert "it is off until the next start. Training is not affected." in line


def test_packages_that_are_not_installed_are_off(make, monkeypatch):
    for module in ("tensorboard", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, module, None)
    made = make(None, tensorboard=True)
    made.log(row(1))
    made.close()
    assert [line.partition(":")[0] + line.partition(" failed")[0][8:] for line in made.lines] == [
        "warning Weights & Biases",
        "warning TensorBoard",
    ]


def test_a_start_online_waits_a_short_time_unless_the_user_sets_another(make, monkeypatch):
    wandb = Wandb()
    make(wandb)
    assert vars(wandb.starts[0]["settings"])["init_timeout"] == sinks.INIT_SECONDS <= 30
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "300")
    make(wandb)
    assert "init_timeout" not in vars(wandb.starts[1]["settings"])


def test_a_resumed_history_gets_no_step_twice_and_misses_none(make):
    """Killed after step 13, whose line wandb had not sent, and resumed from step 8."""
    logged = [row(step) for step in range(1, 14)] + [row(10, valid_loss=2.0)]
    make(Wandb())
    for wandb, sent in ((Wandb(starting_step=13), [13, 14, 15]), (Wandb(starting_step=0), [*range(9, 16)])):
        made = make(wandb, first_step=8, logged=logged)
        for step in range(9, 16):
            made.log(row(step))
        assert [step for _, step, _ in wandb.rows] == sent
        assert not made.lines


def test_offline_starts_hold_every_step_once(make, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    make(Wandb())
    wandb = Wandb()
    made = make(wandb, first_step=8, logged=[row(step) for step in range(1, 14)])
    for step in range(9, 16):
        made.log(row(step))
    assert [step for _, step, _ in wandb.rows] == [14, 15]


def test_a_validation_that_a_kill_prevented_is_logged_where_the_history_goes_on(make):
    make(Wandb())
    wandb = Wandb(starting_step=21)
    make(wandb, first_step=20, logged=[row(20)]).log(row(20, valid_loss=2.0))
    assert wandb.rows == [("online", 21, row(20, valid_loss=2.0))]


def test_a_sink_that_is_switched_on_later_gets_the_steps_that_are_repeated(make):
    wandb = Wandb()
    make(wandb, first_step=8, logged=[row(9)]).log(row(9))
    assert [step for _, step, _ in wandb.rows] == [9]


def scalars(run):
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return {tag: [event.step for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_holds_every_step_once_after_each_way_back(make, tmp_path):
    for first, last in ((0, 4), (0, 13), (8, 15), (15, 20)):
        made = make(False, first_step=first, tensorboard=True)
        for step in range(first + 1, last + 1):
            made.log(row(step))
            if step % 5 == 0:
                made.log(row(step, valid_loss=2.0))
        made.close()
        assert not made.lines
        time.sleep(1.1)  # files are ordered by the second in their names
    assert scalars(tmp_path / "run") == {
        "loss": [*range(1, 21)],
        "valid_loss": [5, 10, 15, 20],
        "step": sorted([*range(1, 21), 5, 10, 15, 20]),
    }


def fill_the_disk(folder):
    """No file may grow: TensorBoard fails in its own thread."""
    lines = []
    made = Sinks(folder / "full", tiny.config(folder, "full", logging={"tensorboard": True}), 0, [], lines.append)
    made.log(row(1))
    time.sleep(0.5)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1, resource.RLIM_INFINITY))
    try:
        for step in range(2, 100):
            made.log(row(step))
        made.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return lines


def test_a_disk_that_is_full_switches_tensorboard_off_without_a_traceback(tmp_path, capfd):
    (tmp_path / "full").mkdir()
    (lines,) = run_processes(1, fill_the_disk, tmp_path)
    assert len(lines) == 1
    assert "TensorBoard failed: [Errno 27] File too large; it is off" in lines[0]
    assert "Traceback" not in capfd.readouterr().err


def test_a_folder_that_cannot_be_made_switches_a_sink_off(make, tmp_path):
    (tmp_path / "run/tensorboard").write_text("")
    (tmp_path / "run/wandb_id").mkdir()
    made = make(Wandb(), tensorboard=True)
    made.log(row(1))
    made.close()
    assert len(made.lines) == 2


def train_without_network(config):
    os.environ |= {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "a" * 40, "WANDB_INIT_TIMEOUT": "1"}
    os.environ.pop("WANDB_MODE", None)
    begun = time.monotonic()
    return train(config), time.monotonic() - begun


@pytest.mark.slow
def test_a_run_without_network_trains_offline(folder, capfd):
    config = tiny.config(folder, "offline", training={"steps": 2}, logging={"wandb": True, "tensorboard": True})
    ((outcome, seconds),) = run_processes(1, train_without_network, config)
    assert outcome == (0, [])
    assert seconds < 90
    (offline,) = (folder / "offline/wandb").glob("offline-run-*")
    assert offline.name.endswith((folder / "offline/wandb_id").read_text())
    for text in (capfd.readouterr().out, (folder / "offline/logs/rank-00000.log").read_text()):
        assert text.count("Weights & Biases failed: ") == 1
    assert scalars(folder / "offline")["loss"] == [1, 2]


@pytest.mark.slow
def test_a_run_that_went_back_is_read_as_one(folder):
    def config(**training):
        return tiny.config(folder, "back", logging={"every": 1, "tensorboard": True}, training=training)

    run_processes(1, train_all, [config(stop_after=5)])
    shutil.rmtree(folder / "back/checkpoints/step-00000005")  # as if it had been killed
    time.sleep(1.1)
    assert run_processes(1, train_all, [config()]) == [[(0, [])]]
    assert scalars(folder / "back")["loss"] == [*range(1, 7)]
    lines = [json.loads(line) for line in (folder / "back/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 4, 5, 6]  # nothing is lost


@pytest.mark.parametrize(
    ("records", "is_done"),
    [
        ([row(6), row(6, valid_loss=2.0)], True),
        ([row(6), row(6, valid_loss=2.0), row(5), row(6)], False),
        ([row(6), row(6, valid_loss=2.0), row(5), row(6), row(6, valid_loss=2.0)], True),
        ([row(6)], False),
        ([], False),
    ],
)
def test_a_step_that_was_trained_again_is_not_validated_yet(tmp_path, records, is_done):
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert is_validated(tmp_path, 6) == is_done
