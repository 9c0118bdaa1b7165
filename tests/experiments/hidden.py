"""Keeps a count in its model that no state_dict knows: `train --check` has to find that out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import tracked


@dataclass(frozen=True)
class Params:
    hidden: bool = True


class Counting(nn.Module):
    def __init__(self, *, hidden: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 1)
        self.hidden = hidden
        self.calls = 0

    def forward(self, inputs: Tensor) -> Tensor:
        self.calls += self.training
        outputs: Tensor = self.linear(inputs)
        return outputs / self.calls if self.hidden and self.training else outputs


def build(params: Params) -> tracked.Task:
    inputs = torch.randn(32, 4, generator=torch.Generator().manual_seed(1))
    data = TensorDataset(inputs, inputs.sum(1, keepdim=True))
    model = Counting(hidden=params.hidden)
    return tracked.Task(
        model=model,
        loss=nn.functional.mse_loss,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        train_data=data,
        batch_size=4,
    )
