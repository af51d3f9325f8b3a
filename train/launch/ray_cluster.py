"""Engine `ray`: an agent in an actor for each process, placed by a placement group. JAX-free.

`meshwright launch` is the driver and the supervisor. A node that is lost takes its actors along, which Ray reports in
seconds; it finds another place for their part of the group, and new actors with new agents go there.
"""

import logging
import os
from collections.abc import Mapping
from typing import Any

from ...configs.errors import UserError, first_line
from ...configs.sections.launch import RayConfig
from ..core.signals import StopSignals
from .job import Job, needed
from .remote_processes import run_on

ATTEMPTS = 5  # actors that may die before their agent has come, for one place

logger = logging.getLogger(__name__)


def launch(job: Job) -> None:
    """Supervise on the cluster; this process stays."""
    hosts = RayHosts(job.settings.ray, processes=job.processes)
    with StopSignals() as stop:
        run_on(hosts, job, stop=stop)


class RayHosts:
    """Actors of the cluster at `settings.address`."""

    def __init__(self, settings: RayConfig, *, processes: int) -> None:
        self._ray = ray = needed("ray", "ray")
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
        self._group = ray.util.placement_group(
            [{"CPU": settings.cpus} | ({"GPU": settings.gpus} if settings.gpus else {})] * processes,
            strategy=settings.strategy,
        )
        self._actors: dict[int, Any] = {}
        self._served: dict[int, Any] = {}  # what an actor's service returns, once it has ended
        self._attempts: dict[int, int] = {}
        self._port = 0

    def start(self, places: Mapping[int, str], port: int) -> None:
        """An actor for each, in its place of the group, wherever that is now."""
        self._port = port
        for number in places:
            self.discard(number)
            self._attempts[number] = 0
            self._raise(number)

    def _raise(self, number: int) -> None:
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        place = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=number)
        actor = self._ray.remote(Host).options(
            num_cpus=self._settings.cpus, num_gpus=self._settings.gpus, scheduling_strategy=place
        )
        self._attempts[number] += 1
        self._actors[number] = actor.remote()
        self._served[number] = self._actors[number].serve.remote(f"{self.name}:{self._port}", number, os.getcwd())

    def trouble(self) -> str | None:
        """An actor that keeps dying before its agent has come; one that died is tried again elsewhere."""
        ended, _ = self._ray.wait(list(self._served.values()), num_returns=len(self._served), timeout=0)
        for number in [number for number, served in self._served.items() if served in ended]:
            try:
                why = f"its agent ended with {self._ray.get(self._served[number])}"
            except self._ray.exceptions.RayError as error:
                why = first_line(error)
            if self._attempts[number] >= ATTEMPTS:
                return f"process {number}: {why}"
            logger.info("process %d: %s; again", number, why)
            self._raise(number)
        return None

    def hint(self) -> str:
        """What the group needs and the cluster has."""
        free, bundles = self._ray.available_resources(), self._group.bundle_specs
        wanted = ", ".join(f"{len(bundles)} x {much:g} {what}" for what, much in bundles[0].items())
        return f"; it takes {wanted}, and {free.get('CPU', 0):g} CPU, {free.get('GPU', 0):g} GPU are free"

    def discard(self, number: int) -> None:
        """Kill the actor, and with it what its agent started."""
        self._served.pop(number, None)
        if (actor := self._actors.pop(number, None)) is not None:
            self._ray.kill(actor)

    def close(self) -> None:
        """Give the places back."""
        for number in list(self._actors):
            self.discard(number)
        self._ray.util.remove_placement_group(self._group)


class Host:
    """The actor."""

    def serve(self, address: str, number: int, directory: str) -> int:
        """Be the agent of process `number`, until the supervisor says otherwise."""
        from .agent import Agent

        os.chdir(directory)
        return Agent(address, number, patience=30.0).run()
