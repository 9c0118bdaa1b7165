"""How runs differ: their params, metrics and ends side by side, and their curves in one picture."""

from __future__ import annotations

import os
import re
import sys
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tracked.errors import ServerError, UsageError
from tracked.inspection import (
    Summary,
    best_point,
    check_experiment,
    find,
    folders,
    kept_of,
    monitored_by,
    own_best,
    some,
    summary_of,
)
from tracked.names import HANDLE, SWEEP, is_system
from tracked.place import Place
from tracked.ranking import Mode, best_first, usual_mode
from tracked.tables import ago, aligned, distinct_length, one_line, told_apart

if TYPE_CHECKING:
    from tracked.server import RunView, Server

Say = Callable[[str], None]
History = Sequence[tuple[int, int, float]]

_ALWAYS = frozenset({"pdf", "png", "svg"})  # forms of a picture that need not be asked of matplotlib
_PATIENCE = 30.0  # seconds for an answer
_METRICS = 6  # that the table and the picture show
_SIDE_BY_SIDE = 4  # runs that have a column each; of more, each has a row
_WIDEST = 24  # characters of a value, unless values look the same then
_DIGITS, _ALL_DIGITS = 6, 17  # of a number, unless numbers look the same then
_LINE = 240  # characters
_POINTS = 10_000  # of a picture's panel that are fetched, for all its curves together
_LEAST_OF_A_CURVE, _MOST_OF_A_CURVE = 200, 2000
_ROUNDED = 1e-5  # by which a best that is told may be off, of itself
_NAMED = 7  # curves that a picture has colours for
_FIRST = ("val/loss", "train/loss")
_UI = "http://127.0.0.1:5000"  # where `ui` serves an SQLite file


@dataclass(frozen=True)
class _Column:
    """What the runs have of one name: the values that are compared, and how each looks."""

    title: str
    values: Sequence[Any]
    cells: Sequence[str]

    @property
    def differs(self) -> bool:
        return len({repr(value) for value in self.values}) > 1  # also NaN is equal to NaN


@dataclass(frozen=True)
class Compared:
    """One of the runs.

    Attributes:
        summary: How it stands; its best and last are those of the comparison's metric, not of its own.
        seconds: From its start to its end, or to its last point; pauses count. None if it has none.
        best_step: Where the metric was best.
        params: Its params, as the server shows them.
    """

    summary: Summary
    seconds: float | None
    best_step: int | None
    params: Mapping[str, str]

    def as_json(self) -> dict[str, Any]:
        told = self.summary.as_json()
        return {**told, "best_step": self.best_step, "seconds": self.seconds, "params": dict(self.params)}


