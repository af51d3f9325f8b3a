"""Host of JAX's coordination service: `python -m meshwright.train.launch.coordination_service HOST:PORT PROCESSES`.

JAX starts the service inside process 0, whose death is then the death of all. Here it has a process of its own. The
trainers use JAX's public call only: process 0 is told to bind its own, unused service to another port. This file alone
uses what JAX does not document; if that changes, starting fails at once and says so.
"""

import os
import sys
import time

HEARTBEAT_TIMEOUT = 100  # seconds, JAX's own default: the supervisor looks for hangs, not the service


def main() -> None:
    """Serve until the process that started this one is gone."""
    address, processes = sys.argv[1], int(sys.argv[2])
    parent = os.getppid()
    from jax._src.lib import _jax

    service = _jax.get_distributed_runtime_service(
        f"[::]:{address.rpartition(':')[2]}",
        processes,
        heartbeat_timeout=HEARTBEAT_TIMEOUT,
        shutdown_timeout=300,
        recoverable=False,
    )
    while os.getppid() == parent:
        time.sleep(0.5)
    del service


if __name__ == "__main__":
    main()
