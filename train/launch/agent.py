"""The agent of one slot, beside its trainer on another machine. JAX-free.

    python -m meshwright.train.launch.agent HOST:PORT [NUMBER]

An engine for many machines brings up one agent for each process of the run. The agent dials the supervisor, starts
trainers when told to, passes signals on, reports how a trainer ended, and stays: a restart is a new trainer under the
same agent, on the same machine, in seconds. Where the supervisor is gone the agent kills what it started.

    supervisor -> agent     {"do": "start", "epoch", "command", "environment", "directory", "quiet"}
                            {"do": "stop"}   {"do": "kill"}   {"do": "probe", "session", "rendezvous", "processes"}
                            {"do": "start-snapshot-agent", "run", "rendezvous", "settings"}   {"do": "end"}
                            {"beat": true}, in answer to the agent's
    agent -> supervisor     {"hello": NUMBER or null, "host"}   {"beat": true}   {"exit": CODE, "epoch"}
                            {"killed": EPOCH}   {"snapshot_agent_exit": CODE}

One agent of each host also starts the host's snapshot agent, which outlives trainers and ends with the agent.

NUMBER is the slot; without it, that of the scheduler's environment, else whichever is free. Nothing here is
authenticated, as nothing in JAX's own coordination is: it belongs on a network that is trusted.
"""

import contextlib
import ctypes
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...configs.errors import UserError
from . import network_probe
from .agent_server import HEARTBEAT_SECONDS, connect, encode_message
from .snapshot_agent_process import SnapshotAgentProcess

POLL_SECONDS = 0.05  # between two looks at the trainer
SUPERVISOR_TIMEOUT = 30.0  # seconds without a message after which the supervisor, or the way to it, is lost
RECONNECT_TIMEOUT = 120.0  # seconds without a supervisor after which the agent ends
PR_SET_PDEATHSIG = 1  # of linux/prctl.h
LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
SLOT_VARIABLES = ("MESHWRIGHT_AGENT", "SLURM_PROCID", "JOB_COMPLETION_INDEX")  # of the scheduler's environment


