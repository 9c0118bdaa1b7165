"""Logs a module that a training has packed as a model of MLflow's PyTorch flavour: in the sender, without torch.

What a killed sender had begun the next one ends, and what is logged already is not logged again.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tracked.errors import NoSuchRun
from tracked.names import MODULE, SETTINGS, is_system
from tracked.spool import read_json

if TYPE_CHECKING:
    from mlflow.models import ModelSignature

    from tracked.packing import LinkedPoint
    from tracked.server import ModelView, RunView, Server

ALIAS = "best"
NAME = "model"
ABOUT, CODE = "about.json", "code"
_MARK = "tracked.packed"
_CONTEXTS = {"train": "training", "val": "validation"}  # in MLflow's words; any other set's is its name
_LARGEST_EXAMPLE = 1_000_000  # elements: MLflow writes each as text, twice


def log(server: Server, run_id: str, folder: Path, *, step: int, register: str | None) -> None:
    """Log what `modelling.log_model` left in `folder`.

    Args:
        server: Where to.
        run_id: The run that made it.
        folder: The packed module.
        step: The step of its weights.
        register: The name in the model registry under which it becomes a version, if any. The alias `best` goes to
            it if no version has that, or one that is worse by the metric that both their runs are judged by, or
            one of which nobody knows how good it is. From a version that was judged by another metric it is not
            taken: a person knows which of the two counts.

    Raises:
        RecordRejected: It can never be stored, such as under this name in the registry.
        ServerUnavailable: The same call may work later.
        ServerRefused: The server is none that keeps models, or lets this user log none.
        OSError: The files cannot be written.
    """
    about, run = read_json(folder / ABOUT), server.get_run(run_id)
    tags = {_MARK: about["mark"]}
    model = _begun(server, run, tags) or server.create_model(run, NAME, tags=tags)
    if model.status != "READY":
        server.link_model(run, model, step)
        _link_metrics(server, run, model, step)
        _write(folder, to := folder / "files", about, run, model)
        server.upload_model(model, to)
        server.finish_model(model.model_id)
    if register:
        version = server.register_model(model, run, register)
        standing = server.aliased(register, ALIAS)
        if standing is None or _is_better(server, model.model_id, standing):
            server.set_alias(register, ALIAS, version)


def forget(server: Server, run_id: str, folder: Path) -> None:
    """Delete what `log` began and can never end."""
    run = server.get_run(run_id)
    model = _begun(server, run, {_MARK: read_json(folder / ABOUT).get("mark", "")})
    if model is not None and model.status != "READY":
        server.delete_model(model.model_id)


def _begun(server: Server, run: RunView, tags: dict[str, str]) -> ModelView | None:
    """The run's model of these tags, whole or not."""
    return next((each for each in server.models(run) if each.tags.items() >= tags.items()), None)


def _link_metrics(server: Server, run: RunView, model: ModelView, step: int) -> None:
    """Have the run's values at the model's step count for the model, and for the data set they were measured on.

    They are the same points to the last bit, so the run's own history stays as it is.
    """
    datasets = server.datasets(run.run_id)
    points: list[LinkedPoint] = []
    for key, _, timestamp, value in server.points_at(run, step):
        if is_system(key) or math.isnan(value):  # of which MLflow would make a 0 here
            continue
        measured = key.split("/")[0] if "/" in key else ""  # an epoch is no measurement
        name, digest = datasets.get(_CONTEXTS.get(measured, measured), (None, None))
        points.append(
            {
                "key": key,
                "value": value,
                "timestamp": timestamp,
                "step": step,
                "model_id": model.model_id,
                "dataset_name": name,
                "dataset_digest": digest,
                "run_id": run.run_id,
            }
        )
    if points:
        server.log_points(run.run_id, points)


def _is_better(server: Server, model_id: str, standing: str) -> bool:
    """Whether the alias goes from the model `standing` to this one."""
    own, other = _judged(server, model_id), _judged(server, standing)
    if other is None:
        return True
    return own is not None and own[0] == other[0] and own[1] < other[1]


