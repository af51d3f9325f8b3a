"""The snapshot agents of a run, one a host: kept running beside the trainers, and asked for snapshots before an epoch.

    with SnapshotAgents(plan, run=directory, store=server.store, launcher=LocalSnapshotAgents(...)) as agents:
        supervise(agents.wrap(engine), ...)

Before the trainers of an epoch start, every agent verifies what its host has; the newest step that every parity group
has or can rebuild is chosen, lost snapshots are rebuilt from parity, and every host is told the result. Where the epoch
is in other slots than the one before, nothing is rebuilt: trainers use what is left where it holds all they need, else
storage; and the hosts of the new epoch protect each other. What happens to agents and snapshots is recorded in
`keepers.jsonl` of the run directory. JAX-free.
"""

import contextlib
import logging
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ...checkpoint.redundancy.agent_files import Recovery
from ...checkpoint.redundancy.host_snapshot import held_snapshots_from_json
from ...checkpoint.redundancy.parity_groups import HeldSnapshots, choose_recovery
from ...checkpoint.redundancy.parity_plan import ParityPlan
from ...configs.errors import MeshwrightError, UserError
from ...parallel.transport.checked_stream import RequestClient, RequestRefused
from ..core.jsonl import LineWriter, read_rows, repair_last_line
from ..core.rendezvous import MembershipStore, remove_member
from .snapshot_agent_main import PREFIX, read_statuses
from .snapshot_agent_process import SnapshotAgentLauncher, agent_settings
from .supervisor import LaunchEngine, record_event

START_TIMEOUT = 20.0  # seconds for an agent to publish its status
HANG_TIMEOUT = 30.0  # seconds without a heartbeat after which an agent is replaced
REPLY_TIMEOUT = 30.0  # seconds for a reply that needs no work: an agent may be waiting for that of another itself
WORK_TIMEOUT = 600.0  # seconds for verifying or rebuilding a host's snapshots
POLL_SECONDS = 0.25
FILE = "keepers.jsonl"

Statuses = Mapping[int, Mapping[str, Any]]  # by host

logger = logging.getLogger(__name__)


