"""The errors a user can meet, and the exit code each becomes.

MeshwrightError          1    anything that failed
├── UserError            2    the request cannot work as written: says key, value and remedy
└── Preempted           75    asked to stop and saved in time: start the same command again
"""

import difflib
from collections.abc import Iterable


class MeshwrightError(Exception):
    """Something failed; one line says what. Exit code 1."""

    exit_code = 1


class UserError(MeshwrightError):
    """The request cannot work as written: the message names the key, the value and what would do. Exit code 2."""

    exit_code = 2

    @classmethod
    def no_match(cls, key: str, unknown: Iterable[str], *, candidates: Iterable[str]) -> "UserError":
        """`key: x matches nothing; there are a, b, c. Did you mean a?`"""
        unknown, candidates = sorted(unknown), sorted(candidates)
        near = [match for name in unknown for match in difflib.get_close_matches(name, candidates, n=1)]
        near = near or (candidates if len(candidates) == 1 else [])
        hint = f" Did you mean {', '.join(near)}?" if near else ""
        return cls(f"{key}: {', '.join(unknown)} matches nothing; there are {', '.join(candidates)}.{hint}")


class Preempted(MeshwrightError):
    """Asked to stop (SIGTERM, Ctrl-C) and the state was saved: run the same command again to go on. Exit code 75."""

    exit_code = 75


def first_line(error: BaseException) -> str:
    """What an exception of another library says, short enough for one line; its cause's words where it has one."""
    cause = error.__cause__ or error
    return next(iter(str(cause).strip().splitlines()), type(cause).__name__)[:200]
