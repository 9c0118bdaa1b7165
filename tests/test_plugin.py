"""Programs that know only MLflow leave the same runs behind `tracked+http://` as behind `http://`."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import textwrap
from collections.abc import Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.artifacts import download_artifacts

from tests.processes import ROOT, Workplace
from tracked.plugin import RunContext

# What tells a run from another one that was made in the same way.
OF_ITS_OWN = ("mlflow.parentRunId", "mlflow.tracked.call", "mlflow.log-model.history")


def recorded(client: MlflowClient, run_id: str, folder: Path) -> dict[str, Any]:
    """All that MLflow has of a run and of those below it, but for IDs and times."""
    run = client.get_run(run_id)
    assert run.info.end_time >= run.info.start_time
    children = client.search_runs(
        [run.info.experiment_id], f"tags.mlflow.parentRunId = '{run_id}'", order_by=["attributes.start_time"]
    )
    outputs = run.outputs.model_outputs if run.outputs else []
    models = [client.get_logged_model(each.model_id) for each in outputs]
    return {
        "name": run.info.run_name,
        "status": run.info.status,
        "params": run.data.params,
        "tags": {key: value for key, value in run.data.tags.items() if key not in OF_ITS_OWN},
        "metrics": {
            key: [(point.step, point.value) for point in client.get_metric_history(run_id, key)]
            for key in run.data.metrics
            if not key.startswith("system/")
        },
        "inputs": sorted(
            (each.dataset.name, each.dataset.digest, each.dataset.schema, [tag.value for tag in each.tags])
            for each in (run.inputs.dataset_inputs if run.inputs else ())
        ),
        "monitored": {key for key in run.data.metrics if key.startswith("system/")},
        "artifacts": files(client, run.info.artifact_uri, folder / run_id)
        if client.list_artifacts(run_id)
        else {},
        "models": [
            (
                model.name,
                str(model.status),
                model.params,
                {m.key: m.value for m in model.metrics or () if not m.key.startswith("system/")},
                set(files(client, model.artifact_location, folder / model.model_id)),
            )
            for model in models
        ],
        "children": [recorded(client, child.info.run_id, folder) for child in children],
    }


def files(client: MlflowClient, uri: str, folder: Path) -> dict[str, str]:
    """The artifacts' paths, and what is in them."""
    folder.mkdir()
    root = Path(download_artifacts(uri, dst_path=str(folder), tracking_uri=client.tracking_uri))
    found = [path for path in root.rglob("*") if path.is_file()]
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


