"""Pictures show what they are given, whatever that is, and can be read by everybody at the size of a stamp."""

from __future__ import annotations

import math
import struct
import sys
from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text

from tracked.plots import History, confusion, curves, gap, overlaid, png, thinned

# Okabe and Ito, Color Universal Design (2008).
OKABE_ITO = {"#000000", "#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7"}


def history(values: Sequence[float], every: int = 1) -> History:
    return [(every * (at + 1), 1_700_000_000_000 + at, value) for at, value in enumerate(values)]


TRAIN = history([1 / step for step in range(1, 41)])
VAL = history([0.5, 0.2, 0.3, 0.4], every=10)


def line(axes: Axes, name: str) -> Line2D:
    (found,) = (each for each in axes.lines if each.get_gid() == name)
    return found


def places(found: Line2D) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in np.asarray(found.get_xydata())]


def upright(axes: Axes, name: str) -> list[float]:
    """The steps at which vertical lines of that name stand."""
    return [places(each)[0][0] for each in axes.lines if each.get_gid() == name]


def drawn(figure: Figure) -> tuple[int, int]:
    """Width and height of the PNG that the figure makes, which must be one."""
    image = png(figure)
    assert image.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", image[16:24])
    return width, height


def test_curves_show_every_point_and_mark_the_best_step_on_every_validation_curve() -> None:
    panels = [
        {"train/loss": TRAIN, "val/loss": VAL, "test/loss": VAL[:2]},
        {"val/accuracy": history([0.6, 0.9, 0.8, 0.7], every=10)},
    ]
    figure = curves(panels, title="a run", best_step=20)
    above, below = figure.axes

    assert places(line(above, "train/loss")) == [(step, value) for step, _, value in TRAIN]
    assert places(line(above, "val/loss")) == [(step, value) for step, _, value in VAL]
    assert [upright(axes, "best") for axes in figure.axes] == [[20], [20]]
    assert places(line(above, "best of val/loss")) == [(20, 0.2)]
    assert places(line(below, "best of val/accuracy")) == [(20, 0.9)]
    assert not [each for each in above.lines if each.get_gid() == "best of train/loss"]
    assert drawn(figure)[0] > 600


def test_attempts_are_marked_where_they_began() -> None:
    (axes,) = curves([{"train/loss": TRAIN}], attempts=[10, 30]).axes

    assert upright(axes, "attempt") == [10, 30]


def test_the_gap_is_validation_less_the_training_since_the_evaluation_before() -> None:
    assert gap(TRAIN, VAL, 10) == pytest.approx(0.5 - sum(1 / step for step in range(1, 11)) / 10)
    assert gap(TRAIN, VAL, 20) == pytest.approx(0.2 - sum(1 / step for step in range(11, 21)) / 10)
    assert gap(TRAIN, VAL, 15) is None
    assert gap([], VAL, 10) is None
    assert gap(TRAIN, history([math.nan], every=10), 10) is None


def test_the_title_tells_the_gap_at_the_best_step_and_at_the_last() -> None:
    titles = [
        curves([{"train/loss": TRAIN, "val/loss": val}], title="a run", best_step=best)
        .axes[0]
        .get_title("left")
        for val, best in ((VAL, 20), (VAL[:2], 20), (VAL, None), ([], None))
    ]

    assert titles == [
        "a run\ngap +0.13 at best step 20, +0.37 at 40",
        "a run\ngap +0.13 at best step 20",
        "a run\ngap +0.37 at 40",
        "a run",
    ]


def test_a_long_history_is_drawn_in_a_hundred_places_that_keep_its_extremes() -> None:
    values = np.sin(np.arange(1_000_000) / 1e5)
    values[123_456], values[765_432] = 50.0, -50.0
    long = history(values.tolist())

    (steps, low, means, high), lost = thinned(long)
    assert len(steps) == len(low) == len(means) == len(high) == 100
    assert lost == 0
    assert (low.min(), high.max()) == (-50.0, 50.0)
    assert means.mean() == pytest.approx(values.mean())
    assert (low <= means).all()
    assert (means <= high).all()
    assert (np.diff(steps) > 0).all()

    (axes,) = curves([{"train/loss": long}]).axes
    assert len(places(line(axes, "train/loss"))) == 100
    (band,) = (each for each in axes.collections if isinstance(each, PolyCollection))
    assert band.get_paths()[0].get_extents().ymax == 50.0


