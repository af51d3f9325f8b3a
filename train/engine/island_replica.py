"""An island is a replica as a job of its own, with its own part of every global batch.

    island_config(config)          the configuration of this job, with its part of the global batch
    island = make_island(...)      replaces `Replicas` in a program; no array has a leading [replica]
    island.send_receive(name)      an outer step, split where the network is (`parallel/outer/split_round.py`)

An island trains, evaluates and saves like a run of one replica that also has an outer state.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import optax
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
from .replicas import Evaluate, in_host_memory
from .step import Step

NO_EXCHANGE = Exchange(lambda tree: tree, lambda tree, row: tree)  # for an outer optimizer whose steps are not run
# Settings that may differ between the islands of a run, besides those that do not change what is computed.
ISLAND_SETTINGS = ("name", "data.path", "model.from")


def island_config(config: RunConfig) -> RunConfig:
    """Return the configuration of this island's job, with its part of the global batch; `config` without islands."""
    islands = config.islands
    if islands is None:
        return config
    global_batch, eval_batches = config.data.global_batch // islands.count, config.evaluation.batches
    if eval_batches:  # as many held-out rows as the whole run would evaluate
        eval_batches *= islands.count
    staleness = 3 * config.outer.every if islands.staleness is None else islands.staleness
    return config.model_copy(
        update={
            "data": config.data.model_copy(update={"global_batch": global_batch}),
            "evaluation": config.evaluation.model_copy(update={"batches": eval_batches}),
            "islands": islands.model_copy(update={"staleness": staleness}),
        }
    )


def shared_settings(config: RunConfig, *, corpus: str) -> dict[str, Any]:
    """Return the settings that all islands of a run must share, by key. `corpus` is the fingerprint of the data."""
    settings = {
        key: value
        for key, value in flatten_keys(config.model_dump(mode="json"))
        if not may_change(key) and key not in ISLAND_SETTINGS and not key.startswith("islands.")
    }
    return settings | {"steps": config.steps, "islands.count": config.islands.count, "the data": corpus}


def fingerprint(settings: dict[str, Any]) -> str:
    """16 hexadecimal digits of `shared_settings`."""
    return xxhash.xxh3_64_hexdigest(repr(sorted(settings.items())).encode())


@dataclass(frozen=True)
class Island:
    """How a run of one replica becomes island `number` of `count`."""

    count: int
    number: int
    build_outer: Callable[[ExchangeFactory], OuterOptimizer]  # the outer optimizer, for any exchange
    mesh: Mesh
    outer_on_host: bool  # whether the outer state stays in host memory between outer steps
    order: LayerOrder = None  # run order of this island's layers; messages are in canonical order

    @cached_property
    def outer(self) -> OuterOptimizer:
        """The outer optimizer: its state, its schedule, its evaluation. Its outer steps need `send_receive`."""
        return self.build_outer(lambda wire: NO_EXCHANGE)

    def initial(self, state: TrainState) -> TrainState:
        """Add the outer state to the first state; all islands start from the same parameters."""
        return dataclasses.replace(state, outer=self.outer.init(state.params))

    def shardings(self, single: TrainState, params: Any) -> TrainState:
        """Add the shardings of the outer state to those of one replica; `params` are the shapes of its parameters."""
        outer = optimizer_shardings(jax.eval_shape(self.outer.init, params), params, mesh=self.mesh)
        return dataclasses.replace(single, outer=in_host_memory(outer) if self.outer_on_host else outer)

    def step(self, step: Step) -> Step:
        """`step` on this island's rows, which keep their ids in the global batch."""
        return lambda state, batch: step(state, batch, self.number * batch["tokens"].shape[0])

    def evaluate(self, evaluate: Evaluate) -> Evaluate:
        """An island evaluates like a run of one replica."""
        return evaluate

    def eval_params(self, state: TrainState) -> Any:
        """Return the outer parameters in the dtype of the inner ones."""
        outer = self.outer_on_device(state.outer)
        if self.outer.per_replica:
            outer = add_replica_axis(outer)
        return optax.tree.cast_like(self.outer.eval_params(add_replica_axis(state.params), outer), state.params)

    def outer_on_device(self, outer: Any) -> Any:
        """Move the outer state to device memory, inside a compiled function."""
        return jax.device_put(outer, jax.memory.Space.Device) if self.outer_on_host else outer

    def send_receive(self, name: str) -> SendReceive:
        """Return what the outer step `name` sends, and what it makes of the messages that arrive."""
        split_step = split_outer_step(self.build_outer, name)

        def canonical(params: Any, outer: Any) -> Any:
            return self.to_canonical_order((params, self.outer_on_device(outer)))

        return SendReceive(
            lambda params, outer: split_step.send(*canonical(params, outer)),
            lambda params, outer, arrived: self.to_run_order(split_step.receive(*canonical(params, outer), arrived)),
            lambda params, outer: split_step.messages(*jax.eval_shape(canonical, params, outer)),
        )

    def to_canonical_order(self, tree: Any) -> Any:
        """Reorder the layers of a tree like the parameters (JAX or NumPy arrays) from run order to canonical order."""
        return reorder_layers(tree, before=self.order, after=None)

    def to_run_order(self, tree: Any) -> Any:
        """The inverse of `to_canonical_order`."""
        return reorder_layers(tree, before=None, after=self.order)


def make_island(config: RunConfig, mesh: Mesh, *, order: LayerOrder = None) -> Island:
    """Return the island of `config` on `mesh`. Without `islands.number`, for plans, it is the first one.

    `order` is the run order of the layers.
    """

    def build(exchange_factory: ExchangeFactory) -> OuterOptimizer:
        return registry.build_outer_optimizer(
            config.outer, model=config.model, exchange_factory=exchange_factory, replicas=config.islands.count
        )

    return Island(config.islands.count, config.islands.number or 0, build, mesh, config.outer.memory == "host", order)
