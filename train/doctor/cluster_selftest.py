"""The self-test of many machines: `meshwright doctor --cluster`, before a job that would take days to find out.

Every process is this program, brought up by the engine that will bring up the trainers. Each measures its devices,
memory, disk and links; the first one collects what all found, names who stands out, and prints it.

    links       delay, bandwidth and clocks of every pair (plain sockets), before anything else keeps machines busy
    devices     how many of which kind, and the rate of a matrix product on each
    collective  an all-reduce over all devices of all processes, compared with the exact sum
    memory      of the host; disk: what writing and syncing takes where runs/ will be

Sources: MegaScale (NSDI'24) tests machines before a job so, and again those it suspects; C4 (arXiv:2406.04594).
"""

import json
import os
import socket
import statistics
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from ..core.process_env import ProcessInfo, read_process_info
from ..core.rendezvous import Client
from ..launch import network_probe
from ..report.markup import size
from .findings import Problem

SIDE = {"cpu": 768}  # of the matrices; 4096 elsewhere
WRITTEN = 32 << 20  # bytes written to disk
PATIENCE = 240.0  # seconds for all to come and be done
SLOW_DEVICE = 0.75  # of the median rate of a matrix product
SLOW_DISK = 0.25  # of the median rate
SLOW_SYNC = 1.0  # seconds
SKEW = 1.0  # seconds between two clocks; certificates and logs mind, training does not
FULL = 0.9  # of the memory in use

Report = dict[str, Any]


def examined(place: ProcessInfo) -> Report:
    """What this process finds of its machine. Touches every device."""
    from .machine import all_reduce

    join(place)
    import jax

    check = all_reduce(jax.devices())
    memory = psutil.virtual_memory()
    return {
        "host": socket.gethostname(),
        "devices": [device.device_kind for device in jax.local_devices()],
        "products": [product_rate(device) for device in jax.local_devices()],
        "collective": asdict(check),
        "memory": memory.total,
        "used": memory.percent / 100,
        **disk(Path(".")),
    }


def join(place: ProcessInfo) -> None:
    """Bring devices up as a trainer does."""
    import jax

    from ...configs.sections.parallel import MeshConfig
    from ...parallel.mesh import prepare_devices

    prepare_devices(MeshConfig(platform="cpu" if place.local_devices else "auto"), local_devices=place.local_devices)
    if place.processes > 1:
        unused = "127.0.0.1:0" if place.external_coordinator and place.is_first else None
        jax.distributed.initialize(place.coordinator, place.processes, place.process, coordinator_bind_address=unused)


def product_rate(device: Any) -> float:
    """FLOP/s of a matrix product on one device, the best of several."""
    import jax
    import jax.numpy as jnp

    from .machine import timed

    side = SIDE.get(device.platform, 4096)
    dtype = jnp.float32 if device.platform == "cpu" else jnp.bfloat16
    matrix = jax.device_put(jnp.ones((side, side), dtype), device)
    seconds, _ = timed(lambda: product(matrix), repeats=10)
    return 2 * side**3 / seconds


def product(matrix: Any) -> Any:
    """A matrix times itself, compiled."""
    import jax

    return jax.jit(lambda x: x @ x)(matrix)


def disk(directory: Path) -> Report:
    """Bytes a second of writing to `directory`, synced, and seconds of syncing a small file. Leaves nothing behind."""
    file = directory / f".selftest.{socket.gethostname()}.{os.getpid()}"
    try:
        began = time.monotonic()
        with file.open("wb") as out:
            out.write(os.urandom(1 << 20) * (WRITTEN >> 20))
            out.flush()
            os.fsync(out.fileno())
        written = WRITTEN / (time.monotonic() - began)
        began = time.monotonic()
        with file.open("wb") as out:
            out.write(b"small")
            out.flush()
            os.fsync(out.fileno())
        return {"written": written, "sync": time.monotonic() - began}
    finally:
        file.unlink(missing_ok=True)


