"""What a training step frees stays with the process."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
import torch
from tracked.allocator import keep_freed_memory

print(keep_freed_memory() if sys.argv[1] == "kept" else None)
def step():
    "As much as a step of a middling network: 160 MB in tensors of 20 MB, freed again."
    tensors = [torch.ones(5_000_000) for _ in range(8)]
for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str, **environment: str) -> tuple[str, int]:
    """Whether memory is kept, and the page faults of a step."""
    done = subprocess.run(
        [sys.executable, "-c", FAULTS, how],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    kept, found = done.stdout.split()
    return kept, int(found)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"), reason="glibc's allocator")
def test_a_step_takes_the_memory_that_the_last_one_freed() -> None:
    # Left to itself glibc may keep it or not, by what happens to lie at the end of the heap.
    _, without = faults("given back", MALLOC_TRIM_THRESHOLD_="131072")
    kept, with_it = faults("kept")
    assert kept == "True"
    assert without > 8 * 20_000_000 / os.sysconf("SC_PAGE_SIZE") / 2
    assert with_it < without / 100


def test_an_allocator_that_the_user_has_set_up_is_left_as_it_is() -> None:
    assert faults("kept", MALLOC_TRIM_THRESHOLD_="131072")[0] == "False"