class Agent:
    """Serves one slot of a run, until the supervisor says `end` or has been gone for `reconnect_timeout` seconds."""

    def __init__(self, address: str, slot: int | None, *, reconnect_timeout: float = RECONNECT_TIMEOUT) -> None:
        self._address, self._slot, self._reconnect_timeout = address, slot, reconnect_timeout
        self._trainer: subprocess.Popen | None = None
        self._epoch = 0
        self._exit_reported = True  # the supervisor knows how the trainer ended
        self._snapshot_agent: SnapshotAgentProcess | None = None
        self._snapshot_agent_reported = True  # the supervisor knows how it ended
        self._finished = False  # the supervisor said `end`
        self.preempted = False  # the machine is being taken away: no new trainer

    def run(self) -> int:
        """Connect, serve, connect again. Returns 0: told to end; 143: preempted; 1: no supervisor came back."""
        with contextlib.closing(self):
            last_connected = time.monotonic()
            while not self._finished and time.monotonic() - last_connected < self._reconnect_timeout:
                with contextlib.suppress(OSError), connect(self._address) as connection:
                    connection.sendall(encode_message({"hello": self._slot, "host": socket.gethostname()}))
                    self._serve(connection)
                    last_connected = time.monotonic()
                self._kill_trainer()  # nobody supervises it
                if self._snapshot_agent is not None:
                    self._snapshot_agent.kill()
                if self.preempted:
                    break
                if not self._finished:
                    time.sleep(0.5)
            if self._finished:
                return 0
            return 128 + signal.SIGTERM if self.preempted else 1  # a pod that ends with 0 is not replaced

    def close(self) -> None:
        """End the snapshot agent, and delete what it left where there is no snapshot."""
        if self._snapshot_agent is not None:
            self._snapshot_agent.end()

    def stop_trainer(self) -> None:
        """Send SIGTERM to the trainer: it saves and exits."""
        if self._trainer is not None and self._trainer.poll() is None:
            self._trainer.send_signal(signal.SIGTERM)

    def _serve(self, connection: socket.socket) -> None:
        buffer, last_sent, last_received = b"", 0.0, time.monotonic()
        while not self._finished and time.monotonic() - last_received < SUPERVISOR_TIMEOUT:
            ready, _, _ = select.select([connection], [], [], POLL_SECONDS)
            if ready:
                received = connection.recv(65536)
                if not received:
                    return
                last_received = time.monotonic()
                *lines, buffer = (buffer + received).split(b"\n")
                for line in lines:
                    self._handle(json.loads(line), connection)
            code = self._trainer.poll() if self._trainer is not None else None
            if code is not None and not self._exit_reported:
                self._exit_reported = True
                connection.sendall(encode_message({"exit": code, "epoch": self._epoch}))
            code = self._snapshot_agent.poll() if self._snapshot_agent is not None else None
            if code is not None and not self._snapshot_agent_reported:
                self._snapshot_agent_reported = True
                connection.sendall(encode_message({"snapshot_agent_exit": code}))
            if self.preempted and self._exit_reported:
                return
            if time.monotonic() - last_sent > HEARTBEAT_SECONDS:
                last_sent = time.monotonic()
                connection.sendall(encode_message({"beat": True}))

    def _handle(self, message: Mapping[str, Any], connection: socket.socket) -> None:
        match message.get("do"):
            case "start" if not self.preempted:
                self._start_trainer(message, connection)
            case "stop":
                self.stop_trainer()
            case "kill":
                self._kill_trainer()
                connection.sendall(encode_message({"killed": self._epoch}))
            case "probe":
                arguments = {name: message[name] for name in ("session", "rendezvous", "number", "processes")}
                threading.Thread(target=network_probe.measure_links, kwargs=arguments, daemon=True).start()
            case "start-snapshot-agent" if not self.preempted:
                self._start_snapshot_agent(message, connection)
            case "end":
                self._kill_trainer()
                self._finished = True

    def _start_trainer(self, message: Mapping[str, Any], connection: socket.socket) -> None:
        self._kill_trainer()
        self._epoch, self._exit_reported = int(message["epoch"]), False
        try:
            self._trainer = subprocess.Popen(
                message["command"],
                env=os.environ | message["environment"],
                cwd=message["directory"],
                stdout=subprocess.DEVNULL if message["quiet"] else None,
                start_new_session=True,
                preexec_fn=die_with_parent,
            )
        except OSError as error:
            print(f"meshwright agent on {socket.gethostname()}: {error}", file=sys.stderr, flush=True)
            self._exit_reported = True
            connection.sendall(encode_message({"exit": 1, "epoch": self._epoch}))

    def _start_snapshot_agent(self, message: Mapping[str, Any], connection: socket.socket) -> None:
        """Start the snapshot agent of this host, in place of an earlier one."""
        if self._snapshot_agent is not None:
            self._snapshot_agent.kill()
        self._snapshot_agent = SnapshotAgentProcess(
            message["settings"],
            run=Path(message["run"]),
            rendezvous=message["rendezvous"],
            name=network_probe.reachable_name(connection, dialled=self._address),
            bind="",
        )
        self._snapshot_agent_reported = False

    def _kill_trainer(self) -> None:
        """Send SIGKILL to the trainer and all it started, stopped processes too."""
        if self._trainer is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._trainer.pid, signal.SIGKILL)
            self._trainer.wait()
            self._trainer, self._exit_reported = None, True


def die_with_parent() -> None:
    """Have Linux kill this process when its parent dies; called between fork and exec.

    An agent that is killed thus takes its trainer along, which nobody else would kill.
    """
    if LIBC is not None:
        LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def main() -> int:
    """Run an agent; SIGTERM (the machine is being taken away) lets the trainer save and exit first."""
    address = sys.argv[1] if len(sys.argv) > 1 else ""
    if not re.fullmatch(r".+:\d+", address):
        print(
            f"agent: {address or 'nothing'!r} is no HOST:PORT; `meshwright launch` says what to give", file=sys.stderr
        )
        return UserError.exit_code
    slots = sys.argv[2:3] or [os.environ[name] for name in SLOT_VARIABLES if os.environ.get(name, "").isdigit()][:1]
    agent = Agent(address, int(slots[0]) if slots else None)

    def preempt(*_: object) -> None:
        agent.preempted = True
        agent.stop_trainer()

    signal.signal(signal.SIGTERM, preempt)
    for warning in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(warning, signal.SIG_IGN)  # SLURM's warnings are for the supervisor; trainers inherit this
    return agent.run()


if __name__ == "__main__":
    sys.exit(main())