def test_points_that_lie_less_dense_later_are_spread_evenly_over_the_steps() -> None:
    dense = [(step, 0, 1.0) for step in range(10_000)]
    loose = [(step, 0, 2.0) for step in range(10_000, 100_000, 10)]

    (steps, *_), _ = thinned(dense + loose)

    assert np.diff(steps) == pytest.approx(1000, rel=0.02)


NOT_FINITE = [math.nan, math.inf, -math.inf, sys.float_info.max, -sys.float_info.max]


@pytest.mark.parametrize("bad", NOT_FINITE)
@pytest.mark.parametrize("count", [4, 400])
def test_what_is_not_finite_is_left_out_and_counted(bad: float, count: int) -> None:
    values = [1.0, 2.0] * count
    values[3] = bad

    figure = curves([{"train/loss": history(values), "val/loss": history([bad] * 3)}], best_step=3)

    (axes,) = figure.axes
    assert np.isfinite(places(line(axes, "train/loss"))).all()
    assert axes.get_legend_handles_labels()[1] == ["train/loss (1 not finite)", "val/loss (3 not finite)"]
    assert axes.get_ylim()[1] < 3
    drawn(figure)


@pytest.mark.parametrize(
    "panel",
    [
        {},
        {"train/loss": []},
        {"train/loss": [], "val/loss": []},
        {"train/loss": TRAIN[:1]},
        {"train/loss": TRAIN[:1], "val/loss": [(1, 0, 0.0)]},
        {"val/loss": VAL},
        {"train/loss": TRAIN, "val/loss": []},
        {"train/loss": history([1e300, -1e300] * 200)},
        {"train/loss": [(2**62, 0, 1.0), (2**62 + 1, 0, 1.0)]},
        {"a key without a set": VAL, "$odd_{key$": VAL},
    ],
)
def test_little_or_odd_data_is_drawn_as_well(panel: dict[str, History]) -> None:
    drawn(curves([panel], title="$odd_{name$", best_step=1))


def test_a_single_point_can_be_seen() -> None:
    (axes,) = curves([{"train/loss": TRAIN[:1]}]).axes

    assert line(axes, "train/loss").get_marker() == "o"


def test_colours_are_told_apart_and_one_data_set_has_the_same_in_every_panel() -> None:
    sets = {f"set{number}/loss": VAL for number in range(4)}
    above, below = curves([{"train/loss": TRAIN, **sets}, {"set2/accuracy": VAL}], best_step=10).axes

    colours = [to_hex(line(above, key).get_color()) for key in ("train/loss", *sets)]
    assert len(set(colours)) == 5
    assert to_hex(line(below, "set2/accuracy").get_color()) == colours[3]
    used = {to_hex(each.get_color()) for axes in (above, below) for each in axes.lines}
    assert used <= OKABE_ITO


@pytest.mark.parametrize(
    ("values", "scale"),
    [([1.0, 0.02], "linear"), ([1.0, 0.005], "log"), ([1.0, 0.0], "linear"), ([1.0, -0.005], "linear")],
)
def test_a_scale_is_logarithmic_where_positive_values_span_two_decades(
    values: list[float], scale: str
) -> None:
    assert curves([{"train/loss": history(values)}]).axes[0].get_yscale() == scale


def assert_legible(figure: Figure) -> None:
    """As a thumbnail of 300 pixels, and within the picture."""
    for text in figure.findobj(Text):
        assert isinstance(text, Text)
        assert float(text.get_fontsize()) / 72 * 300 / figure.get_figwidth() > 8, text.get_text()
    around = figure.get_tightbbox()
    assert around.x0 >= 0
    assert around.y0 >= 0
    assert around.x1 <= figure.get_figwidth()
    assert around.y1 <= figure.get_figheight()


