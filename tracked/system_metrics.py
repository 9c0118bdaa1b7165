"""How busy the machine is, under MLflow's own names, which its interface shows in a tab of their own."""

from __future__ import annotations

import math
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from tracked.errors import UsageError
from tracked.packing import Point

INSTALL = 'pip install "tracked[system]"'

_EVERY = "MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL"
_MB = 1e6
_DEVICE_FILES = Path("/dev")


def sampling_seconds() -> float:
    """How often a sample is taken: MLflow's own variable for it, else 10 s.

    Raises:
        UsageError: The variable holds no such number.
    """
    text = os.environ.get(_EVERY) or "10"
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise UsageError(f"{_EVERY} is {text!r}", expected="seconds, above 0", try_next=f"export {_EVERY}=10")
    return seconds


class Monitor:
    """Samples processors, memory, disk, network, and NVIDIA's devices where `pynvml` finds any.

    The step of a sample is its number, as with MLflow: many may fall into one step of the training.

    Args:
        first: The number of the first sample: a resumed run counts on.

    Attributes:
        unseen: Why nothing is known of NVIDIA's devices, and what to do; empty where all is well, or none is here.

    Raises:
        ImportError: psutil is not installed.
        UsageError: See `sampling_seconds`.
    """

    def __init__(self, first: int) -> None:
        import psutil

        self._psutil = psutil
        self._number = first
        self._every = sampling_seconds()
        self._due = time.monotonic() + self._every
        self._network = self._traffic()
        self._nvml, self._devices, self.unseen = _devices()
        psutil.cpu_percent()  # the next one is the mean since this one

    def take(self) -> list[Point]:
        """The sample that is due; nothing if none is. May be called often, and from one thread."""
        now = time.monotonic()
        if now < self._due:
            return []
        self._due = now + self._every
        at, number = time.time_ns() // 1_000_000, self._number
        self._number += 1
        return [(f"system/{name}", number, at, round(value, 1)) for name, value in self._sample().items()]

    def _traffic(self) -> Any:
        """Bytes sent and received; None where there is no interface, which psutil's types do not know."""
        return self._psutil.net_io_counters()

    def _sample(self) -> dict[str, float]:
        memory, disk = self._psutil.virtual_memory(), self._psutil.disk_usage(os.sep)
        found: dict[str, float] = {
            "cpu_utilization_percentage": self._psutil.cpu_percent(),
            "system_memory_usage_megabytes": memory.used / _MB,
            "system_memory_usage_percentage": 100 * memory.used / memory.total,
            "disk_usage_megabytes": disk.used / _MB,
            "disk_available_megabytes": disk.free / _MB,
            "disk_usage_percentage": disk.percent,
        }
        if (network := self._traffic()) is not None and self._network is not None:
            found["network_receive_megabytes"] = (network.bytes_recv - self._network.bytes_recv) / _MB
            found["network_transmit_megabytes"] = (network.bytes_sent - self._network.bytes_sent) / _MB
        for index, device in enumerate(self._devices):
            # What a device does not tell, another may.
            with suppress(self._nvml.NVMLError):
                held = self._nvml.nvmlDeviceGetMemoryInfo(device)
                found[f"gpu_{index}_memory_usage_megabytes"] = held.used / _MB
                found[f"gpu_{index}_memory_usage_percentage"] = 100 * held.used / held.total
            with suppress(self._nvml.NVMLError):
                rates = self._nvml.nvmlDeviceGetUtilizationRates(device)
                found[f"gpu_{index}_utilization_percentage"] = float(rates.gpu)
            with suppress(self._nvml.NVMLError):
                watts = self._nvml.nvmlDeviceGetPowerUsage(device) / 1000
                limit = self._nvml.nvmlDeviceGetEnforcedPowerLimit(device) / 1000
                found[f"gpu_{index}_power_usage_watts"] = watts
                found[f"gpu_{index}_power_usage_percentage"] = 100 * watts / limit
        return found


def _devices() -> tuple[Any, list[Any], str]:
    """NVIDIA's library, its devices, and why there are none although the machine has some."""
    try:
        import pynvml  # type: ignore[import-not-found, unused-ignore]

        pynvml.nvmlInit()
        return pynvml, [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())], ""
    except ImportError:
        why = f"pynvml is missing\n  try: {INSTALL}"
    except Exception as error:  # noqa: BLE001 - no driver, or another than the library's: nothing can be sampled
        why = f"{error}\n  try: nvidia-smi"
    return None, [], why if any(_DEVICE_FILES.glob("nvidia[0-9]*")) else ""