def _judged(server: Server, model_id: str) -> tuple[tuple[str, str], float] | None:
    """By what a model's run is judged, and the model's own value of it, of which less is better; None if unknown."""
    try:
        model = server.get_model(model_id)
        settings = json.loads(server.get_run(model.run_id).tags.get(SETTINGS, "{}"))
    except NoSuchRun:
        return None
    metric, mode = settings.get("monitor"), settings.get("mode") or "min"
    value = model.values.get(metric, math.nan)
    return None if math.isnan(value) else ((metric, mode), -value if mode == "max" else value)


def _write(folder: Path, to: Path, about: dict[str, Any], run: RunView, model: ModelView) -> None:
    """The files that `mlflow.pytorch.save_model` would write, which would have to import torch and load the module."""
    import numpy as np
    import yaml
    from mlflow import pyfunc
    from mlflow.models import Model
    from mlflow.models.utils import _save_example
    from mlflow.utils.environment import _mlflow_conda_env, _PythonEnv

    shutil.rmtree(to, ignore_errors=True)  # what a killed sender left of it is of no use
    (to / "data").mkdir(parents=True)
    try:
        os.link(folder / CODE / MODULE, to / "data" / "model.pth")
    except OSError:  # not every file system has links
        shutil.copyfile(folder / CODE / MODULE, to / "data" / "model.pth")
    (to / "data" / "pickle_module_info.txt").write_text("pickle")  # by which MLflow unpickles it
    for name in about["code"]:
        (to / CODE).mkdir(exist_ok=True)
        shutil.copy(folder / CODE / name, to / CODE / name)
    described = Model(
        artifact_path=model.artifact_uri,
        model_uuid=model.model_id,
        run_id=run.run_id,
        model_id=model.model_id,
    )
    if tensors := about["tensors"]:
        described.signature = _signature(tensors)
        if math.prod(tensors["input"]["shape"]) <= _LARGEST_EXAMPLE:
            # No sample of the data goes along.
            _save_example(described, np.zeros(tensors["input"]["shape"], tensors["input"]["dtype"]), str(to))
    code = CODE if about["code"] else None
    described.add_flavor("pytorch", model_data="data", pytorch_version=about["torch"], code=code)
    pyfunc.add_to_model(
        described,
        loader_module="mlflow.pytorch",
        data="data",
        pickle_module_name="pickle",
        code=code,
        conda_env="conda.yaml",
        python_env="python_env.yaml",
        model_config={"device": None},
    )
    described.model_size_bytes = sum(file.stat().st_size for file in to.rglob("*") if file.is_file())
    described.save(str(to / "MLmodel"))
    needed = _requirements(about["imports"])
    conda = _mlflow_conda_env(additional_pip_deps=needed, install_mlflow=False)  # it is among them
    (to / "conda.yaml").write_text(yaml.safe_dump(conda))
    (to / "requirements.txt").write_text("\n".join(needed))
    _PythonEnv.current().to_yaml(str(to / "python_env.yaml"))


def _signature(tensors: dict[str, dict[str, Any]]) -> ModelSignature:
    """Of a batch of any size."""
    import numpy as np
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    inputs, outputs = (
        Schema([TensorSpec(np.dtype(each["dtype"]), (-1, *each["shape"][1:]))])
        for each in (tensors["input"], tensors["output"])
    )
    return ModelSignature(inputs=inputs, outputs=outputs)


def _requirements(imports: list[str]) -> list[str]:
    """The distributions that hold these modules, as they are installed here."""
    known = metadata.packages_distributions()
    names = {"mlflow", "torch", "numpy", *(each for name in imports for each in known.get(name, ())[:1])}
    # "+cpu" and the like are builds of one machine.
    return sorted(f"{name}=={metadata.version(name).partition('+')[0]}" for name in names)
