"""Kill at a named instant, and resume: the same weights and the same curves as if nothing had happened."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.nursery import Nursery, Trainer
from tests.processes import Workplace
from tests.proofs import (
    Curves,
    assert_same_training,
    assert_whole,
    curves,
    handle_of,
    local_handle,
    only_run,
    run_id_of,
    state,
    told,
    until_committed,
)
from tracked.spool import Lock, open_outbox

# Five epochs of 8 steps. At `die` ("step 9", "evaluation 12": the 12th batch that is evaluated) it waits until a
# checkpoint is committed and the points so far are delivered, and ends itself, once.
EXPERIMENT = """
import json, os, signal, threading
from dataclasses import dataclass
from pathlib import Path
import torch
from torch import nn
from torch.utils.data import TensorDataset
import tracked

@dataclass(frozen=True)
class Params:
    die: str = ""
    points: int = 0
    committed: int = 0

def abouts():
    found = Path("mlruns/spool").glob("*/*/runs/*/run.json")
    return [json.loads(path.read_text()) for path in found if list(path.parent.glob("attempt-*"))]

def build(params):
    inputs = torch.randn(64, 4, generator=torch.Generator().manual_seed(1))
    data = TensorDataset(inputs, inputs.sum(1, keepdim=True))
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.1), nn.Linear(8, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5)
    calls = {"step": 0, "evaluation": 0}
    flag = Path("died " + params.die)

    def loss(outputs, targets):
        kind = "step" if outputs.requires_grad else "evaluation"
        calls[kind] += 1
        if params.die == f"{kind} {calls[kind]}" and not flag.exists():
            flag.touch()
            while not any(
                about.get("points", 0) >= params.points and about.get("committed", -1) >= params.committed
                for about in abouts()
            ):
                threading.Event().wait(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        return nn.functional.mse_loss(outputs, targets)

    return tracked.Task(
        model=model, loss=loss, optimizer=optimizer, scheduler=scheduler, train_data=data, val_data=data, batch_size=8
    )
"""
LINE = ("--epochs", "5", "--checkpoint-every", "1 epoch", "--checkpoint-every", "3 steps")


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory, nursery: Nursery) -> Iterator[Workplace]:
    """A workplace whose runs share one sender over many tests."""
    path = tmp_path_factory.mktemp("lab")
    workplace = Workplace(path, f"sqlite:///{path}/mlruns/mlflow.db", {"TRACKED_SENDER_IDLE": "30"})
    workplace.experiment(EXPERIMENT)
    yield workplace
    workplace.close()


@pytest.fixture(scope="module")
def reference(lab: Workplace, nursery: Nursery) -> tuple[Curves, dict[str, Any]]:
    """History and final state of the run that nobody killed."""
    run_id = nursery.run(lab, "train", "experiment.py", *LINE, "--json").json["run_id"]
    return assert_whole(lab.tracking_uri, run_id), state(lab.tracking_uri, run_id)


def killed(trainer: Trainer) -> str:
    """Let a training die as its experiment wants; its local handle."""
    result = trainer.wait()
    assert result.returncode == -signal.SIGKILL, result
    return local_handle(result.stderr)


@pytest.mark.parametrize(
    ("die", "delivered"),
    [
        ("step 4", 3),  # one step behind a checkpoint between two epochs
        ("step 8", 7),  # the last step of an epoch
        ("step 9", 9),  # the first of the next, evaluation and checkpoint just done
        ("step 10", 10),
        ("step 40", 40),  # the very last
        ("evaluation 1", 8),
        ("evaluation 12", 17),  # in the middle of an evaluation
        ("evaluation 40", 44),  # the last batch of all
    ],
)
def test_a_trainer_killed_around_a_boundary_resumes_to_the_same_bits(
    lab: Workplace, nursery: Nursery, reference: tuple[Curves, dict[str, Any]], die: str, delivered: int
) -> None:
    line = ["train", "experiment.py", f"die={die}", f"points={delivered}", *LINE]
    handle = killed(nursery.start(lab, *line))
    result = nursery.run(lab, "resume", handle, "--json").json
    assert result["state"] == "finished"
    assert result["run_id"] == run_id_of(lab, handle)
    assert result["resumed_from"] is not None
    assert_same_training(lab.tracking_uri, result["run_id"], reference)


def test_points_delivered_beyond_the_checkpoint_are_recomputed_found_equal_and_not_sent_again(
    lab: Workplace, nursery: Nursery, reference: tuple[Curves, dict[str, Any]]
) -> None:
    line = [
        "train",
        "experiment.py",
        "die=step 14",
        "points=17",
        "committed=8",
        "--epochs",
        "5",
        "--checkpoint-every",
        "1 epoch",
    ]
    handle = killed(nursery.start(lab, *line))
    result = nursery.run(lab, "resume", handle, "--json").json
    assert result["resumed_from"] == 8
    assert result["replayed_equal"] >= 5  # the losses of the steps 9 to 13
    assert_same_training(lab.tracking_uri, result["run_id"], reference)


def test_a_training_killed_five_times_is_the_one_that_was_never_killed(
    lab: Workplace, nursery: Nursery, reference: tuple[Curves, dict[str, Any]]
) -> None:
    handle = killed(nursery.start(lab, "train", "experiment.py", "die=step 5", *LINE))
    for _ in range(4):
        # The experiment counts calls from where a process starts, so each attempt gets on by four steps.
        (lab.path / "died step 5").unlink()
        killed(nursery.start(lab, "resume", handle))
    result = nursery.run(lab, "resume", handle, "--json").json
    attempt = told(lab, handle)["attempt"]
    assert attempt == 6
    assert_same_training(lab.tracking_uri, result["run_id"], reference)


@pytest.mark.parametrize(
    "point",
    [
        "archive.before-write@2",
        "archive.before-rename.checkpoint.pt@2",
        "archive.before-rename.manifest.json@2",
    ],
)
def test_a_killed_writing_process_costs_no_checkpoint(
    lab: Workplace, nursery: Nursery, reference: tuple[Curves, dict[str, Any]], point: str
) -> None:
    env = {"TRACKED_FAILPOINT": point}
    result = nursery.run(lab, "train", "experiment.py", *LINE, "--json", env=env)
    assert "could not be written" not in result.stderr
    assert_same_training(lab.tracking_uri, result.json["run_id"], reference)


@pytest.mark.parametrize(
    "point",
    [
        "sender.run-created@1",
        "sender.before-acknowledge@1",
        "sender.before-upload@2",
        "sender.mid-upload@2",
        "sender.before-tag@2",
        "sender.before-prune@3",
    ],
)
def test_a_sender_killed_at_a_named_point_loses_nothing_and_sends_nothing_twice(
    tmp_path: Path, nursery: Nursery, reference: tuple[Curves, dict[str, Any]], point: str
) -> None:
    workplace = Workplace(tmp_path, f"sqlite:///{tmp_path}/mlruns/mlflow.db")
    workplace.experiment(EXPERIMENT)
    try:
        outbox = open_outbox(workplace.spool, workplace.tracking_uri)
        lock = Lock(outbox.sender_lock)
        assert lock.acquire()  # so that the training starts no sender of its own
        result = nursery.run(workplace, "train", "experiment.py", *LINE, "--drain-timeout", "0", check=False)
        assert result.returncode == 3, result
        lock.release()
        sender = nursery.start_sender(workplace, {"TRACKED_FAILPOINT": point})
        assert sender.wait().returncode == -signal.SIGKILL
        handle = local_handle(result.stderr)
        # Delivers what is in the spool, finds the run complete, and leaves.
        result = nursery.run(workplace, "resume", handle)
        assert "nothing is left to do" in result.stderr
        assert_same_training(workplace.tracking_uri, only_run(workplace.tracking_uri).info.run_id, reference)
    finally:
        workplace.close()


def test_a_sender_killed_before_it_deletes_a_delivered_journal_leaves_the_run_finished(
    tmp_path: Path, nursery: Nursery
) -> None:
    workplace = Workplace(tmp_path, f"sqlite:///{tmp_path}/mlruns/mlflow.db")
    workplace.experiment(EXPERIMENT)
    try:
        run_id = nursery.run(workplace, "train", "experiment.py", "--epochs", "1", "--json").json["run_id"]
        workplace.end_senders()
        sender = nursery.start_sender(workplace, {"TRACKED_FAILPOINT": "sender.before-delete"})
        resumed = nursery.start(workplace, "resume", run_id, "--epochs", "2")
        assert sender.wait().returncode == -signal.SIGKILL
        nursery.start_sender(workplace)
        assert resumed.wait().returncode == 0
        run = only_run(workplace.tracking_uri)
        assert (run.info.status, run.data.tags["tracked.state"]) == ("FINISHED", "finished")
    finally:
        workplace.close()


def test_everything_killed_at_once_and_the_spool_lost_resumes_from_the_server_alone(
    tmp_path: Path, server_uri: str, nursery: Nursery, reference: tuple[Curves, dict[str, Any]]
) -> None:
    here, elsewhere = (Workplace(tmp_path / name, server_uri) for name in ("here", "elsewhere"))
    for workplace in (here, elsewhere):
        workplace.path.mkdir()
        workplace.experiment(EXPERIMENT)
    try:
        nursery.start_sender(here, {"TRACKED_HEARTBEAT": "60"})
        line = ["train", "experiment.py", "die=step 21", "points=10", "committed=8", *LINE]
        handle = killed(nursery.start(here, *line, env={"TRACKED_HEARTBEAT": "60"}))
        run_id = run_id_of(here, handle)
        here.end_senders()
        (elsewhere.path / "died step 21").touch()
        result = nursery.run(elsewhere, "resume", run_id, "--json").json
        assert result["resumed_from"] >= 8
        assert_same_training(server_uri, run_id, reference)
    finally:
        here.close()
        elsewhere.close()


def test_a_checkpoint_is_named_only_once_all_points_up_to_its_step_stand_on_the_server(
    lab: Workplace, nursery: Nursery
) -> None:
    trainer = nursery.start(lab, "train", "experiment.py", "die=step 39", "points=999", *LINE)
    handle = handle_of(trainer)
    # It waits for points that never come, so what stands on the server stays as it is. Steps take less time
    # than a checkpoint, so which ones are written is open.
    until_committed(lab, handle, 1)
    run_id = run_id_of(lab, handle)
    named = json.loads(client_tags(lab, run_id)["tracked.checkpoint"])["step"]
    losses = dict(curves(lab.tracking_uri, run_id)["train/loss"])
    assert set(range(1, named + 1)) <= set(losses)
    trainer.kill()


def client_tags(workplace: Workplace, run_id: str) -> dict[str, str]:
    from mlflow import MlflowClient

    return dict(MlflowClient(workplace.tracking_uri).get_run(run_id).data.tags)
