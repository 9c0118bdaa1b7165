"""MLflow's own pages, seen in a browser: the curves, params and pictures of runs, and a sweep's trials.

Debian's Chromium looks at them (`make test-ui`). Whatever a test saw last, also one that failed, is kept in
`build/screenshots`, under the name of the test.
"""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import quote

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from tests.nursery import Nursery
from tests.processes import ROOT, Workplace, wait_until
from tests.proofs import assert_whole, local_handle, runs

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

# The first test waits for all that is trained.
pytestmark = [pytest.mark.ui, pytest.mark.timeout(600)]

SCREENSHOTS = ROOT / "build/screenshots"
# What MLflow keeps of a browser that has been here before: the assistant's panel closed, models and not agents shown.
VISITED = {
    "mlflow.assistant.fab.autoOpenedOnFirstLoad_v1": "true",
    "mlflow.workflowType_v1": '"machine_learning"',
}
RATES = ("0.0005", "0.002", "0.01")


@dataclass(frozen=True)
class Stage:
    """What stands on the server: a run for each of the rates, the second one killed and resumed, and a sweep."""

    uri: str
    runs: list[Run]
    parent: Run
    children: list[Run]

    @property
    def resumed(self) -> Run:
        return self.runs[1]

    def of_run(self, run: Run, tab: str = "") -> str:
        """The address of a run's page."""
        return f"{self.uri}/#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}{tab}"

    def charts_beside(self, run: Run) -> str:
        """The address of the charts of all runs of this run's experiment."""
        return f"{self.uri}/#/experiments/{run.info.experiment_id}/runs?compareRunsMode=CHART"

    def comparison(self) -> str:
        """The address of the page that compares the three runs."""
        ids, experiments = [run.info.run_id for run in self.runs], [self.resumed.info.experiment_id]
        return f"{self.uri}/#/compare-runs?runs={quote(json.dumps(ids))}&experiments={quote(json.dumps(experiments))}"


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory, server_uri: str, nursery: Nursery) -> Iterator[Stage]:
    folder = tmp_path_factory.mktemp("ui")
    shutil.copytree(ROOT / "experiments", folder / "experiments")
    place = Workplace(folder, server_uri, {"TRACKED_SENDER_IDLE": "30"})
    client = MlflowClient(server_uri)
    line = ("experiments/digits.py", "batch_size=16", "--epochs", "3")
    ids = []
    try:
        for rate in RATES:
            is_killed = rate == RATES[1]
            name = f"lr {rate}, killed and resumed" if is_killed else f"lr {rate}"
            command = ["train", *line, f"lr={rate}", "--run-name", name]
            if is_killed:
                killed = nursery.run(place, *command, env={"KILLED_AT_STEP": "130"}, check=False)
                assert killed.returncode == -signal.SIGKILL, killed
                command = ["resume", local_handle(killed.stderr)]
            ids.append(nursery.run(place, *command, "--json").json["run_id"])
        pruner = ("--pruner", "median", "--pruner-option", "n_startup_trials=2")
        names = ("--experiment-name", "digits-sweep", "--study-name", "digits")
        nursery.run(place, "sweep", *line, "--trials", "4", *pruner, *names)
        found = runs(server_uri, "digits-sweep")
        (parent,) = (run for run in found if "mlflow.parentRunId" not in run.data.tags)
        children = [run for run in found if run is not parent]
        yield Stage(server_uri, [client.get_run(run_id) for run_id in ids], parent, children)
    finally:
        place.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium")
    assert chromium, "there is no chromium on the PATH; try: apt-get install chromium"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser, request: pytest.FixtureRequest) -> Iterator[Page]:
    """A page of a browser that has been here before; what it shows in the end is kept."""
    context = browser.new_context(viewport={"width": 1400, "height": 1100})
    context.set_default_timeout(30_000)  # ms
    context.add_init_script(f"Object.assign(localStorage, {json.dumps(VISITED)})")
    page = context.new_page()
    yield page
    page.screenshot(path=SCREENSHOTS / f"{request.node.name.removeprefix('test_')}.png")
    context.close()


def drawn(page: Page, metric: str, *, curves: int) -> dict[str, list[tuple[float, float]]]:
    """The points (step, value) in a metric's chart by the name of their run, once so many curves are to be seen."""
    title = page.get_by_title(metric, exact=True)
    chart = page.get_by_test_id("experiment-view-compare-runs-card").filter(has=title)
    chart.scroll_into_view_if_needed()
    chart.locator("path.js-line[d*=L]").nth(curves - 1).wait_for()
    script = "plot => plot.data.map(curve => [curve.name, [...curve.x], [...curve.y]])"
    data = chart.locator(".js-plotly-plot").evaluate(script)
    return {name: list(zip(x, y, strict=True)) for name, x, y in data if x}


def points(stage: Stage, metric: str, *of: Run) -> dict[str, list[tuple[int, float]]]:
    """What the server has of a metric, each step once, by the name of the run."""
    return {run.info.run_name: assert_whole(stage.uri, run.info.run_id)[metric] for run in of}


def table(page: Page, heading: str) -> dict[str, list[str]]:
    """The table of which the first column has this heading: its rows, by their first cells."""
    shown = page.get_by_role("table").filter(has=page.get_by_text(heading, exact=True))
    shown.get_by_role("cell").first.wait_for()
    columns = shown.get_by_role("columnheader").count()
    texts = [text.strip() for text in shown.get_by_role("cell").all_inner_texts()]
    rows = [texts[start : start + columns] for start in range(0, len(texts), columns)]
    return {name: values for name, *values in rows}


