"""Pictures of a sweep show each trial where it belongs, the best one in its colour, whatever the trials are."""

from __future__ import annotations

import io
import math
import random
import struct
import time
import warnings
from collections.abc import Sequence
from itertools import cycle
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PathCollection
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text

from tracked.plots import png
from tracked.ranking import Mode
from tracked.sweep_plots import (
    BEST,
    DIM,
    draw,
    intermediate_values,
    optimization_history,
    parallel_coordinates,
    param_importance,
    slices,
)
from tracked.trials import Trial

NAMES = [f"plots/{name}.png" for name in ("history", "intermediate", "importance", "parallel", "slice")]
MODES: list[Mode] = ["min", "max"]
SWEEP = [
    Trial(0, "finished", {"lr": 0.1, "hidden": 16}, {1: 0.9, 2: 0.5}, 0.5, epochs=2),
    Trial(1, "pruned", {"lr": 0.001}, {1: 0.95}, 0.95, epochs=1),
    Trial(2, "finished", {"lr": 0.01, "hidden": 32}, {1: 0.8, 2: 0.3}, 0.3, epochs=2),
    Trial(3, "failed", {"lr": 1.0, "hidden": 32}),
    Trial(4, "running", {"lr": 0.03, "hidden": 16}, {1: 0.7}, 0.7, epochs=1),
    Trial(5, "finished", {"lr": 0.05, "hidden": 16}, {1: 0.8, 2: 0.4}, 0.4, epochs=2),
]


def sweep(trials: int, params: int = 5, reports: int = 20) -> list[Trial]:
    """A sweep as they are: two thirds pruned, one param of some trials alone."""
    rng = random.Random(0)
    found = []
    for number in range(trials):
        values: dict[str, Any] = {"lr": 10 ** rng.uniform(-4, -1), "optimizer": rng.choice(["adam", "sgd"])}
        if values["optimizer"] == "sgd":
            values["momentum"] = rng.uniform(0, 1)
        values |= {f"param_{at}": rng.uniform(0, 1) for at in range(params - 3)}
        final = abs(math.log10(values["lr"]) + 2) + 0.1
        is_pruned = final > 0.6
        epochs = reports // 4 if is_pruned else reports
        curve = {epoch: final + 2 / epoch for epoch in range(1, epochs + 1)}
        found.append(
            Trial(
                number,
                "pruned" if is_pruned else "finished",
                values,
                curve,
                curve[epochs],
                f"{number:032x}",
                epochs,
            )
        )
    return found


def artist(axes: Axes, name: str) -> Any:
    (found,) = (each for each in (*axes.lines, *axes.collections) if each.get_gid() == name)
    return found


def places(axes: Axes, name: str) -> list[tuple[float, float]]:
    found = artist(axes, name)
    points = found.get_xydata() if isinstance(found, Line2D) else found.get_offsets()
    return [(float(x), float(y)) for x, y in np.asarray(points)]


def segments(axes: Axes, name: str) -> list[list[tuple[float, float]]]:
    found = artist(axes, name)
    assert isinstance(found, LineCollection)
    return [[(float(x), float(y)) for x, y in line] for line in found.get_segments()]


def names(axes: Axes) -> set[str | None]:
    return {each.get_gid() for each in (*axes.lines, *axes.collections)}


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for each in figure.legends for text in each.get_texts()]


def words(axes: Axes, name: str) -> list[str]:
    return [text.get_text() for text in axes.texts if text.get_gid() == name]


def figures(trials: Sequence[Trial], metric: str = "val/loss", mode: Mode = "min") -> list[Figure]:
    importance = {name: 1 / (at + 2) for at, name in enumerate(trials[0].params)} if trials else {}
    return [
        optimization_history(trials, metric=metric, mode=mode),
        intermediate_values(trials, metric=metric, mode=mode),
        param_importance(importance, metric=metric),
        parallel_coordinates(trials, metric=metric, mode=mode, importance=importance),
        slices(trials, metric=metric, mode=mode, importance=importance),
    ]


# -- history


