"""A network that fails: a port that forwards to another one until it is told to drop data, or to reset connections.

with Partition("127.0.0.1:4000") as network:
    dial(network.address)
    network.cut()                drops what is sent, both ways, without a word
    network.cut("back")          drops replies alone; "forward": requests
    network.reset()              resets connections, and those that are dialled anew
    network.heal()

    python partition.py FILE HOST:PORT PROCESSES

is JAX's coordination service behind a network that is cut while FILE exists.
"""

import contextlib
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

from meshwright.train.launch.local_processes import free_port

FORWARD, BACK = "forward", "back"
ABORT = struct.pack("ii", 1, 0)  # of SO_LINGER: reset the connection instead of closing it


class Partition:
    """Forwards between `address`, on `port`, and `target`."""

    def __init__(self, target, *, port=0):
        host, _, target_port = target.rpartition(":")
        self._target = (host, int(target_port))
        self._listener = socket.create_server(("127.0.0.1", port), backlog=128)
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._flowing = {FORWARD: threading.Event(), BACK: threading.Event()}
        self._resetting = self._closed = False
        self._sockets = []

    def __enter__(self):
        self.heal()
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_):
        self._closed = True
        self.heal()
        self._listener.close()
        self._hang_up()

    def cut(self, *directions):
        for direction in directions or (FORWARD, BACK):
            self._flowing[direction].clear()

    def reset(self):
        self._resetting = True
        self._hang_up()

    def heal(self):
        self._resetting = False
        for flowing in self._flowing.values():
            flowing.set()

    def _hang_up(self):
        for connection in self._sockets:
            with contextlib.suppress(OSError):
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, ABORT)
                connection.shutdown(socket.SHUT_RDWR)
        self._sockets = []

    def _accept(self):
        while not self._closed:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            if self._resetting:
                near.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, ABORT)
                near.close()
                continue
            try:
                far = socket.create_connection(self._target)
            except OSError:
                near.close()
                continue
            self._sockets += [near, far]
            for source, target, direction in ((near, far, FORWARD), (far, near, BACK)):
                threading.Thread(target=self._forward, args=(source, target, direction), daemon=True).start()

    def _forward(self, source, target, direction):
        with contextlib.suppress(OSError):
            while content := source.recv(2**16):
                self._flowing[direction].wait()
                target.sendall(content)
        self._flowing[direction].wait()
        for connection in (source, target):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()


def main():
    file, (address, processes) = Path(sys.argv[1]), sys.argv[2:]
    target, parent = f"127.0.0.1:{free_port()}", os.getppid()
    command = [sys.executable, "-m", "meshwright.train.launch.coordination_service", target, processes]
    with subprocess.Popen(command) as service, Partition(target, port=int(address.rpartition(":")[2])) as network:
        while os.getppid() == parent and service.poll() is None:
            network.cut() if file.exists() else network.heal()
            time.sleep(0.05)
        service.kill()


if __name__ == "__main__":
    main()
