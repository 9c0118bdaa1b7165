"""The thin loop computes what a loop written by hand would, and logs it under the promised names."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset, TensorDataset

import tracked
from tests.experiments import tiny
from tests.trainings import Trained, differing, fitting, nothing, train
from tracked import loop
from tracked.attempts import rehearse
from tracked.data import Batches
from tracked.errors import LossNotFinite, UsageError
from tracked.journal import Reader
from tracked.loop import choose_device, learning_rates
from tracked.schedule import Settings
from tracked.seeding import derive, seed_generators
from tracked.tracking import Paused, Run
from tracked.training import leaving_on_signals

SETTINGS = Settings(epochs=2, device="cpu", keep_last=100)
INPUTS = torch.randn(22, 3, generator=torch.Generator().manual_seed(1))
DATA = TensorDataset(INPUTS, INPUTS.sum(1, keepdim=True))


def task(**changes: Any) -> tracked.Task:
    model = changes.pop("model", None) or nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.2), nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=changes.pop("lr", 0.05))
    given = {"loss": nn.functional.mse_loss, "train_data": DATA, "val_data": DATA, "batch_size": 4, **changes}
    return tracked.Task(model=model, optimizer=optimizer, **given)


def fitted(root: Path, settings: Settings = SETTINGS, **changes: Any) -> Trained:
    return train(root, fitting(lambda: task(**changes)), settings)


def values(trained: Trained, key: str) -> dict[int, float]:
    return {step: float(value) for name, step, value in trained.points if name == key}


def weights(trained: Trained) -> list[Tensor]:
    return list(trained.last["model_state_dict"].values())


@pytest.mark.parametrize("accumulate", [1, 4])
def test_the_loop_computes_what_one_by_hand_does(accumulate: int, tmp_path: Path) -> None:
    found = fitted(tmp_path, accumulate=accumulate, clip_norm=0.5)
    seed_generators(derive(0, "build"))
    by_hand, losses, step = task(), {}, 0
    seed_generators(derive(0, "loop"))
    model, optimizer = by_hand.model, by_hand.optimizer
    batches = Batches(DATA, batch_size=4, seed=0)
    for epoch in range(2):
        remaining = list(batches.epoch(epoch))
        while remaining:
            window, remaining = remaining[:accumulate], remaining[accumulate:]
            step += 1
            shares = [len(inputs) / len(window[0][0]) for inputs, _ in window]
            parts = []
            for (inputs, targets), share in zip(window, shares, strict=True):
                loss = nn.functional.mse_loss(model(inputs), targets) * share
                loss.backward()
                parts.append(loss.detach())
            for parameter in model.parameters():
                assert parameter.grad is not None
                parameter.grad /= sum(shares)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
            losses[step] = float(torch.stack(parts).sum() / sum(shares))
    assert values(found, "train/loss") == losses
    assert all(map(torch.equal, weights(found), model.state_dict().values()))


def masked(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    """A mean over some of the samples, as over the tokens of a text that are no padding."""
    inputs, targets = batch
    counts = inputs[:, 0] > -0.5
    return nn.functional.mse_loss(model(inputs)[counts], targets[counts]), counts.sum()


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize(
    "own", [{}, {"step": masked, "loss": None}], ids=["by samples", "by a weight of one's own"]
)
def test_a_window_of_batches_is_one_large_batch(own: dict[str, Any], precision: str, tmp_path: Path) -> None:
    def trained(batch_size: int, accumulate: int) -> Trained:
        def built() -> tracked.Task:
            model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
            changes = {"batch_size": batch_size, "accumulate": accumulate, "precision": precision}
            return task(model=model, clip_norm=0.1, **changes, **own)

        return train(tmp_path, fitting(built), SETTINGS)

    # Windows of 12 and of 10 samples, the last one of them short: 4, 4 and 2.
    small, whole = trained(4, 3), trained(12, 1)
    close = {"rtol": 1e-4, "atol": 1e-6} if precision == "fp32" else {"rtol": 1e-2, "atol": 1e-3}
    for a, b in zip(weights(small), weights(whole), strict=True):
        torch.testing.assert_close(a, b, **close)  # type: ignore[arg-type]
    losses, expected = values(small, "train/loss"), values(whole, "train/loss")
    assert losses == pytest.approx(expected, rel=close["rtol"])
    assert len(losses) == 4


def test_an_optimizer_with_a_zero_grad_of_its_own_has_it_called_in_every_step(tmp_path: Path) -> None:
    class Counting(torch.optim.SGD):
        calls = 0

        def zero_grad(self, set_to_none: bool = True) -> None:
            self.calls += 1
            super().zero_grad(set_to_none)

    built = task()
    built.optimizer = optimizer = Counting(built.model.parameters(), lr=0.05)
    train(tmp_path, lambda run: loop.fit(built, run), SETTINGS)
    assert optimizer.calls == 12


def test_metrics_are_means_over_samples_whatever_the_last_batch(tmp_path: Path) -> None:
    def error(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - targets).abs().mean()

    found = fitted(tmp_path, replace(SETTINGS, epochs=1), metrics={"error": error}, batch_size=5)
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.2), nn.Linear(4, 1)).eval()
    model.load_state_dict(found.last["model_state_dict"])
    with torch.no_grad():
        expected = (model(INPUTS) - DATA.tensors[1]).abs().mean().item()
    assert values(found, "val/error")[5] == pytest.approx(expected, rel=1e-6)


class Largest:
    """A metric that is no mean."""

    def reset(self) -> None:
        self.found = 0.0

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        self.found = max(self.found, float((outputs - targets).abs().max()))

    def compute(self) -> float:
        return self.found


def test_a_metric_with_state_is_asked_once_per_evaluation(tmp_path: Path) -> None:
    found = fitted(
        tmp_path, metrics={"largest": Largest()}, val_data={"a": DATA, "b": DATA}, monitor="a/loss"
    )
    assert sorted({key for key, *_ in found.points}) == [
        "a/largest",
        "a/loss",
        "b/largest",
        "b/loss",
        "epoch",
        "lr",
        "train/loss",
    ]
    assert values(found, "a/largest").keys() == {6, 12}
    assert values(found, "a/largest") == values(found, "b/largest")


def test_the_steps_of_everything_are_completed_steps(tmp_path: Path) -> None:
    found = fitted(tmp_path)
    assert list(values(found, "train/loss")) == list(range(1, 13))
    assert values(found, "epoch") == {6: 1, 12: 2}
    assert list(values(found, "val/loss")) == [6, 12]
    assert values(found, "lr") == {1: 0.05}


def test_an_epoch_shorter_than_the_interval_of_losses_is_logged_beside_them_and_beside_evaluations(
    tmp_path: Path,
) -> None:
    settings = replace(SETTINGS, epochs=25, log_every=10, eval_every="12 epochs")
    found = fitted(tmp_path, settings, batch_size=22)
    assert found.run.step == 25
    assert list(values(found, "train/loss")) == [10, 20]
    assert values(found, "epoch") == {10: 10, 12: 12, 20: 20, 24: 24}


def test_the_learning_rate_is_logged_when_it_changes(tmp_path: Path) -> None:
    body = fitting(lambda: tiny.build(tiny.Params(scheduler="step", evaluate=False)))
    found = train(tmp_path, body, SETTINGS)
    assert values(found, "lr") == {1: 0.05, 8: 0.025}


def test_groups_with_different_rates_are_logged_each() -> None:
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD([{"params": [model.weight], "lr": 0.1}, {"params": [model.bias], "lr": 0.2}])
    assert learning_rates(optimizer) == {"lr/0": 0.1, "lr/1": 0.2}


@pytest.mark.parametrize(
    ("loader", "steps", "order"), [({"drop_last": True}, 5, None), ({"shuffle": False}, 6, range(22))]
)
def test_the_loader_may_drop_the_last_batch_and_keep_the_order(
    loader: dict[str, Any], steps: int, order: range | None, tmp_path: Path
) -> None:
    seen: list[float] = []

    def step(model: nn.Module, batch: Any) -> Tensor:
        inputs, targets = batch
        if model.training:
            seen.extend(inputs[:, 0].tolist())
        return nn.functional.mse_loss(model(inputs), targets)

    found = fitted(tmp_path, replace(SETTINGS, epochs=1), step=step, loss=None, loader=loader)
    assert found.run.step == steps
    if order is not None:
        assert seen == INPUTS[:, 0].tolist()
    # An evaluation leaves no sample out.
    assert list(values(found, "val/loss")) == [steps]


def test_a_step_of_ones_own_weighs_its_loss_in_an_evaluation(tmp_path: Path) -> None:
    def step(model: nn.Module, batch: Any) -> tuple[Tensor, int]:
        inputs, _ = batch
        return model(inputs).sum() * 0 + len(inputs), len(inputs)

    found = fitted(tmp_path, replace(SETTINGS, epochs=1), step=step, loss=None)
    # Batches of 4, 4, 4, 4, 4 and 2: the mean of their sizes, weighted by their sizes.
    assert values(found, "val/loss") == {6: (5 * 16 + 4) / 22}


def test_an_evaluation_of_ones_own_gets_the_batches_and_no_gradients(tmp_path: Path) -> None:
    def evaluate(model: nn.Module, batches: Iterator[Any]) -> dict[str, float]:
        assert not model.training
        assert not torch.is_grad_enabled()
        return {"samples": sum(len(inputs) for inputs, _ in batches), "loss": 1.0}

    assert values(fitted(tmp_path, evaluate=evaluate), "val/samples") == {6: 22, 12: 22}


def test_an_evaluation_leaves_a_frozen_part_in_its_mode(tmp_path: Path) -> None:
    class Frozen(nn.Sequential):
        def train(self, mode: bool = True) -> Frozen:
            super().train(mode)
            self[1].eval()
            return self

    model = Frozen(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    fitted(tmp_path, model=model)
    assert model[1].num_batches_tracked.item() == 0  # type: ignore[operator]
    assert model[0].training
    assert not model[1].training


def test_an_evaluation_leaves_a_model_that_does_more_in_train_than_set_modes_as_it_was(
    tmp_path: Path,
) -> None:
    class Merging(nn.Linear):
        """As adapters do: merged into the weights for an evaluation, apart again for the training."""

        merged = False

        def train(self, mode: bool = True) -> Merging:
            self.merged = not mode
            return super().train(mode)

    def step(model: nn.Module, batch: Any) -> Tensor:
        inputs, targets = batch
        if model.training:
            assert not model.merged
        return nn.functional.mse_loss(model(inputs), targets)

    settings = replace(SETTINGS, epochs=1, eval_every="2 steps")
    found = fitted(tmp_path, settings, model=Merging(3, 1), step=step, loss=None)
    assert list(values(found, "val/loss")) == [2, 4, 6]


@pytest.mark.parametrize(("bad", "names"), [(float("nan"), "nan"), (float("inf"), "inf")])
def test_a_loss_that_is_no_number_ends_the_training_before_it_spoils_a_weight(
    bad: float, names: str, tmp_path: Path
) -> None:
    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        calls.append(1)
        return nn.functional.mse_loss(outputs, targets) * (bad if len(calls) == 9 else 1.0)

    calls: list[int] = []
    model = nn.Linear(3, 1)
    with pytest.raises(LossNotFinite, match=names):
        fitted(tmp_path, model=model, loss=loss, val_data=None)
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_a_monitored_metric_that_is_never_logged_is_refused_with_those_that_are(tmp_path: Path) -> None:
    for monitor, more, there in (
        ("val/accuracy", {}, "one of val/loss, train/loss\n"),
        ("val/loss", {"val_data": {"near": DATA, "far": DATA}}, "one of near/loss, far/loss, train/loss\n"),
        (
            "val/error/map",
            {"metrics": {"error": nn.functional.l1_loss}},
            "one of val/loss, val/error, train/loss\n",
        ),
    ):
        with pytest.raises(UsageError, match=f"'{monitor}' is never logged") as refused:
            fitted(tmp_path / "before", monitor=monitor, **more)
        assert there in str(refused.value)
    with pytest.raises(UsageError, match="one of train/loss\n"):
        fitted(tmp_path / "before", replace(SETTINGS, monitor="val/loss"), val_data=None)
    assert not [*tmp_path.glob("before/*/runs/*/checkpoints/step-*")], "before the first batch"

    with pytest.raises(UsageError, match="one of val/other\n"):
        fitted(tmp_path, monitor="val/mine", evaluate=lambda *_: {"other": 1.0})


def test_a_plateau_may_look_at_the_training_loss(tmp_path: Path) -> None:
    def build() -> tracked.Task:
        found = task(val_data=None, lr=1e-6)
        found.scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(
            found.optimizer, patience=0, threshold=0.99
        )
        return found

    settings = replace(SETTINGS, epochs=3, monitor="train/loss", keep_best=0)
    found = train(tmp_path, fitting(build), settings)
    assert len(values(found, "lr")) > 1


def test_an_error_beside_living_workers_ends_the_run_at_once(tmp_path: Path) -> None:
    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) == 3:
            raise ZeroDivisionError
        return nn.functional.mse_loss(outputs, targets)

    calls: list[int] = []
    began = time.monotonic()
    with pytest.raises(ZeroDivisionError):
        # The workers live on in the traceback, with every pipe that was open when they were forked.
        fitted(tmp_path, loss=loss, loader={"num_workers": 2, "persistent_workers": True})
    assert time.monotonic() - began < 30


def test_workers_that_stay_end_with_the_training_and_not_when_they_are_collected(tmp_path: Path) -> None:
    gc.collect()
    before = {*multiprocessing.active_children()}
    gc.disable()
    try:
        fitted(tmp_path, loader={"num_workers": 2, "persistent_workers": True})
        assert {*multiprocessing.active_children()} <= before
    finally:
        gc.enable()


def test_a_training_whose_checkpoints_cannot_be_written_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # The process that writes them dies each time it begins.
    monkeypatch.setenv("TRACKED_FAILPOINT", "archive.before-write")
    found = fitted(tmp_path)
    assert list(values(found, "train/loss")) == list(range(1, 13))
    assert found.steps == []
    assert "a checkpoint could not be written" in caplog.text


def test_a_monitor_that_is_never_logged_is_refused_before_the_first_batch(tmp_path: Path) -> None:
    class Untouched(TensorDataset):
        def __getitem__(self, index: int) -> Any:
            raise AssertionError

    given: dict[str, Any] = {
        "train_data": Untouched(*DATA.tensors),
        "metrics": {"error": nn.functional.l1_loss},
    }
    with pytest.raises(UsageError, match="one of val/loss, val/error, train/loss"):
        fitted(tmp_path, monitor="val/accuracy", **given)
    with pytest.raises(UsageError, match="'val/loss' is never logged"):
        fitted(tmp_path, replace(SETTINGS, monitor="val/loss"), val_data=None, **given)


def plateau(**changes: Any) -> tracked.Task:
    found = task(val_data=None, lr=1e-6, **changes)
    found.scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(found.optimizer, patience=0, threshold=0.99)
    return found


def test_a_plateau_has_something_to_look_at_or_is_refused(tmp_path: Path) -> None:
    found = train(tmp_path, fitting(lambda: plateau(monitor="train/loss")), replace(SETTINGS, epochs=3))
    assert len(values(found, "lr")) > 1
    with pytest.raises(UsageError, match="waits on a plateau, and no metric is monitored"):
        train(tmp_path, fitting(plateau), SETTINGS)


def test_what_never_comes_is_told_before_the_first_step(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def built() -> tracked.Task:
        found = task()
        found.model[0].weight.requires_grad_(False)  # type: ignore[index]
        found.unfreeze = {3: "0"}
        return found

    train(tmp_path, fitting(built), replace(SETTINGS, log_every=13, eval_every="3 epochs"))
    assert "the training loss is due every 13 steps, and the training has 12 steps" in caplog.text
    assert "an evaluation is due every 3 epochs, and the training has 2 epochs" in caplog.text
    assert "unfreeze at epoch 3 will not come: the training has 2 epochs" in caplog.text
    train(tmp_path, fitting(built), replace(SETTINGS, epochs=None, max_steps=5))
    assert "an evaluation is due every 1 epoch, and the training has 0 epochs: none will come" in caplog.text
    settings = replace(SETTINGS, log_every="3 epochs", monitor="train/loss", patience=1)
    with pytest.raises(UsageError, match="--log-every"):
        fitted(tmp_path, settings)


def test_the_training_loss_is_logged_as_a_mean_over_the_epoch(tmp_path: Path) -> None:
    each, mean = fitted(tmp_path), fitted(tmp_path, replace(SETTINGS, log_every="1 epoch"))
    losses = list(values(each, "train/loss").values())
    assert values(mean, "train/loss") == pytest.approx({6: sum(losses[:6]) / 6, 12: sum(losses[6:]) / 6})
    with pytest.raises(UsageError, match="steps or epochs"):
        Settings(log_every="5 min")


def test_a_validation_batch_that_weighs_nothing_counts_for_nothing(tmp_path: Path) -> None:
    def step(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        counts = batch[0][:, 0] > threshold
        loss: Tensor = model(batch[0]).mean() * 0 + batch[0][counts, 0].mean()
        return (model(batch[0]).mean() if model.training else loss), counts.sum()

    threshold = 0.9  # some batches of 2 have no such sample, and a mean over none is NaN
    found = fitted(tmp_path, replace(SETTINGS, epochs=1), step=step, loss=None, batch_size=2, accumulate=11)
    expected = INPUTS[INPUTS[:, 0] > threshold, 0].mean().item()
    assert values(found, "val/loss") == pytest.approx({1: expected})


def test_lbfgs_finds_in_a_step_what_others_need_many_for_and_has_no_scaler(tmp_path: Path) -> None:
    def built(**changes: Any) -> tracked.Task:
        found = task(model=nn.Linear(3, 1), batch_size=22, **changes)
        found.optimizer = torch.optim.LBFGS(found.model.parameters(), line_search_fn="strong_wolfe")
        return found

    found = train(tmp_path, fitting(built), replace(SETTINGS, epochs=1))
    assert values(found, "train/loss")[1] > 0.1  # where the step began
    assert values(found, "val/loss")[1] < 1e-6
    with pytest.raises(UsageError, match="LBFGS"):
        train(tmp_path, fitting(lambda: built(precision="fp16")), SETTINGS)


@pytest.mark.parametrize(("dynamic", "tagged"), [(None, True), (False, False)])
def test_a_compiled_model_whose_kernels_depend_on_what_came_before_is_tagged(
    dynamic: bool | None, tagged: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    attempt = rehearse(tmp_path, {})
    with Run(attempt, SETTINGS) as run:
        built = task()
        built.model = torch.compile(built.model, backend="eager", dynamic=dynamic)  # type: ignore[assignment]
        loop.fit(built, run)
    (journal,) = attempt.folder.journals()
    records = Reader(journal, ("points",)).records("points")
    found = [record.body for record in records if record.kind == "tags"]
    assert any(body.get("mlflow.tracked.exact") == "false" for body in found) is tagged
    assert ("torch.compile(model, dynamic=False)" in caplog.text) is tagged


@pytest.mark.parametrize("name", ["cuda:99", "tpu", "nonsense"])
def test_a_device_that_is_not_there_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="--device cpu"):
        choose_device(name)


def test_a_training_killed_when_its_patience_had_ended_ends_there_when_resumed(tmp_path: Path) -> None:
    def body(run: Run) -> None:
        for step in run.steps(100):
            run.log({"loss": float(step)})

    settings = Settings(monitor="loss", patience=3, keep_last=100)
    stopped = train(tmp_path, body, settings)
    assert stopped.run.last_state == "stopped_early"

    resumed = train(tmp_path, body, settings, stopped.last)

    assert (resumed.run.step, resumed.run.last_state, resumed.points) == (4, "stopped_early", [])


def test_a_signal_pauses_a_training_whose_terminal_is_gone(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    errors = os.dup(2)
    with Run(rehearse(tmp_path, {}), Settings()) as run, leaving_on_signals(run):
        os.dup2(writer, 2)
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            os.dup2(errors, 2)
        with pytest.raises(Paused):
            list(run.steps(3))
        assert run.step == 1
    for each in (writer, errors):
        os.close(each)


def test_an_evaluation_that_never_comes_is_told_before_the_first_step(tmp_path: Path) -> None:
    settings = replace(SETTINGS, eval_every="3 epochs", patience=2)
    with pytest.raises(UsageError, match="every 3 epochs, and the training has 2 epochs"):
        fitted(tmp_path, settings)
    with pytest.raises(UsageError, match="every 13 steps, and the training has 12 steps"):
        fitted(tmp_path, replace(settings, eval_every="13 steps"))
    with pytest.raises(UsageError, match=r"the training has 0 epochs\n.*\n.*1 step"):
        fitted(tmp_path, replace(SETTINGS, epochs=None, max_steps=3, patience=2))
    assert fitted(tmp_path, replace(settings, patience=None)).run.step == 12


def test_a_loss_that_is_never_logged_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fitted(tmp_path, replace(SETTINGS, log_every=13), val_data=None)

    assert (
        "the training loss is due every 13 steps, and the training has 12 steps: none will come"
        in caplog.text
    )


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda: {"scheduler": torch.optim.lr_scheduler.StepLR(task().optimizer, 1)}, "this very optimizer"),
        (lambda: {"step": masked, "metrics": {"error": nn.functional.l1_loss}}, "no outputs to measure"),
    ],
    ids=["a scheduler of another optimizer", "metrics of a step"],
)
def test_what_does_not_go_together_is_refused(wrong: Any, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        task(**wrong())


def test_a_precision_that_the_device_does_not_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="precision is 'fp16', which the device meta does not have"):
        fitted(tmp_path, replace(SETTINGS, device="meta"), precision="fp16")


def test_patience_in_vain_says_which_metrics_there_are(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def body(run: Run) -> None:
        for step in run.steps(3):
            run.log({"test/los": step})

    train(tmp_path, body, Settings(monitor="test/loss", patience=2))
    assert "patience waited for 'test/loss', which was never logged: there is test/los" in caplog.text


class Temperature(nn.Module):
    """A loss with something to learn of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.mse_loss(outputs * self.scale, targets)


