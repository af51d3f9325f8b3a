"""Progress display: a live bar with metrics on a terminal, one plain line for each logged step elsewhere.

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
SPARKLINE = 24  # losses in the sparkline
REFRESHES = 4  # per second, by a thread of the live display, so that training never waits for the terminal


class Progress:
    """A display that shows nothing, for processes other than the first; the interface of the two others."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        """Restore the terminal."""

    def update(self, step: int, values: Mapping[str, float]) -> None:
        """Show the metrics `values` of `step` (from 1); any of them may be missing."""

    def note(self, text: Any) -> None:
        """Show a text, or anything that rich can print, once."""


def open_progress(
    steps: int, start: int, enabled: bool, *, interval: int = 1, console: Console | None = None
) -> Progress:
    """Return the display of a run that has done `start` of `steps`; a plain line comes every `interval` steps."""
    if not enabled:
        return Progress()
    console = console or Console()
    return (
        LiveProgress(steps, start, console) if console.is_terminal else PlainProgress(steps, start, interval, console)
    )


class PlainProgress(Progress):
    """A line for the first step, the last, and each multiple of `interval`: for log files and pipes."""

    def __init__(self, steps: int, start: int, interval: int, console: Console) -> None:
        self.steps, self.start, self.interval, self.console = steps, start, interval, console

    def update(self, step: int, values: Mapping[str, float]) -> None:
        """Print the line of `step`, if it has one."""
        if step % self.interval == 0 or step in (self.start + 1, self.steps):
            texts = [f"step {step}/{self.steps}", *metric_texts(values)]
            self.console.print("  ".join(texts), markup=False, highlight=False, soft_wrap=True)

    def note(self, text: Any) -> None:
        """Print `text`, never wrapped to the width of a terminal."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=isinstance(text, str))


class LiveProgress(Progress):
    """A bar and the newest metrics at the bottom of a terminal; notes scroll above it."""

    def __init__(
        self, steps: int, start: int, console: Console, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.steps, self.start, self.console, self.clock = steps, start, console, clock
        self.step, self.values = start, dict[str, float]()
        self.losses: deque[float] = deque(maxlen=SPARKLINE)
        self.began = clock()
        self.first: tuple[int, float] | None = None  # (step, time) of the first update, after compilation
        self.live = Live(console=console, refresh_per_second=REFRESHES, get_renderable=self.render)

    def __enter__(self) -> Self:
        self.live.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.live.stop()

    def update(self, step: int, values: Mapping[str, float]) -> None:
        """Store the metrics; the display's thread draws them."""
        self.first = self.first or (step, self.clock())
        self.step, self.values = step, {**self.values, **values}
        if "loss" in values:
            self.losses.append(values["loss"])

    def note(self, text: Any) -> None:
        """Print `text` above the bar."""
        self.live.console.print(text, markup=False, highlight=False)

    def render(self) -> Group:
        """Return two lines: steps and time, and metrics."""
        row = Table.grid(padding=(0, 2))
        row.add_row(
            ProgressBar(total=max(self.steps, 1), completed=self.step, width=32),
            Text(f"step {self.step}/{self.steps}", style="bold"),
            Text(f"{clock_time(self.clock() - self.began)} elapsed", style="dim"),
            Text(f"{clock_time(self.seconds_left())} left", style="dim"),
        )
        texts = metric_texts(self.values)
        numbers = Text("  ").join([Text(sparkline(self.losses), style="cyan"), *map(Text, texts)])
        numbers.truncate(self.console.width, overflow="ellipsis")
        return Group(row, numbers if texts else Text("compiling ...", style="dim"))

    def seconds_left(self) -> float:
        """Estimate the remaining seconds from the mean step since the first update; NaN before the second."""
        if self.first is None or self.step <= self.first[0]:
            return math.nan
        step, began = self.first
        return (self.clock() - began) / (self.step - step) * (self.steps - self.step)


def metric_texts(values: Mapping[str, float]) -> list[str]:
    """Name and value of the metrics that a line shows; missing ones are left out."""
    formats = {
        "loss": "loss {:.4f}",
        "tokens_per_second": "{:,.0f} tokens/s",
        "grad_norm": "grad_norm {:.3f}",
        "learning_rate": "lr {:.2e}",
        "mfu": "mfu {:.1%}",
    }
    texts = [pattern.format(values[name]) for name, pattern in formats.items() if name in values]
    return [*texts, "skipped"] if values.get("skipped") else texts


def sparkline(values: "deque[float] | list[float]") -> str:
    """Draw `values` as blocks between their minimum and maximum; values that are not finite are crosses."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return "×" * len(values)
    low, span = min(finite), (max(finite) - min(finite)) or 1.0
    top = len(BLOCKS) - 1
    return "".join(BLOCKS[round((v - low) / span * top)] if math.isfinite(v) else "×" for v in values)


def clock_time(seconds: float) -> str:
    """Seconds as `0:42`, `1:05:09`, `3d 02:00`; `-:--` if NaN."""
    if not math.isfinite(seconds):
        return "-:--"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days}d {hour:02}:{minute:02}"
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minutes}:{second:02}"
