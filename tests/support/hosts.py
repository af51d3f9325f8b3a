"""Hosts with keepers in one process: directories, snapshots of random bytes, keepers that answer on loopback."""

import shutil
from contextlib import ExitStack

import numpy as np

from meshwright.checkpoint.redundancy.parity_plan import ParityPlan
from meshwright.checkpoint.redundancy.shm_slots import SlotPool, write_slot
from meshwright.checkpoint.redundancy.snapshot_agent import SnapshotAgent
from meshwright.parallel.transport.checked_stream import RequestClient, RequestServer
from meshwright.train.launch.snapshot_agents import recover_snapshots


def content(host, process, step, size):
    draw = np.random.default_rng([host, process, step])
    return [draw.integers(0, 256, length, dtype=np.uint8) for length in (size, 3, size // 2)]


class Hosts:
    """`with Hosts(path, hosts=4, losses=1) as hosts: hosts.snapshot(1); hosts.protect(); hosts.lose(2)`."""

    def __init__(self, root, *, hosts, losses, groups=None, per_host=1, sizes=(1000, 777, 1311, 64, 900, 12)):
        groups = groups or [list(range(hosts))]
        self.plan = ParityPlan(hosts, hosts * per_host, tuple(map(tuple, groups)), losses)
        self.root, self.sizes, self._stack = root, sizes, ExitStack()
        self.pools = {host: SlotPool() for host in range(hosts)}
        self.keepers, self.listeners = {}, {}

    def __enter__(self):
        for host in range(self.plan.hosts):
            self.start(host)
        return self

    def __exit__(self, *_):
        for keeper in self.keepers.values():
            keeper.close()
        self._stack.close()

    def directory(self, host):
        return self.root / f"host-{host}"

    def start(self, host):
        """A keeper for `host`, in place of an earlier one."""
        if host in self.keepers:
            self.keepers[host].close()
        self.keepers[host] = SnapshotAgent(
            self.directory(host),
            host=host,
            launch_slots=self.plan.slots_of(host),
            groups=self.plan.groups,
            losses=self.plan.losses,
        )
        self.listeners[host] = self._stack.enter_context(RequestServer(self.keepers[host].answer))

    def snapshot(self, step, *, hosts=None, slot=None):
        """Every process (of `hosts`) writes `step` to its slot."""
        for host in self.keepers if hosts is None else hosts:
            for process in self.plan.slots_of(host):
                self.write(host, process, step, slot=step % 2 if slot is None else slot)

    def write(self, host, process, step, *, slot):
        blocks = content(host, process, step, self.sizes[process % len(self.sizes)])
        header = {"step": step, "layout": "", "data": {}, "arrays": {}}
        path = self.directory(host) / f"{process}.{slot}"
        with write_slot(self.pools[host], path, [len(block) for block in blocks], header) as filled:
            for number, block in enumerate(blocks):
                filled.write(number, block)

    def infos(self):
        return {
            host: keeper.info() | {"address": self.listeners[host].address} for host, keeper in self.keepers.items()
        }

    def protect(self):
        """What the keepers do until nothing is left to do."""
        for _ in range(2):
            for keeper in self.keepers.values():
                keeper.look(self.infos())

    def lose(self, *lost):
        """Hosts are gone with their memory; others stand in their place."""
        for host in lost:
            shutil.rmtree(self.directory(host))
            self.pools[host] = SlotPool()
            self.start(host)

    def recover_snapshots(self, plan=None, *, before=None):
        with ExitStack() as stack:
            peers = {host: stack.enter_context(RequestClient(one.address)) for host, one in self.listeners.items()}
            return recover_snapshots(peers, plan or self.plan, before=before)

    def files(self, host):
        """Name -> content of the slots of a host."""
        return {path.name: path.read_bytes() for path in sorted(self.directory(host).glob("[0-9]*.[01]"))}
