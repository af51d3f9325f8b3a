"""Engine `ray`: for each process an actor with an agent in it, placed by a placement group. JAX-free.

`meshwright launch` is the driver and the supervisor. A node that is lost takes its actors along, which Ray reports in
seconds; it finds another node for their bundles of the group, and new actors with new agents go there.
"""

import logging
import os
from collections.abc import Mapping
from typing import Any

from ...configs.errors import UserError, first_line
from ...configs.sections.launch import RayConfig
from ..core.signals import StopSignals
from .job import Job, import_optional
from .remote_processes import Hosts, run_on_hosts

ATTEMPTS = 5  # actors for one slot that may die before their agent has connected

logger = logging.getLogger(__name__)


def launch(job: Job) -> None:
    """Supervise on the cluster; this process stays."""
    hosts = RayHosts(job.settings.ray, processes=job.processes)
    with StopSignals() as stop:
        run_on_hosts(hosts, job, stop=stop)


class RayHosts(Hosts):
    """Actors of the cluster at `settings.address`. Raises UserError where there is no cluster."""

    def __init__(self, settings: RayConfig, *, processes: int) -> None:
        self._ray = ray = import_optional("ray", "ray")
        try:
            if not ray.is_initialized():
                ray.init(address=settings.address, logging_level="warning")
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise UserError(
                f"launch.ray.address: {settings.address}: {first_line(error).rstrip('.')}; "
                "start one with `ray start --head`"
            ) from error
        self._settings = settings
        self.name = ray.util.get_node_ip_address()
        self.placement_group = ray.util.placement_group(
            [{"CPU": settings.cpus} | ({"GPU": settings.gpus} if settings.gpus else {}) | settings.resources]
            * processes,
            strategy=settings.strategy,
        )
        self._actors: dict[int, Any] = {}
        self._results: dict[int, Any] = {}  # futures of what an actor's `serve` returns, by slot
        self._attempts: dict[int, int] = {}
        self._port = 0

    def start(self, machines: Mapping[int, str], port: int) -> None:
        """Start an actor for each slot in its bundle of the group, on whatever node that is now."""
        self._port = port
        for slot in machines:
            self.discard(slot)
            self._attempts[slot] = 0
            self._start_actor(slot)

    def _start_actor(self, slot: int) -> None:
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        strategy = PlacementGroupSchedulingStrategy(self.placement_group, placement_group_bundle_index=slot)
        actor = self._ray.remote(AgentActor).options(
            num_cpus=self._settings.cpus,
            num_gpus=self._settings.gpus,
            resources=self._settings.resources or None,
            scheduling_strategy=strategy,
        )
        self._attempts[slot] += 1
        self._actors[slot] = actor.remote()
        self._results[slot] = self._actors[slot].serve.remote(f"{self.name}:{self._port}", slot, os.getcwd())

    def failure(self) -> str | None:
        """Why an actor keeps dying before its agent has connected; one that died is started again elsewhere."""
        ended, _ = self._ray.wait(list(self._results.values()), num_returns=len(self._results), timeout=0)
        for slot in [slot for slot, result in self._results.items() if result in ended]:
            try:
                reason = f"its agent ended with {self._ray.get(self._results[slot])}"
            except self._ray.exceptions.RayError as error:
                reason = first_line(error)
            if self._attempts[slot] >= ATTEMPTS:
                return f"process {slot}: {reason}"
            logger.info("process %d: %s; again", slot, reason)
            self._start_actor(slot)
        return None

    def hint(self) -> str:
        """What the group needs and what the cluster has."""
        free, bundles = self._ray.available_resources(), self.placement_group.bundle_specs
        needed = ", ".join(f"{len(bundles)} x {amount:g} {resource}" for resource, amount in bundles[0].items())
        has = ", ".join(f"{free.get(resource, 0):g} {resource}" for resource in bundles[0])
        return f"; it takes {needed}, and {has} are free"

    def discard(self, slot: int) -> None:
        """Kill the actor, and with it what its agent started."""
        self._results.pop(slot, None)
        if (actor := self._actors.pop(slot, None)) is not None:
            self._ray.kill(actor)

    def close(self) -> None:
        """Give the nodes back."""
        for slot in list(self._actors):
            self.discard(slot)
        self._ray.util.remove_placement_group(self.placement_group)


class AgentActor:
    """The actor that an agent runs in."""

    def serve(self, address: str, slot: int, directory: str) -> int:
        """Run the agent of a slot until the supervisor says otherwise; returns its exit code."""
        from .agent import Agent

        os.chdir(directory)
        return Agent(address, slot, reconnect_timeout=30.0).run()
