"""Batches that can start anywhere: their order and their randomness are functions of numbers.

The order of an epoch is a permutation seeded from (seed, stream, epoch). A batch is built from
start to end in one place, with the generators seeded from (seed, stream, epoch, batch) and one
thread, whether that place is the main process or any of N workers. So "where the data stands" is
two integers, and the number of workers may change between two attempts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset, default_collate

from tracked.errors import UsageError
from tracked.seeding import derive, one_thread, preserved_generators, seed_generators

T = TypeVar("T")

# What `Batches` itself decides, and what therefore cannot be passed on to `DataLoader`.
_OWN = {
    "batch_size": "batch_size=",
    "shuffle": "shuffle=",
    "drop_last": "drop_last=",
    "dataset": "the data set",
    "generator": "seed=",
}


class Wanted(NamedTuple):
    """One batch to build: the seed of its randomness, and the samples (int64, `(batch_size,)`)."""

    seed: int
    indices: np.ndarray


class _Order:
    """The batch sampler: what an epoch still has to give, from batch `start` on."""

    def __init__(self, batches: Batches) -> None:
        self.batches = batches
        self.epoch = 0
        self.start = 0

    def __iter__(self) -> Iterator[Wanted]:
        owner = self.batches
        for batch, indices in enumerate(owner.index_batches(self.epoch, self.start), self.start):
            seed = derive(owner.seed, owner.stream, self.epoch, batch) if owner.draws else 0
            yield Wanted(seed, indices)


class _Built:
    """A data set whose items are whole batches, so that one place builds one batch."""

    def __init__(self, dataset: Dataset[Any], collate: Callable[[list[Any]], Any]) -> None:
        self.dataset = dataset
        self.collate = collate

    def __getitems__(self, wanted: Wanted) -> Any:
        with one_thread():
            seed_generators(wanted.seed)
            indices = wanted.indices.tolist()
            fetch = getattr(self.dataset, "__getitems__", None)
            samples = fetch(indices) if fetch else [self.dataset[index] for index in indices]
            return self.collate(samples)


class _Tensors:
    """The same for a `TensorDataset`: nothing random in it, and one indexing call for each tensor."""

    def __init__(self, tensors: Sequence[torch.Tensor], indices: Sequence[int] | None) -> None:
        self.tensors = tensors
        self.indices = None if indices is None else np.asarray(indices, dtype=np.int64)

    def __getitems__(self, wanted: Wanted) -> list[torch.Tensor]:
        indices = wanted.indices if self.indices is None else self.indices[wanted.indices]
        index = torch.from_numpy(indices)
        # Always a fresh tensor: a view at an odd offset changes the bits of a `linear`.
        return [tensor.index_select(0, index) for tensor in self.tensors]

    def all(self) -> list[torch.Tensor]:
        """All samples in the data's own order, as `__getitems__` would give them."""
        return [tensor.clone(memory_format=torch.contiguous_format) for tensor in self.tensors]


def as_is(batch: Any) -> Any:
    """What is a batch already, for a loader that would collate it."""
    return batch


def loading(source: Any, **options: Any) -> DataLoader[Any]:
    """A `DataLoader`.

    Raises:
        UsageError: An argument that it does not know, or that cannot be used.
    """
    if not options.get("in_order", True):
        raise UsageError(
            "loader has in_order=False, which makes the order of the batches a matter of luck",
            expected="in_order=True: a resume goes on with the very next batch",
        )
    try:
        return DataLoader(source, **options)
    except (TypeError, ValueError) as error:
        raise UsageError(
            f"loader cannot be used: {error}", expected="arguments of torch.utils.data.DataLoader"
        ) from None


def end_workers(loader: DataLoader[Any] | None) -> None:
    """End the workers that stay between epochs, if there are any.

    Left to the garbage collector, each would be waited for in vain for 5 s and then killed: in a cycle its
    queue is closed before it is told to end.
    """
    kept: Any = loader  # torch has no public name for it
    if kept is not None and kept._iterator is not None:  # noqa: SLF001
        kept._iterator._shutdown_workers()  # noqa: SLF001
        kept._iterator = None  # noqa: SLF001


