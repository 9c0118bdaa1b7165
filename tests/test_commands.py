"""What the commands that look and clean up say, and do, on real runs: list, show, verify, sync, gc, ui."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.entities import Param

import tracked
from tests.experiments import tiny
from tests.nursery import Nursery
from tests.processes import Workplace, wait_until
from tests.servers import MlflowServer, free_port
from tracked import inspection, trial_runs, upkeep, verification
from tracked.comparison import compare
from tracked.errors import RunNotFound, RunNotResumable, ServerUnavailable, UsageError
from tracked.journal import Journal
from tracked.names import (
    BEST,
    CHECKPOINT,
    HANDLE,
    HEARTBEAT,
    SETTINGS,
    STATE,
    TRIAL,
    attempt_param,
    told_best,
)
from tracked.packing import pack
from tracked.place import Place
from tracked.server import RunView, Server
from tracked.spool import Lock, RunFolder, read_json, write_json

COMMANDS = [
    "train",
    "resume",
    "fork",
    "pause",
    "stop",
    "list",
    "show",
    "compare",
    "verify",
    "export",
    "sync",
    "gc",
    "ui",
]


def place_of(workplace: Workplace) -> Place:
    return Place(workplace.tracking_uri, workplace.spool)


def only_run(workplace: Workplace) -> RunFolder:
    (run,) = [run for outbox in workplace.outboxes() for run in outbox.runs()]
    return run


def silent(text: str) -> None:
    """Where a test does not care for what is said."""


def view_of(workplace: Workplace, run_id: str) -> RunView:
    return Server(workplace.tracking_uri, timeout=30).get_run(run_id)


def logged_run(workplace: Workplace, **tags: str) -> RunView:
    """A run without a training, made as a sender makes it."""
    return Server(workplace.tracking_uri, timeout=30).create_run(
        experiment="by-hand",
        handle=os.urandom(16).hex(),
        name=None,
        start_time=int(time.time() * 1000),
        tags=tags,
    )


def run_of_another_tool(workplace: Workplace, values: dict[str, float], *, begun: int | None = None) -> str:
    """A run that plain MLflow has logged, with these values of metrics, and not ended; its ID."""
    server = Server(workplace.tracking_uri)
    server.create_run(experiment="theirs", handle=os.urandom(16).hex(), name=None, start_time=1, tags={})
    client = MlflowClient(workplace.tracking_uri)
    experiment = client.get_experiment_by_name("theirs")
    assert experiment is not None
    run_id: str = client.create_run(experiment.experiment_id, start_time=begun).info.run_id
    for key, value in values.items():
        client.log_metric(run_id, key, value, step=3)
    return run_id


def strictly(text: str) -> Any:
    """The last line of a command's output, read by a parser that takes what JSON has and nothing more."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text.splitlines()[-1], parse_constant=refuse)


