"""A schedule as a picture: time to the right, a row for each device, the microbatch's number in every pass.

Colours show ops (from Okabe and Ito's palette, for colour-blind readers too), and shades the chunks of a device, the
first one darkest. Long schedules are broken into lines, like text. The axis is ticks, or the time of a simulated or
measured timeline.
"""

import io
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator

from ....configs.errors import UserError
from .simulator import Timeline
from .table import VOCABULARY_OPS, Op, Table

COLOURS = {Op.F: "#0072B2", Op.I: "#D55E00", Op.W: "#009E73", Op.B: "#D55E00", Op.S: "#B0578D", Op.T: "#E0B000"}
NAMES = {
    Op.F: "forward", Op.I: "input gradient", Op.W: "weight gradient", Op.B: "backward",
    Op.S: "vocabulary S", Op.T: "vocabulary T",
}  # fmt: skip
SUFFIXES = (".svg", ".png", ".pdf")
TICKS_PER_LINE = 80
STYLE = {"svg.hashsalt": "schedule", "svg.fonttype": "none", "font.family": "sans-serif"}
INK, FAINT = "#222222", "#E6E6E6"
WIDTH, ROW, ABOVE, BETWEEN, BELOW = 13.0, 0.26, 0.42, 0.3, 0.68  # inches


def draw(table: Table, path: Path, *, timeline: Timeline | None = None, title: str | None = None) -> None:
    """Write the picture to `path`, in the format of its suffix; over `timeline`'s asynchronous clock, or else ticks.

    Raises UserError for a suffix that is not that of a picture.
    """
    check_suffix(path)
    # Without these dates the same table gives the same file.
    metadata = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(path.suffix)
    with rc_context(STYLE):
        figure(table, timeline=timeline, title=title).savefig(path, dpi=150, metadata=metadata)


def render_svg(table: Table, *, timeline: Timeline | None = None, title: str | None = None) -> str:
    """The picture as an `<svg>` element for an HTML page."""
    text = io.StringIO()
    with rc_context(STYLE):
        figure(table, timeline=timeline, title=title).savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()[text.getvalue().index("<svg") :]


def figure(table: Table, *, timeline: Timeline | None = None, title: str | None = None) -> Figure:
    """The picture as a matplotlib figure; over ticks, too, if every op of the timeline took no measurable time."""
    if timeline is not None and timeline.makespan <= 0:
        timeline = None
    ticks = np.where(table.op != Op.IDLE, np.arange(table.ticks)[:, None], np.nan)
    start, end = (timeline.start, timeline.end) if timeline else (ticks, ticks + 1)
    lines = -(-table.ticks // TICKS_PER_LINE)
    per_line = float(np.nanmax(end)) / lines if timeline else float(-(-table.ticks // lines))
    line_height = ROW * table.devices
    height = ABOVE + lines * line_height + (lines - 1) * BETWEEN + BELOW
    picture = Figure(figsize=(WIDTH, height), facecolor="white")
    for line in range(lines):
        bottom = (BELOW + (lines - 1 - line) * (line_height + BETWEEN)) / height
        axis = picture.add_axes((0.06, bottom, 0.93, line_height / height))
        _draw_line(axis, table, start, end, window=(line * per_line, (line + 1) * per_line))
        if timeline is None:
            axis.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True))
    axis.set_xlabel("tick" if timeline is None else "time", color=INK, fontsize=8, labelpad=1)
    picture.legend(handles=_legend(table), loc="lower center", ncols=8, frameon=False, fontsize=8, labelcolor=INK,
                  columnspacing=1.4, handlelength=1.0, handleheight=1.0)  # fmt: skip
    picture.suptitle(title or table.name, x=0.06, y=1 - 0.1 / height, ha="left", va="top", color=INK, fontsize=10)
    return picture


def check_suffix(path: Path) -> None:
    """Raises UserError if the suffix of `path` is not that of a picture."""
    if path.suffix not in SUFFIXES:
        raise UserError(f"--draw {path}: suffix {path.suffix!r}; use {', '.join(SUFFIXES)}")


def _draw_line(axis: Axes, table: Table, start: np.ndarray, end: np.ndarray, *, window: tuple[float, float]) -> None:
    """The passes that touch one window of time."""
    left, right = window
    patches, faces = [], []
    inches, digits = WIDTH * 0.93 / (right - left), len(str(table.microbatches - 1))
    for tick, device in np.argwhere((end > left) & (start < right)).tolist():
        begin, finish = start[tick, device], end[tick, device]
        face = shade(Op(table.op[tick, device]), chunk=int(table.chunk[tick, device]), chunks=table.chunks)
        patches.append(Rectangle((begin, device - 0.44), finish - begin, 0.88))
        faces.append(face)
        middle, size = (begin + finish) / 2, min(8.0, 60 * (finish - begin) * inches / digits)
        if left <= middle <= right and size > 1.5:
            axis.text(middle, device + 0.03, str(table.microbatch[tick, device]), ha="center", va="center",
                      fontsize=size, color=ink_on(face), clip_on=True)  # fmt: skip
    axis.add_collection(PatchCollection(patches, facecolor=faces, edgecolor="white", linewidth=0.6))
    axis.set(xlim=window, ylim=(table.devices - 0.4, -0.6), yticks=range(table.devices), facecolor="#FAFAFA")
    axis.set_yticklabels([f"device {device}" for device in range(table.devices)], fontsize=8)
    axis.tick_params(length=0, colors=INK, labelsize=7.5, pad=2)
    axis.xaxis.grid(True, color=FAINT, linewidth=0.6)
    axis.set_axisbelow(True)
    for spine in axis.spines.values():
        spine.set_visible(False)


def shade(op: Op, *, chunk: int, chunks: int) -> tuple[float, float, float]:
    """The colour of a pass, RGB: its op's colour, lighter for later chunks."""
    white = 0.0 if op in VOCABULARY_OPS or chunks == 1 else 0.6 * chunk / (chunks - 1)
    return tuple(float(channel) for channel in (1 - white) * np.array(to_rgb(COLOURS[op])) + white)


def ink_on(face: tuple[float, float, float]) -> str:
    """Black or white, whichever is easier to read on a colour."""
    brightness = float(np.dot(face, (0.299, 0.587, 0.114)))
    return "#111111" if brightness > 0.52 else "white"


def _legend(table: Table) -> list[Patch]:
    """A patch for each op of the table; two, for its first and its last chunk, where a device has several."""
    patches = []
    for op in (op for op in NAMES if (table.op == op).any()):
        chunks = [-1] if op in VOCABULARY_OPS or table.chunks == 1 else [0, table.chunks - 1]
        for chunk in chunks:
            name = f"{op.name} {NAMES[op]}" + (f", chunk {chunk}" if len(chunks) > 1 else "")
            patches.append(Patch(facecolor=shade(op, chunk=chunk, chunks=table.chunks), label=name))
    return patches
