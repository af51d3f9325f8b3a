"""The group of islands of a run, as one island sees it: joining, rounds, fetching states, leaving. JAX-free.

    group = IslandGroup(server, islands, ...)                joins; a thread sends heartbeats
    group.enter(step=0, version="...")                       start together, or bootstrap from others
    group.average("send-2 137", payload, ...)                a round of all islands: the payloads that count
    group.pair("meet 150", payload, ...)                     a round in pairs
    group.fetch_state(sources)                               the state of another island
    group.leave()

Every wait is bounded by the section `islands`. If the rendezvous does not answer, a round fails and is skipped.
"""

import itertools
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from ...configs.errors import MeshwrightError, UserError
from ...configs.sections.islands import IslandsConfig
from ...parallel.outer.matchings import matching_for_round, matchings
from ...parallel.transport.payload_server import FetchFailure, PayloadServer, Peer, kind
from ..core.rendezvous import Client, NotAMember

HEARTBEAT_SECONDS = 0.2  # between two heartbeats; shorter if the time-to-live is short
RETRY_SECONDS = 0.5  # before a silent rendezvous is asked again
ANSWER_SECONDS = 5.0  # that an answer may take beyond the time for which the rendezvous waits

FindProblem = Callable[[str, bytes], str | None]  # (name of the round, payload) -> what is wrong with it, or None


@dataclass(frozen=True)
class RoundResult:
    """The result of a synchronization round.

    applied   `payloads` count, this island's own among them (in pairs: the partner's alone)
    skipped   nothing counts; the outer gradient stays for the next round
    behind    the others did the round without this island, which must bootstrap from one of `sources`
    """

    kind: str
    payloads: Mapping[str, bytes] = field(default_factory=dict)
    failures: Mapping[str, str] = field(default_factory=dict)  # name -> why its payload does not count
    sources: Sequence[Peer] = ()
    seconds: float = 0.0


class RoundExpired(Exception):
    """The rendezvous has dropped the decision about a round: it was long ago."""

    def __init__(self, peers: Sequence[Peer]) -> None:
        super().__init__(f"the decision was dropped; active islands: {[peer.name for peer in peers]}")
        self.peers = peers