class SnapshotAgents:
    """The snapshot agents of the run in directory `run`; `launcher` starts them, they report in `store`."""

    def __init__(self, plan: ParityPlan, *, run: Path, store: MembershipStore, launcher: SnapshotAgentLauncher) -> None:
        self.plan, self.run, self._store, self._launcher = plan, run, store, launcher
        self._epoch_plan = plan
        self._snapshot_plan = read_last_plan(run, plan)  # of the epoch that made the snapshots; None: not known
        self._running: set[int] = set()
        self._heartbeats: dict[int, tuple[int, float]] = {}  # host -> (beats, when that was new)
        self._lock, self._closed = threading.Lock(), threading.Event()

    def __enter__(self) -> "SnapshotAgents":
        repair_last_line(self.run / FILE)
        with self._lock:
            self._restart_dead()
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        with self._lock:
            self._launcher.close()

    def wrap(self, engine: LaunchEngine) -> "RecoveringEngine":
        """`engine`, whose epochs begin with a recovery of the snapshots."""
        return RecoveringEngine(engine, self)

    # --- agents die too ----------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        while not self._closed.wait(POLL_SECONDS):
            with self._lock:
                if not self._closed.is_set():
                    self._restart_dead()

    def _restart_dead(self) -> None:
        """Start the agents that do not run, where their machine is there; one that hangs is killed first."""
        statuses, now = self._statuses(), time.monotonic()
        for host in range(self.plan.hosts):
            beats = statuses.get(host, {}).get("beats", -1)
            if beats != self._heartbeats.get(host, (None, 0.0))[0]:
                self._heartbeats[host] = (beats, now)
            if host in self._running:
                failure = self._launcher.failure(host)
                if failure is None and now - self._heartbeats[host][1] > HANG_TIMEOUT:
                    failure = "hangs"
                if failure is None:
                    continue
                self._record("keeper-lost", host=host, reason=failure)
                self._launcher.kill(host)
                self._running.discard(host)
                self._forget(host)
            if self._launcher.start(host, self._epoch_plan):
                self._running.add(host)
                self._heartbeats[host] = (-1, now)

    def _statuses(self) -> Statuses:
        return read_statuses(self._store.membership.to_json()["members"])

    def _forget(self, host: int) -> None:
        """Remove the status of an agent that is gone: its address is not good any more."""
        name = f"{PREFIX}{host}"
        with contextlib.suppress(MeshwrightError, KeyError):
            self._store.change(lambda m, _: remove_member(m, name, m.members[name].ticket))

    # --- before an epoch ---------------------------------------------------------------------------------------------

    def recover(self, slots: Sequence[int] | None = None) -> ParityPlan:
        """Verify what is left, rebuild what is lost, and tell every host; then the trainers may start in `slots`.

        Returns the plan of the epoch. Raises MeshwrightError where the machines are not the hosts of the plan.
        """
        plan = self.plan if slots is None else self.plan.restrict_to(slots)
        self._launcher.check(plan)
        with self._lock:
            self._epoch_plan = plan
            self._restart_dead()
        clients = self._connect()
        recovery = recover_snapshots(clients, plan, snapshot_plan=self._snapshot_plan)
        for client in clients.values():
            client.close()
        self._snapshot_plan = plan
        fields = {"hosts": plan.hosts, "processes": plan.processes, "slots": plan.slots, "groups": plan.groups}
        self._record("recovery", **asdict(recovery), losses=plan.max_lost_hosts, **fields)
        return plan

    def _connect(self) -> dict[int, RequestClient]:
        """Clients of the agents that report within `START_TIMEOUT`, of those that run."""
        deadline = time.monotonic() + START_TIMEOUT
        while True:
            statuses = self._statuses()
            if statuses.keys() >= self._running or time.monotonic() > deadline:
                return {host: RequestClient(status["address"]) for host, status in sorted(statuses.items())}
            time.sleep(0.02)

    def _record(self, event: str, **fields: object) -> None:
        if not self.run.exists():  # nothing has been trained yet
            return
        try:
            LineWriter(self.run / FILE).append({"time": time.time(), "event": event, **fields}, sync=False)
        except UserError as error:  # a full disk must not stop the agents
            logger.warning("%s", error)


def read_last_plan(run: Path, plan: ParityPlan) -> ParityPlan | None:
    """The plan of the last epoch of `run`, where it had as many hosts and processes; None where none is known."""
    for event in reversed(read_rows(run / FILE)):
        if event["event"] == "recovery" and "slots" in event:
            same_size = (event["hosts"], event["processes"]) == (plan.hosts, plan.processes)
            return plan.restrict_to(event["slots"]) if same_size else None
    return None


def recover_snapshots(
    clients: Mapping[int, RequestClient], plan: ParityPlan, *, snapshot_plan: ParityPlan | None = None
) -> Recovery:
    """What the hosts of `plan` can go on from: each verifies what it has, then the newest step that all have or can
    rebuild is rebuilt where it is lost. Every agent in `clients` is told the result.

    `snapshot_plan` is that of the epoch that made the snapshots; what others left is deleted. None: maybe `plan`.
    An agent that does not answer the first request is lost: the network between may be.
    """
    began, made_under = time.monotonic(), snapshot_plan or plan
    with ThreadPoolExecutor(max(len(clients), 1)) as threads:

        def request_all(
            request: Mapping[str, Any], request_plan: ParityPlan, *, timeout: float = REPLY_TIMEOUT
        ) -> dict[int, dict[str, Any]]:
            futures = {
                host: threads.submit(client.request, {**agent_settings(host, request_plan), **request}, timeout=timeout)
                for host, client in clients.items()
            }
            replies = {host: reply_of(future) for host, future in futures.items()}
            return {host: reply for host, reply in replies.items() if reply is not None}

        reached = request_all({"do": "configure"}, made_under)
        if silent := sorted(clients.keys() - reached.keys()):
            logger.warning("the snapshot agents of hosts %s do not answer: their snapshots are taken as lost", silent)
        clients = {host: clients[host] for host in reached}
        if snapshot_plan is not None:
            request_all({"do": "delete-other-slots"}, made_under)
        checked = request_all({"do": "verify-slots"}, made_under, timeout=WORK_TIMEOUT)
        statuses = {host: {**reply["status"], "address": clients[host].address} for host, reply in checked.items()}
        if made_under.slots == plan.slots:
            recovery = rebuild_newest(clients, statuses, plan, threads)
        else:
            recovery = Recovery(-1, (), explain_moved(statuses, made_under, plan))
            request_all({"do": "configure"}, plan)
        damaged = tuple(reason for reply in checked.values() for reason in reply["damaged"])
        recovery = replace(recovery, damaged=damaged, seconds=time.monotonic() - began)
        request_all({"do": "write-status", "recovery": asdict(recovery)}, plan)
    return recovery


