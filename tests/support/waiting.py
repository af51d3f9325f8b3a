"""Tests wait for a condition and never for an amount of time. The bound is a guard against hanging, not a claim."""

import time

HANG_SECONDS = 300.0  # on a machine that has other things to do


def wait_until(condition, *, seconds=HANG_SECONDS, process=None, explain=lambda: ""):
    """Return the value of `condition()` as soon as it is true.

    Fails after `seconds`, or if `process` (a `Popen`) ends before; `explain()` is then part of the message.
    """
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        if process is not None and process.poll() is not None:
            errors = process.communicate()[1] if process.stderr else b""
            raise AssertionError(f"{process.args[:6]} ended before what was awaited: {explain()} {errors[-3000:]}")
        assert time.monotonic() < deadline, f"not true after {seconds:g} s: {explain()}"
        time.sleep(0.02)
    return value
