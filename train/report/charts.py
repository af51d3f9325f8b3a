"""Charts of curves over steps, as SVG inside the page, with the fonts of the page and its colours as CSS variables.

matplotlib draws with placeholder colours, which are then replaced by `var(--ink)` and the like, so that a chart follows
the page into dark mode. The SVG refers to no other file or address.
"""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from .markup import format_number, render

WIDTH, HEIGHT = 460, 230  # points; the page scales the picture to its column
COLOURS = {"#00000a": "ink", "#00000b": "line", "#00000c": "series-1", "#00000d": "series-2", "#00000e": "bad"}
INK, LINE, FIRST, SECOND, BAD = COLOURS


@dataclass(frozen=True)
class Curve:
    """One line of a chart."""

    label: str
    steps: Sequence[int]
    values: Sequence[float]  # NaN breaks the line
    dots: bool = False  # mark every point, for metrics of few steps


def chart(
    title: str, curves: Sequence[Curve], *, unit: str = "", marks: Sequence[int] = (), log: bool = False
) -> Markup:
    """A chart with its legend; `marks` are steps from which a session was restored, drawn as dashed lines.

    A curve without points is left out; a chart without curves says so.
    """
    curves = [curve for curve in curves if len(curve.steps)]
    picture = draw_svg(title, curves, marks=marks, log=log) if curves else None
    return render("chart", title=title, curves=curves, picture=picture, unit=unit)


def draw_svg(title: str, curves: Sequence[Curve], *, marks: Sequence[int], log: bool) -> Markup:
    """The chart without its legend."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": title, "path.simplify": True}):
        figure = Figure(figsize=(WIDTH / 72, HEIGHT / 72), layout="constrained")
        figure.patch.set_alpha(0)
        axes = figure.add_subplot()
        axes.patch.set_alpha(0)
        for step in marks:
            axes.axvline(step, color=BAD, linewidth=1, linestyle=(0, (3, 3)))
        for curve, colour in zip(curves, (FIRST, SECOND), strict=False):
            marker = "o" if curve.dots or len(curve.steps) == 1 else None
            axes.plot(curve.steps, curve.values, color=colour, linewidth=1.8, marker=marker, markersize=4)
        style_axes(axes, log=log)
        buffer = io.StringIO()
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None})
    return inline_svg(buffer.getvalue(), title)


def style_axes(axes, *, log: bool) -> None:
    """Style the axes: a frame at the bottom only, faint horizontal lines, few round numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    if log:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5), numticks=6))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: format_number(value)))
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(LINE)
    axes.tick_params(which="both", length=0, labelcolor=INK, labelsize=10, pad=5)
    axes.grid(axis="y", color=LINE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.margins(x=0.02, y=0.08)


def inline_svg(svg: str, title: str) -> Markup:
    """Make matplotlib's file an inline SVG: no prolog, metadata, fonts or ids, and our colours."""
    body = svg[svg.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.S)
    head = r'<svg viewBox="\1" role="img" aria-label="TITLE">'
    body = re.sub(r'<svg[^>]*viewBox="([^"]*)"[^>]*>', head, body, count=1)
    body = re.sub(r"\bxlink:href=", "href=", body)
    body = re.sub(r"<!--.*?-->", "", body, flags=re.S)
    # Only markers and clip paths are referred to; ids like figure_1 would occur in every chart of the page.
    body = re.sub(r' id="(?![mp][0-9a-f]{10}")[^"]*"', "", body)
    body = re.sub(r"font: [^;\"]*;?", "", body)
    for colour, variable in COLOURS.items():
        body = body.replace(colour, f"var(--{variable})")
    body = re.sub(r">\s+<", "><", body)
    return Markup(body.replace("TITLE", escape(title)))
