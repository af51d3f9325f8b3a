"""Who counts: what the islands of a run ask the rendezvous, so that all of them act on the same answer. JAX-free.

    enter     at the start: begin together, or bootstrap from islands that have begun
    present   a meeting of all: who takes part. Waits for whoever is alive and not far behind, `patience` at most
    voted     after the transfers: whose payloads count. Those that every voter has
    roster    a meeting in pairs: who is there. Waits for nobody
    ended     which islands have made their last update

Each answer is decided once for a key and never changes: an island that comes late is told what the others did, and sees
that it is behind. Where the decision is so old that it is forgotten, it is told that, and who is there. As in torchft,
islands with an older history than most are left out and bootstrap from the others. Islands that begin together begin
anew: what earlier ones decided, of this run or another, is no answer to them. So a rendezvous may outlive its runs.

The decisions are pure functions of what was asked and who is alive; `Arbiter` holds them and makes callers wait.
"""

import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ...parallel.transport.payload_server import kind
from ..core.rendezvous import MembershipStore, require_member

POLL_SECONDS = 0.05  # seconds between two looks at who is alive
MAX_DECISIONS = 512  # decisions


@dataclass(frozen=True)
class LiveMember:
    """A member, as decisions see it."""

    ticket: int
    step: int
    active: bool  # it has entered
    finished: bool  # it makes no more updates
    address: str


class Topic(NamedTuple):
    """What a decision is about: `what` happens again and again, `update` tells one time from another."""

    name: str
    update: int


@dataclass
class Question:
    """What was asked under one key, and when the first one asked."""

    since: float
    requests: dict[str, dict[str, Any]] = field(default_factory=dict)  # name -> what it said
    decision: dict[str, Any] | None = None
    waiting: int = 0  # calls that have no answer yet


def decide_start(
    question: Question, alive: Mapping[str, LiveMember], *, count: int, gather: float, now: float
) -> dict[str, Any] | None:
    """How those who asked begin: from the sources, who need nothing. None: not yet.

    Where somebody has begun already, from them. Else together, once `count` are there or `gather` is over: the source
    is the farthest one, and all whose state is the same (`version`) are sources too.
    """
    if active := sorted(name for name, one in alive.items() if one.active):
        return {"sources": active}
    here = {name: said for name, said in question.requests.items() if is_same_member(name, said, alive)}
    if not here or (len(here) < count and now - question.since < gather):
        return None
    first = min(here, key=lambda name: (-int(here[name]["step"]), name))
    alike = [name for name, said in here.items() if said["version"] == here[first]["version"]]
    return {"sources": sorted(alike), "together": True}


def decide_participants(
    question: Question, alive: Mapping[str, LiveMember], *, update: int, staleness: int, patience: float, minimum: int,
    now: float,
) -> dict[str, Any] | None:  # fmt: skip
    """Who takes part in a meeting after `update`: name -> [ticket, address]. None: not yet."""
    here = {name: said for name, said in question.requests.items() if is_same_member(name, said, alive)}
    awaited = [
        name
        for name, one in alive.items()
        if one.active and not one.finished and name not in here and one.step >= update - staleness
    ]
    if awaited and now - question.since < patience:
        return None
    chosen = most_common_history(here) if len(here) >= minimum else []
    history = here[chosen[0]]["history"] if chosen else None
    return {"members": {name: [alive[name].ticket, alive[name].address] for name in chosen}, "history": history}