def words_of(line: str) -> list[str]:
    """What a shell makes of a line that begins with `python -m tracked.run`: the words behind that."""
    done = subprocess.run(
        ["bash", "-c", f"python() {{ printf '%s\\0' \"$@\"; }}; {line}"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    words = done.stdout.split("\0")[:-1]
    assert words[:2] == ["-m", "tracked.run"]
    return words[2:]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, nursery: Nursery) -> Iterator[tuple[Workplace, str]]:
    """A run that has finished; tests only look at it."""
    path = tmp_path_factory.mktemp("finished")
    workplace = Workplace(path, f"sqlite:///{path}/mlruns/mlflow.db", nursery=nursery)
    result = workplace.tracked("train", workplace.experiment(), "--epochs", 2, "--json")
    workplace.end_senders()
    yield workplace, result.json["run_id"]
    workplace.close()


# -- help and mistakes


def test_without_a_command_each_one_is_shown_with_an_example(workplace: Workplace) -> None:
    shown = workplace.tracked().stdout

    for command in COMMANDS:
        assert f"python -m tracked.run {command}" in shown


def test_the_help_page_imports_nothing_heavy_and_takes_no_time(workplace: Workplace) -> None:
    script = (
        "import sys, time; began = time.perf_counter()\n"
        "from tracked.cli import main\n"
        "main([], standalone_mode=False)\n"
        "heavy = {'torch', 'mlflow', 'numpy', 'matplotlib', 'optuna', 'sqlalchemy', 'requests', 'tqdm'}\n"
        "print(); print(sorted(heavy & set(sys.modules)), time.perf_counter() - began)"
    )
    seconds = []
    for _ in range(3):  # the machine may be busy with something else
        began = time.perf_counter()
        output = subprocess.run(
            [sys.executable, "-c", script],
            env=workplace.environment(),
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        seconds.append(time.perf_counter() - began)
        assert output.splitlines()[-1].startswith("[]"), output

    assert min(seconds) < 0.3


@pytest.mark.parametrize(
    "line",
    [["tarin", "a.py"], ["list", "--limt", "3"], ["list", "--limit", "0"], ["show"], ["ui", "--port", "x"]],
)
def test_a_command_line_that_cannot_work_ends_with_2(workplace: Workplace, line: list[str]) -> None:
    result = workplace.tracked(*line, check=False)

    assert result.returncode == 2
    assert "Usage" in result.stderr
    assert "Traceback" not in result.stderr


def test_without_a_database_list_says_how_to_make_a_run_and_makes_nothing(workplace: Workplace) -> None:
    workplace.nursery = None  # which makes files of its own in the folder
    result = workplace.tracked("list")

    assert "no runs yet: python -m tracked.run train" in result.stdout
    assert "python -m tracked.run list --all" in result.stdout
    assert list(workplace.path.iterdir()) == []


def test_without_a_database_no_run_is_found(workplace: Workplace) -> None:
    workplace.nursery = None  # which makes files of its own in the folder
    result = workplace.tracked("show", "last", check=False)

    assert result.returncode == 2
    assert "error: there is no run 'last'" in result.stderr
    assert list(workplace.path.iterdir()) == []


@pytest.mark.parametrize(
    "word", ["nonsense", "", "0", "'", "\"'", "%", "____", "../../etc", "0" * 32, "ü", "a" * 5000, "--"]
)
def test_a_word_that_is_no_run_is_not_found(finished: tuple[Workplace, str], word: str) -> None:
    workplace, _ = finished

    with pytest.raises(RunNotFound, match="there is no run"):
        inspection.look(place_of(workplace), word, silent)
    with pytest.raises(RunNotFound, match="there is no run"):
        verification.verify(place_of(workplace), word, silent)


# -- list and show


def test_a_finished_run_is_listed_and_shown(finished: tuple[Workplace, str]) -> None:
    workplace, run_id = finished

    row = workplace.tracked("list").stdout.splitlines()[1].split()
    (listed,) = workplace.tracked("list", "--json").json
    shown = workplace.tracked("show", run_id[:6]).stdout
    told = workplace.tracked("show", "last", "--json").json

    assert row[:3] == [run_id[:8], "finished", "experiment"]
    assert (listed["run_id"], listed["state"], listed["epoch"], listed["step"]) == (run_id, "finished", 2, 16)
    assert listed["best"] <= listed["last"]
    assert "  lr     0.1\n  pause  0.0\n" in shown
    assert f"next: python -m tracked.run verify {run_id}" in shown
    assert told["checkpoints"][-1] == {
        "step": 16,
        "bytes": told["checkpoints"][-1]["bytes"],
        "where": ["server", "spool"],
        "committed": True,
    }
    assert told["metrics"]["train/loss"]["step"] == 16
    assert told["attempts"] == 1


def test_a_run_goes_by_id_prefix_handle_name_and_last(finished: tuple[Workplace, str]) -> None:
    workplace, run_id = finished
    view = view_of(workplace, run_id)

    for word in (run_id, run_id[:4], view.tags[HANDLE], view.tags[HANDLE][:8], view.name, "last"):
        assert inspection.look(place_of(workplace), word, silent).summary.run_id == run_id


def test_list_takes_an_experiment_and_a_limit(workplace: Workplace) -> None:
    runs = [logged_run(workplace, **{STATE: "finished"}) for _ in range(3)]
    place = place_of(workplace)

    assert len(inspection.listing(place, "by-hand", 2, silent)) == 2
    assert {each.run_id for each in inspection.listing(place, None, 9, silent)} == {
        run.run_id for run in runs
    }
    with pytest.raises(UsageError, match="there is no experiment 'another'") as error:
        inspection.listing(place, "another", 9, silent)
    assert error.value.expected == "one of Default, by-hand"
    assert inspection.listing(place, "Default", 9, silent) == []


def test_an_experiment_that_only_waits_in_the_spool_is_listed(workplace: Workplace) -> None:
    logged_run(workplace)
    folder = place_of(workplace).outbox().run("ab" * 16)
    folder.make()
    journal = Journal(folder.path / "attempt-0001-00000000")
    journal.append("start", {"experiment": "new", "name": "first", "start_time": 1, "tags": {}})
    journal.close()

    (listed,) = inspection.listing(place_of(workplace), "new", 9, silent)

    assert (listed.name, listed.state) == ("first", inspection.WAITING)


def test_list_says_when_there_are_more_runs_than_it_shows(workplace: Workplace) -> None:
    for _ in range(3):
        logged_run(workplace)

    cut, whole = (workplace.tracked("list", "--limit", limit) for limit in (2, 3))
    of_a_state = workplace.tracked("list", "--limit", 1, "--state", "lost", "--json", check=False)
    as_json = workplace.tracked("list", "--limit", 2, "--json")

    assert len(cut.stdout.splitlines()) == 1 + 2
    assert cut.stderr == "there are more than these 2: --limit 4\n"
    assert len(whole.stdout.splitlines()) == 1 + 3
    assert whole.stderr == of_a_state.stderr == ""
    assert len(as_json.json) == 2
    assert "--limit 4" in as_json.stderr


def test_list_takes_a_state_which_is_the_true_one(workplace: Workplace) -> None:
    now = int(time.time() * 1000)
    tags = [{STATE: "finished"}, {STATE: "paused"}, {STATE: "running", HEARTBEAT: str(now)}]
    finished, paused, running = (logged_run(workplace, **each) for each in tags)
    lost = logged_run(workplace, **{STATE: "running", HEARTBEAT: "1"})
    later = [logged_run(workplace, **{STATE: "finished"}) for _ in range(2)]
    place = place_of(workplace)

    def listed(state: str, limit: int = 9) -> list[str]:
        return [each.run_id for each in inspection.listing(place, None, limit, silent, state=state)]

    assert listed("paused", 1) == [paused.run_id], "the limit counts what passes the filter"
    assert listed("running") == [running.run_id]
    assert listed("lost") == [lost.run_id]
    assert {*listed("finished")} == {finished.run_id, *(run.run_id for run in later)}
    assert listed("pruned") == []


def test_list_takes_a_filter_and_sorts_by_a_metrics_last_value(workplace: Workplace) -> None:
    server, place = Server(workplace.tracking_uri, timeout=30), place_of(workplace)
    runs = {}
    for name, value in {"b": 0.2, "nan": math.nan, "a": 0.1, "c": 0.3}.items():
        runs[name] = logged_run(workplace).run_id
        server.log_points(runs[name], [("val/loss", 1, 1, 9.0), ("val/loss", 2, 2, value)])
    runs["none"] = logged_run(workplace).run_id
    names = {run_id: name for name, run_id in runs.items()}

    def listed(limit: int = 9, **which: Any) -> list[str]:
        return [names[each.run_id] for each in inspection.listing(place, None, limit, silent, **which)]

    assert listed(sort_by="val/loss")[:3] == ["a", "b", "c"]
    assert {*listed(sort_by="val/loss")[3:]} == {"nan", "none"}
    assert listed(sort_by="val/loss", descending=True)[:3] == ["c", "b", "a"]
    assert listed(2, sort_by="val/loss", descending=True) == ["c", "b"]
    assert {*listed(only="metrics.`val/loss` < 0.25")} == {"a", "b"}
    assert listed(only='metrics."val/loss" > 0.05', sort_by="val/loss", limit=1) == ["a"]
    found = inspection.listing(place, None, 2, silent, sort_by="val/loss")
    assert inspection.table(found, "val/loss").splitlines()[0].split() == [
        *("run", "state", "experiment", "name", "step", "val/loss", "age")
    ]


def test_list_of_all_has_the_runs_of_other_code_with_what_waits_of_them_in_the_spool(
    workplace: Workplace,
) -> None:
    place, theirs = place_of(workplace), run_of_another_tool(workplace, {"f1": 0.5})
    own = {each.run_id for each in inspection.listing(place, None, 9, silent)}
    folder = place.outbox().called(theirs)
    folder.make()
    journal = Journal(folder.path / "calls-00000001-1")
    journal.append("tags", {"note": "waits"})
    journal.close()

    def listed(**which: Any) -> dict[str, tuple[str, int]]:
        found = inspection.listing(place, None, 9, silent, everyones=True, **which)
        return {each.run_id: (each.state, each.undelivered) for each in found}

    assert {*listed()} == {theirs, *own}
    assert listed(state="running") == listed(only="metrics.f1 > 0") == {theirs: ("running", 1)}
    assert next(iter(listed(sort_by="f1"))) == theirs
    assert inspection.look(place, theirs, silent).summary.undelivered == 1
    for options, shown in (((), own), (("--all",), {theirs, *own})):
        assert {each["run_id"] for each in workplace.tracked("list", *options, "--json").json} == shown


def test_the_filter_that_a_refused_one_is_told_to_try_works_as_it_is_typed(workplace: Workplace) -> None:
    server, place = Server(workplace.tracking_uri, timeout=30), place_of(workplace)
    runs = [logged_run(workplace).run_id for _ in range(3)]
    for run_id, (loss, lr) in zip(runs, ((0.05, "0.05"), (0.05, "0.5"), (0.5, "0.05")), strict=True):
        server.log(run_id, [("val/loss", 1, 1, loss)], {"lr": lr}, {})

    with pytest.raises(UsageError, match="MLflow refuses the filter") as error:
        inspection.listing(place, None, 9, silent, only="nonsense")
    command, option, only = words_of(error.value.try_next)
    found = inspection.listing(place, None, 9, silent, only=only)

    assert (command, option) == ("list", "--filter")
    assert [each.run_id for each in found] == runs[:1]
    assert "`" not in workplace.tracked("list", "--help").stdout, "a shell would run what stands in backticks"


def test_the_best_of_a_run_that_has_ended_is_what_its_training_told(workplace: Workplace) -> None:
    server = Server(workplace.tracking_uri, timeout=30)
    settings = json.dumps({"monitor": "val/loss", "mode": "min"})
    values = (0.125, 0.25, 1 / 3)  # the first one was not an improvement, or was none to be judged

    def best_of(state: str, told: str) -> float | None:
        run = logged_run(workplace, **{SETTINGS: settings, STATE: state, BEST: told})
        server.log_points(run.run_id, [("val/loss", step, 1, value) for step, value in enumerate(values, 1)])
        return inspection.listing(place_of(workplace), None, 1, silent)[0].best

    for state in ("finished", "stopped_early", "stopped", "pruned", "paused"):
        assert best_of(state, "val/loss 0.25 at step 2") == 0.25
    assert best_of("finished", "val/loss 0.333333 at step 3") == 1 / 3, "the last value is known exactly"
    for state in ("running", "crashed", "failed"):
        assert best_of(state, "val/loss 0.25 at step 2") == 0.125, "the tag may be an earlier attempt's"
    assert best_of("finished", "val/f1 0.25 at step 2") == 0.125
    assert best_of("finished", "val/loss 0.25 in trial 3: lr=0.1") == 0.125


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("val/loss 0.04 at step 8", ("val/loss", 0.04, 8)),
        ("reward at step 1 -1e-05 at step 12", ("reward at step 1", -1e-05, 12)),
        ("loss inf at step 1", ("loss", sys.float_info.max, 1)),
        ("val/loss 0.04 in trial 3: lr=0.1", None),
        ("val/loss good at step 8", None),
        ("", None),
    ],
)
def test_the_best_that_a_training_told_is_read_back(text: str, told: tuple[str, float, int] | None) -> None:
    assert told_best({BEST: text}) == told
    assert told_best({}) is None


