"""What an evaluation says of the training: overfitting is told when it lasts, and taken back when it ends."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import tracked
from tests.trainings import Trained, differences, fitting, train
from tracked.journal import Reader
from tracked.names import OVERFITTING
from tracked.schedule import Settings
from tracked.spool import RunFolder
from tracked.stopping import Overfitting, Stopping

NAN = float("nan")
DOWN = [9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0]


@pytest.mark.parametrize(
    ("train_losses", "val_losses", "told_at", "taken_back_at"),
    [
        pytest.param(DOWN, [5, 4, 3, 2, 1, 1, 1, 1], [], [], id="a plateau"),
        pytest.param(DOWN, [5, 4, 5, 6, 7, 8, 9, 10], [5], [], id="told once, at the third"),
        pytest.param(DOWN, [5, 4, 5, 6, 5.5, 6, 7, 8], [8], [], id="three in a row"),
        pytest.param(DOWN, [5, 4, 5, 6, 7, 6, 4.5, 3], [5], [8], id="a new best, and not merely a fall"),
        pytest.param(DOWN, [1, 2, 3, 4, 0.5, 1, 2, 3], [4, 8], [5], id="again"),
        pytest.param([3.0] * 8, [1, 2, 3, 4, 5, 6, 7, 8], [], [], id="training stands still"),
        pytest.param(DOWN[::-1], [1, 2, 3, 4, 5, 6, 7, 8], [], [], id="both rise: it diverges"),
        pytest.param(DOWN, [4, 5, 6, NAN, 7, 8, 9, 10], [8], [], id="not a number"),
        pytest.param(DOWN, [NAN, 5, 6, 7, 8, 4, 3, 2], [5], [6], id="not a number at first"),
    ],
)
def test_overfitting_is_told_after_three_evaluations_in_a_row_and_taken_back_at_a_new_best(
    train_losses: list[float], val_losses: list[float], told_at: list[int], taken_back_at: list[int]
) -> None:
    overfitting = Overfitting()
    told: list[int] = []
    taken_back: list[int] = []
    for number, (loss, val) in enumerate(zip(train_losses, val_losses, strict=True), 1):
        for part in (loss - 0.5, loss + 0.5):
            overfitting.add(part)
        if overfitting.judge(100 * number, "val/loss", val):
            (told if overfitting.overfits else taken_back).append(number)
    assert (told, taken_back) == (told_at, taken_back_at)


def test_what_is_told_names_the_step_since_when_and_what_happened() -> None:
    overfitting = Overfitting()
    said = []
    for number, val in enumerate([3.0, 2.0, 2.5, 2.6, 2.7, 1.0], 1):
        overfitting.add(torch.tensor(10.0 - number, dtype=torch.float64))
        if overfitting.judge(100 * number, "val/loss", val):
            said.append(overfitting.said)
    assert said == [
        "since step 200: val/loss rose in 3 evaluations in a row while train/loss fell",
        "no longer: val/loss has a new best at step 600",
    ]


class Passing(nn.Module):
    """One weight, which training pulls from 0 to 1."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.weight + 0 * inputs


def task() -> tracked.Task:
    model = Passing()
    data = TensorDataset(torch.zeros(4, 1), torch.ones(4, 1))

    def evaluate(_: nn.Module, __: object) -> dict[str, float]:
        weight = float(model.weight.detach())
        return {"loss": abs(weight - 0.4) if weight < 0.9 else 0.0}

    return tracked.Task(
        model=model,
        loss=nn.functional.mse_loss,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.05),
        train_data=data,
        val_data=data,
        batch_size=1,
        evaluate=evaluate,
    )


def told(trained: Trained) -> list[str]:
    """What the tag was set to, one after the other."""
    return [
        record.body[OVERFITTING]
        for journal in RunFolder(trained.checkpoints.parent).journals()
        for record in Reader(journal, ("points",)).records("points")
        if record.kind == "tags" and OVERFITTING in record.body
    ]


def test_a_resumed_training_tells_of_overfitting_what_the_uninterrupted_one_does(tmp_path: Path) -> None:
    settings = Settings(
        epochs=8, eval_every="3 steps", checkpoint_every=("7 steps", "15 steps"), keep_last=100, device="cpu"
    )
    straight = train(tmp_path, fitting(task), settings)
    since, no_longer = told(straight)
    assert since.startswith("since step 6: val/loss rose in 3 evaluations")
    assert no_longer.startswith("no longer: val/loss has a new best at step ")
    when = {since: 15, no_longer: int(no_longer.rpartition(" ")[2])}

    for step in (7, 15, 28):  # between two evaluations, when it has just been told, and when it is over
        resumed = train(tmp_path, fitting(task), settings, straight.state(step))
        assert differences(straight, resumed, step) == []
        # What was said before is said again, for a run that was forked there.
        before = [text for text, at in when.items() if at <= step]
        assert told(resumed) == before[-1:] + [text for text, at in when.items() if at > step]


@pytest.mark.parametrize(
    ("values", "prunes_at", "patience", "verdicts"),
    [
        pytest.param([1, 2, 3], None, None, ["go on"] * 3, id="nothing stops it"),
        pytest.param([1, 2, 3], 2, None, ["go on", "pruned"], id="pruned"),
        pytest.param([3, 2, 1], 3, 2, ["go on", "go on", "patience"], id="both: patience has a result"),
        pytest.param([3, 2, 1], 2, 2, ["go on", "pruned"], id="pruned before patience is out"),
        pytest.param([3, NAN], None, 1, ["go on", "nan"], id="not a number"),
    ],
)
def test_patience_or_a_pruner_ends_a_trial_with_one_verdict(
    values: list[float], prunes_at: int | None, patience: int | None, verdicts: list[str]
) -> None:
    asked: list[tuple[int, int, float]] = []

    def pruner(step: int, epoch: int, value: float) -> bool:
        asked.append((step, epoch, value))
        return epoch == prunes_at

    stopping = Stopping("max", patience, pruner=pruner)
    found = [
        stopping.judge(10 * epoch, epoch, value) for epoch, value in enumerate(values[: len(verdicts)], 1)
    ]

    assert found == verdicts
    told = [each for each in values[: len(verdicts)] if each == each]  # noqa: PLR0124 - NaN is nobody's business
    assert asked == [(10 * epoch, epoch, value) for epoch, value in enumerate(told, 1)]
    assert stopping.is_pruned == (found[-1] == "pruned" or (prunes_at == len(values)))
    again = Stopping("max", patience)
    again.load_state_dict(stopping.state_dict())
    assert (again.is_pruned, again.best) == (stopping.is_pruned, max(told))
