"""The self-test of many machines: `meshwright doctor --cluster`, before a job that would take days to show the problem.

Every process is this program, brought up by the engine that will bring up the trainers. Each measures its devices,
memory, disk and links; the first one collects what all measured, finds which machines stand out, and prints it.

    links       delay, bandwidth and clocks of every pair (plain sockets), before anything else keeps machines busy
    devices     how many of which kind, and the rate of a matrix product on each
    collective  an all-reduce over all devices of all processes, compared with the exact sum
    memory      of the host
    disk        the time to write and sync where runs/ will be

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
from ..report.markup import format_bytes
from .findings import Problem

MATRIX_SIDE = {"cpu": 768}  # of the matrices that are multiplied; 4096 elsewhere
WRITE_BYTES = 32 << 20  # written to disk
TIMEOUT = 240.0  # seconds for all to come and be done
SLOW_DEVICE = 0.75  # of the median rate of a matrix product
SLOW_DISK = 0.25  # of the median rate
SLOW_SYNC = 1.0  # seconds
MAX_CLOCK_SKEW = 1.0  # seconds between two clocks; certificates and logs mind, training does not
FULL_MEMORY = 0.9  # of the memory in use

Report = dict[str, Any]


def examine_machine(process: ProcessInfo) -> Report:
    """What this process measures of its machine, with its devices. The result is part of the JSON output."""
    from .machine import check_all_reduce

    initialize_devices(process)
    import jax

    check = check_all_reduce(jax.devices())
    memory = psutil.virtual_memory()
    return {
        "host": socket.gethostname(),
        "devices": [device.device_kind for device in jax.local_devices()],
        "products": [product_rate(device) for device in jax.local_devices()],
        "collective": asdict(check),
        "memory": memory.total,
        "used": memory.percent / 100,
        **measure_disk(Path(".")),
    }


def initialize_devices(process: ProcessInfo) -> None:
    """Initialize devices, and the coordination between processes, as a trainer does."""
    import jax

    from ...configs.sections.parallel import MeshConfig
    from ...parallel.mesh import prepare_devices

    devices = process.local_devices
    prepare_devices(MeshConfig(platform="cpu" if devices else "auto"), local_devices=devices)
    if process.processes > 1:
        bind = "127.0.0.1:0" if process.external_coordinator and process.is_first else None  # to an unused port
        jax.distributed.initialize(
            process.coordinator, process.processes, process.process, coordinator_bind_address=bind
        )


def product_rate(device: Any) -> float:
    """FLOP/s of a matrix product on one device, the best of several."""
    import jax
    import jax.numpy as jnp

    from .machine import time_best

    side = MATRIX_SIDE.get(device.platform, 4096)
    dtype = jnp.float32 if device.platform == "cpu" else jnp.bfloat16
    matrix = jax.device_put(jnp.ones((side, side), dtype), device)
    square = jax.jit(lambda x: x @ x)
    seconds, _ = time_best(lambda: square(matrix), repeats=10)
    return 2 * side**3 / seconds


def measure_disk(directory: Path) -> Report:
    """The rate of writing to `directory`, and the time to sync a small file; leaves nothing behind.

    Returns `written`, bytes a second, synced, and `sync`, seconds.
    """
    file = directory / f".selftest.{socket.gethostname()}.{os.getpid()}"

    def write_seconds(content: bytes) -> float:
        began = time.monotonic()
        with file.open("wb") as out:
            out.write(content)
            out.flush()
            os.fsync(out.fileno())
        return time.monotonic() - began

    try:
        content = os.urandom(1 << 20) * (WRITE_BYTES >> 20)
        return {"written": WRITE_BYTES / write_seconds(content), "sync": write_seconds(b"small")}
    finally:
        file.unlink(missing_ok=True)


def find_problems(reports: Mapping[int, Report], links: network_probe.Links, *, processes: int) -> list[Problem]:
    """What stands out, and what to do about it; most important first. `reports` are those of `examine_machine`."""
    problems = []
    if missing := sorted(set(range(processes)) - reports.keys()):
        problems.append(Problem(f"no report of processes {missing}", "look at their output; are they out of memory?"))
    for index, report in reports.items():
        here = f"process {index} on {report['host']}"
        if report["collective"]["outcome"] == "wrong":
            problems.append(Problem(f"{here}: {report['collective']['detail']}", "do not train there"))
        if report["used"] > FULL_MEMORY:
            problems.append(Problem(f"{here}: {report['used']:.0%} of the memory are in use", "who else runs there?"))
        if report["sync"] > SLOW_SYNC:
            problems.append(
                Problem(f"{here}: syncing a small file took {report['sync']:.1f} s", "another disk for runs/")
            )
    problems += [*device_problems(reports), *speed_problems(reports), *clock_problems(links)]
    for fault in network_probe.find_link_faults(links):
        subject = "process" if len(fault.processes) == 1 else "the link between processes"
        subject = f"{subject} {' and '.join(map(str, fault.processes))}"
        problems.append(Problem(f"{subject}: {fault.evidence}", "leave the machine out, or look at its cable and port"))
    return problems


def device_problems(reports: Mapping[int, Report]) -> list[Problem]:
    """Processes whose devices are not those that most processes have."""
    devices = {index: tuple(report["devices"]) for index, report in reports.items()}
    usual = statistics.mode(devices.values()) if devices else ()
    return [
        Problem(
            f"process {index} on {reports[index]['host']} has {describe_devices(kinds)}, others "
            f"{describe_devices(usual)}",
            "drivers?",
        )
        for index, kinds in devices.items()
        if kinds != usual
    ]


def describe_devices(devices: tuple[str, ...]) -> str:
    """Devices as people read them, e.g. `8 x NVIDIA H100`."""
    return " and ".join(f"{devices.count(kind)} x {kind}" for kind in sorted(set(devices))) or "none"


def speed_problems(reports: Mapping[int, Report]) -> list[Problem]:
    """Devices and disks far below the median."""
    problems = []
    rates = [rate for report in reports.values() for rate in report["products"]]
    writes = [report["written"] for report in reports.values()]
    for index, report in reports.items():
        here = f"process {index} on {report['host']}"
        for device, rate in enumerate(report["products"]):
            if rate < SLOW_DEVICE * statistics.median(rates):
                fact = f"{here}, device {device}: {rate / 1e9:.0f} GFLOP/s"
                median = f"the median device {statistics.median(rates) / 1e9:.0f}"
                problems.append(Problem(f"{fact}, {median}", "too hot, throttled, or shared"))
        if report["written"] < SLOW_DISK * statistics.median(writes):
            fact = f"{here} writes {format_bytes(report['written'])}/s"
            median = f"the median one {format_bytes(statistics.median(writes))}/s"
            problems.append(Problem(f"{fact}, {median}", "another disk for runs/"))
    return problems


def clock_problems(links: network_probe.Links) -> list[Problem]:
    """Clocks that differ from that of process 0."""
    offsets = links.offset[0] if len(links.offset) > 1 else []
    return [
        Problem(f"process {index}: its clock is {seconds:+.1f} s off process 0's", "chrony or ntpd")
        for index, seconds in enumerate(offsets)
        if np.isfinite(seconds) and abs(seconds) > MAX_CLOCK_SKEW
    ]


def collect_reports(client: Client, processes: int) -> tuple[dict[int, Report], network_probe.Links]:
    """What the processes measured: the reports of those that are done in time, and the links."""
    deadline = time.monotonic() + TIMEOUT
    while True:
        members = client.heartbeat()["members"]
        reports = {n: members[f"selftest/{n}"] for n in range(processes) if "host" in members.get(f"selftest/{n}", {})}
        if len(reports) == processes or time.monotonic() > deadline:
            infos = {
                n: members[name]
                for n in range(processes)
                if (name := network_probe.member_name("selftest", n)) in members
            }
            return reports, network_probe.assemble_links(infos, processes=processes)
        time.sleep(0.1)


def main() -> int:
    """Measure and report; the first process prints what all found. Returns 1 where something stands out."""
    process = read_process_info()
    if process.rendezvous is None:
        print("meshwright: this runs under `meshwright doctor --cluster`", file=sys.stderr)
        return 2
    if process.processes > 1:
        network_probe.measure_links(
            session="selftest", rendezvous=process.rendezvous, number=process.process, processes=process.processes
        )
    with Client(process.rendezvous, f"selftest/{process.process}", ttl=2 * TIMEOUT) as client:
        client.join(examine_machine(process))
        if not process.is_first:
            return 0
        reports, links = collect_reports(client, process.processes)
    problems = find_problems(reports, links, processes=process.processes)
    if "--json" in sys.argv:
        matrices = {name: np.nan_to_num(matrix, nan=-1.0).tolist() for name, matrix in asdict(links).items()}
        content = {"processes": reports, "links": matrices, "problems": [asdict(problem) for problem in problems]}
        print(json.dumps(content, indent=1))
    else:
        from rich.console import Console

        from .cluster_view import render

        Console().print(render(reports, links, problems))
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
