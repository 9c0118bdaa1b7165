"""Randomness as a function of (seed, epoch, batch, step), and what else decides bits.

Before a batch is built, before a step and before an evaluation, generators are seeded from numbers
that are known at that moment, so a training that starts in the middle draws what the uninterrupted
one would have drawn. One exception, because a step may be shorter than seeding: where batches are
plain tensors, which nothing is drawn for, the steps' generators are streams whose states a checkpoint keeps.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

_SEEDS_AT_ONCE = 256


def derive(*parts: int | str) -> int:
    """A 64-bit seed that differs for every tuple of parts, the same in every process."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def seeds(base: int, first: int) -> Iterator[int]:
    """The 64-bit seeds of a base for `first` and all numbers after it: different for every number below 2^64.

    SplitMix64 (Steele, Lea, Flood: "Fast Splittable Pseudorandom Number Generators", 2014), in blocks, because
    a hash as in `derive` costs a step twenty times as much.
    """
    block = np.arange(_SEEDS_AT_ONCE, dtype=np.uint64)
    while True:
        z = np.uint64(base) + (np.uint64(first) + block) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        yield from (z ^ (z >> np.uint64(31))).tolist()
        first += _SEEDS_AT_ONCE


def seed_generators(seed: int) -> None:
    """Seed Python's, NumPy's and torch's global generators (CUDA's once it is in use).

    `torch.manual_seed` would do the same for torch, in 266 µs instead of 1.3 µs.
    """
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        for generator in torch.cuda.default_generators:
            generator.manual_seed(seed)


def generator_states() -> dict[str, Any]:
    """The states of the global generators, in types that `weights_only` loading accepts."""
    numpy_state = np.random.get_state(legacy=False)
    key = numpy_state["state"]["key"]
    version, internal, gauss = random.getstate()
    states: dict[str, Any] = {
        # A tensor, because a checkpoint takes longer for 625 numbers than for one tensor of them.
        "python": {"version": version, "internal": torch.from_numpy(np.array(internal)), "gauss": gauss},
        "numpy": {
            "key": torch.from_numpy(key.astype(np.int64)),
            "pos": int(numpy_state["state"]["pos"]),
            "has_gauss": int(numpy_state["has_gauss"]),
            "gauss": float(numpy_state["gauss"]),
        },
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state_all()
    return states


def have_drawn(states: Mapping[str, Any]) -> bool:
    """Whether Python's or NumPy's generator has moved since `generator_states` took `states`."""
    present = generator_states()
    return any(
        not torch.equal(value, found) if isinstance(value, torch.Tensor) else value != found
        for name in ("python", "numpy")
        for value, found in zip(states[name].values(), present[name].values(), strict=True)
    )


def restore_generators(states: Mapping[str, Any]) -> None:
    """Put back what `generator_states` took."""
    python = states["python"]
    random.setstate((python["version"], tuple(python["internal"].tolist()), python["gauss"]))
    numpy_state = states["numpy"]
    np.random.set_state(
        {
            "bit_generator": "MT19937",
            "state": {"key": numpy_state["key"].numpy().astype(np.uint32), "pos": numpy_state["pos"]},
            "has_gauss": numpy_state["has_gauss"],
            "gauss": numpy_state["gauss"],
        }
    )
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.device_count() == len(states["cuda"]):
        torch.cuda.set_rng_state_all(states["cuda"])


@contextmanager
def preserved_generators() -> Iterator[None]:
    """Leave the global generators as they were found."""
    states = generator_states()
    try:
        yield
    finally:
        restore_generators(states)


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute as a DataLoader worker does: `fft` and `qr` differ in their last bits otherwise."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def determinism() -> dict[str, Any]:
    """The settings of this process that change the bits of a result."""
    return {
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "cudnn_tf32": torch.backends.cudnn.allow_tf32,
        "flush_denormals": bool(torch.tensor(1e-40) * 1.0 == 0.0),
        "default_dtype": str(torch.get_default_dtype()).removeprefix("torch."),
    }


def restore_determinism(settings: Mapping[str, Any]) -> None:
    """Put back what `determinism` took."""
    torch.set_num_threads(settings["threads"])
    torch.use_deterministic_algorithms(settings["deterministic"], warn_only=True)
    torch.backends.cudnn.benchmark = settings["cudnn_benchmark"]
    torch.set_float32_matmul_precision(settings["float32_matmul_precision"])
    torch.backends.cudnn.allow_tf32 = settings["cudnn_tf32"]
    torch.set_flush_denormal(settings["flush_denormals"])
    torch.set_default_dtype(getattr(torch, settings["default_dtype"]))


def make_deterministic() -> None:
    """Prefer deterministic kernels where there are any; cuBLAS needs its workspace fixed for it."""
    torch.use_deterministic_algorithms(mode=True, warn_only=True)
    torch.backends.cudnn.benchmark = False


def environment(device: torch.device) -> dict[str, str]:
    """What cannot be restored but decides bits: torch's build, vector kernels, the device."""
    about = {
        "torch": str(torch.__version__),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "device": device.type,
    }
    if device.type == "cuda":
        about["gpu"] = torch.cuda.get_device_name(device)
        about["cuda"] = str(torch.version.cuda)
    return about


def differences(recorded: Mapping[str, Any], present: Mapping[str, Any]) -> list[str]:
    """What differs, as `name: recorded -> present` lines."""
    return [
        f"{name}: {recorded.get(name)} -> {present.get(name)}"
        for name in sorted({*recorded, *present})
        if recorded.get(name) != present.get(name)
    ]
