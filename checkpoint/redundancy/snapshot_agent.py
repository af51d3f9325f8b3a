"""The keeper of a host's snapshots: protects them by parity with other hosts', and rebuilds those of a lost one.

A keeper stands outside the trainers, so that neither their crash nor its own costs a snapshot: both work on slots in
/dev/shm. It holds nothing that a new keeper could not read there. JAX-free.

    a host's snapshot     the slots its processes wrote at one step (`snapshots.py`)
    a seal                fingerprint of the slots' heads, which hold fingerprints of all else
    parity.0, parity.1    this host's shares (`parity.py`), and of which seals they are made

Shares are made while the trainers go on: block after block, in pieces, is asked from the hosts that give to a stripe.
Everything asked for is named by its seal, and once all is read every host is asked whether it still has it: a slot
that was overwritten meanwhile is noticed. What is rebuilt is compared with the heads that the shares remember, and
block by block with its fingerprints.

Sources: REFT, arXiv:2310.12670 (snapshot management processes, RAIM5); DLRover's Flash Checkpoint.
"""

import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from ...parallel.transport.checked_stream import ClientPool, RequestClient, RequestRefused
from ..errors import DamagedCheckpoint
from . import agent_files
from .agent_files import Protected
from .host_snapshot import HostSnapshot, ProcessSlot, holding_from_json, scatter_to_slots, snapshot_from_json
from .parity import add, add_doubling, block_length, solve_stripe, stripe_hosts, stripes_of
from .parity_groups import group_holdings, parity_holders
from .rebuild_files import accept_drafts, allocate_drafts
from .rebuild_files import slot_path as slot_of
from .shm_slots import CHUNK_BYTES, SlotPool, read_head, read_header, verify_slot, write_slot

Info = Mapping[str, Any]  # what a keeper tells the others: address, held, shares (keys of JSON are strings)


