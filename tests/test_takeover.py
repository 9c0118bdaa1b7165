"""Taking over: the dead are noticed, the living are left alone, and of several newcomers one trains."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from tests.nursery import Nursery, Trainer
from tests.processes import ROOT, Workplace, wait_until
from tests.proofs import (
    Curves,
    assert_same_training,
    assert_whole,
    handle_of,
    journals,
    run_id_of,
    state,
    told,
    until_committed,
)
from tracked.training import default_run_key

# A file named `go` lets the training run to its end; before that every step takes a while.
EXPERIMENT = """
import threading
from dataclasses import dataclass
from pathlib import Path
import torch
from torch import nn
from torch.utils.data import TensorDataset
import tracked

@dataclass(frozen=True)
class Params:
    pause: float = 0.0

def build(params):
    inputs = torch.randn(64, 4, generator=torch.Generator().manual_seed(1))
    data = TensorDataset(inputs, inputs.sum(1, keepdim=True))
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.1), nn.Linear(8, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    pause = threading.Event()

    def loss(outputs, targets):
        if not Path("go").exists():
            pause.wait(params.pause)
        return nn.functional.mse_loss(outputs, targets)

    return tracked.Task(model=model, loss=loss, optimizer=optimizer, train_data=data, val_data=data, batch_size=8)
"""
SLOW = ("train", "experiment.py", "pause=0.05", "--epochs", "20", "--checkpoint-every", "5 steps")
FAST = ("train", "experiment.py", "--epochs", "20", "--checkpoint-every", "5 steps")


class Site:
    """Machines that share a server: each has a folder and a spool of its own."""

    def __init__(self, path: Path, uri: str, nursery: Nursery) -> None:
        self.path = path
        self.uri = uri
        self.nursery = nursery
        self.machines: list[Workplace] = []

    def machine(self, **env: str) -> Workplace:
        path = self.path / f"machine-{len(self.machines)}"
        path.mkdir()
        workplace = Workplace(path, self.uri, {"TRACKED_SENDER_IDLE": "30", **env})
        workplace.experiment(EXPERIMENT)
        self.machines.append(workplace)
        return workplace

    def training(self, machine: Workplace) -> tuple[Trainer, str, str]:
        """A slow training with a committed checkpoint: process, handle, run ID."""
        (machine.path / "go").unlink(missing_ok=True)
        trainer = self.nursery.start(machine, *SLOW)
        handle = handle_of(trainer)
        until_committed(machine, handle, 5)
        return trainer, handle, run_id_of(machine, handle)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, server_uri: str, nursery: Nursery) -> Iterator[Site]:
    site = Site(tmp_path_factory.mktemp("site"), server_uri, nursery)
    yield site
    for machine in site.machines:
        machine.close()


@pytest.fixture(scope="module")
def home(site: Site) -> Workplace:
    return site.machine()


@pytest.fixture(scope="module")
def away(site: Site) -> Workplace:
    return site.machine()


@pytest.fixture(scope="module")
def reference(site: Site, home: Workplace) -> tuple[Curves, dict[str, Any]]:
    run_id = site.nursery.run(home, *FAST, "--json").json["run_id"]
    return assert_whole(site.uri, run_id), state(site.uri, run_id)


def let_go(*machines: Workplace) -> None:
    for machine in machines:
        (machine.path / "go").touch()


def status(site: Site, run_id: str) -> tuple[str, str]:
    run = MlflowClient(site.uri).get_run(run_id)
    return run.info.status, run.data.tags["tracked.state"]


def until_crashed(site: Site, run_id: str) -> None:
    wait_until(lambda: status(site, run_id) == ("FAILED", "crashed"), "the crashed state")


def one_is_over(racers: list[Trainer]) -> None:
    wait_until(lambda: any(each.returncode is not None for each in racers), "the loser")


def test_a_killed_trainer_is_marked_as_crashed_within_seconds(site: Site, home: Workplace) -> None:
    trainer, _, run_id = site.training(home)
    assert status(site, run_id) == ("RUNNING", "running")
    trainer.kill()
    died = time.time()
    until_crashed(site, run_id)
    assert MlflowClient(site.uri).get_run(run_id).info.end_time / 1000 - died < 5


def test_a_living_run_is_refused_at_once_on_its_own_machine(site: Site, home: Workplace) -> None:
    trainer, handle, run_id = site.training(home)
    for word in (run_id, handle, run_id[:8]):
        result = site.nursery.run(home, "resume", word, check=False)
        assert result.returncode == 2, result
        assert f"process {trainer.pid}" in result.stderr
        assert "watching" not in result.stderr
    assert trainer.returncode is None
    trainer.kill()


def test_a_living_run_is_refused_elsewhere_with_its_holders_name(
    site: Site, home: Workplace, away: Workplace
) -> None:
    trainer, handle, run_id = site.training(home)
    result = site.nursery.run(away, "resume", run_id, check=False)
    assert result.returncode == 2, result
    assert f"process {trainer.pid}" in result.stderr
    assert "python -m tracked.run show" in result.stderr
    let_go(home)
    assert trainer.wait().returncode == 0
    assert told(home, handle)["attempt"] == 1
    assert_whole(site.uri, run_id)


def test_after_a_machines_death_a_resume_elsewhere_waits_for_the_heartbeat_and_goes_on(
    site: Site, reference: tuple[Curves, dict[str, Any]], away: Workplace
) -> None:
    lost = site.machine()
    trainer, _, run_id = site.training(lost)
    (sender,) = lost.sender_pids()
    os.kill(sender, signal.SIGSTOP)  # so that it does not mark the run before it dies, too
    trainer.kill()
    lost.end_senders()
    shutil.rmtree(lost.spool)
    assert status(site, run_id) == ("RUNNING", "running")
    let_go(away)
    result = site.nursery.run(away, "resume", run_id, "--json", env={"TRACKED_WATCH": "2"})
    assert "watching for 2 s" in result.stderr
    assert result.json["resumed_from"] >= 5
    assert_same_training(site.uri, run_id, reference)


def test_of_two_resumes_in_one_spool_one_trains(
    site: Site, home: Workplace, reference: tuple[Curves, dict[str, Any]]
) -> None:
    for _ in range(5):
        trainer, handle, run_id = site.training(home)
        trainer.kill()
        racers = [site.nursery.start(home, "resume", handle) for _ in range(2)]
        one_is_over(racers)
        let_go(home)
        codes = sorted(each.wait().returncode for each in racers)
        assert codes == [0, 2], [each.wait() for each in racers]
        assert_same_training(site.uri, run_id, reference)


def test_of_two_resumes_on_two_machines_one_trains(
    site: Site, home: Workplace, away: Workplace, reference: tuple[Curves, dict[str, Any]]
) -> None:
    for _ in range(5):
        (away.path / "go").unlink(missing_ok=True)
        trainer, _, run_id = site.training(home)
        trainer.kill()
        until_crashed(site, run_id)
        racers = [site.nursery.start(machine, "resume", run_id) for machine in (home, away)]
        one_is_over(racers)
        let_go(home, away)
        codes = sorted(each.wait().returncode for each in racers)
        assert codes == [0, 2], [each.wait() for each in racers]
        assert_same_training(site.uri, run_id, reference)


def test_an_older_attempts_spool_that_comes_back_is_discarded_and_said_so(
    site: Site, away: Workplace, reference: tuple[Curves, dict[str, Any]]
) -> None:
    lost = site.machine()
    trainer, handle, run_id = site.training(lost)
    (sender,) = lost.sender_pids()
    os.kill(sender, signal.SIGSTOP)
    before, journaled = told(lost, handle)["points"], journal_bytes(lost, handle)
    wait_until(lambda: journal_bytes(lost, handle) > journaled, "points that nobody delivers")
    trainer.kill()
    lost.end_senders()
    let_go(away)
    site.nursery.run(away, "resume", run_id)
    result = site.nursery.run(lost, "sync")
    assert journals(lost, handle) == []
    assert told(lost, handle)["points"] == before
    assert "taken over" in result.stderr or "discard" in result.stderr
    assert_same_training(site.uri, run_id, reference)


def journal_bytes(machine: Workplace, handle: str) -> int:
    return sum(path.stat().st_size for each in journals(machine, handle) for path in each.glob("*.log"))


def test_a_training_whose_machine_slept_while_another_took_over_leaves_and_says_so(
    site: Site, away: Workplace, reference: tuple[Curves, dict[str, Any]]
) -> None:
    asleep = site.machine()
    trainer, _, run_id = site.training(asleep)
    (sender,) = asleep.sender_pids()
    for pid in (trainer.pid, sender):
        os.kill(pid, signal.SIGSTOP)
    let_go(away)
    site.nursery.run(away, "resume", run_id)
    for pid in (sender, trainer.pid):
        os.kill(pid, signal.SIGCONT)
    result = trainer.wait()
    assert result.returncode == 2, result
    assert "taken over" in result.stderr
    assert_same_training(site.uri, run_id, reference)


CLAIM = """
import sys
from tracked.errors import RecordRejected, ServerUnavailable
from tracked.server import Server
uri, mark = sys.argv[1:]
server = Server(uri, timeout=30)
print(flush=True)
open_runs = sys.stdin.read().split()
while open_runs:
    try:
        server.log_params(open_runs[0], {"tracked.attempt.2": mark})
        print(open_runs[0], flush=True)
    except ServerUnavailable:
        continue  # both wrote at once: asked again, it says who was first
    except RecordRejected:
        pass
    del open_runs[0]
"""


def test_an_attempt_claimed_over_http_has_one_winner_of_two(server_uri: str) -> None:
    client = MlflowClient(server_uri)
    experiment = client.create_experiment(f"claims {uuid.uuid4().hex}")
    runs = [client.create_run(experiment).info.run_id for _ in range(40)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    rivals = [
        subprocess.Popen(
            [sys.executable, "-c", CLAIM, server_uri, mark],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=env,
        )
        for mark in ("left", "right")
    ]
    for rival in rivals:
        assert rival.stdout is not None
        rival.stdout.readline()
    won: dict[int, list[str]] = {}

    def race(number: int) -> None:
        won[number] = rivals[number].communicate(" ".join(runs))[0].split()

    threads = [threading.Thread(target=race, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(won[0] + won[1]) == sorted(runs)
    for run_id in runs:
        claimed = client.get_run(run_id).data.params["tracked.attempt.2"]
        assert claimed == ("left" if run_id in won[0] else "right")


def test_a_run_that_another_has_just_claimed_is_watched_and_left_to_it(site: Site, away: Workplace) -> None:
    run_id = site.nursery.run(away, *FAST, "--json").json["run_id"]
    client = MlflowClient(site.uri)
    client.log_param(run_id, "tracked.attempt.2", "another's")  # it is loading the checkpoint
    more = ("resume", run_id, "--epochs", "21")

    late = site.nursery.start(away, *more, env={"TRACKED_WATCH": "20"})
    wait_until(lambda: "watching for 20 s" in late.errors, "the watch")
    client.update_run(run_id, "RUNNING")
    client.set_tag(run_id, "mlflow.tracked.heartbeat", "1")
    result = late.wait()
    assert result.returncode == 2, result
    assert "is being trained by" in result.stderr

    # It falls silent: after its last points may have come, the run is free.
    client.update_run(run_id, "KILLED")
    assert site.nursery.run(away, *more, "--json", env={"TRACKED_WATCH": "2"}).json["state"] == "finished"
    params = client.get_run(run_id).data.params
    assert {name for name in params if name.startswith("tracked.attempt.")} == {
        "tracked.attempt.2",
        "tracked.attempt.3",
    }
    assert_whole(site.uri, run_id)


def test_a_resume_that_was_refused_here_keeps_the_next_one_not_waiting(site: Site, home: Workplace) -> None:
    run_id = site.nursery.run(home, *FAST, "--json").json["run_id"]
    refused = site.nursery.run(home, "resume", run_id, "--epochs", "21", "--seed", "5", check=False)
    assert "was trained with seed 0" in refused.stderr

    result = site.nursery.run(home, "resume", run_id, "--epochs", "21")

    assert "watching" not in result.stderr
    assert_whole(site.uri, run_id)


# Logs each loss one step late, as one does who does not want to wait for it; dies at step 13, once.
LATE = """
import os, signal, threading
from pathlib import Path
import torch
from torch.utils.data import TensorDataset
import tracked

def main(run, params):
    model = torch.nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    run.attach(model=model, optimizer=optimizer)
    inputs = torch.randn(64, 4, generator=torch.Generator().manual_seed(1))
    for (batch,) in run.batches(TensorDataset(inputs), batch_size=4):
        if "late" in run.state:
            run.log({"loss": run.state["late"]}, step=run.step - 1)
        if run.step == 13 and not Path("died").exists():
            Path("died").touch()
            while run._attempt.said().get("points", 0) < 12 or run._attempt.said().get("committed") != 10:
                threading.Event().wait(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        loss = model(batch).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.state["late"] = float(loss)
"""


PARAMS = """from dataclasses import dataclass

@dataclass(frozen=True)
class Params:
    lr: float = 0.01

def main"""


def test_points_that_are_logged_a_step_late_stand_once_after_a_resume(site: Site, home: Workplace) -> None:
    file = home.experiment(LATE, "late.py")
    trainer = site.nursery.start(home, "train", file, "--epochs", "2", "--checkpoint-every", "5 steps")
    handle = handle_of(trainer)
    assert trainer.wait().returncode == -signal.SIGKILL
    result = site.nursery.run(home, "resume", handle, "--json").json

    assert (result["resumed_from"], result["replayed_equal"]) == (10, 3)
    found = assert_whole(site.uri, result["run_id"])
    assert [step for step, _ in found["loss"]] == list(range(1, 32))


def test_a_keyed_run_that_died_before_its_first_checkpoint_is_followed_by_another(
    site: Site, home: Workplace
) -> None:
    once = "    if not Path('failed').exists():\n        Path('failed').touch()\n        raise OSError('no data')\n"
    file = home.experiment(EXPERIMENT.replace("    inputs =", once + "    inputs =", 1), "keyed.py")
    line = ("train", file, "--epochs", "1", "--run-key", uuid.uuid4().hex, "--json")

    assert site.nursery.run(home, *line, check=False).returncode == 1
    let_go(home)
    second = site.nursery.run(home, *line)

    assert "ended before its first checkpoint; a new one begins" in second.stderr
    assert second.json["state"] == "finished"


def test_a_key_stands_for_one_training(site: Site, home: Workplace) -> None:
    let_go(home)
    key = f"it's {uuid.uuid4().hex}"
    line = ("train", "experiment.py", "--run-key", key, "--json", "--epochs")
    first = site.nursery.run(home, *line, "1").json["run_id"]

    again = site.nursery.run(home, *line, "1")
    longer = site.nursery.run(home, *line, "2").json
    other = site.nursery.run(home, *line, "1", "pause=0.5", check=False)

    assert "nothing is left to do" in again.stderr
    assert (longer["run_id"], longer["epoch"]) == (first, 2)
    assert other.returncode == 2
    assert "pause=0.0, not 0.5" in other.stderr


def test_the_key_of_a_job_is_that_of_the_line_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "71")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")

    one, again, other = (default_run_key(["train", name]) for name in ("a.py", "a.py", "b.py"))

    assert one == again != other
    assert one is not None
    assert one.startswith("slurm-71-3-")


# A rate that halves at step 7, in the thin loop or in a loop of one's own.
SCHEDULED = """
from dataclasses import dataclass
import torch
from torch.nn import functional
from torch.utils.data import TensorDataset
import tracked

@dataclass(frozen=True)
class Params:
    lr: float = 0.1

INPUTS = torch.randn(16, 4, generator=torch.Generator().manual_seed(1))
DATA = TensorDataset(INPUTS, INPUTS.sum(1, keepdim=True))

def parts(params):
    model = torch.nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=params.lr)
    return model, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 6, 0.5)
