"""Batches that start anywhere, are built the same everywhere, and say what they cannot honour."""

from __future__ import annotations

import random
from collections import namedtuple
from contextlib import closing
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, Subset, TensorDataset

from tests.experiments.tiny import Noisy, mixed_up
from tracked.data import Batches, size, to_device
from tracked.errors import UsageError
from tracked.streams import batches_of
from tracked.training import compare_states

Pair = namedtuple("Pair", ["inputs", "targets"])  # noqa: PYI024 - as users write them


class Numbers(Dataset[int]):
    """Each sample is its own index."""

    def __init__(self, samples: int) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> int:
        return index


class Plain(Dataset[tuple[Tensor, ...]]):
    """A data set that hides what it is, so that its samples are fetched and collated one by one."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        found: tuple[Tensor, ...] = self.dataset[index]
        return found


def same(a: Any, b: Any) -> bool:
    return compare_states(a, b)[1] == []


def test_a_full_batch_in_the_datas_own_order_is_fresh_and_what_picking_its_samples_gives() -> None:
    data = TensorDataset(torch.arange(12.0).view(2, 6).T, torch.arange(6))
    full = Batches(data, batch_size=6, seed=0, shuffle=False)
    (found,) = full.epoch(0)
    (picked,) = Batches(Subset(data, range(6)), batch_size=6, seed=0, shuffle=False).epoch(0)
    assert same(found, picked)
    assert [each.stride() for each in found] == [each.stride() for each in picked]
    found[0].zero_()  # a step may do so
    assert same(next(full.epoch(1)), picked)
    assert list(full.epoch(0, start=1)) == []
    (sampled,) = batches_of(data, batch_size=6, seed=0, loader={"sampler": range(5, -1, -1)}).epoch(0)
    assert sampled[1].tolist() == [5, 4, 3, 2, 1, 0]


# -- order


@given(
    samples=st.integers(1, 60),
    batch_size=st.integers(1, 20),
    seed=st.integers(0, 2**63),
    epoch=st.integers(0, 1000),
    drop_last=st.booleans(),
    start=st.integers(0, 60),
)
@settings(max_examples=60, deadline=None)
def test_an_epoch_is_a_permutation_and_starts_anywhere(
    samples: int, batch_size: int, seed: int, epoch: int, drop_last: bool, start: int
) -> None:
    if drop_last and samples < batch_size:
        return
    batches = Batches(Numbers(samples), batch_size=batch_size, seed=seed, drop_last=drop_last)
    whole = [batch.tolist() for batch in batches.epoch(epoch)]
    assert len(whole) == batches.length
    drawn = [index for batch in whole for index in batch]
    if drop_last:
        assert len({*drawn}) == len(drawn) == samples // batch_size * batch_size
    else:
        assert sorted(drawn) == list(range(samples))
    assert all(len(batch) == batch_size for batch in whole[:-1])
    assert [batch.tolist() for batch in batches.epoch(epoch, start)] == whole[start:]


def test_each_epoch_seed_and_stream_has_an_order_of_its_own() -> None:
    orders = {
        tuple(Batches(Numbers(50), batch_size=7, seed=seed, stream=stream).order(epoch).tolist())
        for seed in (0, 1)
        for stream in ("train", "eval")
        for epoch in (0, 1, 2)
    }
    assert len(orders) == 12


def test_without_shuffling_the_order_is_the_data_sets_own() -> None:
    batches = Batches(Numbers(7), batch_size=3, seed=1, shuffle=False)
    assert [batch.tolist() for batch in batches.epoch(5)] == [[0, 1, 2], [3, 4, 5], [6]]


def test_the_order_does_not_hang_on_the_state_of_any_generator() -> None:
    batches = Batches(Numbers(50), batch_size=7, seed=3)
    first = batches.order(4)
    torch.rand(1), np.random.random(), random.random()
    assert (batches.order(4) == first).all()


# -- how a batch is built


@pytest.mark.parametrize(("noise", "collate"), [("python", False), ("numpy", False), ("torch", True)])
@pytest.mark.parametrize("start", [0, 2])
def test_workers_build_what_the_main_process_builds(noise: str, collate: bool, start: int) -> None:
    def built(workers: int) -> list[Any]:
        loader = {"num_workers": workers, **({"collate_fn": mixed_up} if collate else {})}
        return list(Batches(Noisy(22, noise), batch_size=5, seed=1, loader=loader).epoch(1, start))

    expected = built(0)
    assert same(expected, built(2))
    assert same(expected, built(3))
    assert len(expected) == 5 - start


def test_persistent_workers_go_from_epoch_to_epoch() -> None:
    options = {"num_workers": 2, "persistent_workers": True, "prefetch_factor": 4}
    with_workers = Batches(Noisy(22, "torch"), batch_size=5, seed=1, loader=options)
    without = Batches(Noisy(22, "torch"), batch_size=5, seed=1)
    with closing(with_workers):
        for epoch, start in ((0, 3), (1, 0), (2, 1)):
            assert same(list(with_workers.epoch(epoch, start)), list(without.epoch(epoch, start)))


def test_the_same_sample_is_augmented_anew_in_every_epoch() -> None:
    batches = Batches(Noisy(4, "torch"), batch_size=4, seed=1, shuffle=False)
    (first, _), (second, _) = next(batches.epoch(0)), next(batches.epoch(1))
    assert not first.equal(second)


def test_workers_leave_the_generators_of_the_main_process_alone() -> None:
    batches = Batches(Noisy(10, "torch"), batch_size=5, seed=1, loader={"num_workers": 1})
    before = torch.get_rng_state(), random.getstate()
    list(batches.epoch(0))
    assert torch.get_rng_state().equal(before[0])
    assert random.getstate() == before[1]


TENSORS = TensorDataset(
    torch.randn(23, 3, 4, 5).to(memory_format=torch.channels_last),
    torch.randint(0, 9, (23,)),
    torch.randn(23, 6, dtype=torch.float64)[:, ::2],
    torch.rand(23, 1) > 0.5,
)


@pytest.mark.parametrize(
    "dataset",
    [
        TENSORS,
        Subset(TENSORS, [5, 3, 3, 22, 0, 7, 1]),
        Subset(TENSORS, range(4, 20)),
        Subset(Subset(TENSORS, range(4, 20)), [3, 1, 2]),
    ],
    ids=["tensors", "a subset", "a range", "a subset of a subset"],
)
def test_tensors_fetched_whole_are_those_fetched_one_by_one(dataset: Dataset[Any]) -> None:
    whole = list(Batches(dataset, batch_size=4, seed=2).epoch(1))
    one_by_one = list(Batches(Plain(dataset), batch_size=4, seed=2).epoch(1))
    # Dtypes, shapes and strides too.
    assert same(whole, one_by_one)


def test_a_batch_is_a_fresh_tensor_and_no_view_of_the_data() -> None:
    data = TensorDataset(torch.zeros(8, 2))
    (batch,) = next(Batches(data, batch_size=8, seed=1, shuffle=False).epoch(0))
    batch += 1
    assert data.tensors[0].eq(0).all()


class Augmenting(TensorDataset):
    def __getitem__(self, index: Any) -> Any:
        return tuple(tensor[index] + torch.rand(()) for tensor in self.tensors)


def test_a_subclass_that_augments_is_asked_for_its_samples() -> None:
    data = torch.zeros(8, 2)
    (batch,) = next(Batches(Augmenting(data), batch_size=8, seed=1).epoch(0))
    assert batch.gt(0).all()


class Whole(Numbers):
    asked: list[list[int]]

    def __getitems__(self, indices: list[int]) -> list[int]:
        self.asked.append(indices)
        return indices


def test_a_data_set_that_gives_whole_batches_is_asked_for_them() -> None:
    data = Whole(6)
    data.asked = []
    assert [batch.tolist() for batch in Batches(data, batch_size=4, seed=1).epoch(0)] == data.asked


def test_batches_are_built_under_one_thread() -> None:
    threads: list[int] = []

    def collate(samples: list[int]) -> list[int]:
        threads.append(torch.get_num_threads())
        return samples

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        list(Batches(Numbers(3), batch_size=3, seed=1, loader={"collate_fn": collate}).epoch(0))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert threads == [1]


# -- what can be honoured, and what cannot


@pytest.mark.parametrize(
    ("loader", "said"),
    [
        ({"batch_size": 3}, "batch_size="),
        ({"shuffle": False}, "shuffle="),
        ({"drop_last": True}, "drop_last="),
        ({"dataset": []}, "the data set"),
        ({"generator": torch.Generator()}, "seed="),
        ({"num_wokers": 2}, "num_wokers"),
        ({"num_workers": -1}, "num_workers"),
        ({"prefetch_factor": 2}, "prefetch_factor"),
        ({"persistent_workers": True}, "persistent_workers"),
        ({"num_workers": 2, "in_order": False}, "in_order=True"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_an_argument_that_cannot_be_honoured_is_refused_by_name(loader: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError) as refused:
        Batches(Numbers(6), batch_size=3, seed=1, loader=loader)
    assert said in str(refused.value)


class Endless(IterableDataset[int]):
    def __iter__(self) -> Any:
        return iter([1])


class Unmeasured(Dataset[int]):
    def __getitem__(self, index: int) -> int:
        return index


@pytest.mark.parametrize("dataset", [Endless(), Unmeasured()])
def test_data_without_a_length_is_refused_with_a_way_out(dataset: Dataset[int]) -> None:
    with pytest.raises(UsageError, match=r"run\.steps"):
        Batches(dataset, batch_size=2, seed=1)


@pytest.mark.parametrize(
    ("samples", "options"),
    [(0, {"batch_size": 2}), (1, {"batch_size": 2, "drop_last": True}), (3, {"batch_size": 0})],
)
def test_data_that_gives_no_batch_is_refused(samples: int, options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        Batches(Numbers(samples), seed=1, **options)


# -- sizes and devices

_IMAGE = torch.zeros(3, 4, 4)


class Own:
    """A batch of a class of one's own."""

    def __init__(self, inputs: torch.Tensor, targets: torch.Tensor) -> None:
        self.inputs, self.targets = inputs, targets