def explain_moved(statuses: Statuses, before: ParityPlan, plan: ParityPlan) -> str:
    """Why nothing is rebuilt where an epoch is in other slots than the one before; empty where there is nothing."""
    steps = [int(step) for status in statuses.values() for step in status["snapshots"]]
    if not steps:
        return ""
    return f"snapshots up to step {max(steps)} were taken in slots {list(before.slots)}; slots {list(plan.slots)} go on"


def rebuild_newest(
    clients: Mapping[int, RequestClient], statuses: Statuses, plan: ParityPlan, threads: ThreadPoolExecutor
) -> Recovery:
    """Choose the newest step that can be recovered and rebuild what it lacks; an older step where that fails."""
    held_by_host = {host: held_snapshots_from_json(status) for host, status in statuses.items()}
    statuses_json = {str(host): status for host, status in statuses.items()}
    notes: list[str] = []
    while True:
        recovery = choose_recovery(held_by_host, plan.groups, max_lost_hosts=plan.max_lost_hosts)
        request = {"do": "rebuild-snapshot", "step": recovery.step, "statuses": statuses_json}
        rebuilding = {host: clients[host] for host in recovery.rebuilt if host in clients}
        futures = [threads.submit(client.request, request, timeout=WORK_TIMEOUT) for client in rebuilding.values()]
        failures = [str(error) for future in futures if (error := future.exception()) is not None]
        failures += [f"host {host} has no snapshot agent" for host in recovery.rebuilt if host not in clients]
        if not failures:
            return replace(recovery, note="; ".join([*notes, *([recovery.note] if recovery.note else [])]))
        notes += [f"step {recovery.step}: {failure}" for failure in failures]
        held_by_host = {host: drop_step(held, recovery.step) for host, held in held_by_host.items()}


def reply_of(future: Future) -> dict[str, Any] | None:
    """What an agent replied; None where it did not answer or refused."""
    try:
        return future.result()[0]
    except (OSError, RequestRefused):
        return None


def drop_step(held_snapshots: HeldSnapshots, step: int) -> HeldSnapshots:
    """What a host has besides `step`."""

    def without(by_step: Mapping[int, Any]) -> dict[int, Any]:
        return {other: value for other, value in by_step.items() if other != step}

    return HeldSnapshots(without(held_snapshots.snapshots), without(held_snapshots.parity))


@dataclass
class RecoveringEngine:
    """An engine whose epochs begin with a recovery of the snapshots."""

    engine: LaunchEngine
    agents: SnapshotAgents

    def start(self, epoch: int, *, slots: Sequence[int], overrides: Sequence[str]) -> None:
        """Recover, then start; without parity where too few hosts are left for it, which is logged."""
        self.engine.acquire(slots)
        plan = self.agents.recover(slots)
        if self.agents.plan.max_lost_hosts and not plan.max_lost_hosts:
            reason = (
                f"hosts {plan.active_hosts} of {plan.hosts} are too few for checkpoint.parity, until others are back"
            )
            record_event(self.agents.run, "unprotected", reason=reason, slots=list(plan.slots))
            overrides = (*overrides, "checkpoint.parity=none")
        self.engine.start(epoch, slots=slots, overrides=overrides)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)
