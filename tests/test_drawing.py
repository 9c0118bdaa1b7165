"""The pictures of a sweep are drawn by a process of their own, which knows which params matter."""

from __future__ import annotations

import math
import pickle
import subprocess
import sys
from pathlib import Path

import optuna
import psutil
import pytest
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.trial import FrozenTrial, create_trial

from tracked.drawing import Drawing, Sweep, importances
from tracked.trials import Trial

SPACE: dict[str, BaseDistribution] = {
    "lr": FloatDistribution(1e-4, 1e-1, log=True),
    "dropout": FloatDistribution(0.0, 0.5),
}


def finished(count: int) -> list[FrozenTrial]:
    """Trials whose value their learning rate alone decides."""
    sampler = optuna.samplers.RandomSampler(seed=0)
    study = optuna.create_study(sampler=sampler)
    trials = []
    for _ in range(count):
        params = study.ask(SPACE).params
        reached = abs(math.log10(params["lr"]) + 2)
        trials.append(create_trial(params=params, distributions=SPACE, value=reached))
    return trials


def sweep(count: int) -> Sweep:
    found = finished(count)
    rows = [
        Trial(number, "finished", trial.params, {1: trial.values[0]}, trial.values[0], epochs=1)
        for number, trial in enumerate(found)
    ]
    return Sweep(rows, found, "val/loss", "min")


def test_the_param_that_decides_the_value_has_most_of_the_importance() -> None:
    found = importances(sweep(40))

    assert set(found) == set(SPACE)
    assert sum(found.values()) == pytest.approx(1)
    assert found["lr"] > 0.8


def test_too_few_trials_say_nothing_of_importance() -> None:
    assert importances(sweep(3)) == {}
    assert importances(sweep(4)) != {}


def test_a_process_draws_all_pictures_and_the_one_that_asks_imports_no_matplotlib() -> None:
    script = """
import pickle, sys
from tracked.drawing import Drawing
pictures = Drawing(pickle.load(sys.stdin.buffer)).pictures()
print(*sorted(pictures), all(image.startswith(b"\\x89PNG") for image in pictures.values()))
print("matplotlib" in sys.modules, "sklearn" in sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], input=pickle.dumps(sweep(8)), capture_output=True, check=True
    )

    names = [f"plots/{name}.png" for name in ("history", "importance", "intermediate", "parallel", "slice")]
    assert done.stdout.decode().split() == [*names, "True", "False", "False"]


def test_what_stands_in_the_way_of_drawing_is_told() -> None:
    broken = Sweep([None], [], "val/loss", "min")  # type: ignore[list-item]

    with pytest.raises(subprocess.CalledProcessError) as told:
        Drawing(broken).pictures()

    assert b"Traceback" in told.value.stderr


def test_who_cannot_wait_gets_no_pictures_and_leaves_no_process() -> None:
    before = psutil.Process().children()
    late, ended = Drawing(sweep(8)), Drawing(sweep(8))
    ended.end()

    with pytest.raises(subprocess.TimeoutExpired):
        late.pictures(0.01)
    assert ended.pictures() == {}
    assert psutil.Process().children() == before


def test_what_a_library_prints_is_no_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sitecustomize.py").write_text("print('welcome')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    pictures = Drawing(sweep(8)).pictures()

    assert len(pictures) == 5
