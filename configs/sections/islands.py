"""Islands: replicas that are jobs of their own, on meshes of their own, and meet over a network (`docs/lowcomm.md`)."""

import re
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from .base import Section

BITS = {"bit": 1.0, "kbit": 1e3, "mbit": 1e6, "gbit": 1e9}  # a second
SECONDS = {"ms": 1e-3, "s": 1.0, "m": 60.0}
QUANTITY = re.compile(r"\s*([\d.]+(?:e[+-]?\d+)?)\s*([a-z]*)(?:/s)?\s*", re.IGNORECASE)


def parse_quantity(value: object, units: dict[str, float]) -> object:
    """`100Mbit` as a number of the unit that counts 1; what is no text is left to pydantic.

    >>> quantity("100Mbit", BITS), quantity("50ms", SECONDS)
    (100000000.0, 0.05)
    """
    if not isinstance(value, str):
        return value
    match = QUANTITY.fullmatch(value)
    if match is None or match[2].lower() not in units:
        raise ValueError(f"{value!r} is no number with one of the units {', '.join(units)}")
    return float(match[1]) * units[match[2].lower()]


Bits = Annotated[float, BeforeValidator(lambda value: parse_quantity(value, BITS))]
Seconds = Annotated[float, BeforeValidator(lambda value: parse_quantity(value, SECONDS))]


class IslandsConfig(Section):
    """Replicas as jobs of their own. Times and rates are numbers (seconds, bits a second) or text: 50ms, 100Mbit."""

    count: int = Field(2, ge=1)
    """Islands the run is made for: each trains on its part of `data.global_batch`, whoever is there."""
    number: int | None = Field(None, ge=0)
    """Which one this job is; null: none yet, `meshwright launch --islands` or the site says."""
    meet: str | None = None
    """host:port of `meshwright rendezvous`, where the islands find each other; null: the launcher runs it."""
    address: str | None = None
    """host:port where the others reach this island, listened on at that port; null: by the way to `meet`, any port."""
    bandwidth: Bits | None = Field(None, gt=0)
    """Bits a second an island sends at most (a token bucket on the sender); null: what the network does."""
    latency: Seconds = Field(0.0, ge=0)
    """Seconds added to every message, so that a slow link can be tried on one machine."""
    patience: Seconds = Field(60.0, gt=0)
    """Seconds a meeting waits for islands that are alive and not far behind, and an island that has finished for those
    that have not; then it goes on without them."""
    staleness: int | None = Field(None, ge=0)
    """Updates an island may be behind and still be waited for; null: three times `outer.every`."""
    timeout: Seconds = Field(30.0, gt=0)
    """Seconds without a byte after which a transfer is cut, to be tried again from where it was."""
    retries: int = Field(3, ge=0)
    """Further attempts at a transfer that was cut, or arrived damaged."""
    deadline: Seconds = Field(600.0, gt=0)
    """Seconds after which an exchange that has not ended counts as failed."""
    on_failure: Literal["average", "skip"] = "average"
    """Payloads that did not arrive: the mean is over those that did, or nobody meets and the drift grows on."""
    minimum: int = Field(1, ge=1)
    """Islands without which no meeting takes place."""
    ttl: Seconds = Field(10.0, gt=0)
    """Seconds without a sign of life after which an island is gone."""
    gather: Seconds = Field(300.0, gt=0)
    """Seconds the first islands wait at the start until all `count` are there."""

    def local_rows(self, global_batch: int) -> range:
        """Which of the `global_batch` rows of an update are this island's; without a number it is the first one."""
        size, number = global_batch // self.count, self.number or 0
        return range(number * size, (number + 1) * size)


def check_islands(islands: IslandsConfig, *, rule: str | None, replicas: int, global_batch: int) -> None:
    """Raise ValueError where the section islands does not go with the rest of the run."""
    if rule is None:
        raise ValueError(
            f"islands: {islands.count} islands would never meet; add a section outer, e.g. outer.name=diloco"
        )
    if replicas != 1:
        raise ValueError(
            f"mesh.replica: {replicas} beside islands: each island is one replica; set it to 1, or islands to null"
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
