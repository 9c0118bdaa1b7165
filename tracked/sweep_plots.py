"""The pictures of a sweep: its trials by number, by epoch and by param, in the style of a run's pictures.

The best trial has the same colour in all of them; shades are those of viridis, which colour-blind people
read as well. An axis of values is wide enough for the finished trials but for outliers: what is worse stands
on its edge, because nobody would see what the good ones differ in if it did not. Whatever the trials are,
there is a picture: what is missing or no finite number is left out, or stands in a place of its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, NullLocator
from numpy.typing import NDArray

from tracked import ranking
from tracked.plots import (
    HEIGHT,
    MARK,
    ROUND,
    STYLE,
    TRAIN,
    VALIDATION,
    WIDTH,
    png,
    scale_upright,
    spans_decades,
    thinned,
)
from tracked.ranking import Mode
from tracked.tables import one_line
from tracked.trials import Trial

Floats = NDArray[np.float64]

BEST = VALIDATION[0]
DIM = "#999999"
STATES: Mapping[str, Mapping[str, Any]] = {
    "pruned": {"color": DIM, "marker": "x", "markersize": 6, "markeredgewidth": 1.6},
    "failed": {"color": MARK, "marker": "X", "markersize": 8, "markeredgewidth": 0},
    "running": {"color": TRAIN, "marker": "o", "markersize": 7, "markerfacecolor": "none"},
    "finished": {"color": TRAIN, "marker": "o", "markersize": 7},
}
"""How trials are drawn by state; what matters most comes last and so on top."""
_RING: Mapping[str, Any] = {
    "color": BEST,
    "marker": "o",
    "markersize": 13,
    "markerfacecolor": "none",
    "markeredgewidth": 2.4,
    "linestyle": "",
    "zorder": 5,
    "gid": "best",
}
_BARS, _ROWS, _PANELS = 12, 8, 8  # params that a picture has room for
_OPTIONS = 6  # a param with no more values than these is drawn as a choice
_NOWHERE, _NOTHING = (
    -0.1,
    "–",
)  # where on an axis from 0 to 1 a trial stands that has no such value, and its label
_WORSE = "or worse"
_ENOUGH = 4  # finished trials that tell what is an outlier
_LONGEST = 100  # characters of an option
_LARGEST = 1e300  # nearer to the largest float, the margins of an axis overflow
_MISSING = object()


def draw(
    trials: Sequence[Trial], *, metric: str, mode: Mode, importance: Mapping[str, float]
) -> dict[str, bytes]:
    """Every picture that has something to show, as name -> PNG file.

    Args:
        trials: In any order.
        metric: The name of the monitored value.
        mode: Whether smaller ("min") or larger ("max") is better.
        importance: Param -> its share in the differences between the values; may be empty.
    """
    figures = {}
    has_values = bool(np.isfinite(_values(trials)).any())
    if has_values:
        figures["history"] = optimization_history(trials, metric=metric, mode=mode)
    if any(len(_line(trial)) for trial in trials):
        figures["intermediate"] = intermediate_values(trials, metric=metric, mode=mode)
    if _ranked(importance):
        figures["importance"] = param_importance(importance, metric=metric)
    if has_values and any(trial.params for trial in trials):
        figures["parallel"] = parallel_coordinates(trials, metric=metric, mode=mode, importance=importance)
        figures["slice"] = slices(trials, metric=metric, mode=mode, importance=importance)
    return {f"plots/{name}.png": png(figure) for name, figure in figures.items()}


def optimization_history(trials: Sequence[Trial], *, metric: str, mode: Mode) -> Figure:
    """The value of each trial by its number, and the best so far of the finished ones as a staircase.

    A trial whose value is no finite number stands on the frame, where the worst ones are.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, HEIGHT))
        axes = figure.add_subplot()
        values, edge = _focused(trials, mode)
        numbers = np.array([trial.number for trial in trials], dtype=np.float64)
        worst = 1.0 if mode == "min" else 0.0
        handles = []
        for state, style in STATES.items():
            some = np.array([trial.state == state for trial in trials], dtype=np.bool_)
            if not some.any():
                continue
            known, unknown = some & np.isfinite(values), some & np.isnan(values)
            _dots(axes, numbers[known], values[known], gid=state, **style)
            frame = {"transform": axes.get_xaxis_transform(), "clip_on": False, "gid": f"{state}, no value"}
            _dots(axes, numbers[unknown], np.full(unknown.sum(), worst), **frame, **style)
            handles.append(Line2D([], [], ls="", label=f"{some.sum()} {state}", **style))
        best = _best(trials, mode)
        if best is not None:
            stairs = _best_so_far(trials, values, mode)
            axes.plot(*stairs.T, color=BEST, drawstyle="steps-post", zorder=1, gid="stairs")
            handles.append(Line2D([], [], color=BEST, label="best so far"))
            _dots(axes, best.number, best.value, **_RING)
        if edge is not None:
            handles.append(_edge(axes, edge))
        _scale_values(axes, values)
        _label(axes, metric, "trial", best)
        _legend(figure, handles)
    return figure