def most_common_history(here: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Those whose history most have; the first by name decides a tie."""
    if not here:
        return []
    counts = Counter(said["history"] for said in here.values())
    chosen = min(counts, key=lambda one: (-counts[one], min(n for n in here if here[n]["history"] == one)))
    return sorted(name for name in here if here[name]["history"] == chosen)


def decide_votes(
    question: Question, members: Mapping[str, int], alive: Mapping[str, LiveMember], *, policy: str, minimum: int,
    patience: float, now: float,
) -> dict[str, Any] | None:  # fmt: skip
    """Whose payloads count: those that every voter has; [] where that are too few. None: not yet.

    `members` are name -> ticket: who has come back in another life will not vote on what the one before began.
    """
    waiting = [
        name
        for name, ticket in members.items()
        if name not in question.requests and is_same_member(name, {"ticket": ticket}, alive)
    ]
    if waiting and now - question.since < patience:
        return None
    held = [set(said["have"]) for said in question.requests.values()]
    common = sorted(set.intersection(*held)) if held else []
    reasons = {name: why for said in question.requests.values() for name, why in said["lost"].items()}
    lost = {name: reasons.get(name, "it did not vote") for name in sorted(members) if name not in common}
    enough = len(common) >= minimum and (policy == "average" or not lost)
    return {"count": common if enough else [], "lost": lost}


def decide_roster(alive: Mapping[str, LiveMember], asking: str, *, update: int, staleness: int) -> dict[str, Any]:
    """Who can be met after `update`: name -> [ticket, address] of all that are not far behind, `asking` among them."""
    near = [
        name
        for name, one in alive.items()
        if name == asking or (one.active and not one.finished and one.step >= update - staleness)
    ]
    return {"members": {name: [alive[name].ticket, alive[name].address] for name in sorted(near)}}


def is_same_member(name: str, said: Mapping[str, Any], alive: Mapping[str, LiveMember]) -> bool:
    """Whether whoever asked is still there, and is the one that asked."""
    return name in alive and alive[name].ticket == said["ticket"]


def topic_of(do: str, asked: Mapping[str, Any]) -> Topic:
    """What a question of a meeting is about."""
    return Topic(f"{do} {kind(asked['key'])}", int(asked["update"]))


class QuorumService:
    """Answers of a rendezvous to the islands in `room`: `operations` for its server."""

    def __init__(self, room: MembershipStore, clock: Callable[[], float] = time.monotonic) -> None:
        self._room, self._clock = room, clock
        self._changed = threading.Condition()
        self._questions: dict[Topic, Question] = {}
        self._forgotten: dict[str, int] = {}  # what was asked, and of which meeting -> its newest update not known now
        self._finished: set[tuple[str, str]] = set()  # (run, name) of those that made their last update
        self._began: set[tuple[str, int]] = set()  # lives that were told to begin together
        self.operations: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
            "enter": self.enter,
            "present": self.present,
            "voted": self.vote,
            "roster": self.roster,
            "ended": self.list_finished,
        }

    def enter(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """See `begun`. Who is told to begin together is active from then on, before it says so itself."""
        said = {key: asked[key] for key in ("ticket", "step", "version")}
        count, gather = int(asked["count"]), float(asked["gather"])

        def decide(question: Question, alive: Mapping[str, LiveMember], now: float) -> dict[str, Any] | None:
            left = sum(name not in alive for name in self._finished_of(asked["run"]))
            found = decide_start(question, alive, count=count - left, gather=gather, now=now)
            if found and found.get("together"):
                self._began = {(name, alive[name].ticket) for name in found["sources"]}
                self._questions, self._forgotten = {Topic("enter", 0): question}, {}
            return found

        return self._decided(Topic("enter", 0), asked, said, decide, keep=False)

    def present(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """See `met`."""
        rules = {
            "update": int(asked["update"]), "staleness": int(asked["staleness"]),
            "patience": float(asked["patience"]), "minimum": int(asked["minimum"]),
        }  # fmt: skip
        said = {"ticket": asked["ticket"], "history": asked["history"]}
        return self._decided(
            topic_of("present", asked),
            asked,
            said,
            lambda q, alive, now: decide_participants(q, alive, **rules, now=now),
        )

    def vote(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """See `counted`. Who comes late asks too, with `have` null: it has no vote."""
        rules = {"policy": asked["policy"], "minimum": int(asked["minimum"]), "patience": float(asked["patience"])}
        said = None if asked["have"] is None else {"have": list(asked["have"]), "lost": dict(asked["lost"])}
        return self._decided(
            topic_of("voted", asked),
            asked,
            said,
            lambda q, alive, now: decide_votes(q, asked["members"], alive, **rules, now=now),
        )

    def roster(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """See `listed`."""
        rules = {"update": int(asked["update"]), "staleness": int(asked["staleness"])}
        return self._decided(
            topic_of("roster", asked), asked, {}, lambda q, alive, now: decide_roster(alive, asked["name"], **rules)
        )

    def list_finished(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """The names of those of a run that have finished, also of those that have left since."""
        with self._changed:
            self._alive()
            return {"names": self._finished_of(asked["run"])}

    def _finished_of(self, run: str) -> list[str]:
        return sorted(name for of, name in self._finished if of == run)

    def _decided(
        self,
        key: Topic,
        asked: Mapping[str, Any],
        said: dict[str, Any] | None,
        decide: Callable[[Question, Mapping[str, LiveMember], float], dict[str, Any] | None],
        *,
        keep: bool = True,
    ) -> dict[str, Any]:
        """The decision under `key`, once there is one; what is not kept is decided anew for whoever asks later.

        Raises Refused where whoever asks is not a member, or ceases to be one while it waits.
        """
        with self._changed:
            require_member(self._room.membership, asked["name"], int(asked["ticket"]))
            question = self._questions.get(key)
            if question is None and keep and key.update <= self._forgotten.get(key.name, -1):
                return {"forgotten": self._others(asked["name"])}
            if question is None or (question.decision is not None and not keep):
                question = self._questions[key] = Question(self._clock())
                self._forget()
            if question.decision is None and said is not None:
                question.requests[asked["name"]] = said
                self._changed.notify_all()
            question.waiting += 1
            try:
                while question.decision is None:
                    require_member(self._room.membership, asked["name"], int(asked["ticket"]))
                    question.decision = decide(question, self._alive(), self._clock())
                    if question.decision is None:
                        self._changed.wait(POLL_SECONDS)
            finally:
                question.waiting -= 1
                if question.decision is None and not question.waiting and self._questions.get(key) is question:
                    del self._questions[key]  # all who asked have gone: the next one has not waited as long as they
            self._changed.notify_all()
            return question.decision

    def _forget(self) -> None:
        """Let go of the oldest decisions; who asks for them again must not be given others."""
        decided = [key for key, question in self._questions.items() if question.decision is not None]
        for key in decided[:-MAX_DECISIONS]:
            self._forgotten[key.name] = max(key.update, self._forgotten.get(key.name, -1))
            del self._questions[key]

    def _others(self, asking: str) -> dict[str, Any]:
        """Name -> [ticket, address] of all that have begun, but `asking`."""
        there = self._alive().items()
        return {name: [one.ticket, one.address] for name, one in there if one.active and name != asking}

    def _alive(self) -> dict[str, LiveMember]:
        members = self._room.membership.members
        for name, one in members.items():
            change = self._finished.add if one.info.get("finished") else self._finished.discard
            change((one.info.get("run", ""), name))
        return {
            name: LiveMember(
                one.ticket,
                int(one.info.get("step", 0)),
                (bool(one.info.get("active")) or (name, one.ticket) in self._began) and not one.info.get("catching_up"),
                bool(one.info.get("finished")),
                one.info.get("address", ""),
            )
            for name, one in members.items()
        }
