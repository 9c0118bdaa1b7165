"""The pictures of a run: figures from histories, all in one style, with none of matplotlib's global state.

The colours are those of Okabe and Ito (Color Universal Design, 2008), which colour-blind people tell
apart. Letters and lines are so large that a picture is read when it is shown 300 pixels wide.
"""

from __future__ import annotations

import io
import math
import sys
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from operator import itemgetter
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backend_bases import FigureCanvasBase
from matplotlib.colors import LinearSegmentedColormap, PowerNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, MaxNLocator, NullFormatter
from numpy.typing import NDArray

History = Sequence[tuple[int, int, float]]
"""Points as (step, timestamp in ms, value), in the order of their steps, as `Server.history` gives them."""
Columns = tuple[NDArray[np.float64], ...]

TRAIN = "#0072B2"
VALIDATION = ("#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARK = "#000000"
_RUNS = (TRAIN, *VALIDATION, MARK)
_OTHERS = "#BBBBBB"

STYLE: Any = {  # newer releases type each key, older ones none
    "figure.dpi": 130,
    "figure.constrained_layout.use": True,
    "font.size": 15,
    "axes.titlesize": 15,
    "axes.labelsize": 15,
    "legend.fontsize": 13,
    "legend.framealpha": 0.7,
    "legend.edgecolor": "none",
    "legend.handlelength": 1.3,
    "lines.linewidth": 2.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "text.parse_math": False,  # a run may be called "$5 a day, $6 a night"
}
WIDTH, HEIGHT, _FURTHER_PANEL, _FURTHER_RUNS_PANEL = 6.0, 4.2, 2.4, 2.7  # inches
LONGEST_LABEL = 20
"""Characters of what a run is called in a picture of several."""
_BUCKETS = 100
_FEW = 30
_MOST_NUMBERS = 12
_LONGEST_CLASS = 11
_DECADES_FOR_LOG = 2.0
ROUND = [1, 2, 2.5, 5, 10]


def curves(
    panels: Sequence[Mapping[str, History]],
    *,
    title: str = "",
    best_step: int | None = None,
    attempts: Sequence[int] = (),
) -> Figure:
    """Train and validation curves, a panel below the other, with the best step marked and the gap told.

    Args:
        panels: For each panel its histories by key. In the first one, the gap between `train/…` and the
            first other key is told. A key without a finite point is named and not drawn. Learning rates, `lr` and
            `lr/…`, are logged when they change: each holds up to the next one, and the last to the end.
        title: Stands above the picture.
        best_step: Where the monitored metric was best.
        attempts: Steps from which the run was resumed.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, HEIGHT + _FURTHER_PANEL * (len(panels) - 1)))
        ratios = [HEIGHT, *[_FURTHER_PANEL] * (len(panels) - 1)]
        all_axes = figure.subplots(len(panels), sharex=True, squeeze=False, height_ratios=ratios)[:, 0]
        colours = _colours([key for panel in panels for key in panel])
        end = max((history[-1][0] for panel in panels for history in panel.values() if history), default=0)
        for axes, panel in zip(all_axes, panels, strict=True):
            _draw(axes, panel, colours, best_step, end)
            for step in attempts:
                axes.axvline(step, color=MARK, lw=1.2, ls=":", alpha=0.6, zorder=1, gid="attempt")
        if attempts:
            all_axes[0].lines[-1].set_label("resumed")
        for axes in all_axes:
            if axes.get_legend_handles_labels()[1]:
                axes.legend()
        # Cut, not wrapped: a long name would leave no room for the curves.
        lines = [_cut(title, 38), _told(panels[0], best_step)]
        all_axes[0].set_title("\n".join(filter(None, lines)), loc="left")
        _number_steps(all_axes[-1])
    return figure


def overlaid(panels: Mapping[str, Sequence[History]], labels: Sequence[str], *, title: str = "") -> Figure:
    """The curves of several runs, a panel for each key below the other; one legend for all.

    The first seven runs have colours and names; the others are grey, behind them.

    Args:
        panels: For each key the history of every run, in the order of `labels`.
        labels: What the runs are called.
        title: Stands above the picture.
    """
    named = min(len(labels), len(_RUNS))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, HEIGHT + _FURTHER_RUNS_PANEL * (len(panels) - 1)))
        ratios = [HEIGHT - 1, *[_FURTHER_RUNS_PANEL] * (len(panels) - 1)]
        all_axes = figure.subplots(len(panels), sharex=True, squeeze=False, height_ratios=ratios)[:, 0]
        for axes, (key, histories) in zip(all_axes, panels.items(), strict=True):
            drawn = []
            for number, history in enumerate(histories):
                (steps, _, means, _), lost = thinned(history)
                axes.plot(
                    steps,
                    means,
                    color=_RUNS[number] if number < named else _OTHERS,
                    lw=2.2 if number < named else 1.2,
                    marker="o" if len(steps) == 1 else "",
                    zorder=3 + named - number if number < named else 2,
                    gid=f"{key} of {labels[number]}",
                )
                if lost:
                    axes.plot([], [], lw=0, label=f"{_cut(labels[number], LONGEST_LABEL)}: {lost} not finite")
                drawn.append(means)
            if axes.get_legend_handles_labels()[1]:
                axes.legend(handlelength=0)
            axes.set_title(_cut(key, 38), loc="left")
            scale_upright(axes, np.concatenate(drawn))
        lines = [
            Line2D([], [], color=colour, label=_cut(name, LONGEST_LABEL))
            for colour, name in zip(_RUNS, labels, strict=False)
        ]
        if named < len(labels):
            lines.append(Line2D([], [], color=_OTHERS, lw=1.2, label=f"{len(labels) - named} others"))
        figure.legend(handles=lines, loc="outside lower left", ncols=2, frameon=False, columnspacing=1.0)
        figure.suptitle(_cut(title, 38), x=0.02, ha="left", fontsize=STYLE["axes.titlesize"])
        _number_steps(all_axes[-1])
    return figure


def confusion(
    counts: Sequence[Sequence[int]], *, classes: Sequence[str] = (), title: str = "", step: int | None = None
) -> Figure:
    """Which classes are taken for which: a row for each class, shaded by the share of its samples.

    Args:
        counts: Samples by class (row) and prediction (column), shape [C, C].
        classes: Their names; by default, or where there are more or fewer of them, their numbers.
        title: Stands above the picture.
        step: At which it was found.
    """
    found = np.asarray(counts, np.float64)
    number = len(found)
    totals = found.sum(1, keepdims=True)
    shares = np.divide(found, totals, out=np.zeros_like(found), where=totals > 0)
    names = [str(each) for each in (classes if len(classes) == number else range(number))]
    names = [_cut(name, _LONGEST_CLASS) for name in names]
    with mpl.rc_context({**STYLE, "axes.grid": False}):
        figure = Figure(figsize=(WIDTH, WIDTH))
        axes = figure.subplots()
        shades = LinearSegmentedColormap.from_list("share", ["#FFFFFF", TRAIN])
        axes.imshow(shares, cmap=shades, norm=PowerNorm(0.5, 0, 1))  # one sample in a hundred can be seen
        if number <= _MOST_NUMBERS:
            for (row, column), share in np.ndenumerate(shares):
                if found[row, column]:
                    colour = "#FFFFFF" if share > 0.3 else MARK
                    text = f"{100 * share:.0f}"
                    axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=13)
        every = -(-number // _MOST_NUMBERS)
        axes.set_xticks(
            range(0, number, every), names[::every], rotation=90 if max(map(len, names)) > 2 else 0
        )
        axes.set_yticks(range(0, number, every), names[::every])
        axes.set_xlabel("predicted")
        axes.set_ylabel("true class, in % of its samples" if number <= _MOST_NUMBERS else "true class")
        right = f"{100 * found.trace() / max(1.0, found.sum()):.3g} % right"
        told = right if step is None else f"{right} at best step {step}"
        axes.set_title("\n".join(filter(None, [_cut(title, 38), told])), loc="left")
    return figure


def png(figure: Figure) -> bytes:
    """The figure as a PNG file."""
    return drawn_as(figure, "png")


def drawn_as(figure: Figure, form: str) -> bytes:
    """The figure as a file of one of the `forms`."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format=form, dpi="figure")  # of itself, which needs no display
    return buffer.getvalue()


def forms() -> list[str]:
    """What kinds of file a figure can become: png, svg, pdf and others."""
    return sorted(FigureCanvasBase.get_supported_filetypes())


def gap(train: History, val: History, step: int) -> float | None:
    """Validation less training at the evaluation of `step`: the latter's mean since the evaluation before.

    None where either is not known there, or is no finite number.
    """
    before = max((at for at, *_ in val if at < step), default=-math.inf)
    here = [value for at, _, value in val if at == step]
    first, end = (bisect_right(train, at, key=itemgetter(0)) for at in (before, step))
    since = [value for *_, value in train[first:end]]
    if not here or not since:
        return None
    found = here[-1] - sum(since) / len(since)
    return found if _is_finite(found) else None


def thinned(history: History) -> tuple[Columns, int]:
    """At most 100 places of a history, evenly spread over its steps, and how many points were not finite.

    Returns:
        Steps, least, mean and largest values, float64 of shape [N] each; of a short history every point.
    """
    count = len(history)
    steps = np.fromiter(map(itemgetter(0), history), np.float64, count)
    values = np.fromiter(map(itemgetter(2), history), np.float64, count)
    finite = np.abs(values) < sys.float_info.max  # which is how MLflow stores an infinity
    steps, values = steps[finite], values[finite]
    lost = count - len(steps)
    if len(steps) <= _BUCKETS:
        return (steps, values, values, values), lost
    edges = np.linspace(steps[0], steps[-1], _BUCKETS, endpoint=False)
    starts = np.unique(np.searchsorted(steps, edges))
    sizes = np.diff(starts, append=len(steps))
    places = np.add.reduceat(steps, starts) / sizes
    means = np.add.reduceat(values / np.repeat(sizes, sizes), starts)  # divided first: no sum overflows
    return (places, np.minimum.reduceat(values, starts), means, np.maximum.reduceat(values, starts)), lost


def scale_upright(axes: Axes, values: NDArray[np.float64]) -> None:
    """Make the upright axis fit for its finite values, float64 of shape [N]."""
    if spans_decades(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=ROUND))


