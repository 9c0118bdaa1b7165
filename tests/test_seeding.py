"""Randomness as a function of numbers, and the settings that decide bits."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch

from tests.trainings import draw_everywhere, scatter_generators
from tracked.checkpoint import check_loadable
from tracked.seeding import (
    derive,
    determinism,
    differences,
    environment,
    generator_states,
    one_thread,
    preserved_generators,
    restore_determinism,
    restore_generators,
    seed_generators,
    seeds,
)


@pytest.fixture(autouse=True)
def as_found() -> Iterator[None]:
    before = determinism()
    yield
    restore_determinism(before)


def test_a_derived_seed_is_the_same_in_every_process_and_another_for_other_parts() -> None:
    script = "from tracked.seeding import derive; print(derive(1, 'train', 2, 3))"
    # Strings hash differently in each process; seeds must not.
    found = {
        subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    }
    assert found == {f"{derive(1, 'train', 2, 3)}\n"}
    parts: list[tuple[int | str, ...]] = [(1, 23), (12, 3), ("1", 23), (1, "23"), (1, 2, 3), (123,), (1, 24)]
    assert len({derive(*each) for each in parts}) == len(parts)
    assert all(0 <= derive(*each) < 2**64 for each in parts)


def test_the_numbers_of_a_base_give_seeds_that_differ_also_where_torch_looks() -> None:
    # SplitMix64's published values for the seed 1234567, which is the base here.
    assert list(islice(seeds(1234567, 1), 2)) == [6457827717110365317, 3203168211198807973]
    low = {number & 0xFFFFFFFF for number in islice(seeds(derive(0, "step"), 0), 10_000)}
    assert list(islice(seeds(5, 1000), 3)) == list(islice(seeds(5, 1), 1002))[999:]
    assert len(low) > 9_980  # torch's generator on the CPU is seeded by 32 bits


@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**64 - 1])
def test_one_seed_decides_all_three_generators(seed: int) -> None:
    def drawn() -> tuple[float, float, float, float]:
        seed_generators(seed)
        return random.random(), float(np.random.normal()), float(torch.randn(())), float(np.random.normal())

    first = drawn()
    scatter_generators()
    assert drawn() == first


def test_a_seed_given_to_torch_is_the_one_that_manual_seed_would_give() -> None:
    seed_generators(derive("x"))
    found = torch.rand(5)
    torch.manual_seed(derive("x"))
    assert found.equal(torch.rand(5))


def test_generator_states_are_plain_data_and_come_back_mid_stream() -> None:
    # Half of a pair of normal numbers, which Python and NumPy keep back, is state too.
    random.gauss(0, 1), np.random.normal(), torch.randn(1)
    states = generator_states()
    check_loadable({"step": 0, "generators": states})
    expected = [(random.gauss(0, 1), np.random.normal(), float(torch.randn(()))) for _ in range(3)]
    scatter_generators()
    restore_generators(states)
    assert [(random.gauss(0, 1), np.random.normal(), float(torch.randn(()))) for _ in range(3)] == expected


def test_generators_are_left_as_they_were_found_also_after_an_error() -> None:
    seed_generators(5)
    expected = draw_everywhere()
    seed_generators(5)

    def fail() -> None:
        with preserved_generators():
            draw_everywhere()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert draw_everywhere() == expected


def test_under_one_thread_there_is_one_and_afterwards_as_many_as_before() -> None:
    torch.set_num_threads(2)

    def fail() -> None:
        with one_thread():
            assert torch.get_num_threads() == 1
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert torch.get_num_threads() == 2


OTHERWISE: dict[str, tuple[Callable[[], object], Any]] = {
    "threads": (lambda: torch.set_num_threads(2), 2),
    "deterministic": (lambda: torch.use_deterministic_algorithms(mode=True), True),
    "cudnn_benchmark": (lambda: setattr(torch.backends.cudnn, "benchmark", True), True),
    "float32_matmul_precision": (lambda: torch.set_float32_matmul_precision("high"), "high"),
    "cudnn_tf32": (lambda: setattr(torch.backends.cudnn, "allow_tf32", False), False),
    "flush_denormals": (lambda: torch.set_flush_denormal(True), True),
    "default_dtype": (lambda: torch.set_default_dtype(torch.float64), "float64"),
}


@pytest.mark.parametrize("name", OTHERWISE)
def test_a_setting_that_decides_bits_is_seen_and_put_back(name: str) -> None:
    torch.set_num_threads(1)
    change, value = OTHERWISE[name]
    before = determinism()
    change()
    changed = determinism()
    assert differences(before, changed) == [f"{name}: {before[name]} -> {value}"]
    restore_determinism(before)
    assert determinism() == before
    restore_determinism(changed)
    assert determinism() == changed


def test_the_environment_names_what_cannot_be_put_back() -> None:
    found = environment(torch.device("cpu"))
    assert found["torch"] == torch.__version__
    assert found["device"] == "cpu"
    assert found["cpu"]
    assert differences({"a": 1, "b": 2}, {"a": 1, "c": 3}) == ["b: 2 -> None", "c: None -> 3"]
