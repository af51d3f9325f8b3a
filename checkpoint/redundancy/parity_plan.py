"""Which hosts protect each other's snapshots, of the whole run and of what is left of it. Pure and JAX-free."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ...configs.errors import UserError
from ...configs.sections.training import CheckpointConfig
from .parity_groups import assign_groups

LOSSES = {"none": 0, "xor": 1, "p+q": 2}


@dataclass(frozen=True)
class ParityPlan:
    """Which hosts there are, and how they protect each other."""

    hosts: int
    processes: int  # of the run, one in each slot; the same number on each host, in order
    groups: tuple[tuple[int, ...], ...]
    losses: int  # of a group that its parity bears
    size: int = 8  # of a group, at most
    domains: tuple[str, ...] = ()  # of each host; empty: each is its own
    active_slots: tuple[int, ...] | None = None  # slots; None: all

    @property
    def slots(self) -> tuple[int, ...]:
        """The slots that take part."""
        return tuple(range(self.processes)) if self.active_slots is None else self.active_slots

    @property
    def active_hosts(self) -> list[int]:
        """The hosts that take part."""
        return sorted({self.host_of(slot) for slot in self.slots})

    def host_of(self, slot: int) -> int:
        """The host that a slot is on."""
        return slot * self.hosts // self.processes

    def slots_of(self, host: int) -> list[int]:
        """The slots on a host that take part."""
        return [slot for slot in self.slots if self.host_of(slot) == host]

    def restrict_to(self, slots: Sequence[int]) -> "ParityPlan":
        """The plan of an epoch in `slots` alone: the hosts that are left protect each other as well as they can.

        Failure domains that cannot be kept apart any more are not; with too few hosts for it there is no parity.
        """
        if set(slots) == set(range(self.processes)):
            return self
        left = replace(self, taking_part=tuple(sorted(slots)))
        hosts = left.active_hosts
        domains = [self.domains[host] for host in hosts] if self.domains else []
        for losses, apart in ((self.losses, domains), (self.losses, []), (0, [])):
            try:
                groups = assign_groups(len(hosts), size=self.size, losses=losses, domains=apart)
            except UserError:
                continue
            return replace(left, losses=losses, groups=tuple(tuple(hosts[one] for one in group) for group in groups))
        raise AssertionError(f"{len(hosts)} hosts cannot be grouped without parity")


def make_parity_plan(checkpoint: CheckpointConfig, *, hosts: int, processes: int) -> ParityPlan | None:
    """The keepers that a configuration asks for; None where there are no snapshots to keep.

    Raises UserError where its parity cannot be had on these hosts.
    """
    losses = LOSSES[checkpoint.parity]
    if processes % hosts:
        raise UserError(f"launch.hosts: {processes} processes cannot be spread evenly over {hosts} hosts; change one")
    if not checkpoint.memory_every:
        if losses:
            raise UserError(
                f"checkpoint.parity: {checkpoint.parity} protects snapshots in memory and checkpoint.memory_every is "
                "0; set it, or parity to none"
            )
        return None
    groups = assign_groups(hosts, size=checkpoint.group, losses=losses, domains=checkpoint.domains)
    return ParityPlan(
        hosts, processes, tuple(map(tuple, groups)), losses, size=checkpoint.group, domains=tuple(checkpoint.domains)
    )
