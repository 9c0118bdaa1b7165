"""A network that trains in milliseconds, with every kind of randomness and of state that a training can have."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn, optim
from torch.optim import lr_scheduler
from torch.utils.data import Dataset, TensorDataset, default_collate

import tracked

FEATURES = 6


@dataclass(frozen=True)
class Params:
    optimizer: str = "momentum"
    scheduler: str = "none"
    noise: str = "torch"
    collate: bool = False
    workers: int = 0
    samples: int = 26
    batch_size: int = 4
    accumulate: int = 1
    clip: float = 0.0
    precision: str = "fp32"
    scale: float = 1.0
    lr: float = 0.05
    reversed: bool = False
    tied: bool = False
    pictures: bool = False
    evaluate: bool = True
    stream: bool = False
    backend: str = ""


class Noisy(Dataset[tuple[Tensor, Tensor]]):
    """Samples `[6]` and their sums, with noise drawn anew from one of the three global generators."""

    def __init__(self, samples: int, noise: str, scale: float = 1.0) -> None:
        self.inputs = torch.randn(samples, FEATURES, generator=torch.Generator().manual_seed(1)) * scale
        self.targets = self.inputs.sum(1, keepdim=True)
        self.noise = noise

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        draw: Mapping[str, Callable[[], Any]] = {
            "python": lambda: random.gauss(0, 0.1),
            "numpy": lambda: float(np.random.normal(0, 0.1)),
            "torch": lambda: torch.randn(FEATURES) * 0.1,
            "none": lambda: 0.0,
        }
        return self.inputs[index] + draw[self.noise](), self.targets[index]


def mixed_up(samples: Sequence[tuple[Tensor, Tensor]]) -> Any:
    """Collate, with each batch mixed with itself by random amounts and in random order."""
    inputs, targets = default_collate(list(samples))
    amount = random.random() * float(np.random.random())
    other = torch.randperm(len(inputs))
    return inputs + amount * inputs[other], targets + amount * targets[other]


class Twice(nn.Module):
    """Two layers that share their weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(FEATURES, FEATURES)
        self.second = nn.Linear(FEATURES, FEATURES)
        self.second.weight = self.first.weight
        self.last = nn.Linear(FEATURES, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.last(self.second(torch.tanh(self.first(inputs))))
        return outputs


class Pictures(nn.Module):
    """The six numbers as a picture `[N, 2, 1, 3]` in channels-last order."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(2, 4, (1, 2))
        self.norm = nn.BatchNorm2d(4)
        self.last = nn.Linear(8, 1)
        self.to(memory_format=torch.channels_last)

    def forward(self, inputs: Tensor) -> Tensor:
        pictures = inputs.view(-1, 2, 1, 3).contiguous(memory_format=torch.channels_last)
        outputs: Tensor = self.last(self.norm(self.convolution(pictures)).flatten(1))
        return outputs


class Streamed(nn.Module):
    """Draws while it is evaluated too, as sampling layers do."""

    def forward(self, inputs: Tensor) -> Tensor:
        return nn.functional.dropout(inputs, 0.3, training=True)


def network(params: Params) -> nn.Module:
    if params.tied:
        return Twice()
    if params.pictures:
        return Pictures()
    layers = nn.Sequential(
        nn.Linear(FEATURES, 8),
        nn.BatchNorm1d(8),
        nn.ReLU(),
        Streamed() if params.stream else nn.Dropout(0.3),
        nn.Linear(8, 1),
    )
    return torch.compile(layers, backend=params.backend) if params.backend else layers  # type: ignore[return-value]


def optimizer_of(params: Params, model: nn.Module) -> optim.Optimizer:
    parameters: list[Any] = list(model.parameters())
    if params.reversed:
        parameters.reverse()
    lr = params.lr
    groups: list[dict[str, Any]] = [{"params": parameters[:2]}, {"params": parameters[2:], "lr": lr / 3}]
    made: Mapping[str, Callable[[], optim.Optimizer]] = {
        "sgd": lambda: optim.SGD(parameters, lr=lr),
        "momentum": lambda: optim.SGD(parameters, lr=lr, momentum=0.9),
        "nesterov": lambda: optim.SGD(parameters, lr=lr, momentum=0.9, nesterov=True, weight_decay=0.01),
        "adamw": lambda: optim.AdamW(parameters, lr=lr),
        "amsgrad": lambda: optim.Adam(parameters, lr=lr, amsgrad=True),
        "rmsprop": lambda: optim.RMSprop(parameters, lr=lr / 5, momentum=0.5, centered=True),
        "adagrad": lambda: optim.Adagrad(parameters, lr=lr),
        "two groups": lambda: optim.AdamW(groups),
        "lbfgs": lambda: optim.LBFGS(parameters, lr=lr, max_iter=3),
        # torch's others, as they are built without a word
        **{
            name.lower(): lambda name=name: getattr(optim, name)(parameters, lr=lr)  # type: ignore[misc]
            for name in ("Adadelta", "Adafactor", "Adamax", "ASGD", "NAdam", "RAdam", "Rprop")
        },
        "fused": lambda: optim.AdamW(parameters, lr=lr, fused=True),
    }
    return made[params.optimizer]()


def scheduler_of(params: Params, optimizer: optim.Optimizer) -> Any:
    made: Mapping[str, Callable[[], Any]] = {
        "none": lambda: None,
        "step": lambda: lr_scheduler.StepLR(optimizer, 1, gamma=0.5),
        "one cycle": lambda: lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=40),
        "cosine": lambda: lr_scheduler.CosineAnnealingLR(optimizer, T_max=10),
        "plateau": lambda: lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5, threshold=0.5),
        "long plateau": lambda: lr_scheduler.ReduceLROnPlateau(optimizer, patience=1, threshold=0.9),
        "lambda": lambda: lr_scheduler.LambdaLR(optimizer, lambda count: 1 / (1 + count)),
        "cyclic": lambda: lr_scheduler.CyclicLR(optimizer, 0.01, 0.1, step_size_up=3),
        "exponential": lambda: lr_scheduler.ExponentialLR(optimizer, 0.9),
        "multiplied": lambda: lr_scheduler.MultiplicativeLR(optimizer, lambda count: 1 / (1 + count)),
        "polynomial": lambda: lr_scheduler.PolynomialLR(optimizer, 9, 2),
        "restarts": lambda: lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 3),
        "chained": lambda: lr_scheduler.ChainedScheduler(
            [lr_scheduler.ConstantLR(optimizer, 0.5, 4), lr_scheduler.ExponentialLR(optimizer, 0.9)]
        ),
        "rates by group": lambda: lr_scheduler.LambdaLR(
            optimizer, [lambda count: 1 / (1 + count), lambda count: 0.9**count]
        ),
        "multistep": lambda: lr_scheduler.MultiStepLR(optimizer, [2, 5, 9]),
        "warm-up": lambda: lr_scheduler.SequentialLR(
            optimizer,
            [
                lr_scheduler.LinearLR(optimizer, 0.1, total_iters=5),
                lr_scheduler.CosineAnnealingLR(optimizer, T_max=20),
            ],
            [5],
        ),
    }
    return made[params.scheduler]()


PER_STEP = (
    *("one cycle", "cosine", "lambda", "cyclic", "multistep", "warm-up", "multiplied", "polynomial"),
    *("restarts", "chained", "rates by group"),
)


def mean_error(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).abs().mean()


def build(params: Params) -> tracked.Task:
    data: Dataset[Any] = Noisy(params.samples, params.noise, params.scale)
    model = network(params)
    optimizer = optimizer_of(params, model)
    loader: Mapping[str, Any] = {
        "num_workers": params.workers,
        **({"collate_fn": mixed_up} if params.collate else {}),
    }
    if params.noise == "none" and not params.collate:
        data = TensorDataset(data.inputs, data.targets)  # type: ignore[attr-defined]
    return tracked.Task(
        model=model,
        loss=nn.functional.mse_loss,
        optimizer=optimizer,
        train_data=data,
        val_data={"val": data, "again": data} if params.evaluate else None,
        batch_size=params.batch_size,
        metrics={"error": mean_error},
        scheduler=scheduler_of(params, optimizer),
        scheduler_interval="step" if params.scheduler in PER_STEP else "epoch",
        accumulate=params.accumulate,
        clip_norm=params.clip or None,
        precision=params.precision,  # type: ignore[arg-type]
        loader=loader,
    )
