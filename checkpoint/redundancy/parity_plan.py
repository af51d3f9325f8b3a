"""The parity plan of a run: its hosts, and the groups that protect each other's snapshots. Pure and JAX-free."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ...configs.errors import UserError
from ...configs.sections.training import CheckpointConfig
from .parity_groups import assign_groups

MAX_LOST_HOSTS = {"none": 0, "xor": 1, "p+q": 2}


@dataclass(frozen=True)
class ParityPlan:
    """The hosts and launch slots of a run, and its parity groups."""

    hosts: int
    processes: int  # of the run, one per launch slot; the same number on each host, in order
    groups: tuple[tuple[int, ...], ...]
    max_lost_hosts: int  # lost hosts of a group that its parity tolerates; 0: no parity
    size: int = 8  # maximum hosts of a group
    domains: tuple[str, ...] = ()  # failure domain of each host; empty: each host is its own
    active_slots: tuple[int, ...] | None = None  # launch slots that take part; None: all

    @property
    def slots(self) -> tuple[int, ...]:
        """The launch slots that take part."""
        return tuple(range(self.processes)) if self.active_slots is None else self.active_slots

    @property
    def active_hosts(self) -> list[int]:
        """The hosts that take part."""
        return sorted({self.host_of(slot) for slot in self.slots})

    def host_of(self, slot: int) -> int:
        """Return the host of a launch slot."""
        return slot * self.hosts // self.processes

    def slots_of(self, host: int) -> list[int]:
        """Return the launch slots on a host that take part."""
        return [slot for slot in self.slots if self.host_of(slot) == host]

    def restrict_to(self, slots: Sequence[int]) -> "ParityPlan":
        """Return the plan of an epoch in `slots` alone: the hosts that are left protect each other.

        Failure domains are ignored if they can no longer be kept in different groups. With too few hosts there is no
        parity.
        """
        if set(slots) == set(range(self.processes)):
            return self
        restricted = replace(self, active_slots=tuple(sorted(slots)))
        hosts = restricted.active_hosts
        remaining = [self.domains[host] for host in hosts] if self.domains else []
        for max_lost_hosts, domains in ((self.max_lost_hosts, remaining), (self.max_lost_hosts, []), (0, [])):
            try:
                groups = assign_groups(len(hosts), size=self.size, max_lost_hosts=max_lost_hosts, domains=domains)
            except UserError:
                continue
            named = tuple(tuple(hosts[position] for position in group) for group in groups)
            return replace(restricted, max_lost_hosts=max_lost_hosts, groups=named)
        raise AssertionError(f"{len(hosts)} hosts cannot be grouped without parity")


def make_parity_plan(checkpoint: CheckpointConfig, *, hosts: int, processes: int) -> ParityPlan | None:
    """Return the parity plan of a configuration; None if it takes no snapshots in memory.

    Raises UserError if these hosts cannot have its parity.
    """
    max_lost_hosts = MAX_LOST_HOSTS[checkpoint.parity]
    if processes % hosts:
        raise UserError(
            f"launch.hosts: {processes} processes cannot be divided evenly over {hosts} hosts; change either number"
        )
    if not checkpoint.memory_every:
        if max_lost_hosts:
            raise UserError(
                f"checkpoint.parity: {checkpoint.parity} protects snapshots in memory, but checkpoint.memory_every is "
                "0; set checkpoint.memory_every, or checkpoint.parity to none"
            )
        return None
    groups = assign_groups(hosts, size=checkpoint.group, max_lost_hosts=max_lost_hosts, domains=checkpoint.domains)
    return ParityPlan(
        hosts,
        processes,
        tuple(map(tuple, groups)),
        max_lost_hosts,
        size=checkpoint.group,
        domains=tuple(checkpoint.domains),
    )
