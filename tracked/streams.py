"""Batches of data that decides its own order: an own sampler, or an `IterableDataset`.

Their place is no number: it is what the sampler or the data set says of itself, in its `state_dict`,
after each batch. Loaders run ahead of the training, so that state travels with its batch.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch.utils.data import (
    BatchSampler,
    Dataset,
    IterableDataset,
    default_collate,
    get_worker_info,
)
from torch.utils.data import sampler as torchs_own

from tracked.data import Batches, as_is, end_workers, loading
from tracked.errors import UsageError
from tracked.seeding import derive, one_thread, preserved_generators, seed_generators

_END, _FILLER = "end", "filler"
_ENDED = -1


def batches_of(
    dataset: Dataset[Any],
    *,
    batch_size: int,
    seed: int,
    shuffle: bool = True,
    drop_last: bool = False,
    stream: str = "train",
    loader: Mapping[str, Any] | None = None,
) -> Batches | Sampled | Stream:
    """The batches of any data set; arguments as in `Batches`, and `sampler` or `batch_sampler` in `loader`.

    Raises:
        UsageError: The data set gives no batch, or an argument cannot be honoured.
    """
    options = dict(loader or {})
    own = [options.pop(name, None) for name in ("sampler", "batch_sampler")]
    if isinstance(dataset, IterableDataset):
        if any(each is not None for each in own):
            raise UsageError("an IterableDataset has no order to sample from", expected="no sampler")
        return Stream(
            dataset, batch_size=batch_size, seed=seed, drop_last=drop_last, stream=stream, loader=options
        )
    if own == [None, None]:
        return Batches(
            dataset,
            batch_size=batch_size,
            seed=seed,
            shuffle=shuffle,
            drop_last=drop_last,
            stream=stream,
            loader=options,
        )
    return Sampled(
        dataset, *own, batch_size=batch_size, seed=seed, drop_last=drop_last, stream=stream, loader=options
    )


class Sampled(Batches):
    """The batches of a map-style data set in the order of an own sampler.

    Args:
        dataset: As in `Batches`.
        sampler: Gives the indices of an epoch, one by one.
        batch_sampler: Gives them batch by batch, instead of `sampler`; `batch_size` and `drop_last` are its own.
        options: As in `Batches`.

    Attributes:
        is_exact: Whether a resume goes on with the very next batch. A sampler with `state_dict` and
            `load_state_dict` is asked; torch's own ones are drawn anew, seeded by the epoch.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        sampler: Iterable[int] | None = None,
        batch_sampler: Iterable[Sequence[int]] | None = None,
        **options: Any,
    ) -> None:
        if sampler is not None and batch_sampler is not None:
            raise UsageError("both sampler and batch_sampler are given", expected="one of them")
        self._sampler: Any = sampler if batch_sampler is None else batch_sampler
        self._gives_batches = batch_sampler is not None
        self._stateful = _has_state(self._sampler)
        self._drawn: deque[tuple[Any, bool]] = deque()
        self.is_exact = self._stateful or _is_torchs_own(self._sampler)
        if not self._stateful and not hasattr(self._sampler, "__len__"):
            raise UsageError(
                f"the sampler {type(self._sampler).__name__} has no length, and no state to resume it from",
                expected="__len__, or state_dict and load_state_dict",
            )
        super().__init__(dataset, shuffle=False, **options)
        self._full_batch = None  # the order is the sampler's

    @property
    def length(self) -> int | None:
        if not _is_torchs_own(self._sampler):
            return None  # it may be another one in each epoch
        count = len(self._sampler)
        if self._gives_batches:
            return count
        return count // self.batch_size if self.drop_last else -(-count // self.batch_size)

    def restore(self, state: Any) -> None:
        self.state = state  # of a checkpoint that is taken before the first batch
        if self._stateful and state is not None:
            self._sampler.load_state_dict(copy.deepcopy(state))

    def probe(self) -> Any:
        return self._sampler.state_dict() if self._stateful else None

    def index_batches(self, epoch: int, start: int) -> Iterator[np.ndarray]:
        """The indices of each batch from the `start`-th of the epoch on; a sampler with a state knows where it is."""
        if hasattr(self._sampler, "set_epoch"):
            self._sampler.set_epoch(epoch)
        if self._stateful:
            yield from self._remembered(self._in_batches(self._sampler))
            return
        with preserved_generators():
            seed_generators(seed := derive(self.seed, self.stream, epoch, "order"))
            for each in (self._sampler, getattr(self._sampler, "sampler", None)):
                if isinstance(generator := getattr(each, "generator", None), torch.Generator):
                    generator.manual_seed(seed)
            # At once: later the generators are the training's.
            drawn = list(self._sampler)
        yield from self._remembered(islice(self._in_batches(drawn), start, None))

    def _in_batches(self, drawn: Iterable[Any]) -> Iterator[np.ndarray]:
        if self._gives_batches:
            yield from (np.asarray(batch, dtype=np.int64) for batch in drawn)
            return
        indices = iter(drawn)
        while batch := list(islice(indices, self.batch_size)):
            if len(batch) == self.batch_size or not self.drop_last:
                yield np.asarray(batch, dtype=np.int64)

    def _remembered(self, batches: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        """The batches, each with the state after it noted; after the last one it is that of the next epoch."""
        self._drawn.clear()
        batch = next(batches, None)
        while batch is not None:
            state = copy.deepcopy(self.probe())  # it may refer to what the next batch changes
            following = next(batches, None)
            if following is None:
                state = copy.deepcopy(self.probe())
            self._drawn.append((state, following is None))
            yield batch
            batch = following

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Any]:
        for batch in super().epoch(epoch, start):
            self.state, self.at_end = self._drawn.popleft()
            yield batch


