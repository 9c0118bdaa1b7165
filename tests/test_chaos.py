"""Kill anything at random instants, again and again, and resume: nothing differs from an undisturbed run."""

from __future__ import annotations

import os
import random
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import psutil
import pytest

from tests.nursery import Nursery, Trainer
from tests.processes import Workplace
from tests.proofs import (
    Curves,
    assert_same_training,
    assert_whole,
    handle_of,
    run_id_of,
    state,
    told,
    until_committed,
)
from tests.servers import MlflowServer

# 300 steps, of which each takes a little, so that there is something to kill.
EXPERIMENT = """
import threading
from dataclasses import dataclass
import torch
from torch import nn
from torch.utils.data import TensorDataset
import tracked

@dataclass(frozen=True)
class Params:
    pause: float = 0.0

def build(params):
    inputs = torch.randn(96, 4, generator=torch.Generator().manual_seed(1))
    data = TensorDataset(inputs, inputs.sum(1, keepdim=True))
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.1), nn.Linear(8, 1))
    pause = threading.Event()

    def loss(outputs, targets):
        pause.wait(params.pause)
        return nn.functional.mse_loss(outputs, targets)

    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    return tracked.Task(model=model, loss=loss, optimizer=optimizer, train_data=data, val_data=data, batch_size=8)
"""
LINE = ("--max-steps", "300", "--eval-every", "75 steps", "--checkpoint-every", "50 steps")


@dataclass
class Stage:
    """A server, a workplace whose runs share one spool, and the run that nobody disturbed."""

    server: MlflowServer
    workplace: Workplace
    nursery: Nursery
    reference: tuple[Curves, dict[str, Any]]


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory, nursery: Nursery) -> Iterator[Stage]:
    path = tmp_path_factory.mktemp("stage")
    server = MlflowServer(path / "server")
    server.launch()
    workplace = Workplace(path, server.uri, {"TRACKED_SENDER_IDLE": "30"})
    try:
        workplace.experiment(EXPERIMENT)
        server.wait_until_healthy()
        result = nursery.run(workplace, "train", "experiment.py", *LINE, "--json")
        run_id = result.json["run_id"]
        reference = assert_whole(server.uri, run_id), state(server.uri, run_id)
        yield Stage(server, workplace, nursery, reference)
    finally:
        workplace.close()
        server.kill()


@pytest.fixture
def leaves_no_process() -> None:
    """The server that is started again after a kill is the stage's, and ends with it."""


def kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def kill_writer(trainer: Trainer) -> None:
    """Kill the process that writes checkpoint files for this training, if there is one now."""
    with suppress(psutil.NoSuchProcess):
        for child in psutil.Process(trainer.pid).children():
            with suppress(psutil.NoSuchProcess):
                if "tracked.archive" in child.cmdline():
                    kill(child.pid)


def disturb(stage: Stage, seed: int, kills: int, victims: tuple[str, ...]) -> None:
    """Train, kill what chance chooses when chance chooses, resume what is dead, and compare the outcome."""
    chance = random.Random(seed)
    pause = threading.Event()
    workplace, nursery, server = stage.workplace, stage.nursery, stage.server
    line = ["train", "experiment.py", "pause=0.002", *LINE]
    trainer = nursery.start(workplace, *line)
    handle = handle_of(trainer)
    until_committed(workplace, handle)
    acts: dict[str, Callable[[], None]] = {
        "trainer": trainer.kill,
        "writer": lambda: kill_writer(trainer),
        "sender": workplace.end_senders,
        "server": server.kill,
    }
    history = []
    for _ in range(kills):
        pause.wait(chance.uniform(0.0, 0.5))
        chosen = chance.choice([*((each,) for each in victims), ("trainer", "sender"), victims])
        history.append(chosen)
        acts["trainer"] = trainer.kill
        for victim in chance.sample(chosen, len(chosen)):
            acts[victim]()
        if "server" in chosen:
            server.launch()
        if trainer.returncode is not None:
            trainer = nursery.start(workplace, "resume", handle)
    result = trainer.wait(90)
    while result.returncode == -signal.SIGKILL:
        result = nursery.start(workplace, "resume", handle).wait(90)
    assert result.returncode == 0, (seed, history, result)
    run_id = run_id_of(workplace, handle)
    try:
        assert_same_training(server.uri, run_id, stage.reference)
    except AssertionError as error:
        raise AssertionError(f"seed {seed}, killed {history}, told {told(workplace, handle)}") from error


@pytest.mark.parametrize("seed", range(20))
def test_killed_at_random_instants_it_is_the_training_that_was_never_killed(stage: Stage, seed: int) -> None:
    # The server takes ten seconds to come back, and a sender four: they die less often than the rest.
    victims = (
        ("trainer", "writer", "sender", "server") if seed % 10 == 9 else ("trainer", "writer", "trainer")
    )
    if seed % 5 == 3:
        victims = ("trainer", "writer", "sender")
    disturb(stage, seed, 3 if seed % 10 < 9 else 2, victims)


@pytest.mark.chaos
@pytest.mark.timeout(300)
@pytest.mark.parametrize("seed", range(1000, 1100))
def test_killed_at_random_instants_for_minutes(stage: Stage, seed: int) -> None:
    disturb(stage, seed, 6, ("trainer", "writer", "sender", "server", "trainer", "writer"))
