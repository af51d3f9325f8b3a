"""`meshwright bench checkpoint`: how long training waits for a save, next to Orbax alone, in one process, in turns.

    stall      seconds until the arrays may change again
    whole      seconds until the checkpoint is committed
    flush      bytes over `whole`

`ours` is a copy, which Orbax saves asynchronously, plus fingerprints and a manifest; `memory` is the same copy, and a
snapshot of it in /dev/shm. The last part is a snapshot at every step of a second (`every_step.py`).

    meshwright bench checkpoint --megabytes 1000 --rounds 3
"""

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from .every_step import SIDES, measure_slowdown, random_state
from .harness import bench_parser, run_in_turns

Save = Callable[[Path], tuple[float, float]]  # directory -> (stall, whole)


def make_saves(state: Any) -> dict[str, Save]:
    """Name -> a timed save of `state`."""
    from orbax.checkpoint import v1 as ocp

    from meshwright.checkpoint.async_copy import donation_safe_copy
    from meshwright.checkpoint.layout_conversion import Layout
    from meshwright.checkpoint.memory_store import MemoryStore
    from meshwright.checkpoint.storage import Storage, saved_tree

    plain = Layout("plain", lambda path, shape: [(path, ())])
    memory = MemoryStore(Path("/dev/shm") / f"meshwright-bench-{time.time_ns()}")
    memory.save(state, step=0, data={})  # allocates its pages
    memory.save(state, step=1, data={})

    def with_orbax(directory: Path) -> tuple[float, float]:
        began = time.monotonic()
        ocp.save(directory / "1", saved_tree(state))
        return (seconds := time.monotonic() - began), seconds

    def with_async_orbax(directory: Path) -> tuple[float, float]:
        began = time.monotonic()
        response = ocp.save_async(directory / "1", saved_tree(state))
        stall = time.monotonic() - began
        response.result()
        return stall, time.monotonic() - began

    def with_storage(directory: Path) -> tuple[float, float]:
        storage = Storage(directory, layout=plain)
        began = time.monotonic()
        storage.save(donation_safe_copy(state), step=1, data={})
        stall = time.monotonic() - began
        storage.close()
        return stall, time.monotonic() - began

    def with_memory(directory: Path) -> tuple[float, float]:
        del directory
        began = time.monotonic()
        copy = donation_safe_copy(state)
        stall = time.monotonic() - began
        memory.save(copy, step=int(began * 1e6), data={})
        return stall, time.monotonic() - began

    with_memory.close = memory.clear
    return {"orbax": with_orbax, "orbax asynchronous": with_async_orbax, "ours": with_storage, "memory": with_memory}


def main(arguments: Sequence[str]) -> None:
    """Measure and print JSON."""
    parser = bench_parser("checkpoint", __doc__)
    parser.add_argument("--megabytes", type=int, default=1000, help="of the state")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()), help="where to save")
    parser.add_argument("--every-step", type=int, default=200, help="megabytes of a snapshot at every step; 0: none")
    parser.add_argument("--seconds", type=float, default=1.0, help="of such a step")
    parser.add_argument("--turns", type=int, default=4, help="of such steps, four each, with and without snapshots")
    options = parser.parse_args(arguments)
    saves = make_saves(random_state(options.megabytes))

    def run(save: Save) -> tuple[float, float]:
        with tempfile.TemporaryDirectory(dir=options.directory) as directory:
            return save(Path(directory) / "checkpoints")

    try:
        times = run_in_turns({name: partial(run, save) for name, save in saves.items()}, rounds=options.rounds)
    finally:
        saves["memory"].close()
    result = summarize(times, options.megabytes)
    if options.every_step:
        measure = partial(measure_slowdown, options.every_step, seconds=options.seconds, turns=options.turns)
        result["every step"] = {name: measure(side) for name, side in SIDES.items()}
    print(json.dumps(result, indent=1))


def summarize(times: dict[str, list[tuple[float, float]]], megabytes: int) -> dict[str, Any]:
    """Medians, and the stalls of Orbax over ours. `times`: (stall, whole) of every save."""
    result: dict[str, Any] = {"megabytes": megabytes}
    for name, pairs in times.items():
        stall, whole = (statistics.median(column) for column in zip(*pairs, strict=True))
        result[name] = {"stall": round(stall, 4), "whole": round(whole, 4), "flush_mb_s": round(megabytes / whole)}
    for name in ("orbax", "orbax asynchronous"):
        result[f"stall of {name} over ours"] = round(result[name]["stall"] / result["ours"]["stall"], 2)
        result[f"stall of {name} over memory"] = round(result[name]["stall"] / result["memory"]["stall"], 2)
    return result
