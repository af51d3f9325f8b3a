"""A network that fails: a port that forwards to another one until it is told to swallow, or to hang up.

with Partition("127.0.0.1:4000") as between:
    dial(between.address)
    between.cut()                what is sent stays on its way, both ways: a black hole
    between.cut("back")          answers alone; "there": what is asked
    between.reset()              connections are reset, and whoever dials anew is, too
    between.heal()

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

THERE, BACK = "there", "back"
ABORT = struct.pack("ii", 1, 0)  # of SO_LINGER: reset instead of a farewell


class Partition:
    """Between whoever dials `address`, on `port`, and `target`."""

    def __init__(self, target, *, port=0):
        host, _, number = target.rpartition(":")
        self._target = (host, int(number))
        self._listener = socket.create_server(("127.0.0.1", port), backlog=128)
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._flowing = {THERE: threading.Event(), BACK: threading.Event()}
        self._refusing = self._over = False
        self._ends = []

    def __enter__(self):
        self.heal()
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_):
        self._over = True
        self.heal()
        self._listener.close()
        self._hang_up()

    def cut(self, *ways):
        for way in ways or (THERE, BACK):
            self._flowing[way].clear()

    def reset(self):
        self._refusing = True
        self._hang_up()

    def heal(self):
        self._refusing = False
        for flowing in self._flowing.values():
            flowing.set()

    def _hang_up(self):
        for end in self._ends:
            with contextlib.suppress(OSError):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, ABORT)
                end.shutdown(socket.SHUT_RDWR)
        self._ends = []

    def _accept(self):
        while not self._over:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            if self._refusing:
                near.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, ABORT)
                near.close()
                continue
            try:
                far = socket.create_connection(self._target)
            except OSError:
                near.close()
                continue
            self._ends += [near, far]
            for source, to, way in ((near, far, THERE), (far, near, BACK)):
                threading.Thread(target=self._forward, args=(source, to, way), daemon=True).start()

    def _forward(self, source, to, way):
        with contextlib.suppress(OSError):
            while content := source.recv(2**16):
                self._flowing[way].wait()
                to.sendall(content)
        self._flowing[way].wait()
        for end in (source, to):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()


def main():
    file, (address, processes) = Path(sys.argv[1]), sys.argv[2:]
    own, parent = f"127.0.0.1:{free_port()}", os.getppid()
    command = [sys.executable, "-m", "meshwright.train.launch.coordination_service", own, processes]
    with subprocess.Popen(command) as service, Partition(own, port=int(address.rpartition(":")[2])) as between:
        while os.getppid() == parent and service.poll() is None:
            between.cut() if file.exists() else between.heal()
            time.sleep(0.05)
        service.kill()


if __name__ == "__main__":
    main()
