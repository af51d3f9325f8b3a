"""Where keepers run: as processes of this machine, or under the agents of others. JAX-free.

    Here(run, rendezvous=...)                every host is simulated on this machine
    There(board, plan, run, rendezvous=...)  the agent of a host's first process starts its keeper: one a host

Either starts and kills a host's keeper and says how it ended; when to, is decided in `keepers.py`. A keeper holds
nothing that is not in the slots, so killing one loses nothing.
"""

import json
import logging
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from ...checkpoint.redundancy import agent_files
from ...checkpoint.redundancy.parity_plan import Plan
from ...configs.errors import MeshwrightError
from .agent_server import Switchboard

COMMAND = [sys.executable, "-m", "meshwright.train.launch.snapshot_agent_main"]

logger = logging.getLogger(__name__)


class Tending(Protocol):
    """Starts keepers."""

    def check(self, plan: Plan) -> None:
        """Raise MeshwrightError where the machines are not the hosts of `plan`."""

    def start(self, host: int, plan: Plan) -> bool:
        """Start the keeper of a host, in place of an earlier one; false where its machine is not there."""

    def ended(self, host: int) -> str | None:
        """How the keeper that was started ended, in words; None while it runs."""

    def kill(self, host: int) -> None:
        """SIGKILL to one that hangs."""

    def close(self) -> None:
        """The run is over: end all, and delete what they left where the trainers left no snapshot."""


class Tended:
    """The process of a host's keeper, on this machine. Others reach it by `name`; it listens at `bind`."""

    def __init__(self, settings: Mapping[str, Any], *, run: Path, rendezvous: str, name: str, bind: str) -> None:
        self.directory = agent_files.directory_of(run, host=settings["host"])
        place = {"directory": str(self.directory), "rendezvous": rendezvous, "name": name, "bind": bind}
        self._process = subprocess.Popen([*COMMAND, json.dumps({**settings, **place})], start_new_session=True)
        self.pid = self._process.pid

    def poll(self) -> int | None:
        """Its exit code; None while it runs."""
        return self._process.poll()

    def kill(self) -> None:
        """SIGKILL."""
        self._process.kill()
        self._process.wait()

    def end(self) -> None:
        """Kill it, and delete what keepers left in a directory without snapshots."""
        self.kill()
        agent_files.sweep(self.directory)


class Here:
    """Keepers as processes of this machine."""

    def __init__(self, run: Path, *, rendezvous: str) -> None:
        self._run, self._rendezvous = run, rendezvous
        self._tended: dict[int, Tended] = {}

    def check(self, plan: Plan) -> None:
        """One machine is whatever it is said to be."""

    def start(self, host: int, plan: Plan) -> bool:
        """A process, on loopback."""
        place = {"run": self._run, "rendezvous": self._rendezvous, "name": "127.0.0.1", "bind": "127.0.0.1"}
        self._tended[host] = Tended(settings(host, plan), **place)
        return True

    def ended(self, host: int) -> str | None:
        """Its exit code."""
        code = self._tended[host].poll()
        return None if code is None else f"exit code {code}"

    def kill(self, host: int) -> None:
        """SIGKILL."""
        self._tended[host].kill()

    def pid(self, host: int) -> int:
        """Of a host's keeper."""
        return self._tended[host].pid

    def close(self) -> None:
        """Kill and sweep."""
        for one in self._tended.values():
            one.end()


class There:
    """Keepers under the agents at `board`; `plan` is that of the whole run."""

    def __init__(self, board: Switchboard, plan: Plan, run: Path, *, rendezvous: str) -> None:
        self._board, self._plan, self._run, self._rendezvous = board, plan, run.absolute(), rendezvous
        self._leads: dict[int, int] = {}  # host -> the slot whose agent was told to start its keeper
        self._warned = False

    def check(self, plan: Plan) -> None:
        """A host is one machine; more hosts of a group than its parity bears should not be on one."""
        machine = {}
        for host in plan.present:
            names = sorted({self._board.host(slot) for slot in plan.places_of(host)})
            if len(names) > 1:
                raise MeshwrightError(
                    f"launch.hosts: {plan.hosts}, and processes {plan.places_of(host)}, which should share a host, are "
                    f"on {' and '.join(names)}; set it to {plan.processes}, each process a host of its own"
                )
            machine[host] = names[0]
        for group in plan.groups if plan.losses and not self._warned else ():
            name, most = Counter(machine[host] for host in group).most_common(1)[0]
            if most > plan.losses:
                self._warned = True
                alike = [host for host in group if machine[host] == name]
                logger.warning(
                    "hosts %s of one parity group are all on %s: with it more is lost than checkpoint.parity bears",
                    alike,
                    name,
                )

    def start(self, host: int, plan: Plan) -> bool:
        """Tell the first agent of the host that is there."""
        there = sorted(set(self._plan.places_of(host)) & self._board.present)
        if not there:
            return False
        self._leads[host] = there[0]
        words = {"do": "keep", "run": str(self._run), "rendezvous": self._rendezvous, "settings": settings(host, plan)}
        self._board.tell(there[0], words)
        return True

    def ended(self, host: int) -> str | None:
        """What its agent says of it."""
        return self._board.keeper(self._leads[host])

    def kill(self, host: int) -> None:
        """The next one that the agent starts takes its place."""

    def close(self) -> None:
        """Agents end their keepers with themselves."""


def settings(host: int, plan: Plan) -> dict[str, Any]:
    """Of a keeper, wherever it runs."""
    return {"host": host, "places": plan.places_of(host), "groups": plan.groups, "losses": plan.losses}