def test_history_shows_each_trial_by_its_state_and_the_best_so_far() -> None:
    figure = optimization_history(SWEEP, metric="val/loss", mode="min")
    (axes,) = figure.axes

    assert places(axes, "finished") == [(0, 0.5), (2, 0.3), (5, 0.4)]
    assert places(axes, "pruned") == [(1, 0.95)]
    assert places(axes, "running") == [(4, 0.7)]
    assert places(axes, "stairs") == [(0, 0.5), (2, 0.3), (5, 0.3), (5, 0.3)]
    assert artist(axes, "stairs").get_drawstyle() == "steps-post"
    assert places(axes, "best") == [(2, 0.3)]
    assert to_hex(artist(axes, "best").get_color()) == BEST.lower()
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("trial", "val/loss")
    assert axes.get_title("left") == "best 0.3 in trial 2"
    assert sorted(legend(figure)) == ["1 failed", "1 pruned", "1 running", "3 finished", "best so far"]


def test_where_more_is_better_the_staircase_climbs() -> None:
    (axes,) = optimization_history(SWEEP, metric="val/accuracy", mode="max").axes

    assert places(axes, "stairs") == [(0, 0.5), (2, 0.5), (5, 0.5), (5, 0.5)]
    assert places(axes, "best") == [(0, 0.5)]


@pytest.mark.parametrize(("mode", "frame"), [("min", 1.0), ("max", 0.0)])
def test_what_has_no_number_stands_on_the_frame_where_the_worst_are(mode: Mode, frame: float) -> None:
    trials = [*SWEEP, Trial(6, "finished", value=math.nan), Trial(7, "finished", value=-math.inf)]

    (axes,) = optimization_history(trials, metric="val/loss", mode=mode).axes

    assert places(axes, "failed, no value") == [(3, frame)]
    assert places(axes, "finished, no value") == [(6, frame), (7, frame)]
    assert places(axes, "finished") == [(0, 0.5), (2, 0.3), (5, 0.4)]


@pytest.mark.parametrize("sign", [1, -1])
def test_outliers_stand_on_an_edge_so_that_the_good_ones_are_told_apart(sign: int) -> None:
    good = [Trial(at, "finished", {"x": at / 10}, value=sign * (1 + at / 100)) for at in range(10)]
    trials = [*good, Trial(10, "pruned", {"x": 0.5}, value=sign * 50.0)]
    mode: Mode = "min" if sign == 1 else "max"

    history, _, _, parallel, slice_of_x = figures(trials, mode=mode)

    for axes in (history.axes[0], slice_of_x.axes[0]):
        ((_, edge),) = places(axes, "pruned" if "pruned" in names(axes) else "dim")
        assert 1.09 < sign * edge < 1.3
        assert places(axes, "edge")[0][1] == edge
        assert [y for _, y in places(axes, "finished")] == [trial.value for trial in good]
    assert "or worse" in legend(history)
    assert "or worse" in legend(slice_of_x)
    assert "or worse" in words(parallel.axes[0], "tick")
    assert segments(parallel.axes[0], "dim")[0][-1][0] == (1 if sign == 1 else 0)


def test_nothing_is_moved_to_an_edge_where_all_are_near() -> None:
    figure = optimization_history(SWEEP, metric="val/loss", mode="min")

    assert "edge" not in names(figure.axes[0])
    assert "or worse" not in legend(figure)


# -- intermediate values


def test_intermediate_values_show_each_report_and_where_trials_were_pruned() -> None:
    figure = intermediate_values(SWEEP, metric="val/loss", mode="min")
    (axes,) = figure.axes

    assert segments(axes, "finished") == [
        [(1, 0.9), (2, 0.5)],
        [(1, 0.8), (2, 0.3)],
        [(1, 0.8), (2, 0.4)],
    ]
    assert places(axes, "end of pruned") == [(1, 0.95)]
    assert places(axes, "end of running") == [(1, 0.7)]
    assert "end of finished" not in names(axes)
    assert places(axes, "best") == [(1, 0.8), (2, 0.3)]
    assert to_hex(artist(axes, "best").get_color()) == BEST.lower()
    assert to_hex(artist(axes, "pruned").get_color()[0]) == DIM
    assert artist(axes, "best").get_linewidth() > 1.5 * artist(axes, "finished").get_linewidth()[0]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("epoch", "val/loss")
    assert legend(figure) == ["1 pruned", "1 running", "3 finished", "best"]


