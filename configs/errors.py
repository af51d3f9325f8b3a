"""The errors that a user can meet, and their exit codes.

MeshwrightError          1    anything that failed
├── UserError            2    the user's mistake: the message names key, value and remedy
└── Preemption          75    asked to stop, and the state was saved: run the same command again
"""

import difflib
from collections.abc import Iterable


class MeshwrightError(Exception):
    """Something failed; the message says what in one line. Exit code 1."""

    exit_code = 1


class UserError(MeshwrightError):
    """The user's mistake: the message names the key, its value and a remedy. Exit code 2."""

    exit_code = 2

    @classmethod
    def no_match(cls, key: str, unknown: Iterable[str], *, candidates: Iterable[str]) -> "UserError":
        """The error `key: x matches nothing; there are a, b, c. Did you mean a?`."""
        unknown, candidates = sorted(unknown), sorted(candidates)
        similar = [match for name in unknown for match in difflib.get_close_matches(name, candidates, n=1)]
        similar = similar or (candidates if len(candidates) == 1 else [])
        hint = f" Did you mean {', '.join(similar)}?" if similar else ""
        return cls(f"{key}: {', '.join(unknown)} matches nothing; there are {', '.join(candidates)}.{hint}")


class Preemption(MeshwrightError):
    """The run was asked to stop (SIGTERM, Ctrl-C) and saved its state: the same command continues it. Exit code 75."""

    exit_code = 75


def first_line(error: BaseException) -> str:
    """The first line of an exception of another library, or of its cause, at most 200 characters."""
    cause = error.__cause__ or error
    return next(iter(str(cause).strip().splitlines()), type(cause).__name__)[:200]
