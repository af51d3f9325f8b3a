"""The keepers of a run's snapshots, one a host: started beside the trainers, asked what is left before each epoch.

    with Keepers(plan, run=directory, room=server.room, tending=Here(...)) as keepers:
        supervise(keepers.before(engine), ...)

Before the trainers of an epoch start, every keeper verifies what its host has; the newest step that every group of
hosts has or can rebuild is chosen, lost snapshots are rebuilt from parity, and every host is told what was found. Where
the epoch is in other slots than the one before, nothing is rebuilt: trainers use what is left where it holds all they
need, else storage; and the hosts of the new epoch protect each other. What keepers do and suffer is in `keepers.jsonl`
of the run directory. JAX-free.
"""

import contextlib
import logging
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ...checkpoint.redundancy.agent_files import Recovery
from ...checkpoint.redundancy.host_snapshot import holding_of
from ...checkpoint.redundancy.parity_groups import Holding, recoverable
from ...checkpoint.redundancy.parity_plan import Plan
from ...configs.errors import MeshwrightError, UserError
from ...parallel.transport.checked_stream import NotGiven, Peer
from ..core.jsonl import append, mend, read
from ..core.rendezvous import Room, left
from .snapshot_agent_main import PREFIX, keepers_in
from .snapshot_agent_process import Tending, settings
from .supervisor import Engine, write

START = 20.0  # seconds for a keeper to report
HUNG = 30.0  # seconds without a word after which a keeper is replaced
REACH = 30.0  # seconds for an answer that needs no work: a keeper may be waiting for that of another itself
WORK = 600.0  # seconds for verifying or rebuilding a host's snapshots
TICK = 0.25
FILE = "keepers.jsonl"

Infos = dict[int, Mapping[str, Any]]

logger = logging.getLogger(__name__)


class Keepers:
    """The keepers of the run in directory `run`, which `tending` starts; `room` is where they meet."""

    def __init__(self, plan: Plan, *, run: Path, room: Room, tending: Tending) -> None:
        self.plan, self.run, self._room, self._tending = plan, run, room, tending
        self._now = plan  # of the epoch
        self._before = last(run, plan)  # the one whose snapshots there are; None: nobody knows
        self._running: set[int] = set()
        self._heard: dict[int, tuple[int, float]] = {}  # host -> (beats, when that was new)
        self._turn, self._over = threading.Lock(), threading.Event()

    def __enter__(self) -> "Keepers":
        mend(self.run / FILE)
        with self._turn:
            self._restart_dead()
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        with self._turn:
            self._tending.close()

    def before(self, engine: Engine) -> "Kept":
        """`engine`, whose epochs begin with a recovery."""
        return Kept(engine, self)

    # --- keepers die too ---------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        while not self._over.wait(TICK):
            with self._turn:
                if not self._over.is_set():
                    self._restart_dead()

    def _restart_dead(self) -> None:
        """Start the keepers that do not run, where their machine is there; one that hangs is killed first."""
        infos, now = keepers_in(self._room.membership.public()["members"]), time.monotonic()
        for host in range(self.plan.hosts):
            beats = infos.get(host, {}).get("beats", -1)
            if beats != self._heard.get(host, (None, 0.0))[0]:
                self._heard[host] = (beats, now)
            if host in self._running:
                ended, hangs = self._tending.ended(host), now - self._heard[host][1] > HUNG
                if ended is None and not hangs:
                    continue
                self._tell("keeper-lost", host=host, reason=ended or "hangs")
                self._tending.kill(host)
                self._running.discard(host)
                self._forget(host)
            if self._tending.start(host, self._now):
                self._running.add(host)
                self._heard[host] = (-1, now)

    def _forget(self, host: int) -> None:
        """What a keeper that is gone told: its address is not good any more."""
        name = f"{PREFIX}{host}"
        with contextlib.suppress(MeshwrightError, KeyError):
            self._room.change(lambda m, _: left(m, name, m.members[name].ticket))

    # --- before an epoch ---------------------------------------------------------------------------------------------

    def recover(self, slots: Sequence[int] | None = None) -> Plan:
        """Verify what is left, rebuild what is lost, and tell every host; then the trainers may start in `slots`.

        Returns the plan of the epoch. Raises MeshwrightError where the machines are not the hosts that the plan says.
        """
        plan = self.plan if slots is None else self.plan.among(slots)
        self._tending.check(plan)
        with self._turn:
            self._now = plan
            self._restart_dead()
        peers = self._reached()
        word = recover(peers, plan, before=self._before)
        for peer in peers.values():
            peer.close()
        self._before = plan
        place = {"hosts": plan.hosts, "processes": plan.processes, "slots": plan.slots, "groups": plan.groups}
        self._tell("recovery", **asdict(word), losses=plan.losses, **place)
        return plan

    def _reached(self) -> dict[int, Peer]:
        """The keepers that report within `START` seconds, of those that run."""
        deadline = time.monotonic() + START
        while True:
            infos = keepers_in(self._room.membership.public()["members"])
            if infos.keys() >= self._running or time.monotonic() > deadline:
                return {host: Peer(info["address"]) for host, info in sorted(infos.items())}
            time.sleep(0.02)

    def _tell(self, event: str, **fields: object) -> None:
        if not self.run.exists():  # nothing has been trained yet
            return
        try:
            append(self.run / FILE, {"time": time.time(), "event": event, **fields}, sync=False)
        except UserError as error:  # a full disk must not stop the keepers
            logger.warning("%s", error)


