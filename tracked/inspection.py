"""What runs there are and how they stand: on the server, and in this machine's spool."""

from __future__ import annotations

import json
import math
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tracked import description, spool
from tracked.address import PLUGIN, redact
from tracked.errors import RecordRejected, RunNotFound, RunNotResumable, ServerError, UsageError
from tracked.journal import START, Reader
from tracked.names import (
    ATTEMPT,
    CHECKPOINT,
    DIVERGED_AT,
    EXACT,
    EXPERIMENT_FILE,
    FORK,
    HANDLE,
    HEARTBEAT,
    HOLDER,
    MANIFEST,
    ORIGIN,
    OURS,
    OVERRIDE,
    SETTINGS,
    STATE,
    STOP_REASON,
    SWEEP,
    is_system,
    newest_attempt,
    step_of,
    told_best,
    validate_key,
)
from tracked.packing import unpack
from tracked.place import Place
from tracked.ranking import Mode, ranking
from tracked.resumption import pointer_in
from tracked.spool import RunFolder, is_held, read_json
from tracked.tables import ago, aligned, distinct_length, one_line, readable
from tracked.trial_runs import children, epochs_in, glance
from tracked.trials import Trial

if TYPE_CHECKING:
    from tracked.server import Latest, RunView, Server

Say = Callable[[str], None]

STATES = (
    *("running", "paused", "finished", "stopped_early", "stopped", "pruned", "failed", "crashed", "killed"),
    *("lost", "draining", "waiting"),
)
"""The first words of `true_state`, for a run of this package."""

LOST_AFTER_SECONDS = 60.0
WAITING = "waiting for the server"
_ENDED_BY_ITSELF = ("finished", "stopped_early", "stopped", "pruned", "paused")
# Characters: of a cell in the list, of a name on a run's page, of any other text there.
_CELL, _NAME, _LINE = 32, 80, 240


@dataclass(frozen=True)
class Summary:
    """A run in a line.

    Attributes:
        run_id: MLflow's ID; the local handle while the server has given none.
        state: The true one, for people: a run that is marked as running may be lost, or deleted.
        started: In ms since the epoch; 0 if it is not known.
        best, last: Of the monitored metric. The best as the training itself has told it, to six digits, once
            that has ended; before, the best of the history.
        undelivered: Points and other records that wait in this machine's spool.
        metrics: Every metric's last value.
    """

    run_id: str
    handle: str
    state: str
    experiment: str
    name: str
    epoch: int | None
    step: int | None
    monitor: str | None
    best: float | None
    last: float | None
    started: int
    undelivered: int
    metrics: dict[str, float] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Stored:
    """A checkpoint, and where it stands: "server", "spool" or both."""

    step: int
    bytes: int
    where: list[str]
    committed: bool


