"""`experiments/digits.py` for a sweep that is to be timed: before each trial it trains the same by hand.

What a trial costs is then the time between two such trainings, less what they take themselves, which lie so close to
it that a machine that others slow for a minute slows both. The file named in `TIMES` gets a line for each: when it
began and when it ended.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset

import tracked
from experiments import digits

EPOCHS = 2

Params = digits.Params


def train(params: digits.Params) -> None:
    """Train and evaluate as a loop does that nobody helps."""
    task = digits.build(params)
    model, loss, optimizer, scheduler = task.model, task.loss, task.optimizer, task.scheduler
    assert loss is not None
    assert scheduler is not None
    assert isinstance(task.val_data, Dataset)
    loader = DataLoader(task.train_data, batch_size=task.batch_size, shuffle=True)
    val_loader = DataLoader(task.val_data, batch_size=task.batch_size)
    for _ in range(EPOCHS):
        model.train()
        for x, y in loader:
            optimizer.zero_grad()
            loss(model(x), y).backward()
            optimizer.step()
        model.eval()
        with torch.no_grad():
            for x, y in val_loader:
                outputs = model(x)
                loss(outputs, y).item(), digits.accuracy(outputs, y).item()
        scheduler.step()


def build(params: digits.Params) -> tracked.Task:
    began = time.perf_counter()
    train(params)
    with Path(os.environ["TIMES"]).open("a") as file:
        print(began, time.perf_counter(), file=file)
    return digits.build(params)
