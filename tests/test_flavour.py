"""The model of a finished run is served by MLflow alone, is registered, and is logged once."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import urllib.request
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
import torch
import yaml
from mlflow import MlflowClient
from mlflow.models import Model

from tests.processes import Workplace, wait_until
from tests.servers import Answer, FakeFront, end_group, free_port
from tests.test_commands import place_of, silent
from tests.test_sender import Post, delivered
from tests.test_server import new_run
from tracked import flavour
from tracked.errors import ServerUnavailable
from tracked.names import MODULE, SETTINGS
from tracked.retrieval import retrieve
from tracked.server import Server
from tracked.spool import write_json

LAYERS = """
from torch import nn

class Twice(nn.Module):
    def __init__(self, width, first):
        super().__init__()
        self.first, self.last = first, nn.Linear(width, 1)

    def forward(self, inputs):
        return self.last(self.first(inputs).tanh())
"""
EXPERIMENT = """
import torch
from torch import nn
from torch.utils.data import TensorDataset
import torchvision
import tracked
from served_layers import Twice

def build(params):
    inputs = torch.randn(32, 4, generator=torch.Generator().manual_seed(1))
    data = TensorDataset(inputs, inputs.sum(1, keepdim=True))
    model = Twice(4, torchvision.ops.MLP(4, [4]))
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


