"""A batch that does not fit into memory, in parts: `accumulate=4` takes one step for four batches.

Their mean losses are weighted by their samples, so four batches of 16 make the step of one batch of 64, up to
the order of additions. See it in two lines, whose curves differ in the last digits:
    python -m tracked.run train experiments/accumulate.py --epochs 2 batch_size=16 accumulate=4
    python -m tracked.run train experiments/accumulate.py --epochs 2 batch_size=64 accumulate=1

Steps, and with them the learning rate, the logged losses and `--eval-every`, count windows of four. What looks
at a batch as a whole, such as BatchNorm, sees 16 samples, not 64: the network here normalizes each sample.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

import tracked
from digits import accuracy, load


@dataclass(frozen=True)
class Params:
    hidden: int = 64
    lr: float = 3e-3
    batch_size: int = 16
    accumulate: int = 4


def build(params: Params) -> tracked.Task:
    train_data, val_data = load(shift=0)  # else every batch, of whatever size, would have shifts of its own
    model = nn.Sequential(
        nn.Flatten(),
        nn.Linear(64, params.hidden),
        nn.LayerNorm(params.hidden),
        nn.ReLU(),
        nn.Linear(params.hidden, 10),
    )
    return tracked.Task(
        model=model,
        loss=nn.functional.cross_entropy,
        optimizer=torch.optim.Adam(model.parameters(), lr=params.lr),
        train_data=train_data,
        val_data=val_data,
        batch_size=params.batch_size,
        accumulate=params.accumulate,
        clip_norm=1.0,  # of the whole window's gradients
        metrics={"accuracy": accuracy},
    )