def test_a_training_tells_its_best_so_that_it_can_be_read_back(finished: tuple[Workplace, str]) -> None:
    workplace, run_id = finished
    view = view_of(workplace, run_id)
    history = Server(workplace.tracking_uri, timeout=30).history(run_id, "val/loss")

    told = told_best(view.tags)

    best = inspection.best_point(history, "min")
    assert told is not None
    assert best is not None
    assert (told[0], told[2]) == ("val/loss", best[0])
    assert told[1] == pytest.approx(best[1], rel=1e-5)


def test_the_best_in_a_list_is_the_best_of_the_history(remote_workplace: Workplace) -> None:
    for workplace in (
        remote_workplace,
        Workplace(remote_workplace.path, f"sqlite:///{remote_workplace.path}/db"),
    ):
        experiment, server = f"best-{os.urandom(4).hex()}", Server(workplace.tracking_uri, timeout=30)
        for mode in ("min", "max"):
            settings = json.dumps({"monitor": "val/f1", "mode": mode})
            run = server.create_run(
                experiment=experiment,
                handle=os.urandom(16).hex(),
                name=mode,
                start_time=1,
                tags={SETTINGS: settings},
            )
            values = (0.5, math.nan, 0.25, 0.75, 0.6)
            server.log_points(run.run_id, [("val/f1", at, at, value) for at, value in enumerate(values)])

        found = inspection.listing(place_of(workplace), experiment, 9, silent)

        assert {each.name: (each.best, each.last) for each in found} == {
            "min": (0.25, 0.6),
            "max": (0.75, 0.6),
        }


def test_runs_of_others_are_neither_listed_nor_verified(workplace: Workplace) -> None:
    server = Server(workplace.tracking_uri, timeout=30)
    run = logged_run(workplace)
    with sqlite3.connect(workplace.path / "mlruns/mlflow.db") as database:
        database.execute("DELETE FROM tags WHERE key = ?", (HANDLE,))

    assert inspection.listing(place_of(workplace), None, 9, silent) == []
    with pytest.raises(RunNotResumable, match="was not made by this package"):
        verification.verify(place_of(workplace), run.run_id, silent)
    assert server.get_run(run.run_id).status == "RUNNING"


