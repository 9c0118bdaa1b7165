"""Data that decides its own order, by a sampler or as a stream, resumes as exactly as it can say where it stands."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import (
    BatchSampler,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    TensorDataset,
    WeightedRandomSampler,
    get_worker_info,
)

from tests.trainings import Body, differing, draw_everywhere, nothing, resume, train
from tracked.attempts import rehearse
from tracked.checkpoint import load
from tracked.errors import UsageError
from tracked.journal import Reader
from tracked.names import FILE, folder_name
from tracked.schedule import Settings
from tracked.streams import Sampled, Stream, batches_of
from tracked.tracking import Run
from tracked.training import compare_states

SETTINGS = Settings(epochs=3, checkpoint_every=("2 steps", "1 epoch"), keep_last=100, device="cpu")
SAMPLES = 22
DATA = TensorDataset(
    torch.linspace(-1, 1, SAMPLES).reshape(-1, 1), torch.linspace(0, 1, SAMPLES).reshape(-1, 1)
)


class Augmented(Dataset[tuple[Tensor, Tensor]]):
    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x, y = DATA[index]
        return x + draw_everywhere(), y


class Lines(IterableDataset[tuple[Tensor, Tensor]]):
    """A file read from its beginning in each epoch, by several workers in turn; it cannot say where it is."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        for index in range(worker, SAMPLES, workers):
            x, y = DATA[index]
            yield x + draw_everywhere(), y


class Remembered(IterableDataset[tuple[Tensor, Tensor]]):
    """Another order in each epoch, from a generator of its own; knows where it is."""

    def __init__(self, uneven: bool = False) -> None:
        self.uneven = uneven
        self.position = 0
        self.generator = torch.Generator().manual_seed(5)
        self.order: list[int] = []

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        if self.position == 0:
            self.order = torch.randperm(SAMPLES, generator=self.generator).tolist()[worker::workers]
            if self.uneven and worker == 0:
                self.order = self.order[:3]
        while self.position < len(self.order):
            x, y = DATA[self.order[self.position]]
            self.position += 1
            yield x + draw_everywhere(), y
        self.position = 0

    def state_dict(self) -> dict[str, Any]:
        state = {"position": self.position, "order": list(self.order)}
        return {**state, "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position, self.order = state["position"], list(state["order"])
        self.generator.set_state(state["generator"])


class Exhausting(Remembered):
    """Its state at the end is that of an exhausted one; iterating begins anew only then."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        if self.position >= SAMPLES:
            self.position = 0
            if self.order:  # loaded: there is nothing behind the last sample
                self.order = []
                return
        self.order = list(range(SAMPLES))
        while self.position < SAMPLES:
            self.position += 1
            yield DATA[self.position - 1]
        self.order = []


class Shuffled(IterableDataset[tuple[Tensor, Tensor]]):
    """A shuffle buffer, whose state refers to the buffer itself."""

    def __init__(self) -> None:
        self.buffer: list[int] = []
        self.read = 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        while self.read < SAMPLES or self.buffer:
            while self.read < SAMPLES and len(self.buffer) < 5:
                self.buffer.append(self.read)
                self.read += 1
            yield DATA[self.buffer.pop(random.randrange(len(self.buffer)))]
        self.read = 0

    def state_dict(self) -> dict[str, Any]:
        return {"buffer": self.buffer, "read": self.read}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.buffer, self.read = state["buffer"], state["read"]


class Uneven:
    """Batches of which an epoch has more or fewer."""

    def __init__(self) -> None:
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return (4, 6, 3)[self.epoch % 3]

    def __iter__(self) -> Iterator[list[int]]:
        return iter([[number, number + 10] for number in range(len(self))])


class Wandering(Sampler[int]):
    """A sampler with a generator of its own that goes on from epoch to epoch, and no state to be saved."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(3)

    def __len__(self) -> int:
        return SAMPLES

    def __iter__(self) -> Iterator[int]:
        yield from torch.randperm(SAMPLES, generator=self.generator).tolist()


class Stateful(Sampler[int]):
    """The same with a state, and without a length."""

    def __init__(self) -> None:
        self.inner = Remembered()

    def __iter__(self) -> Iterator[int]:
        inner = self.inner
        if inner.position == 0:
            inner.order = torch.randperm(SAMPLES, generator=inner.generator).tolist()
        while inner.position < SAMPLES:
            inner.position += 1
            yield inner.order[inner.position - 1]
        inner.position = 0

    def state_dict(self) -> dict[str, Any]:
        return self.inner.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.inner.load_state_dict(state)


def weighted(**options: Any) -> WeightedRandomSampler:
    return WeightedRandomSampler(torch.linspace(1, 2, SAMPLES).tolist(), 14, **options)


def training(
    data: Callable[[], Any], loader: Callable[[], dict[str, Any]] = dict, accumulate: int = 1
) -> Body:
    """A loop over the data, with dropout and momentum; the ends of epochs are logged."""

    def body(run: Any) -> None:
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(1, 8), nn.Dropout(0.2), nn.Linear(8, 1))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        run.attach(model=model, optimizer=optimizer)
        for x, y in run.batches(data(), batch_size=4, accumulate=accumulate, **loader()):
            loss = functional.mse_loss(model(x), y)
            loss.backward()
            if run.step_ended:
                optimizer.step()
                optimizer.zero_grad()
                run.log({"train/loss": loss})
            if run.epoch_ended:
                run.log({"epoch": run.epoch})

    return body


