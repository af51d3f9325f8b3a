"""Pictures of schedules: every pass is drawn, on either clock, and drawing again gives the same file."""

from collections import Counter
from xml.etree import ElementTree

import pytest

from meshwright.configs.errors import UserError
from meshwright.parallel.pipeline.tables.costs import Costs
from meshwright.parallel.pipeline.tables.schedules.registry import make_table
from meshwright.parallel.pipeline.tables.simulator import simulate
from meshwright.parallel.pipeline.tables.svg import draw, figure, ink_on, render_svg, shade
from meshwright.parallel.pipeline.tables.table import Op


def texts(node):
    """The texts below a node of an SVG, without those of axes."""
    if node.get("id", "").startswith("matplotlib.axis"):
        return
    if node.tag.endswith("}text"):
        yield "".join(node.itertext()).strip()
    for child in node:
        yield from texts(child)


def numbers(path):
    """How often each number is written in a cell."""
    return Counter(int(text) for text in texts(ElementTree.parse(path).getroot()) if text.isdigit())


@pytest.mark.parametrize("microbatches", [4, 14])
def test_every_pass_is_in_the_picture_once(microbatches, tmp_path):
    """14 microbatches of V-Half on 2 devices need two lines."""
    table = make_table("v-half", devices=2, microbatches=microbatches, vocabulary=2)
    draw(table, tmp_path / "table.svg")
    found = numbers(tmp_path / "table.svg")
    assert found == dict.fromkeys(range(microbatches), 2 * (2 * 3 + 2))


def test_tick_labels_are_integers():
    found = figure(make_table("zb-h1", devices=1, microbatches=1)).axes[0]
    assert found.get_xticks().tolist() == [0, 1, 2, 3]


def test_the_same_table_gives_the_same_file(tmp_path):
    table = make_table("1f1b", devices=2, microbatches=4)
    for name in ("a.svg", "b.svg"):
        draw(table, tmp_path / name, title="the same")
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_a_timeline_changes_the_picture(tmp_path):
    table = make_table("1f1b", devices=2, microbatches=4)
    draw(table, tmp_path / "ticks.png")
    draw(table, tmp_path / "clock.png", timeline=simulate(table, Costs(weight_gradient=3.0)))
    assert (tmp_path / "ticks.png").read_bytes() != (tmp_path / "clock.png").read_bytes()


def test_a_suffix_that_is_no_picture_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"table\.txt: suffix '\.txt'; use \.svg, \.png, \.pdf"):
        draw(make_table("1f1b", devices=2, microbatches=4), tmp_path / "table.txt")


def test_numbers_have_contrast_on_every_colour():
    """Contrast 3 to 1 at least, by the luminance of WCAG 2."""

    def luminance(colour):
        return sum(weight * (c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4)
                   for weight, c in zip((0.2126, 0.7152, 0.0722), colour, strict=True))  # fmt: skip

    for op in set(Op) - {Op.IDLE}:
        for chunk in range(3):
            face = shade(op, chunk=chunk, chunks=3)
            ink = 1.0 if ink_on(face) == "white" else luminance((0x11 / 255,) * 3)
            bright, dark = sorted((ink + 0.05, luminance(face) + 0.05), reverse=True)
            assert bright / dark >= 3, (op.name, chunk)


def test_ops_that_took_no_time_are_drawn_over_ticks():
    table = make_table("1f1b", devices=2, microbatches=2)
    free = Costs(forward=0, input_gradient=0, weight_gradient=0)
    assert render_svg(table, timeline=simulate(table, free)) == render_svg(table)