"""
LOOPS = {
    "the thin loop": """
def build(params):
    model, optimizer, scheduler = parts(params)
    return tracked.Task(
        model=model, loss=functional.mse_loss, optimizer=optimizer, scheduler=scheduler,
        scheduler_interval="step", train_data=DATA, batch_size=4,
    )
""",
    "an own loop": """
def main(run, params):
    model, optimizer, scheduler = parts(params)
    run.attach(model=model, optimizer=optimizer, scheduler=scheduler)
    for x, y in run.batches(DATA, batch_size=4):
        run.log({"lr": optimizer.param_groups[0]["lr"]})
        loss = functional.mse_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
""",
}


@pytest.mark.parametrize("loop", LOOPS)
def test_an_overridden_rate_holds_from_the_checkpoint_on(site: Site, home: Workplace, loop: str) -> None:
    file = home.experiment(SCHEDULED + LOOPS[loop], "scheduled.py")
    run_id = site.nursery.run(home, "train", file, "--epochs", "1", "--json").json["run_id"]
    site.nursery.run(home, "resume", run_id, "lr=0.4", "--epochs", "2")
    result = site.nursery.run(home, "resume", run_id, "--epochs", "3", "--json").json

    assert (result["resumed_from"], result["step"]) == (8, 12)
    rates = dict(assert_whole(site.uri, run_id)["lr"])
    given = {1: 0.1, 5: 0.4, 7: 0.2}
    every = {step: given[max(each for each in given if each <= step)] for step in range(1, 13)}
    expected = given if loop == "the thin loop" else every
    assert rates == pytest.approx(expected)
    tag = json.loads(MlflowClient(site.uri).get_run(run_id).data.tags["mlflow.tracked.override"])
    assert tag == {"step": 4, "params": {"lr": [0.1, 0.4]}, "settings": {}}
    assert state(site.uri, run_id)["params"] == {"lr": 0.4}


def test_an_override_is_refused_where_points_stand_beyond_the_checkpoint(site: Site, home: Workplace) -> None:
    text = LATE.replace("def main", PARAMS, 1).replace("lr=0.01", "lr=params.lr")
    file = home.experiment(text.replace("died", "refused"), "late.py")
    trainer = site.nursery.start(home, "train", file, "--epochs", "2", "--checkpoint-every", "5 steps")
    handle = handle_of(trainer)
    assert trainer.wait().returncode == -signal.SIGKILL

    refused = site.nursery.run(home, "resume", handle, "lr=0.5", check=False)
    assert refused.returncode == 2
    assert (
        "lr cannot be changed here: points up to step 12 stand beyond the checkpoint of step 10"
        in refused.stderr
    )
    result = site.nursery.run(home, "resume", handle, "--json").json
    assert (result["resumed_from"], result["replayed_equal"], result["state"]) == (10, 3, "finished")
    assert_whole(site.uri, result["run_id"])


def test_an_override_killed_before_its_first_checkpoint_is_gone_on_with(site: Site, home: Workplace) -> None:
    text = LATE.replace("def main", PARAMS, 1).replace("lr=0.01", "lr=params.lr").replace("< 12", "< 3")
    file = home.experiment(text.replace("died", "overridden"), "late.py")
    line = ("train", file, "--max-steps", "10", "--checkpoint-every", "5 steps", "--json")
    run_id = site.nursery.run(home, *line).json["run_id"]
    killed = site.nursery.run(home, "resume", run_id, "lr=0.5", "--max-steps", "31", check=False)
    assert killed.returncode == -signal.SIGKILL

    for other in ("lr=0.9", "lr=0.01"):  # the second is what the checkpoint was trained with
        refused = site.nursery.run(home, "resume", run_id, other, check=False)
        assert "lr cannot be changed here" in refused.stderr
    resumed = site.nursery.run(home, "resume", run_id, "--json")
    assert "with lr=0.5 (was 0.01)" in resumed.stderr
    result = resumed.json
    assert (result["resumed_from"], result["replayed_equal"], result["state"]) == (10, 3, "finished")
    assert state(site.uri, run_id)["params"] == {"lr": 0.5}

    straight = site.nursery.run(home, *line).json["run_id"]
    client = MlflowClient(site.uri)
    client.set_tag(straight, "mlflow.tracked.override", '{"step": 10, "par')  # cut, or edited
    site.nursery.run(home, "resume", straight, "lr=0.5", "--max-steps", "31")
    assert assert_whole(site.uri, run_id) == assert_whole(site.uri, straight)


def test_patience_that_comes_with_a_resume_elsewhere_finds_the_best_weights(
    site: Site, home: Workplace, away: Workplace
) -> None:
    text = SCHEDULED + LOOPS["the thin loop"].replace("train_data=DATA", "train_data=DATA, val_data=DATA")
    file = home.experiment(text, "patient.py")
    away.experiment(text, "patient.py")
    line = ("--epochs", "3", "--min-delta", "1e6", "--keep-last", "1", "--json")
    run_id = site.nursery.run(home, "train", file, *line).json["run_id"]

    result = site.nursery.run(away, "resume", run_id, "--epochs", "9", "--patience", "3", "--json").json

    assert (result["state"], result["epoch"]) == ("stopped_early", 4)
    found = assert_whole(site.uri, run_id)
    assert found["best/val/loss"] == [(16, found["val/loss"][0][1])]
