"""The training's end of the pipe, where things are pulled away under it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

import tracked
from tests.processes import wait_until
from tracked.attempts import rehearse
from tracked.errors import MetricError
from tracked.journal import Reader
from tracked.packing import unpack
from tracked.pipe import Progress, Retention
from tracked.points import PointLog
from tracked.schedule import Settings
from tracked.tracking import Run

NOBODY = "http://127.0.0.1:9"


def test_a_spool_deleted_under_its_training_is_not_taken_for_delivered(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spool = tmp_path / "spool"
    run = tracked.start("gone", tracking_uri=NOBODY, spool_dir=spool, drain_timeout=0.5, progress=False)
    run.log({"loss": 1.0})
    shutil.rmtree(spool)

    assert run.finish() >= 1
    assert "not delivered yet" in caplog.text


def test_the_newest_and_the_best_checkpoints_stay() -> None:
    retention = Retention(last=2, best=1, mode="max")
    values = {1: 0.5, 2: 0.9, 3: None, 4: 0.7, 5: 0.8}

    kept = [retention.add({"step": step, "value": value}) for step, value in values.items()]

    assert kept == [{1}, {1, 2}, {2, 3}, {2, 3, 4}, {2, 4, 5}]


def test_a_checkpoint_written_again_counts_once() -> None:
    retention = Retention(last=2, best=0, mode="min")

    kept = [retention.add({"step": step, "value": None}) for step in (10, 20, 20)]

    assert kept[-1] == {10, 20}


class Cracked(Progress):
    """A display that cannot be written to."""

    def update(self, run: Run) -> None:  # noqa: ARG002
        raise OSError("no terminal")


def test_what_a_display_raises_does_not_end_the_journal(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Run(rehearse(tmp_path, {}), Settings(max_steps=1), progress=Cracked()) as run:
        wait_until(lambda: "no terminal" in caplog.text, "the display's error")
        run.log({"loss": 1.0})
        journal = Reader(run._pipe._journal.folder, ("points",))
        wait_until(lambda: any(each.kind == "points" for each in journal.records("points")), "the point")


def test_points_on_a_device_that_failed_do_not_take_the_others_with_them() -> None:
    points = PointLog()
    points.log(1, {"here": 1.0, "there": torch.ones((), device="meta")})  # cannot be read, as after an error

    assert [point[0] for point in points.drain()] == ["here"]


def test_a_run_that_is_over_gives_back_the_memory_of_its_checkpoints(tmp_path: Path) -> None:
    def held() -> int:
        links = (each.readlink() for each in Path("/proc/self/fd").iterdir() if each.is_symlink())
        return sum("tracked-checkpoint" in link.name for link in links)

    before = held()
    with Run(rehearse(tmp_path, {}), Settings(max_steps=2)) as run:
        list(run.steps())
        assert held() > before
    assert held() == before


def test_the_best_checkpoint_stays_known_while_it_is_being_written(tmp_path: Path) -> None:
    with Run(
        rehearse(tmp_path, {}), Settings(max_steps=3, monitor="loss", checkpoint_every=("1000 steps",))
    ) as run:
        for step in run.steps():
            run.log({"loss": float(step)})  # the first is the best
            if step == 2:
                run.save()
            if step == 3:
                assert 1 in [each["step"] for each in run._compose()["checkpoints"]]


class Numbered:
    """Counts as a whole number, as NumPy's and torch's integers do."""

    def __index__(self) -> int:
        return 7


def test_steps_are_whole_numbers_that_a_journal_can_hold(tmp_path: Path) -> None:
    with Run(rehearse(tmp_path, {}), Settings()) as run:
        for step in (1.5, "3", 1 << 63, None.__class__):
            with pytest.raises(MetricError, match="is logged at step"):
                run.log({"loss": 1.0}, step=step)  # type: ignore[arg-type]
        run.log({"loss": 1.0}, step=Numbered())  # type: ignore[arg-type]

    (journal,) = run._attempt.folder.journals()
    (record,) = (each for each in Reader(journal, ("points",)).records("points") if each.kind == "points")
    assert [point[:2] for point in unpack(record.body)] == [("loss", 7)]
