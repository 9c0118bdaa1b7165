"""A sweep through the real command line: trials are runs, bad ones end early, and a kill loses nothing."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from tests.nursery import Nursery, Trainer
from tests.processes import Workplace, wait_until
from tests.proofs import Curves, assert_whole, runs
from tests.servers import MlflowServer

# Four steps an epoch; `quality` decides how good a trial is from its first epoch on, `weight` learns beside it.
# At the points that `break.json` names ({trial's quality: [epoch, what]}) something happens, once each; a file `hold`
# stops every trial in its second epoch for as long as it is there.
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
    batch: int = 8
    pause: float = 0.0

    def __post_init__(self):
        if Path("refuse").exists() and self.quality == 0.2:
            raise ValueError("no quality of 0.2")

def build(params):
    with open("devices.txt", "a") as file:
        print(os.environ.get("CUDA_VISIBLE_DEVICES"), file=file)
    inputs = torch.randn(32, 4, generator=torch.Generator().manual_seed(1))
    data = TensorDataset(inputs, inputs.sum(1, keepdim=True))
    model = nn.Sequential(nn.Linear(4, params.width), nn.Dropout(0.1), nn.Linear(params.width, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    evaluations = [0]
    def evaluate(model, batches):
        if params.pause:
            time.sleep(params.pause)
        with open("evaluated.txt", "a") as file:
            print(params.quality, file=file)
        evaluations[0] += 1
        while evaluations[0] == 2 and Path("hold").exists():
            time.sleep(0.02)
        loss = torch.stack([nn.functional.mse_loss(model(x), y) for x, y in batches]).mean()
        happens()
        is_nan = params.quality == 0.4 and evaluations[0] == 2 and Path("nan").exists()
        return {"loss": loss, "score": float("nan") if is_nan else params.quality + 0.001 * torch.tanh(-loss)}
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
        batch_size=params.batch, evaluate=evaluate, monitor="val/score", mode="max",
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
    assert (parent.data.params["sweep.sampler"], parent.data.params["loop.seed"]) == ("grid", "3")
    assert parent.data.params["sweep.pruner"] == "median n_startup_trials=2"
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
        shown = {each.path for each in MlflowClient(workplace.tracking_uri).list_artifacts(run.info.run_id)}
        assert shown.isdisjoint({"plots", "source", "model"})
        assert not run.outputs or not run.outputs.model_outputs
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
    _, children = parent_and_children(workplace)
    (given_up,) = [run for run in children.values() if run.data.params["quality"] == "0.2"]
    assert given_up.data.tags["tracked.state"] == "failed"
    assert given_up.info.status == "FAILED"
    assert done.json["trials"] == 4
    assert done.json["best"]["params"]["quality"] == 0.4


def test_a_trial_whose_params_are_refused_fails_alone(nursery: Nursery, workplace: Workplace) -> None:
    file = workplace.experiment(EXPERIMENT)
    (workplace.path / "refuse").touch()
    # However often that happens: `--max-retries` is for what dies.
    done = nursery.run(workplace, "sweep", file, *GRID, *LINE, "--pruner", "none", "--max-retries", "0")

    assert "failed" in done.stderr
    assert "no quality of 0.2" in done.stderr
    _, children = parent_and_children(workplace)
    assert sorted(run.data.params["quality"] for run in children.values()) == ["0.1", "0.3", "0.4"]


def test_patience_ends_trials_with_their_best_value_and_nan_is_never_the_best(
    nursery: Nursery, workplace: Workplace
) -> None:
    file = workplace.experiment(EXPERIMENT)
    (workplace.path / "nan").touch()
    line = (*GRID, *LINE, "--pruner", "none", "--patience", "1", "--min-delta", "1")
    done = nursery.run(workplace, "sweep", file, *line)

    parent, children = parent_and_children(workplace)
    states = {run.data.params["quality"]: run.data.tags["tracked.state"] for run in children.values()}
    early = "stopped_early"
    assert states == {"0.1": early, "0.2": early, "0.3": early, "0.4": "failed"}
    assert {run.info.status for run in children.values()} == {"FINISHED", "FAILED"}
    assert (done.json["best"]["params"]["quality"], done.json["best"]["epochs"]) == (0.3, 2)
    assert "quality=0.3" in parent.data.tags["tracked.best"]


SUGGEST = """
def suggest(trial):
    kind = trial.suggest_categorical("kind", ["narrow", "wide"])
    width = trial.suggest_int("width", 5, 8) if kind == "wide" else 2
    return {"quality": trial.suggest_float("quality", 0.1, 0.9), "width": width}
