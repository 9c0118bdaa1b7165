"""Trainings of Lightning and of Hugging Face's Trainer that are killed, and go on in the same MLflow run."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import uuid
from pathlib import Path

import pytest
from mlflow import MlflowClient

from tests.processes import ROOT, Workplace
from tracked.errors import CheckpointError
from tracked.logged_run import LoggedRun
from tracked.provenance import host_name
from tracked.resumption import Edge, Resumption, points_again

# Killed when all that was logged is on the server: what the checkpoint does not know would stand there twice.
DYING = """
    import os, signal, sys
    import mlflow

    def die(run_id):
        mlflow.MlflowClient().get_run(run_id)
        os.kill(os.getpid(), signal.SIGKILL)
"""

LIGHTNING = (
    DYING
    + """
    import torch
    import lightning.pytorch as pl
    from lightning.pytorch.loggers import MLFlowLogger
    from torch.utils.data import DataLoader, TensorDataset
    import tracked
    from tracked.lightning import RunCheckpoint

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.save_hyperparameters({"lr": 0.1})
            self.net = torch.nn.Linear(4, 1)

        def training_step(self, batch, number):
            if (self.current_epoch, number) == (2, 6) and "die" in sys.argv:
                die(self.logger.run_id)
            x, y = batch
            loss = torch.nn.functional.mse_loss(self.net(x), y)
            self.log("train/loss", loss, on_step=True, on_epoch=True)
            return loss

        def validation_step(self, batch, _):
            x, y = batch
            self.log("val/loss", torch.nn.functional.mse_loss(self.net(x), y))

        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=self.hparams.lr, momentum=0.9)
            return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)]

    pl.seed_everything(0)
    x = torch.randn(64, 4)
    loader = DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=8)
    logger = MLFlowLogger("EXPERIMENT", tracking_uri=os.environ["MLFLOW_TRACKING_URI"], run_id=tracked.resumed_run_id())
    trainer = pl.Trainer(
        max_epochs=4, logger=logger, log_every_n_steps=1, accelerator="cpu", enable_progress_bar=False,
        callbacks=[RunCheckpoint(every_n_train_steps=EVERY), pl.callbacks.LearningRateMonitor()],
        default_root_dir=sys.argv[1],
    )
    trainer.fit(Module(), loader, loader, ckpt_path=tracked.fetch_checkpoint())
    print(logger.run_id)
"""
)  # fmt: skip

HUGGING_FACE = (
    DYING
    + """
    import torch
    import transformers
    import tracked
    from tracked.transformers import RunCheckpoint

    from tests.trainings_of_others import Rows, WithLoss

    class Dying(transformers.TrainerCallback):
        def on_log(self, args, state, control, **kwargs):
            if state.global_step == 11 and "die" in sys.argv:
                die(mlflow.active_run().info.run_id)

    mlflow.set_experiment("EXPERIMENT")
    torch.manual_seed(0)
    trainer = transformers.Trainer(
        WithLoss(),
        transformers.TrainingArguments(
            output_dir=sys.argv[1], num_train_epochs=2, per_device_train_batch_size=8, logging_steps=1,
            report_to=["mlflow"], save_steps=EVERY, disable_tqdm=True, use_cpu=True, remove_unused_columns=False,
        ),
        train_dataset=Rows(), callbacks=[Dying(), RunCheckpoint()],
    )
    trainer.train(resume_from_checkpoint=tracked.fetch_checkpoint())
    print(mlflow.last_active_run().info.run_id)
