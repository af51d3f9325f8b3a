"""The islands of a run as one of them sees them: joining, exchanging, catching up, leaving. JAX-free.

    group = Group(office, islands, ...)                      joins; a thread keeps saying that it is alive
    group.enter(step=0, version="...")                       who begins, and whom the others bootstrap from
    group.average("send-2 137", payload, ...)                one meeting of all: whose payloads count, and the payloads
    group.pair("meet 150", payload, ...)                     one meeting in pairs
    group.state(sources)                                     another island's state
    group.leave()

Every wait is bounded by the section `islands`. Without an answer from the rendezvous a meeting fails, and is skipped.
"""

import itertools
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from ...configs.errors import MeshwrightError, UserError
from ...configs.sections.islands import IslandsConfig
from ...parallel.outer.matchings import matching_for_round, matchings
from ...parallel.transport.payload_server import FetchFailure, PayloadServer, Peer, kind
from ..core.rendezvous import Client, NotAMember

HEARTBEAT_SECONDS = 0.2  # seconds; less than that where the time-to-live is short
RETRY_SECONDS = 0.5  # seconds before a silent rendezvous is asked again


@dataclass(frozen=True)
class RoundResult:
    """How a meeting ended.

    applied   `payloads` are what counts, this island's own among them (in pairs: the partner's alone)
    skipped   nothing counts; the drift goes on to the next meeting
    behind    the others have met without this island, which bootstraps from one of `sources`
    """

    kind: str
    payloads: Mapping[str, bytes] = field(default_factory=dict)
    failures: Mapping[str, str] = field(default_factory=dict)  # name -> why its payload does not count
    sources: Sequence[Peer] = ()
    seconds: float = 0.0


class RoundForgotten(Exception):
    """The rendezvous knows no more what the others did at a meeting: that was long ago."""

    def __init__(self, others: Sequence[Peer]) -> None:
        super().__init__(f"long ago; there are {[peer.name for peer in others]}")
        self.others = others


