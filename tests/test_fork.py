"""`fork`: a new run from a checkpoint of another, with its history, and with the same bits from there on."""

from __future__ import annotations

import json
import signal
import sqlite3
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient

import tracked
from tests.nursery import Nursery
from tests.processes import Workplace, wait_until
from tests.proofs import (
    Curves,
    assert_whole,
    curves,
    handle_of,
    run_id_of,
    state,
    until_committed,
)
from tests.test_commands import place_of, silent
from tracked import inspection, verification
from tracked.errors import CheckpointError
from tracked.forking import find_origin
from tracked.packing import Point, records, unpack
from tracked.server import Server
from tracked.training import compare_states

# Logs a key one step late, and what is no number. It waits for every third step's checkpoint, and at step 5 while there
# is a file `wait`; where there is a file `die` it dies two steps behind the checkpoint in it, once that is committed.
EXPERIMENT = """
import math, os, signal, threading
from dataclasses import dataclass
from pathlib import Path
import torch
from torch import nn
from torch.utils.data import TensorDataset
import tracked

@dataclass(frozen=True)
class Params:
    lr: float = 0.1
    width: int = 4

INPUTS = torch.randn(24, 4, generator=torch.Generator().manual_seed(1))

def main(run, params):
    model = nn.Sequential(nn.Linear(4, params.width), nn.Dropout(0.2), nn.Linear(params.width, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=params.lr)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 5, 0.5)
    run.attach(model=model, optimizer=optimizer, scheduler=scheduler)
    for (batch,) in run.batches(TensorDataset(INPUTS), batch_size=5):
        if "late" in run.state:
            run.log({"late": run.state["late"]}, step=run.step - 1)
        run.log({"lr": optimizer.param_groups[0]["lr"], "odd": [math.nan, math.inf, -math.inf, -0.0][run.step % 4]})
        kept = run._attempt.folder.checkpoints / f"step-{run.step - 1:08d}"
        while (run.step % 3 == 1 and not kept.exists()) or (run.step == 5 and Path("wait").exists()):
            threading.Event().wait(0.005)
        if Path("die").exists() and run.step == int(Path("die").read_text()) + 2:
            Path("die").unlink()
            while run._attempt.said().get("committed") != run.step - 2 or run.pending() > 2:
                threading.Event().wait(0.02)
            os.kill(os.getpid(), signal.SIGKILL)
        loss = (model(batch) - batch.sum(1, keepdim=True)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        run.state["late"] = loss.item()
"""
BOOKKEEPING = {"checkpoints", "about", "settings"}
LENGTH = ("--max-steps", "12", "--checkpoint-every", "3 steps", "--keep-last", "10", "--json")


@dataclass
class Source:
    """A run that was trained to step 12, with checkpoints of the steps 0, 3, 6, 9 and 12; tests only fork it."""

    workplace: Workplace
    run_id: str
    reference: tuple[Curves, dict[str, Any]]

    @property
    def uri(self) -> str:
        return self.workplace.tracking_uri

    def fork(self, *options: object) -> str:
        """The ID of a new run from this one."""
        return str(self.workplace.tracked("fork", self.run_id, *options, "--json").json["run_id"])

    def runs(self) -> tuple[int, int]:
        """How many runs there are on the server, and in the spool."""
        spooled = [run for outbox in self.workplace.outboxes() for run in outbox.runs()]
        return len(Server(self.uri, timeout=30).search()), len(spooled)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, nursery: Nursery) -> Iterator[Source]:
    path = tmp_path_factory.mktemp("forked")
    workplace = Workplace(path, f"sqlite:///{path}/mlruns/mlflow.db", nursery=nursery)
    workplace.experiment(EXPERIMENT)
    run_id = workplace.tracked("train", "experiment.py", *LENGTH).json["run_id"]
    reference = assert_whole(workplace.tracking_uri, run_id), state(workplace.tracking_uri, run_id)
    yield Source(workplace, run_id, reference)
    workplace.close()