def last(run: Path, plan: Plan) -> Plan | None:
    """The plan of the last epoch of `run`, where it was of as many hosts and processes; None where none is known."""
    for event in reversed(read(run / FILE)):
        if event["event"] == "recovery" and "slots" in event:
            same = (event["hosts"], event["processes"]) == (plan.hosts, plan.processes)
            return plan.among(event["slots"]) if same else None
    return None


def recover(peers: Mapping[int, Peer], plan: Plan, *, before: Plan | None = None) -> Recovery:
    """What the hosts of `plan` can go on from: each verifies what it has, then the newest step that all have or can
    rebuild is rebuilt where it is lost. Every keeper in `peers` is told.

    `before` is the plan of the epoch that made the snapshots; what others left is deleted. None: of this one, maybe.
    A keeper that does not answer the first question is lost: the network between may be.
    """
    began, made = time.monotonic(), before or plan
    with ThreadPoolExecutor(max(len(peers), 1)) as threads:

        def everyone(request: Mapping[str, Any], of: Plan, *, within: float = REACH) -> dict[int, Any]:
            asked = {
                host: threads.submit(peer.ask, {**settings(host, of), **request}, timeout=within)
                for host, peer in peers.items()
            }
            return {host: told for host, one in asked.items() if (told := answer(one)) is not None}

        reached = everyone({"do": "form"}, made)
        if silent := sorted(peers.keys() - reached.keys()):
            logger.warning("the keepers of hosts %s do not answer: their snapshots are taken as lost", silent)
        peers = {host: peers[host] for host in reached}
        if before is not None:
            everyone({"do": "sweep"}, made)
        checked = everyone({"do": "check"}, made, within=WORK)
        infos = {host: {**told["info"], "address": peers[host].address} for host, told in checked.items()}
        if made.slots == plan.slots:
            found = rebuilt(peers, infos, plan, threads)
        else:
            found = Recovery(-1, (), elsewhere(infos, made, plan))
            everyone({"do": "form"}, plan)
        damaged = tuple(reason for told in checked.values() for reason in told["damaged"])
        word = replace(found, damaged=damaged, seconds=time.monotonic() - began)
        everyone({"do": "settle", "word": asdict(word)}, plan)
    return word


def elsewhere(infos: Infos, before: Plan, plan: Plan) -> str:
    """Why nothing is rebuilt where an epoch is in other slots than the one before; empty where there is nothing."""
    steps = [int(step) for info in infos.values() for step in info["held"]]
    if not steps:
        return ""
    return f"snapshots up to step {max(steps)} were taken in slots {list(before.slots)}; slots {list(plan.slots)} go on"


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

    def start(self, epoch: int, *, slots: Sequence[int], words: Sequence[str]) -> None:
        """Recover, then start; without parity where too few hosts are left for it, which is journalled."""
        self.engine.gather(slots)
        plan, whole = self.keepers.recover(slots), self.keepers.plan
        if whole.losses and not plan.losses:
            reason = f"hosts {plan.present} of {plan.hosts} are too few for checkpoint.parity, until others are back"
            write(self.keepers.run, "unprotected", reason=reason, slots=list(plan.slots))
            words = (*words, "checkpoint.parity=none")
        self.engine.start(epoch, slots=slots, words=words)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)