class Batches:
    """The batches of a map-style data set, epoch by epoch.

    Args:
        dataset: Anything with `__len__` and `__getitem__` (or `__getitems__`, which is asked for a
            whole batch).
        batch_size: Samples in a batch; the last one of an epoch may be smaller.
        seed: Decides order and augmentation, together with `stream`.
        shuffle: A new permutation for each epoch; else the data set's own order.
        drop_last: Leave out a smaller last batch.
        stream: Keeps batches for different purposes apart ("train", "eval …").
        loader: Further arguments of `torch.utils.data.DataLoader`, such as `num_workers`.

    Attributes:
        state: Where the data stands after the last batch, if that is more than a number.
        at_end: Whether that batch was the last one of its epoch, if that is not known before.
        is_exact: Whether a resume goes on with the very next batch.

    Raises:
        UsageError: The data set has no length or no samples, or an argument cannot be honoured.
    """

    is_exact = True

    def __init__(
        self,
        dataset: Dataset[Any],
        *,
        batch_size: int,
        seed: int,
        shuffle: bool = True,
        drop_last: bool = False,
        stream: str = "train",
        loader: Mapping[str, Any] | None = None,
    ) -> None:
        options = dict(loader or {})
        _refuse(dataset, batch_size, options)
        self.dataset = dataset
        self.samples = len(dataset)  # type: ignore[arg-type]
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.drop_last = drop_last
        self.stream = stream
        self.state: Any = None
        self.at_end = False
        self._order = _Order(self)
        if self.length == 0:
            raise UsageError(
                f"the data set gives no batch: {self.samples} samples, batch size {batch_size}, "
                f"drop_last={drop_last}",
                expected="at least one batch",
            )
        collate = options.pop("collate_fn", None)
        self._built = _source(dataset, collate)
        # Also where it is not used, because it refuses what it does not know.
        loader_ = loading(self._built, batch_sampler=self._order, collate_fn=as_is, **options)
        self._loader = loader_ if loader_.num_workers or loader_.pin_memory else None
        # Copied at once, where picking its samples takes as long as a small step; what orders samples itself unsets it.
        is_full = not shuffle and batch_size >= self.samples and self._loader is None
        built = self._built if is_full and isinstance(self._built, _Tensors) else None
        self._full_batch = built if built and built.indices is None else None

    @property
    def draws(self) -> bool:
        """Whether building a batch may draw random numbers, and so leave the generators seeded by it."""
        return isinstance(self._built, _Built)

    @property
    def length(self) -> int | None:
        """Batches in an epoch; None if nobody knows."""
        whole = self.samples / self.batch_size
        return math.floor(whole) if self.drop_last else math.ceil(whole)

    @property
    def facts(self) -> dict[str, int]:
        """What must be as it was for a resume in the middle of an epoch."""
        return {"samples": self.samples, "batch_size": self.batch_size}

    def probe(self) -> Any:
        """A state such as will be saved, to find out early whether it can be."""
        return None

    def restore(self, state: Any) -> None:
        """Go on behind the batch after which `state` was taken."""

    def order(self, epoch: int) -> np.ndarray:
        """The samples of an epoch in the order of their use: int64, `(samples,)`."""
        if not self.shuffle:
            return np.arange(self.samples)
        generator = torch.Generator().manual_seed(derive(self.seed, self.stream, epoch, "order"))
        return torch.randperm(self.samples, generator=generator).numpy()

    def index_batches(self, epoch: int, start: int) -> Iterator[np.ndarray]:
        """The samples of each batch of an epoch, from batch number `start` on."""
        order = self.order(epoch)
        for first in range(start * self.batch_size, self.samples, self.batch_size):
            indices = order[first : first + self.batch_size]
            if len(indices) == self.batch_size or not self.drop_last:
                yield indices

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Any]:
        """The batches of one epoch, from batch number `start` on.

        Without workers a batch is built when it is asked for, and the global generators are left
        seeded by it.
        """
        self._order.epoch, self._order.start = epoch, start
        if self._full_batch and not start:
            yield self._full_batch.all()
        elif self._loader is None:
            for wanted in self._order:
                yield self._built.__getitems__(wanted)
        else:
            with preserved_generators():
                # The iterator's constructor draws a base seed from torch's global generator.
                batches = iter(self._loader)
            yield from batches

    def close(self) -> None:
        """End what stays between epochs."""
        end_workers(self._loader)


