"""Hosts with snapshot agents in one process: directories, snapshots of random bytes, agents that serve on loopback."""

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
    """`with Hosts(path, hosts=4, max_lost_hosts=1) as hosts: hosts.snapshot(1); hosts.protect(); hosts.lose(2)`."""

    def __init__(self, root, *, hosts, max_lost_hosts, groups=None, per_host=1, sizes=(1000, 777, 1311, 64, 900, 12)):
        groups = groups or [list(range(hosts))]
        self.plan = ParityPlan(hosts, hosts * per_host, tuple(map(tuple, groups)), max_lost_hosts)
        self.root, self.sizes, self._stack = root, sizes, ExitStack()
        self.pools = {host: SlotPool() for host in range(hosts)}
        self.agents, self.servers = {}, {}

    def __enter__(self):
        for host in range(self.plan.hosts):
            self.start(host)
        return self

    def __exit__(self, *_):
        for agent in self.agents.values():
            agent.close()
        self._stack.close()

    def directory(self, host):
        return self.root / f"host-{host}"

    def start(self, host):
        """Start an agent for `host`, in place of an earlier one."""
        if host in self.agents:
            self.agents[host].close()
        self.agents[host] = SnapshotAgent(
            self.directory(host),
            host=host,
            launch_slots=self.plan.slots_of(host),
            groups=self.plan.groups,
            max_lost_hosts=self.plan.max_lost_hosts,
        )
        self.servers[host] = self._stack.enter_context(RequestServer(self.agents[host].answer))

    def snapshot(self, step, *, hosts=None, slot=None):
        """Have every process (of `hosts`) write `step` to its slot."""
        for host in self.agents if hosts is None else hosts:
            for process in self.plan.slots_of(host):
                self.write(host, process, step, slot=step % 2 if slot is None else slot)

    def write(self, host, process, step, *, slot):
        blocks = content(host, process, step, self.sizes[process % len(self.sizes)])
        header = {"step": step, "layout": "", "data": {}, "arrays": {}}
        path = self.directory(host) / f"{process}.{slot}"
        with write_slot(self.pools[host], path, [len(block) for block in blocks], header) as slot_writer:
            for number, block in enumerate(blocks):
                slot_writer.write(number, block)

    def statuses(self):
        return {host: agent.status() | {"address": self.servers[host].address} for host, agent in self.agents.items()}

    def protect(self):
        """Let the agents do what they do, until nothing is left to do."""
        for _ in range(2):
            for agent in self.agents.values():
                agent.protect_newest(self.statuses())

    def lose(self, *hosts):
        """Lose hosts with their memory; others take their places."""
        for host in hosts:
            shutil.rmtree(self.directory(host))
            self.pools[host] = SlotPool()
            self.start(host)

    def recover(self, plan=None, *, snapshot_plan=None):
        with ExitStack() as stack:
            clients = {
                host: stack.enter_context(RequestClient(server.address)) for host, server in self.servers.items()
            }
            return recover_snapshots(clients, plan or self.plan, snapshot_plan=snapshot_plan)

    def files(self, host):
        """Name -> content of the slots of a host."""
        return {path.name: path.read_bytes() for path in sorted(self.directory(host).glob("[0-9]*.[01]"))}
