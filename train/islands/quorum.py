"""Quorum: decisions that all islands of a run share, made by the rendezvous. JAX-free.

    enter               at the start: start together, or bootstrap from islands that have started
    list-participants   a round of all islands: who takes part. Waits up to `patience` for live islands that are not far
                        behind
    vote                after the transfers: whose payloads count, namely those that every voter has
    list-partners       a round in pairs: who is there. Waits for nobody
    list-finished       which islands have made their last update

A decision is made once for a `DecisionKey` and never changes, so an island that comes late learns what the others did,
and notices that it is behind. If the decision is so old that it was dropped, the island is told so, and who is there.
As in torchft, islands with an older history than most are left out and bootstrap from the others. When islands start
together, all earlier decisions, of this run or another, are dropped, so a rendezvous may outlive its runs.

The decisions are pure functions of the requests and the live members; `QuorumService` stores them and blocks callers.
"""

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ...parallel.transport.payload_server import kind
from ..core.rendezvous import MembershipStore, require_member

POLL_SECONDS = 0.05  # between two looks at the live members
MAX_DECISIONS = 512  # decisions that are remembered

Json = dict[str, Any]


@dataclass(frozen=True)
class LiveMember:
    """What the decisions know of a member."""

    ticket: int
    step: int
    active: bool  # it has started
    finished: bool  # it makes no more updates
    address: str


class DecisionKey(NamedTuple):
    """What a decision is about: a kind of decision and of round, after update number `update`."""

    name: str
    update: int


@dataclass
class PendingDecision:
    """The requests for one decision."""

    since: float  # time of the first request
    requests: dict[str, Json] = field(default_factory=dict)  # by the name of the island
    decision: Json | None = None
    waiting: int = 0  # number of calls that wait for the decision


Decide = Callable[[PendingDecision, Mapping[str, LiveMember], float], Json | None]  # (pending, live members, now)


def decide_start(
    pending: PendingDecision, alive: Mapping[str, LiveMember], *, count: int, gather: float, now: float
) -> Json | None:
    """Decide which islands are sources: they start with their own state, and the others bootstrap. None: not yet.

    The sources are the islands that have started already, if any. Else all start together once `count` are there or
    `gather` seconds are over: the sources are the island with the most updates and all with the same state (`version`).
    """
    if active := sorted(name for name, member in alive.items() if member.active):
        return {"sources": active}
    present = current_requests(pending, alive)
    if not present or (len(present) < count and now - pending.since < gather):
        return None
    first = min(present, key=lambda name: (-int(present[name]["step"]), name))
    same = [name for name, request in present.items() if request["version"] == present[first]["version"]]
    return {"sources": sorted(same), "together": True}


def decide_participants(
    pending: PendingDecision, alive: Mapping[str, LiveMember], *, update: int, staleness: int, patience: float,
    minimum: int, now: float,
) -> Json | None:  # fmt: skip
    """Decide who takes part in a round after `update`: name -> [ticket, address]. None: not yet."""
    present = current_requests(pending, alive)
    awaited = [name for name in reachable(alive, update=update, staleness=staleness) if name not in present]
    if awaited and now - pending.since < patience:
        return None
    participants = most_common_history(present) if len(present) >= minimum else []
    history = present[participants[0]]["history"] if participants else None
    return {"members": addresses(participants, alive), "history": history}


def most_common_history(present: Mapping[str, Json]) -> list[str]:
    """Return the islands with the history that most have; a tie goes to the first by name."""
    if not present:
        return []
    by_history: dict[str, list[str]] = {}
    for name in sorted(present):
        by_history.setdefault(present[name]["history"], []).append(name)
    return max(by_history.values(), key=len)


