"""The batch files of the documentation, under a scheduler that interrupts: a job goes on in the run that it began."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow import MlflowClient

from tests.nursery import Nursery, Trainer
from tests.processes import ROOT, Workplace, wait_until
from tests.proofs import assert_whole, only_run
from tests.servers import free_port
from tests.test_takeover import EXPERIMENT

# They hand the job's step to the test and take its exit status from it, and note what goes back into the queue.
SRUN = '#!/bin/bash\nprintf "%s\\n" "$@" > asked\nread -r status < answered\nexit "$status"\n'
SCONTROL = '#!/bin/bash\necho "$@" >> queue\n'


def block(language: str) -> str:
    """The only block of that language in the documentation."""
    (found,) = re.findall(rf"```{language}\n(.*?)```", (ROOT / "docs/batch.md").read_text(), re.DOTALL)
    return str(found)


@pytest.fixture
def slow(workplace: Workplace) -> Workplace:
    """A workplace whose digits take half a second a step, until there is a file named `go`."""
    (workplace.path / "experiments").mkdir()
    workplace.experiment(
        EXPERIMENT.replace("pause: float = 0.0", "pause: float = 0.5"), "experiments/digits.py"
    )
    return workplace


def interrupt(workplace: Workplace, trainer: Trainer, number: signal.Signals) -> None:
    """Send the signal once a checkpoint is committed."""
    wait_until(
        lambda: any(
            run.about.get("committed", -1) >= 0 for outbox in workplace.outboxes() for run in outbox.runs()
        ),
        "a checkpoint",
    )
    os.kill(trainer.pid, number)


def test_a_slurm_job_is_requeued_when_it_is_interrupted_and_goes_on_in_its_run(
    slow: Workplace, nursery: Nursery
) -> None:
    (slow.path / "job.sh").write_text(block("bash"))
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (slow.path / name).write_text(text)
        (slow.path / name).chmod(0o755)
    for pipe in ("asked", "answered"):
        os.mkfifo(slow.path / pipe)
    task = {"SLURM_ARRAY_JOB_ID": "71", "SLURM_ARRAY_TASK_ID": "3"}

    def run_job() -> int:
        environment = {**slow.environment(task), "PATH": f"{slow.path}:{os.environ['PATH']}"}
        job = subprocess.Popen(["bash", "job.sh"], cwd=slow.path, env=environment)
        python, *words = (slow.path / "asked").read_text().splitlines()
        assert (python, *words[:2]) == ("python", "-m", "tracked.run")
        trainer = nursery.start(slow, *words[2:], env=task)
        if not (slow.path / "go").exists():
            interrupt(slow, trainer, signal.SIGUSR1)
        (slow.path / "answered").write_text(f"{trainer.wait().returncode}\n")
        return job.wait(10)

    assert run_job() == 75
    assert (slow.path / "queue").read_text() == "requeue 71_3\n"
    (slow.path / "go").touch()
    assert run_job() == 0
    assert run_job() == 0, "finished: there is nothing to do, and no other run"
    assert (slow.path / "queue").read_text() == "requeue 71_3\n"
    run = only_run(slow.tracking_uri, "digits")
    assert (run.info.status, run.data.params["loop.seed"]) == ("FINISHED", "3")
    assert len(assert_whole(slow.tracking_uri, run.info.run_id)["train/loss"]) == 24 * 8


def test_a_kubernetes_job_gives_an_interrupted_index_another_pod_and_a_stopped_one_none(
    slow: Workplace, nursery: Nursery
) -> None:
    spec: dict[str, Any] = yaml.safe_load(block("yaml"))["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    assert [each["name"] for each in container["env"]] == [
        "JOB_NAME",
        "JOB_COMPLETION_INDEX",
        "MLFLOW_TRACKING_URI",
    ]
    index = {"JOB_NAME": "digits", "JOB_COMPLETION_INDEX": "2"}
    words = [re.sub(r"\$\((\w+)\)", lambda name: index[name[1]], each) for each in container["command"]]
    assert words[:3] == ["python", "-m", "tracked.run"]
    assert (spec["completionMode"], pod["restartPolicy"]) == ("Indexed", "Never")

    first = nursery.start(slow, *words[3:], env=index)
    interrupt(slow, first, signal.SIGTERM)
    left = first.wait().returncode

    rules = spec["podFailurePolicy"]["rules"]
    assert {"action": "Ignore", "onExitCodes": {"operator": "In", "values": [left]}} in rules
    second = nursery.start(slow, *words[3:], env=index)
    wait_until(lambda: " goes on from step " in second.errors, "the second pod's training")
    run = only_run(slow.tracking_uri, "digits")
    MlflowClient(slow.tracking_uri).set_tag(run.info.run_id, "tracked.command", "stop")
    assert second.wait().returncode == 0
    third = nursery.run(slow, *words[3:], env=index)
    assert f"{run.info.run_id} of key 'job-digits-2-" in third.stderr
    assert "is stopped: nothing is left to do" in third.stderr
    assert only_run(slow.tracking_uri, "digits").data.tags["tracked.state"] == "stopped"


def test_while_its_server_is_down_a_keyed_training_waits_and_makes_no_run(
    slow: Workplace, nursery: Nursery, tmp_path: Path
) -> None:
    away = f"http://127.0.0.1:{free_port()}"
    line = ("train", "experiments/digits.py", "--run-key", "night", "--tracking-uri", away)

    waiting = nursery.start(slow, *line)
    wait_until(lambda: "waiting for the server" in waiting.errors, "its word")

    assert waiting.returncode is None
    assert [run for outbox in slow.outboxes() for run in outbox.runs()] == []
    assert not [*tmp_path.glob("mlruns/spool/**/attempt-*")]
    os.kill(waiting.pid, signal.SIGINT)
    assert waiting.wait().returncode == 130
