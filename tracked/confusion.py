"""Which classes a model takes for which, counted during an evaluation."""

from __future__ import annotations

from typing import Any

import torch

MOST_CLASSES = 30
"""Of more of them, no picture could be read."""


class Confusion:
    """How many samples of each class (row) were taken for each (column), since it was made."""

    def __init__(self) -> None:
        self._counts: torch.Tensor | None = None

    def update(self, outputs: Any, targets: Any) -> None:
        """Take a batch; one that is no classification is passed over. Never waits for a device.

        Args:
            outputs: A score for each class, shape `[N, C]`.
            targets: Numbers of classes, an integer dtype of shape `[N]`; those outside of 0 … C-1 do not count.
        """
        if not (isinstance(outputs, torch.Tensor) and isinstance(targets, torch.Tensor)):
            return
        fits = outputs.dim() == 2 and targets.shape == outputs.shape[:1]
        integers = not targets.is_floating_point() and targets.dtype != torch.bool
        if not fits or not integers or not 2 <= outputs.shape[1] <= MOST_CLASSES:
            return
        classes = torch.arange(outputs.shape[1], device=outputs.device)
        truth, prediction = ((each[:, None] == classes).float() for each in (targets, outputs.argmax(1)))
        # A product of zeros and ones is exact, and deterministic on every device.
        counts = (truth.T @ prediction).long()
        if self._counts is None:
            self._counts = counts
        elif self._counts.shape == counts.shape:
            self._counts += counts

    @property
    def counts(self) -> list[list[int]] | None:
        """The counts, C rows of C; None if nothing was a classification."""
        return None if self._counts is None else self._counts.tolist()