def decide_votes(
    pending: PendingDecision, members: Mapping[str, int], alive: Mapping[str, LiveMember], *, policy: str, minimum: int,
    patience: float, now: float,
) -> Json | None:  # fmt: skip
    """Decide whose payloads count: those that every voter has; [] if they are too few. None: not yet.

    `members`: name -> ticket. An island that left and joined again has another ticket and is not waited for.
    """
    awaited = [
        name
        for name, ticket in members.items()
        if name not in pending.requests and is_same_member(name, {"ticket": ticket}, alive)
    ]
    if awaited and now - pending.since < patience:
        return None
    received = [set(request["have"]) for request in pending.requests.values()]
    common = sorted(set.intersection(*received)) if received else []
    reasons = {name: reason for request in pending.requests.values() for name, reason in request["lost"].items()}
    failures = {name: reasons.get(name, "it did not vote") for name in sorted(members) if name not in common}
    enough = len(common) >= minimum and (policy == "average" or not failures)
    return {"count": common if enough else [], "lost": failures}


def decide_partners(alive: Mapping[str, LiveMember], asking: str, *, update: int, staleness: int) -> Json:
    """Return the islands to pair with after `update`, `asking` among them: name -> [ticket, address]."""
    partners = reachable(alive, update=update, staleness=staleness)
    return {"members": addresses(sorted(name for name in alive if name == asking or name in partners), alive)}


def reachable(alive: Mapping[str, LiveMember], *, update: int, staleness: int) -> list[str]:
    """Return the islands that train and are at most `staleness` updates behind `update`."""
    return [
        name
        for name, member in alive.items()
        if member.active and not member.finished and member.step >= update - staleness
    ]


def addresses(names: list[str], alive: Mapping[str, LiveMember]) -> dict[str, list[Any]]:
    """Return name -> [ticket, address]."""
    return {name: [alive[name].ticket, alive[name].address] for name in names}


def current_requests(pending: PendingDecision, alive: Mapping[str, LiveMember]) -> dict[str, Json]:
    """Return the requests of members that are still there."""
    return {name: request for name, request in pending.requests.items() if is_same_member(name, request, alive)}


def is_same_member(name: str, request: Mapping[str, Any], alive: Mapping[str, LiveMember]) -> bool:
    """Return whether the member that made the request is still there, under the same ticket."""
    return name in alive and alive[name].ticket == request["ticket"]


def decision_key(do: str, request: Mapping[str, Any]) -> DecisionKey:
    """Return the key of the decision that a request about a round asks for."""
    return DecisionKey(f"{do} {kind(request['key'])}", int(request["update"]))


