"""The snapshot agent of a host: protects its snapshots by parity with other hosts, and rebuilds lost ones. JAX-free.

The agent is a process outside the trainers, so neither a crash of a trainer nor one of the agent costs a snapshot: both
work on slots in /dev/shm. The agent has no state that a new agent could not read there.

    a host's snapshot     the slots that its processes wrote at one step (`host_snapshot.py`)
    a seal                identifies a host's snapshot of a step: a hash over all its bytes
    parity.0, parity.1    slots with this host's parity blocks (`parity.py`) and the preambles of the slots they protect

Parity is computed while the trainers go on, chunk by chunk, from blocks that the other hosts of the group send. A
request names the seal of the snapshot, and after the last chunk every host is asked whether it still has that snapshot,
so a slot that was overwritten meanwhile is noticed. A rebuilt slot must have the preamble that the parity remembers,
and its blocks must have the hashes in its header.

Sources: REFT, arXiv:2310.12670 (snapshot management processes, RAIM5); DLRover's Flash Checkpoint.
"""

import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from ...parallel.transport.checked_stream import ClientPool, RequestRefused
from ..errors import DamagedCheckpoint
from . import agent_files, shm_slots
from .agent_files import ProtectedStep
from .host_snapshot import HostSnapshot, ProcessSlot, held_snapshots_from_json, scatter_to_slots, snapshot_from_json
from .parity import add, add_doubling, block_length, solve_stripe, stripe_hosts, stripes_of
from .parity_groups import held_by_group, parity_holders
from .rebuild_buffers import accept_rebuild_buffers, allocate_rebuild_buffers
from .shm_slots import CHUNK_BYTES, SlotPool, read_header, read_preamble, slot_files, slot_paths

REQUESTS = (  # what other agents and the launcher may ask, by the name of the function that serves it
    *("read-snapshot", "require-snapshot", "read-parity", "parity-members", "verify-slots", "rebuild-snapshot"),
    *("write-status", "configure", "delete-other-slots"),
)

Status = Mapping[str, Any]  # what an agent publishes: address, snapshots, parity; see `SnapshotAgent.status`
Statuses = Mapping[int, Status]  # by host