def stamped(uri: str, run_id: str, until: int) -> set[Point]:
    """The points up to a step, with their times; NaN as a text, which equals itself."""
    client = MlflowClient(uri)
    return {
        (key, point.step, point.timestamp, repr(point.value))  # type: ignore[misc]
        for key in client.get_run(run_id).data.metrics
        for point in client.get_metric_history(run_id, key)
        if point.step <= until
    }


def tags(uri: str, run_id: str) -> dict[str, str]:
    return dict(MlflowClient(uri).get_run(run_id).data.tags)


def assert_same(uri: str, run_id: str, reference: tuple[Curves, dict[str, Any]]) -> None:
    """The run is whole, and history and final state are those of the reference, to the last bit."""
    assert repr(sorted(assert_whole(uri, run_id).items())) == repr(sorted(reference[0].items()))
    ours, theirs = (
        {key: value for key, value in each.items() if key not in BOOKKEEPING}
        for each in (state(uri, run_id), reference[1])
    )
    compared, wrong = compare_states(ours, theirs)
    assert compared > 10
    assert wrong == []


def test_a_fork_from_an_earlier_step_ends_in_the_same_bits_on_a_machine_with_an_empty_disk(
    source: Source, tmp_path: Path
) -> None:
    away = Workplace(tmp_path, source.uri, nursery=source.workplace.nursery)
    away.experiment(EXPERIMENT)
    try:
        result = away.tracked("fork", source.run_id, "--step", 6, "--json").json
        proof = verification.verify(place_of(away), result["run_id"], silent)
    finally:
        away.close()

    assert (result["resumed_from"], result["step"], result["state"]) == (6, 12, "finished")
    assert result["run_id"] != source.run_id
    assert_same(source.uri, result["run_id"], source.reference)
    assert proof.wrong == []
    points = sum(map(len, source.reference[0].values()))
    assert proof.proven[-1] == f"the training logged {points} points, and so many are there"
    # The late key has its point of step 6 from the fork's own training.
    before = {point for point in stamped(source.uri, source.run_id, 6) if point[:2] != ("late", 6)}
    assert len(before) == 3 * 6 - 1
    assert before <= stamped(source.uri, result["run_id"], 6)


def test_both_runs_name_each_other(source: Source) -> None:
    forks = [source.fork("--step", 9), source.fork("--step", 6, "lr=0.05", "--run-name", "slower")]

    of_source = tags(source.uri, source.run_id)
    assert {name: of_source[f"mlflow.tracked.fork.{name}"] for name in forks} == dict(
        zip(forks, "96", strict=True)
    )
    found = [tags(source.uri, run_id) for run_id in forks]
    assert [json.loads(each["mlflow.tracked.forked_from"]) for each in found] == [
        {"run_id": source.run_id, "step": 9, "params": {}, "settings": {}},
        {"run_id": source.run_id, "step": 6, "params": {"lr": [0.1, 0.05]}, "settings": {}},
    ]
    assert found[1]["tracked.forked_from"] == f"{source.run_id} at step 6, with lr=0.05 (was 0.1)"
    slower = MlflowClient(source.uri).get_run(forks[1])
    assert slower.info.run_name == "slower"
    assert slower.info.experiment_id == MlflowClient(source.uri).get_run(source.run_id).info.experiment_id
    assert slower.data.params["lr"] == "0.05"
    assert slower.data.params["loop.max_steps"] == "12"
    details = [
        inspection.look(place_of(source.workplace), word, silent) for word in (source.run_id, forks[0])
    ]
    assert {*forks} <= {*details[0].facts["forked into"].split(", ")}
    assert details[1].facts["forked from"] == f"{source.run_id} at step 9"


