"""Runs beside each other: what differs, which was best, and their curves, over a server and over an SQLite file."""

from __future__ import annotations

import json
import math
import random
import urllib.parse
import uuid
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import pytest
from mlflow import MlflowClient

from tests.nursery import Nursery
from tests.processes import Result, Workplace
from tests.servers import FakeFront
from tracked import comparison, plots
from tracked.comparison import Comparison, compare
from tracked.errors import RunNotFound, UsageError
from tracked.names import BEST, SETTINGS, STATE, SWEEP
from tracked.packing import Point
from tracked.place import Place
from tracked.server import Server

START = 1_700_000_000_000


@pytest.fixture(scope="module")
def database_uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('embedded')}/mlflow.db"


@pytest.fixture(params=["server_uri", "database_uri"], ids=["http", "sqlite"])
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    opened = Server(request.getfixturevalue(request.param), timeout=30)
    yield opened
    opened.close()


@pytest.fixture
def embedded(database_uri: str) -> Iterator[Server]:
    opened = Server(database_uri, timeout=30)
    yield opened
    opened.close()


def place_of(server: Server, tmp_path: Path) -> Place:
    return Place(server.uri, tmp_path / "spool")


def silent(text: str) -> None:
    """Where a test does not care for what is said."""


def new_run(
    server: Server,
    values: Sequence[float],
    *,
    key: str = "val/loss",
    experiment: str = "compared",
    monitor: tuple[str, str] | None = ("val/loss", "min"),
    name: str = "",
    **params: str,
) -> str:
    """A run that has finished, 90 s after its start, with a value at each step from 1 on; its ID."""
    tags = {STATE: "finished"}
    if monitor:
        tags[SETTINGS] = json.dumps({"monitor": monitor[0], "mode": monitor[1]})
    handle = uuid.uuid4().hex
    view = server.create_run(
        experiment=experiment,
        handle=handle,
        name=name or f"run-{handle[:6]}",
        start_time=START,
        tags=tags,
        retry=False,
    )
    points: list[Point] = [(key, step, START + step, value) for step, value in enumerate(values, start=1)]
    server.log_points(view.run_id, points)
    server.log_params(view.run_id, params)
    server.set_status(view.run_id, "FINISHED", START + 90_000)
    return view.run_id


def cells(found: Comparison) -> dict[str, list[str]]:
    """The table of runs side by side: its first column to the others."""
    lines = found.table().split("\n\n")[0].splitlines()
    return {line[: line.index("  ")]: line.split("  ", 1)[1].split() for line in lines}


# -- histories of many runs


@pytest.mark.parametrize("about", [None, 50])
def test_many_histories_are_those_that_are_asked_for_one_by_one(server: Server, about: int | None) -> None:
    values = [[random.Random(seed).random() for _ in range(40)] for seed in range(3)]
    values[1][7] = math.nan
    runs = [new_run(server, each, key="a/b") for each in values]
    new_run(server, values[0], key="a/b")
    empty = new_run(server, values[0], key="another")

    found = server.histories([*runs, empty], "a/b", about=about)

    assert [*found] == [*runs, empty]
    assert found[empty] == []
    assert repr([found[run] for run in runs]) == repr([server.history(run, "a/b") for run in runs])
    assert [value for _, _, value in found[runs[0]]] == values[0]
    assert math.isnan(found[runs[1]][7][2])


