"""A snapshot agent's process: `python -m meshwright.train.launch.snapshot_agent_main SETTINGS` (JSON). JAX-free.

One thread publishes in the membership store what this host has, and reads what the other hosts have; the main thread
protects snapshots. The process ends with the one that started it.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock

from ...checkpoint.redundancy.snapshot_agent import SnapshotAgent
from ...parallel.transport.checked_stream import RequestServer
from ..core.rendezvous import Client, NotAMember

POLL_SECONDS = 0.02  # between two looks at this host's snapshots
IDLE_SECONDS = 0.5  # between two heartbeats, and two looks at the others, where nothing is new
NO_EXPIRY = 1e9  # seconds to live: whoever started a snapshot agent sees whether it lives
PREFIX = "snapshot-agent/"  # of a snapshot agent's name in the membership store


def read_statuses(members: Mapping[str, Mapping[str, Any]]) -> dict[int, Mapping[str, Any]]:
    """What each snapshot agent published, by host, out of the members of a store."""
    return {int(name[len(PREFIX) :]): info for name, info in members.items() if name.startswith(PREFIX)}


class StatusPublisher:
    """The thread that publishes this agent's status and reads that of the others (`statuses`, by host)."""

    def __init__(self, agent: SnapshotAgent, *, rendezvous: str, address: str) -> None:
        self.statuses: dict[int, Mapping[str, Any]] = {}
        self.changed = threading.Event()  # `statuses` has something new
        self.replaced = threading.Event()  # another agent of this host took over
        self._agent, self._rendezvous, self._address, self._beats = agent, rendezvous, address, 0
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        published, info, published_at = None, dict[str, Any](), 0.0
        with Client(self._rendezvous, f"{PREFIX}{self._agent.host}", ttl=NO_EXPIRY) as client:
            while not self.replaced.wait(POLL_SECONDS):
                try:
                    preambles, now = self._agent.slot_preambles(), time.monotonic()
                    if preambles == published and now - published_at < IDLE_SECONDS and not self._agent.has_unprotected:
                        continue
                    if preambles != published:
                        info = self._agent.status()
                    self._publish(client, info)
                    published, published_at = preambles, now
                except NotAMember:
                    self.replaced.set()
                except OSError:
                    continue  # the membership store is gone, or the slots are changing

    def _publish(self, client: Client, info: Mapping[str, Any]) -> None:
        self._beats += 1
        status = {"address": self._address, "beats": self._beats, "last_error": self._agent.last_error, **info}
        statuses = read_statuses((client.heartbeat if client.ticket >= 0 else client.join)(status)["members"])
        if snapshots_of(statuses) != snapshots_of(self.statuses):
            self.statuses = statuses
            self.changed.set()


def snapshots_of(statuses: Mapping[int, Mapping[str, Any]]) -> list[Any]:
    """Of each host what the others act on: its address, its snapshots and its parity."""
    return [(host, info["address"], info["snapshots"], info["parity"]) for host, info in sorted(statuses.items())]


def main() -> None:
    """Protect this host's snapshots until the process that started this one is gone."""
    settings = json.loads(sys.argv[1])
    parent = os.getppid()
    directory = Path(settings["directory"])
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    lock = FileLock(directory / ".lock", poll_interval=POLL_SECONDS, fallback_to_soft=False)  # until the process ends
    lock.acquire()  # an older agent of this host may be about to end
    agent = SnapshotAgent(
        directory,
        host=settings["host"],
        launch_slots=settings["launch_slots"],
        groups=settings["groups"],
        max_lost_hosts=settings["max_lost_hosts"],
    )
    with RequestServer(agent.answer, settings["name"], bind=settings["bind"]) as server:
        publisher = StatusPublisher(agent, rendezvous=settings["rendezvous"], address=server.address)
        while os.getppid() == parent and not publisher.replaced.is_set():
            publisher.changed.wait(IDLE_SECONDS)
            publisher.changed.clear()
            if publisher.statuses:
                agent.protect_newest(publisher.statuses)


if __name__ == "__main__":
    main()