def test_a_run_of_another_tool_stands_as_mlflow_says_and_is_offered_nothing_that_cannot_work(
    workplace: Workplace,
) -> None:
    client = MlflowClient(workplace.tracking_uri)
    run_id = run_of_another_tool(workplace, {}, begun=1)

    running = inspection.look(place_of(workplace), run_id, silent)
    client.set_terminated(run_id, "FAILED")
    failed = inspection.look(place_of(workplace), run_id, silent)

    assert (running.summary.state, running.try_next) == ("running", [])
    assert (failed.summary.state, failed.try_next) == ("failed", [])
    assert "next:" not in inspection.page(running)


def test_a_run_of_the_plugin_is_shown_with_the_line_that_goes_on_from_its_checkpoint(
    workplace: Workplace,
) -> None:
    client = MlflowClient(workplace.tracking_uri)
    run_id = run_of_another_tool(workplace, {})
    client.set_tag(run_id, CHECKPOINT, '{"step": 3, "path": "checkpoints/a", "sha256": "0"}')
    client.set_tag(run_id, "mlflow.source.name", "my script.py")
    (workplace.path / "my script.py").write_text(
        "import os; print(os.environ['MLFLOW_RUN_ID'], os.environ['MLFLOW_TRACKING_URI'])"
    )
    client.log_text(run_id, "a state", "checkpoints/step-00000003/checkpoint-01234567.ckpt")
    client.log_text(run_id, "{}", "checkpoints/step-00000003/manifest.json")
    saved = place_of(workplace).outbox().called(run_id).checkpoints / "step-00000005"
    saved.mkdir(parents=True)
    (saved / "checkpoint-76543210.ckpt").write_text("the next")

    found = inspection.look(place_of(workplace), run_id, silent)
    [line] = found.try_next
    process = workplace.start(*words_of(line))
    stdout, stderr = process.communicate(timeout=60)
    client.set_terminated(run_id)

    assert [(each.step, each.bytes, each.where, each.committed) for each in found.checkpoints] == [
        (3, len("a state"), ["server"], True),
        (5, len("the next"), ["spool"], False),
    ]
    assert stdout.split() == [run_id, f"tracked+{workplace.tracking_uri}"], stderr
    assert inspection.look(place_of(workplace), run_id, silent).try_next == []


def test_a_run_that_a_script_made_is_shown_with_the_line_that_goes_on_with_it(workplace: Workplace) -> None:
    pointer = '{"step": 3, "path": "checkpoints/a", "sha256": "0"}'
    tags = {STATE: "paused", CHECKPOINT: pointer, "mlflow.source.name": "script.py"}
    scripted, bare = (logged_run(workplace, **each).run_id for each in (tags, {STATE: "finished"}))
    place = place_of(workplace)

    assert inspection.look(place, scripted, silent).try_next == [
        f"python -m tracked.run resume {scripted} -- python script.py"
    ]
    module = {"mlflow.source.name": "nets/train.py", "mlflow.tracked.command": "python -m nets.train"}
    of_a_module = logged_run(workplace, **{**tags, **module}).run_id
    typed = logged_run(workplace, **{**tags, "mlflow.source.name": "/opt/ipykernel_launcher.py"}).run_id
    assert inspection.look(place, of_a_module, silent).try_next == [
        f"python -m tracked.run resume {of_a_module} -- python -m nets.train"
    ]
    assert inspection.look(place, typed, silent).try_next == [f'with tracked.resume("{typed}") as run:']
    assert inspection.look(place, bare, silent).try_next == [f"python -m tracked.run verify {bare}"], (
        "without a checkpoint there is nothing to export"
    )


def test_a_deleted_run_is_shown_as_deleted_with_the_line_that_restores_it(workplace: Workplace) -> None:
    run_id = logged_run(workplace, **{STATE: "finished"}).run_id
    MlflowClient(workplace.tracking_uri).delete_run(run_id)
    deleted = inspection.look(place_of(workplace), run_id, silent)

    [line] = deleted.try_next
    scripts = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = workplace.environment({"PATH": scripts, "MLFLOW_TRACKING_URI": ""})
    subprocess.run(["bash", "-c", line], env=environment, capture_output=True, check=True)

    assert deleted.summary.state == "deleted"
    assert "state             deleted\n" in inspection.page(deleted)
    assert inspection.look(place_of(workplace), run_id, silent).summary.state == "finished"


@pytest.mark.parametrize("epoch", [math.nan, math.inf, -math.inf])
def test_an_epoch_that_is_no_number_is_none(workplace: Workplace, epoch: float) -> None:
    place, server = place_of(workplace), Server(workplace.tracking_uri, timeout=30)
    theirs = [run_of_another_tool(workplace, {"epoch": each, "loss": 0.5}) for each in (epoch, 1.5)]
    trial = logged_run(workplace, **{TRIAL: json.dumps({"number": 0, "params": {}}), STATE: "finished"})
    server.log_points(trial.run_id, [("epoch", 1, 1, 1.0), ("epoch", 2, 2, epoch)])
    server.log_points(trial.run_id, [("loss", 1, 1, 0.5), ("loss", 2, 2, 0.25)])
    view = view_of(workplace, trial.run_id)

    shown = [inspection.look(place, run_id, silent) for run_id in theirs]
    compared = compare(place, theirs, silent)
    read = trial_runs.read(server, view, metric="loss", mode="min", unit="epoch")

    assert [each.summary.epoch for each in shown] == [None, 1]
    assert "\nepoch " not in inspection.page(shown[0])
    assert [each.summary.epoch for each in compared.runs] == [None, 1]
    assert trial_runs.glance(view).epochs == 0
    assert (read.reports, read.epochs) == ({1: 0.5}, 1)


def test_json_has_null_where_a_value_is_no_number(workplace: Workplace) -> None:
    theirs = run_of_another_tool(workplace, {"epoch": math.nan, "loss": math.nan})
    own = logged_run(workplace, **{SETTINGS: '{"monitor": "loss"}'}).run_id
    Server(workplace.tracking_uri, timeout=30).log_points(own, [("loss", 3, 1, math.nan)])

    shown = strictly(workplace.tracked("show", theirs, "--json").stdout)
    (listed,) = strictly(workplace.tracked("list", "--limit", 1, "--json").stdout)
    compared = strictly(workplace.tracked("compare", theirs, own, "--json").stdout)

    assert shown["metrics"]["loss"] == {"step": 3, "value": None}
    assert (listed["last"], listed["metrics"]) == (None, {"loss": None})
    assert [run["metrics"]["loss"] for run in compared["runs"]] == [None, None]