def test_what_one_answer_cannot_hold_is_asked_for_run_by_run(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tracked.server._POINTS_IN_BULK", 50)
    runs = [new_run(server, [float(step) for step in range(count)]) for count in (3, 40, 45, 60, 1)]

    found = server.histories(runs, "val/loss")

    assert [len(found[run]) for run in runs] == [3, 40, 45, 60, 1]
    assert found == {run: server.history(run, "val/loss") for run in runs}


def test_a_thinned_history_keeps_its_ends_and_lies_evenly(server: Server) -> None:
    run = new_run(server, [float(step) for step in range(1, 2001)])

    (history,) = server.histories([run], "val/loss", about=100).values()

    steps = [step for step, *_ in history]
    assert (steps[0], steps[-1]) == (1, 2000)
    assert max(later - step for step, later in pairwise(steps)) <= 40
    assert all(value == step for step, _, value in history)
    if server.uri.startswith("http"):
        assert len(history) == 100


def test_steps_of_more_than_32_bits_are_not_lost(server: Server) -> None:
    run = new_run(server, [])
    server.log_points(run, [("loss", step, START, 1.0) for step in (2**40, 2**40 + 1)])

    assert server.histories([run], "loss", about=10) == {run: server.history(run, "loss")}


# -- what differs


def test_what_differs_stands_side_by_side_and_what_does_not_in_one_line(
    server: Server, tmp_path: Path
) -> None:
    one = new_run(server, [0.5, 0.25, 0.75], lr="0.1", batch="64")
    other = new_run(server, [0.5, math.nan, 0.125, 0.125], lr="0.01", batch="64", extra="yes")

    found = compare(place_of(server, tmp_path), [one, other[:12]], silent)

    table = cells(found)
    assert table["run"] == [one[:8], other[:8]]
    assert table["best val/loss"] == ["0.25", "0.125"]
    assert table["at step"] == ["2", "3"]
    assert table["last val/loss"] == ["0.75", "0.125"]
    assert table["step"] == ["3", "4"]
    assert table["lr"] == ["0.1", "0.01"]
    assert table["extra"] == ["yes"]
    same = found.table().splitlines()[-1]
    assert same == "the same in all 2: experiment compared, state finished, time 2 min, batch 64"
    told = found.as_json()
    assert told["params_that_differ"] == ["extra", "lr"]
    assert [(run["run_id"], run["best"], run["best_step"]) for run in told["runs"]] == [
        (one, 0.25, 2),
        (other, 0.125, 3),
    ]
    assert [run["seconds"] for run in told["runs"]] == [90.0, 90.0]


def test_many_runs_have_a_row_each(embedded: Server, tmp_path: Path) -> None:
    runs = [new_run(embedded, [1 / number], lr=str(number)) for number in range(1, 6)]

    lines = compare(place_of(embedded, tmp_path), runs, silent).table().splitlines()

    assert lines[0].split() == ["run", "name", "best", "val/loss", "last", "val/loss", "lr"]
    assert [(line.split()[0], line.split()[-1]) for line in lines[1:6]] == [
        (run[:8], str(number)) for number, run in enumerate(runs, start=1)
    ]


def test_what_differs_looks_different(embedded: Server, tmp_path: Path) -> None:
    folder = "/a/folder/whose/name/is/long"
    runs = [new_run(embedded, [1 + 1e-9 * at], data=f"{folder}/{at}", name="twin") for at in range(2)]

    found = compare(place_of(embedded, tmp_path), runs, silent)

    table = cells(found)
    assert table["data"] == [f"{folder}/0", f"{folder}/1"]
    assert table["best val/loss"] == ["1", "1.000000001"]
    assert "name twin" in found.table().splitlines()[-1]


def test_runs_that_differ_in_nothing_stand_beside_each_other_too(embedded: Server, tmp_path: Path) -> None:
    runs = [new_run(embedded, [1.0], name="twin", lr="0.1") for _ in "12"]

    assert cells(compare(place_of(embedded, tmp_path), runs, silent)) == {"run": [run[:8] for run in runs]}


def test_a_run_that_lacks_all_that_another_has_keeps_its_column(embedded: Server, tmp_path: Path) -> None:
    runs = [new_run(embedded, [1.0], name="twin"), new_run(embedded, [1.0], name="twin", lr="0.1")]

    head, row = compare(place_of(embedded, tmp_path), runs, silent).table().split("\n\n")[0].splitlines()

    assert head.split() == ["run", *(run[:8] for run in runs)]
    assert row.split() == ["lr", "0.1"]
    assert row.index("0.1") == head.index(runs[1][:8])


@pytest.mark.parametrize(
    ("metric", "best", "taken"),
    [
        ("val/accuracy", 0.9, "largest"),
        ("f1", 0.9, "largest"),
        ("score_loss", 0.1, "smallest"),
        ("err", 0.1, "smallest"),
    ],
)
def test_where_no_run_says_which_values_are_better_the_usual_ones_are_and_it_is_told(
    embedded: Server, tmp_path: Path, metric: str, best: float, taken: str
) -> None:
    runs = [new_run(embedded, values, key=metric, monitor=None) for values in ([0.1, 0.9], [0.2, 0.5])]

    found = compare(place_of(embedded, tmp_path), runs, silent)

    assert found.runs[0].summary.best == best
    assert f"the best {metric} is taken to be the {taken}: the runs do not settle it" in found.table()
    assert "settle" not in compare(place_of(embedded, tmp_path), runs, silent, mode="max").table()


def test_a_param_that_is_called_like_a_column_does_not_replace_it(embedded: Server, tmp_path: Path) -> None:
    runs = [new_run(embedded, [1.0] * steps, step="same") for steps in (2, 3)]

    found = compare(place_of(embedded, tmp_path), runs, silent)

    assert cells(found)["step"] == ["2", "3"]
    assert "step same" in found.table().splitlines()[-1]


def test_the_best_of_a_long_history_is_exact(server: Server, tmp_path: Path) -> None:
    values = [random.Random(5).random() for _ in range(3000)]
    values[1234] = -0.123456789
    runs = [new_run(server, values), new_run(server, [1.0])]

    found = compare(place_of(server, tmp_path), runs, silent, with_curves=True)

    assert (found.runs[0].summary.best, found.runs[0].best_step) == (-0.123456789, 1235)


def test_the_best_is_by_what_the_runs_monitor_unless_it_is_said_otherwise(
    embedded: Server, tmp_path: Path
) -> None:
    place = place_of(embedded, tmp_path)
    by_accuracy = [
        new_run(embedded, [0.5, 0.9, 0.7], key="val/accuracy", monitor=("val/accuracy", "max"))
        for _ in range(2)
    ]
    for run in by_accuracy:
        embedded.log_points(run, [("val/loss", 1, START, 3.0)])

    own = compare(place, by_accuracy, silent)
    other = compare(place, by_accuracy, silent, metric="val/loss")
    worst = compare(place, by_accuracy, silent, mode="min")

    assert (own.metric, own.mode, own.runs[0].summary.best) == ("val/accuracy", "max", 0.9)
    assert (other.metric, other.mode, other.runs[0].summary.best) == ("val/loss", "min", 3.0)
    assert worst.runs[0].summary.best == 0.5


def test_the_best_runs_of_an_experiment_are_found_without_a_sweeps_parent(
    server: Server, tmp_path: Path
) -> None:
    experiment = f"chosen-{uuid.uuid4().hex}"
    runs = [new_run(server, [value, 5.0], experiment=experiment) for value in (0.3, math.nan, 0.1, 0.2)]
    parent = new_run(server, [0.0], experiment=experiment)
    server.set_tags(parent, {SWEEP: "{}"})

    found = compare(place_of(server, tmp_path), [], silent, experiment=experiment, top=3)

    assert [run.summary.run_id for run in found.runs] == [runs[2], runs[3], runs[0]]


def test_only_the_histories_of_those_that_may_be_the_best_are_read(
    embedded: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = f"told-{uuid.uuid4().hex}"
    values = (0.5, 0.1000004, 0.1, 0.4, 0.2)
    runs = [new_run(embedded, [value, 5.0], experiment=experiment) for value in values]
    for run, value in zip(runs[:4], values, strict=False):  # the last was killed
        embedded.set_tags(run, {BEST: f"val/loss {value:.6g} at step 1"})
    # To this one small gains did not count.
    runs.append(new_run(embedded, [0.46, 5.0], experiment=experiment))
    settings = json.dumps({"monitor": "val/loss", "mode": "min", "min_delta": 0.05})
    embedded.set_tags(runs[5], {SETTINGS: settings, BEST: "val/loss 0.5 at step 1"})
    asked: list[str] = []

    def histories(server: Server, run_ids: Sequence[str], key: str) -> object:
        asked.extend(run_ids)
        return whole(server, run_ids, key)

    whole = Server.histories
    monkeypatch.setattr(Server, "histories", histories)
    found = compare(place_of(embedded, tmp_path), [], silent, experiment=experiment, top=2)

    assert [run.summary.run_id for run in found.runs] == [runs[2], runs[1]]
    assert sorted(asked) == sorted([runs[1], runs[2], runs[4], runs[5]])


def test_runs_that_are_named_by_their_whole_ids_are_asked_for_together(
    server_uri: str, tmp_path: Path
) -> None:
    with FakeFront(server_uri) as front:
        server = Server(front.uri)
        runs = [new_run(server, [1.0], lr=str(number)) for number in range(3)]
        front.requests.clear()

        found = compare(place_of(server, tmp_path), runs, silent)

    assert [run.summary.run_id for run in found.runs] == runs
    assert (front.count("runs/search"), front.count("runs/get")) == (1, 0)


def test_runs_that_plain_mlflow_logged_are_compared_too(server: Server, tmp_path: Path) -> None:
    client = MlflowClient(server.uri)
    experiment = client.create_experiment(f"theirs-{uuid.uuid4().hex}")
    runs = []
    for number in (1, 2):
        run_id = client.create_run(experiment).info.run_id
        for step in range(3):
            client.log_metric(run_id, "val/accuracy", number + step / 10, step=step)
        client.log_param(run_id, "depth", number)
        runs.append(run_id)

    found = compare(place_of(server, tmp_path), runs, silent, mode="max", with_curves=True)

    assert [run.summary.best for run in found.runs] == [1.2, 2.2]
    assert (found.metric, found.mode) == ("val/accuracy", "max")
    assert [run.params for run in found.runs] == [{"depth": "1"}, {"depth": "2"}]
    assert [[value for *_, value in history] for history in found.curves["val/accuracy"].values()] == [
        [1.0, 1.1, 1.2],
        [2.0, 2.1, 2.2],
    ]


def test_the_address_is_that_of_mlflows_own_page(server: Server, tmp_path: Path) -> None:
    runs = [new_run(server, [1.0]), new_run(server, [1.0], experiment="elsewhere")]

    url = compare(place_of(server, tmp_path), runs, silent).url

    host, _, query = url.partition("/#/compare-runs?")
    assert host == (server.uri if server.uri.startswith("http") else "http://127.0.0.1:5000")
    told = urllib.parse.parse_qs(query)
    assert json.loads(told["runs"][0]) == runs
    experiments = [server.experiment_name(each) for each in json.loads(told["experiments"][0])]
    assert sorted(experiments) == ["compared", "elsewhere"]


def test_without_a_monitored_metric_it_is_the_validation_loss(embedded: Server, tmp_path: Path) -> None:
    runs = [new_run(embedded, [0.5], monitor=None) for _ in range(2)]
    for run in runs:
        embedded.log_points(run, [(key, 1, START, 0.0) for key in ("accuracy", "train/loss", "val/f1")])

    assert compare(place_of(embedded, tmp_path), runs, silent).metric == "val/loss"


# -- the picture


def test_the_curves_are_of_the_metrics_that_all_runs_have_at_most_six_monitored_first(
    embedded: Server, tmp_path: Path
) -> None:
    runs = [new_run(embedded, [0.5, 0.9], key="val/accuracy", monitor=("val/accuracy", "max")) for _ in "12"]
    shared = ["train/loss", "val/loss", "val/f1", "epoch", "system/cpu", "a", "b", "c"]
    for run in runs:
        embedded.log_points(run, [(key, 1, START, 1.0) for key in shared])
    embedded.log_points(runs[0], [("val/only", 1, START, 1.0)])

    found = compare(place_of(embedded, tmp_path), runs, silent, with_curves=True)

    assert [*found.curves] == ["val/accuracy", "val/loss", "train/loss", "val/f1", "a", "b"]


@pytest.mark.parametrize("suffix", ["png", "SVG", "pdf"])
def test_the_picture_is_a_file_of_the_form_that_its_suffix_names(
    embedded: Server, tmp_path: Path, suffix: str
) -> None:
    runs = [new_run(embedded, [1.0, 0.5]), new_run(embedded, [2.0])]
    found = compare(place_of(embedded, tmp_path), runs, silent, with_curves=True)
    file = tmp_path / f"curves.{suffix}"

    comparison.check_picture(file)
    comparison.draw(found, file)

    begins = {"png": b"\x89PNG\r\n", "SVG": b"<?xml", "pdf": b"%PDF"}
    assert file.read_bytes().startswith(begins[suffix])


def test_of_many_runs_the_best_have_colours_and_names_in_the_picture(
    embedded: Server, tmp_path: Path
) -> None:
    runs = [new_run(embedded, [float(value)]) for value in (9, 8, 7, 6, 5, 4, 3, 2, 1)]

    found = compare(place_of(embedded, tmp_path), runs, silent, with_curves=True)

    assert [*found.curves["val/loss"]] == runs[::-1]
    assert [run.summary.run_id for run in found.runs] == runs
    labels = [f"run {number}" for number in range(9)]
    figure = plots.overlaid({"val/loss": [*found.curves["val/loss"].values()]}, labels)
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [*labels[:7], "2 others"]


# -- mistakes


def test_fewer_than_two_runs_are_refused(embedded: Server, tmp_path: Path) -> None:
    place, run = place_of(embedded, tmp_path), new_run(embedded, [1.0])
    alone = f"alone-{uuid.uuid4().hex}"
    new_run(embedded, [1.0], experiment=alone)

    for words, experiment in (([], None), ([run], None), ([run, run[:12]], None), ([], alone)):
        with pytest.raises(UsageError, match=r"there is (one|no) run to compare"):
            compare(place, words, silent, experiment=experiment)
    with pytest.raises(RunNotFound, match="no run 'nobody'"):
        compare(place, [run, "nobody"], silent)
    with pytest.raises(UsageError, match="there is no experiment 'chess'") as error:
        compare(place, [], silent, experiment="chess")
    assert "one of " in error.value.expected
    with pytest.raises(UsageError, match="runs are named as well"):
        compare(place, [run], silent, experiment=alone)
    with pytest.raises(UsageError, match="none of these runs has a metric 'val/los'") as error:
        compare(place, [run, new_run(embedded, [1.0])], silent, metric="val/los")
    assert error.value.expected == "one of val/loss"


def test_runs_without_a_metric_are_compared_and_not_drawn(embedded: Server, tmp_path: Path) -> None:
    runs = [new_run(embedded, [], lr=str(number)) for number in (1, 2)]

    found = compare(place_of(embedded, tmp_path), runs, silent, with_curves=True)

    assert found.metric is None
    assert cells(found)["lr"] == ["1", "2"]
    with pytest.raises(UsageError, match="no curve to draw"):
        comparison.draw(found, tmp_path / "curves.png")


def test_a_run_that_waits_in_the_spool_is_compared_by_what_the_spool_knows(workplace: Workplace) -> None:
    away = {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9"}
    for lr in ("0.1", "0.2"):
        line = ("--epochs", "1", "--drain-timeout", "0", "--no-progress", f"lr={lr}")
        assert (
            workplace.tracked("train", workplace.experiment(), *line, check=False, env=away).returncode == 3
        )
    handles = [run.handle for box in workplace.outboxes() for run in box.runs()]
    said: list[str] = []

    found = compare(Place(away["MLFLOW_TRACKING_URI"], workplace.spool), handles, said.append)

    assert sorted(cells(found)["lr"]) == ["0.1", "0.2"]
    assert "this is what the spool of this machine knows" in said[0]
    assert [run.summary.best for run in found.runs] == [None, None]


# -- the command


@pytest.fixture
def commands(embedded: Server, tmp_path: Path, nursery: Nursery) -> Iterator[tuple[Workplace, list[str]]]:
    """A folder for commands over the embedded database, and two runs in it."""
    runs = [new_run(embedded, [0.5, 0.25], lr="0.1"), new_run(embedded, [0.5], lr="0.2")]
    opened = Workplace(tmp_path, embedded.uri, nursery=nursery)
    yield opened, runs
    opened.close()


def test_the_command_prints_the_table_the_picture_and_the_address(
    commands: tuple[Workplace, list[str]],
) -> None:
    workplace, runs = commands

    result = workplace.tracked("compare", *runs, "--to", "curves.png")
    told = workplace.tracked("compare", *runs, "--json").json

    assert result.stdout.splitlines()[0].split() == ["run", runs[0][:8], runs[1][:8]]
    assert "\npicture: curves.png\n" in result.stdout
    assert "in MLflow: python -m tracked.run ui, then http://127.0.0.1:5000/#/compare-runs?" in result.stdout
    assert (workplace.path / "curves.png").stat().st_size > 10_000
    assert [run["best"] for run in told["runs"]] == [0.25, 0.5]
    assert (told["metric"], told["mode"], told["picture"]) == ("val/loss", "min", None)


@pytest.mark.parametrize(
    ("to", "word"),
    [
        ("curves.txt", "does not end like a picture"),
        ("curves", "does not end like a picture"),
        ("nowhere/curves.png", "its folder does not exist"),
        ("folder.png", "it is a folder"),
        ("/proc/curves.png", "cannot be written"),
    ],
)
def test_a_picture_that_cannot_be_written_is_refused_before_anything_is_asked(
    commands: tuple[Workplace, list[str]], to: str, word: str
) -> None:
    workplace, runs = commands
    (workplace.path / "folder.png").mkdir()
    away = {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9"} if not to.startswith("/") else {}

    result: Result = workplace.tracked("compare", *runs, "--to", to, check=False, env=away)

    assert result.returncode == 2, result
    assert word in result.stderr
    assert "\n  expected: " in result.stderr
    assert "\n  try: --to " in result.stderr