def assert_run_shown(page: Page, run: Run) -> None:
    """All its params and metrics stand on its page."""
    assert table(page, "Parameter") == {name: [value] for name, value in run.data.params.items()}
    metrics = {name: float(value) for name, (value, *_) in table(page, "Metric").items()}
    assert metrics == run.data.metrics


def assert_compared(page: Page, name: str, values: list[str]) -> None:
    """The compared runs have these values in the row of this name."""
    row = page.get_by_role("row").filter(has=page.get_by_role("rowheader", name=name, exact=True))
    assert row.get_by_role("cell").all_inner_texts() == values


def assert_picture(page: Page, name: str) -> None:
    """An artifact is shown, and the browser can read it to its end."""
    # While the page loads it an image changes its source, which ends a decoding that has begun: it is asked again,
    # and here, because the browser's own waiting takes a promise of nothing for an answer.
    script = """
        name => {
            const image = document.querySelector(`img[alt="${name}"]`);
            const size = () => [image.naturalWidth, image.naturalHeight];
            return image && image.decode().then(size, () => null);
        }
    """
    size = wait_until(lambda: page.evaluate(script, name), f"a picture {name}")
    assert min(size) > 400  # pixels


def test_the_charts_of_an_experiment_draw_every_point_of_its_runs(stage: Stage, page: Page) -> None:
    page.goto(stage.charts_beside(stage.resumed))

    for metric in ("train/loss", "val/accuracy", "val/loss"):
        assert drawn(page, metric, curves=3) == points(stage, metric, *stage.runs)


def test_a_run_that_was_killed_and_resumed_is_one_curve(stage: Stage, page: Page) -> None:
    page.goto(stage.of_run(stage.resumed, "/model-metrics"))

    for metric in ("train/loss", "val/loss"):
        assert drawn(page, metric, curves=1) == points(stage, metric, stage.resumed)


def test_the_page_of_a_run_shows_its_params_and_last_values(stage: Stage, page: Page) -> None:
    page.goto(stage.of_run(stage.resumed))

    assert_run_shown(page, stage.resumed)
    _, model = table(page, "Metric")["val/loss"]
    assert model == "model", "the validation's values lead to the model that they are of"


def test_the_curves_that_a_run_has_drawn_are_a_picture_among_its_artifacts(stage: Stage, page: Page) -> None:
    page.goto(stage.of_run(stage.resumed, "/artifacts/plots/curves.png"))

    assert_picture(page, "plots/curves.png")
    tree = page.get_by_test_id("artifact-tree-node").all_inner_texts()
    assert tree == ["checkpoints", "plots", "confusion.png", "curves.png", "source"]


def test_runs_stand_side_by_side_when_they_are_compared(stage: Stage, page: Page) -> None:
    page.goto(stage.comparison())

    # What claimed the second attempt is a param too, though none that runs are compared by.
    attempt = page.get_by_text("tracked.attempt.2", exact=True)
    attempt.first.locator("xpath=following-sibling::span").click()
    plot = page.locator(".pcp-plot.js-plotly-plot")
    plot.get_by_text("tracked.attempt.2").wait_for(state="detached")
    plot.locator("canvas").first.wait_for()
    script = "plot => plot.data[0].dimensions.map(axis => [axis.label, [...axis.values]])"
    assert dict(plot.evaluate(script)) == {
        "lr": [float(rate) for rate in RATES],
        "train/loss": [run.data.metrics["train/loss"] for run in stage.runs],
    }
    assert_compared(page, "Run Name:", [run.info.run_name for run in stage.runs])
    assert_compared(page, "lr", [*RATES])


def test_the_parent_of_a_sweep_names_its_trials(stage: Stage, page: Page) -> None:
    page.goto(stage.of_run(stage.parent))

    trials = page.get_by_test_id("key-value-Child runs").get_by_role("link")
    trials.nth(len(stage.children) - 1).wait_for()
    assert trials.all_inner_texts() == [run.info.run_name for run in stage.children]
    assert_run_shown(page, stage.parent)


def test_the_trials_of_a_sweep_unfold_under_their_parent(stage: Stage, page: Page) -> None:
    page.goto(stage.charts_beside(stage.parent))

    names = page.get_by_role("row").get_by_role("link")
    names.first.wait_for()
    assert names.all_inner_texts() == [stage.parent.info.run_name]
    page.get_by_role("gridcell").get_by_role("button").click()
    names.nth(len(stage.children)).wait_for()
    assert names.all_inner_texts() == [run.info.run_name for run in (stage.parent, *stage.children)]

    page.get_by_placeholder("Search metric charts").fill("(train|val)/")
    for metric in ("train/loss", "val/accuracy", "val/loss"):
        expected = points(stage, metric, *stage.children)
        lengths = [len(curve) for curve in expected.values()]
        assert min(lengths) < max(lengths), "the curve of a pruned trial ends early"
        lines = sum(length > 1 for length in lengths)  # a single point is a dot
        assert drawn(page, metric, curves=lines) == expected


def test_the_pictures_of_a_sweep_are_shown(stage: Stage, page: Page) -> None:
    page.goto(stage.of_run(stage.parent, "/artifacts/plots/history.png"))

    for name in ("history", "intermediate", "parallel", "slice"):
        page.get_by_test_id("artifact-tree-node").get_by_text(f"{name}.png", exact=True).click()
        assert_picture(page, f"plots/{name}.png")
