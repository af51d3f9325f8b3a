"""One island's share of a run: a replica in a program of its own, on its own rows of every global batch.

    whole -> own(whole)          the configuration of this job: its rows, its name
    lift = Island(...)           takes the place of `Replicas` in a program: nothing has a leading [replica]
    lift.halves(name)            a meeting, cut where the network is (`parallel/outer/split_round.py`)

What is trained, evaluated and saved is the run of one replica, with the outer state beside it.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import xxhash
from jax.sharding import Mesh

from ...configs.run import RunConfig
from ...parallel.layout import LayerOrder, reorder_layers
from ...parallel.outer import registry
from ...parallel.outer.interface import Exchange, OuterOptimizer
from ...parallel.outer.split_round import ExchangeFactory, SendReceive, add_replica_axis, split_outer_step
from ...parallel.sharding import optimizer_shardings
from ...parallel.state import TrainState
from ..core.run_directory import flatten_keys, may_change
from .replicas import Evaluate
from .step import Step

NOWHERE = Exchange(lambda tree: tree, lambda tree, row: tree)  # for what is read of an optimizer without meeting
# Settings that may differ between the islands of one run, beside those that never change what is computed.
OWN = ("name", "data.path", "model.from")


def island_config(config: RunConfig) -> RunConfig:
    """The configuration of one island's job: its part of the global batch, under a name of its own."""
    islands = config.islands
    if islands is None:
        return config
    every = config.evaluation.batches
    return config.model_copy(
        update={
            "data": config.data.model_copy(update={"global_batch": config.data.global_batch // islands.count}),
            # As many held-out rows as the whole run would take.
            "evaluation": config.evaluation.model_copy(update={"batches": every and every * islands.count}),
            "islands": islands.model_copy(
                update={"staleness": 3 * config.outer.every if islands.staleness is None else islands.staleness}
            ),
        }
    )


def shared_settings(config: RunConfig, *, corpus: str) -> dict[str, Any]:
    """What all islands of a run have in common, by key."""
    islands = config.islands
    common = {
        key: value
        for key, value in flatten_keys(config.model_dump(mode="json"))
        if not may_change(key) and key not in OWN and not key.startswith("islands.")
    }
    return common | {"steps": config.steps, "islands.count": islands.count, "the data": corpus}


def fingerprint(common: dict[str, Any]) -> str:
    """16 hexadecimal digits of a description."""
    return xxhash.xxh3_64_hexdigest(repr(sorted(common.items())).encode())


@dataclass(frozen=True)
class Island:
    """How a run of one becomes one of `count` islands, number `number`."""

    count: int
    number: int
    build_outer: Callable[[ExchangeFactory], OuterOptimizer]  # the outer optimizer over any exchange
    mesh: Mesh
    outer_on_host: bool  # whether the outer state waits in the host's memory
    order: LayerOrder = None  # of the layers in this island's stacks; what is sent has them in order

    @cached_property
    def outer(self) -> OuterOptimizer:
        """The outer optimizer, for its state, its times, and what the run is; its meetings need `halves`."""
        return self.build_outer(lambda wire: NOWHERE)

    def initial(self, state: TrainState) -> TrainState:
        """Every island begins at the same parameters."""
        return dataclasses.replace(state, outer=self.outer.init(state.params))

    def shardings(self, alone: TrainState, params: Any) -> TrainState:
        """From where one replica's arrays live, and the shapes of its parameters, to where the island's do."""
        outer = optimizer_shardings(jax.eval_shape(self.outer.init, params), params, mesh=self.mesh)
        if self.outer_on_host:
            outer = jax.tree.map(lambda where: where.with_memory_kind("pinned_host"), outer)
        return dataclasses.replace(alone, outer=outer)

    def step(self, step: Step) -> Step:
        """`step` on rows that keep the numbers they have in the global batch."""

        def numbered(state: TrainState, batch: dict[str, jax.Array]) -> tuple[TrainState, dict[str, jax.Array]]:
            return step(state, batch, self.number * batch["tokens"].shape[0])

        return numbered

    def evaluate(self, evaluate: Evaluate) -> Evaluate:
        """An island evaluates like a run of one."""
        return evaluate

    def parameters(self, state: TrainState) -> Any:
        """The outer parameters in the dtype of the inner ones: what the run is."""
        outer = self.outer_on_device(state.outer)
        if self.outer.per_replica:
            outer = add_replica_axis(outer)
        found = self.outer.eval_params(add_replica_axis(state.params), outer)
        return jax.tree.map(lambda mean, own: mean.astype(own.dtype), found, state.params)

    def outer_on_device(self, outer: Any) -> Any:
        """The outer state in the device's memory; for use in a compiled function."""
        return jax.device_put(outer, jax.memory.Space.Device) if self.outer_on_host else outer

    def send_receive(self, name: str) -> SendReceive:
        """What the meeting `name` sends, and what it makes of what came."""
        made = split_outer_step(self.build_outer, name)

        def at_hand(params: Any, outer: Any) -> Any:
            return self.to_canonical_order((params, self.outer_on_device(outer)))

        return SendReceive(
            lambda params, outer: made.send(*at_hand(params, outer)),
            lambda params, outer, arrived: self.to_run_order(made.receive(*at_hand(params, outer), arrived)),
            lambda params, outer: made.messages(*jax.eval_shape(at_hand, params, outer)),
        )

    def to_canonical_order(self, tree: Any) -> Any:
        """Any tree like the parameters (arrays of JAX or numpy) with the layers of its stacks in order."""
        return reorder_layers(tree, before=self.order, after=None)

    def to_run_order(self, tree: Any) -> Any:
        """The inverse."""
        return reorder_layers(tree, before=None, after=self.order)


def make_island(config: RunConfig, mesh: Mesh, *, order: LayerOrder = None) -> Island:
    """The island of `config` on `mesh`; without a number it is the first one, for plans.

    `order` is that of the layers in its stacks.
    """

    def build(exchange_factory: ExchangeFactory) -> OuterOptimizer:
        return registry.build_outer_optimizer(
            config.outer, model=config.model, exchange_factory=exchange_factory, replicas=config.islands.count
        )

    return Island(config.islands.count, config.islands.number or 0, build, mesh, config.outer.memory == "host", order)
