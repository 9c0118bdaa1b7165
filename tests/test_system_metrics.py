"""How the machine does is logged on request, goes on over a resume, and touches nothing that the training logs."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from mlflow import MlflowClient

from tests.processes import Workplace
from tracked import system_metrics
from tracked.attempts import rehearse
from tracked.errors import UsageError
from tracked.names import is_system
from tracked.pipe import Progress
from tracked.schedule import Settings
from tracked.system_metrics import Monitor, sampling_seconds
from tracked.tracking import Run

INTERVAL = "MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL"
EVERY = {INTERVAL: "0.1"}


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
    monkeypatch.setenv(INTERVAL, "1000")
    assert Monitor(0).take() == []
    monkeypatch.setenv(INTERVAL, "1e-9")
    monitor = Monitor(7)
    samples = [monitor.take(), monitor.take()]
    assert [{step for _, step, _, _ in sample} for sample in samples] == [{7}, {8}]
    assert all(is_system(key) for sample in samples for key, *_ in sample)
    assert not is_system("system/mine")


@pytest.mark.parametrize("text", ["abc", "0", "-1", "nan", "inf", "10 s"])
def test_an_interval_that_cannot_work_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(INTERVAL, text)
    with pytest.raises(UsageError) as refused:
        sampling_seconds()
    assert refused.value.found == f"{INTERVAL} is {text!r}"


def test_an_interval_that_cannot_work_begins_no_run_and_leaves_one_as_it_stood(workplace: Workplace) -> None:
    file, wrong = workplace.experiment(), {INTERVAL: "abc"}
    line = ["train", file, "--epochs", 1, "--system-metrics", "--json"]
    begun = workplace.tracked(*line, env=EVERY)
    run_id = begun.json["run_id"]
    resume = ["resume", run_id, "--epochs", 2]
    for refused in (line, resume):
        done = workplace.tracked(*refused, env=wrong, check=False)
        assert done.returncode == 2
        assert f"{INTERVAL} is 'abc'" in done.stderr
    workplace.tracked("sync")
    client = MlflowClient(workplace.tracking_uri)
    known = client.get_experiment_by_name("experiment")
    assert known is not None
    (run,) = client.search_runs([known.experiment_id])
    assert (run.info.status, run.data.tags["tracked.state"]) == ("FINISHED", "finished")
    workplace.tracked(*resume, env=EVERY)


class Failed(Exception):
    """What NVIDIA's library raises."""


def refuse(*_: object) -> None:
    raise Failed("Not Supported")


def library(**functions: object) -> ModuleType:
    """A stand-in for NVIDIA's library, on a machine that has one device."""
    module = ModuleType("pynvml")
    vars(module).update(
        {
            "NVMLError": Failed,
            "nvmlInit": lambda: None,
            "nvmlDeviceGetCount": lambda: 1,
            "nvmlDeviceGetHandleByIndex": lambda index: index,
            "nvmlDeviceGetMemoryInfo": lambda _: SimpleNamespace(used=3e9, total=12e9),
            "nvmlDeviceGetUtilizationRates": lambda _: SimpleNamespace(gpu=71),
            "nvmlDeviceGetPowerUsage": lambda _: 90_000,
            "nvmlDeviceGetEnforcedPowerLimit": lambda _: 300_000,
            **functions,
        }
    )
    return module


@pytest.mark.parametrize("has_power", [True, False])
def test_a_device_is_sampled_as_far_as_it_tells(has_power: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    known = {} if has_power else {"nvmlDeviceGetPowerUsage": refuse}
    monkeypatch.setitem(sys.modules, "pynvml", library(**known))
    monkeypatch.setenv(INTERVAL, "1e-9")
    monitor = Monitor(0)
    found = {key: value for key, _, _, value in monitor.take() if key.startswith("system/gpu")}
    power = {"system/gpu_0_power_usage_watts": 90, "system/gpu_0_power_usage_percentage": 30}
    assert found == {
        "system/gpu_0_memory_usage_megabytes": 3000,
        "system/gpu_0_memory_usage_percentage": 25,
        "system/gpu_0_utilization_percentage": 71,
        **(power if has_power else {}),
    }
    assert all(map(is_system, found))
    assert monitor.unseen == ""


class Heard(Progress):
    """Keeps what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.warnings: list[str] = []

    def warn(self, text: str) -> None:
        self.warnings.append(text)


@pytest.mark.parametrize(
    ("missing", "has_device", "told"),
    [
        ({"psutil": None}, False, ["psutil is missing", 'pip install "tracked[system]"']),
        ({"pynvml": None}, True, ["pynvml is missing", 'pip install "tracked[system]"']),
        ({"pynvml": library(nvmlInit=refuse)}, True, ["Not Supported", "nvidia-smi"]),
        ({"pynvml": None}, False, []),
    ],
)
def test_what_cannot_be_sampled_is_told_once(
    missing: dict[str, ModuleType],
    has_device: bool,
    told: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, module in missing.items():
        monkeypatch.setitem(sys.modules, name, module)
    devices = tmp_path / "dev"
    devices.mkdir()
    (devices / "nvidia-caps").mkdir()
    if has_device:
        (devices / "nvidia0").touch()
    monkeypatch.setattr(system_metrics, "_DEVICE_FILES", devices)
    monkeypatch.setenv(INTERVAL, "1e-9")
    heard = Heard()
    with Run(rehearse(tmp_path, {}), Settings(system_metrics=True, max_steps=3), progress=heard) as run:
        for _ in run.steps():
            pass
    assert len(heard.warnings) == bool(told)
    assert all(words in warning for warning in heard.warnings for words in told)