def tempered(batch_size: int, accumulate: int) -> tracked.Task:
    model, loss = nn.Linear(3, 1), Temperature()
    optimizer = torch.optim.SGD([*model.parameters(), *loss.parameters()], lr=0.05, momentum=0.9)
    changes = {"batch_size": batch_size, "accumulate": accumulate, "train_data": DATA}
    return tracked.Task(model=model, loss=loss, optimizer=optimizer, **changes)  # type: ignore[arg-type]


def test_a_loss_that_learns_is_trained_and_resumed_like_the_model(tmp_path: Path) -> None:
    settings = replace(SETTINGS, checkpoint_every=("1 steps",))
    found = differing(tmp_path, fitting(lambda: tempered(4, 3)), settings)
    assert found == nothing(found)
    small = train(tmp_path, fitting(lambda: tempered(4, 3)), settings)
    whole = train(tmp_path, fitting(lambda: tempered(12, 1)), settings)
    scales = [float(each.last["loss_state_dict"]["scale"]) for each in (small, whole)]
    assert scales[0] == pytest.approx(scales[1], rel=1e-5) != 1.0


def test_what_the_optimizer_holds_and_nobody_saves_is_refused(tmp_path: Path) -> None:
    def built() -> tracked.Task:
        one = task()
        one.optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(7))]})
        return one

    with pytest.raises(UsageError, match=r"in neither model nor loss, of shapes \[\(7,\)\]"):
        train(tmp_path, fitting(built), SETTINGS)


