"""Data without a length: windows of text, shuffled on the way, from an `IterableDataset` that knows where it is.

The text is the language reference that Python itself brings along, for `help("if")`, read topic by topic. With
`state_dict` and `load_state_dict` a resume goes on with the very next window, also from several workers, each of
which has a state of its own; without the two it would be said that it cannot.

Try it:
    python -m tracked.run train experiments/stream.py --max-steps 300 --eval-every "50 steps"
    python -m tracked.run train experiments/stream.py --epochs 2 workers=2
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset, TensorDataset, get_worker_info

import tracked

TOKENS = 128  # of ASCII; anything else is a question mark
WINDOW = 32
BUFFER = 256  # windows to choose the next one from


@dataclass(frozen=True)
class Params:
    width: int = 64
    lr: float = 3e-3
    batch_size: int = 64
    workers: int = 0


def windows(topic: str) -> Tensor:
    """A topic's text in windows and the token that follows each: int64 [N, WINDOW + 1]."""
    tokens = torch.tensor(list(topics[topic].encode("ascii", "replace")))
    return tokens.unfold(0, WINDOW + 1, WINDOW) if len(tokens) > WINDOW else tokens.new_empty(0, WINDOW + 1)


class Text(IterableDataset[tuple[Tensor, Tensor]]):
    """Windows of all topics, each worker reading its share of them, in a new order each time.

    Its state is how many windows were given, and which generator chose them: the way there is gone again, in
    milliseconds, which is simpler and smaller than to keep the buffer.
    """

    def __init__(self, names: list[str]) -> None:
        self.names = names
        self.generator = torch.Generator().manual_seed(0)
        self.began_with = self.generator.get_state()
        self.given = 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        info = get_worker_info()
        mine = self.names[info.id :: info.num_workers] if info else self.names
        if not self.given:
            self.began_with = self.generator.get_state()
        self.generator.set_state(self.began_with)
        for number, window in enumerate(self._shuffled(mine)):
            if number >= self.given:
                self.given += 1
                yield window[:-1], window[1:]
        self.given = 0

    def _shuffled(self, names: list[str]) -> Iterator[Tensor]:
        buffer: list[Tensor] = []
        for name in names:
            for window in windows(name):
                buffer.append(window)
                if len(buffer) == BUFFER:
                    yield buffer.pop(self._draw(BUFFER))
        while buffer:
            yield buffer.pop(self._draw(len(buffer)))

    def _draw(self, below: int) -> int:
        return int(torch.randint(below, (), generator=self.generator))

    def state_dict(self) -> dict[str, Any]:
        return {"given": self.given, "began_with": self.began_with}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.given, self.began_with = state["given"], state["began_with"]


class Model(nn.Module):
    """Tokens [N, T] to logits [N, T, TOKENS] for the token after each."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(TOKENS, width)
        self.memory = nn.GRU(width, width, batch_first=True)
        self.logits = nn.Linear(width, TOKENS)

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.logits(self.memory(self.embedding(tokens))[0])
        return logits


def loss(logits: Tensor, targets: Tensor) -> Tensor:
    """The mean loss of a token, in nats."""
    return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def build(params: Params) -> tracked.Task:
    names = sorted(topics)
    held_out = torch.cat([windows(name) for name in names[::10]])
    model = Model(params.width)
    optimizer = torch.optim.AdamW(model.parameters(), lr=params.lr)
    return tracked.Task(
        model=model,
        loss=loss,
        optimizer=optimizer,
        # Asks no length: halved whenever three evaluations have brought nothing.
        scheduler=torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=3),
        train_data=Text([name for number, name in enumerate(names) if number % 10]),
        val_data=TensorDataset(held_out[:, :-1], held_out[:, 1:]),
        batch_size=params.batch_size,
        loader={"num_workers": params.workers},
    )
