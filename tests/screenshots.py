"""Copies the README's pictures of MLflow from where `make test-ui` keeps what it saw; run by `make screenshots`."""

from __future__ import annotations

from PIL import Image

from tests.processes import ROOT
from tests.test_ui import SCREENSHOTS

PICTURES = {
    "charts": "the_charts_of_an_experiment_draw_every_point_of_its_runs",
    "compare": "runs_stand_side_by_side_when_they_are_compared",
    "sweep": "the_trials_of_a_sweep_unfold_under_their_parent",
}

if __name__ == "__main__":
    images = ROOT / "docs/images"
    images.mkdir(exist_ok=True)
    for name, test in PICTURES.items():
        with Image.open(SCREENSHOTS / f"{test}.png") as seen:
            # 256 colours are enough for lines and letters, and half the bytes.
            seen.convert("RGB").quantize(256).save(images / f"{name}.png", optimize=True)