EXACT: dict[str, Body] = {
    "a stream": training(Remembered),
    "a stream, accumulating": training(Remembered, accumulate=2),
    "a stream without its smaller last batch": training(Remembered, lambda: {"drop_last": True}),
    "a stream read by two workers": training(Remembered, lambda: {"num_workers": 2}),
    "a stream read by three, one of which ends early": training(
        lambda: Remembered(uneven=True), lambda: {"num_workers": 3}
    ),
    "a stream read by workers that stay": training(
        Remembered, lambda: {"num_workers": 2, "persistent_workers": True}
    ),
    "a stream read by workers that stay, one of which ends early": training(
        lambda: Remembered(uneven=True), lambda: {"num_workers": 2, "persistent_workers": True}
    ),
    "a stream with a buffer": training(Shuffled),
    "a stream that is exhausted at its end": training(Exhausting),
    "a stream that is the same in each epoch": training(Lines, lambda: {"num_workers": 2}),
    "a sampler with a state": training(Augmented, lambda: {"sampler": Stateful()}),
    "a sampler with a state, and workers": training(
        Augmented, lambda: {"sampler": Stateful(), "num_workers": 2}, accumulate=2
    ),
    "weighted samples": training(Augmented, lambda: {"sampler": weighted()}),
    "weighted samples by a generator": training(
        Augmented, lambda: {"sampler": weighted(generator=torch.Generator())}
    ),
    "torch's own batches": training(
        Augmented, lambda: {"batch_sampler": BatchSampler(RandomSampler(DATA), 3, drop_last=True)}
    ),
}


@pytest.mark.parametrize("case", EXACT)
def test_a_resume_from_every_checkpoint_ends_in_the_same_bits(case: str, tmp_path: Path) -> None:
    found = differing(tmp_path, EXACT[case], SETTINGS)
    assert found == nothing(found)
    assert len(found) > 4


def test_the_epochs_of_a_sampler_may_have_more_or_fewer_batches(tmp_path: Path) -> None:
    body = training(Augmented, lambda: {"batch_sampler": Uneven()})
    found = differing(tmp_path, body, SETTINGS)
    assert found == nothing(found)
    trained = train(tmp_path, body, SETTINGS)
    assert [step for key, step, _ in trained.points if key == "epoch"] == [4, 10, 13]


def test_a_window_whose_batches_cannot_all_be_built_is_not_passed_over(tmp_path: Path) -> None:
    class Unreadable(Augmented):
        def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
            drawn.append(index)
            if len(drawn) == 18:
                raise OSError("no such picture")
            return super().__getitem__(index)

    drawn: list[int] = []
    broken = training(Unreadable, lambda: {"sampler": Stateful()}, accumulate=2)
    settings = Settings(epochs=1, keep_last=100, device="cpu")
    attempt = rehearse(tmp_path, {})
    with pytest.raises(OSError, match="no such picture"), Run(attempt, settings) as run:
        broken(run)
    whole = train(tmp_path, training(Augmented, lambda: {"sampler": Stateful()}, accumulate=2), settings)
    saved = load(attempt.folder.checkpoints / folder_name(2) / FILE)
    assert (saved["batch"], saved["source"]["position"]) == (4, 16)
    resumed = train(
        tmp_path, training(Augmented, lambda: {"sampler": Stateful()}, accumulate=2), settings, saved
    )
    assert compare_states(resumed.last["model_state_dict"], whole.last["model_state_dict"])[1] == []