def test_a_changed_fork_is_what_a_changed_resume_would_have_been(source: Source) -> None:
    twin = source.fork("--step", 9)
    more = ("lr=0.5", "--max-steps", "18")
    source.workplace.tracked("resume", twin, *more)
    fork = source.fork(*more)

    assert_same(source.uri, fork, (assert_whole(source.uri, twin), state(source.uri, twin)))
    assert dict(curves(source.uri, fork)["lr"])[13] == 0.125
    assert state(source.uri, fork)["params"] == {"lr": 0.5, "width": 4}
    # Its twin goes on with 0.5 from step 12, and so does what is forked from there, like any later one.
    third = source.workplace.tracked("fork", twin, "--step", 12, "--json")
    assert "lr=0.5 (was 0.1)" in third.stderr
    assert_same(source.uri, third.json["run_id"], (curves(source.uri, fork), state(source.uri, fork)))


@pytest.mark.parametrize("committed", [6, 9])
def test_a_fork_that_is_killed_soon_is_resumed_by_its_own_id(source: Source, committed: int) -> None:
    """Killed before its first checkpoint of its own making, and after it."""
    place = source.workplace
    (place.path / "die").write_text(str(committed))
    assert place.nursery is not None
    killed = place.nursery.start(place, "fork", source.run_id, "lr=0.3", "--step", "6")
    handle = handle_of(killed)
    assert killed.wait().returncode == -signal.SIGKILL
    run_id = run_id_of(place, handle)
    refused = place.tracked("resume", run_id, "lr=0.2", check=False)
    assert refused.returncode == 2
    assert f"python -m tracked.run fork {run_id} --step {committed} lr=0.2\n" in refused.stderr
    result = place.tracked("resume", run_id, "--json").json

    assert (result["resumed_from"], result["state"]) == (committed, "finished")
    assert result["replayed_equal"] > 0
    straight = source.fork("--step", 6, "lr=0.3")
    assert_same(source.uri, run_id, (curves(source.uri, straight), state(source.uri, straight)))


def test_a_run_that_is_being_trained_is_forked_and_goes_on_undisturbed(source: Source) -> None:
    place = source.workplace
    (place.path / "wait").touch()
    assert place.nursery is not None
    training = place.nursery.start(place, "train", "experiment.py", *LENGTH)
    handle = handle_of(training)
    until_committed(place, handle, 3)
    forked = place.nursery.start(place, "fork", handle, "--json")
    wait_until(lambda: " is forked from run " in forked.errors or forked.returncode is not None, "the fork")
    assert training.returncode is None
    (place.path / "wait").unlink()

    assert forked.wait().json["resumed_from"] == 3
    assert training.wait().returncode == 0
    for run_id in (forked.wait().json["run_id"], training.wait().json["run_id"]):
        assert_same(source.uri, run_id, source.reference)


def test_a_history_that_is_not_whole_is_copied_as_it_stands_and_said_so(source: Source) -> None:
    damaged = source.fork("--step", 9)
    MlflowClient(source.uri).log_metric(damaged, "lr", 0.7, timestamp=1, step=2)
    with sqlite3.connect(source.uri.removeprefix("sqlite:///")) as database:
        database.execute("DELETE FROM metrics WHERE run_uuid = ? AND key = 'odd' AND step = 5", (damaged,))
    said: list[str] = []

    origin = find_origin(place_of(source.workplace), damaged, said.append, step=9)

    points = [point[:2] for body in origin.history for point in unpack(body)]
    assert sorted(points) == sorted(
        {("lr", step) for step in range(1, 10)}
        | {("late", step) for step in range(1, 9)}
        | {("odd", step) for step in range(1, 10) if step != 5}
    )
    assert origin.state["points"]["counts"] == {"lr": 9, "late": 8, "odd": 8}
    assert len(said) == 1
    assert f"python -m tracked.run verify {damaged}" in said[0]