def test_a_page_is_legible_whatever_the_names_on_it(workplace: Workplace) -> None:
    run_id = run_of_another_tool(workplace, {"system/system_memory_usage_megabytes": 12345.6, "loss": 0.5})
    client = MlflowClient(workplace.tracking_uri)
    params = {"a_hyperparameter_with_a_long_name": "16", "lr": "0.1", "text": "two\nlines \x1b[31min red"}
    client.log_batch(run_id, params=[Param(*each) for each in params.items()])
    client.set_tag(run_id, "tracked.stop_reason", "this\nand \x1b]0;that\x07")

    page = inspection.page(inspection.look(place_of(workplace), run_id, silent))

    assert "  a_hyperparameter_with_a_long_name  16\n" in page
    assert "  lr                                 0.1\n" in page
    assert "  text                               two lines [31min red\n" in page
    assert "  system/system_memory_usage_megabytes  12345.6  step 3" in page
    assert "  loss                                  0.5      step 3" in page
    assert "stopped because   this and ]0;that\n" in page
    assert page.replace("\n", "").isprintable()


def test_a_run_is_one_row_of_the_list_whatever_its_name(workplace: Workplace) -> None:
    names = ["two\nlines", "\x1b[31min red", "long" * 50]
    runs = [
        inspection.Summary(str(number) * 32, "", "finished", name, name, 1, 1, name, 0.5, 0.5, 0, 0)
        for number, name in enumerate(names)
    ]

    table = inspection.table(runs, "long" * 50)

    assert len(table.splitlines()) == 1 + len(runs)
    assert table.replace("\n", "").isprintable()
    assert max(map(len, table.splitlines())) < 240
    assert "two lines" in table
    assert "… 0.5" in table, "a name is cut, and no value"


def test_ids_in_the_table_are_as_long_as_they_have_to_be() -> None:
    one = inspection.Summary("a" * 9 + "1" * 23, "", "finished", "e", "n", 1, 1, None, None, None, 0, 0)
    other = inspection.Summary("a" * 9 + "2" * 23, "", "finished", "e", "n", 1, 1, None, None, None, 0, 0)

    lines = inspection.table([one, other]).splitlines()

    assert [line.split()[0] for line in lines[1:]] == ["a" * 9 + "1", "a" * 9 + "2"]


def test_a_run_that_was_not_heard_of_for_a_minute_is_lost(workplace: Workplace) -> None:
    now = time.time() * 1000
    lost = logged_run(workplace, **{STATE: "running", HEARTBEAT: str(int(now - 180_000))})
    alive = logged_run(workplace, **{STATE: "running", HEARTBEAT: str(int(now))})

    states = {each.run_id: each.state for each in inspection.listing(place_of(workplace), None, 9, silent)}

    assert states == {lost.run_id: "lost (last heard 3 min ago)", alive.run_id: "running"}


def test_a_run_whose_lock_is_held_here_is_running_whatever_its_heartbeat(workplace: Workplace) -> None:
    run = logged_run(workplace, **{STATE: "running", HEARTBEAT: "1"})
    folder = (
        place_of(workplace).outbox().run(run.tags.get(HANDLE) or view_of(workplace, run.run_id).tags[HANDLE])
    )
    folder.make()
    lock = Lock(folder.lock)
    assert lock.acquire()

    (listed,) = inspection.listing(place_of(workplace), None, 9, silent)
    lock.release()
    (after,) = inspection.listing(place_of(workplace), None, 9, silent)

    assert listed.state == "running"
    assert after.state.startswith("lost (last heard")


# -- verify


def test_a_finished_run_is_proven_whole(finished: tuple[Workplace, str]) -> None:
    workplace, run_id = finished

    result = workplace.tracked("verify", run_id)

    assert "wrong" not in result.stdout
    assert "each (metric, step) once" in result.stdout
    assert "checkpoint of step 16" in result.stdout
    assert "named by the tag" in result.stdout
    assert "and so many are there" in result.stdout


def test_what_is_not_whole_is_told_and_the_exit_is_1(workplace: Workplace) -> None:
    run_id = workplace.tracked("train", workplace.experiment(), "--epochs", 2, "--json").json["run_id"]
    workplace.end_senders()
    server, place = Server(workplace.tracking_uri, timeout=30), place_of(workplace)
    artifacts = Path(view_of(workplace, run_id).artifact_uri) / "checkpoints"

    def wrong() -> str:
        return "\n".join(verification.verify(place, run_id, silent).wrong)

    assert wrong() == ""
    server.log_points(run_id, [("train/loss", 3, 1, 0.5)])
    assert "train/loss stands more than once at step 3" in wrong()
    with sqlite3.connect(workplace.path / "mlruns/mlflow.db") as database:
        database.execute("DELETE FROM metrics WHERE key = 'train/loss' AND step = 3")
    assert "train/loss: 15 of 16" in wrong()
    assert "logged 21 points, and 20 are there" in wrong()

    last = artifacts / "step-00000016/checkpoint.pt"
    whole = last.read_bytes()
    last.write_bytes(whole[:-1])
    assert f"checkpoint of step 16: the file has {len(whole) - 1} bytes" in wrong()
    last.write_bytes(whole[:1000] + bytes([whole[1000] ^ 1]) + whole[1001:])
    assert "checkpoint of step 16: the checkpoint at" in wrong()
    assert "is damaged" in wrong()
    last.unlink()
    assert "checkpoint of step 16" in wrong()
    last.write_bytes(whole)
    pointer = json.loads(view_of(workplace, run_id).tags[CHECKPOINT])
    server.set_tags(run_id, {CHECKPOINT: json.dumps({**pointer, "sha256": "0" * 64})})
    assert "not the one that the tag names" in wrong()
    shutil.rmtree(last.parent)
    assert "names the checkpoint of step 16, which is not on the server" in wrong()
    assert workplace.tracked("verify", run_id, "--json", check=False).returncode == 1