@dataclass(frozen=True)
class Comparison:
    """Runs beside each other.

    Attributes:
        runs: In the order in which they were named, or best first where they were chosen.
        metric: What they are compared by; None where they have no metric.
        mode: Whether its smaller or larger values are better.
        mode_is_known: Whether a run or a person has said so.
        url: The page of MLflow's interface that compares them; of an SQLite file, as `ui` serves it.
        curves: The picture's panels: metric -> run ID -> history, thinned where the server can do so.
    """

    runs: Sequence[Compared]
    metric: str | None
    mode: Mode
    mode_is_known: bool
    url: str
    curves: Mapping[str, Mapping[str, History]]

    def as_json(self) -> dict[str, Any]:
        return {
            "metric": self.metric,
            "mode": self.mode,
            "url": self.url,
            "params_that_differ": [column.title for column in self._params() if column.differs],
            "runs": [run.as_json() for run in self.runs],
        }

    def table(self) -> str:
        """What differs as aligned text, and below it in one line what does not."""
        columns = [*self._ends(), *self._metrics(), *self._params()]
        length = distinct_length([run.summary.run_id for run in self.runs])
        ids = [run.summary.run_id[:length] for run in self.runs]
        rows = [["run", *ids], *([each.title, *each.cells] for each in columns if each.differs)]
        if len(self.runs) > _SIDE_BY_SIDE:
            rows = [list(row) for row in zip(*rows, strict=True)]
        same = [f"{each.title} {each.cells[0]}" for each in columns if not each.differs and each.cells[0]]
        lines = [aligned(rows, all_columns=True)]
        if self.metric is not None and not self.mode_is_known:
            taken, other = ("largest", "min") if self.mode == "max" else ("smallest", "max")
            lines += [
                "",
                f"the best {self.metric} is taken to be the {taken}: the runs do not settle it (else --mode {other})",
            ]
        if same:
            lines += ["", one_line(f"the same in all {len(self.runs)}: {', '.join(same)}", _LINE)]
        if left := len({key for run in self.runs for key in run.summary.metrics}) - len(self._shown()):
            lines.append(f"{left} further metrics: --json")
        return "\n".join(lines)

    def _ends(self) -> list[_Column]:
        summaries = [run.summary for run in self.runs]
        columns = [
            _of_texts("name", [each.name for each in summaries]),
            _of_texts("experiment", [each.experiment for each in summaries]),
            _of_texts("state", [each.state for each in summaries]),
            _of_texts("time", ["" if run.seconds is None else ago(run.seconds) for run in self.runs]),
            _of_numbers("epoch", [each.epoch for each in summaries]),
            _of_numbers("step", [each.step for each in summaries]),
        ]
        if self.metric is not None:
            columns.append(_of_numbers(f"best {self.metric}", [each.best for each in summaries]))
            columns.append(_of_numbers("at step", [run.best_step for run in self.runs]))
        return columns

    def _shown(self) -> list[str]:
        """The metrics that the table has room for."""
        return _by_importance([run.summary.metrics for run in self.runs], self.metric)[:_METRICS]

    def _metrics(self) -> list[_Column]:
        return [
            _of_numbers(f"last {key}", [run.summary.metrics.get(key) for run in self.runs])
            for key in self._shown()
        ]

    def _params(self) -> list[_Column]:
        """Hyperparameters first, then the loop's settings."""
        # The claim of an attempt is a param only because a param can be written once.
        names = {name for run in self.runs for name in run.params if not name.startswith("tracked.attempt.")}
        return [
            _of_texts(name, [run.params.get(name, "") for run in self.runs])
            for name in sorted(names, key=lambda name: (name.startswith("loop."), name))
        ]


def compare(
    place: Place,
    words: Sequence[str],
    say: Say,
    *,
    experiment: str | None = None,
    top: int = 10,
    metric: str | None = None,
    mode: Mode | None = None,
    with_curves: bool = False,
) -> Comparison:
    """Runs beside each other, those that are named or the best of an experiment.

    Args:
        place: Where they stand.
        words: For each run an ID, unique prefix of an ID, local handle, name, or `last`; also of runs that
            were not made by this package.
        say: Told when the server cannot be asked.
        experiment: Instead of `words`: of this experiment, the `top` runs. A sweep's parent is none of them.
        top: How many.
        metric: What they are compared by; by default what most of them monitor, else `val/loss` or
            `train/loss`, else what comes first.
        mode: Whether its smaller or larger values are better; by default as the runs say, else as is usual.
        with_curves: Whether the histories for a picture are fetched.

    Raises:
        UsageError: These are fewer than two runs, or none of them has the metric.
        RunNotFound: There is no such run, or several.
        ServerError: The server does not answer.
    """
    from tracked.server import Server

    server = Server(place.tracking_uri, timeout=_PATIENCE, create=False)
    if experiment is None:
        known = _by_id(server, words)
        found = [known.get(word) or find(server, place, word, say)[0] for word in words]
        views = list({view.run_id or view.tags[HANDLE]: view for view in found}.values())
    elif words:
        raise UsageError(
            "--experiment chooses the runs, and runs are named as well",
            expected="one of the two",
            try_next=f"python -m tracked.run compare --experiment {experiment}",
        )
    else:
        views = _in_experiment(server, experiment)
    if len(views) < 2:
        count = "one run" if views else "no run"
        raise UsageError(
            f"there is {count} to compare{f' in experiment {experiment!r}' if experiment else ''}",
            expected="at least two different runs",
            try_next="python -m tracked.run list",
        )
    if with_curves:  # matplotlib takes a second to import, and the server as long to answer
        threading.Thread(target=import_module, args=["tracked.plots"], daemon=True).start()
    metric, said = _compared_by(views, metric, mode)
    mode = said or usual_mode(metric or "")
    if experiment is not None:
        views = _hopeful(views, (metric or "", mode), top)
    histories: dict[str, History] = {}
    if metric is not None:
        have = [view.run_id for view in views if view.status and metric in view.latest]
        histories |= server.histories(have, metric)
    best = {run_id: best_point(history, mode) for run_id, history in histories.items()}
    if experiment is not None:
        views = _best_first(views, best, mode)[:top]
    on_server = [view for view in views if view.status]  # the spool alone knows no history
    experiments = {
        each: server.experiment_name(each) for each in sorted({view.experiment_id for view in on_server})
    }
    local = folders(place)
    compared = []
    for view in views:
        step, value = best.get(view.run_id) or (None, None)
        last = view.latest.get(metric) if metric else None
        summary = replace(
            summary_of(view, kept_of(place, view, local), value),
            experiment=experiments.get(view.experiment_id) or view.experiment_name or "",
            monitor=metric,
            last=last.value if last else None,
        )
        compared.append(Compared(summary, _seconds(view), step, view.params))
    curves = {}
    if with_curves:
        # The best ones have names in a picture of many.
        drawn = on_server if len(on_server) <= _NAMED else _best_first(on_server, best, mode)
        curves = _curves(server, drawn, metric, histories)
    return Comparison(compared, metric, mode, said is not None, server.compare_url(on_server, _UI), curves)