def test_a_long_history_is_journaled_in_small_records() -> None:
    points: list[Point] = [("a", step, 1, float(step)) for step in range(1, 1202)]

    bodies = list(records(points))

    assert [body["count"] for body in bodies] == [500, 500, 201]
    assert [point for body in bodies for point in unpack(body)] == points
    assert list(records([])) == []


# The thin loop, whose patience ends at step 8 with its best at step 2.
PATIENT = """
from dataclasses import dataclass
import torch
from torch import nn
from torch.utils.data import TensorDataset
import tracked

@dataclass(frozen=True)
class Params:
    width: int = 4
    rates: int = 1

INPUTS = torch.randn(24, 4, generator=torch.Generator().manual_seed(1))
DATA = TensorDataset(INPUTS, INPUTS.sum(1, keepdim=True))

def build(params):
    model = nn.Sequential(nn.Linear(4, params.width), nn.Dropout(0.2), nn.Linear(params.width, 1))
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters()}]
    optimizer = torch.optim.Adam(model.parameters() if params.rates == 1 else groups)
    return tracked.Task(
        model=model, loss=nn.functional.mse_loss, optimizer=optimizer, train_data=DATA, val_data=DATA, batch_size=6)
"""


def test_a_fork_that_runs_out_of_patience_has_the_best_weights_of_before(
    workplace: Workplace, tmp_path: Path
) -> None:
    workplace.experiment(PATIENT)
    options = ("--patience", 3, "--min-delta", 1e6, "--eval-every", "2 steps", "--json", "--max-steps")
    uri = workplace.tracking_uri
    straight = workplace.tracked("train", "experiment.py", *options, 36).json["run_id"]
    reference = assert_whole(uri, straight), state(uri, straight)
    source_id = workplace.tracked("train", "experiment.py", *options, 6).json["run_id"]
    result = workplace.tracked("fork", source_id, "--max-steps", 36, "--json").json
    to = tmp_path / "best"
    workplace.tracked("export", result["run_id"], "--form", "weights", "--to", to, "--best")

    assert (result["state"], result["step"]) == ("stopped_early", 8)
    assert dict(reference[0]["best/val/loss"]) == {8: dict(reference[0]["val/loss"])[2]}
    assert_same(uri, result["run_id"], reference)
    assert (
        workplace.tracked("verify", result["run_id"]).stdout.count("checkpoint of step") == 3
    )  # of 2, 6 and 8
    best = torch.load(to / "model.pt", weights_only=True)
    assert compare_states(best, reference[1]["model_state_dict"])[1] != []

    # What does not fit the checkpoint is told before there is a run.
    before = len(Server(uri, timeout=30).search())
    for word, said in (
        ("width=5", "model: 0.weight is (4, 4) in"),
        ("rates=2", "parameters lie in other groups"),
    ):
        refused = workplace.tracked("fork", source_id, "--max-steps", 36, word, check=False)
        assert refused.returncode == 1
        assert said in refused.stderr
    assert len(Server(uri, timeout=30).search()) == before

    # A fork that died before its first checkpoint can be made again.
    died = (
        MlflowClient(uri)
        .create_run(
            "0",
            tags={
                "mlflow.tracked.handle": "cd" * 16,
                "tracked.state": "failed",
                "mlflow.tracked.forked_from": json.dumps(
                    {"run_id": source_id, "step": 6, "params": {}, "settings": {}}
                ),
            },
        )
        .info.run_id
    )
    MlflowClient(uri).set_terminated(died, "FAILED")
    refused = workplace.tracked("resume", died, "--file", "experiment.py", check=False)
    assert f"try: python -m tracked.run fork {source_id} --step 6\n" in refused.stderr


# -- what cannot be forked