class Stream:
    """The batches of an `IterableDataset`, each built from start to end in one place, with a seed of its own.

    With N workers each reads a stream of its own, as torch has it; the batches come from them in turn. So the
    place is one state for each worker, and whose turn it is.

    Args:
        dataset: Exact if it has `state_dict` and `load_state_dict`: loaded into a fresh one, iterating it must
            go on behind the last sample. Without, a resume reads again and drops what was used.
        batch_size: Samples in a batch; the last one of a worker may be smaller.
        seed: Decides augmentation, together with `stream`.
        drop_last: Leave out smaller batches.
        stream: As in `Batches`.
        loader: As in `Batches`.

    Attributes:
        state: Where the data stands after the last batch that was taken; loadable by `restore`.
        at_end: Whether that batch was the last one of its epoch.
    """

    draws = True
    length = None

    def __init__(
        self,
        dataset: IterableDataset[Any],
        *,
        batch_size: int,
        seed: int,
        drop_last: bool = False,
        stream: str = "train",
        loader: Mapping[str, Any] | None = None,
    ) -> None:
        if batch_size < 1:
            raise UsageError(f"batch_size is {batch_size}", expected="1 or more")
        options = dict(loader or {})
        self.dataset = dataset
        self.batch_size = batch_size
        self.is_exact = _has_state(dataset)
        self.state: dict[str, Any] | None = None
        self.at_end = False
        self._reading = _Reading(
            dataset, batch_size, seed, stream, options.pop("collate_fn", None), drop_last
        )
        self._loader = loading(self._reading, batch_size=None, collate_fn=as_is, **options)
        self._workers = max(1, self._loader.num_workers)

    @property
    def facts(self) -> dict[str, int]:
        """What must be as it was for a resume in the middle of an epoch."""
        return {"batch_size": self.batch_size, "streams": self._workers}

    def restore(self, state: Any) -> None:
        """Go on behind the batch after which `state` was taken.

        Raises:
            UsageError: Another number of workers read the stream.
        """
        self.state = state
        if state is None or len(state["places"]) == self._workers:
            return
        if self.is_exact:
            raise UsageError(
                f"the stream was read by {len(state['places'])} workers, and is to be read by {self._workers}",
                expected="as many: each of them stands elsewhere in a stream of its own",
                try_next=f'loader={{"num_workers": {len(state["places"])}}}',
            )
        self.state = None  # at the beginning of an epoch, where there is nothing to skip

    def probe(self) -> Any:
        """A state such as will be saved, to find out early whether it can be."""
        return self.dataset.state_dict() if self.is_exact else None  # type: ignore[attr-defined]

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Any]:  # noqa: ARG002 - the state knows better
        """The batches of one epoch, from where `state` stands on."""
        places = self._places(epoch)
        self._reading.epoch, self._reading.places = epoch, places
        self._reading.turn = turn = (self.state or {}).get("turn", 0) if places else 0
        places = places or [[0, None] for _ in range(self._workers)]
        with preserved_generators():
            items = iter(self._loader if self._loader.num_workers else self._reading)
        pending: list[Any] = []
        for worker, kind, batch, place in items:
            if kind == _FILLER:
                continue
            if kind != _END and pending:
                yield self._taken(*pending, at_end=False)
            places = [*places[:worker], place, *places[worker + 1 :]]
            if kind != _END:
                turn = (worker + 1) % self._workers
                pending = [batch, epoch, places, turn]
        if pending:
            yield self._taken(pending[0], epoch + 1, [[0, state] for _, state in places], 0, at_end=True)

    def close(self) -> None:
        """End what stays between epochs."""
        end_workers(self._loader)

    def _places(self, epoch: int) -> list[list[Any]]:
        if self.state is None:
            return []
        places: list[list[Any]] = self.state["places"]
        return places if self.state["epoch"] == epoch else []

    def _taken(self, batch: Any, epoch: int, places: list[Any], turn: int, *, at_end: bool) -> Any:
        self.state, self.at_end = {"epoch": epoch, "places": places, "turn": turn}, at_end
        return batch