@dataclass(frozen=True)
class Details:
    """All that is known of a run."""

    summary: Summary
    status: str
    url: str
    params: dict[str, str]
    metrics: dict[str, tuple[int, float]]
    checkpoints: list[Stored]
    attempts: int
    facts: dict[str, str] = field(default_factory=dict)
    try_next: list[str] = field(default_factory=list)
    trials: list[Trial] = field(default_factory=list)
    compared_by: dict[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        fields = asdict(self)
        metrics = {key: {"step": step, "value": value} for key, (step, value) in self.metrics.items()}
        return {**fields.pop("summary"), **fields, "metrics": metrics}


# -- what the spool knows


def undelivered(run: RunFolder) -> int:
    """Points, and records of any other kind, that wait in the run's journals."""
    return sum(waiting_in(journal) for journal in run.journals())


def waiting_in(journal: Path) -> int:
    """Points, and records of any other kind, that wait in a journal."""
    reader = Reader(journal, ("points", "files"))
    count = 0
    for record in reader.records("points"):
        if record.kind in ("points", "linked"):
            count += record.body["count"]
        elif record.kind in ("params", "tags", "status", "damaged"):
            count += 1
    return count + sum(record.kind in ("artifact", "checkpoint", "end") for record in reader.records("files"))


def is_trained(run: RunFolder) -> bool:
    """Whether a living process on this machine trains the run."""
    return is_held(run.lock) or any(is_held(journal / "lock") for journal in run.journals())


def folders(place: Place) -> dict[str, list[RunFolder]]:
    """What this machine keeps of the place's runs, by handle; of earlier boots too."""
    found: dict[str, list[RunFolder]] = {}
    for outbox in spool.outboxes(place.spool):
        if outbox.tracking_uri == redact(place.tracking_uri):
            for run in outbox.runs():
                found.setdefault(run.handle, []).append(run)
    return found


def kept_of(place: Place, view: RunView, local: Mapping[str, list[RunFolder]]) -> list[RunFolder]:
    """What this machine keeps of a run, given all `folders`: what other code has logged lies under the run's ID."""
    if HANDLE in view.tags:
        return local.get(view.tags[HANDLE], [])
    boxes = [box for box in spool.outboxes(place.spool) if box.tracking_uri == redact(place.tracking_uri)]
    return [box.called(view.run_id) for box in boxes]


def _as_view(run: RunFolder) -> RunView:
    """The run as its journal and checkpoints show it, for when the server cannot."""
    from tracked.server import Latest, RunView

    about = run.about
    start: dict[str, Any] = {}
    params: dict[str, str] = {}
    tags: dict[str, str] = {HANDLE: run.handle}
    latest: dict[str, Latest] = {}
    for folder in sorted(run.checkpoints.glob("step-*")):
        manifest = read_json(folder / MANIFEST)
        for key, value in manifest.get("metrics", {}).items():
            latest[key] = Latest(manifest["step"], 0, value)
    for journal in run.journals():
        for record in Reader(journal, ("points", "files")).records("points", START):
            if record.kind == "start":
                start = record.body
                tags |= start["tags"]
            elif record.kind == "params":
                params |= record.body
            elif record.kind == "tags":
                tags |= record.body
            elif record.kind == "points":
                latest |= {
                    key: Latest(step, time_ms, value) for key, step, time_ms, value in unpack(record.body)
                }
        start = start or read_json(journal / "start.json")
    if "state" in about and not run.journals():
        tags[STATE] = about["state"]
    return RunView(
        run_id=about.get("run_id") or start.get("run_id") or "",
        experiment_id=about.get("experiment_id", ""),
        name=start.get("name") or "",
        status="",
        start_time=start.get("start_time", 0),
        end_time=None,
        artifact_uri="",
        experiment_name=start.get("experiment"),
        params=params,
        tags=tags,
        latest=latest,
    )


# -- the true state


def true_state(view: RunView, local: Sequence[RunFolder]) -> str:
    """How the run stands, from what the server shows and what this machine sees."""
    if HANDLE not in view.tags:
        return view.status.lower()  # another tool sends no heartbeats, so silence says nothing
    if any(is_trained(run) for run in local):
        return "running"
    if any(run.journals() for run in local):
        return "draining" if view.run_id else WAITING
    state = view.tags.get(STATE) or view.status.lower() or "unknown"
    if state != "running":
        return state
    heard = int(view.tags.get(HEARTBEAT, "0")) or view.start_time
    silent = time.time() - heard / 1000
    return state if silent < LOST_AFTER_SECONDS else f"lost (last heard {ago(silent)} ago)"


def summary_of(view: RunView, local: Sequence[RunFolder], best: float | None) -> Summary:
    """A run in a line, from its view, what this machine keeps of it, and its best value, which is not looked for."""
    settings = object_in(view.tags.get(SETTINGS))
    pointer = object_in(view.tags.get(CHECKPOINT))
    monitor = settings.get("monitor")
    last = view.latest.get(monitor) if monitor else None
    epoch = epochs_in(view)
    steps = [latest.step for key, latest in view.latest.items() if not is_system(key)]
    return Summary(
        run_id=view.run_id or view.tags[HANDLE],
        handle=view.tags.get(HANDLE, ""),
        state="deleted" if view.deleted else true_state(view, local),
        experiment=view.experiment_name or "",
        name=view.name,
        epoch=pointer.get("epoch") if epoch is None else epoch,
        step=max(steps, default=pointer.get("step")),
        monitor=monitor,
        best=best,
        last=last.value if last else None,
        started=view.start_time,
        undelivered=sum(undelivered(run) for run in local),
        metrics={key: latest.value for key, latest in view.latest.items()},
    )


def monitored_by(view: RunView) -> tuple[str, Mode]:
    """The metric that a run of this package monitors (empty if none), and which of its values are better."""
    settings = object_in(view.tags.get(SETTINGS))
    return settings.get("monitor", ""), "max" if settings.get("mode") == "max" else "min"


def own_best(view: RunView) -> float | None:
    """The best value of what the run monitors, to six digits, as the training told it when it ended.

    None also where small gains did not count for it: then it need not be the best of the history.
    """
    told = None if object_in(view.tags.get(SETTINGS)).get("min_delta") else told_best(view.tags)
    # Who was killed has left the tag of an earlier attempt.
    if told is None or told[0] != monitored_by(view)[0] or view.tags.get(STATE) not in _ENDED_BY_ITSELF:
        return None
    metric, value, step = told
    last = view.latest.get(metric)
    return last.value if last is not None and last.step == step else value


def _best(server: Server, views: Sequence[RunView], *, exactly: bool) -> dict[str, float]:
    """Run ID -> best value of the metric that the run monitors, where it has one that is a number.

    Unless it is wanted `exactly`, a history, which may be long, is read only where no training has told its best.
    """
    found: dict[str, float] = {}
    monitored: dict[str, dict[str, Mode]] = {}
    for view in views:
        key, mode = monitored_by(view)
        if key not in view.latest:
            continue
        if (told := own_best(view)) is not None and not exactly:
            found[view.run_id] = told
        else:
            monitored.setdefault(key, {})[view.run_id] = mode
    for key, modes in monitored.items():
        for run_id, history in server.histories([*modes], key).items():
            if best := best_point(history, modes[run_id]):
                found[run_id] = best[1]
    return found


def best_point(history: Iterable[tuple[int, int, float]], mode: Mode) -> tuple[int, float] | None:
    """Step and value of the best point, the first of equal ones; None where none is a number."""
    sound = [(step, value) for step, _, value in history if not math.isnan(value)]
    return (min if mode == "min" else max)(sound, key=itemgetter(1), default=None)


# -- list


def listing(
    place: Place,
    experiment: str | None,
    limit: int,
    say: Say,
    *,
    state: str | None = None,
    only: str = "",
    sort_by: str | None = None,
    descending: bool = False,
    everyones: bool = False,
) -> list[Summary]:
    """The runs of this package, newest first.

    Args:
        place: The server, and the spool, which may hold runs that the server has not seen.
        experiment: Only runs of this experiment.
        limit: How many at most.
        say: Told when the server cannot be asked, and only the spool's runs are listed.
        state: Only runs whose true state begins with this word, one of `STATES`.
        only: A filter in MLflow's search syntax. What the server has not seen cannot pass it.
        sort_by: A metric; the runs come by its last value, those last that have none or NaN.
        descending: With `sort_by`: the largest first.
        everyones: Also the runs that other code has made.

    Raises:
        UsageError: MLflow refuses the filter, the state is none, or there is no such experiment, or no run
            with the metric.
        ServerError: The server does not answer, and the spool knows no run either, or `only` is to be applied.
    """
    from tracked.server import Server

    if state is not None and state not in STATES:
        raise UsageError(
            f"there is no state {state!r}",
            expected=f"one of {', '.join(STATES)}",
            try_next="python -m tracked.run list --state finished",
        )
    if descending and sort_by is None:
        raise UsageError(
            "--descending needs a metric to sort by",
            expected="--sort-by METRIC",
            try_next="python -m tracked.run list --sort-by val/loss --descending",
        )
    if sort_by is not None:
        validate_key(sort_by)
    conditions = [*([] if everyones else [OURS]), *([only] if only.strip() else [])]
    order = f"metrics.`{sort_by}` {'DESC' if descending else 'ASC'}" if sort_by else ""
    local = folders(place)
    server = Server(place.tracking_uri, create=False)
    asked = {"order_by": order} if order else {}
    known_experiments: list[str] | None = None  # not asked for
    try:
        views = server.search(
            experiment=experiment,
            filter=" AND ".join(conditions),
            limit=limit if state is None else sys.maxsize,  # the server does not know the true state
            **asked,
        )
        if experiment is not None and not views:
            known_experiments = server.experiments()
        known = {view.tags.get(HANDLE) for view in views}
        unseen = [
            handle for handle in local if handle not in known and not _run_id(local[handle])
        ]  # one that has an ID and is not in the answer is older, or deleted
    except RecordRejected as error:
        raise UsageError(
            f"MLflow refuses the filter {only!r}: {error.found}",
            expected="MLflow's search syntax: comparisons joined by AND",
            try_next="""python -m tracked.run list --filter 'metrics."val/loss" < 0.1 AND params.lr = "0.05"'""",
        ) from None
    except ServerError as error:
        if not local or only:
            raise
        say(f"{error.found}; this is what the spool of this machine knows")
        views, unseen = [], list(local)
    if not only:
        seen_here = [_as_view(local[handle][-1]) for handle in unseen]
        views += [view for view in seen_here if experiment in (None, view.experiment_name)]
    if experiment is not None and not views and known_experiments is not None:
        check_experiment(experiment, known_experiments, server.place)
    if sort_by is not None and views and not any(sort_by in view.latest for view in views):
        raise UsageError(
            f"no run has a metric {sort_by!r}",
            expected=some(key for view in views for key in view.latest),
            try_next="python -m tracked.run show last, which names the metrics of a run",
        )
    if state is not None:
        # Of other code's runs the server alone tells the state, so the spool is not searched for all of them.
        views = [
            view
            for view in views
            if true_state(view, local.get(view.tags.get(HANDLE, ""), [])).partition(" ")[0] == state
        ]
    if sort_by is None:
        views.sort(key=lambda view: -view.start_time)
    else:
        views.sort(key=lambda view: _place_of(view.latest.get(sort_by), descending=descending))
    views = views[:limit]
    best = _best(server, [view for view in views if view.status], exactly=False)
    return [summary_of(view, kept_of(place, view, local), best.get(view.run_id)) for view in views]


def _place_of(latest: Latest | None, *, descending: bool) -> tuple[bool, float]:
    """Sorts by value, and what is no number last."""
    if latest is None or math.isnan(latest.value):
        return True, 0.0
    return False, -latest.value if descending else latest.value


def check_experiment(name: str, known: Sequence[str], place: str) -> None:
    """Refuse an experiment that is none.

    Raises:
        UsageError: It is not among those that are known.
    """
    if name not in known:
        raise UsageError(
            f"there is no experiment {name!r} on {place}",
            expected=f"one of {some(known)}" if known else "an experiment with runs in it",
            try_next="python -m tracked.run list",
        )


def some(names: Iterable[str], limit: int = 8) -> str:
    """Names for the text of an error."""
    distinct = sorted({one_line(name, _NAME) for name in names})
    return ", ".join(distinct[:limit]) + (" …" if len(distinct) > limit else "") if distinct else "a metric"


def table(runs: Sequence[Summary], metric: str | None = None) -> str:
    """Runs as aligned text; IDs cut to 8 characters, or as many more as make them differ.

    Args:
        runs: In the order of the rows.
        metric: One whose last value has a column of its own.
    """
    length = distinct_length([run.run_id for run in runs])
    titles = ("run", "state", "experiment", "name", "epoch", "step", "best", "last")
    rows = [(*titles, one_line(metric or "", _CELL), "age", "undelivered")]
    for run in runs:
        age = ago(time.time() - run.started / 1000) if run.started else ""
        rows.append(
            (
                run.run_id[:length],
                one_line(run.state, _CELL),
                one_line(run.experiment, _CELL),
                one_line(run.name, _CELL),
                _count(run.epoch),
                _count(run.step),
                f"{one_line(run.monitor, _CELL)} {run.best:.4g}" if run.best is not None else "",
                _shown(run.last),
                _shown(run.metrics.get(metric)) if metric else "",
                age,
                str(run.undelivered) if run.undelivered else "",
            )
        )
    return aligned(rows)


# -- show


def look(place: Place, word: str, say: Say) -> Details:
    """All that is known of one run, on the server or only in the spool.

    Args:
        place: Where the run stands.
        word: ID, unique prefix of an ID, local handle, name, or `last`.
        say: Told when the server cannot be asked.

    Raises:
        RunNotFound: There is no such run, or several.
        ServerError: The server does not answer, and the spool does not know the run.
    """
    from tracked.server import Server

    server = Server(place.tracking_uri, create=False)
    view, local = find(server, place, word, say)
    best, on_server = None, {}
    if view.status:
        best = _best(server, [view], exactly=True).get(view.run_id)
        on_server = {
            step: _size(server.sizes(view.run_id, f"checkpoints/{name}"))
            for name in server.directories(view.run_id, "checkpoints")
            if (step := step_of(name)) is not None
        }
    in_spool = {
        step: size
        for run in local
        for path in run.checkpoints.glob("step-*")
        if (step := step_of(path.name)) is not None
        and (size := _size({file.name: file.stat().st_size for file in path.iterdir()}))
    }
    committed = object_in(view.tags.get(CHECKPOINT)).get("step", -1)
    checkpoints = [
        Stored(
            step=step,
            bytes=on_server.get(step) or in_spool.get(step, 0),
            where=[name for name, held in (("server", on_server), ("spool", in_spool)) if step in held],
            committed=step <= committed and step in on_server,
        )
        for step in sorted({*on_server, *in_spool})
    ]
    summary = summary_of(view, local, best)
    facts = {
        "held by": view.tags.get(HOLDER, "") if summary.state == "running" else "",
        "stopped because": view.tags.get(STOP_REASON, ""),
        "diverged at step": view.tags.get(DIVERGED_AT, ""),
        "overridden": view.tags.get(OVERRIDE, ""),
        "forked from": view.tags.get(ORIGIN, ""),
        "forked into": ", ".join(
            sorted(name.removeprefix(FORK) for name in view.tags if name.startswith(FORK))
        ),
        "exact": view.tags.get(EXACT, ""),
        "trouble": next((trouble for run in local if (trouble := run.about.get("trouble"))), ""),
        "rejected": next((str(count) for run in local if (count := run.about.get("rejected"))), ""),
    }
    sweep = object_in(view.tags.get(SWEEP))
    return Details(
        summary=summary,
        status=view.status,
        url=server.url(view) if view.status else "",
        params=view.params,
        metrics={key: (latest.step, latest.value) for key, latest in view.latest.items()},
        checkpoints=checkpoints,
        attempts=max(newest_attempt(view.params)[0], int(view.tags.get(ATTEMPT, "1"))),
        facts={name: text for name, text in facts.items() if text},
        try_next=_try_next(server, view, summary),
        trials=[glance(child) for child in children(server, view.run_id)] if sweep and view.status else [],
        compared_by={name: sweep["settings"][name] for name in ("monitor", "mode")} if sweep else {},
    )


def _size(files: Mapping[str, int]) -> int:
    """Bytes of a checkpoint, whatever its file is called, from the sizes of what lies in its folder."""
    return sum(size for name, size in files.items() if name != MANIFEST)


def _try_next(server: Server, view: RunView, run: Summary) -> list[str]:
    """The lines that get on with the run as it stands; none that could not work."""
    command = "python -m tracked.run"
    if view.deleted:
        return [f"MLFLOW_TRACKING_URI={shlex.quote(server.place)} mlflow runs restore --run-id {view.run_id}"]
    has_checkpoint = pointer_in(view.tags) is not None
    # What no experiment file made goes on in the script that made it.
    program = [one_line(word, _LINE) for word in description.program_of(view.tags)]
    if HANDLE not in view.tags:
        if not has_checkpoint or run.state == "finished" or not program:
            return []
        words = ["resume", run.run_id, "--tracking-uri", f"{PLUGIN}{server.place}", "--", *program]
        return [f"{command} {shlex.join(words)}"]
    if run.state == "running":
        return [f"{command} pause {run.run_id}"]
    if run.undelivered:
        return [f"{command} sync"]
    if run.state in ("finished", "stopped_early"):
        export = f"{command} export {run.run_id} --form weights --to weights"
        return [f"{command} verify {run.run_id}", *([export] if has_checkpoint else [])]
    if SWEEP in view.tags:
        return [f"{command} resume {run.run_id}"]
    if not has_checkpoint:
        return []
    if EXPERIMENT_FILE in view.tags:
        return [f"{command} resume {run.run_id}"]
    if not program:
        return [description.typed(run.run_id)]
    return [f"{command} {shlex.join(['resume', run.run_id, '--', *program])}"]


def page(run: Details) -> str:
    """A run as text."""
    summary = run.summary
    facts = {
        "run": summary.run_id,
        "handle": summary.handle if summary.handle != summary.run_id else "",
        "state": summary.state,
        "experiment": summary.experiment,
        "name": summary.name,
        "started": time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(summary.started / 1000))
        if summary.started
        else "",
        "epoch": _count(summary.epoch),
        "step": _count(summary.step),
        "best": f"{summary.monitor} {summary.best:.6g}" if summary.best is not None else "",
        "attempts": str(run.attempts),
        "undelivered": str(summary.undelivered) if summary.undelivered else "",
        **run.facts,
        "address": run.url or "python -m tracked.run ui",
    }
    lines = [f"{name:<18}{one_line(text, _LINE)}" for name, text in facts.items() if text]
    # The attempt's claim is a param only because a param can be written once.
    params = {name: text for name, text in run.params.items() if not name.startswith("tracked.attempt.")}
    own = {name: text for name, text in params.items() if not name.startswith("loop.")}
    loop = {name: text for name, text in params.items() if name.startswith("loop.") and text != "None"}
    lines += _section("params", [(name, own[name]) for name in sorted(own)])
    lines += _section("loop", [(name.removeprefix("loop."), loop[name]) for name in sorted(loop)])
    metrics = sorted(run.metrics.items())
    lines += _section("metrics", [(key, f"{value:.6g}", f"step {step}") for key, (step, value) in metrics])
    lines += _section(
        "checkpoints",
        [
            (
                f"step {each.step}",
                readable(each.bytes),
                "committed" if each.committed else "not committed",
                " and ".join(each.where),
            )
            for each in run.checkpoints
        ],
    )
    if run.trials:
        by = run.compared_by
        lines += ["", ranking(run.trials, metric=by["monitor"], mode=by["mode"])]
    lines += ["", *(f"next: {command}" for command in run.try_next)]
    return "\n".join(lines).rstrip()


