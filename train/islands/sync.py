"""An island's meetings in the course of its training: what is sent and used when, and what happens when it is not.

    meetings.begin(state, step)       the state and step to begin with: this island's, or another one's
    state = meetings(state, update)   between two updates: what is due. Raises Moved where the others are elsewhere
    state = meetings.settled(state)   everything under way has ended: before the state is saved or evaluated
    meetings.finish(state, step)      the last word to the others

A meeting begins with a copy of what is sent and goes on in a thread; where the rule uses it later (`overlap`), training
goes on meanwhile. An exchange is applied once or never: it has ended before its meeting can begin again, and an island
whose history is not the others' takes theirs. Each process of an island calls everything alike; the first one has the
network.
"""

import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import jax
import numpy as np
import xxhash
from jax.sharding import NamedSharding, PartitionSpec

from ...configs.errors import MeshwrightError, Preempted
from ...configs.sections.outer import PAIRWISE_RULES
from ...parallel.multihost import broadcast_bytes
from ...parallel.outer.interface import OuterStep
from ...parallel.outer.split_round import find_defect, pack, unpack
from ...parallel.outer.traffic import bytes_sent
from ...parallel.state import TrainState
from ...parallel.transport.payload_server import Peer, TransferCounters
from ..core.event_log import Journal
from ..engine.program import Program
from .agreed_wait import CollectiveWait, WaitStopped, broadcast_flag
from .compiled_rounds import RoundPrograms, add_trees, divide_tree, make_global_array, make_round_programs
from .membership import IslandGroup, RoundResult

OTHERS = ("state", "handshake")  # traffic that is no meeting's


class StateReplaced(Exception):
    """The run goes on from `state` after update `step`: the others were there, and this island took their state."""

    def __init__(self, state: TrainState, step: int) -> None:
        super().__init__(f"goes on from update {step}")
        self.state, self.step = state, step


class PendingRound(NamedTuple):
    """An exchange under way."""

    outer_step: OuterStep
    update: int
    future: Future | None  # of Met; None in other processes than the first
    codes: list[Any]  # shapes and shardings of what is sent, a tree a letter


@dataclass
class IslandTransport:
    """The network's side, in an island's first process."""

    group: IslandGroup
    counters: TransferCounters
    publish: Callable[..., None]  # (key, payload, ticket=, reader=)
    requested_states: set[str]  # keys of states that others asked for
    is_sending: Callable[[], bool]  # whether a payload is on its way to another island