"""
)  # fmt: skip


def histories(client: MlflowClient, run_id: str) -> dict[str, list[tuple[int, float]]]:
    keys = client.get_run(run_id).data.metrics
    found = {key: client.get_metric_history(run_id, key) for key in keys if not key.startswith("train_")}
    return {key: [(point.step, point.value) for point in points] for key, points in found.items()}


def steps(found: dict[str, list[tuple[int, float]]]) -> dict[str, list[int]]:
    return {key: [step for step, _ in points] for key, points in found.items()}


def killed_and_resumed(workplace: Workplace, script: str) -> tuple[str, str, str]:
    """An undisturbed run, one that was killed and went on, and what the second process said."""
    script = textwrap.dedent(script).replace("EXPERIMENT", workplace.path.name)
    (workplace.path / "train.py").write_text(script)
    address = {"MLFLOW_TRACKING_URI": f"tracked+{workplace.tracking_uri}"}
    straight = workplace.program("train.py", "straight", env=address)
    stdout, stderr = straight.communicate(timeout=200)
    assert straight.returncode == 0, stderr
    killed = workplace.program("train.py", "killed", "die", env=address)
    _, stderr = killed.communicate(timeout=200)
    assert killed.returncode == -signal.SIGKILL, stderr
    client = MlflowClient(workplace.tracking_uri)
    undisturbed = stdout.split()[-1]
    experiment = client.get_run(undisturbed).info.experiment_id
    [run_id] = {run.info.run_id for run in client.search_runs([experiment])} - {undisturbed}

    line = ("resume", run_id[:12], "--", sys.executable, "train.py", "resumed")
    resumed = workplace.start(*line, env=address)
    stdout, stderr = resumed.communicate(timeout=200)
    assert resumed.returncode == 0, stderr
    assert stdout.split()[-1] == run_id
    assert len(client.search_runs([experiment])) == 2
    return undisturbed, run_id, stderr


@pytest.mark.parametrize("every", [None, 3], ids=["by epochs", "also within an epoch"])
def test_lightning_goes_on_in_the_same_run_without_a_point_twice(
    remote_workplace: Workplace, every: int | None
) -> None:
    client = MlflowClient(remote_workplace.tracking_uri)
    undisturbed, run_id, stderr = killed_and_resumed(remote_workplace, LIGHTNING.replace("EVERY", str(every)))

    wanted, found = histories(client, undisturbed), histories(client, run_id)
    assert len(wanted["train/loss_step"]) == 32
    assert len(wanted["train/loss_epoch"]) == len(wanted["val/loss"]) == 4
    for each in (wanted, found):  # logged three times at the end of an epoch
        each["epoch"] = [*dict.fromkeys(each["epoch"])]
    if every is None:
        assert found == wanted
        assert "same to the last bit" not in stderr
    else:  # Lightning begins the data anew where it goes on within an epoch: other values, each of them once
        assert steps(found) == steps(wanted)
        assert "same to the last bit" in stderr
    run = client.get_run(run_id)
    assert (run.info.status, run.data.tags["mlflow.tracked.attempt"]) == ("FINISHED", "2")
    assert json.loads(run.data.tags["tracked.checkpoint"])["step"] == 32
    kept = [each.path for each in client.list_artifacts(run_id, "checkpoints")]
    assert kept == ["checkpoints/step-00000032"]
    [file, _] = client.list_artifacts(run_id, "checkpoints/step-00000032")
    assert re.fullmatch(r"checkpoint-[0-9a-f]{8}\.ckpt", Path(file.path).name)


def test_the_trainer_goes_on_in_the_same_run_without_a_point_twice(remote_workplace: Workplace) -> None:
    client = MlflowClient(remote_workplace.tracking_uri)
    undisturbed, run_id, stderr = killed_and_resumed(remote_workplace, HUGGING_FACE.replace("EVERY", "4"))

    wanted, found = histories(client, undisturbed), histories(client, run_id)
    for each in (wanted, found):  # logged twice at the last step
        each["epoch"] = [*dict.fromkeys(each["epoch"])]
    assert found == wanted
    assert [step for step, _ in found["loss"]] == [*range(1, 17)]
    # Where a param differs (its folder), the run keeps the first, and says so.
    assert "param output_dir was killed and is resumed now" in stderr
    run = client.get_run(run_id)
    assert run.data.params["output_dir"] == "killed"
    assert json.loads(run.data.tags["mlflow.tracked.override"])["params"]["output_dir"] == [
        "killed",
        "resumed",
    ]
    assert (run.info.status, run.data.tags["mlflow.tracked.attempt"]) == ("FINISHED", "2")


@pytest.mark.parametrize(("name", "script"), [("Lightning", LIGHTNING), ("the Hugging Face", HUGGING_FACE)])
def test_these_trainings_use_what_the_readme_adds(name: str, script: str) -> None:
    [diff] = re.findall(rf"```diff\n # {name}(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)

    lines = [line[1:] for line in diff.splitlines() if line.startswith("+")]
    words = [line for line in lines if line.startswith(("import", "from"))]
    words += re.findall(r"\w+=tracked\.\w+\(\)", "\n".join(lines))
    assert len(words) > 2
    assert [word for word in words if word not in script] == []


# -- checkpoints of any other code

BY_HAND = """
    import os, pathlib, signal, sys
    import mlflow
    import tracked

    found = tracked.fetch_checkpoint()
    begun = int(found.read_text()) if found else 0
    with mlflow.start_run() as run:
        print(run.info.run_id, flush=True)
        for step in range(begun, 10):
            mlflow.log_metric("loss", (9.0 if "other" in sys.argv else 1.0) / (step + 1), step=step)
            if step % 3 == 2:
                mlflow.log_metric("val/accuracy", step / 10, step=step // 3)
            pathlib.Path("state.txt").write_text(str(step + 1))
            if step in (3, 6):
                tracked.LoggedRun(run.info.run_id).save_checkpoint("state.txt", step + 1, next_step=step + 1)
            if step == 8 and "die" in sys.argv:
                mlflow.get_run(run.info.run_id)
                os.kill(os.getpid(), signal.SIGKILL)
"""


def test_other_values_are_told_and_not_written_beside_the_first(workplace: Workplace) -> None:
    (workplace.path / "train.py").write_text(textwrap.dedent(BY_HAND))
    address = {"MLFLOW_TRACKING_URI": f"tracked+{workplace.tracking_uri}"}
    # One of this package's own, those that lie below others, and one of another host: none of them is `last`.
    own, below = {"mlflow.tracked.handle": uuid.uuid4().hex}, {"mlflow.parentRunId": uuid.uuid4().hex}
    client = MlflowClient(workplace.tracking_uri)
    client.create_run("0", tags=own)
    killed = workplace.program("train.py", "die", env=address)
    stdout, _ = killed.communicate(timeout=200)
    run_id = stdout.split()[0]
    for of_whom in (own, {}):
        client.create_run("0", tags={**of_whom, **below, "mlflow.tracked.host": host_name()})
    client.create_run("0", tags={"mlflow.tracked.host": "elsewhere"})

    resumed = workplace.start("resume", "last", "--", sys.executable, "train.py", "other", env=address)
    _, stderr = resumed.communicate(timeout=200)

    assert resumed.returncode == 0, stderr
    assert "loss at step 7 was 0.125 before and is 1.125 now" in stderr
    points = [(point.step, point.value) for point in client.get_metric_history(run_id, "loss")]
    assert points == [*((step, 1 / (step + 1)) for step in range(9)), (9, 0.9)]
    # Its steps are epochs, and none of them lies beyond the checkpoint's step.
    assert [point.step for point in client.get_metric_history(run_id, "val/accuracy")] == [0, 1, 2]
    assert client.get_run(run_id).data.tags["mlflow.tracked.diverged_at"] == "loss at step 7"


SAVING = """
    import pathlib
    import mlflow
    import tracked

    with mlflow.start_run() as run:
        print(run.info.run_id, flush=True)
        for step in (1, 2, 2, 3, 4, 5):
            pathlib.Path("state.txt").write_text(f"after {step}")
            tracked.LoggedRun(run.info.run_id).save_checkpoint("state.txt", step, keep_last=2)
    # What is written over it afterwards is not the checkpoint.
    pathlib.Path("state.txt").write_text("something else")
"""


def test_the_last_checkpoints_stay_each_as_it_was_when_it_was_saved(
    remote_workplace: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    workplace = remote_workplace
    (workplace.path / "train.py").write_text(textwrap.dedent(SAVING))
    address = {"MLFLOW_TRACKING_URI": f"tracked+{workplace.tracking_uri}"}
    process = workplace.program("train.py", env=address)
    stdout, stderr = process.communicate(timeout=200)
    assert (process.returncode, stderr) == (0, "")
    run_id = stdout.split()[0]

    client = MlflowClient(workplace.tracking_uri)
    kept = [Path(each.path).name for each in client.list_artifacts(run_id, "checkpoints")]
    assert kept[-1] == "step-00000005"
    assert len(kept) <= 2
    monkeypatch.setenv("TRACKED_SPOOL", str(workplace.spool))
    found = LoggedRun(run_id, workplace.tracking_uri).fetch_checkpoint()
    assert found is not None
    assert found.read_text() == "after 5"


def test_a_damaged_checkpoint_is_refused(
    remote_workplace: Workplace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    workplace = remote_workplace
    (workplace.path / "train.py").write_text(textwrap.dedent(BY_HAND))
    address = {"MLFLOW_TRACKING_URI": f"tracked+{workplace.tracking_uri}"}
    stdout, _ = workplace.program("train.py", env=address).communicate(timeout=200)
    run_id = stdout.split()[0]
    client = MlflowClient(workplace.tracking_uri)
    pointer = json.loads(client.get_run(run_id).data.tags["tracked.checkpoint"])
    other = tmp_path / Path(pointer["path"]).name
    other.write_text("8")
    client.log_artifact(run_id, str(other), str(Path(pointer["path"]).parent))
    monkeypatch.setenv("TRACKED_SPOOL", str(workplace.spool))

    with pytest.raises(CheckpointError, match="is damaged"):
        LoggedRun(run_id, workplace.tracking_uri).fetch_checkpoint()


def test_what_a_kill_leaves_of_a_checkpoint_delays_no_program_and_is_freed(
    remote_workplace: Workplace,
) -> None:
    workplace = remote_workplace
    (workplace.path / "train.py").write_text(textwrap.dedent(BY_HAND))
    address = {"MLFLOW_TRACKING_URI": f"tracked+{workplace.tracking_uri}"}
    stdout, _ = workplace.program("train.py", env=address).communicate(timeout=200)
    run_id = stdout.split()[0]
    [outbox] = workplace.outboxes()
    checkpoints = outbox.called(run_id).checkpoints
    with subprocess.Popen(["true"]) as gone:
        pass
    half, whole = checkpoints / f".saving-{gone.pid}-abc", checkpoints / "step-00000009"
    being_written = checkpoints / f".saving-{os.getpid()}-abc"
    for folder in (half, whole, being_written):
        folder.mkdir(parents=True)
        (folder / "checkpoint.txt").write_text("1000")

    line = f"import mlflow; mlflow.MlflowClient().set_tag({run_id!r}, 'a', 'b')"
    _, stderr = workplace.program("-c", line, env=address).communicate(timeout=50)
    assert stderr == ""

    workplace.tracked("gc")
    assert [folder.exists() for folder in (half, whole, being_written)] == [False, True, True]
    shutil.rmtree(being_written)
    workplace.tracked("gc")
    assert not whole.exists()


def test_checkpoints_that_lightning_writes_later_are_refused(remote_workplace: Workplace) -> None:
    script = textwrap.dedent(LIGHTNING).replace("EXPERIMENT", "later").replace("EVERY", "None")
    later = "plugins=[pl.plugins.io.AsyncCheckpointIO()], callbacks="
    (remote_workplace.path / "train.py").write_text(script.replace("callbacks=", later))
    address = {"MLFLOW_TRACKING_URI": f"tracked+{remote_workplace.tracking_uri}"}

    process = remote_workplace.program("train.py", "later", env=address)
    _, stderr = process.communicate(timeout=200)

    assert process.returncode == 1
    assert "RunCheckpoint cannot know when AsyncCheckpointIO has written a checkpoint" in stderr


def test_a_checkpoint_that_is_not_where_it_should_be_ends_no_training(remote_workplace: Workplace) -> None:
    script = textwrap.dedent(HUGGING_FACE).replace("EXPERIMENT", "elsewhere").replace("EVERY", "4")
    moved = "import shutil\nclass Moves(transformers.TrainerCallback):\n"
    moved += "    def on_save(self, args, *_, **__):\n        shutil.rmtree(args.output_dir)\n"
    script = script.replace("mlflow.set_experiment(", f"{moved}mlflow.set_experiment(")
    (remote_workplace.path / "train.py").write_text(script.replace("Dying(), ", "Moves(), "))
    address = {"MLFLOW_TRACKING_URI": f"tracked+{remote_workplace.tracking_uri}"}

    process = remote_workplace.program("train.py", "elsewhere", env=address)
    _, stderr = process.communicate(timeout=200)

    assert process.returncode == 0, stderr
    assert "there is no checkpoint at" in stderr


@pytest.mark.parametrize(
    ("history", "again"),
    [
        ([(9, 10, 1.0), (10, 20, 1.0), (10, 21, 1.0), (11, 30, 2.0)], {10: [1.0, 1.0], 11: [2.0]}),
        ([(0, 10, 1.0), (1, 20, 2.0), (2, 30, 3.0)], {2: [3.0]}),  # epochs
        ([(0, 10, 1.0), (0, 20, 2.0), (0, 30, 3.0)], {}),  # logged without a step
    ],
)
def test_what_will_be_logged_again_lies_beyond_the_checkpoint_by_step_or_time(
    history: list[tuple[int, int, float]], again: dict[int, list[float]]
) -> None:
    assert points_again(history, Edge(10, 25)) == again


def test_a_point_stands_as_often_as_it_was_delivered() -> None:
    resumption = Resumption({}, {"loss": {1: [0.5, 0.5]}})

    assert [resumption.stands("loss", 1, 0.5) for _ in range(3)] == [True, True, False]


def test_a_checkpoint_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no checkpoint at"):
        LoggedRun("0" * 32, f"sqlite:///{tmp_path}/mlflow.db").save_checkpoint(tmp_path / "none", 1)


def test_without_a_resume_there_is_nothing_to_fetch(remote_workplace: Workplace) -> None:
    workplace = remote_workplace
    (workplace.path / "train.py").write_text(
        "import tracked; print(tracked.fetch_checkpoint(), tracked.resumed_run_id())"
    )
    stdout, stderr = workplace.program("train.py").communicate(timeout=200)
    assert stdout.split() == ["None", "None"], stderr
