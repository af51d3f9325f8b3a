"""What a run shows while it goes: a live bar with numbers on a terminal, one plain line a logged step elsewhere.

with open_progress(steps=200, start=0, enabled=True, every=10) as progress:
    progress.note("plan ...")
    progress.update(1, {"loss": 7.6, "tokens_per_second": 5200.0})
"""

import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

BLOCKS = "▁▂▃▄▅▆▇█"
SPARKLINE = 24  # steps' losses drawn
REFRESHES = 4  # of the live display, a second: a thread of its own draws, so that the loop never waits for a terminal


class Progress:
    """Shows nothing: what processes other than the first get. The other two are told the same things."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        """Leave the terminal as it was found."""

    def update(self, step: int, values: Mapping[str, float]) -> None:
        """Step `step` (from 1) is done; `values` are its metrics, any of which may be missing."""

    def note(self, text: Any) -> None:
        """Show a text, or anything rich can print, once."""


def open_progress(
    steps: int, start: int, enabled: bool, *, interval: int = 1, console: Console | None = None
) -> Progress:
    """The display of a run that has done `start` of `steps`; `every` is the distance of the plain lines, in steps."""
    if not enabled:
        return Progress()
    console = console or Console()
    return (
        LiveProgress(steps, start, console) if console.is_terminal else PlainProgress(steps, start, interval, console)
    )


class PlainProgress(Progress):
    """One line for the first step, the last, and every multiple of `every`: for log files and pipes."""

    def __init__(self, steps: int, start: int, every: int, console: Console) -> None:
        self.steps, self.start, self.every, self.console = steps, start, every, console

    def update(self, step: int, values: Mapping[str, float]) -> None:
        """Print the line, where this step has one."""
        if step % self.every == 0 or step in (self.start + 1, self.steps):
            words = [f"step {step}/{self.steps}", *described(values)]
            self.console.print("  ".join(words), markup=False, highlight=False, soft_wrap=True)

    def note(self, text: Any) -> None:
        """Print it; a text is one line of the log however narrow the terminal is thought to be."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=isinstance(text, str))


class LiveProgress(Progress):
    """A bar and the newest numbers at the foot of a terminal; notes scroll by above it."""

    def __init__(
        self, steps: int, start: int, console: Console, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.steps, self.start, self.console, self.clock = steps, start, console, clock
        self.step, self.values = start, dict[str, float]()
        self.losses: deque[float] = deque(maxlen=SPARKLINE)
        self.began = clock()
        self.first: tuple[int, float] | None = None  # (step, time) of the first update: compilation lies before it
        self.live = Live(console=console, refresh_per_second=REFRESHES, get_renderable=self.render)

    def __enter__(self) -> Self:
        self.live.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.live.stop()

    def update(self, step: int, values: Mapping[str, float]) -> None:
        """Take the numbers; the display's own thread draws them."""
        self.first = self.first or (step, self.clock())
        self.step, self.values = step, {**self.values, **values}
        if "loss" in values:
            self.losses.append(values["loss"])

    def note(self, text: Any) -> None:
        """Print it above the bar."""
        self.live.console.print(text, markup=False, highlight=False)

    def render(self) -> Group:
        """Two lines: how far, and how well."""
        row = Table.grid(padding=(0, 2))
        row.add_row(
            ProgressBar(total=max(self.steps, 1), completed=self.step, width=32),
            Text(f"step {self.step}/{self.steps}", style="bold"),
            Text(f"{clock_time(self.clock() - self.began)} elapsed", style="dim"),
            Text(f"{clock_time(self.seconds_left())} left", style="dim"),
        )
        words = described(self.values)
        numbers = Text("  ").join([Text(sparkline(self.losses), style="cyan"), *map(Text, words)])
        numbers.truncate(self.console.width, overflow="ellipsis")
        return Group(row, numbers if words else Text("compiling ...", style="dim"))

    def seconds_left(self) -> float:
        """At the mean pace since the first update; NaN before the second."""
        if self.first is None or self.step <= self.first[0]:
            return math.nan
        step, began = self.first
        return (self.clock() - began) / (self.step - step) * (self.steps - self.step)


def described(values: Mapping[str, float]) -> list[str]:
    """The few numbers worth a line, each with its name; those that are missing are left out."""
    formats = {
        "loss": "loss {:.4f}",
        "tokens_per_second": "{:,.0f} tokens/s",
        "grad_norm": "grad_norm {:.3f}",
        "learning_rate": "lr {:.2e}",
        "mfu": "mfu {:.1%}",
    }
    words = [form.format(values[name]) for name, form in formats.items() if name in values]
    return [*words, "skipped"] if values.get("skipped") else words


def sparkline(values: "deque[float] | list[float]") -> str:
    """`values` as small blocks between their least and their greatest; what is not finite is a cross."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return "×" * len(values)
    low, span = min(finite), (max(finite) - min(finite)) or 1.0
    top = len(BLOCKS) - 1
    return "".join(BLOCKS[round((v - low) / span * top)] if math.isfinite(v) else "×" for v in values)


def clock_time(seconds: float) -> str:
    """`0:42`, `1:05:09`, `3d 02:00`; `-:--` where it is not known."""
    if not math.isfinite(seconds):
        return "-:--"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days}d {hour:02}:{minute:02}"
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minutes}:{second:02}"
