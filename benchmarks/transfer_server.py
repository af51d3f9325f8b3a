"""`meshwright bench lowcomm transfer`: what JAX's transfer server does when something goes wrong.

Each trial has a giver and a taker, processes of their own that no `jax.distributed` joins; what became of the pull and
of the two processes is printed. Islands could use it for payloads where a process that did nothing wrong always lives
on, and every wait ends by its timeout. On JAX 0.10.2 neither is so: see docs/log.md.
"""

import argparse
import datetime
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import transfer

HERE = "127.0.0.1:0"
SIZE = 64 * 2**20  # bytes
NEVER = 99  # a number that is not offered
WAIT = 5.0  # seconds after which a pull counts as one that does not end


def server() -> Any:
    """JAX's server, on loopback and any two ports."""
    return transfer.start_transfer_server(jax.devices()[0].client, HERE, [HERE], transfer_size=2**20)


def give(trial: str) -> None:
    """Offer SIZE bytes under number 1, tell where, and stay."""
    own = server()
    offered = jax.device_put((np.arange(SIZE) % 251).astype(np.uint8))
    own.await_pull(1, [offered])
    if trial == "refused":
        for listener in listeners():
            if "{}:{}".format(*listener.getsockname()) != own.address():
                listener.shutdown(socket.SHUT_RDWR)
    if trial == "withdrawn":
        offered.delete()
    print(own.address(), flush=True)
    time.sleep(600)


def listeners() -> list[socket.socket]:
    """The sockets that this process listens at."""
    found = []
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            one = socket.socket(fileno=os.dup(int(descriptor)))
            if one.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                found.append(one)
        except OSError:
            continue  # not a socket
    return found


def take(trial: str, address: str, giver: int) -> None:
    """Pull, while the trial does its worst to the giver; print how it ended."""
    connection = server().connect(address)
    if trial == "stopped":
        os.kill(giver, signal.SIGSTOP)
    if trial == "stray":
        host, _, port = address.rpartition(":")
        with socket.create_connection((host, int(port))) as stranger:
            stranger.sendall(bytes(4))
    began = time.monotonic()
    limit = (
        {"timeout": datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=1)} if trial == "timeout" else {}
    )
    where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted = [jax.ShapeDtypeStruct((SIZE,), np.uint8, sharding=where)]
    (array,) = connection.pull(NEVER if trial in ("never", "timeout") else 1, wanted, **limit)
    if trial == "killed":
        os.kill(giver, signal.SIGKILL)
    while not array.is_ready() and time.monotonic() - began < WAIT:
        time.sleep(0.001)
    print(ended(array) if array.is_ready() else f"not ready after {WAIT:g} s", flush=True)
    os._exit(0)  # what hangs here is not waited for


def ended(array: jax.Array) -> str:
    """What a pull came to."""
    try:
        right = bool((np.asarray(array) == (np.arange(SIZE) % 251).astype(np.uint8)).all())
    except RuntimeError as error:
        return f"an error: {str(error).splitlines()[0][:90]}"
    return "whole" if right else "DAMAGED"


# Trial -> what is done. The taker's own doing but for `refused` and `withdrawn`.
TRIALS = {
    "plain": "nothing goes wrong",
    "never": "a number that is not offered",
    "timeout": "the same, with a timeout of 1 s",
    "withdrawn": "the offered array was deleted",
    "killed": "the giver is killed",
    "stopped": "the giver is stopped",
    "refused": "the giver's second port refuses",
    "stray": "somebody sends the giver's port four zero bytes",
}


def attempt(trial: str, command: Callable[..., list[str]]) -> str:
    """How a trial ended, in a line."""
    quiet = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    with subprocess.Popen(command("--give", trial), **quiet) as giver:
        try:
            address = giver.stdout.readline().strip()
            taker = subprocess.run(command("--take", trial, address, str(giver.pid)), check=False, **quiet)
            time.sleep(0.5)
            fate = {"taker": taker.returncode, "giver": giver.poll()}
        finally:
            giver.kill()
    dead = [f"{who} ABORTED" for who, code in fate.items() if code == -signal.SIGABRT]
    return "; ".join([f"{TRIALS[trial]}: {taker.stdout.strip() or 'nothing'}", *dead])


def main(arguments: Sequence[str]) -> None:
    """Parse, try each, print."""
    parser = argparse.ArgumentParser(prog="meshwright bench lowcomm transfer")
    parser.add_argument("--only", nargs="+", choices=TRIALS, default=list(TRIALS))
    parser.add_argument("--give", help=argparse.SUPPRESS)
    parser.add_argument("--take", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    jax.config.update("jax_platforms", "cpu")
    if options.give:
        give(options.give)
    elif options.take:
        take(options.take[0], options.take[1], int(options.take[2]))
    else:
        own = [sys.executable, "-m", "meshwright.train.cli", "bench", "lowcomm", "transfer"]
        print(f"JAX {jax.__version__}")
        for trial in options.only:
            print(attempt(trial, lambda *words: [*own, *words]), flush=True)