def test_reports_that_are_not_finite_are_left_out() -> None:
    reports = {1: 0.9, 2: math.nan, 3: 0.7, 4: math.inf}

    (axes,) = intermediate_values([Trial(0, "failed", {}, reports)], metric="val/loss", mode="min").axes

    assert segments(axes, "failed") == [[(1, 0.9), (3, 0.7)]]
    assert places(axes, "end of failed") == [(3, 0.7)]


def test_one_trial_that_explodes_does_not_flatten_the_others() -> None:
    trials = [Trial(at, "finished", {}, {e: 2 / e + at for e in range(1, 9)}, at + 0.25) for at in range(9)]
    trials.append(Trial(9, "pruned", {}, {1: 1e30, 2: 1e35}, 1e30))

    (axes,) = intermediate_values(trials, metric="val/loss", mode="min").axes

    assert axes.get_ylim()[1] < 1e4
    ((_, end),) = places(axes, "end of pruned")
    assert end == places(axes, "edge")[0][1]
    assert 9 < end < axes.get_ylim()[1]


def test_hundreds_of_trials_are_fainter_each_and_few_artists() -> None:
    few, many = (intermediate_values(sweep(count), metric="loss", mode="min").axes[0] for count in (20, 400))

    assert artist(many, "finished").get_alpha() < artist(few, "finished").get_alpha()
    assert len(many.get_children()) == len(few.get_children())


# -- what matters


def test_importance_has_the_largest_share_above() -> None:
    (axes,) = param_importance({"b": 0.2, "a": 0.7, "c": math.nan, "d": 0.1}, metric="val/loss").axes

    assert [text.get_text() for text in axes.get_yticklabels()] == ["a", "b", "d"]
    assert [bar.get_width() for bar in axes.patches] == [0.7, 0.2, 0.1]  # type: ignore[attr-defined]
    assert axes.yaxis_inverted()
    assert axes.get_xlabel() == "importance for val/loss"


def test_of_many_params_the_most_important_ones_are_shown_and_that_is_said() -> None:
    importance = {f"param_{at}": at / 190 for at in range(20)}
    trials = [Trial(0, "finished", dict.fromkeys(importance, 0.5), value=0.5)]

    bars = param_importance(importance, metric="val/loss")
    parallel = parallel_coordinates(trials, metric="val/loss", mode="min", importance=importance)
    panels = slices(trials, metric="val/loss", mode="min", importance=importance)
    first = slices(trials, metric="val/loss", mode="min", importance={})

    assert [text.get_text() for text in bars.axes[0].get_yticklabels()][:2] == ["param_19", "param_18"]
    assert bars.get_suptitle() == "the 12 most important of 20 params"
    eight = [f"param_{at}" for at in range(19, 11, -1)]
    assert words(parallel.axes[0], "name") == [*eight, "val/loss"]
    assert [axes.get_xlabel() for axes in panels.axes] == eight
    assert panels.get_suptitle() == parallel.get_suptitle()
    assert panels.get_suptitle() == "best 0.5 in trial 0\nthe 8 most important of 20 params"
    assert [axes.get_xlabel() for axes in first.axes] == [f"param_{at}" for at in range(8)]
    assert first.get_suptitle().endswith("the 8 first of 20 params")


# -- parallel coordinates


def test_parallel_lines_run_through_the_places_of_the_params() -> None:
    trials = [
        Trial(0, "finished", {"x": 0.0, "kind": "b"}, value=3.0),
        Trial(1, "finished", {"x": 5.0, "kind": "a"}, value=1.0),
        Trial(2, "finished", {"x": 10.0, "kind": "c"}, value=2.0),
        Trial(3, "pruned", {"x": 2.5}, value=2.5),
        Trial(4, "failed", {"kind": "a"}),
    ]

    (axes,) = parallel_coordinates(trials, metric="val/loss", mode="min", importance={}).axes

    nowhere = axes.get_xlim()[0] + 0.04
    assert segments(axes, "finished") == [
        [(0, 0), (0.5, 1), (1, 2)],
        [(1, 0), (1, 1), (0.5, 2)],
        [(0.5, 0), (0, 1), (0, 2)],
    ]
    assert places(axes, "best") == [(0.5, 0), (0, 1), (0, 2)]
    assert segments(axes, "dim") == [
        [(0.25, 0), (nowhere, 1), (0.75, 2)],
        [(nowhere, 0), (0, 1), (nowhere, 2)],
    ]
    assert words(axes, "name") == ["x", "kind", "val/loss"]
    assert words(axes, "tick").count("–") == 3
    assert {"a", "b", "c"} <= set(words(axes, "tick"))