def spans_decades(values: NDArray[np.float64]) -> bool:
    """Whether finite values, float64 of shape [N], are better seen on a logarithmic axis."""
    if not len(values) or values.min() <= 0:
        return False
    return math.log10(values.max()) - math.log10(values.min()) > _DECADES_FOR_LOG


def _number_steps(axes: Axes) -> None:
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=ROUND))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 1]}…"


def _draw(
    axes: Axes, panel: Mapping[str, History], colours: Mapping[str, str], best: int | None, end: int
) -> None:
    drawn = []
    if best is not None:
        axes.axvline(best, color=MARK, lw=1.8, ls="--", zorder=1, gid="best")
    for key, history in panel.items():
        (steps, low, means, high), lost = thinned(history)
        colour, order = colours[_set(key)], 2 if _is_train(key) else 3
        label = f"{key} ({lost} not finite)" if lost else key
        marker = "o" if len(steps) <= (1 if _is_train(key) else _FEW) else ""
        if _is_rate(key) and len(steps):
            steps, means = np.append(steps, end), np.append(means, means[-1])
            how: dict[str, Any] = {"drawstyle": "steps-post"}
        else:
            how = {"marker": marker}
        axes.plot(steps, means, color=colour, label=label, zorder=order, gid=key, **how)
        if len(history) > _BUCKETS and not _is_rate(key):
            axes.fill_between(steps, low, high, color=colour, alpha=0.2, lw=0, zorder=order - 1)
        evaluations = () if _is_train(key) or _is_rate(key) else history
        at_best = [(step, value) for step, _, value in evaluations if step == best and _is_finite(value)]
        if at_best:
            axes.plot(
                *at_best[-1],
                color=MARK,
                marker="o",
                markersize=13,
                markerfacecolor="none",
                markeredgewidth=2.2,
                clip_on=False,
                zorder=4,
                gid=f"best of {key}",
            )
        drawn.append(means)
    scale_upright(axes, np.concatenate(drawn) if drawn else np.empty(0))