def test_every_word_is_legible_when_the_picture_is_300_pixels_wide() -> None:
    figure = curves(
        [{"train/loss": TRAIN, "val/loss": VAL}, {"val/accuracy": VAL}], title="a run", best_step=20
    )
    drawn(figure)

    assert_legible(figure)


def test_runs_keep_their_colours_in_every_panel_and_all_but_seven_are_grey() -> None:
    labels = [f"run {number}" for number in range(9)]
    figure = overlaid({"val/loss": [VAL] * 9, "train/loss": [TRAIN] * 9}, labels)

    above, below = (
        [to_hex(line(axes, f"{key} of {label}").get_color()) for label in labels]
        for axes, key in zip(figure.axes, ("val/loss", "train/loss"), strict=True)
    )
    assert above == below
    assert {*above[:7]} <= OKABE_ITO
    assert len({*above[:7]}) == 7
    assert above[7] == above[8] == "#bbbbbb"
    assert places(line(figure.axes[0], "val/loss of run 3")) == [(step, value) for step, _, value in VAL]


def test_runs_with_odd_names_and_little_data_are_drawn_and_every_word_is_legible() -> None:
    histories = [VAL, [], VAL[:1], history([math.nan, 1.0]), history([1e300, -1e300] * 200)]
    labels = ["$odd_{name$", "", "b", "c", "a name that is far longer than any legend has room for"]
    figure = overlaid({f"key {number}": histories for number in range(6)}, labels, title="x" * 90)
    drawn(figure)

    assert figure.axes[0].get_legend_handles_labels()[1] == ["c: 1 not finite"]
    assert_legible(figure)


def test_a_learning_rate_holds_until_it_changes_and_to_the_end() -> None:
    rates = {"lr/body": [(1, 0, 0.1), (20, 0, 0.01)], "lr/head": [(1, 0, 0.5)]}
    _, below = curves([{"train/loss": TRAIN}, rates], best_step=20).axes

    assert places(line(below, "lr/body")) == [(1, 0.1), (20, 0.01), (40, 0.01)]
    assert places(line(below, "lr/head")) == [(1, 0.5), (40, 0.5)]
    assert {line(below, key).get_drawstyle() for key in rates} == {"steps-post"}
    assert len({to_hex(line(below, key).get_color()) for key in rates}) == 2


def texts(figure: Figure) -> list[str]:
    return [each.get_text() for each in figure.axes[0].texts]


def test_a_confusion_matrix_tells_each_class_share_of_what_it_is_taken_for() -> None:
    figure = confusion(
        [[3, 1, 0], [0, 2, 0], [0, 0, 0]], classes=["ant", "bee", "cat"], title="a run", step=7
    )
    (axes,) = figure.axes

    (image,) = axes.images
    assert np.asarray(image.get_array()).tolist() == [[0.75, 0.25, 0], [0, 1, 0], [0, 0, 0]]
    assert texts(figure) == ["75", "25", "100"]
    assert [each.get_text() for each in axes.get_yticklabels()] == ["ant", "bee", "cat"]
    assert axes.get_title("left") == "a run\n83.3 % right at best step 7"
    drawn(figure)


@pytest.mark.parametrize("number", [2, 10, 12, 13, 30])
def test_a_confusion_matrix_is_legible_with_any_number_of_classes(number: int) -> None:
    names = [f"a class called {each}" for each in range(number)]
    figure = confusion(np.eye(number, dtype=int).tolist(), classes=names, title="a run")
    drawn(figure)

    assert len(texts(figure)) == (number if number <= 12 else 0)
    assert_legible(figure)


def test_drawing_leaves_no_trace_in_matplotlib() -> None:
    before = dict(mpl.rcParams)
    drawn(curves([{"train/loss": TRAIN}]))

    assert dict(mpl.rcParams) == before