def intermediate_values(trials: Sequence[Trial], *, metric: str, mode: Mode) -> Figure:
    """What each trial reported, a line each: pruned ones dim and ended with a mark, the best one thick."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, HEIGHT))
        axes = figure.add_subplot()
        alpha = min(0.8, max(0.2, 12 / (len(trials) + 1)))
        lines = [_line(trial) for trial in trials]
        finished = [line for line, trial in zip(lines, trials, strict=True) if trial.state == "finished"]
        values = _joined(lines)
        edge = _fence(_joined(finished) if len(finished) >= _ENOUGH else values, mode)
        moved = False
        handles = []
        for state, style in STATES.items():
            some = [
                line for line, trial in zip(lines, trials, strict=True) if trial.state == state and len(line)
            ]
            if not some:
                continue
            dashes = "dashed" if state == "running" else "solid"
            axes.add_collection(
                LineCollection(some, colors=style["color"], ls=dashes, lw=1.3, alpha=alpha, gid=state)
            )
            # A finished line needs no mark at its end, unless it has one point only and so no length.
            ends = np.array([line[-1] for line in some if state != "finished" or len(line) == 1])
            epochs, last = ends.reshape(-1, 2).T
            shown = _clipped(last, edge, mode)
            moved |= not np.array_equal(shown, last)
            marks = {**style, "markersize": 5}
            _dots(axes, epochs, shown, alpha=max(alpha, 0.6), gid=f"end of {state}", **marks)
            if state == "finished":
                marks["marker"] = ""
            handles.append(Line2D([], [], lw=1.6, ls=dashes, label=f"{len(some)} {state}", **marks))
        best = _best(trials, mode)
        if best is not None and len(line := lines[trials.index(best)]):
            axes.plot(*line.T, color=BEST, marker="o" if len(line) == 1 else "", zorder=4, gid="best")
            handles.append(Line2D([], [], color=BEST, label="best"))
        if moved:
            handles.append(_edge(axes, edge))
        if len(values):
            shown = _clipped(values, edge, mode)
            scale_upright(axes, shown)
            # Lines may come from beyond the edge: the first epochs of all trials are far from the last.
            axes.dataLim.intervaly = (shown.min(), shown.max())
            axes.autoscale_view()
        _label(axes, metric, "epoch", best)
        _legend(figure, handles)
    return figure


def param_importance(importance: Mapping[str, float], *, metric: str) -> Figure:
    """How much each param matters, the largest share above.

    Args:
        importance: Param -> share.
        metric: The name of the value that they matter for.
    """
    with mpl.rc_context(STYLE):
        ranked = _ranked(importance)
        shown = ranked[:_BARS]
        places = range(len(shown))
        figure = Figure(figsize=(WIDTH, 1.7 + 0.42 * max(len(shown), 3)))
        axes = figure.add_subplot()
        bars = axes.barh(places, [share for _, share in shown], color=TRAIN, height=0.65)
        axes.bar_label(bars, [f"{share:.2g}" for _, share in shown], padding=4)
        axes.set_yticks(places, [one_line(name, 18) for name, _ in shown], parse_math=False)
        axes.set_ylim(max(len(shown), 3) - 0.4, -0.6)
        axes.margins(x=0.15)
        axes.grid(visible=False, axis="y")
        axes.tick_params(axis="y", length=0)
        axes.xaxis.set_major_locator(MaxNLocator(4, steps=ROUND))
        axes.set_xlabel(f"importance for {one_line(metric, 20)}")
        cut = "" if len(shown) == len(ranked) else f"the {len(shown)} most important of {len(ranked)} params"
        _head(figure, cut)
    return figure


def parallel_coordinates(
    trials: Sequence[Trial], *, metric: str, mode: Mode, importance: Mapping[str, float]
) -> Figure:
    """Each trial as a line through its params down to its value, over axes that lie one below the other.

    Lying axes leave room for names and numbers in a small picture. What a trial does not have stands left of
    the axis. Finished trials are shaded by the rank of their value, dark is best; all others are dim.
    """
    with mpl.rc_context(STYLE):
        names, cut = _names(trials, importance, _ROWS)
        values, edge = _focused(trials, mode)
        rows = [_column(trials, name) for name in names]
        rows.append(_Column(values, (), is_log=spans_decades(values[np.isfinite(values)])))
        above = 0.75 if cut else 0.45
        height = above + 0.85 * len(rows)
        figure = Figure(figsize=(WIDTH, height))
        figure.set_layout_engine("none")
        axes = figure.add_axes((0, 0, 1, 1 - above / height))
        axes.set_axis_off()
        axes.set_xlim(_NOWHERE - 0.04, 1.06)
        axes.set_ylim(len(rows) - 0.5, -0.45)
        for at, (name, row) in enumerate(zip([*names, metric], rows, strict=True)):
            axes.plot([0, 1], [at, at], color=MARK, lw=1.2, zorder=4, gid="axis")
            axes.text(0, at - 0.1, one_line(name, 34), va="bottom", fontweight="bold", zorder=5, gid="name")
            ticks = row.ticks(room=44)
            marks = dict(
                zip(row.places([tick for tick, _ in ticks]), [label for _, label in ticks], strict=True)
            )
            if row is rows[-1] and edge is not None:
                end = float(row.places(edge))
                marks = {place: label for place, label in marks.items() if abs(place - end) > 0.15}
                marks[end] = _WORSE
            if np.isnan(row.numbers).any():
                marks[_NOWHERE] = _NOTHING
            axes.plot([*marks], [at] * len(marks), color=MARK, ls="", marker="|", ms=9, zorder=5)
            for place, label in marks.items():
                side = {0.0: "left", 1.0: "right"}.get(place, "center")
                axes.text(place, at + 0.12, label, ha=side, va="top", fontsize=13, zorder=5, gid="tick")
        for text in axes.texts:
            text.set_bbox({"facecolor": "white", "alpha": 0.7, "pad": 0.5, "lw": 0})
        places = np.stack([row.places(row.numbers) for row in rows], axis=1)
        heights = np.broadcast_to(np.arange(len(rows)), places.shape)
        lines = np.stack([np.where(np.isnan(places), _NOWHERE, places), heights], axis=2)
        finished = _are_finished(trials) & np.isfinite(values)
        order = np.flatnonzero(finished)[np.argsort(values[finished], kind="stable")]
        if mode == "min":
            order = order[::-1]  # the best is drawn last
        alpha = min(0.5, 40 / (len(trials) + 1))
        axes.add_collection(
            LineCollection([*lines[~finished]], colors=DIM, lw=0.9, alpha=alpha, zorder=2, gid="dim")
        )
        shades = _shades(np.linspace(1, 0, len(order)))
        axes.add_collection(LineCollection([*lines[order]], colors=shades, lw=1.8, zorder=3, gid="finished"))
        best = _best(trials, mode)
        if best is not None:
            axes.plot(*lines[trials.index(best)].T, color=BEST, lw=3.2, zorder=4, gid="best")
        _head(figure, _told(best), cut)
    return figure


def slices(trials: Sequence[Trial], *, metric: str, mode: Mode, importance: Mapping[str, float]) -> Figure:
    """The value of each trial against each of its params: finished ones darker the later, all others dim."""
    with mpl.rc_context(STYLE):
        names, cut = _names(trials, importance, _PANELS)
        values, edge = _focused(trials, mode)
        last = max((trial.number for trial in trials), default=0)
        shades = _shades(np.array([1 - trial.number / last if last else 0.0 for trial in trials]))
        best = _best(trials, mode)
        columns = min(2, max(1, len(names)))
        rows = max(1, math.ceil(len(names) / columns))
        figure = Figure(figsize=(WIDTH, 1.6 + (2.2 if rows > 1 else 2.8) * rows))
        panels = list(figure.subplots(rows, columns, sharey=True, squeeze=False).flat)
        for axes in panels[len(names) :]:
            axes.set_axis_off()
        for axes, name in zip(panels, names, strict=False):
            column = _column(trials, name)
            shown = np.isfinite(column.numbers) & np.isfinite(values)
            finished = shown & _are_finished(trials)
            dim = shown & ~finished
            _dots(axes, column.numbers[dim], values[dim], gid="dim", **STATES["pruned"])
            if finished.any():
                axes.scatter(
                    column.numbers[finished], values[finished], c=shades[finished], s=42, gid="finished"
                )
            if best is not None and shown[at_best := trials.index(best)]:
                _dots(axes, column.numbers[at_best], values[at_best], **_RING)
            if column.is_log:
                axes.set_xscale("log")
            if column.options:
                axes.set_xlim(-0.4, len(column.options) - 0.6)
            ticks = column.ticks(room=42 // columns)
            axes.set_xticks([at for at, _ in ticks], [label for _, label in ticks], parse_math=False)
            axes.xaxis.set_minor_locator(NullLocator())
            axes.set_xlabel(one_line(name, 36 // columns))
        _scale_values(panels[0], values)
        figure.supylabel(one_line(metric, 26), fontsize=15)
        _head(figure, _told(best), cut)
        handles = []
        if not _are_finished(trials).all():
            handles.append(Line2D([], [], ls="", label="not finished", **STATES["pruned"]))
        for number, age in {0: 1.0, last: 0.0}.items():
            shade = tuple(_shades(np.array(age)))
            handles.append(Line2D([], [], ls="", marker="o", color=shade, label=f"trial {number}"))
        if edge is not None:
            edges = [_edge(axes, edge) for axes in panels[: len(names)]]
            handles += edges[:1]
        _legend(figure, handles)
    return figure


@dataclass(frozen=True)
class _Column:
    """One param of all trials, or their values, as numbers on an axis.

    Attributes:
        numbers: float64 of shape [N]: the value, or its place among the options; NaN where there is none.
        options: What the whole numbers from 0 on stand for; empty if they are values.
        is_log: Whether the axis is logarithmic.
    """

    numbers: Floats
    options: Sequence[str]
    is_log: bool

    @property
    def limits(self) -> tuple[float, float]:
        """The least and the largest number; something around it if it is the only one."""
        known = self.numbers[np.isfinite(self.numbers)]
        low, high = (float(known.min()), float(known.max())) if len(known) else (0.0, 0.0)
        around = 0.0 if low < high else abs(low) / 2 or 1.0
        return low - around, high + around

    def places(self, numbers: Any) -> Floats:
        """Where numbers stand on an axis from 0 to 1."""
        ends, found = np.array(self.limits), np.asarray(numbers, dtype=np.float64)
        if self.is_log:
            ends, found = np.log10(ends), np.log10(found)
        low, high = ends
        return np.asarray((found - low) / (high - low))

    def ticks(self, room: int) -> list[tuple[float, str]]:
        """Some numbers and their labels, which take about `room` characters together."""
        low, high = self.limits
        if self.options:
            every, width = 1, room
            if sum(map(len, self.options)) + len(self.options) > room:
                every = math.ceil(4 * len(self.options) / room)
                width = max(4, room * every // len(self.options) - 1)
            # Options begin alike more often than they end alike.
            cut = [option if len(option) <= width else f"…{option[1 - width :]}" for option in self.options]
            return [(float(at), cut[at]) for at in range(0, len(cut), every)]
        if self.is_log:
            decades = range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)
            every = math.ceil(6 * len(decades) / room)
            return [(10.0**at, min(f"{10.0**at:g}", f"1e{at}", key=len)) for at in decades[::every]]
        whole = bool(np.all(self.numbers[np.isfinite(self.numbers)] % 1 == 0))
        found = MaxNLocator(max(2, room // 10), steps=ROUND, integer=whole).tick_values(low, high)
        return [(float(at), f"{at:g}") for at in found if low <= at <= high]


def _column(trials: Sequence[Trial], name: str) -> _Column:
    """A param: as values where it has numbers alone and more than a few different ones, else as options."""
    found = [trial.params.get(name, _MISSING) for trial in trials]
    present = [value for value in found if value is not _MISSING]
    numbers = np.array([_number(value) for value in found])
    known = numbers[np.isfinite(numbers)]
    different = len(np.unique(known))
    # What was tried once each was hardly chosen from a list.
    is_choice = different <= (_OPTIONS if len(known) >= 2 * different else 1)
    if len(known) and not is_choice and all(map(_is_number, present)):
        low, high = np.quantile(known, [0.1, 0.9])
        # Uniform values reach far down as well, but few of them do.
        return _Column(numbers, (), is_log=spans_decades(known) and bool(high > 15 * low))
    texts = {_text(value): _number(value) for value in present}
    options = sorted(texts, key=lambda text: (math.isnan(texts[text]), np.nan_to_num(texts[text]), text))
    place = {text: at for at, text in enumerate(options)}
    chosen = [math.nan if value is _MISSING else place[_text(value)] for value in found]
    shown = [one_line(option, _LONGEST) for option in options]
    return _Column(np.array(chosen, dtype=np.float64), shown, is_log=False)


def _names(trials: Sequence[Trial], importance: Mapping[str, float], room: int) -> tuple[list[str], str]:
    """The params to show, the most important ones first, and what to say if these are not all."""
    names = list(dict.fromkeys(name for trial in trials for name in trial.params))
    shares = dict(_ranked(importance))
    shown = sorted(names, key=lambda name: -shares.get(name, 0.0))[:room]
    if len(shown) == len(names):
        return shown, ""
    which = "most important" if shares else "first"
    return shown, f"the {len(shown)} {which} of {len(names)} params"


def _ranked(importance: Mapping[str, float]) -> list[tuple[str, float]]:
    known = [(name, share) for name, share in importance.items() if abs(share) < _LARGEST]
    return sorted(known, key=lambda item: -item[1])


def _best(trials: Sequence[Trial], mode: Mode) -> Trial | None:
    """The best of those that can be drawn."""
    return ranking.best([trial for trial in trials if not math.isnan(_number(trial.value))], mode)


def _best_so_far(trials: Sequence[Trial], values: Floats, mode: Mode) -> Floats:
    """Number and best of the finished values so far, up to the last trial of all: shape [N, 2]."""
    finished = sorted(
        (trial.number, value)
        for trial, value in zip(trials, values, strict=True)
        if trial.state == "finished" and not math.isnan(value)
    )
    stairs = np.array([*finished, (max(trial.number for trial in trials), finished[-1][1])])
    stairs[:, 1] = (np.minimum if mode == "min" else np.maximum).accumulate(stairs[:, 1])
    return stairs


def _focused(trials: Sequence[Trial], mode: Mode) -> tuple[Floats, float | None]:
    """The trials' values, worse ones moved to the edge of what is shown, and that edge if there are such."""
    values = _values(trials)
    finished = values[_are_finished(trials) & np.isfinite(values)]
    edge = _fence(finished if len(finished) >= _ENOUGH else values[np.isfinite(values)], mode)
    moved = _clipped(values, edge, mode)
    return moved, None if np.array_equal(moved, values, equal_nan=True) else edge


