"""The table of a sweep says which trial is best, whatever the trials went through."""

from __future__ import annotations

import math
from typing import get_args

import pytest

from tracked.ranking import best, counts, epochs_trained, epochs_without_pruning, ranking
from tracked.trials import Trial, TrialState

SWEEP = [
    Trial(0, "finished", {"lr": 0.1, "hidden": 16}, value=0.9, run_id="aaaaaaaa" + "0" * 24, epochs=10),
    Trial(1, "pruned", {"lr": 0.00012346}, value=0.4, run_id="bbbbbbbb" + "0" * 24, epochs=3),
    Trial(2, "failed", {"lr": 1.0}, epochs=2),
    Trial(3, "finished", {"lr": 0.01, "hidden": 64}, value=0.95, run_id="cccccccc" + "0" * 24, epochs=7),
    Trial(4, "running", {"lr": 0.02, "hidden": 32}, value=0.99, run_id="dddddddd" + "0" * 24, epochs=4),
    Trial(5, "pruned", {"lr": 0.03}, value=0.5, run_id="eeeeeeee" + "0" * 24, epochs=4),
]


def column(table: str, title: str) -> list[str]:
    """The cells below a title, which all begin where it begins."""
    titles, *rows = table.splitlines()
    start = titles.index(title)
    return [row[start:].split("  ")[0].strip() for row in rows]


def test_the_table_has_the_best_first_and_what_failed_last() -> None:
    table = ranking(SWEEP, metric="val/accuracy", mode="max")

    assert table.splitlines()[0].split() == [
        *("rank", "trial", "val/accuracy", "state", "epochs", "lr", "hidden", "run")
    ]
    assert column(table, "trial") == ["3", "0", "4", "5", "1", "2"]
    assert column(table, "rank") == ["1", "2", "", "", "", ""]
    assert column(table, "state") == ["finished", "finished", "running", "pruned", "pruned", "failed"]
    assert column(table, "val/accuracy") == ["0.95", "0.9", "0.99", "0.5", "0.4", ""]
    assert column(table, "lr") == ["0.01", "0.1", "0.02", "0.03", "0.0001235", "1"]
    assert column(table, "hidden") == ["64", "16", "32", "", "", ""]
    assert column(table, "run") == ["cccccccc", "aaaaaaaa", "dddddddd", "eeeeeeee", "bbbbbbbb", ""]


def test_where_less_is_better_the_least_is_first() -> None:
    assert column(ranking(SWEEP, metric="loss", mode="min"), "trial") == ["0", "3", "4", "1", "5", "2"]


def test_a_limit_says_what_it_leaves_out() -> None:
    table = ranking(SWEEP, metric="loss", mode="max", limit=3)

    assert column(table, "trial")[:3] == ["3", "0", "4"]
    assert table.splitlines()[4:] == ["… and 2 pruned, 1 failed"]
    assert "…" not in ranking(SWEEP, metric="loss", mode="max", limit=6)


def test_run_ids_are_as_long_as_tells_them_apart() -> None:
    trials = [Trial(at, "finished", value=1.0, run_id=f"0123456789{at}".ljust(32, "0")) for at in range(2)]

    assert column(ranking(trials, metric="loss", mode="min"), "run") == ["01234567890", "01234567891"]


@pytest.mark.parametrize("name", ["a\nname", "a " + "very " * 40 + "long name", "\udc80"])
def test_a_name_or_value_of_any_kind_keeps_the_table_in_rows(name: str) -> None:
    trials = [Trial(at, "finished", {name: value}, value=1.0) for at, value in enumerate([None, True, name])]

    table = ranking(trials, metric=name, mode="min")

    lines = table.encode().decode().splitlines()
    assert len(lines) == 4
    assert max(map(len, lines)) < 120


def test_nothing_yet_is_a_table_too() -> None:
    assert ranking([], metric="loss", mode="min").splitlines() == []


def test_the_best_has_finished_and_is_a_number() -> None:
    assert best(SWEEP, "max") is SWEEP[3]
    assert best(SWEEP, "min") is SWEEP[0]
    assert best(SWEEP[1:3], "max") is None
    nan = Trial(9, "finished", value=math.nan)
    assert best([nan, SWEEP[0]], "max") is SWEEP[0]
    assert best([nan, SWEEP[0]], "min") is SWEEP[0]
    assert best([nan, Trial(10, "finished")], "min") is None


@pytest.mark.parametrize("mode", ["min", "max"])
def test_of_equal_ones_the_first_by_number_is_the_best(mode: str) -> None:
    trials = [Trial(number, "finished", value=0.5) for number in (2, 1, 3)]

    assert best(trials, "min" if mode == "min" else "max") is trials[1]


def test_a_nan_that_finished_has_no_rank() -> None:
    table = ranking([Trial(0, "finished", value=math.nan), SWEEP[0]], metric="loss", mode="min")

    assert column(table, "trial") == ["0", "0"]
    assert column(table, "loss") == ["0.9", "nan"]
    assert column(table, "rank") == ["1", ""]


def test_trials_are_counted_by_every_state() -> None:
    assert counts(SWEEP) == {"finished": 2, "running": 1, "pruned": 2, "failed": 1}
    assert set(counts([])) == set(get_args(TrialState))
    assert counts([]) == {"finished": 0, "running": 0, "pruned": 0, "failed": 0}


def test_without_pruning_what_was_stopped_would_have_trained_in_full() -> None:
    assert epochs_trained(SWEEP) == 10 + 3 + 2 + 7 + 4 + 4
    assert epochs_without_pruning(SWEEP, full=10) == 10 + 10 + 2 + 7 + 10 + 10
    assert epochs_without_pruning(SWEEP[:1], full=5) == 10
