"""A training is asked to leave from elsewhere: by `pause` and `stop`, and by a tag that a person sets."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient

import tracked
from tests.nursery import Nursery, Trainer
from tests.processes import Workplace, wait_until
from tests.proofs import assert_same_training, assert_whole, handle_of, run_id_of, state, until_committed
from tests.servers import free_port
from tests.test_commands import logged_run, place_of, silent
from tests.test_sender import Post
from tests.test_takeover import EXPERIMENT
from tracked import command
from tracked.errors import RunTaken, ServerUnavailable, UsageError
from tracked.names import COMMAND, HEARTBEAT, STATE, STOP_REASON
from tracked.place import Place
from tracked.server import Server
from tracked.spool import Lock, read_json
from tracked.tracking import Paused, Run

LINE = ("train", "experiment.py", "--epochs", "20", "--checkpoint-every", "5 steps", "--json")


def slow_training(workplace: Workplace, nursery: Nursery) -> tuple[Trainer, str]:
    """One that goes on for minutes unless it is asked to leave, and its run's ID."""
    (workplace.path / "go").unlink(missing_ok=True)
    trainer = nursery.start(workplace, *LINE, "pause=0.5")
    handle = handle_of(trainer)
    until_committed(workplace, handle)
    return trainer, run_id_of(workplace, handle)


def test_a_training_is_paused_from_another_machine_and_resumed_to_the_same_bits(
    remote_workplace: Workplace, tmp_path: Path, nursery: Nursery
) -> None:
    home, away = remote_workplace, Workplace(tmp_path / "away", remote_workplace.tracking_uri)
    away.path.mkdir()
    home.experiment(EXPERIMENT)
    (home.path / "go").touch()
    straight = home.tracked(*LINE).json["run_id"]
    reference = assert_whole(home.tracking_uri, straight), state(home.tracking_uri, straight)
    trainer, run_id = slow_training(home, nursery)

    result = nursery.run(away, "pause", run_id[:8])

    assert trainer.wait().returncode == 75
    assert f"run {run_id} is paused" in result.stdout
    assert f"resume {run_id}" in result.stdout
    assert f"process {trainer.pid}" in result.stderr
    view = Server(home.tracking_uri, timeout=30).get_run(run_id)
    assert (view.status, view.tags[STATE], view.tags[STOP_REASON]) == ("KILLED", "paused", "asked to pause")
    assert COMMAND not in view.tags
    (home.path / "go").touch()
    resumed = home.tracked("resume", run_id, "--json").json
    assert 0 < resumed["resumed_from"] < 160
    assert_same_training(home.tracking_uri, run_id, reference)

    refused = nursery.run(away, "pause", run_id, check=False)
    assert refused.returncode == 2
    assert f"run {run_id} is finished: nobody is training it" in refused.stderr


def test_a_tag_set_in_mlflows_interface_stops_a_training(workplace: Workplace, nursery: Nursery) -> None:
    workplace.experiment(EXPERIMENT)
    trainer, run_id = slow_training(workplace, nursery)

    MlflowClient(workplace.tracking_uri).set_tag(run_id, COMMAND, "stop")
    told = trainer.wait().json

    assert (told["state"], told["undelivered"]) == ("stopped", 0)
    view = Server(workplace.tracking_uri, timeout=30).get_run(run_id)
    assert (view.status, view.tags[STATE], view.tags[STOP_REASON]) == ("KILLED", "stopped", "asked to stop")


def test_a_training_has_saved_its_state_and_left_within_two_heartbeats(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heartbeat, uri = 2.0, f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("TRACKED_HEARTBEAT", str(heartbeat))
    asked = 0.0

    def body(run: Run) -> None:
        nonlocal asked
        for _ in run.steps(1_000_000):
            if not asked:
                wait_until(lambda: run.id != run.handle, "the run's ID")
                MlflowClient(uri).set_tag(run.id, COMMAND, "pause")
                asked = time.monotonic()
            threading.Event().wait(0.01)

    with Post(tmp_path, uri), tracked.start("heartbeats", tracking_uri=uri, spool_dir=tmp_path) as run:
        with pytest.raises(Paused):
            body(run)
        left = time.monotonic()
        assert run._taken_at == run.step > 1

    assert left - asked < 2 * heartbeat


def test_a_command_outlives_the_sender_and_not_the_attempt_that_it_was_for(
    workplace: Workplace, nursery: Nursery
) -> None:
    workplace.experiment(EXPERIMENT)
    trainer, run_id = slow_training(workplace, nursery)
    workplace.end_senders()
    asked = workplace.tracked("pause", "last", "--no-wait", "--json").json
    assert asked == {"run_id": run_id, "state": "running"}
    assert trainer.wait().json["state"] == "paused"

    MlflowClient(workplace.tracking_uri).set_tag(run_id, COMMAND, "stop")  # too late: nobody trains
    (workplace.path / "go").touch()
    assert workplace.tracked("resume", run_id, "--json").json["state"] == "finished"


def test_a_second_interrupt_leaves_in_the_middle_of_a_step(workplace: Workplace, nursery: Nursery) -> None:
    workplace.experiment(EXPERIMENT)
    trainer = nursery.start(workplace, *LINE, "pause=600")
    handle = handle_of(trainer)
    until_committed(workplace, handle)
    os.kill(trainer.pid, signal.SIGINT)
    wait_until(lambda: "SIGINT: a checkpoint is taken after this step" in trainer.errors, "its word")
    os.kill(trainer.pid, signal.SIGINT)

    left = trainer.wait()

    assert left.returncode == 130
    assert "interrupted twice: left at once" in left.stderr
    (workplace.path / "go").touch()
    assert workplace.tracked("resume", handle, "--json").json["resumed_from"] == 0


def test_a_run_that_nobody_trains_is_not_asked_and_the_wait_for_one_that_stays_is_bounded(
    workplace: Workplace,
) -> None:
    place, server = place_of(workplace), Server(workplace.tracking_uri, timeout=30)
    for tags, found, next_ in (
        ({STATE: "paused"}, "is paused: nobody is training it", "resume"),
        ({STATE: "stopped"}, "is stopped: nobody", "show"),
        ({STATE: "crashed"}, "is crashed: nobody", "resume"),
        ({STATE: "running", HEARTBEAT: "1000"}, "is lost (last heard", "resume"),
    ):
        run = logged_run(workplace, **tags)
        with pytest.raises(UsageError) as refused:
            command.ask(place, run.run_id, "pause", silent)
        assert found in str(refused.value)
        assert f"python -m tracked.run {next_} {run.run_id}" in refused.value.try_next
        assert COMMAND not in server.get_run(run.run_id).tags

    run = logged_run(workplace, **{STATE: "running", HEARTBEAT: str(int(time.time() * 1000))})
    with pytest.raises(RunTaken, match=r"is running after 0\.1 s; it stays asked to stop"):
        command.ask(place, run.run_id, "stop", silent, timeout=0.1)
    assert server.get_run(run.run_id).tags[COMMAND] == "stop"


def test_without_its_server_a_training_of_this_machine_is_named_by_its_process(workplace: Workplace) -> None:
    place = Place(f"http://127.0.0.1:{free_port()}", workplace.spool)
    folder = place.outbox().run("ab" * 16)
    folder.make()
    lock = Lock(folder.lock)
    assert lock.acquire()
    pid = read_json(folder.lock)["pid"]

    with pytest.raises(ServerUnavailable, match=f"kill -INT {pid}"):
        command.ask(place, "abababab", "pause", silent)
    lock.release()
    with pytest.raises(UsageError, match="nobody is training it"):
        command.ask(place, "abababab", "pause", silent)
