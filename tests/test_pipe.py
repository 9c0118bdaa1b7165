"""The training's end of the pipe, where things are pulled away under it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import tracked
from tracked.pipe import Retention

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