# -- sync


def test_a_run_that_never_reached_its_server_is_listed_synced_and_whole(
    tmp_path: Path, own_server: MlflowServer, nursery: Nursery
) -> None:
    workplace = Workplace(tmp_path, own_server.uri, nursery=nursery)
    try:
        trained = workplace.tracked(
            "train", workplace.experiment(), "--epochs", 1, "--json", "--drain-timeout", 0.2, check=False
        )
        handle = trained.json["run_id"]
        listed = workplace.tracked("list", "--json")
        shown = workplace.tracked("show", handle[:8])
        proof = workplace.tracked("verify", handle, check=False)
        early = workplace.tracked("sync", "--timeout", 2, "--json", check=False)

        assert trained.returncode == 3
        assert [(each["run_id"], each["state"]) for each in listed.json] == [(handle, inspection.WAITING)]
        assert listed.json[0]["step"] == 8
        assert "gave no usable answer" in listed.stderr
        assert "next: python -m tracked.run sync" in shown.stdout
        assert "records wait in the spool; try: python -m tracked.run sync" in proof.stdout
        assert early.returncode == 3
        assert early.json["undelivered"] == listed.json[0]["undelivered"]
        assert "waiting: " in early.stderr

        own_server.start()
        late = workplace.tracked("sync", "--json")
        (after,) = workplace.tracked("list", "--json").json

        assert late.json == {"undelivered": 0}
        assert f"{early.json['undelivered']} records were delivered" in late.stderr
        assert (after["handle"], after["state"], after["undelivered"]) == (handle, "finished", 0)
        assert workplace.tracked("verify", handle).returncode == 0
        assert "nothing waits in the spool" in workplace.tracked("sync").stderr
    finally:
        workplace.close()


def test_sync_leaves_a_living_training_alone_and_discards_what_a_newer_attempt_supersedes(
    workplace: Workplace,
) -> None:
    training = workplace.start(
        "train", workplace.experiment(), "pause=0.1", "--epochs", 100, "--checkpoint-every", "2 steps"
    )
    wait_until(lambda: [run for box in workplace.outboxes() for run in box.runs()], "the run's folder")
    run = only_run(workplace)
    wait_until(lambda: run.about.get("committed", 0) >= 2, "a committed checkpoint")
    place, said = place_of(workplace), list[str]()

    assert upkeep.sync(place, 5, said.append) == 0
    assert any("is still being trained" in line for line in said)
    assert upkeep.gc(place, dry_run=False, say=silent) == 0
    assert [each.state for each in inspection.listing(place, None, 9, silent)] == ["running"]
    proof = verification.verify(place, "last", silent)
    assert proof.wrong == []
    assert proof.proven[0].startswith("the run is being trained")

    workplace.end_senders()
    wait_until(lambda: inspection.undelivered(run), "points that nobody delivers")
    os.killpg(training.pid, signal.SIGKILL)
    training.wait()
    workplace.end_senders()  # the training may have started another one meanwhile
    assert [each.state for each in inspection.listing(place, None, 9, silent)] == ["draining"]
    assert "wait in the spool" in verification.verify(place, "last", silent).wrong[0]

    run_id = run.about["run_id"]
    Server(place.tracking_uri, timeout=30).log_params(run_id, {attempt_param(2): "another"})
    said.clear()
    result = workplace.tracked("sync", "--json")

    assert result.json == {"undelivered": 0}
    assert "of an older attempt were discarded" in result.stderr
    assert run.journals() == []


def test_a_journal_without_its_first_record_is_reported_and_counts(workplace: Workplace) -> None:
    folder = place_of(workplace).outbox().run("ab" * 16)
    folder.make()
    journal = Journal(folder.path / "attempt-0001-00000000")
    journal.append("points", pack([("a", 1, 1, 0.5), ("a", 2, 2, 0.5)]))
    journal.close()
    said: list[str] = []

    left = upkeep.sync(place_of(workplace), 5, said.append)

    assert left == 2
    assert "is damaged, so it cannot be sent" in said[0]
    assert workplace.sender_pids() == []


# -- gc


def test_gc_frees_a_finished_run_that_stays_whole_on_the_server(workplace: Workplace) -> None:
    run_id = workplace.tracked("train", workplace.experiment(), "--epochs", 1, "--json").json["run_id"]
    folder, place = only_run(workplace), place_of(workplace)
    server = Server(workplace.tracking_uri, timeout=30)
    (uncommitted := workplace.path / "checkpoint.pt").write_bytes(b"half")
    server.upload(run_id, uncommitted, "checkpoints/step-00000099")
    held = sum(
        file.stat().st_size for file in folder.path.rglob("*") if file.is_file() and file != folder.lock
    )

    planned = workplace.tracked("gc", "--dry-run", "--json")
    assert folder.path.exists()
    assert "step-00000099" in server.directories(run_id, "checkpoints")
    freed = workplace.tracked("gc", "--json")

    for told in (planned, freed):  # the lock's file names its holder, so its size is not known before
        assert 0 <= told.json["freed_bytes"] - held - len(b"half") < 100
    assert not folder.path.exists()
    assert "step-00000099" not in server.directories(run_id, "checkpoints")
    assert verification.verify(place, run_id, silent).wrong == []
    assert upkeep.gc(place, dry_run=False, say=silent) == 0


def test_gc_keeps_the_copy_of_a_finished_run_whose_checkpoint_is_missing_on_the_server(
    workplace: Workplace,
) -> None:
    run_id = workplace.tracked("train", workplace.experiment(), "--epochs", 1, "--json").json["run_id"]
    step = json.loads(view_of(workplace, run_id).tags[CHECKPOINT])["step"]
    Server(workplace.tracking_uri, timeout=30).delete(run_id, f"checkpoints/step-{step:08d}")

    upkeep.gc(place_of(workplace), dry_run=False, say=silent)

    assert (only_run(workplace).checkpoints / f"step-{step:08d}/checkpoint.pt").is_file()