class _Reading(IterableDataset[Any]):
    """Reads one worker's stream, in that worker: (worker, kind, batch, [batches read, state])."""

    def __init__(
        self,
        dataset: IterableDataset[Any],
        batch_size: int,
        seed: int,
        stream: str,
        collate: Any,
        drop_last: bool,
    ) -> None:
        self.dataset = dataset
        self.batch_size = batch_size
        self.seed = seed
        self.stream = stream
        self.collate = collate or default_collate
        self.drop_last = drop_last
        self.epoch = 0
        self.places: list[list[Any]] = []
        self.turn = 0

    def __iter__(self) -> Iterator[tuple[int, str, Any, Any]]:
        info = get_worker_info()
        worker = info.id if info else 0
        count, state = self.places[worker] if self.places else (0, None)
        if worker < self.turn:
            yield worker, _FILLER, None, None  # another worker's batch comes first
        stateful = _has_state(self.dataset)
        if stateful and state is not None:
            self.dataset.load_state_dict(copy.deepcopy(state))  # type: ignore[attr-defined]
        samples = iter(()) if count == _ENDED else self._samples(worker)
        for number in range(max(count, 0) if stateful else 0, 1 << 62):
            with one_thread():
                seed_generators(derive(self.seed, self.stream, self.epoch, worker, number))
                batch = list(islice(samples, self.batch_size))
                if not batch and state is not None and number == count == 0:
                    # The state is that of an exhausted data set, which begins anew when it is asked again.
                    samples = iter(self.dataset)
                    batch = list(islice(samples, self.batch_size))
                if len(batch) < self.batch_size and (self.drop_last or not batch):
                    break
                # A short one has met the end, and the state after it is that of the next epoch.
                place = [number + 1 if len(batch) == self.batch_size else _ENDED, self._said(stateful)]
                collated = self.collate(batch) if number >= count else None
            # Outside, where a step of the training may use more than one thread.
            if number >= count:
                yield worker, "batch", collated, place
        self.epoch += 1  # a worker that persists is not told
        self.places, self.turn = [], 0
        yield worker, _END, None, [_ENDED, self._said(stateful)]

    def _samples(self, worker: int) -> Iterator[Any]:
        with one_thread():
            seed_generators(derive(self.seed, self.stream, self.epoch, worker, "start"))
            return iter(self.dataset)

    def _said(self, stateful: bool) -> Any:
        # A copy, because it may refer to what the next batch changes.
        return copy.deepcopy(self.dataset.state_dict()) if stateful else None  # type: ignore[attr-defined]


_beginnings: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()


def rewound(dataset: Dataset[Any]) -> Dataset[Any]:
    """The data set, set back to where it stood when it first came here, if it is a stream that can be."""
    if isinstance(dataset, IterableDataset) and _has_state(dataset):
        if dataset not in _beginnings:
            _beginnings[dataset] = copy.deepcopy(dataset.state_dict())  # type: ignore[attr-defined]
        dataset.load_state_dict(copy.deepcopy(_beginnings[dataset]))  # type: ignore[attr-defined]
    return dataset


def _has_state(thing: Any) -> bool:
    return hasattr(thing, "state_dict") and hasattr(thing, "load_state_dict")


def _is_torchs_own(sampler: Any) -> bool:
    """Whether all that a sampler draws is seeded by the epoch."""
    inner = sampler.sampler if type(sampler) is BatchSampler else sampler
    return type(inner).__module__ == torchs_own.__name__