def _fence(values: Floats, mode: Mode) -> float:
    """Where outliers begin on the worse side of finite values (Tukey, Exploratory Data Analysis, 1977)."""
    is_log = spans_decades(values)
    low, high = np.quantile(np.log10(values) if is_log else values, [0.25, 0.75]) if len(values) else (0, 0)
    if low == high:
        return math.inf if mode == "min" else -math.inf
    with np.errstate(over="ignore"):
        fence = high + 1.5 * (high - low) if mode == "min" else low - 1.5 * (high - low)
        return float(10**fence if is_log else fence)


def _clipped(values: Floats, edge: float, mode: Mode) -> Floats:
    return np.minimum(values, edge) if mode == "min" else np.maximum(values, edge)


def _line(trial: Trial) -> Floats:
    """Epochs and finite values of what a trial reported, thinned if these are many: shape [N, 2]."""
    (epochs, _, values, _), _ = thinned(
        [(epoch, 0, _number(value)) for epoch, value in trial.reports.items()]
    )
    return np.stack([epochs, values], axis=1)


def _joined(lines: Sequence[Floats]) -> Floats:
    """The values of all lines: shape [N]."""
    return np.concatenate([np.empty(0), *(line[:, 1] for line in lines)])


def _values(trials: Sequence[Trial]) -> Floats:
    """float64 of shape [N]; NaN where there is none that can be drawn."""
    return np.array([_number(trial.value) for trial in trials], dtype=np.float64)