class SnapshotAgent:
    """The snapshot agent of host number `host`, whose processes write their slots in `directory`.

    `launch_slots`: of these processes; `groups`: hosts that protect each other; `max_lost_hosts`: lost hosts of a
    group that its parity tolerates, 0: no parity. A host in no group takes no part.
    """

    def __init__(
        self,
        directory: Path,
        *,
        host: int,
        launch_slots: Sequence[int],
        groups: Sequence[Sequence[int]],
        max_lost_hosts: int,
    ) -> None:
        self.directory, self.host = directory, host
        self._parity_paths = [directory / "parity.0", directory / "parity.1"]
        self._configure(launch_slots, groups, max_lost_hosts)
        self._pool, self._clients = SlotPool(), ClientPool()
        self._lock = threading.Lock()  # protecting and rebuilding exclude each other
        self._first_seen: dict[int, float] = {}  # step -> when all hosts of the group were first seen to have it
        self._threads = ThreadPoolExecutor(8, "fetch")
        self.last_error = ""  # why the last attempt to protect failed

    def _configure(self, launch_slots: Sequence[int], groups: Sequence[Sequence[int]], max_lost_hosts: int) -> None:
        self.max_lost_hosts, self._launch_slots, self._groups = max_lost_hosts, list(launch_slots), groups
        self._group: list[int] = list(next((group for group in groups if self.host in group), ()))

    def close(self) -> None:
        """Close connections and unmap the slots; the files stay."""
        self._threads.shutdown()
        self._pool.close()
        self._clients.close()

    # --- what this host has ------------------------------------------------------------------------------------------

    def snapshots(self) -> dict[int, HostSnapshot]:
        """Return step -> snapshot, for the steps of which every process of this host has a complete slot."""
        slots: dict[int, list[ProcessSlot]] = {}
        for launch_slot in self._launch_slots:
            preambles = [read_preamble(path) for path in slot_paths(self.directory, launch_slot)]
            for step, preamble in {preamble.step: preamble for preamble in preambles if preamble is not None}.items():
                slots.setdefault(step, []).append(ProcessSlot(launch_slot, preamble.bytes, preamble.raw.hex()))
        complete = len(self._launch_slots)
        return {step: HostSnapshot(step, tuple(parts)) for step, parts in slots.items() if len(parts) == complete}

    def parity_members(self) -> dict[int, dict[int, list[list[Any]]]]:
        """Return step -> host -> the slots (JSON) of the snapshot that this host's parity of the step was made from."""
        headers = map(read_header, self._parity_paths if self.max_lost_hosts else ())
        return {
            header["step"]: {int(host): slots for host, slots in header["members"].items()}
            for header in headers
            if header is not None
        }

    def slot_preambles(self) -> list[bytes]:
        """Return the preambles of all slots. Cheap to read, and they change whenever `status` does."""
        paths = [path for launch_slot in self._launch_slots for path in slot_paths(self.directory, launch_slot)]
        paths += self._parity_paths if self.max_lost_hosts else []
        return [preamble.raw if (preamble := read_preamble(path)) is not None else b"" for path in paths]

    @property
    def has_unprotected(self) -> bool:
        """Whether there is a snapshot that is not protected yet."""
        if not self.max_lost_hosts:
            return False
        return max(self.snapshots(), default=-1) > agent_files.read_protected(self.directory).step

    def status(self) -> dict[str, Any]:
        """Return what is published to the other agents, as JSON.

        snapshots   step -> the slots of this host's snapshot
        parity      step -> host -> seal of the snapshot that this host's parity of the step was made from
        """
        return {
            "snapshots": {str(step): snapshot.to_json() for step, snapshot in self.snapshots().items()},
            "parity": {
                str(step): {str(host): snapshot_from_json(step, slots).seal for host, slots in members.items()}
                for step, members in self.parity_members().items()
            },
        }

    # --- protecting --------------------------------------------------------------------------------------------------

    def protect_newest(self, statuses: Statuses) -> None:
        """Protect the newest step that all hosts of the group have, and write down which step all groups protect."""
        with self._lock:
            if not self.max_lost_hosts or not self._group:
                return
            slots_of = {  # host -> step -> the slots of its snapshot, as JSON
                host: {int(step): slots for step, slots in status["snapshots"].items()}
                for host, status in statuses.items()
            }
            slots_of[self.host] = {step: snapshot.to_json() for step, snapshot in self.snapshots().items()}
            if all(host in slots_of for host in self._group):
                common = set.intersection(*(set(slots_of[host]) for host in self._group))
                if common:
                    step = max(common)
                    self._protect(step, {host: slots_of[host][step] for host in self._group}, statuses)
            self._write_protected(statuses)

    def _protect(self, step: int, members: Mapping[int, Any], statuses: Statuses) -> None:
        """Compute this host's parity of `step`, unless it has it. `members`: host -> slots of its snapshot, as JSON."""
        self._first_seen.setdefault(step, time.monotonic())
        if self.parity_members().get(step) == members:
            return
        snapshots = {host: snapshot_from_json(step, slots) for host, slots in members.items()}
        try:
            self._compute_parity(step, snapshots, statuses)
            self.last_error = ""
        except (RequestRefused, OSError) as error:
            self.last_error = str(error)  # the next call tries again, with a newer step if there is one

    def _compute_parity(self, step: int, snapshots: Mapping[int, HostSnapshot], statuses: Statuses) -> None:
        hosts, position = self._group, self._group.index(self.host)
        length = self._block_length(snapshots)
        header = {"step": step, "members": {host: snapshot.to_json() for host, snapshot in snapshots.items()}}
        with shm_slots.write_slot(
            self._pool, self._parity_slot_to_write(step), [length] * self.max_lost_hosts, header
        ) as writer:
            for number, accumulate in enumerate((add, add_doubling)[: self.max_lost_hosts]):
                stripe = (position - number) % len(hosts)
                sources, _ = stripe_hosts(stripe, hosts=len(hosts), max_lost_hosts=self.max_lost_hosts)
                for start in range(0, length, CHUNK_BYTES):
                    size = min(CHUNK_BYTES, length - start)
                    with writer.write_region(number, size) as total:  # the block of the last source arrives in it
                        futures = [
                            self._threads.submit(
                                self._fetch_data, snapshots, hosts[source], statuses, into=into,
                                start=self._block_number(source, stripe) * length + start, size=size,
                            ) for source, into in zip(reversed(sources), [total] + [None] * len(sources), strict=False)
                        ]  # fmt: skip
                        _, *blocks = [future.result() for future in futures]
                        accumulate(total, blocks)
            for (
                host
            ) in hosts:  # a slot is emptied before it is overwritten, so a snapshot that is still there was intact
                self._request(host, {"do": "require-snapshot", "step": step, "seal": snapshots[host].seal}, statuses)

    def _write_protected(self, statuses: Statuses) -> None:
        """Write down the newest step that every group protects. It counts as protected as long as it is there."""
        statuses = {**statuses, self.host: self.status()}
        held_by_host = {host: held_snapshots_from_json(status) for host, status in statuses.items()}
        protected = [
            step
            for step in held_by_host[self.host].snapshots
            if all(
                host in held_by_host
                and step in held_by_host[host].snapshots
                and host in parity_holders(step, held_by_group(group, held_by_host))
                for group in self._groups
                for host in group
            )
        ]
        previous, snapshots = agent_files.read_protected(self.directory), self.snapshots()
        if previous.step in snapshots and snapshots[previous.step].seal == previous.seal:
            protected.append(previous.step)
        step = max(protected, default=-1)
        seal = snapshots[step].seal if step in snapshots else ""
        if (step, seal) != (previous.step, previous.seal):
            seconds = time.monotonic() - self._first_seen.get(step, time.monotonic())
            preambles = filter(None, map(read_preamble, self._parity_paths))
            size = sum(preamble.bytes for preamble in preambles if preamble.step == step)
            agent_files.write_status(self.directory, ProtectedStep(step, seal, seconds, size))
        self._first_seen = {step: seen for step, seen in self._first_seen.items() if step in snapshots}

    def _parity_slot_to_write(self, step: int) -> Path:
        """Return the parity slot of the same step, an outdated one, if any; else one not protected; else the older."""
        protected = agent_files.read_protected(self.directory).step

        def priority(path: Path) -> tuple[bool, bool, int]:
            present = shm_slots.slot_step(path)
            return present != step, present == protected, present

        return min(self._parity_paths, key=priority)

    def _block_length(self, snapshots: Mapping[int, HostSnapshot]) -> int:
        longest = max(snapshot.bytes for snapshot in snapshots.values())
        return block_length(longest, hosts=len(self._group), max_lost_hosts=self.max_lost_hosts)

    def _block_number(self, position: int, stripe: int) -> int:
        """Return which of its blocks the host at `position` of the group contributes to a stripe."""
        return stripes_of(position, hosts=len(self._group), max_lost_hosts=self.max_lost_hosts).index(stripe)

    # --- answering ---------------------------------------------------------------------------------------------------

    def read_snapshot(self, step: int, seal: str, *, start: int, size: int) -> np.ndarray:
        """Read bytes of this host's snapshot, zeros behind its end. The caller asks "require-snapshot" afterwards."""
        parts, offset = [], 0
        for slot in self.require_snapshot(step, seal).slots:
            low, high = max(start, offset), min(start + size, offset + slot.bytes)
            if low < high:
                content = np.memmap(self._path_of(slot), np.uint8, "r", 0, slot.bytes)
                parts.append((low - start, content[low - offset : high - offset]))
            offset += slot.padded
        if len(parts) == 1 and len(parts[0][1]) == size:
            return parts[0][1]
        result = np.zeros(size, np.uint8)
        for first, part in parts:
            result[first : first + len(part)] = part
        return result

    def require_snapshot(self, step: int, seal: str) -> HostSnapshot:
        """Return this host's snapshot. Raises RequestRefused if it is not there, or not any more."""
        snapshot = self.snapshots().get(step)
        if snapshot is None or snapshot.seal != seal:
            raise RequestRefused(f"host {self.host} has no snapshot {seal} of step {step}")
        return snapshot

    def read_parity(self, step: int, *, number: int, start: int, size: int) -> np.ndarray:
        """Read bytes of this host's parity block `number` (0: P, 1: Q). Raises RequestRefused if it is not there."""
        for path in self._parity_paths:
            header = read_header(path)
            if header is not None and header["step"] == step:
                return np.fromfile(path, np.uint8, size, offset=header["blocks"][number][0] + start)
        raise RequestRefused(f"host {self.host} has no parity of step {step}")

    def answer(self, request: Mapping[str, Any]) -> tuple[dict[str, Any], Any]:
        """Answer a request of another agent, or of the launcher before the trainers start: (JSON, bytes)."""
        match request["do"]:
            case "read-snapshot":
                return {}, self.read_snapshot(**{key: request[key] for key in ("step", "seal", "start", "size")})
            case "require-snapshot":
                self.require_snapshot(request["step"], request["seal"])
                return {}, b""
            case "read-parity":
                return {}, self.read_parity(**{key: request[key] for key in ("step", "number", "start", "size")})
            case "parity-members":
                members = self.parity_members().get(request["step"], {})
                return {"members": {str(host): slots for host, slots in members.items()}}, b""
            case "verify-slots":
                return {"damaged": self.verify_slots(), "status": self.status()}, b""
            case "rebuild-snapshot":
                statuses = {int(host): status for host, status in request["statuses"].items()}
                self.rebuild_snapshot(request["step"], statuses)
                return {}, b""
            case "write-status":
                agent_files.write_status(self.directory, agent_files.recovery_from_json(request["recovery"]))
                return {}, b""
            case "configure":
                with self._lock:
                    self._configure(request["launch_slots"], request["groups"], request["max_lost_hosts"])
                return {}, b""
            case "delete-other-slots":
                self.delete_other_slots(request["launch_slots"])
                return {}, b""
            case other:
                raise RequestRefused(f"do: {other!r} is none of {', '.join(REQUESTS)}")

    # --- after a loss ------------------------------------------------------------------------------------------------

    def verify_slots(self) -> list[str]:
        """Verify every complete slot, delete the damaged ones, and return a sentence about each of these."""
        damaged = []
        with self._lock:
            for path in [*slot_files(self.directory), *self._parity_paths]:
                if (preamble := read_preamble(path)) is None:
                    continue
                header = read_header(path)
                try:
                    if header is None:
                        raise DamagedCheckpoint(f"snapshot {preamble.step}: the header of {path} is damaged")
                    shm_slots.verify_slot(path, header)
                except DamagedCheckpoint as error:
                    damaged.append(str(error))
                    path.unlink(missing_ok=True)
        return damaged

    def delete_other_slots(self, launch_slots: Sequence[int]) -> None:
        """Delete the slots of other launch slots: they took no part in the last epoch, so their steps are outdated."""
        with self._lock:
            outdated = [path for path in slot_files(self.directory) if int(path.stem) not in launch_slots]
            for path in outdated if launch_slots else [*outdated, *self._parity_paths]:
                path.unlink(missing_ok=True)

    def rebuild_snapshot(self, step: int, statuses: Statuses) -> None:
        """Rebuild this host's snapshot of `step` from the snapshots and the parity of the others.

        Raises RequestRefused if they do not have enough, DamagedCheckpoint if the result is not what was lost.
        """
        with self._lock:
            hosts, position = self._group, self._group.index(self.host)
            held_by_host = {host: held_snapshots_from_json(status) for host, status in statuses.items()}
            held_by_host = held_by_group(hosts, held_by_host)
            holders = parity_holders(step, held_by_host)
            if not holders:
                raise RequestRefused(f"no host of group {hosts} has parity of step {step}")
            answer, _ = self._request(holders[0], {"do": "parity-members", "step": step}, statuses)
            snapshots = {int(host): snapshot_from_json(step, slots) for host, slots in answer["members"].items()}
            length = self._block_length(snapshots)
            buffers = allocate_rebuild_buffers(self.directory, snapshots[self.host])
            for block, stripe in enumerate(stripes_of(position, hosts=len(hosts), max_lost_hosts=self.max_lost_hosts)):
                data_hosts, parity_hosts = stripe_hosts(stripe, hosts=len(hosts), max_lost_hosts=self.max_lost_hosts)
                for start in range(0, length, CHUNK_BYTES):
                    size = min(CHUNK_BYTES, length - start)
                    data = {
                        number: self._fetch_data(
                            snapshots, hosts[source], statuses,
                            start=self._block_number(source, stripe) * length + start, size=size,
                        ) for number, source in enumerate(data_hosts) if step in held_by_host[hosts[source]].snapshots
                    }  # fmt: skip
                    request = {"do": "read-parity", "step": step, "start": start, "size": size}
                    parities = [
                        self._request(hosts[source], {**request, "number": number}, statuses)[1]
                        if hosts[source] in holders else None for number, source in enumerate(parity_hosts)
                    ]  # fmt: skip
                    solved = solve_stripe(data, parities, count=len(data_hosts))[data_hosts.index(position)]
                    scatter_to_slots(solved, buffers, snapshots[self.host], start=block * length + start)
            accept_rebuild_buffers(self.directory, snapshots[self.host], buffers)

    # --- requests ----------------------------------------------------------------------------------------------------

    def _fetch_data(
        self, snapshots: Mapping[int, HostSnapshot], host: int, statuses: Statuses, *, start: int, size: int,
        into: np.ndarray | None = None,
    ) -> np.ndarray:  # fmt: skip
        """Fetch bytes of the snapshot of `host`."""
        snapshot = snapshots[host]
        request = {"do": "read-snapshot", "step": snapshot.step, "seal": snapshot.seal, "start": start, "size": size}
        return self._request(host, request, statuses, into=into)[1]

    def _request(
        self, host: int, request: Mapping[str, Any], statuses: Statuses, *, into: np.ndarray | None = None
    ) -> tuple[dict[str, Any], Any]:
        """Send a request to the agent of `host`, at the address it publishes; this host's are answered directly."""
        if host == self.host:
            return self.answer(request)
        return self._clients.client_for(host, statuses[host]["address"]).request(request, into=into)

    def _path_of(self, slot: ProcessSlot) -> Path:
        for path in slot_paths(self.directory, slot.launch_slot):
            preamble = read_preamble(path)
            if preamble is not None and preamble.raw.hex() == slot.preamble:
                return path
        raise RequestRefused(f"host {self.host}: launch slot {slot.launch_slot} has overwritten its slot")