def test_a_batch_that_weighs_nothing_counts_for_nothing(tmp_path: Path) -> None:
    def step(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        inputs, targets = batch
        counts = inputs[:, 0] > threshold
        return nn.functional.mse_loss(model(inputs)[counts], targets[counts]), counts.sum()

    threshold = 0.9  # some batches of 2 have no such sample, and a mean over none is NaN
    found = fitted(tmp_path, step=step, loss=None, batch_size=2, accumulate=11, val_data=None)
    assert len(values(found, "train/loss")) == 2
    threshold = 99.0
    with pytest.raises(UsageError, match="all 11 batches of step 1 weigh nothing"):
        fitted(tmp_path, step=step, loss=None, batch_size=2, accumulate=11, val_data=None)


class Drawn(IterableDataset[tuple[Tensor, Tensor]]):
    """Some of the samples, others in each pass."""

    def __init__(self) -> None:
        self.passes = 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.passes += 1
        order = torch.randperm(len(DATA), generator=torch.Generator().manual_seed(self.passes))
        return (DATA[index] for index in order.tolist()[:9])

    def state_dict(self) -> dict[str, int]:
        return {"passes": self.passes}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.passes = state["passes"]


def test_a_stream_to_validate_on_begins_anew_in_each_evaluation(tmp_path: Path) -> None:
    settings = replace(SETTINGS, checkpoint_every=("4 steps",), eval_every="3 steps")
    found = differing(tmp_path, fitting(lambda: task(val_data=Drawn())), settings)
    assert found == nothing(found)
