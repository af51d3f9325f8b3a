"""What the doctor finds on a machine, as values: ready for JSON and for a terminal."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Check:
    """One check of the devices, and how it came out."""

    name: str
    outcome: str  # right | wrong | unavailable
    detail: str
    seconds: float | None = None  # the best of several


@dataclass(frozen=True)
class Device:
    """One device as JAX sees it."""

    id: int
    kind: str
    platform: str
    process: int
    memory_kinds: tuple[str, ...]
    memory_bytes: int | None  # None where the platform does not say


@dataclass(frozen=True)
class Extra:
    """An optional part of the package, and whether it is installed."""

    name: str
    purpose: str
    missing: tuple[str, ...]  # distributions that are not installed
    remedy: str  # "" where nothing is missing


@dataclass(frozen=True)
class Problem:
    """A problem, and what to do about it."""

    what: str
    remedy: str


@dataclass(frozen=True)
class Host:
    """The machine around the devices."""

    system: str
    python: str
    cores: int  # that this process may use
    cpu_features: tuple[str, ...]
    memory_bytes: int
    disk_free_bytes: int  # of the working directory, where runs/ will be
    compilation_cache: str
    compilation_cache_bytes: int
    gloo: bool  # CPU collectives between processes
    xla_flags: str


@dataclass(frozen=True)
class Examination:
    """Everything that the doctor found."""

    versions: dict[str, str | None]
    host: Host
    devices: tuple[Device, ...]
    checks: tuple[Check, ...]
    extras: tuple[Extra, ...]
    problems: tuple[Problem, ...] = ()
