"""A sweep through the real command line: trials are runs, bad ones end early, and a kill loses nothing."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from tests.nursery import Nursery, Trainer
from tests.processes import Workplace, wait_until
from tests.proofs import Curves, assert_whole, runs

# Four steps an epoch; `quality` decides how good a trial is from its first epoch on, `weight` learns beside it.
# At the points that `break.json` names ({trial's quality: [epoch, what]}) something happens, once each.
EXPERIMENT = """
import json, os, signal, time
from dataclasses import dataclass
from pathlib import Path
import torch
from torch import nn
from torch.utils.data import TensorDataset
import tracked

@dataclass(frozen=True)
class Params:
    quality: float = 0.5
    width: int = 4
    pause: float = 0.0

def build(params):
    inputs = torch.randn(32, 4, generator=torch.Generator().manual_seed(1))
    data = TensorDataset(inputs, inputs.sum(1, keepdim=True))
    model = nn.Sequential(nn.Linear(4, params.width), nn.Dropout(0.1), nn.Linear(params.width, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    evaluations = [0]
    def evaluate(model, batches):
        if params.pause:
            time.sleep(params.pause)
        evaluations[0] += 1
        loss = torch.stack([nn.functional.mse_loss(model(x), y) for x, y in batches]).mean()
        happens()
        return {"loss": loss, "score": params.quality + 0.001 * torch.tanh(-loss)}
    def happens():
        plan = Path("break.json")
        if not plan.exists():
            return
        for quality, (epoch, what) in json.loads(plan.read_text()).items():
            flag = Path(f"broke-{quality}")
            if float(quality) == params.quality and evaluations[0] == epoch and not flag.exists():
                if what != "always die":
                    flag.touch()
                if what == "raise":
                    raise RuntimeError("a trial that raises")
                os.kill(os.getpid(), signal.SIGKILL)
    return tracked.Task(
        model=model, loss=nn.functional.mse_loss, optimizer=optimizer, train_data=data, val_data=data,
        batch_size=8, evaluate=evaluate, monitor="val/score", mode="max",
    )
"""
GRID = ("quality=choice(0.1,0.4,0.2,0.3)", "--sampler", "grid")
LINE = ("--epochs", "3", "--checkpoint-every", "1 epoch", "--json")


def parent_and_children(place: Workplace, experiment: str = "experiment") -> tuple[Run, dict[int, Run]]:
    """The sweep's parent run, and its children by trial number; there must be no others."""
    found = runs(place.tracking_uri, experiment)
    (parent,) = [run for run in found if "mlflow.tracked.sweep" in run.data.tags]
    children = [run for run in found if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert len(children) == len(found) - 1
    numbers = [int(run.data.tags["tracked.trial"]) for run in children]
    assert sorted(numbers) == sorted(set(numbers)), "a trial has one run"
    return parent, dict(zip(numbers, children, strict=True))


def table(place: Workplace) -> dict[int, tuple[dict[str, str], Curves]]:
    """Params and curves of each trial, every point of them once."""
    _, children = parent_and_children(place)
    hidden = ("loop.", "tracked.attempt.")
    return {
        number: (
            {name: value for name, value in run.data.params.items() if not name.startswith(hidden)},
            assert_whole(place.tracking_uri, run.info.run_id),
        )
        for number, run in children.items()
    }


@pytest.fixture(scope="module")
def undisturbed(
    tmp_path_factory: pytest.TempPathFactory, nursery: Nursery
) -> dict[int, tuple[dict[str, str], Curves]]:
    """The table of the grid, swept in one go."""
    folder = tmp_path_factory.mktemp("undisturbed")
    place = Workplace(folder, f"sqlite:///{folder}/mlruns/mlflow.db", nursery=nursery)
    try:
        nursery.run(place, "sweep", place.experiment(EXPERIMENT), *GRID, *LINE, "--pruner", "none")
        return table(place)
    finally:
        place.close()


def test_a_sweep_is_a_parent_run_with_a_child_for_each_trial(nursery: Nursery, workplace: Workplace) -> None:
    file = workplace.experiment(EXPERIMENT)
    line = ("quality=choice(0.3,0.4,0.2,0.1)", "width=choice(4)", "--sampler", "grid", "--seed", "3")
    median = ("--pruner", "median", "--pruner-option", "n_startup_trials=2")
    done = nursery.run(workplace, "sweep", file, *line, *median, *LINE)

    parent, children = parent_and_children(workplace)
    best = max(children.values(), key=lambda run: run.data.metrics["val/score"])
    assert (done.json["state"], done.json["run_id"]) == ("finished", parent.info.run_id)
    assert done.json["best"]["params"]["quality"] == 0.4
    assert parent.info.status == "FINISHED"
    assert parent.data.params["quality"] == "choice(0.3,0.4,0.2,0.1)"
    assert (parent.data.params["sampler"], parent.data.params["loop.seed"]) == ("grid", "3")
    assert parent.data.params["pruner"] == "median n_startup_trials=2"
    assert parent.data.tags["tracked.best_run"] == best.info.run_id
    assert "quality=0.4" in parent.data.tags["tracked.best"]
    states = {number: run.data.tags["tracked.state"] for number, run in children.items()}
    pruned = [number for number, state in states.items() if state == "pruned"]
    assert pruned, states
    for number in pruned:
        run = children[number]
        assert run.info.status == "KILLED"
        assert "epoch 1" in run.data.tags["tracked.stop_reason"]
        assert run.data.metrics["epoch"] == 1
    trained = sum(int(run.data.metrics["epoch"]) for run in children.values())
    assert parent.data.metrics["epochs/trained"] == trained
    assert parent.data.metrics["epochs/without_pruning"] == 12
    assert parent.data.metrics["trials/pruned"] == len(pruned)
    pictures = artifacts(workplace, parent.info.run_id, "plots")
    assert pictures >= {"history.png", "intermediate.png", "slice.png"}
    for run in children.values():
        assert_whole(workplace.tracking_uri, run.info.run_id)


def artifacts(place: Workplace, run_id: str, folder: str) -> set[str]:
    """The names of the files there that hold something."""
    found = MlflowClient(place.tracking_uri).list_artifacts(run_id, folder)
    return {Path(each.path).name for each in found if each.file_size}


def test_a_trial_that_raises_fails_alone(nursery: Nursery, workplace: Workplace) -> None:
    file = workplace.experiment(EXPERIMENT)
    (workplace.path / "break.json").write_text(json.dumps({"0.2": [2, "raise"]}))
    done = nursery.run(workplace, "sweep", file, *GRID, *LINE, "--pruner", "none")

    _, children = parent_and_children(workplace)
    by_state = {run.data.params["quality"]: run.data.tags["tracked.state"] for run in children.values()}
    assert by_state == {"0.1": "finished", "0.2": "failed", "0.3": "finished", "0.4": "finished"}
    assert "RuntimeError: a trial that raises" in done.stderr


def test_a_worker_that_dies_is_replaced_and_its_trial_goes_on(
    nursery: Nursery, workplace: Workplace, undisturbed: dict[int, tuple[dict[str, str], Curves]]
) -> None:
    file = workplace.experiment(EXPERIMENT)
    (workplace.path / "break.json").write_text(json.dumps({"0.2": [2, "die"], "0.3": [1, "die"]}))
    done = nursery.run(workplace, "sweep", file, *GRID, *LINE, "--pruner", "none", "--workers", "2")

    assert done.stderr.count("its process died") == 2
    assert table(workplace) == undisturbed


def test_a_trial_that_always_dies_is_given_up(nursery: Nursery, workplace: Workplace) -> None:
    file = workplace.experiment(EXPERIMENT)
    (workplace.path / "break.json").write_text(json.dumps({"0.2": [1, "always die"]}))
    done = nursery.run(
        workplace, "sweep", file, *GRID, *LINE, "--pruner", "none", "--max-retries", "1", check=False
    )

    assert done.returncode == 0
    assert "its process died 2 times" in done.stderr
    assert done.json["trials"] == 4
    assert done.json["best"]["params"]["quality"] == 0.4


def started_children(place: Workplace) -> int:
    """How many runs the sender has made."""
    return sum(bool(run.about.get("run_id")) for box in place.outboxes() for run in box.runs())


def slow_sweep(nursery: Nursery, place: Workplace, **options: Any) -> Trainer:
    """A sweep that is in the middle of its second trial or so when this returns."""
    file = place.experiment(EXPERIMENT)
    line = (*GRID, *LINE, "pause=0.2", "--pruner", "none", "--study-name", "grid")
    trainer = nursery.start(place, "sweep", file, *line, **options)
    wait_until(lambda: started_children(place) >= 3, "the second trial")
    return trainer


def without_pause(
    found: dict[int, tuple[dict[str, str], Curves]],
) -> dict[int, tuple[dict[str, str], Curves]]:
    return {number: ({**params, "pause": "0.0"}, points) for number, (params, points) in found.items()}


@pytest.mark.parametrize("lost", ["nothing", "the study", "the disk"])
def test_a_killed_sweep_goes_on_by_its_parents_run_id(
    lost: str, nursery: Nursery, workplace: Workplace, undisturbed: dict[int, tuple[dict[str, str], Curves]]
) -> None:
    trainer = slow_sweep(nursery, workplace)
    os.kill(trainer.pid, signal.SIGKILL)
    trainer.wait()
    parent, _ = parent_and_children(workplace)
    if lost != "nothing":
        for path in (workplace.path / "mlruns").glob("studies.journal*"):
            path.unlink()
    if lost == "the disk":
        wait_until(lambda: not held(workplace), "the end of the workers")
        workplace.end_senders()
        shutil.rmtree(workplace.spool)
    done = nursery.run(workplace, "resume", parent.info.run_id, "--json", env={"TRACKED_WATCH": "3"})

    assert (done.json["state"], done.json["trials"]) == ("finished", 4)
    assert without_pause(table(workplace)) == undisturbed
    again, _ = parent_and_children(workplace)
    assert again.info.run_id == parent.info.run_id
    assert again.info.status == "FINISHED"


def held(place: Workplace) -> bool:
    from tracked.spool import is_held

    return any(is_held(run.lock) for box in place.outboxes() for run in box.runs())


def test_ctrl_c_pauses_a_sweep_and_the_same_study_goes_on(
    nursery: Nursery, workplace: Workplace, undisturbed: dict[int, tuple[dict[str, str], Curves]]
) -> None:
    trainer = slow_sweep(nursery, workplace)
    os.kill(trainer.pid, signal.SIGINT)
    paused = trainer.wait()
    parent, _ = parent_and_children(workplace)
    assert paused.returncode == 75
    assert f"resume {parent.info.run_id}" in paused.stderr
    assert parent.data.tags["tracked.state"] == "paused"

    line = (*GRID, *LINE, "pause=0.2", "--pruner", "none", "--study-name", "grid")
    done = nursery.run(workplace, "sweep", "experiment.py", *line)
    assert done.json["run_id"] == parent.info.run_id
    assert without_pause(table(workplace)) == undisturbed
