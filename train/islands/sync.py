"""Synchronization of an island with the others during training: when rounds run, what is sent, and failed rounds.

    state, step = sync.begin(state, step)     the state and step to start with: this island's, or another one's
    state = sync(state, update)               after an update: runs what is due. Raises StateReplaced if it was behind
    state = sync.drain(state)                 finishes all pending rounds, before the state is saved or evaluated
    sync.finish(state, step)                  tells the others, and serves those that still need this island

A round starts with a copy of what is sent and goes on in a thread. If the outer optimizer uses the result later
(`overlap`), training goes on meanwhile. The result of a round is applied once or never: a round has finished before the
next one of its outer step starts, and an island whose history differs from that of the others takes their state. All
processes of an island make the same calls; only process 0 has the network (`IslandTransport`).
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

from ...configs.errors import MeshwrightError, Preemption
from ...configs.sections.outer import PAIRWISE_RULES
from ...parallel.multihost import broadcast_bytes
from ...parallel.outer.interface import OuterStep
from ...parallel.outer.split_round import find_defect, pack, unpack
from ...parallel.outer.traffic import bytes_sent
from ...parallel.state import TrainState
from ...parallel.transport.payload_server import Peer, TransferCounters
from ..core.event_log import EventLog
from ..engine.program import Program
from .agreed_wait import CollectiveWait, WaitStopped, broadcast_flag
from .compiled_rounds import RoundPrograms, add_trees, divide_tree, make_global_array, make_round_programs
from .island_group import IslandGroup, RoundResult

BOOTSTRAP_TRAFFIC = ("state", "handshake")  # kinds of traffic that do not belong to a round


class StateReplaced(Exception):
    """This island was behind and took the state of another one: training continues from `state` after update `step`."""

    def __init__(self, state: TrainState, step: int) -> None:
        super().__init__(f"continues from update {step}")
        self.state, self.step = state, step


class PendingRound(NamedTuple):
    """A round under way."""

    outer_step: OuterStep
    update: int
    future: Future | None  # of a RoundResult; None in other processes than process 0
    codes: list[Any]  # shapes and shardings of what is sent, a tree for each message


@dataclass
class IslandTransport:
    """The network of an island, in its process 0."""

    group: IslandGroup
    counters: TransferCounters
    publish: Callable[..., None]  # (key, payload, ticket=, reader=)
    requested_states: set[str]  # keys of states that other islands have requested
    is_sending: Callable[[], bool]  # whether a payload is being sent


class IslandSync:
    """Synchronizes one island with the others; see above.

    `transport` is None in other processes than process 0. `report_waiting` is called with a text during waits.
    `should_stop(update)` returns whether the island was asked to stop, the same in every process; it ends waits.
    """

    def __init__(
        self, program: Program, transport: IslandTransport | None, event_log: EventLog, *,
        report_waiting: Callable[[str], None] = lambda phase: None,
        should_stop: Callable[[int], bool] = lambda update: False,
    ) -> None:  # fmt: skip
        self.program, self.island = program, program.replicas
        self._transport, self._event_log, self._should_stop = transport, event_log, should_stop
        self._wait = CollectiveWait(report_waiting, lambda: should_stop(self._update), self._progress_text)
        self._is_pairwise = program.config.outer.name in PAIRWISE_RULES
        self._pending: dict[str, PendingRound] = {}  # by the name of the outer step
        self._programs: dict[str, RoundPrograms] = {}
        self._skipped: set[str] = set()  # outer steps whose last round was skipped
        self._history = {outer_step.name: "" for outer_step in self.island.outer.outer_steps}
        self._threads = ThreadPoolExecutor(max_workers=len(self.island.outer.outer_steps))
        self._update, self._last_traffic = 0, (0, time.monotonic())  # (bytes sent, time)
        self._peak = (0, 0.0)  # bytes in one update, bytes per second

    # ---- the course of a run

    def begin(self, state: TrainState, step: int) -> tuple[TrainState, int]:
        """Return the state and step to start with; the step is smaller than `step` if the others are behind.

        Raises MeshwrightError if no other island sends its state, Preemption if this one is asked to stop meanwhile.
        """
        try:
            return self._enter(state, step)
        except WaitStopped:
            raise Preemption("stopped before the islands started; run the same command to go on") from None

    def _enter(self, state: TrainState, step: int) -> tuple[TrainState, int]:
        version = xxhash.xxh3_64_hexdigest(self._pack_canonical(self.program.eval_params(state)))
        islands = self.program.config.islands
        end = time.monotonic() + islands.gather + islands.deadline
        while True:
            starts, sources = self._ask_group(lambda group: group.enter(step=step, version=version))
            if starts:
                self._event_log.record("enter", step=step)
                return state, step
            replaced = self._bootstrap(state, sources, at_least=0)
            if replaced is not None:
                return replaced
            if time.monotonic() > end:
                names = [peer.name for peer in sources]
                raise MeshwrightError(f"islands: {names} have started but sent no state; check the network to them")

    def __call__(self, state: TrainState, update: int) -> TrainState:
        """Run the outer steps that are due after update number `update`; donates `state`."""
        self._update = update
        self._publish_step(update)
        for outer_step in self.island.outer.outer_steps:
            if not outer_step.is_due(update):
                continue
            if outer_step.depends_on is not None:
                state = self._complete_round(state, outer_step.depends_on)
                if outer_step.depends_on not in self._skipped:
                    state = self._receive(state, outer_step, [])
                continue
            self._skipped.discard(outer_step.name)
            self._start_round(state, outer_step, update)
            if not any(other.depends_on == outer_step.name for other in self.island.outer.outer_steps):
                state = self._complete_round(state, outer_step.name)
        return self._serve_state(state, update)

    def drain(self, state: TrainState) -> TrainState:
        """Finish all pending rounds and return the state with their results; outer steps due later still use them."""
        for name in list(self._pending):
            state = self._complete_round(state, name)
        return state

    def finish(self, state: TrainState, step: int) -> None:
        """Tell the others that this island has finished, and serve them while they may need it.

        They may request something for `patience` seconds, and receive it for `deadline` seconds.
        """
        self._event_log.record("traffic", step=step, **self.traffic_metrics(step))
        if self._transport:
            self._transport.group.publish_status_now(finished=True)
        start = time.monotonic()
        while broadcast_flag(self._is_needed(time.monotonic() - start)) and not self._should_stop(step):
            self._wait.report_waiting(f"finished, others are not, {time.monotonic() - start:.0f} s")
            self._serve_state(state, step)
            time.sleep(0.1)

    def close(self) -> None:
        """End the threads. Payload server and group are closed by their owner."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def traffic_metrics(self, update: int) -> dict[str, float]:
        """Return the bytes that this process has sent, and the bytes that are predicted by `update`."""
        metrics = {"predicted_sent_bytes": float(bytes_sent(self.program.traffic, update))}
        if self._transport:
            by_kind = dict(self._transport.counters.by_kind)
            bootstrap = sum(by_kind.get(kind, 0) for kind in BOOTSTRAP_TRAFFIC)
            metrics |= {
                "sent_bytes": float(sum(by_kind.values()) - bootstrap),
                "bootstrap_bytes": float(bootstrap),
                "peak_step_bytes": float(self._peak[0]),
                "peak_bytes_per_second": self._peak[1],
                "islands": 1.0 + len(self._transport.group.peer_statuses()),
            }
        return metrics

    # ---- one round

    def _start_round(self, state: TrainState, outer_step: OuterStep, update: int) -> None:
        name = outer_step.name
        with jax.set_mesh(self.program.mesh):
            coded = self._round_programs(name).send(state.params, state.outer)
        payload = pack(self._host_arrays(coded))
        codes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), coded)
        future = None
        if self._transport:
            group, key, rule = self._transport.group, f"{name} {update}", {"update": update}
            if self._is_pairwise:
                future = self._threads.submit(group.pair, key, payload, **rule, seed=self.program.config.seed)
            else:
                future = self._threads.submit(group.average, key, payload, **rule, history=self._history[name])
        self._pending[name] = PendingRound(outer_step, update, future, codes)

    def _complete_round(self, state: TrainState, name: str) -> TrainState:
        """Wait for the pending round of the outer step `name`, if any, and return the state with its result.

        Raises StateReplaced if the others did the round without this island and one of them sent its state.
        """
        pending = self._pending.pop(name, None)
        if pending is None:
            return state
        try:
            result = self._broadcast_result(self._wait.result(pending.future, name))
        except WaitStopped:
            result = RoundResult("skipped", failures={"all": "asked to stop"})
        self._record_failures(result, pending)
        if result.kind == "skipped":
            self._skipped.add(name)
            return state
        if result.kind == "behind":
            self._skipped.add(name)
            replaced = None
            with suppress(WaitStopped):
                replaced = self._bootstrap(state, result.sources, at_least=self._update)
            if replaced is None:
                return state  # no island sent its state; the next round tries again
            raise StateReplaced(*replaced)
        means = [self._mean(result, pending, number) for number in range(len(self._round_programs(name).messages))]
        history = " ".join([self._history[name], str(pending.update), *result.payloads])
        self._history[name] = xxhash.xxh3_64_hexdigest(history.encode())
        return self._receive(state, pending.outer_step, means)

    def _mean(self, result: RoundResult, pending: PendingRound, number: int) -> Any:
        """Return the mean of message `number` over the islands that count: float32, added in order of their names."""
        sizes = [len(jax.tree.leaves(codes)) for codes in pending.codes]
        start = sum(sizes[:number])
        like, structure = jax.tree.flatten(pending.codes[number])
        decode = self._round_programs(pending.outer_step.name).decoders[number]
        total = None
        with jax.set_mesh(self.program.mesh):
            for payload in result.payloads.values():
                arrays = unpack(payload, jax.tree.leaves(pending.codes))[start : start + sizes[number]]
                codes = [make_global_array(array, leaf.sharding) for array, leaf in zip(arrays, like, strict=True)]
                tree = decode(jax.tree.unflatten(structure, codes))
                total = tree if total is None else add_trees(total, tree)
            return divide_tree(total, float(len(result.payloads)))

    def _receive(self, state: TrainState, outer_step: OuterStep, received: Sequence[Any]) -> TrainState:
        with jax.set_mesh(self.program.mesh):
            params, outer = self._round_programs(outer_step.name).receive(state.params, state.outer, list(received))
        return dataclasses.replace(state, params=params, outer=outer)

    def _record_failures(self, result: RoundResult, pending: PendingRound) -> None:
        """Record a round in which not every payload counted."""
        if result.kind == "applied" and not result.failures:
            return
        event = {"applied": "excluded", "skipped": "meeting-skipped", "behind": "behind"}[result.kind]
        fields = {"meeting": pending.outer_step.name, "lost": dict(result.failures), "meeting_seconds": result.seconds}
        self._event_log.record(event, step=pending.update, **fields)

    # ---- states of other islands

    def _bootstrap(self, state: TrainState, sources: Sequence[Peer], *, at_least: int) -> tuple[TrainState, int] | None:
        """Return (state of a source, update it is after), or None if no source sent it. Drops pending rounds."""
        start = time.monotonic()
        future = self._submit(lambda group: group.fetch_state(sources))
        payload = broadcast_bytes(self._wait.result(future, "another's state"))
        if payload is None:
            return None
        self._pending.clear()
        outer_steps = self.island.outer.outer_steps
        self._skipped.update(step.depends_on for step in outer_steps if step.depends_on is not None)
        length = int.from_bytes(payload[:8], "big")
        head = json.loads(payload[8 : 8 + length])
        step = max(int(head["step"]), at_least)
        self._history = dict(head["history"])
        shapes, shardings = shared_fields(self.program.shapes), shared_fields(self.program.shardings)
        leaves, structure = jax.tree.flatten(jax.eval_shape(self.island.to_canonical_order, shapes))
        arrays = jax.tree.unflatten(structure, unpack(payload[8 + length :], leaves))
        fields = jax.tree.map(make_global_array, self.island.to_run_order(arrays), shardings)
        if self._transport:
            self._transport.group.publish_status_now(active=True, catching_up=False, step=step)
        self._event_log.record(
            "bootstrap", step=step, source=head["name"], bytes=len(payload), seconds=time.monotonic() - start
        )
        counter = make_global_array(np.asarray(step, np.int32), self.program.shardings.step)
        return dataclasses.replace(state, step=counter, **fields), step

    def _serve_state(self, state: TrainState, update: int) -> TrainState:
        """Publish this island's state for the islands that requested it; return the state after pending rounds."""
        if not broadcast_flag(bool(self._transport and self._transport.requested_states)):
            return state
        state = self.drain(state)
        body = self._pack_canonical(shared_fields(dataclasses.replace(state, params=self.program.eval_params(state))))
        if self._transport:
            group, requested = self._transport.group, self._transport.requested_states
            head = json.dumps({"step": update, "history": self._history, "name": group.name}).encode()
            payload = len(head).to_bytes(8, "big") + head + body
            for key in list(requested):
                reader = key.removeprefix("state ").partition("/")[0]
                self._transport.publish(key, payload, ticket=group.ticket, reader=reader)
                requested.discard(key)
        return state

    # ---- processes and threads of an island

    def _submit(self, work: Callable[[IslandGroup], Any]) -> Future | None:
        return self._threads.submit(work, self._transport.group) if self._transport else None

    def _progress_text(self) -> str:
        return f", {self._transport.counters.received_bytes} bytes so far" if self._transport else ""

    def _ask_group(self, work: Callable[[IslandGroup], tuple[bool, list[Peer]]]) -> tuple[bool, list[Peer]]:
        """Run `work` in process 0, and return its result in every process."""
        result = self._wait.result(self._submit(work), "the others")
        starts, peers = json.loads(broadcast_bytes(None if result is None else json.dumps(result).encode()))
        return starts, [Peer(*peer) for peer in peers]

    def _broadcast_result(self, result: RoundResult | None) -> RoundResult:
        """Return the result of process 0 in every process."""
        if jax.process_count() == 1:
            return result
        head = None
        if result is not None:
            head = json.dumps(dataclasses.asdict(result) | {"payloads": list(result.payloads)}).encode()
        fields = json.loads(broadcast_bytes(head))
        fields["payloads"] = {name: broadcast_bytes(result and result.payloads[name]) for name in fields["payloads"]}
        return RoundResult(**fields | {"sources": [Peer(*peer) for peer in fields["sources"]]})

    def _pack_canonical(self, tree: Any) -> bytes:
        """Pack `tree` with its layers in canonical order: other islands may stack them in another order."""
        on_host = jax.tree.unflatten(jax.tree.structure(tree), list(self._host_arrays(tree)))
        return pack(jax.tree.leaves(self.island.to_canonical_order(on_host)))

    def _host_arrays(self, tree: Any) -> Iterator[np.ndarray]:
        """Yield every array of `tree` with all its elements, on this host."""
        for leaf in jax.tree.leaves(tree):
            if not leaf.is_fully_addressable:
                leaf = self._replicate(leaf).addressable_data(0)
            yield np.asarray(jax.device_get(leaf))

    @cached_property
    def _replicate(self) -> Callable[[jax.Array], jax.Array]:
        return jax.jit(lambda leaf: leaf, out_shardings=NamedSharding(self.program.mesh, PartitionSpec()))

    def _publish_step(self, update: int) -> None:
        if self._transport is None:
            return
        self._transport.group.publish_status(step=update)
        now, total = time.monotonic(), self._transport.counters.sent_bytes
        previous, then = self._last_traffic
        sent, seconds = total - previous, max(now - then, 1e-3)
        self._peak = (max(self._peak[0], sent), max(self._peak[1], sent / seconds))
        self._last_traffic = (total, now)

    def _is_needed(self, waited: float) -> bool:
        """Return whether another island may still need this finished one, or is receiving its state."""
        islands = self.program.config.islands
        if not self._transport or waited > max(islands.patience, islands.deadline):
            return False
        return self._transport.is_sending() or (waited < islands.patience and self._transport.group.has_unfinished())

    # ---- programs

    def find_problem(self, name: str, payload: bytes) -> str | None:
        """Say what is wrong with a payload of the outer step `name`; None if nothing is."""
        programs = self._round_programs(name)
        codes = [jax.tree.leaves(tree) for tree in programs.codes]
        return find_defect(payload, list(zip((message.wire for message in programs.messages), codes, strict=True)))

    def _round_programs(self, name: str) -> RoundPrograms:
        if name not in self._programs:
            self._programs[name] = make_round_programs(self.island, name, self.program.shapes, self.program.shardings)
        return self._programs[name]


def shared_fields(state: TrainState) -> dict[str, Any]:
    """Return the fields that a bootstrapping island needs: parameters (of the outer optimizer) and optimizer states."""
    return {"params": state.params, "opt_state": state.opt_state, "outer": state.outer}
