"""The table of a sweep's trials: which is best, how many stand how, and what pruning saved."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any, Literal

from tracked.tables import aligned, distinct_length, one_line
from tracked.trials import Trial, TrialState

Mode = Literal["min", "max"]
_LARGER_IS_BETTER = frozenset({
    *("acc", "accuracy", "auc", "auroc", "auprc", "bleu", "dice", "f1", "iou", "map", "ndcg", "precision"),
    *("psnr", "r2", "recall", "reward", "rouge", "score", "ssim"),
})  # fmt: skip

# Best first: what finished can be chosen, what failed cannot.
STATES: tuple[TrialState, ...] = ("finished", "running", "pruned", "failed")
_WIDEST = 24  # characters of a param's name or value


def usual_mode(metric: str) -> Mode:
    """Which values of a metric are better, by its name alone: larger ones of an accuracy and the like."""
    words = set(re.split(r"[^a-z0-9]+", metric.lower()))
    return "max" if words & _LARGER_IS_BETTER and not words & {"loss", "error"} else "min"


def best_first(value: float | None, mode: Mode) -> tuple[bool, float]:
    """Sorts values so, and behind them what is none, or no number."""
    if value is None or math.isnan(value):
        return True, 0.0
    return False, value if mode == "min" else -value


def ranking(trials: Sequence[Trial], *, metric: str, mode: Mode, limit: int | None = None) -> str:
    """The trials as aligned text: finished ones best first, then running, pruned and failed ones.

    Only what finished has a rank. The params stand in the order in which the trials brought them up; where
    a trial has none of that name, its cell is empty.

    Args:
        trials: In any order.
        metric: The name of the monitored value.
        mode: Whether smaller ("min") or larger ("max") is better.
        limit: Rows at most; how many are left out is said in the last line.
    """
    ordered = sorted(trials, key=lambda trial: (STATES.index(trial.state), *_order(trial, mode)))
    shown = ordered[:limit]
    names = list(dict.fromkeys(name for trial in shown for name in trial.params))
    length = distinct_length([trial.run_id for trial in trials])
    titles = [one_line(name, _WIDEST) for name in (metric, *names)]
    rows = [("rank", "trial", titles[0], "state", "epochs", *titles[1:], "run")]
    for rank, trial in enumerate(shown, start=1):
        rows.append(
            (
                str(rank) if trial.state == "finished" and _has_value(trial) else "",
                str(trial.number),
                "" if trial.value is None else f"{trial.value:.4g}",
                trial.state,
                str(trial.epochs),
                *(_shown(trial.params[name]) if name in trial.params else "" for name in names),
                trial.run_id[:length],
            )
        )
    table = aligned(rows)
    if len(shown) < len(ordered):
        left = [f"{count} {state}" for state, count in counts(ordered[len(shown) :]).items() if count]
        table += f"\n… and {', '.join(left)}"
    return table


def best(trials: Sequence[Trial], mode: Mode) -> Trial | None:
    """The finished trial with the best value, the first of several; None while no finished one has a number."""
    return next(iter(ranked(trials, mode)), None)


def ranked(trials: Sequence[Trial], mode: Mode) -> list[Trial]:
    """The finished trials that have a number for a value, best first."""
    finished = [trial for trial in trials if trial.state == "finished" and _has_value(trial)]
    return sorted(finished, key=lambda trial: _order(trial, mode))


def counts(trials: Sequence[Trial]) -> dict[str, int]:
    """State -> number of trials, for every state there is."""
    return {state: sum(trial.state == state for trial in trials) for state in STATES}


def epochs_trained(trials: Sequence[Trial]) -> int:
    """By all trials together."""
    return sum(trial.epochs for trial in trials)


def epochs_without_pruning(trials: Sequence[Trial], full: int) -> int:
    """That the same trials would have trained had none been pruned.

    What finished (also by patience) or failed would have trained what it did, all others `full` epochs.
    """
    return sum(
        trial.epochs if trial.state in ("finished", "failed") else max(full, trial.epochs) for trial in trials
    )


def _order(trial: Trial, mode: Mode) -> tuple[bool, float, int]:
    """Sorts the best first, what has no number last, and equal ones by their number."""
    return *best_first(trial.value, mode), trial.number


def _has_value(trial: Trial) -> bool:
    return trial.value is not None and not math.isnan(trial.value)


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else one_line(value, _WIDEST)
