"""The public API as a user writes it; mypy --strict has to take it as it stands."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, assert_type

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

import tracked


@dataclass(frozen=True)
class Params:
    lr: float = 0.1


def accuracy(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs.argmax(1) == targets).float().mean()


def build(params: Params) -> tracked.Task:
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=params.lr)
    data: Dataset[Any] = TensorDataset(torch.zeros(4, 2), torch.zeros(4, 1))
    return tracked.Task(
        model=model,
        loss=nn.functional.mse_loss,
        optimizer=optimizer,
        train_data=data,
        val_data={"val": data, "test": data},
        metrics={"accuracy": accuracy},
        scheduler=torch.optim.lr_scheduler.StepLR(optimizer, 1),
        mode="max",
        precision="bf16",
        loader={"num_workers": 2},
    )


def transfer(params: Params) -> tracked.Task:
    model = tracked.finetune.pretrained("resnet18", weights="run:0123abcd", head=10)
    report = tracked.finetune.load_weights(model, "weights.pt", partial=["fc"])
    assert_type(report.loaded, tuple[str, ...])
    tracked.finetune.freeze(model, "*")
    tracked.finetune.unfreeze(model, "fc", "layer4.1.*")
    schedule = {2: "layer4", 3: ["layer2", "layer3"]}
    optimizer = torch.optim.SGD(tracked.finetune.trainable(model, also=schedule), lr=params.lr)
    print(tracked.finetune.table(model), report)
    data: Dataset[Any] = TensorDataset(torch.zeros(4, 2), torch.zeros(4, 1))
    return tracked.Task(
        model=model,
        loss=nn.functional.cross_entropy,
        optimizer=optimizer,
        train_data=data,
        unfreeze=schedule,
    )


def main(run: tracked.Run, params: Params) -> None:
    model = nn.Linear(2, 1)
    run.attach(model=model)
    for inputs, targets in run.batches(TensorDataset(torch.zeros(4, 2)), batch_size=2, epochs=1):
        run.log({"train/loss": nn.functional.mse_loss(model(inputs), targets), "lr": params.lr})
        if run.epoch_ended and run.should_stop:
            run.state["seen"] = run.step
    for step in run.steps(3):
        assert_type(step, int)
        run.log({"a": 1}, step=step)


def script() -> None:
    with tracked.start("name", Params(), run_name="mine", seed=1, checkpoint_every=("5 min",)) as run:
        assert_type(run, tracked.Run)
        assert_type(run.id, str)
        assert_type(run.url, str)
        main(run, Params())
    with tracked.resume("last", progress=False) as run:
        run.log_artifact("file.txt", "folder")
        run.log_text("text", "notes/data.txt")
    try:
        finished = tracked.fit(build(Params()), "name", {"lr": 0.1}, epochs=3)
        assert_type(finished.finish(), int)
        values: Mapping[str, float] = finished.metrics
        print(values)
    except tracked.Paused as paused:
        assert_type(paused.state, str)
    except tracked.TrackedError as error:
        assert_type(error.try_next, str)
