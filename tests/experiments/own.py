"""A loop of one's own, with state in every place where a user may keep some."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import tracked
from tests.experiments.tiny import FEATURES, Noisy


@dataclass(frozen=True)
class Params:
    accumulate: int = 1
    workers: int = 0
    by_steps: bool = False
    set_to_none: bool = False


class Sometimes(nn.Module):
    """Uses its second branch at some steps only."""

    def __init__(self) -> None:
        super().__init__()
        self.always = nn.Linear(FEATURES, 1)
        self.rarely = nn.Linear(FEATURES, 1)
        self.never = nn.Linear(FEATURES, 1)

    def forward(self, inputs: Tensor, *, both: bool) -> Tensor:
        outputs: Tensor = self.always(nn.functional.dropout(inputs, 0.2))
        return outputs + self.rarely(inputs) if both else outputs


def main(run: tracked.Run, params: Params) -> None:
    model = Sometimes()
    # Weight decay moves a parameter whose gradient is zero, and leaves one whose gradient is None.
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    run.attach(model=model, optimizer=optimizer)
    run.attach(average=average)
    run.state.setdefault("curriculum", 0.1)
    run.state.setdefault("seen", [])

    def train(inputs: Tensor, targets: Tensor) -> Tensor:
        noise = run.state["curriculum"] * random.random() * float(np.random.random())
        loss = nn.functional.mse_loss(model(inputs + noise, both=run.step % 5 == 2), targets)
        loss.backward()
        return loss.detach()

    def step(loss: Tensor) -> None:
        optimizer.step()
        optimizer.zero_grad(set_to_none=params.set_to_none)
        average.update_parameters(model)
        run.state["curriculum"] *= 1.1
        run.state["seen"] = [*run.state["seen"][-3:], run.step]
        strange = {0: math.nan, 1: math.inf, 2: -math.inf}.get(run.step % 4, 0.5)
        run.log({"train/loss": loss, "strange": strange, "curriculum": run.state["curriculum"]})

    if params.by_steps:
        for _ in run.steps(14):
            inputs = torch.randn(4, FEATURES)
            step(train(inputs, inputs.sum(1, keepdim=True)))
        return
    total = torch.zeros(())
    batches = run.batches(
        Noisy(26, "numpy"),
        batch_size=4,
        epochs=2,
        accumulate=params.accumulate,
        num_workers=params.workers,
    )
    for inputs, targets in batches:
        total = total + train(inputs, targets)
        if run.step_ended:
            step(total)
            total = torch.zeros(())
        if run.epoch_ended:
            run.log({"val/drawn": random.random() + float(torch.rand(()))})
