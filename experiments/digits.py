"""Handwritten digits, 8×8 pixels, with a small convolutional network: 98 % in a few seconds on a CPU.

Try it:
    python -m tracked.run train experiments/digits.py --epochs 10 lr=0.005
    python -m tracked.run resume last --epochs 20
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

import tracked

if TYPE_CHECKING:
    import optuna


@dataclass(frozen=True)
class Params:
    hidden: int = 16
    lr: float = 5e-3
    dropout: float = 0.2
    weight_decay: float = 1e-4
    batch_size: int = 64
    shift: int = 1  # pixels


class Shifted(Dataset[tuple[Tensor, Tensor]]):
    """Images [N, 1, H, W], each moved by up to `shift` pixels, anew every time it is asked for.

    The generator is torch's own: `tracked` seeds it for every batch, so a resumed run sees the same shifts.
    """

    def __init__(self, images: Tensor, labels: Tensor, shift: int) -> None:
        self.padded = nn.functional.pad(images, (shift,) * 4)
        self.labels = labels
        self.shift = shift
        self.height, self.width = images.shape[-2:]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        top, left = torch.randint(2 * self.shift + 1, (2,)).tolist()
        return self.padded[index, :, top : top + self.height, left : left + self.width], self.labels[index]


def load(shift: int) -> tuple[Shifted, TensorDataset]:
    """1,437 images to train on and 360 to validate on, always the same: float32 [N, 1, 8, 8] in 0…1."""
    # The file ships with scikit-learn; importing scikit-learn to read it would take seconds.
    spec = find_spec("sklearn")
    if spec is None or spec.origin is None:
        raise ImportError("these digits come with scikit-learn; try: pip install scikit-learn")
    file = Path(spec.origin).parent / "datasets/data/digits.csv.gz"
    table = np.loadtxt(file, delimiter=",", dtype=np.float32)  # a row: 64 pixels in 0…16, and the digit
    order = torch.randperm(len(table), generator=torch.Generator().manual_seed(0))
    rows = torch.from_numpy(table)[order]
    images, labels = rows[:, :64].reshape(-1, 1, 8, 8) / 16, rows[:, 64].long()
    return Shifted(images[360:], labels[360:], shift), TensorDataset(images[:360], labels[:360])


def network(hidden: int, dropout: float) -> nn.Module:
    """Images [N, 1, 8, 8] to logits [N, 10]."""
    return nn.Sequential(
        nn.Conv2d(1, hidden, 3, padding=1),
        nn.BatchNorm2d(hidden),
        nn.ReLU(),
        nn.Conv2d(hidden, 2 * hidden, 3, padding=1),
        nn.BatchNorm2d(2 * hidden),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Dropout(dropout),
        nn.Linear(2 * hidden * 16, 10),
    )


def accuracy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Share of images whose largest logit is the right one, a scalar."""
    return (outputs.argmax(1) == targets).float().mean()


def build(params: Params) -> tracked.Task:
    train_data, val_data = load(params.shift)
    model = network(params.hidden, params.dropout)
    optimizer = torch.optim.AdamW(model.parameters(), lr=params.lr, weight_decay=params.weight_decay)
    return tracked.Task(
        model=model,
        loss=nn.functional.cross_entropy,
        optimizer=optimizer,
        scheduler=torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.8),  # once per epoch
        train_data=train_data,
        val_data=val_data,
        batch_size=params.batch_size,
        metrics={"accuracy": accuracy},
        monitor="val/accuracy",
        mode="max",
    )


def suggest(trial: optuna.Trial) -> dict[str, object]:
    return {
        "hidden": trial.suggest_categorical("hidden", [4, 8, 16]),
        "lr": trial.suggest_float("lr", 1e-4, 1e-1, log=True),
        "dropout": trial.suggest_float("dropout", 0.0, 0.5),
    }
