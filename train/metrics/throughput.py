"""Throughput of a run: seconds per step, tokens per second, model FLOPs utilisation, and the time of the host.

MFU = model FLOPs per second / peak of all devices (PaLM, arXiv:2204.02311, appendix B). The peak is that of
`logging.peak_tflops`, or of the hardware target (`configs/hardware/`), or, on a CPU, whose simulated devices share its
cores, measured.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from ...configs.hardware_targets import find_target
from ...configs.run import RunConfig


@dataclass
class Meter:
    """Measures throughput between calls of `lap`."""

    positions: int  # tokens of a step, padding included
    flops_per_token: float
    peak: float | None  # FLOP/s of all devices together; None if unknown
    host_seconds: float = 0.0  # since the last lap, in `host()`: the host does not wait for a device
    last: float = field(default_factory=time.perf_counter)

    @classmethod
    def from_config(cls, config: RunConfig, plan: Mapping[str, Any]) -> "Meter":
        """Start the meter of a run with plan `plan`."""
        positions = config.data.global_batch * config.data.sequence_length
        return cls(positions, plan["model_flops_per_token"], peak_flops(config, plan["devices"]))

    @contextmanager
    def host(self) -> Iterator[None]:
        """Count the time inside as the host's."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.host_seconds += time.perf_counter() - began

    def restart(self) -> None:
        """Drop the time since the last lap, which was spent on saving or evaluating."""
        self.last, self.host_seconds = time.perf_counter(), 0.0

    def lap(self) -> dict[str, float]:
        """Return step_seconds, host_seconds, tokens_per_second and mfu since the last lap."""
        now = time.perf_counter()
        seconds, self.last = now - self.last, now
        host, self.host_seconds = self.host_seconds, 0.0
        rate = self.positions / seconds
        values = {"step_seconds": seconds, "host_seconds": host, "tokens_per_second": rate}
        if self.peak is not None:
            values["mfu"] = rate * self.flops_per_token / self.peak
        return values


def peak_flops(config: RunConfig, devices: Sequence[Mapping[str, Any]]) -> float | None:
    """FLOP/s of bfloat16 products of all `devices` of a plan together; None if unknown."""
    if config.logging.peak_tflops is not None:
        return config.logging.peak_tflops * 1e12 * len(devices)
    if devices[0]["platform"] == "cpu":
        # Processes that share the cores would disturb each other's measurement.
        return measure_matmul() if jax.process_count() == 1 else None
    target = find_target(devices[0]["kind"])
    return None if target is None else target.peak_flops["bfloat16"] * len(devices)


def measure_matmul(size: int = 1024, *, repeats: int = 5, dtype: str = "float32") -> float:
    """Measure the FLOP/s of [size, size] products on one device, the best of `repeats`. A CPU uses all its cores."""
    matrix = jax.device_put(jnp.ones((size, size), jnp.dtype(dtype)), jax.local_devices()[0])
    product = jax.jit(lambda a: a @ a)
    product(matrix).block_until_ready()
    best = float("inf")
    for _ in range(repeats):
        began = time.perf_counter()
        product(matrix).block_until_ready()
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best
