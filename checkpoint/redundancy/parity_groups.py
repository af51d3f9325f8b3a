"""Which hosts protect each other, and what can be had again from those that are left. Pure and JAX-free.

A group's parity bears the loss of `losses` of its hosts (`parity.py`). Hosts of one failure domain (a rack, a switch, a
power supply) go down together, so they are dealt to different groups.

    groups = laid(8, size=4, losses=1, domains=["a", "a", "b", "b", "c", "c", "d", "d"])
    found = recoverable(holdings, groups, losses=1)       the newest step every group can give, and whom to rebuild

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


def assign_groups(hosts: int, *, size: int, losses: int, domains: Sequence[str] = ()) -> list[list[int]]:
    """Hosts by group, each of at most `size`, hosts of one failure domain in as many groups as there are.

    `domains`: of each host; empty: each host is its own. Raises UserError where a group would be too small for its
    parity, or the loss of one domain would be more than a group bears.

    >>> laid(4, size=2, losses=1, domains=["rack1", "rack1", "rack2", "rack2"])
    [[0, 2], [1, 3]]
    """
    count = math.ceil(hosts / size)
    if losses and hosts // count <= losses:
        raise UserError(
            f"checkpoint.group: {hosts} hosts in groups of at most {size} leave a group of {hosts // count}, and "
            f"parity that bears {losses} needs at least {losses + 1} hosts"
        )
    if domains and len(domains) != hosts:
        raise UserError(f"checkpoint.domains: names the domains of {len(domains)} hosts, and there are {hosts}")
    owners = list(domains) or [str(host) for host in range(hosts)]
    sizes = Counter(owners)
    ordered = sorted(range(hosts), key=lambda host: (-sizes[owners[host]], owners[host], host))
    groups = [sorted(ordered[start::count]) for start in range(count)]
    for group in groups if losses else ():
        domain, most = Counter(owners[host] for host in group).most_common(1)[0]
        if most > losses:
            fitting = hosts // math.ceil(sizes[domain] / losses)
            remedy = f"set checkpoint.group to at most {fitting}" if fitting > losses else "spread the hosts more"
            raise UserError(
                f"checkpoint.domains: {most} of the hosts {group} are in domain {domain}, and their parity bears the "
                f"loss of {losses}; {remedy}"
            )
    return groups


@dataclass(frozen=True)
class Holding:
    """What a host has, verified. A seal tells a host's snapshot of a step from any other snapshot."""

    snapshots: Mapping[int, str] = field(default_factory=dict)  # step -> seal of this host's snapshot
    parity: Mapping[int, Mapping[int, str]] = field(default_factory=dict)  # step -> host -> seal of what it is made of


def group_holdings(group: Sequence[int], holdings: Mapping[int, Holding]) -> dict[int, Holding]:
    """The holdings of the hosts of a group; nothing where a host told nothing."""
    return {host: holdings.get(host, Holding()) for host in group}


def choose_recovery(holdings: Mapping[int, Holding], groups: Groups, *, losses: int) -> Recovery:
    """The newest step that every group has or can rebuild; step -1, with the reason, where there is none."""
    steps = {step for one in holdings.values() for step in (*one.snapshots, *one.parity)}
    failures: list[tuple[int, int, str]] = []  # (hosts that have it, step, why not)
    for step in sorted(steps, reverse=True):
        rebuilt: list[int] = []
        reasons = []
        for group in groups:
            ours = group_holdings(group, holdings)
            lost = [host for host in group if step not in ours[host].snapshots]
            if reason := why_unrecoverable(step, lost, ours, losses=losses):
                reasons.append(reason)
            rebuilt += lost
        if not reasons:
            names = ", ".join(map(str, rebuilt))
            note = f"host {names} lost its snapshot of step {step}; rebuilt from parity and verified" if rebuilt else ""
            return Recovery(step, tuple(rebuilt), note)
        count = sum(step in one.snapshots for one in holdings.values())
        failures.append((count, step, "; ".join(reasons)))
    return Recovery(-1, (), max(failures)[2] if failures else "")


def why_unrecoverable(step: int, lost: Sequence[int], ours: Mapping[int, Holding], *, losses: int) -> str | None:
    """Why the snapshots of the hosts `lost` of one group cannot be rebuilt; None where they can."""
    if not lost:
        return None
    hosts = list(ours)
    if not losses:
        return f"step {step}: hosts {list(lost)} lost their snapshots, and checkpoint.parity is none"
    holders = parity_holders(step, ours)
    for stripe in range(len(hosts)):
        givers, keepers = stripe_hosts(stripe, hosts=len(hosts), losses=losses)
        missing = sum(hosts[place] in lost for place in givers)
        if missing > sum(hosts[place] in holders for place in keepers):
            return (
                f"step {step}: hosts {list(lost)} of group {hosts} lost their snapshots, and with the parity that "
                f"hosts {holders} have they cannot be rebuilt: it bears the loss of {losses}"
            )
    return None


def parity_holders(step: int, ours: Mapping[int, Holding]) -> list[int]:
    """The hosts of a group whose parity of `step` is made of the snapshots that the others have."""
    seals = {host: one.snapshots[step] for host, one in ours.items() if step in one.snapshots}
    return [
        host
        for host, one in ours.items()
        if step in one.parity
        and one.parity[step].keys() == ours.keys()  # else it was made by another group, of other stripes
        and all(one.parity[step][other] == seal for other, seal in seals.items())
    ]