def _source(dataset: Dataset[Any], collate: Callable[[list[Any]], Any] | None) -> _Built | _Tensors:
    inner, indices = dataset, None
    if type(inner) is Subset:
        subset: Subset[Any] = inner
        inner, indices = subset.dataset, subset.indices
    # Exact types only: a subclass may augment in `__getitem__`.
    if type(inner) is TensorDataset and collate is None:
        return _Tensors(inner.tensors, indices)
    return _Built(dataset, collate or default_collate)


def _refuse(dataset: Dataset[Any], batch_size: int, options: Mapping[str, Any]) -> None:
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        raise UsageError(
            f"{type(dataset).__name__} has no length and no index, so no batch of it can be found again",
            expected="a map-style data set, with __len__ and __getitem__",
            try_next="IterableDataset as its base, or `for step in run.steps(n)`, where each step is seeded",
        )
    if batch_size < 1:
        raise UsageError(f"batch_size is {batch_size}", expected="1 or more")
    for name in options:
        if name in _OWN:
            raise UsageError(f"loader has {name!r}", expected=f"{_OWN[name]} beside it, not in loader")


def in_groups(items: Iterator[T], size: int) -> Iterator[tuple[T, ...]]:
    """Tuples of `size` items; the last one may be shorter."""
    if size == 1:
        return zip(items)
    return iter(lambda: tuple(islice(items, size)), ())


def size(batch: Any) -> int:
    """The number of samples in a batch: the first dimension of the first tensor or list in it."""
    outermost = True
    while True:
        if isinstance(batch, torch.Tensor):
            return len(batch) if batch.dim() else 1
        if isinstance(batch, Mapping):
            batch = next(iter(batch.values()), None)
        elif isinstance(batch, (list, tuple)) and batch:
            if outermost and (rows := _rows(batch)):
                return rows
            # A batch is a row of columns, inputs first. A tuple in it is a column of samples, as `zip(*samples)`
            # gives for pictures of different sizes; `default_collate` makes lists of columns.
            samples = type(batch) is tuple and not outermost
            if samples or not isinstance(batch[0], (torch.Tensor, Mapping, list, tuple)):
                return len(batch)
            batch = batch[0]
        elif hasattr(batch, "__dict__") and vars(batch):  # of a class of one's own
            batch = next(iter(vars(batch).values()))
        else:
            return 1
        outermost = False


def _rows(batch: Sequence[Any]) -> int:
    """The samples in lists such as `default_collate` never makes: of rows, or with a column of dicts; else 0."""
    if not all(isinstance(each, (list, tuple)) and each for each in batch):
        return 0
    if any(len({isinstance(part, Mapping) for part in each}) == 2 for each in batch):
        return len(batch)
    is_column = any(isinstance(each[0], Mapping) for each in batch) and len({*map(len, batch)}) == 1
    return len(batch[0]) if is_column else 0


def to_device(batch: Any, device: torch.device) -> Any:
    """The batch with every tensor in it on `device`, whatever the nesting."""
    if device.type == "cpu":
        return batch
    if isinstance(batch, torch.Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(to_device(value, device) for value in batch))
    if isinstance(batch, (list, tuple)):
        return type(batch)(to_device(value, device) for value in batch)
    return batch.to(device) if hasattr(batch, "to") else batch