def both_ways(
    workplace: Workplace, *command: object, env: Mapping[str, str] | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a program leaves that ends its output with the run's ID: directly, and through the journal."""
    client = MlflowClient(workplace.tracking_uri)
    started = []
    for name, prefix in (("direct", ""), ("journaled", "tracked+")):
        address = {"MLFLOW_TRACKING_URI": f"{prefix}{workplace.tracking_uri}"}
        started.append((name, workplace.program(*command, env={**(env or {}), **address})))
    left = []
    for name, process in started:
        stdout, stderr = process.communicate(timeout=200)
        assert process.returncode == 0, stderr
        assert "tracked:" not in stderr
        folder = workplace.path / name
        folder.mkdir()
        left.append(recorded(client, stdout.split()[-1], folder))
    return left[0], left[1]


def test_the_example_leaves_the_same_runs(remote_workplace: Workplace) -> None:
    monitored = {
        "MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING": "true",
        "MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL": "0.1",
        "MLFLOW_SYSTEM_METRICS_SAMPLES_BEFORE_LOGGING": "1",
    }
    direct, journaled = both_ways(remote_workplace, ROOT / "experiments/plain_mlflow.py", env=monitored)

    # A run that is over before the first sample has none, and the journal makes runs short.
    found = journaled["monitored"]
    assert "system/cpu_utilization_percentage" in found
    assert found == direct["monitored"]
    for run in (direct, journaled):
        for each in run["children"]:
            del each["monitored"]
    assert journaled == direct
    # The comparison is of something.
    assert {f"mlflow.tracked.{name}" for name in ("host", "command", "torch", "attempt")} <= set(
        direct["tags"]
    )
    assert direct["tags"]["mlflow.source.git.commit"]
    assert direct["children"][2]["inputs"]
    assert [child["name"] for child in direct["children"]] == ["lr=0.003", "lr=0.01", "baseline"]
    assert len(direct["children"][0]["metrics"]["train/loss"]) == 69
    assert direct["children"][2]["params"]["max_iter"] == "200"
    assert {"images/digit.png", "plots/weights.png", "tried.json"} <= set(direct["artifacts"])
    assert direct["models"][0][3] == direct["models"][0][3] | {
        "best/accuracy": direct["metrics"]["best/accuracy"][0][1]
    }
    assert any(path.endswith("MLmodel") for path in direct["models"][0][4])


LIGHTNING = """
    import os
    import torch
    import lightning.pytorch as pl
    from lightning.pytorch.loggers import MLFlowLogger
    from torch.utils.data import DataLoader, TensorDataset

    class Module(pl.LightningModule):
        def __init__(self, lr=0.1):
            super().__init__()
            self.save_hyperparameters()
            self.net = torch.nn.Linear(4, 1)

        def training_step(self, batch, _):
            x, y = batch
            loss = torch.nn.functional.mse_loss(self.net(x), y)
            self.log("train/loss", loss)
            return loss

        def validation_step(self, batch, _):
            x, y = batch
            self.log("val/loss", torch.nn.functional.mse_loss(self.net(x), y))

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=self.hparams.lr)

    pl.seed_everything(0)
    x = torch.randn(64, 4)
    loader = DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=8)
    logger = MLFlowLogger("lightning", "a run", tracking_uri=os.environ["MLFLOW_TRACKING_URI"], log_model=True)
    trainer = pl.Trainer(
        max_epochs=2, logger=logger, log_every_n_steps=1, accelerator="cpu", enable_progress_bar=False,
        default_root_dir=os.path.basename(os.environ["MLFLOW_TRACKING_URI"].partition(":")[0]),
    )
    trainer.fit(Module(), loader, loader)
    print(logger.run_id)
"""  # fmt: skip


def test_lightnings_own_logger_leaves_the_same_run(remote_workplace: Workplace) -> None:
    direct, journaled = both_ways(remote_workplace, "-c", textwrap.dedent(LIGHTNING))

    direct, journaled = without_bytes(direct), without_bytes(journaled)
    assert journaled == direct
    assert [step for step, _ in direct["metrics"]["train/loss"]] == list(range(16))
    assert direct["params"]["lr"] == "0.1"
    assert any(path.endswith(".ckpt") for path in direct["artifacts"])


HUGGING_FACE = """
    import torch
    import mlflow
    import transformers

    from tests.trainings_of_others import Rows, WithLoss

    mlflow.set_experiment("hugging-face")
    torch.manual_seed(0)
    trainer = transformers.Trainer(
        WithLoss(),
        transformers.TrainingArguments(
            output_dir="out", run_name="a run", num_train_epochs=2, per_device_train_batch_size=8,
            logging_steps=1, report_to=["mlflow"], save_strategy="no", disable_tqdm=True, use_cpu=True,
            remove_unused_columns=False,
        ),
        train_dataset=Rows(),
    )
    trainer.train()
    print(mlflow.last_active_run().info.run_id)
"""  # fmt: skip


def test_the_hugging_face_trainers_own_callback_leaves_the_same_run(remote_workplace: Workplace) -> None:
    direct, journaled = both_ways(remote_workplace, "-c", textwrap.dedent(HUGGING_FACE))

    for run in (direct, journaled):
        for key in ("train_runtime", "train_samples_per_second", "train_steps_per_second"):
            del run["metrics"][key]
        # Logged twice at the last step: within one millisecond MLflow takes that for one point.
        run["metrics"]["epoch"] = [*dict.fromkeys(run["metrics"]["epoch"])]
    assert journaled == direct
    assert [step for step, _ in direct["metrics"]["loss"]] == list(range(1, 17))
    assert direct["params"]["num_train_epochs"] == "2"


def without_bytes(run: dict[str, Any]) -> dict[str, Any]:
    """The same of a run whose checkpoints tell the time."""
    return {**run, "artifacts": set(run["artifacts"])}


# -- what is installed


@pytest.mark.parametrize(
    ("group", "names"),
    [
        ("mlflow.tracking_store", {"tracked+http", "tracked+https", "tracked+sqlite"}),
        ("mlflow.model_registry_store", {"tracked+http", "tracked+https", "tracked+sqlite"}),
        ("mlflow.artifact_repository", {"mlflow-artifacts"}),
        ("mlflow.run_context_provider", {"tracked"}),
    ],
)
def test_mlflow_finds_the_plugin_without_an_import(group: str, names: set[str]) -> None:
    found = {point for point in entry_points(group=group) if point.value.startswith("tracked.")}

    assert {point.name for point in found} == names
    assert all(callable(point.load()) for point in found)


def test_an_sqlite_file_is_made_by_whoever_comes_first(workplace: Workplace) -> None:
    """MLflow's own store crashes where several processes make one at once."""
    line = "import mlflow; mlflow.start_run(); mlflow.log_metric('loss', 1.0)"
    address = {"MLFLOW_TRACKING_URI": f"tracked+{workplace.tracking_uri}"}
    for process in [workplace.program("-c", line, env=address) for _ in range(3)]:
        _, stderr = process.communicate(timeout=120)
        assert process.returncode == 0, stderr

    runs = MlflowClient(workplace.tracking_uri).search_runs(["0"])

    assert [(run.info.status, run.data.metrics) for run in runs] == [("FINISHED", {"loss": 1.0})] * 3


def test_each_run_tells_where_it_comes_from_and_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "orig_argv", ["python", "train.py", "--api-key", "sesame-open", "--lr", "0.1"])
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")

    tags = RunContext().tags()

    assert tags["mlflow.tracked.command"] == "python train.py --api-key [redacted] --lr 0.1"
    assert tags["mlflow.tracked.attempt"] == "3"
    assert tags["mlflow.tracked.torch"]
    assert tags["mlflow.tracked.host"] == os.uname().nodename
    assert "sesame" not in str(tags)


def test_a_run_names_the_commit_of_its_script_and_whether_it_is_changed(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text("from tracked.plugin import RunContext\nprint(RunContext().tags())\n")
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    for line in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        subprocess.run([*git, *line], cwd=tmp_path, check=True)
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=tmp_path, check=True, capture_output=True, text=True
    )
    script.write_text(script.read_text() + "# changed\n")

    done = subprocess.run(
        [sys.executable, script],
        cwd="/",
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )

    assert f"'mlflow.source.git.commit': '{commit.stdout.strip()}'" in done.stdout
    assert "'mlflow.tracked.git_dirty': 'true'" in done.stdout