@pytest.mark.parametrize("mode", MODES)
def test_parallel_lines_are_darker_and_further_in_front_the_better(mode: Mode) -> None:
    trials = [Trial(at, "finished", {"x": at / 9}, value=float((at * 7) % 10)) for at in range(10)]

    (axes,) = parallel_coordinates(trials, metric="m", mode=mode, importance={}).axes

    lines = artist(axes, "finished")
    ends = [line[-1][0] for line in segments(axes, "finished")]
    assert ends == sorted(ends, reverse=mode == "min")
    light = [0.2 * red + 0.7 * green + 0.1 * blue for red, green, blue, _ in lines.get_color()]
    assert light == sorted(light, reverse=True)
    assert light[0] < 0.85


# -- slices


def test_slices_show_the_value_against_each_param() -> None:
    figure = slices(SWEEP, metric="val/loss", mode="min", importance={"hidden": 0.9, "lr": 0.1})
    hidden, lr = figure.axes

    assert (hidden.get_xlabel(), lr.get_xlabel()) == ("hidden", "lr")
    assert places(hidden, "finished") == [(0, 0.5), (1, 0.3), (0, 0.4)]  # options 16 and 32
    assert [text.get_text() for text in hidden.get_xticklabels()] == ["16", "32"]
    assert places(hidden, "dim") == [(0, 0.7)]  # the pruned one has no such param
    assert places(lr, "finished") == [(0.1, 0.5), (0.01, 0.3), (0.05, 0.4)]
    assert places(lr, "dim") == [(0.001, 0.95), (0.03, 0.7)]
    assert [places(axes, "best") for axes in figure.axes] == [[(1, 0.3)], [(0.01, 0.3)]]
    assert lr.get_xscale() == "log"
    assert figure.get_supylabel() == "val/loss"
    dots = artist(lr, "finished")
    assert isinstance(dots, PathCollection)
    light = [float(np.mean(colour[:3])) for colour in np.asarray(dots.get_facecolor())]
    assert light == sorted(light, reverse=True), "the later, the darker"
    assert {"trial 0", "trial 5", "not finished"} <= set(legend(figure))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([10 ** (-4 + at / 10) for at in range(31)], "log"),
        ([at / 400 + 0.001 for at in range(400)], "linear"),  # uniform down to near 0
        ([-(10 ** (at / 10)) for at in range(31)], "linear"),
        ([0.0, *(10 ** (at / 10) for at in range(31))], "linear"),
        ([16, 32, 64, 128] * 3, ["16", "32", "64", "128"]),
        ([128, 16, 32, 64], "linear"),
        ([0.5], ["0.5"]),
        ([True, False], ["False", "True"]),
        (["b", None, "a", 3, 0.5], ["0.5", "3", "None", "a", "b"]),
        ([1.5, "auto"], ["1.5", "auto"]),
        (["x" * 50 + "1", "x" * 50 + "2"], ["…" + "x" * 7 + "1", "…" + "x" * 7 + "2"]),
    ],
)
def test_an_axis_suits_its_values(values: list[Any], expected: str | list[str]) -> None:
    trials = [Trial(at, "finished", {"x": value, "y": 0}, value=float(at)) for at, value in enumerate(values)]

    axes = slices(trials, metric="m", mode="min", importance={}).axes[0]

    if isinstance(expected, list):
        assert [text.get_text() for text in axes.get_xticklabels()] == expected
        assert {x for x, _ in places(axes, "finished")} == set(range(len(expected)))
    else:
        assert axes.get_xscale() == expected
        assert [x for x, _ in places(axes, "finished")] == values


# -- all of them

