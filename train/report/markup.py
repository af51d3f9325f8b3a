"""Just enough HTML: elements that escape what they are given, and numbers as people write them.

element("p", "1 < 2 ", element("b", "always"), class_="note")   ->   <p class="note">1 &lt; 2 <b>always</b></p>
"""

import html
import math
from collections.abc import Iterable, Sequence
from typing import Any

VOID = ("meta", "br", "line", "rect", "circle")


class Html(str):
    """Text that is HTML already; every other text is escaped on its way into an element."""


def element(name: str, /, *children: Any, **attributes: Any) -> Html:
    """<name attributes>children</name>. A trailing `_` in an attribute's name is dropped, other `_` become `-`."""
    words = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(str(value), quote=True)}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in VOID and not children:
        return Html(f"<{name}{words}>" if name in ("meta", "br") else f"<{name}{words}/>")
    return Html(f"<{name}{words}>{joined(children)}</{name}>")


def joined(children: Iterable[Any]) -> Html:
    """Children one after another, escaped where they are not HTML; None is nothing."""
    return Html("".join(c if isinstance(c, Html) else html.escape(str(c)) for c in children if c is not None))


def section(title: str, *children: Any, note: str | None = None) -> Html:
    """A titled part of the page."""
    return element("section", element("h2", title), note and element("p", note, class_="note"), *children)


def table(heads: Sequence[str], rows: Iterable[Sequence[Any]], *, numeric: Sequence[str] = ()) -> Html:
    """A table that scrolls sideways on a narrow screen; columns in `numeric` are set flush right."""
    kinds = ["number" if head in numeric else None for head in heads]
    top = element("tr", *(element("th", head, class_=kind) for head, kind in zip(heads, kinds, strict=True)))
    body = [
        element("tr", *(element("td", cell, class_=kind) for cell, kind in zip(row, kinds, strict=True)))
        for row in rows
    ]
    return element("div", element("table", element("thead", top), element("tbody", *body)), class_="scroll")


def size(count: float) -> str:
    """Bytes: `0 B`, `34.1 MiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" or abs(count) >= 100 else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def compact(value: float) -> str:
    """A number in few digits: `0`, `0.25`, `12.5`, `12.3k`, `34.1M`, `3.0e-4`; an em dash where it is none."""
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


def duration(seconds: float) -> str:
    """`8.2 s`, `4m 12s`, `2h 05m`, `3d 02h`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, second = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}m {second:02}s"
    hours, minute = divmod(minutes, 60)
    return f"{hours}h {minute:02}m" if hours < 24 else f"{hours // 24}d {hours % 24:02}h"
