"""What a training shows: a bar where there is a terminal, lines elsewhere, and a table at its end."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.test_loop import task
from tests.trainings import fitting, train
from tracked.attempts import rehearse
from tracked.progress import Bar, result
from tracked.schedule import Settings
from tracked.tracking import Run

SETTINGS = Settings(epochs=3, device="cpu", keep_last=100, checkpoint_every=("4 steps",))


class Screen(io.StringIO):
    """Takes what is written to standard error."""

    def __init__(self, *, is_terminal: bool) -> None:
        super().__init__()
        self.is_terminal = is_terminal

    def isatty(self) -> bool:
        return self.is_terminal


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_bar_over_the_whole_run_is_shown_on_a_terminal_and_nowhere_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_terminal: bool
) -> None:
    screen = Screen(is_terminal=is_terminal)
    restored = train(tmp_path, fitting(task), SETTINGS).state(4)
    monkeypatch.setattr("sys.stderr", screen)
    bar = Bar()
    with Run(rehearse(tmp_path, {}, restored), SETTINGS, progress=bar) as run:
        for step in run.batches(task().train_data, batch_size=4):
            assert len(step) == 2
            run.progress.update(run)
            if run.step == 9:
                bar.say("a line between")
    monkeypatch.undo()
    shown = screen.getvalue()

    assert "a line between\n" in shown
    if not is_terminal:
        assert shown == "a line between\n"
        return
    # Six batches in each of three epochs; time gone by and time left.
    assert "9/18 [" in shown
    assert " 50%|" in shown
    assert "epoch=2" in shown
    assert "<" in shown


def test_a_training_ends_with_a_table_of_what_it_made(tmp_path: Path) -> None:
    patient = replace(SETTINGS, epochs=20, patience=2, min_delta=1e6, monitor="val/loss")
    straight = train(tmp_path, fitting(task), patient)
    best = straight.run.stopping
    resumed = train(tmp_path, fitting(task), patient, straight.state(4)).run

    head, titles, *rows = result(resumed).splitlines()

    assert head.startswith("stopped_early at step 18 (epoch 3)  ")
    # 22 samples in an epoch, and 16 of them before the checkpoint.
    assert resumed.samples == 3 * 22 - 16
    assert f"{resumed.seconds:.1f} s  {resumed.samples / resumed.seconds:.3g} samples/s" in head
    assert head.endswith(f"{resumed.points} of {resumed.points} points delivered")
    assert resumed.points == len(straight.points)
    assert titles.split() == ["metric", "last", "best", "at", "step"]
    cells = {row.split()[0]: row.split()[1:] for row in rows}
    assert cells["val/loss"] == [f"{resumed.metrics['val/loss']:.4g}", f"{best.best:.4g}", "6"]
    assert cells["train/loss"] == [f"{resumed.metrics['train/loss']:.4g}"]
    assert "epoch" not in cells


def test_where_nobody_knows_the_samples_steps_are_counted_and_what_is_not_delivered_is_told(
    tmp_path: Path,
) -> None:
    def body(run: Run) -> None:
        for step in run.steps(5):
            run.log({"loss": torch.tensor(1 / step)})

    run = train(tmp_path, body, Settings()).run
    run.undelivered = 2

    assert run.samples is None
    assert f"{5 / run.seconds:.3g} steps/s  3 of 5 points delivered" in result(run)
