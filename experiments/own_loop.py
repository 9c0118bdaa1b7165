"""The training of digits.py as a loop of your own: what `run` adds to it, and that resume is as exact.

Try it, the second line as the plain script that it is:
    python -m tracked.run train experiments/own_loop.py lr=0.005
    python experiments/own_loop.py
    python -m tracked.run resume RUN -- python experiments/own_loop.py
"""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import tracked
from digits import Params, accuracy, load, network

EPOCHS = 10


def main(run: tracked.Run, params: Params) -> None:
    train_data, val_data = load(params.shift)
    model = network(params.hidden, params.dropout)
    optimizer = torch.optim.AdamW(model.parameters(), lr=params.lr, weight_decay=params.weight_decay)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.8)
    run.attach(model=model, optimizer=optimizer, scheduler=scheduler)  # a resumed run is restored here

    for images, labels in run.batches(train_data, batch_size=params.batch_size, epochs=EPOCHS):
        loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        run.log({"train/loss": loss})
        if run.epoch_ended:
            scheduler.step()
            run.log(evaluate(model, val_data))
            run.draw_curves(["train/loss", "val/loss"], ["val/accuracy"])


def evaluate(model: nn.Module, data: Dataset[tuple[torch.Tensor, ...]]) -> dict[str, torch.Tensor]:
    """Loss and accuracy on all of `data`, two scalars."""
    images, labels = next(iter(DataLoader(data, batch_size=360)))
    model.eval()
    with torch.no_grad():
        outputs = model(images)
    model.train()
    return {
        "val/loss": nn.functional.cross_entropy(outputs, labels),
        "val/accuracy": accuracy(outputs, labels),
    }


if __name__ == "__main__":
    params = Params()
    torch.manual_seed(0)  # the first weights; everything after them follows from the run's seed
    with tracked.start("digits", params) as run:
        main(run, params)
