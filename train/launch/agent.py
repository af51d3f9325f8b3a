"""The agent beside a trainer on another machine. JAX-free.

    python -m meshwright.train.launch.agent HOST:PORT [NUMBER]

An engine for many machines brings up one agent for each process of the run. The agent dials the supervisor, starts the
trainer it is told to start, passes signals on, says how the trainer ended, and stays: a restart is a new trainer under
the same agent, on the same machine, in seconds. Where the supervisor is gone the agent kills what it started.

    supervisor -> agent     {"do": "start", "epoch", "command", "environment", "directory", "quiet"}
                            {"do": "stop"}   {"do": "kill"}   {"do": "probe", "session", "rendezvous", "processes"}
                            {"do": "keep", "run", "rendezvous", "settings"}   {"do": "end"}
                            {"beat": true}, in answer to the agent's
    agent -> supervisor     {"hello": NUMBER or null, "host"}   {"beat": true}   {"exit": CODE, "epoch"}
                            {"killed": EPOCH}   {"keeper": CODE}

One agent of each host also starts the keeper of its snapshots, which outlives trainers and ends with the agent.

NUMBER is the process's; without it, that of the scheduler's environment, else whichever is free. Nothing here is
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
from .agent_server import BEAT, connected
from .snapshot_agent_process import Tended

TICK = 0.05  # seconds between two looks at the trainer
SILENCE = 30.0  # seconds without an answer after which the supervisor, or the way to it, is gone
PATIENCE = 120.0  # seconds without a supervisor after which the agent ends
PR_SET_PDEATHSIG = 1  # of linux/prctl.h
LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
NUMBERS = ("MESHWRIGHT_AGENT", "SLURM_PROCID", "JOB_COMPLETION_INDEX")  # of the scheduler's environment


class Agent:
    """Serves one process of a run, until the supervisor says `end` or has been gone for `patience` seconds."""

    def __init__(self, address: str, number: int | None, *, patience: float = PATIENCE) -> None:
        self._address, self._number, self._patience = address, number, patience
        self._trainer: subprocess.Popen | None = None
        self._epoch = 0
        self._told = True  # how the trainer ended
        self._keeper: Tended | None = None
        self._keeper_told = True  # how it ended
        self._ended = False
        self.leaving = False  # the machine is being taken away: no new trainer

    def run(self) -> int:
        """Dial, serve, dial again. 0: told to end; 143: the machine was taken away; 1: nobody answered any more."""
        with contextlib.closing(self):
            return self._run()

    def close(self) -> None:
        """End the keeper, and delete what it left where there is no snapshot."""
        if self._keeper is not None:
            self._keeper.end()

    def _run(self) -> int:
        alone = time.monotonic()
        while not self._ended and time.monotonic() - alone < self._patience:
            with contextlib.suppress(OSError), connected(self._address) as line:
                line.sendall(message({"hello": self._number, "host": socket.gethostname()}))
                self._serve(line)
                alone = time.monotonic()
            self._kill()  # nobody supervises it
            if self._keeper is not None:
                self._keeper.kill()
            if self.leaving:
                break
            if not self._ended:
                time.sleep(0.5)
        if self._ended:
            return 0
        return 128 + signal.SIGTERM if self.leaving else 1  # a pod that ends with 0 is not replaced

    def stop_trainer(self) -> None:
        """SIGTERM to the trainer: it saves and exits."""
        if self._trainer is not None and self._trainer.poll() is None:
            self._trainer.send_signal(signal.SIGTERM)

    def _serve(self, line: socket.socket) -> None:
        text, spoken, heard = b"", 0.0, time.monotonic()
        while not self._ended and time.monotonic() - heard < SILENCE:
            ready, _, _ = select.select([line], [], [], TICK)
            if ready:
                part = line.recv(65536)
                if not part:
                    return
                heard = time.monotonic()
                *whole, text = (text + part).split(b"\n")
                for words in whole:
                    self._obey(json.loads(words), line)
            code = self._trainer.poll() if self._trainer is not None else None
            if code is not None and not self._told:
                self._told = True
                line.sendall(message({"exit": code, "epoch": self._epoch}))
            code = self._keeper.poll() if self._keeper is not None else None
            if code is not None and not self._keeper_told:
                self._keeper_told = True
                line.sendall(message({"keeper": code}))
            if self.leaving and self._told:
                return
            if time.monotonic() - spoken > BEAT:
                spoken = time.monotonic()
                line.sendall(message({"beat": True}))

    def _obey(self, asked: Mapping[str, Any], line: socket.socket) -> None:
        match asked.get("do"):
            case "start" if not self.leaving:
                self._start(asked, line)
            case "stop":
                self.stop_trainer()
            case "kill":
                self._kill()
                line.sendall(message({"killed": self._epoch}))
            case "probe":
                threading.Thread(target=network_probe.take_part, kwargs=probe_arguments(asked), daemon=True).start()
            case "keep" if not self.leaving:
                self._keep(asked, line)
            case "end":
                self._kill()
                self._ended = True

    def _start(self, asked: Mapping[str, Any], line: socket.socket) -> None:
        self._kill()
        self._epoch, self._told = int(asked["epoch"]), False
        try:
            self._trainer = subprocess.Popen(
                asked["command"],
                env=os.environ | asked["environment"],
                cwd=asked["directory"],
                stdout=subprocess.DEVNULL if asked["quiet"] else None,
                start_new_session=True,
                preexec_fn=die_with_parent,
            )
        except OSError as error:
            print(f"meshwright agent on {socket.gethostname()}: {error}", file=sys.stderr, flush=True)
            self._told = True
            line.sendall(message({"exit": 1, "epoch": self._epoch}))

    def _keep(self, asked: Mapping[str, Any], line: socket.socket) -> None:
        """Start the keeper of this host, in place of an earlier one."""
        if self._keeper is not None:
            self._keeper.kill()
        name = network_probe.own_name(line, dialled=self._address)
        place = {"run": Path(asked["run"]), "rendezvous": asked["rendezvous"], "name": name, "bind": ""}
        self._keeper, self._keeper_told = Tended(asked["settings"], **place), False

    def _kill(self) -> None:
        """SIGKILL to the trainer and all it started, stopped ones too."""
        if self._trainer is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._trainer.pid, signal.SIGKILL)
            self._trainer.wait()
            self._trainer, self._told = None, True


def die_with_parent() -> None:
    """On Linux, between fork and exec: an agent that is killed takes its trainer along, which nobody would kill."""
    if LIBC is not None:
        LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def probe_arguments(asked: Mapping[str, Any]) -> dict[str, Any]:
    """Of `links.take_part`."""
    return {name: asked[name] for name in ("session", "rendezvous", "number", "processes")}


def message(words: Mapping[str, Any]) -> bytes:
    """One line."""
    return json.dumps(words).encode() + b"\n"


def main() -> int:
    """Serve; SIGTERM (the machine is being taken away) lets the trainer save and exit first."""
    address = sys.argv[1] if len(sys.argv) > 1 else ""
    if not re.fullmatch(r".+:\d+", address):
        print(
            f"agent: {address or 'nothing'!r} is no HOST:PORT; `meshwright launch` says what to give", file=sys.stderr
        )
        return UserError.exit_code
    given = sys.argv[2:3] or [os.environ[name] for name in NUMBERS if os.environ.get(name, "").isdigit()][:1]
    agent = Agent(address, int(given[0]) if given else None)

    def leave(*_: object) -> None:
        agent.leaving = True
        agent.stop_trainer()

    signal.signal(signal.SIGTERM, leave)
    for warning in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(warning, signal.SIG_IGN)  # SLURM's warnings are the supervisor's; trainers inherit the deafness
    return agent.run()


if __name__ == "__main__":
    sys.exit(main())
