"""The model of a finished run is served by MLflow alone, is registered, and is logged once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch
from mlflow import MlflowClient

from tests.processes import Workplace
from tests.test_commands import place_of, silent
from tracked import flavour
from tracked.retrieval import retrieve
from tracked.spool import write_json

LAYERS = """
from torch import nn

class Twice(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.first, self.last = nn.Linear(width, width), nn.Linear(width, 1)

    def forward(self, inputs):
        return self.last(self.first(inputs).tanh())
"""
EXPERIMENT = """
import torch
from torch import nn
from torch.utils.data import TensorDataset
import tracked
from served_layers import Twice

def build(params):
    inputs = torch.randn(32, 4, generator=torch.Generator().manual_seed(1))
    data = TensorDataset(inputs, inputs.sum(1, keepdim=True))
    model = Twice(4)
    # The larger the step, the worse: the best model is not the last one.
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 1 if epoch < 2 else 300)
    return tracked.Task(
        model=model, loss=nn.functional.mse_loss, optimizer=optimizer, train_data=data, val_data=data, batch_size=8,
        scheduler=schedule,
    )
"""
SCRIPT = """
import sys, numpy, mlflow
inputs = numpy.arange(12, dtype="float32").reshape(3, 4) / 7
for uri in sys.argv[1:]:
    numpy.save(f"{sys.argv.index(uri)}.npy", mlflow.pyfunc.load_model(uri).predict(inputs))
assert "tracked.experiment" not in sys.modules  # of what is installed, MLflow imports the plugin itself
"""


def test_the_best_model_of_a_finished_run_is_loaded_and_served_by_mlflow_alone(
    remote_workplace: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    workplace = remote_workplace
    workplace.experiment(LAYERS, "served_layers.py")
    file = workplace.experiment(EXPERIMENT, "served_net.py")
    line = ["train", file, "--epochs", 3, "--register", "served", "--drain-timeout", 200]
    done = workplace.tracked(*line, "--json", timeout=250)
    run_id = done.json["run_id"]
    client = MlflowClient(workplace.tracking_uri)
    run = client.get_run(run_id)
    assert run.outputs is not None
    assert run.inputs is not None
    (output,) = run.outputs.model_outputs
    model = client.get_logged_model(output.model_id)
    assert (model.name, model.status, model.source_run_id) == ("model", "READY", run_id)
    version = client.get_model_version_by_alias("served", "best")
    assert version.run_id == run_id
    assert version.source == f"models:/{model.model_id}"

    # The step, its values, and the data set that they were measured on.
    best_step = int(run.data.tags["tracked.best"].rpartition(" ")[2])
    assert output.step == best_step == 8
    (data,) = (each.dataset for each in run.inputs.dataset_inputs)
    values = {each.key: each for each in model.metrics or []}
    (point,) = (each for each in client.get_metric_history(run_id, "val/loss") if each.step == best_step)
    assert values["val/loss"].value == point.value
    assert values["val/loss"].dataset_digest == data.digest
    assert workplace.tracked("verify", run_id).returncode == 0

    # Where neither this package nor the experiment can be imported.
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "MLFLOW_TRACKING_URI")}
    environment |= {"MLFLOW_TRACKING_URI": workplace.tracking_uri, "MLFLOW_DISABLE_TELEMETRY": "true"}
    folder = workplace.path / "elsewhere"
    folder.mkdir()
    uris = [f"runs:/{run_id}/model", "models:/served@best"]
    subprocess.run([sys.executable, "-I", "-c", SCRIPT, *uris], cwd=folder, env=environment, check=True)
    found = [np.load(folder / f"{number}.npy") for number in (1, 2)]
    state = retrieve(place_of(workplace), run_id, workplace.path / "down", silent, step=best_step).state
    weights = state["model_state_dict"]
    inputs = torch.arange(12.0).view(3, 4) / 7
    hidden = (inputs @ weights["first.weight"].T + weights["first.bias"]).tanh()
    expected = hidden @ weights["last.weight"].T + weights["last.bias"]
    for each in found:
        torch.testing.assert_close(torch.from_numpy(each), expected)

    # A model with signature and example, which has no sample of the data in it.
    monkeypatch.setenv("MLFLOW_TRACKING_URI", workplace.tracking_uri)
    info = mlflow.models.get_model_info(f"models:/{model.model_id}")
    assert info.signature.inputs.input_types() == [np.dtype("float32")]
    assert [each.shape for each in (info.signature.inputs.inputs[0], info.signature.outputs.inputs[0])] == [
        (-1, 4),
        (-1, 1),
    ]
    assert info.saved_input_example_info is not None


def test_what_a_killed_process_began_is_replaced_and_what_it_ended_is_not_logged_again(
    tmp_path: Path, server_uri: str
) -> None:
    client = MlflowClient(server_uri)
    experiment = client.create_experiment(tmp_path.name)
    run_id = client.create_run(experiment).info.run_id
    (tmp_path / flavour.CODE).mkdir()
    torch.save(torch.nn.Linear(4, 1), tmp_path / flavour.CODE / "module.pt")
    about = {"mark": "this one", "code": [], "imports": [], "step": 0, "register": None}
    write_json(tmp_path / flavour.ABOUT, about)
    begun = client.create_logged_model(experiment, "model", run_id, {"tracked.packed": "this one"})

    for _ in range(2):
        assert flavour.log(tmp_path, server_uri, run_id)[0] == 0
    (found,) = client.search_logged_models([experiment])
    assert found.model_id != begun.model_id
    assert found.status == "READY"


def test_a_server_that_is_away_is_asked_again_later(tmp_path: Path) -> None:
    write_json(
        tmp_path / flavour.ABOUT, {"mark": "1", "code": [], "imports": [], "step": 0, "register": None}
    )
    status, said = flavour.log(tmp_path, "http://127.0.0.1:9", "0" * 32)
    assert status == flavour.LATER
    assert "127.0.0.1" in said