def draw(comparison: Comparison, file: Path) -> None:
    """Write the curves as a picture, in the form that the file's suffix names.

    Raises:
        UsageError: No run has a curve, or the file cannot be written.
    """
    from tracked import plots

    if not comparison.curves:
        raise UsageError(
            "none of these runs has a metric on the server, so there is no curve to draw",
            expected="runs that have logged a metric",
            try_next="python -m tracked.run list",
        )
    length = distinct_length([run.summary.run_id for run in comparison.runs])
    names = {run.summary.run_id: one_line(run.summary.name, plots.LONGEST_LABEL) for run in comparison.runs}
    called = Counter(names.values())
    panels = {key: list(histories.values()) for key, histories in comparison.curves.items()}
    labels = [
        names[run_id] if called[names[run_id]] == 1 and names[run_id] else run_id[:length]
        for run_id in next(iter(comparison.curves.values()))
    ]
    figure = plots.overlaid(panels, labels)
    try:
        file.write_bytes(plots.drawn_as(figure, file.suffix[1:].lower()))
    except OSError as error:
        raise _unwritable(file, error.strerror or str(error)) from None


def check_picture(file: Path) -> None:
    """Refuse a picture that could not be written, before anything is fetched for it.

    Raises:
        UsageError: matplotlib does not know the suffix, or the folder cannot be written to.
    """
    form = file.suffix[1:].lower()
    if form not in _ALWAYS and form not in (forms := _forms()):
        raise UsageError(
            f"{str(file)!r} does not end like a picture",
            expected=f"one of {', '.join(f'.{form}' for form in forms)}",
            try_next=f"--to {file.with_suffix('.png') if file.name else 'curves.png'}",
        )
    if file.is_dir():
        raise _unwritable(file, "it is a folder")
    if not file.parent.is_dir():
        raise _unwritable(file, "its folder does not exist")
    if not os.access(file if file.exists() else file.parent, os.W_OK):
        raise _unwritable(file, "permission denied")


def _forms() -> list[str]:
    from tracked import plots

    return plots.forms()


def _unwritable(file: Path, why: str) -> UsageError:
    return UsageError(
        f"the picture {file} cannot be written: {why}",
        expected="a file in a folder that can be written to",
        try_next=f"--to {file.name or 'curves.png'}",
    )


def _by_id(server: Server, words: Sequence[str]) -> dict[str, RunView]:
    """The runs on the server whose whole IDs are among the words, in one request for all of them."""
    whole = {word for word in words if re.fullmatch("[0-9a-f]{32}", word)}
    if len(whole) < 2:
        return {}
    either = ", ".join(f"'{word}'" for word in whole)
    with suppress(ServerError):  # whoever looks for each of them will meet it, and can tell
        return {
            view.run_id: view
            for view in server.search(filter=f"attributes.run_id IN ({either})", limit=len(whole))
        }
    return {}


def _in_experiment(server: Server, experiment: str) -> list[RunView]:
    """All runs of an experiment but the parents of its sweeps."""
    check_experiment(experiment, server.experiments(), server.place)
    return [
        view for view in server.search(experiment=experiment, limit=sys.maxsize) if SWEEP not in view.tags
    ]