def _section(title: str, rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Rows under a title, with an empty line before it; nothing without rows."""
    if not rows:
        return []
    cells = [
        (f"  {one_line(name, _NAME)}", *(one_line(cell, _LINE) for cell in others)) for name, *others in rows
    ]
    return ["", aligned([(title, *[""] * (len(rows[0]) - 1)), *cells])]


# -- which run


def find(server: Server, place: Place, word: str, say: Say) -> tuple[RunView, list[RunFolder]]:
    """The run that `word` means, and what this machine keeps of it.

    One that is seen in the spool alone has the status "".

    Raises:
        RunNotFound: There is no such run, or several.
        ServerError: The server does not answer, and the spool does not know the run.
    """
    local = folders(place)
    views: list[RunView] = []
    trouble: ServerError | None = None
    try:
        views = server.search(filter=OURS, limit=1) if word == "last" else server.find(word)
    except ServerError as error:
        trouble = error
    known = {view.tags.get(HANDLE) for view in views}
    for handle, runs in local.items():
        run_id = _run_id(runs)
        # What has an ID is the server's to tell, as long as it answers.
        if handle in known or (run_id and trouble is None):
            continue
        if word == "last" or (len(word) >= 4 and (handle.startswith(word) or run_id.startswith(word))):
            views.append(_as_view(runs[-1]))
    if word == "last":
        views = sorted(views, key=lambda view: -view.start_time)[:1]
    if len(views) > 1:
        shown = ", ".join((view.run_id or view.tags[HANDLE])[:8] for view in views[:5])
        raise RunNotFound(
            f"{word!r} may mean {len(views)} runs: {shown}",
            expected="an ID, or enough of its first characters",
            try_next="python -m tracked.run list",
        )
    if not views:
        if trouble is not None:
            raise trouble
        raise RunNotFound(
            f"there is no run {word!r} on {server.place}",
            expected="a run ID, at least 4 characters of one, a local handle, or `last`",
            try_next="python -m tracked.run list",
        )
    if trouble is not None:
        say(f"{trouble.found}; this is what the spool of this machine knows")
    return views[0], kept_of(place, views[0], local)


def refuse_foreign(view: RunView) -> None:
    """Go on with runs of this package only.

    Raises:
        RunNotResumable: It was not made by it.
    """
    if HANDLE not in view.tags:
        raise RunNotResumable(
            f"run {view.run_id} was not made by this package: it has no tag {HANDLE}",
            expected="a run of `python -m tracked.run train`, or of tracked.start()",
            try_next="python -m tracked.run list",
        )


def _run_id(runs: Sequence[RunFolder]) -> str:
    return next((str(run_id) for run in runs if (run_id := run.about.get("run_id"))), "")


# -- words and numbers


def _count(value: int | None) -> str:
    return "" if value is None else str(value)


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def object_in(text: str | None) -> dict[str, Any]:
    """The JSON object in a tag, which anybody may have written; empty if it is none."""
    try:
        value = json.loads(text or "{}")
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