def test_a_stream_resumed_without_its_state_is_missed(tmp_path: Path) -> None:
    straight = train(tmp_path, EXACT["a stream"], SETTINGS)
    assert resume(tmp_path, straight, EXACT["a stream"], SETTINGS, 4, lambda state: state.update(source=None))


def test_the_epochs_of_a_stream_end_where_it_ends(tmp_path: Path) -> None:
    trained = train(tmp_path, EXACT["a stream"], SETTINGS)
    assert trained.run.step == 18
    assert [point[1:] for point in trained.points if point[0] == "epoch"] == [
        (6, "1.0"),
        (12, "2.0"),
        (18, "3.0"),
    ]
    further = train(tmp_path, EXACT["a stream"], Settings(epochs=4, device="cpu"), trained.last)
    assert (further.run.step, further.run.epochs_done) == (24, 4)


def test_workers_of_a_stream_give_the_samples_of_an_epoch_once(tmp_path: Path) -> None:
    stream = Stream(Lines(), batch_size=4, seed=0, loader={"num_workers": 3})
    targets = torch.cat([y for _, y in stream.epoch(0)])
    assert sorted(targets.flatten().tolist()) == DATA.tensors[1].flatten().tolist()


INEXACT = {
    "a stream that cannot say where it is": training(Lines),
    "a sampler of one's own without a state": training(Augmented, lambda: {"sampler": Wandering()}),
}


@pytest.mark.parametrize("case", INEXACT)
def test_what_cannot_be_exact_is_said_and_tagged(
    case: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    attempt = rehearse(tmp_path, {})
    with Run(attempt, SETTINGS) as run:
        INEXACT[case](run)
    (journal,) = attempt.folder.journals()
    tags = [record.body for record in Reader(journal, ("points",)).records("points") if record.kind == "tags"]
    assert {"mlflow.tracked.exact": "false"} in tags
    assert "state_dict() and load_state_dict()" in caplog.text


def test_samples_are_drawn_as_the_sampler_says() -> None:
    batches = Sampled(DATA, SequentialSampler(range(7)), batch_size=3, seed=0, drop_last=False)
    assert [indices.tolist() for indices in batches.index_batches(0, 1)] == [[3, 4, 5], [6]]
    one = Sampled(DATA, weighted(), batch_size=14, seed=0)
    orders = [[indices.tolist() for indices in one.index_batches(epoch, 0)] for epoch in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]


def test_a_restored_sampler_stands_where_it_did_before_its_first_batch_too() -> None:
    before, after = (Sampled(DATA, Stateful(), batch_size=4, seed=0) for _ in range(2))
    next(iter(before.epoch(0)))

    after.restore(before.state)

    assert before.state is not None
    assert after.state is before.state


class Empty(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(())


def test_a_stream_without_a_sample_is_told(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="the data gave no batch in epoch 1"):
        train(tmp_path, training(Empty), SETTINGS)


@pytest.mark.parametrize(
    ("data", "loader", "said"),
    [
        (Empty(), {"sampler": range(3)}, "no order to sample from"),
        (DATA, {"sampler": range(3), "batch_sampler": [[1]]}, "both sampler and batch_sampler"),
        (DATA, {"sampler": iter(range(3))}, "has no length, and no state"),
    ],
)
def test_what_does_not_go_together_is_refused(data: Any, loader: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        batches_of(data, batch_size=2, seed=0, loader=loader)


def test_a_stream_needs_as_many_workers_as_before(tmp_path: Path) -> None:
    straight = train(tmp_path, EXACT["a stream read by two workers"], SETTINGS)
    with pytest.raises(UsageError, match="the data has changed: streams"):
        train(tmp_path, EXACT["a stream"], SETTINGS, straight.state(2))
    ends = [step for key, step, _ in straight.points if key == "epoch"]
    with pytest.raises(UsageError, match="read by 2 workers, and is to be read by 1"):
        train(tmp_path, EXACT["a stream"], SETTINGS, straight.state(ends[0]))