class IslandGroup:
    """The membership of one island, whose payloads are served by `server`."""

    def __init__(
        self, server: PayloadServer, islands: IslandsConfig, *, address: str, find_problem: FindProblem
    ) -> None:
        self._server, self._islands, self.name = server, islands, server.name
        self._find_problem = find_problem
        self._info: dict[str, Any] = {"address": address, "run": server.fingerprint, "step": 0, "active": False}
        self._members: dict[str, dict[str, Any]] = {}
        self._rejoin_lock, self._left = threading.Lock(), threading.Event()
        self._state_requests = itertools.count()
        self._displaced: str | None = None  # the error, once another job has the name of this island
        self._is_silent = False  # the rendezvous did not answer within the deadline, and has not answered since
        with self._client() as client:
            self._members = client.join(self._info)["members"]
            self.ticket = client.ticket
        self._heartbeats = threading.Thread(target=self._send_heartbeats, name="heartbeat", daemon=True)
        self._heartbeats.start()

    def check_same_run(self) -> None:
        """Raise UserError if an island that joined earlier belongs to another run; name the settings that differ."""
        for peer in self._peers():
            if peer.ticket < self.ticket and (different := self._server.compare_settings(peer)):
                keys = [f"{key} ({other} there, {this} here)" for key, (other, this) in different.items()]
                raise UserError(
                    f"islands.meet: {peer.name} at {peer.address} belongs to another run: {', '.join(keys[:4])}; give "
                    "all islands the same configuration, or another rendezvous"
                )

    def publish_status(self, **info: Any) -> None:
        """Publish step, finished, ... with the next heartbeat. Raises UserError if another job has this name."""
        if self._displaced is not None:
            raise UserError(self._displaced)
        self._info.update(info)

    def publish_status_now(self, **info: Any) -> None:
        """Publish like `publish_status`, and wait until the rendezvous has it, if it answers."""
        self.publish_status(**info)
        with suppress(OSError):
            self._ask("list-finished", run=self._info["run"])

    def enter(self, *, step: int, version: str) -> tuple[bool, list[Peer]]:
        """Return (True, []) if this island starts with its own state, else (False, islands to bootstrap from).

        `version` is a hash of its state. Raises OSError if the rendezvous does not answer.
        """
        self.publish_status(step=step)  # the others wait for this step in their first round
        decision = self._ask(
            "enter", patience=self._islands.gather + 10, run=self._info["run"], step=step, version=version,
            count=self._islands.count, gather=self._islands.gather,
        )  # fmt: skip
        if self.name in decision["sources"]:
            self._info["active"] = True
            return True, []
        return False, [peer for peer in self._peers() if peer.name in decision["sources"]]

    def average(self, key: str, payload: bytes, *, update: int, history: str) -> RoundResult:
        """Do a round of all islands. All islands whose result is "applied" have the same payloads, to be averaged."""
        return self._run_round(lambda: self._average(key, payload, update, history))

    def pair(self, key: str, payload: bytes, *, update: int, seed: int) -> RoundResult:
        """Do a round with a partner. Without one (an odd number of islands, a failure) the own payload is returned."""
        return self._run_round(lambda: self._pair(key, payload, update, seed))

    def fetch_state(self, sources: Sequence[Peer]) -> bytes | None:
        """Fetch the state of one of `sources`; None if none sent it. Islands try the sources in different orders."""
        if not sources:
            return None
        self.publish_status_now(catching_up=True)  # nobody waits for an island that catches up
        first = sum(self.name.encode()) % len(sources)
        for peer in [*sources[first:], *sources[:first]]:
            key = f"state {self.name}/{self.ticket}/{next(self._state_requests)}"
            payload = self._collect(key, [peer])[peer.name]
            if not isinstance(payload, FetchFailure):
                return payload
        self.publish_status(catching_up=False)  # it goes on with its own state
        return None

    def has_unfinished(self) -> bool:
        """Return whether an island of the run, here or gone, has not finished; False if the rendezvous is silent."""
        try:
            with self._client() as client:
                finished = client.ask("list-finished", run=self._info["run"])["names"]
        except OSError:
            return False
        return len(finished) < self._islands.count

    def peer_statuses(self) -> dict[str, Mapping[str, Any]]:
        """Return what the other members last published, by name."""
        return {name: info for name, info in self._members.items() if name != self.name}

    def leave(self) -> None:
        """Leave the group, so that the others do not wait for this island."""
        self._left.set()
        self._heartbeats.join()
        with suppress(OSError, NotAMember), self._client() as client:
            client.ticket = self.ticket
            client.leave()

    # ---- rounds

    def _average(self, key: str, payload: bytes, update: int, history: str) -> RoundResult:
        decision = self._ask(
            "list-participants", before=lambda: self._server.publish(key, payload, ticket=self.ticket),
            patience=self._islands.patience, key=key, update=update, staleness=self._islands.staleness,
            minimum=self._islands.minimum, history=history,
        )  # fmt: skip
        members = peers_from_json(decision["members"])
        if not members:
            return RoundResult("skipped", failures={"all": "too few"})
        if self.name not in members:
            if decision["history"] != history:
                return RoundResult("behind", sources=list(members.values()))
            return self._catch_up(key, members, update)
        payloads, failures = self._collect_valid(key, peers_except(self.name, members), payload=payload)
        count, failures = self._vote(key, members, update, have=list(payloads), failures=failures)
        if not count:
            return RoundResult("skipped", failures=failures)
        if self.name not in payloads or not set(count) <= set(payloads):
            # Its own payload is invalid, or it lacks one that counts: it has to take the state of the others.
            sources = [members[name] for name in count if name != self.name]
            return RoundResult("behind", failures=failures, sources=sources)
        return RoundResult("applied", {name: payloads[name] for name in sorted(count)}, failures)

    def _catch_up(self, key: str, members: Mapping[str, Peer], update: int) -> RoundResult:
        """Take the payloads of a round that the others did without this island, which had the same history."""
        count, failures = self._vote(key, members, update, have=None, failures={})
        if not count:
            return RoundResult("skipped", failures=failures)
        payloads, missing = self._collect_valid(key, [members[name] for name in count])
        if missing:
            return RoundResult("behind", failures=failures, sources=list(members.values()))
        return RoundResult(
            "applied", {name: payloads[name] for name in sorted(count)}, failures | {self.name: "it came late"}
        )

    def _vote(
        self, key: str, members: Mapping[str, Peer], update: int, *, have: list[str] | None,
        failures: Mapping[str, str],
    ) -> tuple[list[str], dict[str, str]]:  # fmt: skip
        """Return (islands whose payloads count, why the others do not). `have`: received payloads; None: no vote."""
        rules = self._islands
        decision = self._ask(
            "vote", patience=rules.deadline, key=key, update=update, have=have, lost=failures,
            members={name: peer.ticket for name, peer in members.items()}, policy=rules.on_failure,
            minimum=rules.minimum,
        )  # fmt: skip
        return decision["count"], decision["lost"]

    def _pair(self, key: str, payload: bytes, update: int, seed: int) -> RoundResult:
        decision = self._ask(
            "list-partners", before=lambda: self._server.publish(key, payload, ticket=self.ticket),
            key=key, update=update, staleness=self._islands.staleness,
        )  # fmt: skip
        members = peers_from_json(decision["members"])
        if self.name not in members:
            return RoundResult("behind", sources=list(members.values()))
        names = sorted(members, key=lambda name: int(name.rpartition("-")[2]))
        row = matching_for_round(update, replicas=len(names), seed=seed)
        partner = names[int(matchings(len(names))[row, names.index(self.name)])]
        if problem := self._find_problem(kind(key), payload):
            return RoundResult("behind", failures={self.name: problem}, sources=peers_except(self.name, members))
        if partner == self.name:
            return RoundResult("applied", {self.name: payload})
        payloads, failures = self._collect_valid(key, [members[partner]])
        if payloads:
            return RoundResult("applied", payloads)
        if self._islands.on_failure == "skip":
            return RoundResult("skipped", failures=failures)
        return RoundResult("applied", {self.name: payload}, failures)

    def _collect_valid(
        self, key: str, peers: Sequence[Peer], *, payload: bytes | None = None
    ) -> tuple[dict[str, bytes], dict[str, str]]:
        """Fetch the payloads of `peers` and add this island's `payload`: (valid payloads, reasons of the failures)."""
        payloads, failures = {}, {}
        results = ({} if payload is None else {self.name: payload}) | self._collect(key, peers)
        for name, result in results.items():
            if isinstance(result, FetchFailure):
                failures[name] = result.reason
            elif problem := self._find_problem(kind(key), result):
                failures[name] = problem
            else:
                payloads[name] = result
        return payloads, failures

    def _collect(self, key: str, peers: Sequence[Peer]) -> dict[str, bytes | FetchFailure]:
        if not peers:
            return {}
        return self._server.collect(
            key, peers, deadline=self._islands.deadline, patience=self._islands.patience, alive=self._is_alive
        )

    def _run_round(self, do_round: Callable[[], RoundResult]) -> RoundResult:
        start = time.monotonic()
        try:
            result = do_round()
        except RoundExpired as error:
            result = RoundResult("behind", failures={self.name: "it came long after"}, sources=error.peers)
        except (OSError, NotAMember) as error:
            result = RoundResult("skipped", failures={"rendezvous": str(error)})
        return replace(result, seconds=time.monotonic() - start)

    # ---- the rendezvous

    def _client(self) -> Client:
        return Client(self._islands.meet, self.name, ttl=self._islands.ttl, timeout=self._islands.timeout)

    def _ask(
        self, do: str, *, patience: float = 0.0, before: Callable[[], None] = lambda: None, **fields: Any
    ) -> dict[str, Any]:
        """Return the answer of the rendezvous, which may wait `patience` seconds; `before` runs before each attempt.

        Raises OSError if there is no answer within `deadline` (once the rendezvous is silent, at once), UserError if
        another job has the name of this island, RoundExpired if the request is about a round of long ago.
        """
        end, expired = time.monotonic() + self._islands.deadline, False
        waits = {"patience": patience} if do in ("list-participants", "vote") else {}
        while True:
            try:
                if expired:
                    self._rejoin()
                    expired = False
                with self._client() as client:
                    client.ticket = self.ticket
                    client.heartbeat(self._info)
                    before()
                    answer = client.ask(do, within=patience + ANSWER_SECONDS, **fields, **waits)
                    self._is_silent = False
                    if "round_expired" in answer:
                        raise RoundExpired(list(peers_from_json(answer["round_expired"]).values()))
                    return answer
            except NotAMember:
                if self._left.is_set():
                    raise  # it left while it waited
                expired = True
            except OSError:
                if time.monotonic() > end or self._is_silent or self._left.is_set():
                    self._is_silent = True
                    raise
                time.sleep(RETRY_SECONDS)

    def _rejoin(self) -> None:
        """Join again after this member has expired. Raises UserError if another job has its name by now."""
        with self._rejoin_lock, self._client() as client:
            if self._displaced is not None:
                raise UserError(self._displaced)
            current = client.wait(beyond=-1, timeout=0.0)["members"].get(self.name)
            if current is None:
                self._members = client.join(self._info)["members"]
                self.ticket = client.ticket
            elif current.get("ticket") != self.ticket:
                self._displaced = (
                    f"islands.number: another job at {current.get('address')} has the name {self.name} now; give each "
                    "island a number of its own"
                )
                raise UserError(self._displaced)

    def _send_heartbeats(self) -> None:
        with self._client() as client:
            while not self._left.wait(min(HEARTBEAT_SECONDS, self._islands.ttl / 5)):
                try:
                    client.ticket = self.ticket
                    self._members = client.heartbeat(self._info)["members"]
                except NotAMember:
                    with suppress(OSError, MeshwrightError):  # `publish_status` raises it
                        self._rejoin()
                except OSError:
                    continue  # the next round fails if the rendezvous stays silent

    def _peers(self) -> list[Peer]:
        """Return the other members, with their addresses and tickets."""
        with self._client() as client:
            members = client.wait(beyond=-1, timeout=0.0)["members"]
        return [Peer(name, info["ticket"], info["address"]) for name, info in members.items() if name != self.name]

    def _is_alive(self, peer: Peer) -> bool:
        info = self._members.get(peer.name)
        return info is not None and info.get("ticket", peer.ticket) == peer.ticket


def peers_from_json(members: Mapping[str, Sequence[Any]]) -> dict[str, Peer]:
    """Build peers from name -> [ticket, address]."""
    return {name: Peer(name, *rest) for name, rest in members.items()}


def peers_except(name: str, members: Mapping[str, Peer]) -> list[Peer]:
    """Return all `members` except `name`."""
    return [peer for other, peer in members.items() if other != name]