class IslandGroup:
    """Membership of one island. `problem(meeting, payload)` says what is wrong with a payload, if anything."""

    def __init__(
        self,
        office: PayloadServer,
        islands: IslandsConfig,
        *,
        address: str,
        find_problem: Callable[[str, bytes], str | None],
    ) -> None:
        self._office, self._islands, self.name = office, islands, office.name
        self._problem = find_problem
        self._info: dict[str, Any] = {"address": address, "run": office.fingerprint, "step": 0, "active": False}
        self._members: dict[str, dict[str, Any]] = {}
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._asked = itertools.count()
        self._taken: str | None = None  # why this island may not go on
        self._silent = False  # the rendezvous was waited for in vain, and has not been heard since
        with self._client() as client:
            self._members = client.join(self._info)["members"]
            self.ticket = client.ticket
        self._beats = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._beats.start()

    def check_same_run(self) -> None:
        """Raise UserError where an island that joined earlier is of another run, naming what differs."""
        for peer in self._peers():
            if peer.ticket < self.ticket and (different := self._office.compare_settings(peer)):
                keys = [f"{key} ({there} there, {here} here)" for key, (there, here) in different.items()]
                raise UserError(
                    f"islands.meet: {peer.name} at {peer.address} is of another run: {', '.join(keys[:4])}; give all "
                    "islands one configuration, or another rendezvous"
                )

    def publish_status(self, **info: Any) -> None:
        """What the others hear with the next heartbeat: step, finished, ... Raises UserError where displaced."""
        if self._taken is not None:
            raise UserError(self._taken)
        self._info.update(info)

    def publish_status_now(self, **info: Any) -> None:
        """`tell`, heard before this returns, if the rendezvous answers."""
        self.publish_status(**info)
        with suppress(OSError):
            self._ask("ended", run=self._info["run"])

    def enter(self, *, step: int, version: str) -> tuple[bool, list[Peer]]:
        """Whether this island begins with what it has, and otherwise whom it bootstraps from. `version` is its state's.

        Raises MeshwrightError where the rendezvous does not answer.
        """
        self.publish_status(step=step)  # who begins is awaited at the first meeting, which may be a moment away
        found = self._ask(
            "enter", patience=self._islands.gather + 10, run=self._info["run"], step=step, version=version,
            count=self._islands.count, gather=self._islands.gather,
        )  # fmt: skip
        sources = found["sources"]
        if self.name in sources:
            self._info["active"] = True
            return True, []
        return False, [peer for peer in self._peers() if peer.name in sources]

    def average(self, key: str, payload: bytes, *, update: int, history: str) -> RoundResult:
        """Meet everybody: all whose answer is `applied` hold the same payloads, to be averaged."""
        return self._timed(lambda: self._average(key, payload, update, history))

    def pair(self, key: str, payload: bytes, *, update: int, seed: int) -> RoundResult:
        """Meet this meeting's partner; alone (one's own payload) where the number is odd, or the partner fails."""
        return self._timed(lambda: self._pair(key, payload, update, seed))

    def fetch_state(self, sources: Sequence[Peer]) -> bytes | None:
        """The state of one of `sources`, another one first for each island; None where none gave it."""
        if not sources:
            return None
        self.publish_status_now(catching_up=True)  # nobody waits for an island that catches up
        turn = sum(self.name.encode()) % len(sources)
        for peer in [*sources[turn:], *sources[:turn]]:
            key = f"state {self.name}/{self.ticket}/{next(self._asked)}"
            found = self._collect(key, [peer])[peer.name]
            if not isinstance(found, FetchFailure):
                return found
        self.publish_status(catching_up=False)  # it goes on with what it has
        return None

    def has_unfinished(self) -> bool:
        """Whether an island of the run has updates to make, be it here or not; False where the rendezvous is silent."""
        try:
            with self._client() as client:
                ended = client.ask("ended", run=self._info["run"])["names"]
        except OSError:
            return False
        return len(ended) < self._islands.count

    def peer_statuses(self) -> dict[str, Mapping[str, Any]]:
        """What the other members last told."""
        return {name: info for name, info in self._members.items() if name != self.name}

    def leave(self) -> None:
        """Take part no longer; the others do not wait for this island."""
        self._ended.set()
        self._beats.join()
        try:
            with self._client() as client:
                client.ticket = self.ticket
                client.leave()
        except (OSError, NotAMember):
            pass  # it is gone either way

    # ---- meetings

    def _average(self, key: str, payload: bytes, update: int, history: str) -> RoundResult:
        members, told = self._present(key, payload, update=update, history=history)
        if not members:
            return RoundResult("skipped", failures={"all": "too few"})
        if self.name not in members:
            return (
                self._late(key, members, update)
                if told == history
                else RoundResult("behind", sources=list(members.values()))
            )
        found = self._judged(key, {self.name: payload} | self._collect(key, peers_except(self.name, members)))
        have = [name for name, one in found.items() if not isinstance(one, FetchFailure)]
        lost = {name: one.reason for name, one in found.items() if isinstance(one, FetchFailure)}
        count, lost = self._voted(key, members, update, have=have, lost=lost)
        if not count:
            return RoundResult("skipped", failures=lost)
        if self.name not in have or not set(count) <= set(have):
            # Its own drift is of no use, or it lacks another's: it has to go where the others went.
            return RoundResult("behind", failures=lost, sources=[members[name] for name in count if name != self.name])
        return RoundResult("applied", {name: found[name] for name in sorted(count)}, lost)

    def _late(self, key: str, members: Mapping[str, Peer], update: int) -> RoundResult:
        """A meeting that took place without this island, which was with the others before: it takes what they took."""
        count, lost = self._voted(key, members, update, have=None, lost={})
        found = self._judged(key, self._collect(key, [members[name] for name in count]))
        if not count:
            return RoundResult("skipped", failures=lost)
        if any(isinstance(one, FetchFailure) for one in found.values()):
            return RoundResult("behind", failures=lost, sources=list(members.values()))
        return RoundResult("applied", {name: found[name] for name in sorted(count)}, lost | {self.name: "it came late"})

    def _voted(
        self, key: str, members: Mapping[str, Peer], update: int, *, have: list[str] | None, lost: Mapping[str, str]
    ) -> tuple[list[str], dict[str, str]]:
        """Whose payloads count, and why the others' do not; `have` None: this island has no vote."""
        rules = self._islands
        told = self._ask(
            "voted", patience=rules.deadline, key=key, update=update, have=have, lost=lost,
            members={name: peer.ticket for name, peer in members.items()}, policy=rules.on_failure,
            minimum=rules.minimum,
        )  # fmt: skip
        return told["count"], told["lost"]

    def _present(self, key: str, payload: bytes, *, update: int, history: str) -> tuple[dict[str, Peer], str | None]:
        """Who takes part in a meeting, and what history they have in common."""
        told = self._ask(
            "present",
            before=lambda: self._office.publish(key, payload, ticket=self.ticket),
            patience=self._islands.patience,
            key=key,
            update=update,
            staleness=self._islands.staleness,
            minimum=self._islands.minimum,
            history=history,
        )
        return {name: Peer(name, *whose) for name, whose in told["members"].items()}, told["history"]

    def _pair(self, key: str, payload: bytes, update: int, seed: int) -> RoundResult:
        told = self._ask(
            "roster",
            before=lambda: self._office.publish(key, payload, ticket=self.ticket),
            key=key,
            update=update,
            staleness=self._islands.staleness,
        )
        members = {name: Peer(name, *whose) for name, whose in told["members"].items()}
        if self.name not in members:
            return RoundResult("behind", sources=list(members.values()))
        names = sorted(members, key=island_number)
        row = matching_for_round(update, replicas=len(names), seed=seed)
        partner = names[int(matchings(len(names))[row, names.index(self.name)])]
        if problem := self._problem(kind(key), payload):
            return RoundResult("behind", failures={self.name: problem}, sources=peers_except(self.name, members))
        if partner == self.name:
            return RoundResult("applied", {self.name: payload})
        found = self._judged(key, self._collect(key, [members[partner]]))[partner]
        if not isinstance(found, FetchFailure):
            return RoundResult("applied", {partner: found})
        if self._islands.on_failure == "skip":
            return RoundResult("skipped", failures={partner: found.reason})
        return RoundResult("applied", {self.name: payload}, {partner: found.reason})

    def _collect(self, key: str, peers: Sequence[Peer]) -> dict[str, bytes | FetchFailure]:
        if not peers:
            return {}
        return self._office.collect(
            key, peers, deadline=self._islands.deadline, patience=self._islands.patience, alive=self._is_alive
        )

    def _judged(self, key: str, found: Mapping[str, bytes | FetchFailure]) -> dict[str, bytes | FetchFailure]:
        """`found` without payloads that arrived whole and are of no use."""
        judged = dict(found)
        for name, one in found.items():
            if not isinstance(one, FetchFailure) and (problem := self._problem(kind(key), one)):
                judged[name] = FetchFailure(problem)
        return judged

    def _timed(self, meeting: Callable[[], RoundResult]) -> RoundResult:
        began = time.monotonic()
        try:
            met = meeting()
        except RoundForgotten as error:
            met = RoundResult("behind", failures={self.name: "it came long after"}, sources=error.others)
        except (OSError, NotAMember) as error:
            met = RoundResult("skipped", failures={"rendezvous": str(error)})
        return RoundResult(met.kind, met.payloads, met.failures, met.sources, time.monotonic() - began)

    # ---- the rendezvous

    def _client(self) -> Client:
        return Client(self._islands.meet, self.name, ttl=self._islands.ttl, timeout=self._islands.timeout)

    def _ask(
        self, do: str, *, patience: float = 0.0, before: Callable[[], None] = lambda: None, **fields: Any
    ) -> dict[str, Any]:
        """The rendezvous' answer, which may take `patience` seconds; `before` runs before each attempt.

        Raises OSError where there is none within `deadline`, which is waited once and not for each question until the
        rendezvous is heard again, UserError where another island took this one's name,
        Forgotten where it was asked about a meeting of long ago.
        """
        end, lost = time.monotonic() + self._islands.deadline, False
        while True:
            try:
                if lost:
                    self._rejoin()
                    lost = False
                with self._client() as client:
                    client.ticket = self.ticket
                    client.heartbeat(self._info)
                    before()
                    # The server ends its wait by `patience`; what is on top is for its answer.
                    told = client.ask(do, within=patience + 5.0, **fields, **timed(do, patience))
                    self._silent = False
                    if "forgotten" in told:
                        raise RoundForgotten([Peer(name, *whose) for name, whose in told["forgotten"].items()])
                    return told
            except NotAMember:
                if self._ended.is_set():
                    raise  # it left while it waited
                lost = True
            except OSError:
                if time.monotonic() > end or self._silent or self._ended.is_set():
                    self._silent = True
                    raise
                time.sleep(RETRY_SECONDS)

    def _rejoin(self) -> None:
        """Come back after having been given up. Raises UserError where another process has this island's name."""
        with self._lock, self._client() as client:
            if self._taken is not None:
                raise UserError(self._taken)
            there = client.wait(beyond=-1, timeout=0.0)["members"].get(self.name)
            if there is None:
                self._members = client.join(self._info)["members"]
                self.ticket = client.ticket
            elif there.get("ticket") != self.ticket:
                self._taken = (
                    f"islands.number: another job is {self.name} now, at {there.get('address')}; "
                    "give each island a number of its own"
                )
                raise UserError(self._taken)

    def _beat(self) -> None:
        often = min(HEARTBEAT_SECONDS, self._islands.ttl / 5)
        with self._client() as client:
            while not self._ended.wait(often):
                try:
                    client.ticket = self.ticket
                    self._members = client.heartbeat(self._info)["members"]
                except NotAMember:
                    try:
                        self._rejoin()
                    except (OSError, MeshwrightError):
                        continue  # `tell` says it
                except OSError:
                    continue  # it comes back, or a meeting says so

    def _peers(self) -> list[Peer]:
        """The others that have said where they are reached and in which life they are."""
        with self._client() as client:
            members = client.wait(beyond=-1, timeout=0.0)["members"]
        return [Peer(name, info["ticket"], info["address"]) for name, info in members.items() if name != self.name]

    def _is_alive(self, peer: Peer) -> bool:
        info = self._members.get(peer.name)
        return info is not None and info.get("ticket", peer.ticket) == peer.ticket


def peers_except(name: str, members: Mapping[str, Peer]) -> list[Peer]:
    """All `members` but `name`."""
    return [peer for other, peer in members.items() if other != name]


def island_number(name: str) -> int:
    """Number of an island by its name: pairs are dealt by it."""
    return int(name.rpartition("-")[2])


def timed(do: str, patience: float) -> dict[str, float]:
    """What a question that waits is told about waiting."""
    return {"patience": patience} if do in ("present", "voted") else {}