@contextmanager
def serving(model: str, folder: Path, environment: Mapping[str, str]) -> Iterator[str]:
    """The address at which `mlflow models serve` answers for a model."""
    port = free_port()
    line = [sys.executable, "-m", "mlflow", "models", "serve", "--model-uri", model]
    line += ["--env-manager", "local", "--port", str(port)]
    with (folder / "serving.log").open("wb") as log:
        process = subprocess.Popen(
            line, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True
        )

    def answers() -> bool:
        assert process.poll() is None, (folder / "serving.log").read_text()
        with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/ping", timeout=5):
            return True
        return False

    try:
        wait_until(answers, "the model's server", 120)
        yield f"http://127.0.0.1:{port}"
    finally:
        end_group(process.pid, signal.SIGKILL)
        process.wait(30)


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
    # As in an environment that is activated: MLflow looks for uvicorn there.
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    folder = workplace.path / "elsewhere"
    folder.mkdir()
    uris = [f"runs:/{run_id}/model", "models:/served@best"]
    subprocess.run([sys.executable, "-I", "-c", SCRIPT, *uris], cwd=folder, env=environment, check=True)
    found = [np.load(folder / f"{number}.npy") for number in (1, 2)]
    state = retrieve(place_of(workplace), run_id, workplace.path / "down", silent, step=best_step).state
    weights = state["model_state_dict"]
    inputs = torch.arange(12.0).view(3, 4) / 7
    hidden = (inputs @ weights["first.0.weight"].T + weights["first.0.bias"]).tanh()
    expected = hidden @ weights["last.weight"].T + weights["last.bias"]
    for each in found:
        torch.testing.assert_close(torch.from_numpy(each), expected)

    with serving("models:/served@best", folder, environment) as address:
        body = json.dumps({"inputs": inputs.tolist()}).encode()
        request = urllib.request.Request(f"{address}/invocations", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as response:
            torch.testing.assert_close(torch.tensor(json.load(response)["predictions"]), expected)

    # A model with signature and example, which has no sample of the data in it.
    monkeypatch.setenv("MLFLOW_TRACKING_URI", workplace.tracking_uri)
    info = mlflow.models.get_model_info(f"models:/{model.model_id}")
    assert info.signature.inputs.input_types() == [np.dtype("float32")]
    assert [each.shape for each in (info.signature.inputs.inputs[0], info.signature.outputs.inputs[0])] == [
        (-1, 4),
        (-1, 1),
    ]
    assert info.saved_input_example_info is not None
    needed = mlflow.pyfunc.get_model_dependencies(f"models:/{model.model_id}")
    names = [line.partition("==")[0] for line in Path(needed).read_text().splitlines()]
    assert names == ["mlflow", "numpy", "torch", "torchvision"]  # the last one is named in the pickle alone


SETS = """
import torch
from torch import nn
from torch.utils.data import TensorDataset
import tracked

def numbers(count, name):
    inputs = torch.randn(count, 4, generator=torch.Generator().manual_seed(count))
    data = TensorDataset(inputs, inputs.sum(1, keepdim=True))
    data.name = name
    return data

def build(params):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    groups = [{"params": model[0].parameters(), "lr": 0.01}, {"params": model[1].parameters(), "lr": 0.02}]
    optimizer = torch.optim.SGD(groups)
    return tracked.Task(
        model=model, loss=nn.functional.mse_loss, optimizer=optimizer, batch_size=8,
        scheduler=torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9), scheduler_interval="step",
        train_data=numbers(32, "trained"), val_data={"val": numbers(24, "validated"), "test": numbers(16, "tested")},
    )
"""


def test_each_value_of_a_model_is_of_the_data_set_that_it_was_measured_on(workplace: Workplace) -> None:
    file = workplace.experiment(SETS)
    run_id = workplace.tracked("train", file, "--epochs", 1, "--json").json["run_id"]
    client = MlflowClient(workplace.tracking_uri)
    run = client.get_run(run_id)
    assert run.inputs is not None
    contexts = {each.dataset.name: each.tags[0].value for each in run.inputs.dataset_inputs}
    assert contexts == {"trained": "training", "validated": "validation", "tested": "test"}
    (model,) = client.search_logged_models([run.info.experiment_id])
    assert {each.key: each.dataset_name for each in model.metrics or []} == {
        "train/loss": "trained",
        "val/loss": "validated",
        "test/loss": "tested",
        "lr/0": None,
        "lr/1": None,
        "epoch": None,
    }


def packed(folder: Path, dtype: str = "float32") -> Path:
    """What a training leaves: a module that takes four numbers and gives one."""
    (folder / flavour.CODE).mkdir(parents=True)
    torch.save(torch.nn.Linear(4, 1), folder / flavour.CODE / MODULE)
    tensors = {name: {"shape": [1, n], "dtype": dtype} for name, n in (("input", 4), ("output", 1))}
    about = {"mark": "this one", "code": [], "imports": [], "tensors": tensors, "torch": torch.__version__}
    write_json(folder / flavour.ABOUT, about)
    return folder


@pytest.mark.parametrize("kind", ["server", "database"])
def test_what_a_killed_sender_began_is_ended_and_what_it_ended_is_not_logged_again(
    kind: str, tmp_path: Path, server_uri: str
) -> None:
    uri = server_uri if kind == "server" else f"sqlite:///{tmp_path}/mlflow.db"
    server = Server(uri, timeout=30)
    run = new_run(server)
    client = MlflowClient(uri, uri)
    begun = client.create_logged_model(run.experiment_id, "model", run.run_id, {"tracked.packed": "this one"})
    folder, name = packed(tmp_path / "packed"), uuid.uuid4().hex

    for _ in range(2):
        flavour.log(server, run.run_id, folder, step=3, register=name)
    (found,) = client.search_logged_models([run.experiment_id])
    assert (found.model_id, found.status) == (begun.model_id, "READY")
    outputs = client.get_run(run.run_id).outputs
    assert outputs is not None
    assert [(each.model_id, each.step) for each in outputs.model_outputs] == [(found.model_id, 3)]
    (version,) = client.search_model_versions(f"name = '{name}'")
    assert version.source == f"models:/{found.model_id}"
    assert json.loads(client.get_logged_model(found.model_id).tags["mlflow.modelVersions"]) == [
        {"name": name, "version": version.version}
    ]


@pytest.fixture(params=["server", "database"])
def registry(request: pytest.FixtureRequest, tmp_path: Path, server_uri: str) -> Iterator[Registry]:
    uri = server_uri if request.param == "server" else f"sqlite:///{tmp_path}/mlflow.db"
    server = Server(uri, timeout=30)
    yield Registry(server, MlflowClient(uri, uri), tmp_path, uuid.uuid4().hex)
    server.close()


@dataclass
class Registry:
    """A registered model, and runs that register theirs under its name."""

    server: Server
    client: MlflowClient
    folder: Path
    name: str

    def run(self, value: float | None, monitor: str | None = "loss", mode: str | None = "min") -> str:
        """A run that has reached `value`, and has registered its model."""
        settings = json.dumps({"monitor": monitor, "mode": mode})
        run_id = new_run(self.server, **{SETTINGS: settings}).run_id
        if value is not None:
            self.server.log_points(run_id, [("loss", 3, 1, value), ("accuracy", 3, 1, value)])
        self.end(run_id)
        return run_id

    def end(self, run_id: str) -> None:
        folder = packed(self.folder / uuid.uuid4().hex)
        flavour.log(self.server, run_id, folder, step=3, register=self.name)

    @property
    def best(self) -> str:
        found = self.client.get_model_version_by_alias(self.name, "best").run_id
        assert found is not None
        return found


@pytest.mark.parametrize(("mode", "better", "worse"), [("min", 0.1, 0.9), ("max", 0.9, 0.1)])
def test_the_alias_goes_to_a_better_model_alone(
    registry: Registry, mode: str, better: float, worse: float
) -> None:
    first = registry.run(0.5, mode=mode)
    assert registry.best == first
    poor = registry.run(worse, mode=mode)
    registry.run(0.5, mode=mode)
    assert registry.best == first
    best = registry.run(better, mode=mode)
    assert registry.best == best
    for resumed in (first, poor):
        registry.end(resumed)
    assert registry.best == best
    assert len(registry.client.search_model_versions(f"name = '{registry.name}'")) == 4


def test_the_alias_stays_where_values_cannot_be_compared_and_goes_where_there_is_none(
    registry: Registry,
) -> None:
    unmeasured = registry.run(None, monitor=None, mode=None)
    assert registry.best == unmeasured
    first = registry.run(0.5)
    assert registry.best == first
    registry.run(None, monitor=None, mode=None)
    registry.run(math.nan)
    registry.run(0.9, monitor="accuracy", mode="max")
    assert registry.best == first
    version = registry.client.get_model_version_by_alias(registry.name, "best")
    registry.server.delete_model(str(version.source).removeprefix("models:/"))
    assert registry.run(0.7) == registry.best


def test_the_files_are_those_that_mlflow_writes_itself(tmp_path: Path, server_uri: str) -> None:
    server = Server(server_uri, timeout=30)
    run = new_run(server)
    flavour.log(server, run.run_id, packed(tmp_path), step=3, register=None)
    module = torch.load(tmp_path / flavour.CODE / MODULE, weights_only=False)
    example = np.zeros((1, 4), "float32")
    signature = mlflow.models.infer_signature(example, example[:, :1])
    mlflow.pytorch.save_model(
        module,
        str(tmp_path / "theirs"),
        signature=signature,
        input_example=example,
        pip_requirements=(tmp_path / "files" / "requirements.txt").read_text().split(),
        serialization_format="pickle",
    )
    ours, theirs = ({*each.rglob("*")} for each in (tmp_path / "files", tmp_path / "theirs"))
    assert {f.relative_to(tmp_path / "files") for f in ours} == {
        f.relative_to(tmp_path / "theirs") for f in theirs
    }
    for name in ("conda.yaml", "python_env.yaml", "input_example.json", "serving_input_example.json"):
        assert yaml.safe_load((tmp_path / "files" / name).read_text()) == yaml.safe_load(
            (tmp_path / "theirs" / name).read_text()
        )
    mine, other = (Model.load(str(tmp_path / each)).to_dict() for each in ("files", "theirs"))
    for one in (mine, other):
        one["flavors"]["python_function"].pop("pickle_module_name")
        for name in (
            "model_uuid",
            "model_id",
            "utc_time_created",
            "artifact_path",
            "run_id",
            "model_size_bytes",
        ):
            one.pop(name, None)
    assert mine == other


def test_a_server_that_is_away_is_asked_again_later(tmp_path: Path) -> None:
    with pytest.raises(ServerUnavailable):
        flavour.log(Server("http://127.0.0.1:9"), "0" * 32, packed(tmp_path), step=1, register=None)


NO_MODELS = Answer(404, b"<title>404 Not Found</title>")
NO_SUCH_MODEL = Answer(404, b'{"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "no such model"}')


@pytest.mark.parametrize(
    ("dtype", "answer", "logged"),
    [
        ("complex64", None, False),  # which MLflow cannot write into an example
        ("float32", {"answer": NO_MODELS}, False),  # an old server
        ("float32", {"answer": Answer(500, b"no"), "times": 2}, True),
        ("float32", {"answer": NO_SUCH_MODEL, "times": 2}, True),
    ],
)
def test_whatever_becomes_of_the_model_its_run_ends(
    tmp_path: Path, server_uri: str, dtype: str, answer: dict[str, Any] | None, logged: bool
) -> None:
    with FakeFront(server_uri) as front:
        if answer:
            front.answer("logged-models", **answer)
        post = Post(tmp_path, front.uri)
        writing = post.writing()
        writing.points("loss", 0, 10)
        packed(writing.journal.folder / "files" / "model", dtype)
        writing.append("model", {"folder": "files/model", "step": 3, "register": None})
        writing.end()
        with post:
            writing.delivered()
    run = delivered(post, server_uri)
    assert run.info.status == "FINISHED"
    assert writing.folder.about.get("rejected", 0) == (not logged)
    found = MlflowClient(server_uri).search_logged_models([run.info.experiment_id])
    assert [each.status for each in found] == ["READY"] * logged
