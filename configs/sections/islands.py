"""The section islands: replicas that are jobs of their own and synchronize over a network (`docs/lowcomm.md`)."""

import re
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from .base import Section

BITS = {"bit": 1.0, "kbit": 1e3, "mbit": 1e6, "gbit": 1e9}  # per second
SECONDS = {"ms": 1e-3, "s": 1.0, "m": 60.0}
QUANTITY = re.compile(r"\s*([\d.]+(?:e[+-]?\d+)?)\s*([a-z]*)(?:/s)?\s*", re.IGNORECASE)


def parse_quantity(value: object, units: dict[str, float]) -> object:
    """`100Mbit` -> a number in the base unit; a value that is not text is returned for pydantic to check.

    >>> parse_quantity("100Mbit", BITS), parse_quantity("50ms", SECONDS)
    (100000000.0, 0.05)
    """
    if not isinstance(value, str):
        return value
    match = QUANTITY.fullmatch(value)
    if match is None or match[2].lower() not in units:
        raise ValueError(
            f"{value!r} is not a number with one of the units {', '.join(units)}, such as 10{next(iter(units))}"
        )
    return float(match[1]) * units[match[2].lower()]


Bits = Annotated[float, BeforeValidator(lambda value: parse_quantity(value, BITS))]
Seconds = Annotated[float, BeforeValidator(lambda value: parse_quantity(value, SECONDS))]


class IslandsConfig(Section):
    """Replicas as jobs of their own. Times and rates are numbers (seconds, bits per second) or text: 50ms, 100Mbit."""

    count: int = Field(2, ge=1)
    """How many islands the run has. Each trains on its part of `data.global_batch`, also when others are absent."""
    number: int | None = Field(None, ge=0)
    """Number of this job's island, from 0; null: set by `meshwright launch --islands` or on the command line."""
    meet: str | None = None
    """host:port of `meshwright rendezvous`, where islands find each other; null: the launcher runs it."""
    address: str | None = None
    """host:port at which other islands reach this one; null: that of the interface to `meet`, any port."""
    bandwidth: Bits | None = Field(None, gt=0)
    """Limit of what an island sends, in bits per second (a token bucket on the sender); null: no limit."""
    latency: Seconds = Field(0.0, ge=0)
    """Seconds added to every message, to simulate a slow link on one machine."""
    patience: Seconds = Field(60.0, gt=0)
    """Seconds that a synchronization round waits for islands that are alive and not too far behind, and that a finished
    island waits for the others; then they continue without them."""
    staleness: int | None = Field(None, ge=0)
    """How many updates an island may be behind and still be waited for; null: three times `outer.every`."""
    timeout: Seconds = Field(30.0, gt=0)
    """Seconds without a byte after which a transfer is interrupted and resumed by a further attempt."""
    retries: int = Field(3, ge=0)
    """Further attempts at a transfer that was interrupted, or whose checksum did not match."""
    deadline: Seconds = Field(600.0, gt=0)
    """Seconds after which an exchange that has not ended is a failure."""
    on_failure: Literal["average", "skip"] = "average"
    """When a payload does not arrive: average the outer gradients that did, or skip the outer step on all islands, so
    that the next outer gradient covers both periods."""
    minimum: int = Field(1, ge=1)
    """Fewest islands for a synchronization round; with fewer the outer step is skipped."""
    ttl: Seconds = Field(10.0, gt=0)
    """Seconds without a heartbeat after which an island is considered gone."""
    gather: Seconds = Field(300.0, gt=0)
    """Seconds that islands wait at the start for all `count` to join."""

    def local_rows(self, global_batch: int) -> range:
        """The rows of the global batch that are this island's; without a `number` those of island 0."""
        size, number = global_batch // self.count, self.number or 0
        return range(number * size, (number + 1) * size)


def check_islands(islands: IslandsConfig, *, rule: str | None, replicas: int, global_batch: int) -> None:
    """Raise ValueError where the section islands conflicts with the rest of the run."""
    if rule is None:
        raise ValueError(
            f"islands.count: {islands.count} islands never synchronize without the section outer; add it, e.g. "
            "outer.name=diloco"
        )
    if replicas != 1:
        raise ValueError(
            f"mesh.replica: {replicas} with islands, each of which is one replica; set it to 1, or islands to null"
        )
    if islands.number is not None and islands.number >= islands.count:
        raise ValueError(f"islands.number: {islands.number} must be below islands.count ({islands.count})")
    if islands.minimum > islands.count:
        raise ValueError(f"islands.minimum: {islands.minimum} exceeds islands.count ({islands.count})")
    if global_batch % islands.count:
        raise ValueError(
            f"data.global_batch: {global_batch} is not divisible by islands.count ({islands.count}); change one of them"
        )
    for key in ("meet", "address"):
        value = getattr(islands, key)
        if value is not None and not re.fullmatch(r".+:\d+", value):
            raise ValueError(f"islands.{key}: {value!r} is not of the form host:port")
