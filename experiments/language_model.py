"""A language model of characters: lines of different lengths, own batches, and a loss weighted by its tokens.

The text is the language reference that Python itself brings along, for `help("if")`. Lines of like length share a
batch of about `tokens` characters, which costs little padding; `collate` pads them. Batches hold more or fewer
tokens, so `step` returns with the mean loss how many it is over: validation, and `accumulate`, weigh by them.

Try it:
    python -m tracked.run train experiments/language_model.py --epochs 5
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

import tracked

# A token is a printable ASCII character, from FIRST to LAST, or one of these.
PAD, UNKNOWN, FIRST, LAST = 0, 1, 32, 126
END = LAST + 1


@dataclass(frozen=True)
class Params:
    width: int = 128
    lr: float = 3e-3
    tokens: int = 2048  # in a batch, about
    lines: int = 5000
    accumulate: int = 1


class Lines(Dataset[Tensor]):
    """Each sample a line: its characters and an end, int64 [length]."""

    def __init__(self, lines: Sequence[str]) -> None:
        self.lines = [torch.tensor([*(encoded(each) for each in line), END]) for line in lines]

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, index: int) -> Tensor:
        return self.lines[index]


def encoded(character: str) -> int:
    return ord(character) if FIRST <= ord(character) <= LAST else UNKNOWN


def load(count: int) -> tuple[Lines, Lines]:
    """`count` lines of the reference, every tenth of them to validate on."""
    lines = [line.strip() for topic in sorted(topics) for line in topics[topic].splitlines()]
    lines = list(dict.fromkeys(line for line in lines if len(line) > 20))[:count]  # none of them twice
    return Lines([line for number, line in enumerate(lines) if number % 10]), Lines(lines[::10])


class LikeLengths:
    """Indices of batches of about `tokens` tokens, in a new order each epoch; it knows where it stands.

    With the two methods for its state a resume is exact; without them it would be said that it is not.
    """

    def __init__(self, data: Lines, tokens: int) -> None:
        by_length = sorted(range(len(data)), key=lambda index: len(data[index]))
        self.batches: list[list[int]] = [[]]
        for index in by_length:
            if (len(self.batches[-1]) + 1) * len(data[index]) > tokens and self.batches[-1]:
                self.batches.append([])
            self.batches[-1].append(index)
        self.epoch, self.given = 0, 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.epoch)
        order = torch.randperm(len(self.batches), generator=generator).tolist()
        while self.given < len(order):
            self.given += 1
            yield self.batches[order[self.given - 1]]
        self.epoch, self.given = self.epoch + 1, 0

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "given": self.given}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.given = state["epoch"], state["given"]


def collate(lines: list[Tensor]) -> Tensor:
    """Lines of different lengths to int64 [N, longest], padded with PAD."""
    return pad_sequence(lines, batch_first=True, padding_value=PAD)


class Model(nn.Module):
    """Tokens [N, T] to logits [N, T, END + 1] for the token after each."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(END + 1, width)
        self.memory = nn.GRU(width, width, batch_first=True)
        self.logits = nn.Linear(width, END + 1)

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.logits(self.memory(self.embedding(tokens))[0])
        return logits


def step(model: nn.Module, batch: Tensor) -> tuple[Tensor, Tensor]:
    """The mean loss of a token, in nats, and how many tokens it is over: padding is none."""
    inputs, targets = batch[:, :-1], batch[:, 1:]
    logits = model(inputs)
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=PAD)
    return loss, (targets != PAD).sum()


def build(params: Params) -> tracked.Task:
    train_data, val_data = load(params.lines)
    model = Model(params.width)
    loader: dict[str, Any] = {
        "batch_sampler": LikeLengths(train_data, params.tokens),  # of the training; a validation is in order
        "collate_fn": collate,
    }
    return tracked.Task(
        model=model,
        step=step,
        optimizer=torch.optim.AdamW(model.parameters(), lr=params.lr),
        train_data=train_data,
        val_data=val_data,
        batch_size=32,
        accumulate=params.accumulate,
        clip_norm=1.0,
        loader=loader,
    )
