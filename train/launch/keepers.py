"""The keepers of a run's snapshots, one a host: started beside the trainers, asked what is left before each epoch.

    with Keepers(plan, run=directory, server=server) as keepers:
        supervise(keepers.before(engine), ...)

Before the trainers of an epoch start, every keeper verifies what its host has; the newest step that every group of
hosts has or can rebuild is chosen, lost snapshots are rebuilt from parity, and every host is told what was found. What
keepers do and suffer is in `keepers.jsonl` of the run directory. JAX-free.
"""

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ...checkpoint import mailbox
from ...checkpoint.groups import Holding, laid, recoverable
from ...checkpoint.mailbox import Recovery
from ...checkpoint.snapshots import holding_of
from ...checkpoint.wire import NotGiven, Peer
from ...configs.errors import MeshwrightError, UserError
from ...configs.training import CheckpointConfig
from ..report.lines import append
from .keeper import PREFIX, keepers_in
from .rendezvous import Server, left
from .supervisor import Engine
from .world import HOSTS

LOSSES = {"none": 0, "xor": 1, "p+q": 2}
COMMAND = [sys.executable, "-m", "meshwright.train.launch.keeper"]
START = 20.0  # seconds for a keeper to report
HUNG = 30.0  # seconds without a word after which a keeper is replaced
WORK = 600.0  # seconds for verifying or rebuilding a host's snapshots
TICK = 0.25
FILE = "keepers.jsonl"

Infos = dict[int, Mapping[str, Any]]