def _compared_by(
    views: Sequence[RunView], metric: str | None, mode: Mode | None
) -> tuple[str | None, Mode | None]:
    """The metric, and which of its values are better; None where nobody says so."""
    keys = [view.latest for view in views]
    own = [said for view in views if (said := monitored_by(view))[0] in view.latest]
    if metric is None:
        monitored = Counter(key for key, _ in own).most_common(1)
        metric = next(iter(_by_importance(keys, monitored[0][0] if monitored else None)), None)
    elif not any(metric in latest for latest in keys):
        raise UsageError(
            f"none of these runs has a metric {metric!r}",
            expected=f"one of {some(key for latest in keys for key in latest)}",
            try_next="python -m tracked.run compare without --metric",
        )
    if mode is None:
        # Runs that disagree say nothing.
        modes = {each for key, each in own if key == metric}
        mode = modes.pop() if len(modes) == 1 else None
    return metric, mode


def _by_importance(metrics: Sequence[Mapping[str, Any]], first: str | None) -> list[str]:
    """Their keys: those that all runs have before the others, losses first, what only counts last."""
    counted = Counter(key for keys in metrics for key in keys)

    def rank(key: str) -> tuple[bool, bool, int, str]:
        kind = _FIRST.index(key) if key in _FIRST else 2 if key.startswith("val/") else 3
        return key != first, counted[key] < len(metrics), 4 if _only_counts(key) else kind, key

    return sorted(counted, key=rank)


def _only_counts(key: str) -> bool:
    return key == "epoch" or is_system(key)


def _curves(
    server: Server, views: Sequence[RunView], metric: str | None, whole: Mapping[str, History]
) -> dict[str, dict[str, History]]:
    """The histories for a picture: of keys that all runs have, or else of those that some have."""
    keys = [key for key in _by_importance([view.latest for view in views], metric) if not _only_counts(key)]
    shared = [key for key in keys if all(key in view.latest for view in views)]
    about = min(max(_POINTS // max(len(views), 1), _LEAST_OF_A_CURVE), _MOST_OF_A_CURVE)
    run_ids = [view.run_id for view in views]
    found: dict[str, dict[str, History]] = {}
    for key in (shared or keys)[:_METRICS]:
        fetched = whole if key == metric else server.histories(run_ids, key, about=about)
        found[key] = {run_id: fetched.get(run_id, []) for run_id in run_ids}
    return found


def _hopeful(views: Sequence[RunView], by: tuple[str, Mode], top: int) -> list[RunView]:
    """Those that may be among the `top`, whose histories have to be read: the others told a best that is worse."""
    sign = 1 if by[1] == "min" else -1
    told = {
        view.run_id: sign * best
        for view in views
        if monitored_by(view) == by and (best := own_best(view)) is not None
    }
    if len(told) <= top:
        return list(views)
    worst = sorted(told.values())[top - 1]
    worst += abs(worst) * _ROUNDED
    return [view for view in views if told.get(view.run_id, worst) <= worst]


def _best_first(
    views: Sequence[RunView], best: Mapping[str, tuple[int, float] | None], mode: Mode
) -> list[RunView]:
    values = {run_id: point[1] for run_id, point in best.items() if point is not None}
    return sorted(views, key=lambda view: best_first(values.get(view.run_id), mode))


def _seconds(view: RunView) -> float | None:
    end = view.end_time or max((latest.timestamp for latest in view.latest.values()), default=0)
    return (end - view.start_time) / 1000 if end >= view.start_time > 0 else None


def _of_texts(title: str, values: Sequence[str]) -> _Column:
    return _Column(title, values, told_apart(values, _WIDEST))


def _of_numbers(title: str, values: Sequence[float | None]) -> _Column:
    """With as many digits as those that differ need to look different."""
    digits = _DIGITS
    while True:
        cells = [_cell(value, digits) for value in values]
        if digits == _ALL_DIGITS or len({*cells}) == len({repr(value) for value in values}):
            return _Column(title, values, cells)
        digits += 1


def _cell(value: float | None, digits: int) -> str:
    if value is None:
        return ""
    return str(value) if isinstance(value, int) else f"{value:.{digits}g}"
