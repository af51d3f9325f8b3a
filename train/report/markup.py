"""The report's Jinja templates (`templates/`), and formats of numbers.

render("goodput", rows=..., note=...)   ->   templates/goodput.html.jinja with these values, escaped unless `Markup`
"""

import math
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

if TYPE_CHECKING:
    import jinja2


def render(template: str, **values: Any) -> Markup:
    """Render the template of that name. Raises jinja2.UndefinedError if it reads a value that is missing."""
    return Markup(_environment().get_template(f"{template}.html.jinja").render(values))


@cache
def _environment() -> "jinja2.Environment":
    import jinja2  # here, because terminal tables use the formats below without templates

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"size": format_bytes, "compact": format_number}
    return environment


def format_bytes(count: float) -> str:
    """Bytes as `0 B`, `34.1 MiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" or abs(count) >= 100 else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def format_number(value: float) -> str:
    """A number as `0`, `0.25`, `12.5`, `12.3k`, `34.1M`, `3.0e-4`; an em dash if it is not finite."""
    if not math.isfinite(value):
        return "—"
    if value == 0:
        return "0"
    if abs(value) < 0.01:
        digits, exponent = f"{value:.1e}".split("e")
        return f"{digits}e{int(exponent)}"
    for unit in ("", "k", "M", "G", "T"):
        if abs(value) < 999.5:
            return f"{value:.3g}{unit}"
        value /= 1000
    return f"{value:.3g}P"


def format_duration(seconds: float) -> str:
    """Seconds as `8.2 s`, `4m 12s`, `2h 05m`, `3d 02h`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, second = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}m {second:02}s"
    hours, minute = divmod(minutes, 60)
    return f"{hours}h {minute:02}m" if hours < 24 else f"{hours // 24}d {hours % 24:02}h"
