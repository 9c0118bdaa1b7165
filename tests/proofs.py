"""What a run left on the server, read back through MLflow's own client, and compared with another's."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any

import mlflow.artifacts
import torch
from mlflow import MlflowClient
from mlflow.entities import Run

from tests.nursery import Trainer
from tests.processes import Workplace, wait_until
from tracked.training import compare_states

os.environ["MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"] = "false"

Curves = dict[str, list[tuple[int, float]]]

# What is about the attempts and not about the training: which checkpoints are kept, and the loop's length.
_BOOKKEEPING = {"checkpoints", "about", "settings", "params"}


def runs(uri: str, experiment: str = "experiment") -> list[Run]:
    """All runs of an experiment, newest first."""
    client = MlflowClient(uri)
    found = client.get_experiment_by_name(experiment)
    return list(client.search_runs([found.experiment_id])) if found else []


def only_run(uri: str, experiment: str = "experiment") -> Run:
    """The experiment's run, of which there must be one."""
    found = runs(uri, experiment)
    assert len(found) == 1, [run.info.run_id for run in found]
    return found[0]


def curves(uri: str, run_id: str) -> Curves:
    """Every point of the run, as often as it stands there: key -> (step, value), in the order of steps."""
    client = MlflowClient(uri)
    keys = client.get_run(run_id).data.metrics
    return {
        key: sorted((point.step, point.value) for point in client.get_metric_history(run_id, key))
        for key in keys
    }


def state(uri: str, run_id: str) -> dict[str, Any]:
    """The run's committed checkpoint, downloaded, its hash compared with the tag's, and loaded."""
    run = MlflowClient(uri).get_run(run_id)
    pointer = json.loads(run.data.tags["tracked.checkpoint"])
    with tempfile.TemporaryDirectory() as folder:
        path = mlflow.artifacts.download_artifacts(
            run_id=run_id, artifact_path=pointer["path"], dst_path=folder, tracking_uri=uri
        )
        content = Path(path).read_bytes()
        assert hashlib.sha256(content).hexdigest() == pointer["sha256"]
        assert len(content) == pointer["bytes"]
        loaded: dict[str, Any] = torch.load(path, weights_only=True)
    assert loaded["step"] == pointer["step"]
    return loaded


def artifact(uri: str, run_id: str, path: str) -> str:
    """One of the run's artifacts, as text."""
    with tempfile.TemporaryDirectory() as folder:
        found = mlflow.artifacts.download_artifacts(
            run_id=run_id, artifact_path=path, dst_path=folder, tracking_uri=uri
        )
        return Path(found).read_text()


def assert_once(found: Curves) -> None:
    """No key has two points at a step."""
    for key, points in found.items():
        steps = [step for step, _ in points]
        twice = sorted({step for step in steps if steps.count(step) > 1})
        assert not twice, f"{key} stands twice at {twice}"


def assert_whole(uri: str, run_id: str) -> Curves:
    """The run's points are as many as it says it logged, each once, and its checkpoint is sound."""
    found = curves(uri, run_id)
    assert_once(found)
    logged = MlflowClient(uri).get_run(run_id).data.tags["mlflow.tracked.points"]
    assert sum(len(points) for points in found.values()) == int(logged)
    state(uri, run_id)
    return found


def assert_same_training(uri: str, run_id: str, reference: tuple[Curves, dict[str, Any]]) -> None:
    """History and final state are those of the reference, to the last bit."""
    found = assert_whole(uri, run_id)
    assert found == reference[0]
    ours, theirs = (
        {key: value for key, value in each.items() if key not in _BOOKKEEPING}
        for each in (state(uri, run_id), reference[1])
    )
    compared, wrong = compare_states(ours, theirs)
    assert compared > 10
    assert not wrong, wrong


def local_handle(errors: str) -> str:
    """The run's local handle, from the first line that `train` writes to standard error; empty before that."""
    found = re.search(r"^run ([0-9a-f]{32}) \(local handle\)", errors, re.MULTILINE)
    return found[1] if found else ""


def handle_of(trainer: Trainer) -> str:
    """The local handle of the run that a trainer is about to tell."""
    return wait_until(lambda: local_handle(trainer.errors), "the local handle")


def told(workplace: Workplace, handle: str) -> dict[str, Any]:
    """What the sender last wrote down about a run."""
    for outbox in workplace.outboxes():
        if found := outbox.run(handle).about:
            return found
    return {}


def run_id_of(workplace: Workplace, handle: str, seconds: float = 60) -> str:
    """The run's ID, once the sender has got one."""
    return str(wait_until(lambda: told(workplace, handle).get("run_id"), "the run's ID", seconds))


def until_committed(workplace: Workplace, handle: str, step: int = 0, seconds: float = 60) -> None:
    """Return once a checkpoint of `step` or later is committed."""
    wait_until(
        lambda: told(workplace, handle).get("committed", -1) >= step, f"a checkpoint of step {step}", seconds
    )


def journals(workplace: Workplace, handle: str) -> list[Path]:
    """The run's journals that are not delivered yet."""
    return [each for outbox in workplace.outboxes() for each in outbox.run(handle).journals()]