@dataclass(frozen=True)
class Plan:
    """Which hosts there are, and how they protect each other."""

    hosts: int
    processes: int  # of the run; the same number on each host, in order
    groups: tuple[tuple[int, ...], ...]
    losses: int  # of a group that its parity bears

    def processes_of(self, host: int) -> list[int]:
        """The numbers of the processes on a host."""
        return [process for process in range(self.processes) if process * self.hosts // self.processes == host]


def planned(checkpoint: CheckpointConfig, *, hosts: int, processes: int) -> Plan | None:
    """The keepers that a configuration asks for; None where there are no snapshots to keep.

    Raises UserError where its parity cannot be had on these hosts.
    """
    losses = LOSSES[checkpoint.parity]
    if processes % hosts:
        raise UserError(f"launch.hosts: {processes} processes cannot be spread evenly over {hosts} hosts; change one")
    if not checkpoint.memory_every:
        if losses:
            raise UserError(
                f"checkpoint.parity: {checkpoint.parity} protects snapshots in memory and checkpoint.memory_every is "
                "0; set it, or parity to none"
            )
        return None
    groups = laid(hosts, size=checkpoint.group, losses=losses, domains=checkpoint.domains)
    return Plan(hosts, processes, tuple(map(tuple, groups)), losses)


class Keepers:
    """The keepers of the run in directory `run`, as processes of this machine; `server` is where they meet."""

    def __init__(self, plan: Plan, *, run: Path, server: Server, listen: str = "127.0.0.1") -> None:
        self.plan, self._run, self._server, self._listen = plan, run, server, listen
        self._running: dict[int, subprocess.Popen] = {}
        self._heard: dict[int, tuple[int, float]] = {}  # host -> (beats, when that was new)
        self._turn, self._ended = threading.Lock(), threading.Event()

    def __enter__(self) -> "Keepers":
        os.environ[HOSTS] = str(self.plan.hosts)  # the trainers', which inherit it
        with self._turn:
            self._restart_dead()
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        os.environ.pop(HOSTS, None)
        self._ended.set()
        with self._turn:
            for process in self._running.values():
                process.kill()  # it holds nothing that is not in the slots
                process.wait()
        for host in range(self.plan.hosts):
            mailbox.sweep(self.directory(host))

    def before(self, engine: Engine) -> "Kept":
        """`engine`, whose epochs begin with a recovery."""
        return Kept(engine, self)

    def directory(self, host: int) -> Path:
        """Where a host's snapshots are."""
        return mailbox.directory_of(self._run, host=host)

    def process(self, host: int) -> subprocess.Popen:
        """A host's keeper."""
        return self._running[host]

    # --- keepers die too ---------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        while not self._ended.wait(TICK):
            with self._turn:
                if not self._ended.is_set():
                    self._restart_dead()

    def _restart_dead(self) -> None:
        """Start the keepers that do not run; one that hangs is killed first."""
        infos, now = keepers_in(self._server.room.membership.public()["members"]), time.monotonic()
        for host in range(self.plan.hosts):
            process = self._running.get(host)
            beats = infos.get(host, {}).get("beats", -1)
            if beats != self._heard.get(host, (None, 0.0))[0]:
                self._heard[host] = (beats, now)
            hangs = now - self._heard[host][1] > HUNG
            if process is not None and process.poll() is None and not hangs:
                continue
            if process is not None:
                self._tell("keeper-lost", host=host, reason="hangs" if hangs else f"exit code {process.poll()}")
                process.kill()
                process.wait()
            self._forget(host)
            settings = {
                "directory": str(self.directory(host)),
                "host": host,
                "processes": self.plan.processes_of(host),
                "groups": self.plan.groups,
                "losses": self.plan.losses,
                "rendezvous": self._server.address,
                "listen": self._listen,
            }
            self._running[host] = subprocess.Popen([*COMMAND, json.dumps(settings)], start_new_session=True)
            self._heard[host] = (-1, now)

    def _forget(self, host: int) -> None:
        """What a keeper that is gone told: its address is not good any more."""
        name = f"{PREFIX}{host}"
        with contextlib.suppress(MeshwrightError, KeyError):
            self._server.room.change(lambda m, _: left(m, name, m.members[name].ticket))

    # --- before an epoch ---------------------------------------------------------------------------------------------

    def recover(self) -> Recovery:
        """Verify what is left, rebuild what is lost, and tell every host. Returns once the trainers may start."""
        with self._turn:
            self._restart_dead()
        peers = self._reached()
        word = recover(peers, self.plan)
        for peer in peers.values():
            peer.close()
        self._tell("recovery", **asdict(word))
        return word

    def _reached(self) -> dict[int, Peer]:
        """The keepers that report within `START` seconds."""
        deadline = time.monotonic() + START
        while True:
            infos = keepers_in(self._server.room.membership.public()["members"])
            if len(infos) == self.plan.hosts or time.monotonic() > deadline:
                return {host: Peer(info["address"]) for host, info in sorted(infos.items())}
            time.sleep(0.02)

    def _tell(self, event: str, **fields: object) -> None:
        if self._run.exists():  # else nothing has been trained yet
            append(self._run / FILE, {"time": time.time(), "event": event, **fields}, sync=False)


def recover(peers: Mapping[int, Peer], plan: Plan) -> Recovery:
    """What the hosts of `plan` can go on from: each verifies what it has, then the newest step that all have or can
    rebuild is rebuilt where it is lost. Every keeper in `peers` is told.
    """
    began = time.monotonic()
    with ThreadPoolExecutor(max(len(peers), 1)) as threads:
        asked = {host: threads.submit(peer.ask, {"do": "check"}, timeout=WORK) for host, peer in peers.items()}
        checked = {host: told for host, one in asked.items() if (told := answer(one)) is not None}
        infos = {host: {**told["info"], "address": peers[host].address} for host, told in checked.items()}
        found = rebuilt(peers, infos, plan, threads)
        damaged = tuple(reason for told in checked.values() for reason in told["damaged"])
        word = replace(found, damaged=damaged, seconds=time.monotonic() - began)
        for peer in peers.values():
            threads.submit(peer.ask, {"do": "settle", "word": asdict(word)})
    return word


def rebuilt(peers: Mapping[int, Peer], infos: Infos, plan: Plan, threads: ThreadPoolExecutor) -> Recovery:
    """Choose a step and rebuild what it lacks; an older step where that fails."""
    holdings = {host: holding_of(info) for host, info in infos.items()}
    failed: list[str] = []
    while True:
        found = recoverable(holdings, plan.groups, losses=plan.losses)
        request = {"do": "rebuild", "step": found.step, "infos": {str(host): one for host, one in infos.items()}}
        asked = [threads.submit(peers[host].ask, request, timeout=WORK) for host in found.rebuilt if host in peers]
        reasons = [str(error) for one in asked if (error := one.exception()) is not None]
        reasons += [f"host {host} has no keeper" for host in found.rebuilt if host not in peers]
        if not reasons:
            return replace(found, note="; ".join([*failed, *([found.note] if found.note else [])]))
        failed += [f"step {found.step}: {reason}" for reason in reasons]
        holdings = {host: without(one, found.step) for host, one in holdings.items()}


def answer(asked: Any) -> dict[str, Any] | None:
    """What a keeper told; None where it did not answer."""
    try:
        return asked.result()[0]
    except (OSError, NotGiven):
        return None


def without(holding: Holding, step: int) -> Holding:
    """What a host has beside `step`."""
    return Holding(
        {other: seal for other, seal in holding.held.items() if other != step},
        {other: made for other, made in holding.shares.items() if other != step},
    )


@dataclass
class Kept:
    """An engine whose epochs begin with a recovery of the snapshots."""

    engine: Engine
    keepers: Keepers

    def start(self, *arguments: Any, **settings: Any) -> None:
        """Recover, then start."""
        self.keepers.recover()
        self.engine.start(*arguments, **settings)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)