@pytest.mark.parametrize(
    ("options", "status", "found"),
    [
        (
            ["--step", 7],
            1,
            "no committed checkpoint of step 7\n  expected: one of 0, 3, 6, 9, 12\n  try: --step 6, ",
        ),
        (["--step", 8], 1, "try: --step 9, which is the nearest"),
        (["--step", 400], 1, "try: --step 12, which is the nearest"),
        ([], 2, "is finished at step 12: nothing is left to do"),
        (["--step", 12], 2, "expected: an earlier checkpoint, with --step N, or a longer training"),
        (["--step", 6, "rate=1"], 2, "rate"),
        (["--step", 6, "lr=fast"], 2, "lr=fast cannot be read"),
        (["--step", 6, "--seed", 5], 2, "was trained with seed 0"),
        (["--step", 6, "--device", "cuda:77"], 2, "the device 'cuda:77' cannot be used"),
        (["--step", 6, "--file", "nowhere.py"], 2, "nowhere.py"),
        (["--step", "six"], 2, "'six' is not a valid integer"),
    ],
)
def test_what_cannot_be_forked_is_refused_and_no_run_is_left_behind(
    source: Source, options: list[object], status: int, found: str
) -> None:
    before = source.runs()

    result = source.workplace.tracked("fork", source.run_id, *options, check=False)

    assert result.returncode == status, result
    assert found in result.stderr
    assert "Traceback" not in result.stderr
    assert source.runs() == before


def test_other_peoples_runs_and_those_without_a_checkpoint_are_refused(source: Source) -> None:
    client = MlflowClient(source.uri)
    foreign = client.create_run("0").info.run_id
    empty = client.create_run("0", tags={"mlflow.tracked.handle": "ab" * 16}).info.run_id
    before = source.runs()

    results = [
        source.workplace.tracked("fork", word, "--file", "experiment.py", check=False)
        for word in (foreign, empty, "nobodys")
    ]

    assert [result.returncode for result in results] == [1, 1, 2]
    said = ("was not made by this package", "has no checkpoint", "there is no run 'nobodys'")
    for result, text in zip(results, said, strict=True):
        assert text in result.stderr
        assert "Traceback" not in result.stderr
    assert source.runs() == before


# -- scripts


def test_a_script_is_given_what_to_fork(source: Source) -> None:
    script = (sys.executable, "-c", "import os; print(os.environ['TRACKED_FORK'])")

    last, sixth = (
        source.workplace.tracked("fork", source.run_id, *step, "--", *script) for step in ((), ("--step", 6))
    )
    refused = source.workplace.tracked("fork", "last", "--run-name", "mine", "--", *script, check=False)

    assert last.stdout == f"{source.run_id}@\n"
    assert sixth.stdout == f"{source.run_id}@6\n"
    assert refused.returncode == 2
    assert "run_name cannot be given to a script" in refused.stderr
    assert "python -m tracked.run fork last -- " in refused.stderr


def test_a_script_forks_as_exactly(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    space: dict[str, Any] = {"__name__": "script"}
    sys.modules["script"] = tracked  # where dataclasses looks for the names of its module
    try:
        exec(EXPERIMENT, space)
    finally:
        del sys.modules["script"]
    place = place_of(source.workplace)
    monkeypatch.chdir(source.workplace.path)
    monkeypatch.setenv("TRACKED_FORK", f"{source.run_id}@6")
    options: dict[str, Any] = {
        "tracking_uri": place.tracking_uri,
        "spool_dir": place.spool,
        "progress": False,
    }

    torch.manual_seed(77)
    with tracked.start("experiment", space["Params"](), **options) as run:
        space["main"](run, space["Params"]())

    assert (run.resumed_from, run.attempt) == (6, 1)
    assert_same(source.uri, run.id, source.reference)
    monkeypatch.setenv("TRACKED_FORK", "latest")
    with pytest.raises(tracked.TrackedError, match="TRACKED_FORK is 'latest'"):
        tracked.start("experiment", **options)
    monkeypatch.setenv("TRACKED_FORK", f"{source.run_id}@7")
    with pytest.raises(CheckpointError, match="no committed checkpoint of step 7"):
        tracked.start("experiment", **options)