class IslandSync:
    """See above. `correspondence` is None in other processes than the first; `alive` is told what is waited for.

    `stop(update)` says whether the island was asked to stop, the same in every process: it waits no more then.
    """

    def __init__(
        self,
        program: Program,
        transport: IslandTransport | None,
        journal: Journal,
        *,
        report_waiting: Callable[[str], None] = lambda phase: None,
        should_stop: Callable[[int], bool] = lambda update: False,
    ) -> None:
        self.program, self.island = program, program.replicas
        self._mail, self._journal, self._stop = transport, journal, should_stop
        self._waiting = CollectiveWait(report_waiting, lambda: should_stop(self._update), self._arrived)
        self._paired = program.config.outer.name in PAIRWISE_RULES
        self._pending: dict[str, PendingRound] = {}
        self._programs: dict[str, RoundPrograms] = {}
        self._skipped: set[str] = set()  # sendings that came to nothing, until they are sent again
        self._history = {meeting.name: "" for meeting in self.island.outer.outer_steps}
        self._threads = ThreadPoolExecutor(max_workers=len(self.island.outer.outer_steps))
        self._update, self._last = 0, (0, time.monotonic())
        self._peak = (0, 0.0)  # bytes in one update, bytes a second

    # ---- the course of a run

    def begin(self, state: TrainState, step: int) -> tuple[TrainState, int]:
        """The state and step to go on from: maybe earlier ones, where the others are behind.

        Raises MeshwrightError where no other island gives its state, Preempted where asked to stop meanwhile.
        """
        try:
            return self._entered(state, step)
        except WaitStopped:
            raise Preempted("stopped before the islands began; run the same command to go on") from None

    def _entered(self, state: TrainState, step: int) -> tuple[TrainState, int]:
        params = self.program.eval_params(state)
        version = xxhash.xxh3_64_hexdigest(self._in_order(params))
        islands = self.program.config.islands
        end = time.monotonic() + islands.gather + islands.deadline
        while True:
            first, sources = self._asked(lambda group: group.enter(step=step, version=version))
            if first:
                self._journal.record("enter", step=step)
                return state, step
            found = self._bootstrapped(state, sources, at_least=0)
            if found is not None:
                return found
            if time.monotonic() > end:
                names = [peer.name for peer in sources]
                raise MeshwrightError(f"islands: {names} have begun and gave no state; look at the network to them")

    def __call__(self, state: TrainState, update: int) -> TrainState:
        """What is due after update number `update`; it consumes the state it is given."""
        self._update = update
        self._tell(update)
        for meeting in self.island.outer.outer_steps:
            if not meeting.is_due(update):
                continue
            if meeting.depends_on is not None:
                state = self._completed(state, meeting.depends_on)
                if meeting.depends_on not in self._skipped:
                    state = self._applied(state, meeting, [])
                continue
            self._skipped.discard(meeting.name)
            self._begun(state, meeting, update)
            if not any(one.depends_on == meeting.name for one in self.island.outer.outer_steps):
                state = self._completed(state, meeting.name)
        return self._served(state, update)

    def drain(self, state: TrainState) -> TrainState:
        """`state` when all that is under way has been used; what has to be mixed in later still will be."""
        for name in list(self._pending):
            state = self._completed(state, name)
        return state

    def finish(self, state: TrainState, step: int) -> None:
        """Tell the others, and give them what they still need: begun within `patience`, ended within `deadline`."""
        traffic = self.traffic_metrics(step)
        self._journal.record("traffic", step=step, **traffic)
        if self._mail:
            self._mail.group.publish_status_now(finished=True)
        began = time.monotonic()
        while broadcast_flag(self._is_needed(time.monotonic() - began)) and not self._stop(step):
            self._waiting.report_waiting(f"finished, others are not, {time.monotonic() - began:.0f} s")
            self._served(state, step)
            time.sleep(0.1)

    def close(self) -> None:
        """End the threads; the office and the group are whoever's opened them."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def traffic_metrics(self, update: int) -> dict[str, float]:
        """Bytes sent so far by this process's office, beside what the configuration predicts by `update`."""
        traffic = self.program.traffic
        found = {"predicted_sent_bytes": float(bytes_sent(traffic, update))}
        if self._mail:
            by_kind = dict(self._mail.counters.by_kind)
            other = sum(by_kind.get(kind, 0) for kind in OTHERS)
            found |= {
                "sent_bytes": float(sum(by_kind.values()) - other),
                "bootstrap_bytes": float(other),
                "peak_step_bytes": float(self._peak[0]),
                "peak_bytes_per_second": self._peak[1],
                "islands": 1.0 + len(self._mail.group.peer_statuses()),
            }
        return found

    # ---- one exchange

    def _begun(self, state: TrainState, meeting: OuterStep, update: int) -> None:
        with jax.set_mesh(self.program.mesh):
            coded = self._compiled(meeting.name).send(state.params, state.outer)
        payload = pack(self._held(coded))
        codes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), coded)
        future = None
        if self._mail:
            group, key = self._mail.group, f"{meeting.name} {update}"
            seed = self.program.config.seed
            if self._paired:
                work = lambda: group.pair(key, payload, update=update, seed=seed)
            else:
                history = self._history[meeting.name]
                work = lambda: group.average(key, payload, update=update, history=history)
            future = self._threads.submit(work)
        self._pending[meeting.name] = PendingRound(meeting, update, future, codes)

    def _completed(self, state: TrainState, name: str) -> TrainState:
        """`state` after the exchange `name`, if one is under way. Raises Moved where the others did without."""
        pending = self._pending.pop(name, None)
        if pending is None:
            return state
        try:
            met = self._shared(self._waiting.result(pending.future, name))
        except WaitStopped:
            met = RoundResult("skipped", failures={"all": "asked to stop"})
        self._noted(met, pending)
        if met.kind == "skipped":
            self._skipped.add(name)
            return state
        if met.kind == "behind":
            self._skipped.add(name)
            found = None
            with suppress(WaitStopped):
                found = self._bootstrapped(state, met.sources, at_least=self._update)
            if found is None:
                return state  # nobody gave its state; the next meeting asks again
            raise StateReplaced(*found)
        letters = self._compiled(name).messages
        arrived = [self._mean(met, pending, number) for number in range(len(letters))]
        text = " ".join([self._history[name], str(pending.update), *met.payloads])
        self._history[name] = xxhash.xxh3_64_hexdigest(text.encode())
        return self._applied(state, pending.outer_step, arrived)

    def _mean(self, met: RoundResult, pending: PendingRound, number: int) -> Any:
        """Letter `number` of everybody who counts, decoded and averaged in float32, in the order of their names."""
        sizes = [len(jax.tree.leaves(codes)) for codes in pending.codes]
        mine = slice(sum(sizes[:number]), sum(sizes[: number + 1]))
        leaves, decode = jax.tree.leaves(pending.codes), self._compiled(pending.outer_step.name).decoders[number]
        total = None
        with jax.set_mesh(self.program.mesh):
            for payload in met.payloads.values():
                arrays = unpack(payload, leaves)[mine]
                codes = jax.tree.unflatten(
                    jax.tree.structure(pending.codes[number]),
                    [make_global_array(array, like.sharding) for array, like in zip(arrays, leaves[mine], strict=True)],
                )
                tree = decode(codes)
                total = tree if total is None else add_trees(total, tree)
            return divide_tree(total, float(len(met.payloads)))

    def _applied(self, state: TrainState, meeting: OuterStep, arrived: Sequence[Any]) -> TrainState:
        with jax.set_mesh(self.program.mesh):
            params, outer = self._compiled(meeting.name).receive(state.params, state.outer, list(arrived))
        return dataclasses.replace(state, params=params, outer=outer)

    def _noted(self, met: RoundResult, pending: PendingRound) -> None:
        """Journal a meeting that was not whole."""
        if met.kind == "applied" and not met.failures:
            return
        event = {"applied": "excluded", "skipped": "meeting-skipped", "behind": "behind"}[met.kind]
        self._journal.record(
            event,
            step=pending.update,
            meeting=pending.outer_step.name,
            lost=dict(met.failures),
            meeting_seconds=met.seconds,
        )

    # ---- states of others

    def _bootstrapped(
        self, state: TrainState, sources: Sequence[Peer], *, at_least: int
    ) -> tuple[TrainState, int] | None:
        """A source's state, and the update it is after; None where none gave it. Exchanges under way are forgotten."""
        began = time.monotonic()
        coming = self._submitted(lambda group: group.fetch_state(sources))
        payload = broadcast_bytes(self._waiting.result(coming, "another's state"))
        if payload is None:
            return None
        self._pending.clear()
        self._skipped.update(one.depends_on for one in self.island.outer.outer_steps if one.depends_on is not None)
        length = int.from_bytes(payload[:8], "big")
        head = json.loads(payload[8 : 8 + length])
        step = max(int(head["step"]), at_least)
        self._history = dict(head["history"])
        shapes, where = self._shipped(self.program.shapes), self._shipped(self.program.shardings)
        leaves, structure = jax.tree.flatten(jax.eval_shape(self.island.to_canonical_order, shapes))
        arrays = jax.tree.unflatten(structure, unpack(payload[8 + length :], leaves))
        parts = jax.tree.map(make_global_array, self.island.to_run_order(arrays), where)
        if self._mail:
            self._mail.group.publish_status_now(active=True, catching_up=False, step=step)
        self._journal.record(
            "bootstrap", step=step, source=head["name"], bytes=len(payload), seconds=time.monotonic() - began
        )
        counter = make_global_array(np.asarray(step, np.int32), self.program.shardings.step)
        return dataclasses.replace(state, step=counter, **parts), step

    def _served(self, state: TrainState, update: int) -> TrainState:
        """Give this island's state to whoever asked for it."""
        if not broadcast_flag(bool(self._mail and self._mail.requested_states)):
            return state
        state = self.drain(state)
        parts = self._shipped(dataclasses.replace(state, params=self.program.eval_params(state)))
        body = self._in_order(parts)
        if self._mail:
            head = json.dumps({"step": update, "history": self._history, "name": self._mail.group.name}).encode()
            payload = len(head).to_bytes(8, "big") + head + body
            for key in list(self._mail.requested_states):
                reader = key.removeprefix("state ").partition("/")[0]
                self._mail.publish(key, payload, ticket=self._mail.group.ticket, reader=reader)
                self._mail.requested_states.discard(key)
        return state

    def _shipped(self, state: TrainState) -> dict[str, Any]:
        """What a bootstrapping island is given: the outer parameters, everything an optimizer remembers."""
        return {"params": state.params, "opt_state": state.opt_state, "outer": state.outer}

    # ---- between the processes of an island, and its threads

    def _submitted(self, work: Callable[[IslandGroup], Any]) -> Future | None:
        return self._threads.submit(work, self._mail.group) if self._mail else None

    def _arrived(self) -> str:
        """What to say of it while it is waited for."""
        return f", {self._mail.counters.received_bytes} bytes so far" if self._mail else ""

    def _asked(self, work: Callable[[IslandGroup], tuple[bool, list[Peer]]]) -> tuple[bool, list[Peer]]:
        """An answer of the rendezvous, in every process."""
        found = self._waiting.result(self._submitted(work), "the others")
        text = None if found is None else json.dumps(found).encode()
        first, peers = json.loads(broadcast_bytes(text))
        return first, [Peer(*peer) for peer in peers]

    def _shared(self, met: RoundResult | None) -> RoundResult:
        """How a meeting ended, in every process."""
        if jax.process_count() == 1:
            return met
        head = None
        if met is not None:
            head = json.dumps(
                {"kind": met.kind, "lost": dict(met.failures), "sources": met.sources, "names": list(met.payloads)}
            ).encode()
        told = json.loads(broadcast_bytes(head))
        payloads = {name: broadcast_bytes(met.payloads[name] if met else None) for name in told["names"]}
        return RoundResult(told["kind"], payloads, told["lost"], [Peer(*peer) for peer in told["sources"]])

    def _in_order(self, tree: Any) -> bytes:
        """`tree` as it travels to islands whose stacks have their layers in another order."""
        whole = jax.tree.unflatten(jax.tree.structure(tree), list(self._held(tree)))
        return pack(jax.tree.leaves(self.island.to_canonical_order(whole)))

    def _held(self, tree: Any) -> Iterator[np.ndarray]:
        """Every array of `tree`, whole, on this host."""
        for leaf in jax.tree.leaves(tree):
            if not leaf.is_fully_addressable:
                leaf = self._everywhere(leaf)
                leaf = leaf.addressable_data(0)
            yield np.asarray(jax.device_get(leaf))

    @cached_property
    def _everywhere(self) -> Callable[[jax.Array], jax.Array]:
        return jax.jit(lambda leaf: leaf, out_shardings=NamedSharding(self.program.mesh, PartitionSpec()))

    def _tell(self, update: int) -> None:
        if self._mail is None:
            return
        self._mail.group.publish_status(step=update)
        now, total = time.monotonic(), self._mail.counters.sent_bytes
        before, then = self._last
        self._peak = (max(self._peak[0], total - before), max(self._peak[1], (total - before) / max(now - then, 1e-3)))
        self._last = (total, now)

    def _is_needed(self, waited: float) -> bool:
        """Whether another island may still ask this one, which has finished, or is taking its state."""
        islands = self.program.config.islands
        if not self._mail or waited > max(islands.patience, islands.deadline):
            return False
        return self._mail.is_sending() or (waited < islands.patience and self._mail.group.has_unfinished())

    # ---- compiled once

    def find_problem(self, name: str, payload: bytes) -> str | None:
        """What is wrong with a payload of the meeting `name`, if anything."""
        made = self._compiled(name)
        wires = [letter.wire for letter in made.messages]
        return find_defect(
            payload, [(wire, jax.tree.leaves(codes)) for wire, codes in zip(wires, made.codes, strict=True)]
        )

    def _compiled(self, name: str) -> RoundPrograms:
        if name not in self._programs:
            self._programs[name] = make_round_programs(self.island, name, self.program.shapes, self.program.shardings)
        return self._programs[name]
