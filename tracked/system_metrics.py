"""How busy the machine is, under MLflow's own names, which its interface shows in a tab of their own."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from typing import Any

from tracked.packing import Point

_MB = 1e6


def sampling_seconds() -> float:
    """How often a sample is taken: MLflow's own variable for it, else 10 s."""
    return float(os.environ.get("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL") or 10)


class Monitor:
    """Samples processors, memory, disk, network, and NVIDIA's devices where `pynvml` finds any.

    The step of a sample is its number, as with MLflow: many may fall into one step of the training.

    Args:
        first: The number of the first sample: a resumed run counts on.

    Raises:
        ImportError: psutil is not installed.
    """

    def __init__(self, first: int) -> None:
        import psutil

        self._psutil = psutil
        self._number = first
        self._due = time.monotonic() + sampling_seconds()
        self._network = self._traffic()
        self._nvml, self._devices = _devices()
        psutil.cpu_percent()  # the next one is the mean since this one

    def take(self) -> list[Point]:
        """The sample that is due; nothing if none is. May be called often, and from one thread."""
        now = time.monotonic()
        if now < self._due:
            return []
        self._due = now + sampling_seconds()
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


def _devices() -> tuple[Any, list[Any]]:
    """NVIDIA's library and its devices; none where either is missing."""
    try:
        import pynvml  # type: ignore[import-not-found, unused-ignore]

        pynvml.nvmlInit()
        return pynvml, [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
    except Exception:  # noqa: BLE001 - not installed, or no driver: whatever it is, there is nothing to sample
        return None, []
