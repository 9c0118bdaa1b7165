"""When something is due: by steps, epochs and seconds."""

from __future__ import annotations

import math

import pytest

from tracked.schedule import Due


@pytest.mark.parametrize(
    ("texts", "due_at"),
    [
        (["3 steps"], [3, 6, 9, 12]),
        (["1 epoch"], [4, 8, 12]),
        (["2 epochs"], [8]),
        (["5 steps", "1 epoch"], [4, 5, 8, 10, 12]),
        ([], []),
    ],
)
def test_intervals_of_steps_and_epochs_end_on_a_fixed_grid(texts: list[str], due_at: list[int]) -> None:
    due = Due(texts)
    found = [
        step for step in range(1, 13) if due.is_due(step=step, epoch=step // 4, epoch_ended=step % 4 == 0)
    ]
    assert found == due_at


def test_the_next_step_is_the_first_that_is_due_by_steps() -> None:
    due = Due(["6 steps", "4 steps", "1 epoch"])
    assert [due.next_step(step) for step in (0, 3, 4, 5, 6, 11, 12)] == [4, 4, 6, 6, 8, 12, 16]
    assert Due(["1 epoch", "5 min"]).next_step(7) == math.inf
    assert Due(["1 epoch", "0.1 s"]).next_step(7) == 8  # too short for anybody who looks now and then


def test_seconds_count_from_the_last_time_that_anything_happened() -> None:
    now = 100.0
    due = Due(["1 min", "10 s"], clock=lambda: now)
    assert not due.is_late()
    now += 9.5
    due.happened()
    now += 9.5
    assert not due.is_due(step=1, epoch=0, epoch_ended=False)
    now += 0.5
    assert due.is_late()
    assert due.is_due(step=1, epoch=0, epoch_ended=False)