HUGE = "a_very_long_name_of_a_param_" * 6
WEIRD = {"$a_b^{$": "$x_{$", HUGE: HUGE, "": "", "new\nline": "a\nb", "\udc80": "\udc81", "list": [1, {}]}
ODD: dict[str, list[Trial]] = {
    "none": [],
    "one without a report": [Trial(0, "running", {"lr": 0.1})],
    "one that runs": [Trial(0, "running", {"lr": 0.1}, {1: 0.5}, 0.5)],
    "one with one report": [Trial(0, "finished", {"lr": 0.1}, {1: 0.5}, 0.5)],
    "no params": [Trial(at, "finished", {}, {1: 0.5, 2: at}, at) for at in range(3)],
    "none finished": [Trial(at, "pruned", {"lr": 10**-at}, {1: 0.5, 2: at}, at) for at in range(5)],
    "all the same": [Trial(at, "finished", {"lr": 0.1}, {1: 0.5, 2: 0.5}, 0.5) for at in range(5)],
    "not finite": [
        Trial(at, "finished", {"x": value}, {1: value, 2: -value, 3: at}, value)
        for at, value in enumerate([math.nan, math.inf, -math.inf, 0.1, 0.2])
    ],
    "huge numbers": [
        Trial(at, "finished", {"x": value, "n": 10**400}, {1: value}, -value)
        for at, value in enumerate([1.7e308, -1.7e308, 5e-324, 1e299, -1e299, 0.0])
    ],
    "mixed params": [
        Trial(at, "finished", {"x": value, **WEIRD}, {1: at, 2: at}, at)
        for at, value in enumerate([None, True, 1, 2.5, "x", math.inf, math.nan])
    ],
    "numbers far apart": [Trial(10**at, "finished", {"x": at}, {10**at: 1.0}, 1.0) for at in range(12)],
}


@pytest.mark.parametrize(("case", "mode"), [*zip(ODD, cycle(MODES), strict=False)])
def test_odd_trials_are_drawn_as_well(case: str, mode: Mode) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for figure in figures(ODD[case], metric=f"val/$_{{$ {HUGE}", mode=mode):
            assert png(figure).startswith(b"\x89PNG\r\n\x1a\n")
            texts = [text for text in figure.findobj(Text) if "$" in text.get_text()]
            assert texts, "the metric at least"
            assert not any(text.get_parse_math() for text in texts)


@pytest.mark.parametrize(
    ("case", "shown"),
    [
        ("none", []),
        ("one without a report", []),
        ("one that runs", ["history", "intermediate", "parallel", "slice"]),
        ("no params", ["history", "intermediate"]),
    ],
)
def test_what_has_nothing_to_show_is_left_out(case: str, shown: list[str]) -> None:
    pictures = draw(ODD[case], metric="val/loss", mode="min", importance={})

    assert list(pictures) == [f"plots/{name}.png" for name in shown]


def plain_picture() -> None:
    figure = Figure(figsize=(7.8, 5), dpi=100)
    axes = figure.subplots()
    for slope in range(100):
        axes.plot(range(20), [slope * x for x in range(20)])
    figure.savefig(io.BytesIO(), format="png")


def test_a_sweep_has_five_pictures_and_costs_little() -> None:
    trials = sweep(100, params=20)
    importance = {"lr": 0.8, "optimizer": 0.2}
    ratios = []
    pictures: dict[str, bytes] = {}
    for _ in range(3):  # the first time loads the fonts
        began = time.process_time()
        pictures = draw(trials, metric="val/loss", mode="min", importance=importance)
        drawn = time.process_time()
        plain_picture()
        ratios.append((drawn - began) / (time.process_time() - drawn))

    assert list(pictures) == NAMES
    assert {struct.unpack(">I", image[16:20])[0] for image in pictures.values()} == {780}
    assert min(ratios) < 18, "in pictures of a hundred lines"


def test_every_word_is_legible_when_the_pictures_are_300_pixels_wide() -> None:
    for figure in figures(sweep(40, params=20)):
        png(figure)
        for text in figure.findobj(Text):
            assert isinstance(text, Text)
            assert float(text.get_fontsize()) / 72 * 300 / figure.get_figwidth() > 8, text.get_text()
        around = figure.get_tightbbox()
        assert around.x0 >= 0
        assert around.y0 >= 0
        assert around.x1 <= figure.get_figwidth()
        assert around.y1 <= figure.get_figheight()


def test_drawing_leaves_no_trace_in_matplotlib() -> None:
    before = dict(mpl.rcParams)
    draw(SWEEP, metric="val/loss", mode="min", importance={"lr": 1.0})

    assert dict(mpl.rcParams) == before
