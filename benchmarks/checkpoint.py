"""`meshwright bench checkpoint`: how long a save keeps training waiting, beside Orbax alone, in one process, in turns.

    stall      seconds until the arrays may change again
    whole      seconds until the checkpoint is committed
    flush      bytes over `whole`

Ours is Orbax's asynchronous save plus fingerprints and a manifest; `memory` is a snapshot in /dev/shm.

    meshwright bench checkpoint --megabytes 1000 --rounds 3
"""

import argparse
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

LEAF = 16  # megabytes of an array
Save = Callable[[Path], tuple[float, float]]  # directory -> (stall, whole)


def state_of(megabytes: int) -> Any:
    """A state of random arrays on the first device."""
    import jax
    import numpy as np

    from meshwright.parallel.state import TrainState

    draw = np.random.default_rng(0)
    params = {f"a{n}": draw.random((1024, 4096), np.float32) for n in range(max(megabytes // LEAF, 1))}
    return jax.device_put(TrainState(np.int32(0), params, {}, (), (), np.zeros(2, np.uint32)), jax.devices()[0])


def saves(state: Any, megabytes: int) -> dict[str, Save]:
    """Name -> a save of `state`, timed."""
    from orbax.checkpoint import v1 as ocp

    from meshwright.checkpoint.layouts import Layout
    from meshwright.checkpoint.memory import Memory
    from meshwright.checkpoint.storage import Storage, tree

    plain = Layout("plain", lambda path, shape: [(path, ())])
    memory = Memory(Path("/dev/shm") / f"meshwright-bench-{time.time_ns()}")
    memory.save(state, step=0, data={})  # its pages are there from now on
    memory.save(state, step=1, data={})

    def synchronous(directory: Path) -> tuple[float, float]:
        began = time.monotonic()
        ocp.save(directory / "1", tree(state))
        return (took := time.monotonic() - began), took

    def asynchronous(directory: Path) -> tuple[float, float]:
        began = time.monotonic()
        response = ocp.save_async(directory / "1", tree(state))
        stall = time.monotonic() - began
        response.result()
        return stall, time.monotonic() - began

    def ours(directory: Path) -> tuple[float, float]:
        storage = Storage(directory, layout=plain)
        began = time.monotonic()
        storage.save(state, step=1, data={})
        stall = time.monotonic() - began
        storage.close()
        return stall, time.monotonic() - began

    def snapshot(directory: Path) -> tuple[float, float]:
        del directory
        began = time.monotonic()
        memory.save(state, step=int(began * 1e6), data={})
        return (took := time.monotonic() - began), took

    snapshot.close = memory.clear
    return {"orbax": synchronous, "orbax asynchronous": asynchronous, "ours": ours, "memory": snapshot}


def main(arguments: Sequence[str]) -> None:
    """Measure and print JSON."""
    parser = argparse.ArgumentParser(prog="meshwright bench checkpoint", description=__doc__)
    parser.add_argument("--megabytes", type=int, default=1000, help="of the state")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()), help="where to save")
    options = parser.parse_args(arguments)
    ways = saves(state_of(options.megabytes), options.megabytes)
    seen: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    try:
        for number in range(options.rounds + 1):
            for name, save in ways.items():
                with tempfile.TemporaryDirectory(dir=options.directory) as directory:
                    times = save(Path(directory) / "checkpoints")
                    shutil.rmtree(Path(directory) / "checkpoints", ignore_errors=True)
                if number:  # the first round warms up
                    seen[name].append(times)
    finally:
        ways["memory"].close()
    print(json.dumps(summary(seen, options.megabytes), indent=1))


def summary(seen: dict[str, list[tuple[float, float]]], megabytes: int) -> dict[str, Any]:
    """Medians, and the stall of the others over ours."""
    result: dict[str, Any] = {"megabytes": megabytes}
    for name, times in seen.items():
        stall, whole = (statistics.median(column) for column in zip(*times, strict=True))
        result[name] = {"stall": round(stall, 4), "whole": round(whole, 4), "flush_mb_s": round(megabytes / whole)}
    for name in ("orbax", "orbax asynchronous"):
        result[f"stall of {name} over ours"] = round(result[name]["stall"] / result["ours"]["stall"], 2)
        result[f"stall of {name} over memory"] = round(result[name]["stall"] / result["memory"]["stall"], 2)
    return result