class SnapshotAgent:
    """The keeper of host number `host`, on which the processes in `places` write their slots in `directory`.

    `groups`: hosts that protect each other; `losses`: how many of a group its parity bears, 0: there is none. A host in
    no group takes no part.
    """

    def __init__(
        self, directory: Path, *, host: int, launch_slots: Sequence[int], groups: Sequence[Sequence[int]], losses: int
    ) -> None:
        self.directory, self.host = directory, host
        self._part(launch_slots, groups, losses)
        self._pool = SlotPool()
        self._peers = ClientPool()
        self._turn = threading.Lock()  # protecting and rebuilding take turns
        self._since: dict[int, float] = {}  # step -> when the group was first seen to have it
        self._threads = ThreadPoolExecutor(8, "fetch")
        self.last_error = ""  # why the last attempt to protect failed

    def _part(self, places: Sequence[int], groups: Sequence[Sequence[int]], losses: int) -> None:
        self.losses, self._places, self._groups = losses, list(places), groups
        self._group: Sequence[int] = next((group for group in groups if self.host in group), ())

    def close(self) -> None:
        """Hang up and let go of the slots, which stay."""
        self._threads.shutdown()
        self._pool.close()
        self._peers.close()

    # --- what there is -----------------------------------------------------------------------------------------------

    def snapshots(self) -> dict[int, HostSnapshot]:
        """Step -> the snapshot, where every process of this host has a whole slot of it."""
        found: dict[int, list[ProcessSlot]] = {}
        for place in self._places:
            heads = {head.step: head for slot in (0, 1) if (head := read_head(self._slot(place, slot))) is not None}
            for step, head in heads.items():
                found.setdefault(step, []).append(ProcessSlot(place, head.bytes, head.raw.hex()))
        whole = len(self._places)
        return {step: HostSnapshot(step, tuple(pieces)) for step, pieces in found.items() if len(pieces) == whole}

    def parity_members(self) -> dict[int, dict[int, list[list[Any]]]]:
        """Step -> host -> the pieces its snapshot had, as this host's parity of that step remembers them."""
        headers = [read_header(self._share(slot)) for slot in (0, 1)] if self.losses else []
        return {
            header["step"]: {int(host): pieces for host, pieces in header["members"].items()}
            for header in headers
            if header is not None
        }

    def slot_heads(self) -> list[bytes]:
        """Changes whenever `info` does, and is cheap."""
        slots = [self._slot(place, slot) for place in self._places for slot in (0, 1)]
        slots += [self._share(slot) for slot in (0, 1)] if self.losses else []
        return [head.raw if (head := read_head(path)) is not None else b"" for path in slots]

    @property
    def has_unprotected(self) -> bool:
        """Whether there is a snapshot that is not protected yet."""
        return bool(self.losses) and max(self.snapshots(), default=-1) > agent_files.read_protected(self.directory).step

    def info(self) -> dict[str, Any]:
        """What the other keepers are told."""
        return {
            "held": {str(step): one.to_json() for step, one in self.snapshots().items()},
            "shares": {
                str(step): {str(host): snapshot_from_json(step, pieces).seal for host, pieces in made.items()}
                for step, made in self.parity_members().items()
            },
        }

    # --- protecting --------------------------------------------------------------------------------------------------

    def protect_newest(self, infos: Mapping[int, Info]) -> None:
        """Protect the newest step the group has, and note which one all groups protect. `infos`: of every keeper."""
        with self._turn:
            if not self.losses or not self._group:
                return
            theirs = {host: {int(step): made for step, made in info["held"].items()} for host, info in infos.items()}
            theirs[self.host] = {step: one.to_json() for step, one in self.snapshots().items()}
            if all(host in theirs for host in self._group):
                everybodys = set.intersection(*(set(theirs[host]) for host in self._group))
                if everybodys:
                    self._protect(max(everybodys), theirs, infos)
            self._announce(infos)

    def _protect(self, step: int, theirs: Mapping[int, Mapping[int, Any]], infos: Mapping[int, Info]) -> None:
        """Make this host's shares of `step`, unless they are there."""
        self._since.setdefault(step, time.monotonic())
        made = {host: snapshot_from_json(step, theirs[host][step]) for host in self._group}
        known = self.parity_members().get(step)
        if known is not None and known == {host: one.to_json() for host, one in made.items()}:
            return
        try:
            self._encode(step, made, infos)
            self.last_error = ""
        except (RequestRefused, OSError) as error:
            self.last_error = str(error)  # a later look tries again, with a newer step where there is one

    def _encode(self, step: int, made: Mapping[int, HostSnapshot], infos: Mapping[int, Info]) -> None:
        hosts, place = list(self._group), self._group.index(self.host)
        block = block_length(max(one.bytes for one in made.values()), hosts=len(hosts), losses=self.losses)
        header = {"step": step, "members": {host: one.to_json() for host, one in made.items()}}
        with write_slot(self._pool, self._share(self._free(step)), [block] * self.losses, header) as share:
            for number, add_to in enumerate((add, add_doubling)[: self.losses]):
                stripe = (place - number) % len(hosts)
                givers, _ = stripe_hosts(stripe, hosts=len(hosts), losses=self.losses)
                for start in range(0, block, CHUNK_BYTES):
                    size = min(CHUNK_BYTES, block - start)
                    with share.write_region(
                        number, size
                    ) as total:  # where the last giver's block arrives, awaited first
                        asked = [
                            self._threads.submit(
                                self._fetch, hosts[giver], infos, made[hosts[giver]].seal, step, into=into,
                                start=self._index(giver, stripe) * block + start, size=size,
                            ) for giver, into in zip(reversed(givers), [total] + [None] * len(givers), strict=False)
                        ]  # fmt: skip
                        _, *others = [one.result() for one in asked]
                        add_to(total, others)
            for host in hosts:  # nobody overwrote what was read meanwhile: slots are emptied first
                self._still(host, infos, made[host])

    def _announce(self, infos: Mapping[int, Info]) -> None:
        """Write down the newest step that every group protects; a step stays protected while it is there."""
        holdings = {host: holding_from_json(info) for host, info in {**infos, self.host: self.info()}.items()}
        safe = [
            step
            for step in holdings[self.host].snapshots
            if all(
                host in holdings
                and step in holdings[host].snapshots
                and host in parity_holders(step, group_holdings(group, holdings))
                for group in self._groups
                for host in group
            )
        ]
        known, here = agent_files.read_protected(self.directory), self.snapshots()
        still = [step for step, one in here.items() if (step, one.seal) == (known.step, known.seal)]
        step = max([*safe, *still], default=-1)
        seal = here[step].seal if step in here else ""
        if (step, seal) != (known.step, known.seal):
            took = time.monotonic() - self._since.get(step, time.monotonic())
            size = sum(head.bytes for slot in (0, 1) if (head := read_head(self._share(slot))) and head.step == step)
            agent_files.write_status(self.directory, Protected(step, seal, took, size))
        self._since = {step: when for step, when in self._since.items() if step in here}

    def _free(self, step: int) -> int:
        """The slot for the share of `step`: another time line's, else not the protected step's, else the older."""
        keep = agent_files.read_protected(self.directory).step
        known = {slot: head.step for slot in (0, 1) if (head := read_head(self._share(slot))) is not None}
        old = (known.get(slot, -1) for slot in (0, 1))
        order = [(one != step, one == keep, one, slot) for slot, one in enumerate(old)]
        return min(order)[-1]

    def _index(self, place: int, stripe: int) -> int:
        """Which of its blocks the host at `place` of the group gives to a stripe."""
        return stripes_of(place, hosts=len(self._group), losses=self.losses).index(stripe)

    # --- giving ------------------------------------------------------------------------------------------------------

    def read_snapshot(self, step: int, seal: str, *, start: int, size: int) -> np.ndarray:
        """Bytes of this host's snapshot, zeros behind its end; `held` tells afterwards whether they were still its."""
        parts, offset = [], 0
        for piece in self.require_snapshot(step, seal).slots:
            low, high = max(start, offset), min(start + size, offset + piece.bytes)
            if low < high:
                content = np.memmap(self._at(piece.process, piece.head), np.uint8, "r", 0, piece.bytes)
                parts.append((low - start, content[low - offset : high - offset]))
            offset += piece.padded
        if len(parts) == 1 and len(parts[0][1]) == size:
            return parts[0][1]
        result = np.zeros(size, np.uint8)
        for place, part in parts:
            result[place : place + len(part)] = part
        return result

    def require_snapshot(self, step: int, seal: str) -> HostSnapshot:
        """This host's snapshot. Raises NotGiven where it is not there (any more)."""
        snapshot = self.snapshots().get(step)
        if snapshot is None or snapshot.seal != seal:
            raise RequestRefused(f"host {self.host} has no snapshot {seal} of step {step}")
        return snapshot

    def read_parity(self, step: int, *, number: int, start: int, size: int) -> np.ndarray:
        """Bytes of this host's parity. Raises NotGiven where it is not there."""
        for slot in (0, 1):
            header = read_header(self._share(slot))
            if header is not None and header["step"] == step:
                with self._share(slot).open("rb") as file:
                    file.seek(header["blocks"][number][0] + start)
                    return np.frombuffer(file.read(size), np.uint8)
        raise RequestRefused(f"host {self.host} has no parity of step {step}")

    def answer(self, request: Info) -> tuple[dict[str, Any], Any]:
        """To another keeper, or to the launcher before the trainers start."""
        match request["do"]:
            case "read":
                span = {"start": request["start"], "size": request["size"]}
                return {}, self.read_snapshot(request["step"], request["seal"], **span)
            case "held":
                self.require_snapshot(request["step"], request["seal"])
                return {}, b""
            case "read-share":
                span = {"start": request["start"], "size": request["size"]}
                return {}, self.read_parity(request["step"], number=request["number"], **span)
            case "members":
                made = self.parity_members().get(request["step"], {})
                return {"members": {str(host): pieces for host, pieces in made.items()}}, b""
            case "check":
                return {"damaged": self.verify_slots(), "info": self.info()}, b""
            case "rebuild":
                self.rebuild(request["step"], {int(host): info for host, info in request["infos"].items()})
                return {}, b""
            case "settle":
                agent_files.write_status(self.directory, agent_files.recovery_from_json(request["word"]))
                return {}, b""
            case "form":
                with self._turn:
                    self._part(request["places"], request["groups"], request["losses"])
                return {}, b""
            case "sweep":
                self.delete_other_slots(request["places"])
                return {}, b""
            case other:
                known = "read, held, read-share, members, check, rebuild, settle, form, sweep"
                raise RequestRefused(f"do: {other!r} is none of {known}")

    # --- after a loss ------------------------------------------------------------------------------------------------

    def verify_slots(self) -> list[str]:
        """Verify every slot; delete what is damaged, and say what it was: it is rebuilt from parity, or older is used.

        Slots that were being written are none.
        """
        damaged = []
        with self._turn:
            for path in [*self.directory.glob("[0-9]*.[01]"), *self.directory.glob(agent_files.PARITY_GLOB)]:
                if (head := read_head(path)) is None:
                    continue
                header = read_header(path)
                try:
                    if header is None:
                        raise DamagedCheckpoint(f"snapshot {head.step}: the header of {path} is not what was written")
                    verify_slot(path, header)
                except DamagedCheckpoint as error:
                    damaged.append(str(error))
                    path.unlink(missing_ok=True)
        return damaged

    def delete_other_slots(self, places: Sequence[int]) -> None:
        """Delete the slots of other places: nobody wrote them in the last epoch, so another time line may have."""
        with self._turn:
            for path in self.directory.glob("[0-9]*.[01]"):
                if int(path.stem) not in places:
                    path.unlink(missing_ok=True)
            for path in self.directory.glob(agent_files.PARITY_GLOB) if not places else ():
                path.unlink(missing_ok=True)

    def rebuild(self, step: int, infos: Mapping[int, Info]) -> None:
        """Bring back this host's snapshot of `step` from the others' and their parity.

        Raises NotGiven where they do not have enough, DamagedCheckpoint where the result is not what was lost.
        """
        with self._turn:
            hosts, place = list(self._group), self._group.index(self.host)
            holdings = group_holdings(hosts, {host: holding_from_json(info) for host, info in infos.items()})
            holders = parity_holders(step, holdings)
            if not holders:
                raise RequestRefused(f"no host of group {hosts} has parity of step {step}")
            told, _ = self._peer(holders[0], infos).request({"do": "members", "step": step})
            made = {int(host): snapshot_from_json(step, pieces) for host, pieces in told["members"].items()}
            block = block_length(max(one.bytes for one in made.values()), hosts=len(hosts), losses=self.losses)
            lost = made[self.host]
            drafts = allocate_drafts(self.directory, lost)
            for index, stripe in enumerate(stripes_of(place, hosts=len(hosts), losses=self.losses)):
                givers, keepers = stripe_hosts(stripe, hosts=len(hosts), losses=self.losses)
                for start in range(0, block, CHUNK_BYTES):
                    size = min(CHUNK_BYTES, block - start)
                    data = {
                        number: self._fetch(
                            hosts[giver], infos, made[hosts[giver]].seal, step,
                            start=self._index(giver, stripe) * block + start, size=size,
                        ) for number, giver in enumerate(givers) if step in holdings[hosts[giver]].snapshots
                    }  # fmt: skip
                    shares = [
                        self._fetch_share(hosts[keeper], infos, step, number=number, start=start, size=size)
                        if hosts[keeper] in holders else None for number, keeper in enumerate(keepers)
                    ]  # fmt: skip
                    found = solve_stripe(data, shares, count=len(givers))[givers.index(place)]
                    scatter_to_slots(found, drafts, lost, start=index * block + start)
            accept_drafts(self.directory, lost, drafts)

    # --- the others --------------------------------------------------------------------------------------------------

    def _fetch(
        self, host: int, infos: Mapping[int, Info], seal: str, step: int, *, start: int, size: int,
        into: np.ndarray | None = None,
    ) -> np.ndarray:  # fmt: skip
        if host == self.host:
            return self.read_snapshot(step, seal, start=start, size=size)
        request = {"do": "read", "step": step, "seal": seal, "start": start, "size": size}
        return self._peer(host, infos).request(request, into=into)[1]

    def _still(self, host: int, infos: Mapping[int, Info], snapshot: HostSnapshot) -> None:
        """Raise NotGiven where a host does not hold a snapshot any more."""
        if host == self.host:
            self.require_snapshot(snapshot.step, snapshot.seal)
        else:
            self._peer(host, infos).request({"do": "held", "step": snapshot.step, "seal": snapshot.seal})

    def _fetch_share(
        self, host: int, infos: Mapping[int, Info], step: int, *, number: int, start: int, size: int
    ) -> np.ndarray:
        if host == self.host:
            return self.read_parity(step, number=number, start=start, size=size)
        request = {"do": "read-share", "step": step, "number": number, "start": start, "size": size}
        return self._peer(host, infos).request(request)[1]

    def _peer(self, host: int, infos: Mapping[int, Info]) -> RequestClient:
        """The keeper of another host, at the address it tells now."""
        return self._peers.client_for(host, infos[host]["address"])

    def _slot(self, place: int, slot: int) -> Path:
        return slot_of(self.directory, place, slot)

    def _share(self, slot: int) -> Path:
        return self.directory / f"parity.{slot}"

    def _at(self, process: int, head: str) -> Path:
        """The slot of a process that has this head."""
        for slot in (0, 1):
            found = read_head(self._slot(process, slot))
            if found is not None and found.raw.hex() == head:
                return self._slot(process, slot)
        raise RequestRefused(f"host {self.host}: process {process} overwrote its slot")