def test_gc_deletes_nothing_of_a_run_that_an_empty_database_does_not_know(workplace: Workplace) -> None:
    workplace.tracked("train", workplace.experiment(), "--epochs", 1)
    database, place = workplace.path / "mlruns/mlflow.db", place_of(workplace)
    database.rename(database.with_suffix(".away"))

    assert upkeep.gc(place, dry_run=False, say=silent) == 0
    Server(workplace.tracking_uri, timeout=30).create_run(
        experiment="another", handle=os.urandom(16).hex(), name=None, start_time=1, tags={}
    )
    assert upkeep.gc(place, dry_run=False, say=silent) == 0

    assert len(list(only_run(workplace).checkpoints.glob("step-*/checkpoint.pt"))) > 0


def test_gc_leaves_what_a_run_commits_after_the_list_was_made(workplace: Workplace) -> None:
    run_id = workplace.tracked("train", workplace.experiment(), "--epochs", 1, "--json").json["run_id"]
    server, listed = Server(workplace.tracking_uri, timeout=30), view_of(workplace, run_id)
    (newer := workplace.path / "checkpoint.pt").write_bytes(b"newer")
    server.upload(run_id, newer, "checkpoints/step-00000099")
    server.set_status(run_id, "RUNNING")  # resumed meanwhile

    upkeep._clean_server(server, listed, upkeep._Waste(dry_run=False, say=silent))

    assert "step-00000099" in server.directories(run_id, "checkpoints")


def test_gc_frees_what_is_superseded_and_the_run_still_resumes(workplace: Workplace) -> None:
    line = ["train", workplace.experiment(), "pause=0.1", "--epochs", 100, "--checkpoint-every", "2 steps"]
    training = workplace.start(*line, "--keep-last", 1)
    wait_until(lambda: [run for box in workplace.outboxes() for run in box.runs()], "the run's folder")
    folder = only_run(workplace)
    wait_until(lambda: folder.about.get("committed", 0) >= 10, "the checkpoint of step 10")
    training.send_signal(signal.SIGTERM)
    training.communicate(timeout=60)
    assert training.returncode == 75
    workplace.end_senders()

    run_id, place = folder.about["run_id"], place_of(workplace)
    server = Server(workplace.tracking_uri, timeout=30)
    whole = sorted(folder.checkpoints.glob("step-*"))
    size = (whole[0] / "checkpoint.pt").stat().st_size
    manifest = read_json(whole[0] / "manifest.json")
    for name, value in (("step-00000001", None), ("step-00000003", None)):
        shutil.copytree(whole[0], folder.checkpoints / name)
        write_json(
            folder.checkpoints / name / "manifest.json", {**manifest, "step": int(name[5:]), "value": value}
        )
        server.upload(run_id, folder.checkpoints / name / "manifest.json", f"checkpoints/{name}")
        server.upload(run_id, folder.checkpoints / name / "checkpoint.pt", f"checkpoints/{name}")
    (folder.path / ".run.json.left").write_text("{")
    stands = {*server.directories(run_id, "checkpoints")} - {"step-00000001", "step-00000003"}

    freed = upkeep.gc(place, dry_run=False, say=silent)

    assert freed > 2 * 2 * size
    assert {path.name for path in folder.checkpoints.iterdir()} == stands
    assert {*server.directories(run_id, "checkpoints")} == stands
    assert not (folder.path / ".run.json.left").exists()
    further = folder.about["committed"] + 2
    assert workplace.tracked("resume", run_id, "--max-steps", further, "--json").json["step"] == further
    assert verification.verify(place, run_id, silent).wrong == []


def test_gc_without_its_server_deletes_only_what_it_knows_to_be_superseded(workplace: Workplace) -> None:
    place = Place(f"http://127.0.0.1:{free_port()}", workplace.spool)
    folder = place.outbox().run("cd" * 16)
    for step in (1, 2, 3, 4):
        (folder.checkpoints / f"step-{step:08d}").mkdir(parents=True)
        (folder.checkpoints / f"step-{step:08d}/checkpoint.pt").write_bytes(b"1234567890")
    write_json(
        folder.path / "run.json",
        {"run_id": "e" * 32, "committed": 3, "keep": [2, 3], "state": "finished"},
    )
    said: list[str] = []

    freed = upkeep.gc(place, dry_run=False, say=said.append)

    assert freed == 20
    assert sorted(path.name for path in folder.checkpoints.iterdir()) == ["step-00000002", "step-00000003"]
    assert "only what this machine knows to be superseded" in said[0]


def test_gc_removes_an_empty_outbox_of_an_earlier_boot_and_no_other(workplace: Workplace) -> None:
    here = place_of(workplace).outbox()
    earlier = here.path.parent.with_name(here.path.parent.name[:-8] + "00000000") / "target"
    other = here.path.parent.with_name("another-machine-00000000") / "target"
    for path in (earlier, other):
        shutil.copytree(here.path, path)

    upkeep.gc(place_of(workplace), dry_run=False, say=silent)

    assert not earlier.parent.exists()
    assert other.exists()
    assert here.path.exists()


# -- ui


@pytest.fixture
def served_ui(finished: tuple[Workplace, str]) -> Iterator[tuple[int, subprocess.Popen[str]]]:
    """A UI that answers, and its port; it was asked for by the address that other MLflow code uses."""
    port = free_port()
    through_the_journal = {"MLFLOW_TRACKING_URI": f"tracked+{finished[0].tracking_uri}"}
    process = finished[0].start("ui", "--port", port, env=through_the_journal)
    assert process.stdout is not None
    try:
        assert process.stdout.readline().startswith(f"http://127.0.0.1:{port}")
        yield port, process
    finally:
        process.send_signal(signal.SIGTERM)  # killed, it could not end the server that it started
        process.wait(30)


