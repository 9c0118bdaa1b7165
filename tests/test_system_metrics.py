"""How the machine does is logged on request, goes on over a resume, and touches nothing that the training logs."""

from __future__ import annotations

import pytest
from mlflow import MlflowClient

from tests.processes import Workplace
from tracked.names import is_system
from tracked.system_metrics import Monitor

EVERY = {"MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL": "0.1"}


def test_samples_go_on_over_a_resume_and_disturb_neither_verify_nor_an_override(
    remote_workplace: Workplace,
) -> None:
    workplace = remote_workplace
    file = workplace.experiment()
    line = ["train", file, "pause=0.05", "--epochs", 1, "--system-metrics", "--json"]
    run_id = workplace.tracked(*line, env=EVERY).json["run_id"]
    client = MlflowClient(workplace.tracking_uri)
    key = "system/cpu_utilization_percentage"
    first = [point.step for point in client.get_metric_history(run_id, key)]
    assert first == list(range(len(first)))
    assert len(first) >= 2

    # Asked for once. Points of the machine stand beyond every checkpoint, and are no reason against an override.
    workplace.tracked("resume", run_id, "lr=0.01", "--epochs", 2, env=EVERY)
    second = client.get_metric_history(run_id, key)
    assert [point.step for point in second] == list(range(len(second)))
    assert len(second) > len(first)
    assert all(0 <= point.value <= 100 for point in second)
    logged = client.get_run(run_id).data.metrics.keys()
    assert {"system/system_memory_usage_megabytes", "system/disk_usage_percentage"} <= logged
    assert {each for each in logged if each.startswith("system/")} == {*filter(is_system, logged)}
    assert workplace.tracked("verify", run_id).returncode == 0


def test_a_sample_has_mlflows_names_and_the_next_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "1000")
    assert Monitor(0).take() == []
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "1e-9")
    monitor = Monitor(7)
    samples = [monitor.take(), monitor.take()]
    assert [{step for _, step, _, _ in sample} for sample in samples] == [{7}, {8}]
    assert all(is_system(key) for sample in samples for key, *_ in sample)
    assert not is_system("system/mine")