def findings(reports: Mapping[int, Report], measured: network_probe.Links, *, processes: int) -> list[Problem]:
    """Who stands out, and what to do about it; most important first."""
    told = []
    if absent := sorted(set(range(processes)) - reports.keys()):
        told.append(Problem(f"no word from processes {absent}", "look at their output; are they out of memory?"))
    for number, report in reports.items():
        here = f"process {number} on {report['host']}"
        if report["collective"]["outcome"] == "wrong":
            told.append(Problem(f"{here}: {report['collective']['detail']}", "do not train there"))
        if report["used"] > FULL:
            told.append(Problem(f"{here}: {report['used']:.0%} of the memory are in use", "who else runs there?"))
        if report["sync"] > SLOW_SYNC:
            told.append(Problem(f"{here}: syncing a small file took {report['sync']:.1f} s", "another disk for runs/"))
    told += [*odd_devices(reports), *slow(reports), *apart(measured)]
    for culprit in network_probe.culprits(measured):
        who = " and ".join(map(str, culprit.processes))
        what = "process" if len(culprit.processes) == 1 else "the link between processes"
        told.append(
            Problem(f"{what} {who}: {culprit.evidence}", "leave the machine out, or look at its cable and port")
        )
    return told


def odd_devices(reports: Mapping[int, Report]) -> list[Problem]:
    """Processes whose devices are not those of the most."""
    kinds = {number: tuple(report["devices"]) for number, report in reports.items()}
    usual = statistics.mode(kinds.values()) if kinds else ()
    return [
        Problem(f"process {number} on {reports[number]['host']} has {shown(found)}, others {shown(usual)}", "drivers?")
        for number, found in kinds.items()
        if found != usual
    ]


def shown(devices: tuple[str, ...]) -> str:
    """`8 x NVIDIA H100`."""
    return " and ".join(f"{devices.count(kind)} x {kind}" for kind in sorted(set(devices))) or "none"


def slow(reports: Mapping[int, Report]) -> list[Problem]:
    """Devices and disks far below the median."""
    told = []
    rates = [rate for report in reports.values() for rate in report["products"]]
    writes = [report["written"] for report in reports.values()]
    for number, report in reports.items():
        for device, rate in enumerate(report["products"]):
            if rate < SLOW_DEVICE * statistics.median(rates):
                what = f"process {number} on {report['host']}, device {device}: {rate / 1e9:.0f} GFLOP/s"
                usual = statistics.median(rates) / 1e9
                told.append(Problem(f"{what}, the median device {usual:.0f}", "too hot, throttled, or shared"))
        if report["written"] < SLOW_DISK * statistics.median(writes):
            what = f"process {number} on {report['host']} writes {size(report['written'])}/s"
            told.append(
                Problem(f"{what}, the median one {size(statistics.median(writes))}/s", "another disk for runs/")
            )
    return told


def apart(measured: network_probe.Links) -> list[Problem]:
    """Clocks that are not the first one's."""
    offsets = measured.offset[0] if len(measured.offset) > 1 else []
    return [
        Problem(f"process {number}: its clock is {seconds:+.1f} s off process 0's", "chrony or ntpd")
        for number, seconds in enumerate(offsets)
        if np.isfinite(seconds) and abs(seconds) > SKEW
    ]


def gathered(client: Client, processes: int) -> tuple[dict[int, Report], network_probe.Links]:
    """What every process reported, those that did within the time."""
    deadline = time.monotonic() + PATIENCE
    while True:
        members = client.heartbeat()["members"]
        reports = {n: members[f"selftest/{n}"] for n in range(processes) if "host" in members.get(f"selftest/{n}", {})}
        if len(reports) == processes or time.monotonic() > deadline:
            infos = {
                n: members[name] for n in range(processes) if (name := network_probe.name("selftest", n)) in members
            }
            return reports, network_probe.assembled(infos, processes=processes)
        time.sleep(0.1)


def main() -> int:
    """Measure, report; the first process prints what all found. 1 where something stands out."""
    place = read_process_info()
    if place.rendezvous is None:
        print("meshwright: this runs under `meshwright doctor --cluster`", file=sys.stderr)
        return 2
    if place.processes > 1:
        network_probe.take_part(
            session="selftest", rendezvous=place.rendezvous, number=place.process, processes=place.processes
        )
    with Client(place.rendezvous, f"selftest/{place.process}", ttl=2 * PATIENCE) as client:
        client.join(examined(place))
        if not place.is_first:
            return 0
        reports, measured = gathered(client, place.processes)
    problems = findings(reports, measured, processes=place.processes)
    if "--json" in sys.argv:
        matrices = {name: np.nan_to_num(matrix, nan=-1.0).tolist() for name, matrix in asdict(measured).items()}
        told = {"processes": reports, "links": matrices, "problems": [asdict(problem) for problem in problems]}
        print(json.dumps(told, indent=1))
    else:
        from rich.console import Console

        from .cluster_view import render

        Console().print(render(reports, measured, problems))
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