def _told(panel: Mapping[str, History], best: int | None) -> str:
    """The gap in words, at the best step and at the last."""
    train = next((key for key in panel if _is_train(key)), None)
    val = next((key for key in panel if not _is_train(key)), None)
    if train is None or val is None or not panel[val]:
        return "" if best is None else f"best step {best}"
    last = panel[val][-1][0]
    gaps = {step: gap(panel[train], panel[val], step) for step in (best, last) if step is not None}
    told = [
        f"{value:+.2g} at {'best step ' if step == best else ''}{step}"
        for step, value in gaps.items()
        if value is not None
    ]
    return f"gap {', '.join(told)}" if told else ""


def _colours(keys: Sequence[str]) -> dict[str, str]:
    """A colour for each data set that the keys name: `val/loss` and `val/accuracy` are of the same."""
    others = dict.fromkeys(_set(key) for key in keys if not _is_train(key))
    return {"train": TRAIN} | {
        name: VALIDATION[number % len(VALIDATION)] for number, name in enumerate(others)
    }


def _set(key: str) -> str:
    """What gives a key its colour: its data set; of learning rates, each group's is a curve of its own."""
    return key if _is_rate(key) else key.partition("/")[0]


def _is_rate(key: str) -> bool:
    return key.partition("/")[0] == "lr"


def _is_train(key: str) -> bool:
    return _set(key) == "train"


def _is_finite(value: float) -> bool:
    return abs(value) < sys.float_info.max