def _are_finished(trials: Sequence[Trial]) -> NDArray[np.bool_]:
    return np.array([trial.state == "finished" for trial in trials], dtype=np.bool_)


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _number(value: Any) -> float:
    """A number that can be drawn; NaN for everything else."""
    try:
        number = float(value) if _is_number(value) else math.nan
    except OverflowError:  # an integer of hundreds of digits
        return math.nan
    return number if abs(number) < _LARGEST else math.nan


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _shades(places: Floats) -> Any:
    """Colours for numbers from 0, dark, to 1, light but not lost on white: RGBA of shape [N, 4]."""
    return mpl.colormaps["viridis"](0.9 * places)


def _scale_values(axes: Axes, values: Floats) -> None:
    scale_upright(axes, values[np.isfinite(values)])


def _label(axes: Axes, metric: str, below: str, best: Trial | None) -> None:
    axes.set_ylabel(one_line(metric, 26))
    axes.set_xlabel(below)
    low, high = axes.get_xlim()
    if high - low < 1:  # a single one
        axes.set_xlim(low - 0.5, high + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=ROUND))
    axes.set_title(_told(best), loc="left", pad=9)


def _told(best: Trial | None) -> str:
    return "no trial has finished" if best is None else f"best {best.value:.4g} in trial {best.number}"


def _head(figure: Figure, *lines: str) -> None:
    figure.suptitle("\n".join(filter(None, lines)), x=0.01, ha="left", fontsize=15)


def _dots(axes: Axes, across: Any, up: Any, **style: Any) -> None:
    """Marks without a line; none at all leave nothing behind, which the layout would take to be at 0."""
    if np.size(across):
        axes.plot(across, up, **{"linestyle": "", **style})


def _edge(axes: Axes, edge: float) -> Line2D:
    """The line on which stands what is worse."""
    return axes.axhline(edge, color=MARK, lw=1.2, ls=":", zorder=1, label=_WORSE, gid="edge")


def _legend(figure: Figure, handles: Sequence[Any]) -> None:
    if handles:
        figure.legend(
            handles=handles,
            loc="outside lower left",
            ncols=3,
            columnspacing=1.0,
            handletextpad=0.4,
            borderaxespad=0,
        )
