"""The process that draws a sweep's pictures, so that the one that leads the sweep answers its workers meanwhile.

What it imports for them takes seconds, during which no other thread of its process gets far.
"""

from __future__ import annotations

import pickle
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tracked import children
from tracked.ranking import Mode
from tracked.trials import Trial

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

_COMMAND = (sys.executable, "-c", "from tracked.drawing import main; main()")
_ENOUGH = 4  # finished trials that tell which params matter


@dataclass(frozen=True)
class Sweep:
    """What there is to draw.

    Attributes:
        trials: In any order.
        finished: The same as the study has them, those that have finished: they tell which params matter.
        metric: The name of the monitored value.
        mode: Whether smaller ("min") or larger ("max") is better.
    """

    trials: Sequence[Trial]
    finished: Sequence[FrozenTrial]
    metric: str
    mode: Mode


class Drawing:
    """A process that draws every picture of a sweep that has something to show.

    Args:
        sweep: What there is to draw.
        gives_way: Whether trainings go first.

    Raises:
        OSError: The process cannot be started.
    """

    def __init__(self, sweep: Sweep, *, gives_way: bool = False) -> None:
        self._sweep = sweep
        self._is_ended = False
        self._folder = tempfile.TemporaryDirectory(prefix="tracked-", ignore_cleanup_errors=True)
        self._process = children.start(
            [*_COMMAND, self._folder.name, "gives way" if gives_way else ""],
            env=children.environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,  # a terminal's Ctrl-C pauses the sweep, which draws once more
        )

    def pictures(self, timeout: float | None = None) -> dict[str, bytes]:
        """Wait for them, for `timeout` seconds at most: name -> PNG file; none if it was ended.

        Raises:
            subprocess.TimeoutExpired: The process took longer, and is no more.
            subprocess.CalledProcessError: It failed; `stderr` says why.
        """
        with self._folder as folder, self._process as process:
            try:
                _, complaint = process.communicate(pickle.dumps(self._sweep), timeout)
            finally:
                process.kill()
            if self._is_ended:
                return {}
            if process.returncode:
                raise subprocess.CalledProcessError(process.returncode, _COMMAND, stderr=complaint)
            return {f"plots/{path.name}": path.read_bytes() for path in sorted(Path(folder).glob("*.png"))}

    def end(self) -> None:
        """Have it draw nothing any more."""
        self._is_ended = True
        self._process.kill()


def importances(sweep: Sweep) -> dict[str, float]:
    """How much each param matters for the value, in all 1; empty while too few trials have finished.

    The method is PED-ANOVA (Watanabe, Bansal and Hutter, 2023), as Optuna has it.
    """
    if len(sweep.finished) < _ENOUGH:
        return {}
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(direction="minimize" if sweep.mode == "min" else "maximize")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        study.add_trials(sweep.finished)
        evaluator = optuna.importance.PedAnovaImportanceEvaluator()
        return dict(optuna.importance.get_param_importances(study, evaluator=evaluator))


def main() -> None:
    folder, gives_way = sys.argv[1:]
    if gives_way:
        children.give_way()
    sweep: Sweep = pickle.load(sys.stdin.buffer)  # noqa: S301 - by the process that started this one
    from tracked.sweep_plots import draw

    pictures = draw(sweep.trials, metric=sweep.metric, mode=sweep.mode, importance=importances(sweep))
    for name, image in pictures.items():
        (Path(folder) / Path(name).name).write_bytes(image)