class QuorumService:
    """Makes the decisions for the islands in `store`; `operations` are for the server of the rendezvous."""

    def __init__(self, store: MembershipStore, clock: Callable[[], float] = time.monotonic) -> None:
        self._store, self._clock = store, clock
        self._changed = threading.Condition()
        self._decisions: dict[DecisionKey, PendingDecision] = {}
        self._dropped: dict[str, int] = {}  # name of a key -> its newest update whose decision was dropped
        self._finished: set[tuple[str, str]] = set()  # (run, name) of islands that made their last update
        self._started: set[tuple[str, int]] = set()  # (name, ticket) of islands that were told to start together
        self.operations: dict[str, Callable[[Mapping[str, Any]], Json]] = {
            "enter": self.enter,
            "list-participants": self.list_participants,
            "vote": self.vote,
            "list-partners": self.list_partners,
            "list-finished": self.list_finished,
        }

    def enter(self, request: Mapping[str, Any]) -> Json:
        """See `decide_start`. Islands that are told to start together are active at once, before they say so."""
        content = {key: request[key] for key in ("ticket", "step", "version")}
        count, gather = int(request["count"]), float(request["gather"])

        def decide(pending: PendingDecision, alive: Mapping[str, LiveMember], now: float) -> Json | None:
            gone = sum(name not in alive for name in self._finished_of(request["run"]))
            decision = decide_start(pending, alive, count=count - gone, gather=gather, now=now)
            if decision and decision.get("together"):
                self._started = {(name, alive[name].ticket) for name in decision["sources"]}
                self._decisions, self._dropped = {DecisionKey("enter", 0): pending}, {}
            return decision

        return self._decide(DecisionKey("enter", 0), request, content, decide, remember=False)

    def list_participants(self, request: Mapping[str, Any]) -> Json:
        """See `decide_participants`."""
        rules = {
            "update": int(request["update"]), "staleness": int(request["staleness"]),
            "patience": float(request["patience"]), "minimum": int(request["minimum"]),
        }  # fmt: skip
        content = {"ticket": request["ticket"], "history": request["history"]}
        decide = lambda pending, alive, now: decide_participants(pending, alive, **rules, now=now)
        return self._decide(decision_key("list-participants", request), request, content, decide)

    def vote(self, request: Mapping[str, Any]) -> Json:
        """See `decide_votes`. With `have` null the island has no vote: it comes late."""
        rules = {
            "policy": request["policy"], "minimum": int(request["minimum"]), "patience": float(request["patience"])
        }  # fmt: skip
        content = None
        if request["have"] is not None:
            content = {"have": list(request["have"]), "lost": dict(request["lost"])}
        decide = lambda pending, alive, now: decide_votes(pending, request["members"], alive, **rules, now=now)
        return self._decide(decision_key("vote", request), request, content, decide)

    def list_partners(self, request: Mapping[str, Any]) -> Json:
        """See `decide_partners`."""
        rules = {"update": int(request["update"]), "staleness": int(request["staleness"])}
        decide = lambda pending, alive, now: decide_partners(alive, request["name"], **rules)
        return self._decide(decision_key("list-partners", request), request, {}, decide)

    def list_finished(self, request: Mapping[str, Any]) -> Json:
        """Return the names of the islands of a run that have finished, those that have left since included."""
        with self._changed:
            self._live_members()
            return {"names": self._finished_of(request["run"])}

    def _finished_of(self, run: str) -> list[str]:
        return sorted(name for finished_run, name in self._finished if finished_run == run)

    def _decide(
        self, key: DecisionKey, request: Mapping[str, Any], content: Json | None, decide: Decide, *,
        remember: bool = True,
    ) -> Json:  # fmt: skip
        """Add `content` to the requests for the decision of `key`, wait for that, and return it.

        Without `remember` a request after the decision starts a new one. Raises NotAMember if the caller is not a
        member, or stops being one while it waits.
        """
        name, ticket = request["name"], int(request["ticket"])
        with self._changed:
            require_member(self._store.membership, name, ticket)
            pending = self._decisions.get(key)
            if pending is None and remember and key.update <= self._dropped.get(key.name, -1):
                return {"round_expired": self._active_except(name)}
            if pending is None or (pending.decision is not None and not remember):
                pending = self._decisions[key] = PendingDecision(self._clock())
                self._drop_oldest()
            if pending.decision is None and content is not None:
                pending.requests[name] = content
                self._changed.notify_all()
            pending.waiting += 1
            try:
                while pending.decision is None:
                    require_member(self._store.membership, name, ticket)
                    pending.decision = decide(pending, self._live_members(), self._clock())
                    if pending.decision is None:
                        self._changed.wait(POLL_SECONDS)
            finally:
                pending.waiting -= 1
                if pending.decision is None and not pending.waiting and self._decisions.get(key) is pending:
                    del self._decisions[key]  # all callers have gone: the time of the next one starts anew
            self._changed.notify_all()
            return pending.decision

    def _drop_oldest(self) -> None:
        """Drop the oldest decisions, and note which, so that they are not made again differently."""
        decided = [key for key, pending in self._decisions.items() if pending.decision is not None]
        for key in decided[:-MAX_DECISIONS]:
            self._dropped[key.name] = max(key.update, self._dropped.get(key.name, -1))
            del self._decisions[key]

    def _active_except(self, asking: str) -> dict[str, list[Any]]:
        alive = self._live_members()
        return addresses([name for name, member in alive.items() if member.active and name != asking], alive)

    def _live_members(self) -> dict[str, LiveMember]:
        alive = {}
        for name, member in self._store.membership.members.items():
            info, finished = member.info, bool(member.info.get("finished"))
            (self._finished.add if finished else self._finished.discard)((info.get("run", ""), name))
            started = bool(info.get("active")) or (name, member.ticket) in self._started
            active = started and not info.get("catching_up")
            address = info.get("address", "")
            alive[name] = LiveMember(member.ticket, int(info.get("step", 0)), active, finished, address)
        return alive
