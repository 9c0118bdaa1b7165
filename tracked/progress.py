"""What a training shows: a bar with loss, metric, speed and what is not delivered yet; at its end a table."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from tracked.pipe import Progress
from tracked.tables import aligned

if TYPE_CHECKING:
    from tracked.tracking import Run


class Bar(Progress):
    """A bar on standard error, over all steps of the run; lines only, where that is no terminal.

    Args:
        show: False leaves the bar out, and keeps the lines.
        run_id_file: Where the run's ID is written as soon as there is one.
    """

    def __init__(self, *, show: bool = True, run_id_file: Path | None = None) -> None:
        self._show = show and sys.stderr.isatty()
        self._run_id_file = run_id_file
        self._bar: tqdm[Any] | None = None
        if run_id_file is not None:
            with contextlib.suppress(OSError):
                run_id_file.unlink(missing_ok=True)  # an earlier run's ID must not be taken for this one's

    def say(self, text: str) -> None:
        with contextlib.suppress(OSError):  # a terminal, or the other end of a pipe, that is gone
            tqdm.write(text, file=sys.stderr)

    def warn(self, text: str) -> None:
        self.say(f"warning: {text}")

    def identify(self, run_id: str, url: str) -> None:
        self.say(f"run {run_id}  {url or '(open it with `python -m tracked.run ui`)'}")
        if self._run_id_file is not None:
            try:
                self._run_id_file.parent.mkdir(parents=True, exist_ok=True)
                self._run_id_file.write_text(f"{run_id}\n")
            except OSError as error:
                self.warn(f"{self._run_id_file} cannot be written: {error.strerror}")

    def update(self, run: Run) -> None:
        if not self._show or (run.total_steps is None and run.step == 0):
            return
        if self._bar is None:
            self._bar = tqdm(total=run.total_steps, initial=run.step, unit="step", dynamic_ncols=True)
        latest = run.latest()
        shown = {"epoch": str(run.epoch)}
        shown |= {
            key: f"{latest[key]:.4g}" for key in ("train/loss", run.settings.monitor or "") if key in latest
        }
        if pending := run.pending():
            shown["undelivered"] = f"{pending} ({run.trouble()})" if run.trouble() else str(pending)
        self._bar.set_postfix(shown, refresh=False)
        self._bar.n = run.step
        with contextlib.suppress(OSError):
            self._bar.refresh()

    def close(self) -> None:
        if self._bar is not None:
            with contextlib.suppress(OSError):
                self._bar.close()
            self._bar = None


def result(run: Run) -> str:
    """How a training ended: how fast, how much of it is delivered, and the last and best values of its metrics."""
    seconds, samples, points = run.seconds, run.samples, run.points
    pending = min(run.undelivered, run.pending())
    steps = run.step - (run.resumed_from or 0)
    made, unit = (steps, "steps") if samples is None else (samples, "samples")
    told = [
        f"{run.last_state} at step {run.step} (epoch {run.epochs_done})",
        f"{seconds:.1f} s",
        f"{made / seconds:.3g} {unit}/s" if seconds else "",
        f"{points - pending} of {points} points delivered",
    ]
    rows = [("metric", "last", "best", "at step")]
    for key, value in sorted(run.metrics.items()):
        is_judged = key == run.settings.monitor and run.stopping.best is not None
        best = (f"{run.stopping.best:.4g}", str(run.stopping.best_step)) if is_judged else ("", "")
        rows += [(key, f"{value:.4g}", *best)] if key != "epoch" else []
    return "\n".join(["  ".join(filter(None, told)), *([aligned(rows)] if rows[1:] else [])])