@pytest.mark.parametrize(
    ("batch", "samples"),
    [
        (torch.zeros(5, 2), 5),
        (torch.tensor(1.0), 1),
        ([torch.zeros(5, 2), torch.zeros(5)], 5),
        ((torch.zeros(5, 2), torch.zeros(5)), 5),
        (Pair(torch.zeros(5, 2), torch.zeros(5)), 5),
        ({"ids": torch.zeros(5, 7), "mask": torch.zeros(5, 7)}, 5),
        ([{"a": torch.zeros(5, 7)}, torch.zeros(5)], 5),
        ([[torch.zeros(5, 2), torch.zeros(5, 3)], torch.zeros(5)], 5),
        (((_IMAGE, _IMAGE), ({"boxes": torch.zeros(7, 4)}, {})), 2),
        ([(_IMAGE, _IMAGE), ({}, {})], 2),
        (([_IMAGE, _IMAGE], [{"boxes": torch.zeros(7, 4)}, {}]), 2),
        ([(_IMAGE, {}), (_IMAGE, {}), (_IMAGE, {}), (_IMAGE, {})], 4),
        (Own(torch.zeros(5, 2), torch.zeros(5)), 5),
        (["one", "two"], 2),
        ({"text": ["one", "two"]}, 2),
        ([["one", "two"], torch.zeros(2)], 2),
        ([], 1),
        (None, 1),
    ],
)
def test_the_size_of_a_batch_is_its_number_of_samples(batch: Any, samples: int) -> None:
    assert size(batch) == samples


class Movable:
    def __init__(self, device: str = "cpu") -> None:
        self.device = device

    def to(self, device: torch.device) -> Movable:
        return Movable(device.type)


def test_every_tensor_goes_to_the_device_whatever_the_nesting() -> None:
    batch = {
        "pair": Pair(torch.zeros(2), [torch.zeros(1), "text"]),
        "tuple": (torch.zeros(3), 4),
        "own": Movable(),
        "plain": None,
    }
    moved = to_device(batch, torch.device("meta"))
    assert isinstance(moved["pair"], Pair)
    assert moved["pair"].inputs.is_meta
    assert moved["pair"].targets[0].is_meta
    assert moved["pair"].targets[1] == "text"
    assert isinstance(moved["tuple"], tuple)
    assert moved["tuple"][0].is_meta
    assert moved["tuple"][1] == 4
    assert moved["own"].device == "meta"
    assert moved["plain"] is None


def test_on_the_cpu_a_batch_is_left_as_it_is() -> None:
    batch = [torch.zeros(2)]
    assert to_device(batch, torch.device("cpu")) is batch