"""


def test_what_an_experiment_suggests_itself_is_the_same_on_an_empty_disk(
    nursery: Nursery, workplace: Workplace
) -> None:
    line = ("--trials", "6", "--sampler", "random", "--pruner", "none", *LINE)
    file = workplace.experiment(EXPERIMENT + SUGGEST)
    nursery.run(workplace, "sweep", file, *line, "--experiment-name", "straight")
    trainer = nursery.start(workplace, "sweep", file, *line, "pause=0.1", "--experiment-name", "killed")
    wait_until(lambda: "trial 1:" in trainer.errors, "the second trial's end")
    trainer.kill()
    trainer.wait()
    wait_until(lambda: not held(workplace), "the end of the workers")
    nursery.run(workplace, "sync")
    parent, _ = parent_and_children(workplace, "killed")
    workplace.end_senders()
    shutil.rmtree(workplace.spool)
    for path in (workplace.path / "mlruns").glob("studies.journal*"):
        path.unlink()
    nursery.run(workplace, "resume", parent.info.run_id, env={"TRACKED_WATCH": "3"})

    _, straight = parent_and_children(workplace, "straight")
    _, killed = parent_and_children(workplace, "killed")
    chosen = [
        {number: (run.data.params["quality"], run.data.params["width"]) for number, run in found.items()}
        for found in (straight, killed)
    ]
    assert chosen[0] == chosen[1]
    assert len({width for _, width in chosen[0].values()}) > 2, "some are wide, and of different widths"


def test_cuda_devices_are_dealt_out_to_the_workers(nursery: Nursery, workplace: Workplace) -> None:
    file = workplace.experiment(EXPERIMENT)
    line = (*GRID, *LINE, "pause=0.1", "--pruner", "none", "--workers", "2", "--device", "cpu")
    nursery.run(workplace, "sweep", file, *line, env={"CUDA_VISIBLE_DEVICES": "3,5"})

    seen = (workplace.path / "devices.txt").read_text().split()
    assert {*seen} == {"3,5", "3", "5"}, "both for the command itself, which asks the task for its metric"


def test_a_budget_is_an_end_and_not_a_pause_where_it_leaves_nothing_half_done(
    nursery: Nursery, workplace: Workplace
) -> None:
    file = workplace.experiment(EXPERIMENT)
    exact = nursery.run(
        workplace, "sweep", file, *GRID, *LINE, "--pruner", "none", "--max-epochs-total", "12"
    )
    line = (*GRID, *LINE, "pause=0.2", "--pruner", "none", "--timeout", "0.1", "--experiment-name", "timed")
    timed = nursery.run(workplace, "sweep", file, *line, check=False)

    assert (exact.json["state"], exact.json["trials"]) == ("finished", 4)
    assert timed.json["trials"] < 4
    assert timed.returncode in (0, 1), "nothing was begun, or what was begun is whole"
    _, children = parent_and_children(workplace, "timed")
    assert all(run.data.metrics["epoch"] == 3 for run in children.values())


def test_a_trial_that_is_complete_when_the_budget_runs_out_counts(
    nursery: Nursery, workplace: Workplace
) -> None:
    file = workplace.experiment(EXPERIMENT)
    line = ("--epochs", "9", "--patience", "2", "--min-delta", "0.5", "--max-epochs-total", "3", "--json")
    done = nursery.run(workplace, "sweep", file, "quality=choice(0.1,0.4)", "--pruner", "none", *line)

    assert (done.json["state"], done.json["trials"]) == ("finished", 1)
    _, children = parent_and_children(workplace)
    assert children[0].data.tags["tracked.state"] == "stopped_early"


def test_a_trial_that_ends_before_it_is_evaluated_fails_alone(nursery: Nursery, workplace: Workplace) -> None:
    file = workplace.experiment(EXPERIMENT)
    line = ("--sampler", "grid", "--seed", "3", "--max-steps", "6", "--pruner", "none")
    # Of 4, 8 and 16 steps an epoch, the first first. A sweep that begins with one without a value asks for another
    # metric, because it may be that no trial has this one.
    done = nursery.run(workplace, "sweep", file, "batch=choice(8,4,2)", *line)

    parent, children = parent_and_children(workplace)
    states = {run.data.params["batch"]: run.data.tags["tracked.state"] for run in children.values()}
    assert states == {"8": "finished", "4": "finished", "2": "finished"}
    assert parent.data.tags["tracked.trials"] == "1 finished, 0 running, 0 pruned, 2 failed"
    assert "has never logged 'val/score'" in done.stderr
    nursery.run(workplace, "resume", parent.info.run_id)


def test_epochs_are_counted_where_trials_are_compared_by_steps(
    nursery: Nursery, workplace: Workplace
) -> None:
    file = workplace.experiment(EXPERIMENT)
    line = ("--eval-every", "2 steps", "--pruner", "threshold", "--pruner-option", "lower=0.25")
    done = nursery.run(workplace, "sweep", file, *GRID, *LINE, *line, "--max-epochs-total", "9")

    # Two are pruned at step 2, which is in their first epoch, and two train all three.
    assert (done.json["state"], done.json["trials"]) == ("finished", 4)
    parent, _ = parent_and_children(workplace)
    assert parent.data.metrics["epochs/trained"] == 8
    assert parent.data.metrics["epochs/without_pruning"] == 12


def test_what_is_suggested_need_have_no_default(nursery: Nursery, workplace: Workplace) -> None:
    text = (
        (EXPERIMENT + SUGGEST)
        .replace("quality: float = 0.5", "quality: float")
        .replace("width: int = 4", "width: int")
    )
    file = workplace.experiment(text)
    done = nursery.run(workplace, "sweep", file, "--trials", "2", *LINE)

    assert (done.json["state"], done.json["trials"]) == ("finished", 2)


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


@pytest.mark.parametrize("lost", ["the study", "the disk"])
def test_a_killed_sweep_goes_on_by_its_parents_run_id(
    lost: str, nursery: Nursery, workplace: Workplace, undisturbed: dict[int, tuple[dict[str, str], Curves]]
) -> None:
    trainer = slow_sweep(nursery, workplace)
    os.kill(trainer.pid, signal.SIGKILL)
    trainer.wait()
    parent, _ = parent_and_children(workplace)
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


def committed(place: Workplace) -> int:
    """The last step whose checkpoint is on the server, of any run."""
    steps = [int(run.about.get("committed", 0)) for box in place.outboxes() for run in box.runs()]
    return max(steps, default=0)


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


def test_ctrl_c_while_a_whole_sweep_is_delivered_pauses_nothing(
    nursery: Nursery, workplace: Workplace
) -> None:
    file = workplace.experiment(EXPERIMENT)
    line = ("quality=choice(0.1,0.4)", "pause=0.2", "--sampler", "grid", "--pruner", "none", *LINE)
    trainer = nursery.start(workplace, "sweep", file, *line)
    wait_until(lambda: "trial 0:" in trainer.errors, "the first trial's end")
    (sender,) = workplace.sender_pids()
    os.kill(sender, signal.SIGSTOP)
    try:
        wait_until(lambda: "trial 1:" in trainer.errors and not workers(trainer), "the end of the workers")
        os.kill(trainer.pid, signal.SIGINT)
    finally:
        os.kill(sender, signal.SIGCONT)
    done = trainer.wait()

    assert (done.returncode, done.json["state"]) == (0, "finished")
    parent, _ = parent_and_children(workplace)
    assert parent.data.tags["tracked.state"] == "finished"


def workers(trainer: Trainer) -> list[psutil.Process]:
    """The processes that train for a sweep."""
    found = []
    for child in psutil.Process(trainer.pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # nor one that has ended and was not waited for
            found += [child] * ("tracked.worker" in " ".join(child.cmdline()))
    return found


@pytest.mark.timeout(240)
def test_machines_share_a_study_and_take_over_each_others_trials(
    tmp_path: Path,
    server_uri: str,
    postgres_url: str,
    nursery: Nursery,
    undisturbed: dict[int, tuple[dict[str, str], Curves]],
) -> None:
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
    one, two = (
        Workplace(folder, server_uri, env={"TRACKED_WATCH": "3", "TRACKED_HEARTBEAT": "0.5"}, nursery=nursery)
        for folder in folders
    )
    try:
        line = (*GRID, *LINE, "--pruner", "none", "--storage", postgres_url, "--experiment-name", "machines")
        file = one.experiment(EXPERIMENT)
        two.experiment(EXPERIMENT)
        (one.path / "hold").touch()
        first = nursery.start(one, "sweep", file, *line)
        wait_until(lambda: committed(one), "the first epoch of one machine's first trial")
        second = nursery.start(two, "sweep", file, *line)
        wait_until(lambda: started_children(two) >= 1, "the first trial of the other")
        kill(*workers_of(first), first.pid)
        one.end_senders()
        done = second.wait(120)
        assert done.returncode == 0, done
        assert "takes part in its sweep" in done.stderr
        parent, children = parent_and_children(two, "machines")
        assert len(children) == 4
        assert [run for run in children.values() if "tracked.attempt.2" in run.data.params], (
            "none was taken over"
        )
        elsewhere = nursery.run(two, "resume", parent.info.run_id, check=False)
        assert (elsewhere.returncode, "--storage postgresql" in elsewhere.stderr) == (2, True), elsewhere
        for number, (params, points) in undisturbed.items():
            run = children[number]
            assert run.data.params["quality"] == params["quality"]
            assert run.data.tags["tracked.state"] == "finished", (number, run.data.tags, done)
            assert assert_whole(server_uri, run.info.run_id) == points
    finally:
        one.close()
        two.close()


def test_halving_promotes_a_stopped_trial_that_turns_out_good(nursery: Nursery, workplace: Workplace) -> None:
    file = workplace.experiment(EXPERIMENT)
    line = ("quality=choice(0.1,0.2,0.3,0.4,0.5,0.6)", "--sampler", "grid", "--epochs", "4", "--json")
    sha = ("--pruner", "sha", "--pruner-option", "reduction_factor=2", "--checkpoint-every", "1 epoch")
    plain = nursery.run(workplace, "sweep", file, *line, *sha, "--no-promote", "--experiment-name", "plain")
    promoting = nursery.run(workplace, "sweep", file, *line, *sha)

    _, children = parent_and_children(workplace)
    _, without = parent_and_children(workplace, "plain")
    assert len(children) == len(without) == 6
    went_on = [run for run in children.values() if "tracked.attempt.2" in run.data.params]
    assert went_on, "a stopped trial went on, in its own run"
    assert all(run.data.metrics["epoch"] > 1 for run in went_on)
    assert not [run for run in without.values() if "tracked.attempt.2" in run.data.params]
    for run in (*children.values(), *without.values()):
        assert_whole(workplace.tracking_uri, run.info.run_id)
    assert promoting.json["best"]["params"]["quality"] == 0.6
    assert plain.json["trials"] == promoting.json["trials"] == 6


def test_the_best_are_trained_further_in_their_own_runs(nursery: Nursery, workplace: Workplace) -> None:
    file = workplace.experiment(EXPERIMENT)
    done = nursery.run(workplace, "sweep", file, *GRID, *LINE, "--pruner", "none").json
    nursery.run(workplace, "resume", done["run_id"], "--top", "2", "--extend-epochs", "5")

    _, children = parent_and_children(workplace)
    epochs = {run.data.params["quality"]: run.data.metrics["epoch"] for run in children.values()}
    assert epochs == {"0.1": 3, "0.2": 3, "0.3": 5, "0.4": 5}
    for run in children.values():
        assert_whole(workplace.tracking_uri, run.info.run_id)


def test_a_budget_of_epochs_is_overshot_by_less_than_a_worker_each(
    nursery: Nursery, workplace: Workplace
) -> None:
    file = workplace.experiment(EXPERIMENT)
    line = (*GRID, *LINE, "pause=0.05", "--pruner", "none", "--workers", "2")
    done = nursery.run(workplace, "sweep", file, *line, "--max-epochs-total", "4", check=False)

    parent, children = parent_and_children(workplace)
    trained = sum(run.data.metrics.get("epoch", 0) for run in children.values())
    assert 4 <= trained <= 5, "which no trials of three epochs add up to: one is half done"
    assert done.returncode == 75
    again = nursery.run(workplace, "resume", parent.info.run_id, "--max-epochs-total", "4", check=False)
    assert again.returncode == 75, "what is half done waits for a larger budget"
    nursery.run(workplace, "resume", parent.info.run_id)
    _, children = parent_and_children(workplace)
    assert [run.data.metrics["epoch"] for run in children.values()] == [3, 3, 3, 3]


def test_show_ranks_the_trials_and_verify_knows_a_parent(nursery: Nursery, workplace: Workplace) -> None:
    file = workplace.experiment(EXPERIMENT)
    done = nursery.run(workplace, "sweep", file, *GRID, *LINE, "--pruner", "none").json
    shown = nursery.run(workplace, "show", done["run_id"]).stdout
    nursery.run(workplace, "verify", done["run_id"])

    lines = [line.split() for line in shown.splitlines()]
    ranked = [words for words in lines if len(words) > 4 and words[3] == "finished"]
    assert [words[0] for words in ranked] == ["1", "2", "3", "4"]
    assert [words[5] for words in ranked] == ["0.4", "0.3", "0.2", "0.1"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["lr=log(1e-4,1e-1)"], "lr"),
        (["quality=uniform(0.5,0.1)"], "quality"),
        (["quality=choice()"], "choice"),
        (["quality=0.3"], "there is nothing to search"),
        (["quality=uniform(0,1)", "--sampler", "annealing"], "tpe"),
        (["quality=uniform(0,1)", "--pruner", "axe"], "hyperband"),
        (
            ["quality=uniform(0,1)", "--storage", "postgresql+psycopg://nobody@127.0.0.1:9/x"],
            "cannot be used: connection failed",
        ),
        (
            ["quality=uniform(0,1)", "--monitor", "val/nothing"],
            "error: the monitored metric 'val/nothing' is never",
        ),
        (["quality=uniform(0,1)", "--monitor", "val/loss", "--monitor", "val/x"], "several objectives"),
        (["quality=uniform(0,1)", "--monitor", "val/loss,val/x"], "--monitor val/loss\n"),
        (["quality=uniform(0,1)", "--top", "2"], "--extend-epochs"),
    ],
)
def test_what_cannot_be_swept_is_told(
    words: list[str], said: str, nursery: Nursery, workplace: Workplace
) -> None:
    file = workplace.experiment(EXPERIMENT)
    result = nursery.run(workplace, "sweep", file, *words, "--trials", "2", *LINE, check=False)

    assert result.returncode == (1 if "--storage" in words else 2)
    assert said in result.stderr
    assert "Traceback" not in result.stderr


def test_a_study_that_was_about_something_else_is_not_gone_on_with(
    nursery: Nursery, workplace: Workplace
) -> None:
    file = workplace.experiment(EXPERIMENT)
    line = ("--trials", "1", "--epochs", "1", "--study-name", "one")
    nursery.run(workplace, "sweep", file, "quality=uniform(0,1)", *line)
    other = nursery.run(workplace, "sweep", file, "quality=uniform(0,2)", *line, check=False)
    for path in (workplace.path / "mlruns").glob("studies.journal*"):
        path.unlink()
    rebuilt = nursery.run(workplace, "sweep", file, "quality=uniform(0,3)", *line, check=False)
    nursery.run(workplace, "sweep", file, "quality=uniform(0,1)", *line[2:], "--trials", "2")
    _, children = parent_and_children(workplace)
    (workplace.path / "experiment.py").unlink()
    gone = nursery.run(workplace, "resume", "one", check=False)

    assert other.returncode == 2
    assert "quality" in other.stderr
    assert "uniform(0.0,2.0)" in other.stderr or "uniform(0,2)" in other.stderr
    assert rebuilt.returncode == 2, "the parent run knows, too"
    assert "uniform(0.0,3.0)" in rebuilt.stderr or "uniform(0,3)" in rebuilt.stderr
    assert len(children) == 2
    assert gone.returncode == 2
    assert "experiment.py" in gone.stderr


def test_successive_halving_goes_on_by_the_rule_that_it_began_with(
    nursery: Nursery, workplace: Workplace
) -> None:
    file = workplace.experiment(EXPERIMENT)
    line = ("sweep", file, *GRID, *LINE, "--pruner", "sha", "--study-name", "halved")
    # Out of time nothing that was stopped goes on, so the first trials are not stopped for being early.
    nursery.run(workplace, *line, "--trials", "1", "--timeout", "600")
    nursery.run(workplace, *line, "--trials", "2")
    other = nursery.run(workplace, *line, "--trials", "3", "--no-promote", check=False)

    parent, children = parent_and_children(workplace)
    assert len(children) == 2
    assert json.loads(parent.data.tags["mlflow.tracked.sweep"])["waits"] is False
    assert other.returncode == 2
    assert "promote was True, and is False" in other.stderr


@dataclass
class Stage:
    """A server and a folder, in which sweeps are disturbed one after another."""

    server: MlflowServer
    place: Workplace
    nursery: Nursery
    undisturbed: dict[int, tuple[dict[str, str], Curves]]
    outlives: Callable[[int], None]


@pytest.fixture(scope="module")
def stage(
    tmp_path_factory: pytest.TempPathFactory,
    nursery: Nursery,
    undisturbed: dict[int, tuple[dict[str, str], Curves]],
    outlives: Callable[[int], None],
) -> Iterator[Stage]:
    path = tmp_path_factory.mktemp("stage")
    server = MlflowServer(path / "server")
    server.start()
    place = Workplace(path, server.uri, {"TRACKED_WATCH": "3", "TRACKED_HEARTBEAT": "0.5"})
    place.experiment(EXPERIMENT)
    try:
        yield Stage(server, place, nursery, undisturbed, outlives)
    finally:
        place.close()
        server.kill()


def workers_of(trainer: Trainer) -> list[int]:
    with suppress(psutil.NoSuchProcess):
        found = psutil.Process(trainer.pid).children()
        return [child.pid for child in found if "from tracked.worker" in " ".join(child.cmdline())]
    return []


def kill(*pids: int) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def disturb(stage: Stage, seed: int, victim: str, kills: int = 2) -> None:
    """Sweep, kill at random instants, type the same line again while it is not over, and compare the outcome."""
    chance, place, pause = random.Random(f"{victim} {seed}"), stage.place, threading.Event()
    evaluated = place.path / "evaluated.txt"
    evaluated.unlink(missing_ok=True)
    name = f"{victim}-{seed}-{uuid.uuid4().hex[:6]}"
    names = ("--study-name", name, "--experiment-name", name)
    line = ("sweep", "experiment.py", *GRID, *LINE, "pause=0.1", "--pruner", "none", "--workers", "2", *names)
    trainer = stage.nursery.start(place, *line)
    wait_until(lambda: workers_of(trainer), "the workers")
    for _ in range(kills):
        pause.wait(chance.uniform(0.0, 4.0))
        workers = workers_of(trainer)
        if victim == "worker" and workers:
            kill(chance.choice(workers))
        elif victim == "coordinator":
            trainer.kill()
        elif victim == "all":
            kill(*workers, trainer.pid, *place.sender_pids())
            trainer.kill()
        elif victim == "server":
            stage.server.kill()
            pause.wait(chance.uniform(0.0, 1.0))
            stage.outlives(stage.server.start().group)  # of its first process
        if trainer.returncode is not None:
            trainer = stage.nursery.start(place, *line)
    assert trainer.wait(150).returncode == 0, trainer.errors
    _, children = parent_and_children(place, name)
    assert len(children) == len(stage.undisturbed)
    for number, (params, points) in stage.undisturbed.items():
        run = children[number]
        assert run.data.params["quality"] == params["quality"]
        assert run.data.tags["tracked.state"] == "finished"
        assert assert_whole(place.tracking_uri, run.info.run_id) == points
    again = len(evaluated.read_text().split()) - 12
    assert again <= 2 * kills, "a kill costs each worker one interval between checkpoints at most"


# The suite itself takes two of these: the tests above kill workers, and a server takes ten seconds to come back.
VICTIMS = ("worker", "coordinator", "all", "server")


@pytest.mark.timeout(300)
@pytest.mark.parametrize("victim", ["coordinator", "all"])
def test_whatever_is_killed_when_a_sweep_ends_as_the_undisturbed_one(victim: str, stage: Stage) -> None:
    disturb(stage, 0, victim)


@pytest.mark.chaos
@pytest.mark.parametrize("seed", range(1, 11))
@pytest.mark.parametrize("victim", VICTIMS)
def test_a_sweep_survives_whatever_chance_kills(victim: str, seed: int, stage: Stage) -> None:
    disturb(stage, seed, victim)
