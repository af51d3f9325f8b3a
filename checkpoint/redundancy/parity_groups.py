"""Parity groups: which hosts protect each other, and which step can be recovered after a loss. Pure and JAX-free.

The parity of a group tolerates the loss of `max_lost_hosts` of its hosts (`parity.py`). Hosts of one failure domain (a
rack, a switch, a power supply) fail together, so they are put into different groups.

    groups = assign_groups(8, size=4, max_lost_hosts=1, domains=["a", "a", "b", "b", "c", "c", "d", "d"])
    recovery = choose_recovery(held_by_host, groups, max_lost_hosts=1)    the newest step that all have or can rebuild

Sources: REFT, arXiv:2310.12670 (sharding groups); Gemini, SOSP 2023 (placement of a group over hosts).
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ...configs.errors import UserError
from .agent_files import Recovery
from .parity import stripe_hosts

Groups = Sequence[Sequence[int]]


def assign_groups(hosts: int, *, size: int, max_lost_hosts: int, domains: Sequence[str] = ()) -> list[list[int]]:
    """Assign hosts to groups of at most `size`, hosts of one failure domain to as many groups as possible.

    `domains`: the failure domain of each host; empty: each host is its own. Raises UserError if a group is too small
    for its parity, or if the loss of one domain is more than a group tolerates.

    >>> assign_groups(4, size=2, max_lost_hosts=1, domains=["rack1", "rack1", "rack2", "rack2"])
    [[0, 2], [1, 3]]
    """
    count = math.ceil(hosts / size)
    if max_lost_hosts and hosts // count <= max_lost_hosts:
        raise UserError(
            f"checkpoint.group: {hosts} hosts in groups of at most {size} leave a group of {hosts // count}, but "
            f"parity that tolerates {max_lost_hosts} lost needs at least {max_lost_hosts + 1} hosts; raise "
            "checkpoint.group, or set checkpoint.parity to none"
        )
    if domains and len(domains) != hosts:
        raise UserError(
            f"checkpoint.domains: {len(domains)} domains are listed for {hosts} hosts; list one domain for each host"
        )
    domain_of = list(domains) or [str(host) for host in range(hosts)]
    sizes = Counter(domain_of)
    ordered = sorted(range(hosts), key=lambda host: (-sizes[domain_of[host]], domain_of[host], host))
    groups = [sorted(ordered[start::count]) for start in range(count)]
    for group in groups if max_lost_hosts else ():
        domain, most = Counter(domain_of[host] for host in group).most_common(1)[0]
        if most > max_lost_hosts:
            largest = hosts // math.ceil(sizes[domain] / max_lost_hosts)
            remedy = "use more failure domains"
            if largest > max_lost_hosts:
                remedy = f"set checkpoint.group to at most {largest}"
            raise UserError(
                f"checkpoint.domains: {most} of the hosts {group} are in domain {domain}, but their parity tolerates "
                f"the loss of {max_lost_hosts}; {remedy}"
            )
    return groups


@dataclass(frozen=True)
class HeldSnapshots:
    """The verified snapshots and parity of a host, identified by seals (`HostSnapshot.seal`)."""

    snapshots: Mapping[int, str] = field(default_factory=dict)  # step -> seal of this host's snapshot
    parity: Mapping[int, Mapping[int, str]] = field(default_factory=dict)  # step -> host -> seal of its source


def held_by_group(group: Sequence[int], held_by_host: Mapping[int, HeldSnapshots]) -> dict[int, HeldSnapshots]:
    """Return what each host of a group holds; nothing for a host that is not in `held_by_host`."""
    return {host: held_by_host.get(host, HeldSnapshots()) for host in group}


def choose_recovery(held_by_host: Mapping[int, HeldSnapshots], groups: Groups, *, max_lost_hosts: int) -> Recovery:
    """Choose the newest step that every group has or can rebuild; step -1 with the reason if there is none."""
    steps = {step for held in held_by_host.values() for step in (*held.snapshots, *held.parity)}
    failures: list[tuple[int, int, str]] = []  # (number of hosts that have the step, step, reason)
    for step in sorted(steps, reverse=True):
        rebuilt: list[int] = []
        reasons = []
        for group in groups:
            members = held_by_group(group, held_by_host)
            missing = [host for host in group if step not in members[host].snapshots]
            if reason := why_unrecoverable(step, missing, members, max_lost_hosts=max_lost_hosts):
                reasons.append(reason)
            rebuilt += missing
        if not reasons:
            names = ", ".join(map(str, rebuilt))
            note = f"host {names} lost its snapshot of step {step}; rebuilt from parity and verified" if rebuilt else ""
            return Recovery(step, tuple(rebuilt), note)
        count = sum(step in held.snapshots for held in held_by_host.values())
        failures.append((count, step, "; ".join(reasons)))
    return Recovery(-1, (), max(failures)[2] if failures else "")


def why_unrecoverable(
    step: int, missing: Sequence[int], members: Mapping[int, HeldSnapshots], *, max_lost_hosts: int
) -> str | None:
    """Say why the snapshots of the hosts `missing` of one group cannot be rebuilt; None if they can."""
    if not missing:
        return None
    hosts = list(members)
    if not max_lost_hosts:
        return f"step {step}: hosts {list(missing)} lost their snapshots, and checkpoint.parity is none"
    holders = parity_holders(step, members)
    for stripe in range(len(hosts)):
        data_hosts, parity_hosts = stripe_hosts(stripe, hosts=len(hosts), max_lost_hosts=max_lost_hosts)
        unknowns = sum(hosts[position] in missing for position in data_hosts)
        if unknowns > sum(hosts[position] in holders for position in parity_hosts):
            return (
                f"step {step}: hosts {list(missing)} of group {hosts} lost their snapshots, and hosts {holders} have "
                f"parity for it, which tolerates the loss of {max_lost_hosts}"
            )
    return None


def parity_holders(step: int, members: Mapping[int, HeldSnapshots]) -> list[int]:
    """Return the hosts of a group whose parity of `step` was computed from the snapshots that the others have."""
    seals = {host: held.snapshots[step] for host, held in members.items() if step in held.snapshots}
    return [
        host
        for host, held in members.items()
        if step in held.parity
        and held.parity[step].keys() == members.keys()  # else it is of another group, with other stripes
        and all(held.parity[step][other] == seal for other, seal in seals.items())
    ]
