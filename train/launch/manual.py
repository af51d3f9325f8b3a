"""Engine `agents`: somebody else brings up the agents, a person with a terminal or a JobSet. JAX-free.

machine A    meshwright launch config.yaml --engine agents --processes 2
A and B      python -m meshwright.train.launch.agent A:29400
"""

import logging
import socket
import sys
from collections.abc import Mapping

from ...configs.errors import UserError
from ..core.signals import StopSignals
from .job import Job
from .remote_processes import Hosts, run_on_hosts

logger = logging.getLogger(__name__)


class ManualHosts(Hosts):
    """Machines whose agents come by themselves, and again when they are lost."""

    def __init__(self, name: str) -> None:
        self.name = name

    def start(self, machines: Mapping[int, str], port: int) -> None:
        """Say which command to run on the machines."""
        command = f"{sys.executable} -m meshwright.train.launch.agent {self.name}:{port}"
        logger.warning("waiting for %d agents; on each machine run: %s", len(machines), command)

    def hint(self) -> str:
        """What a reader can do."""
        return "; start one on each machine"


def launch(job: Job) -> None:
    """Wait for agents at `launch.listen` and supervise."""
    host, port = parse_listen_address(job.settings.listen)
    with StopSignals() as stop:
        run_on_hosts(ManualHosts(host), job, stop=stop, port=port)


def parse_listen_address(listen: str | None) -> tuple[str, int]:
    """(name, port) of HOST:PORT; for None this machine's name, and 0, any port. Raises UserError.

    >>> parse_listen_address("node0:29400")
    ('node0', 29400)
    """
    if listen is None:
        return socket.gethostname(), 0
    host, _, port = listen.rpartition(":")
    if not host or not port.isdigit() or int(port) > 65535:
        raise UserError(f"launch.listen: {listen} is not HOST:PORT; e.g. node0:29400")
    return host, int(port)
