"""`meshwright bench checkpoint`: how long a save keeps training waiting, beside Orbax alone, in one process, in turns.

    stall      seconds until the arrays may change again
    whole      seconds until the checkpoint is committed
    flush      bytes over `whole`

Ours is a copy, and from it Orbax's asynchronous save plus fingerprints and a manifest; `memory` is the same copy, and
from it a snapshot in /dev/shm. The third part is a snapshot at every step of a second (`every_step.py`).

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

from .every_step import measure_slowdowns, random_state

Save = Callable[[Path], tuple[float, float]]  # directory -> (stall, whole)


def saves(state: Any, megabytes: int) -> dict[str, Save]:
    """Name -> a save of `state`, timed."""
    from orbax.checkpoint import v1 as ocp

    from meshwright.checkpoint.async_copy import donation_safe_copy
    from meshwright.checkpoint.layout_conversion import Layout
    from meshwright.checkpoint.memory_store import MemoryStore
    from meshwright.checkpoint.storage import Storage, saved_tree

    plain = Layout("plain", lambda path, shape: [(path, ())])
    memory = MemoryStore(Path("/dev/shm") / f"meshwright-bench-{time.time_ns()}")
    memory.save(state, step=0, data={})  # its pages are there from now on
    memory.save(state, step=1, data={})

    def synchronous(directory: Path) -> tuple[float, float]:
        began = time.monotonic()
        ocp.save(directory / "1", saved_tree(state))
        return (took := time.monotonic() - began), took

    def asynchronous(directory: Path) -> tuple[float, float]:
        began = time.monotonic()
        response = ocp.save_async(directory / "1", saved_tree(state))
        stall = time.monotonic() - began
        response.result()
        return stall, time.monotonic() - began

    def ours(directory: Path) -> tuple[float, float]:
        storage = Storage(directory, layout=plain)
        began = time.monotonic()
        storage.save(donation_safe_copy(state), step=1, data={})
        stall = time.monotonic() - began
        storage.close()
        return stall, time.monotonic() - began

    def snapshot(directory: Path) -> tuple[float, float]:
        del directory
        began = time.monotonic()
        copy = donation_safe_copy(state)
        stall = time.monotonic() - began
        memory.save(copy, step=int(began * 1e6), data={})
        return stall, time.monotonic() - began

    snapshot.close = memory.clear
    return {"orbax": synchronous, "orbax asynchronous": asynchronous, "ours": ours, "memory": snapshot}


def main(arguments: Sequence[str]) -> None:
    """Measure and print JSON."""
    parser = argparse.ArgumentParser(
        prog="meshwright bench checkpoint", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--megabytes", type=int, default=1000, help="of the state")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()), help="where to save")
    parser.add_argument("--every-step", type=int, default=200, help="megabytes of a snapshot at every step; 0: none")
    parser.add_argument("--seconds", type=float, default=1.0, help="of such a step")
    parser.add_argument("--turns", type=int, default=4, help="of such steps, four each, with and without snapshots")
    options = parser.parse_args(arguments)
    ways = saves(random_state(options.megabytes), options.megabytes)
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
    result = summary(seen, options.megabytes)
    if options.every_step:
        result["every step"] = measure_slowdowns(options.every_step, seconds=options.seconds, turns=options.turns)
    print(json.dumps(result, indent=1))


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
