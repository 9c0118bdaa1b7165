"""Logs a module that was packed into a folder as a model of MLflow's PyTorch flavour: a process of its own.

It imports torch, MLflow and the user's classes, which a sender must not. What it has begun and not ended is deleted
by the next one to try, and what is logged already is not logged again.
"""

from __future__ import annotations

import inspect
import os
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tracked.address import redact
from tracked.spool import Lock, read_json

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel, Run

ALIAS = "best"
NAME = "model"
ABOUT, EXAMPLE, CODE = "about.json", "example.pt", "code"
LATER = 75
"""The exit status that asks for another try: the server did not answer as it should."""
_MARK = "tracked.packed"
_SECONDS = 600.0
# What a server answers so, it will answer again: the name of a registered model, a right, a feature that it lacks.
_FINAL = {
    *("INVALID_PARAMETER_VALUE", "PERMISSION_DENIED", "UNAUTHENTICATED"),
    *("ENDPOINT_NOT_FOUND", "FEATURE_DISABLED", "NOT_IMPLEMENTED"),
}


def log(folder: Path, tracking_uri: str, run_id: str) -> tuple[int, str]:
    """Run the process for what `modelling.pack` left in `folder`.

    Returns:
        Its exit status, and the last line that it said.
    """
    line = [sys.executable, "-m", "tracked.flavour", str(folder), run_id]
    environment = {**os.environ, "MLFLOW_TRACKING_URI": tracking_uri}
    # Of a server that is away the sender asks again itself; MLflow would wait for minutes.
    environment |= {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "60"}
    try:
        done = subprocess.run(
            line,
            env=environment,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            timeout=_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return LATER, f"logging the model took more than {_SECONDS:.0f} s"
    said = done.stderr.strip().splitlines() or [""]
    return done.returncode, redact(said[-1])


def main() -> None:
    folder, run_id = Path(sys.argv[1]), sys.argv[2]
    lock = Lock(folder / "lock")
    if not lock.acquire():
        sys.exit(LATER)  # one whose sender was killed goes on by itself
    sys.path.insert(0, str(folder / CODE))
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException
    from requests import RequestException

    about = read_json(folder / ABOUT)
    try:
        client = MlflowClient()
        model = _logged(client, folder, about, run_id)
        if name := about.get("register"):
            _register(client, model, name)
    except (MlflowException, RequestException) as error:
        sys.stderr.write(f"\n{' '.join(str(error).split())[:300]}\n")
        sys.exit(1 if getattr(error, "error_code", "") in _FINAL else LATER)


def _logged(client: MlflowClient, folder: Path, about: dict[str, Any], run_id: str) -> LoggedModel:
    """The model of this folder on the server; made if it is not there whole."""
    from mlflow.entities import LoggedModelOutput

    run = client.get_run(run_id)
    found = client.search_logged_models([run.info.experiment_id], f"source_run_id = '{run_id}'")
    for each in found:
        if each.tags.get(_MARK) == about["mark"]:
            if each.status == "READY":
                return each
            client.delete_logged_model(each.model_id)
    model = client.create_logged_model(
        run.info.experiment_id,
        name=NAME,
        source_run_id=run_id,
        tags={_MARK: about["mark"]},
        params=dict(run.data.params),
    )
    client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step=about["step"])])
    _link_metrics(client, run, model.model_id, about["step"])
    local = folder / "mlflow-model"
    _save(folder, local, about, model, run_id)
    client.log_model_artifacts(model.model_id, str(local))
    return client.finalize_logged_model(model.model_id, "READY")


def _link_metrics(client: MlflowClient, run: Run, model_id: str, step: int) -> None:
    """Have the run's values at the model's step count for the model, and for the data set they were measured on.

    They are the same points to the last bit, so the run's own history stays as it is.
    """
    from mlflow.entities import Metric

    inputs: dict[str, Any] = {}
    for each in run.inputs.dataset_inputs if run.inputs else []:
        for tag in each.tags:
            if tag.key == "mlflow.data.context":
                inputs |= dict.fromkeys(tag.value.split(", "), each.dataset)
    metrics = []
    for key in run.data.metrics:
        measured = "training" if key.startswith("train/") else "validation"
        data = inputs.get(measured) if "/" in key else None  # an epoch is no measurement
        metrics += [
            Metric(
                key,
                point.value,
                point.timestamp,
                point.step,
                model_id=model_id,
                dataset_name=data.name if data else None,
                dataset_digest=data.digest if data else None,
                run_id=run.info.run_id,
            )
            for point in client.get_metric_history(run.info.run_id, key)
            if point.step == step
        ]
    if metrics:
        client.log_batch(run.info.run_id, metrics=metrics)


def _save(folder: Path, to: Path, about: dict[str, Any], model: LoggedModel, run_id: str) -> None:
    """Write the model as MLflow has it, anew: what a killed process left of it is of no use."""
    import mlflow.pytorch
    import torch
    from mlflow.models import Model, infer_signature

    shutil.rmtree(to, ignore_errors=True)
    module = torch.load(folder / CODE / "module.pt", weights_only=False)
    example = signature = None
    if (folder / EXAMPLE).exists():
        inputs = torch.load(folder / EXAMPLE, weights_only=True)
        with torch.no_grad():
            outputs = module(inputs)
        if isinstance(outputs, torch.Tensor):  # else MLflow could not serve it
            example = inputs.numpy()
            signature = infer_signature(example, outputs.numpy())
    # The newest MLflow would make a program of it, which not every module becomes; older ones know no other way.
    known = inspect.signature(mlflow.pytorch.save_model).parameters
    how = {"serialization_format": "pickle"} if "serialization_format" in known else {}
    code = [str(folder / CODE / name) for name in about["code"]]
    mlflow.pytorch.save_model(
        module,
        str(to),
        mlflow_model=Model(
            artifact_path=model.artifact_location,
            model_uuid=model.model_id,
            run_id=run_id,
            model_id=model.model_id,
        ),
        code_paths=code or None,
        signature=signature,
        input_example=example,
        pip_requirements=_requirements(about["imports"]),
        **how,
    )


def _requirements(imports: list[str]) -> list[str]:
    """The distributions that hold these modules, as they are installed here."""
    known = metadata.packages_distributions()
    names = {"mlflow", "torch", "numpy", *(each for name in imports for each in known.get(name, ())[:1])}
    # "+cpu" and the like are builds of one machine.
    return sorted(f"{name}=={metadata.version(name).partition('+')[0]}" for name in names)


def _register(client: MlflowClient, model: LoggedModel, name: str) -> None:
    import mlflow

    source = f"models:/{model.model_id}"
    found = client.search_model_versions(f"name = '{name}'")
    version = next((each.version for each in found if each.source == source), None)
    if version is None:
        version = mlflow.register_model(source, name).version
    client.set_registered_model_alias(name, ALIAS, str(version))


if __name__ == "__main__":
    main()
