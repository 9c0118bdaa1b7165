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
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator, NullFormatter
from numpy.typing import NDArray

History = Sequence[tuple[int, int, float]]
"""Points as (step, timestamp in ms, value), in the order of their steps, as `Server.history` gives them."""
Columns = tuple[NDArray[np.float64], ...]

TRAIN = "#0072B2"
VALIDATION = ("#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARK = "#000000"

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
WIDTH, HEIGHT, _FURTHER_PANEL = 6.0, 4.2, 2.4  # inches
_BUCKETS = 100
_FEW = 30
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
            first other key is told. A key without a finite point is named and not drawn.
        title: Stands above the picture.
        best_step: Where the monitored metric was best.
        attempts: Steps from which the run was resumed.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, HEIGHT + _FURTHER_PANEL * (len(panels) - 1)))
        ratios = [HEIGHT, *[_FURTHER_PANEL] * (len(panels) - 1)]
        all_axes = figure.subplots(len(panels), sharex=True, squeeze=False, height_ratios=ratios)[:, 0]
        colours = _colours([key for panel in panels for key in panel])
        for axes, panel in zip(all_axes, panels, strict=True):
            _draw(axes, panel, colours, best_step)
            for step in attempts:
                axes.axvline(step, color=MARK, lw=1.2, ls=":", alpha=0.6, zorder=1, gid="attempt")
        if attempts:
            all_axes[0].lines[-1].set_label("resumed")
        for axes in all_axes:
            if axes.get_legend_handles_labels()[1]:
                axes.legend()
        # Cut, not wrapped: a long name would leave no room for the curves.
        lines = [title if len(title) <= 38 else f"{title[:37]}…", _told(panels[0], best_step)]
        all_axes[0].set_title("\n".join(filter(None, lines)), loc="left")
        all_axes[-1].set_xlabel("step")
        all_axes[-1].xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=ROUND))
        all_axes[-1].xaxis.set_major_formatter(EngFormatter(sep=""))
    return figure


def png(figure: Figure) -> bytes:
    """The figure as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi="figure")  # by Agg, which needs no display
    return buffer.getvalue()


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


def _draw(axes: Axes, panel: Mapping[str, History], colours: Mapping[str, str], best: int | None) -> None:
    drawn = []
    if best is not None:
        axes.axvline(best, color=MARK, lw=1.8, ls="--", zorder=1, gid="best")
    for key, history in panel.items():
        (steps, low, means, high), lost = thinned(history)
        colour, order = colours[_set(key)], 2 if _is_train(key) else 3
        label = f"{key} ({lost} not finite)" if lost else key
        marker = "o" if len(steps) <= (1 if _is_train(key) else _FEW) else ""
        axes.plot(steps, means, color=colour, label=label, marker=marker, zorder=order, gid=key)
        if len(history) > _BUCKETS:
            axes.fill_between(steps, low, high, color=colour, alpha=0.2, lw=0, zorder=order - 1)
        evaluations = () if _is_train(key) else history
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
    return key.partition("/")[0]


def _is_train(key: str) -> bool:
    return _set(key) == "train"


def _is_finite(value: float) -> bool:
    return abs(value) < sys.float_info.max