def test_the_ui_of_a_database_shows_artifacts_and_leaves_nothing_behind(
    finished: tuple[Workplace, str], served_ui: tuple[int, subprocess.Popen[str]]
) -> None:
    workplace, run_id = finished
    port, ui = served_ui

    def fetch(page: str, **query: str) -> bytes:
        address = f"http://127.0.0.1:{port}/{page}?{urllib.parse.urlencode(query)}"
        with urllib.request.urlopen(address, timeout=30) as answer:
            content: bytes = answer.read()
        return content

    files = json.loads(fetch("ajax-api/2.0/mlflow/artifacts/list", run_id=run_id, path="checkpoints"))
    source = fetch("get-artifact", path="source/experiment.py", run_uuid=run_id)
    checkpoint = fetch("get-artifact", path="checkpoints/step-00000016/checkpoint.pt", run_uuid=run_id)

    assert "checkpoints/step-00000016" in [each["path"] for each in files["files"]]
    assert source == (workplace.path / "experiment.py").read_bytes()
    assert checkpoint.startswith(b"PK")

    ui.send_signal(signal.SIGINT)
    assert ui.wait(30) == 0
    with pytest.raises(urllib.error.URLError):
        fetch("health")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", port))


def test_the_ui_of_a_taken_port_names_the_option(finished: tuple[Workplace, str]) -> None:
    workplace, _ = finished
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        result = workplace.tracked("ui", "--port", taken.getsockname()[1], check=False)

    assert result.returncode == 2
    assert "--port" in result.stderr


def test_the_ui_without_a_database_says_what_to_do(workplace: Workplace) -> None:
    result = workplace.tracked("ui", check=False)

    assert result.returncode == 2
    assert "there is no database" in result.stderr
    assert "python -m tracked.run train" in result.stderr


@pytest.mark.parametrize("plugin", ["", "tracked+"])
def test_the_ui_of_a_server_is_its_address_without_the_password(workplace: Workplace, plugin: str) -> None:
    result = workplace.tracked(
        "ui", env={"MLFLOW_TRACKING_URI": f"{plugin}http://me:secret@example.org:5000"}
    )

    assert result.stdout.startswith("http://example.org:5000 ")
    assert "secret" not in result.stdout + result.stderr


def test_a_server_that_is_away_and_an_empty_spool_are_an_error(workplace: Workplace) -> None:
    place = Place(f"http://127.0.0.1:{free_port()}", workplace.spool)

    with pytest.raises(ServerUnavailable):
        inspection.listing(place, None, 9, silent)


# -- which run, and what scripts read


def test_the_last_run_may_be_one_that_waits_in_the_spool(workplace: Workplace) -> None:
    file = workplace.experiment()
    delivered = workplace.tracked("train", file, "--epochs", 1, "--json").json["run_id"]
    workplace.end_senders()
    lock = Lock(workplace.outboxes()[0].sender_lock)
    assert lock.acquire()  # so that nothing is delivered
    # Not by `tracked`, which would start a sender.
    assert workplace.nursery is not None
    waiting = workplace.nursery.run(
        workplace, "train", file, "--epochs", "1", "--json", "--drain-timeout", "0", check=False
    )
    assert waiting.returncode == 3
    lock.release()

    resumed = workplace.tracked("resume", "last", "--epochs", 2, "--json").json

    assert resumed["run_id"] != delivered
    assert view_of(workplace, resumed["run_id"]).tags[HANDLE] == waiting.json["run_id"]


def test_a_training_that_fails_still_prints_its_json_line(workplace: Workplace) -> None:
    file = workplace.experiment("def main(run, params):\n    raise ValueError('mine')\n", "raises.py")

    result = workplace.tracked("train", file, "--json", check=False)

    assert result.returncode == 1
    assert result.json["state"] == "failed"
    assert view_of(workplace, result.json["run_id"]).status == "FAILED"


def test_an_earlier_runs_id_does_not_stay_in_the_file(workplace: Workplace) -> None:
    (file := workplace.path / "run-id").write_text("an earlier one\n")

    refused = workplace.tracked("train", workplace.experiment(), "no=1", "--run-id-file", file, check=False)

    assert refused.returncode == 2
    assert not file.exists()


def test_secrets_stay_on_this_machine(workplace: Workplace) -> None:
    file = workplace.experiment(
        "from dataclasses import dataclass\n"
        "@dataclass(frozen=True)\nclass Params:\n    api_key: str = ''\n    max_tokens: int = 8\n"
        "def main(run, params):\n    raise OSError('cannot reach postgresql://me:pa55word@db/x')\n",
        "secrets.py",
    )

    result = workplace.tracked("train", file, "api_key=sk-0123456789abcdef", "--json", check=False)

    view, server = view_of(workplace, result.json["run_id"]), Server(workplace.tracking_uri, timeout=30)
    server.download(view.run_id, "traceback.txt", found := workplace.path / "found.txt")
    assert view.params == {"api_key": "[redacted]", "max_tokens": "8"}
    assert "cannot reach postgresql://" in view.tags["tracked.stop_reason"]
    for text in (found.read_text(), *view.tags.values()):
        assert "pa55word" not in text
        assert "sk-0123456789abcdef" not in text


def test_a_script_is_resumed_behind_two_dashes_and_says_so(workplace: Workplace) -> None:
    (workplace.path / "script.py").write_text(
        "import tracked\n"
        "with tracked.start('scripted', {'lr': 1}) as run:\n"
        "    for step in run.steps(3):\n        run.log({'a': step})\n"
    )
    subprocess.run([sys.executable, "script.py"], cwd=workplace.path, env=workplace.environment(), check=True)

    bare = workplace.tracked("resume", "last", "--max-steps", 5, check=False)
    options = workplace.tracked("resume", "last", "--epochs", 9, "--", "python", "script.py", check=False)
    unstartable = workplace.tracked("resume", "last", "--", "./script.py", check=False)

    assert "was made by a script" in bare.stderr
    assert "-- python script.py" in bare.stderr
    assert "epochs cannot be given to a script" in options.stderr
    assert "'./script.py' cannot be started: Permission denied" in unstartable.stderr
    assert {each.returncode for each in (bare, options, unstartable)} == {2}


def test_a_task_that_is_fitted_in_a_script_is_whole(workplace: Workplace) -> None:
    run = tracked.fit(
        tiny.build(tiny.Params()),
        "fitted",
        {"lr": 0.1},
        epochs=1,
        tracking_uri=workplace.tracking_uri,
        spool_dir=workplace.spool,
        progress=False,
    )

    view = view_of(workplace, run.id)
    assert (view.params["lr"], view.params["loop.epochs"], view.params["loop.monitor"]) == (
        "0.1",
        "1",
        "val/loss",
    )
    assert verification.verify(place_of(workplace), run.id, silent).wrong == []
