"""Pictures of mesh, shardings, memory and communication show the numbers of the plan."""

import json
import math
import re

import pytest
from jinja2 import UndefinedError
from markupsafe import Markup

from meshwright.train.report.markup import format_bytes, format_duration, format_number, render
from meshwright.train.report.mesh_picture import mesh_picture
from meshwright.train.report.plan_bars import communication_section, device_parts
from meshwright.train.report.sharding_pictures import Array, arrays_table, sharding_picture, weight_box


def devices(count):
    return [{"id": n, "kind": "cpu", "platform": "cpu", "process": n // 4} for n in range(count)]


def cells(picture):
    """Device ids by the coordinates in the titles of panel, row and column."""
    ids_by_coordinates = {}
    for panel in re.findall(r'<div class="panel">(.*?)</div>', picture, re.S):
        title = re.search(r"<h3>(.*?)</h3>", panel)
        head, *rows = re.findall(r"<tr>(.*?)</tr>", panel, re.S)
        columns = re.findall(r"<th>(.*?)</th>", head)
        for row in rows:
            device_ids = [int(text) for text in re.findall(r"<b>(\d+)</b>", row)]
            titles = [title[1] if title else "", re.search(r"<th>(.*?)</th>", row)[1]]
            ids_by_coordinates |= {
                " ".join([*titles, column]).strip(): device for column, device in zip(columns, device_ids, strict=True)
            }
    return ids_by_coordinates


@pytest.mark.parametrize(
    "sizes, coordinates, device",
    [
        ({"data": 2, "fsdp": 2, "tensor": 2}, "data 1 fsdp 0 tensor 1", 5),
        ({"replica": 1, "data": 4, "seq": 1, "tensor": 2}, "data 3 tensor 0", 6),
        ({"pipe": 2, "data": 2, "fsdp": 1, "expert": 2, "tensor": 2}, "pipe 1  data 0 expert 1 tensor 0", 10),
        ({"fsdp": 8}, "fsdp 7", 7),
    ],
)
def test_every_device_is_at_its_coordinates(sizes, coordinates, device):
    ids = cells(mesh_picture(sizes, devices(math.prod(sizes.values()))))
    assert ids[coordinates] == device
    assert sorted(ids.values()) == list(range(math.prod(sizes.values())))


def test_a_large_mesh_shows_its_first_panels():
    picture = mesh_picture({"data": 64, "fsdp": 8, "tensor": 8}, devices(4096))
    assert picture.count('class="panel"') == 16 and "48 more panels" in picture


SIZES = {"data": 2, "fsdp": 2, "tensor": 4}


def entry(name, shape, spec):
    return {"name": name, "shape": shape, "dtype": "float32", "spec": spec, "bytes_per_device": 64}


@pytest.mark.parametrize(
    "name, shape, spec, shards, label",
    [
        ("params/layers/0/attn/q/kernel", [8, 4, 2], ["fsdp", "tensor", None], (2, 4), "heads × head_dim 8, tensor 4"),
        ("params/layers/0/attn/o/kernel", [4, 2, 8], ["tensor", None, "fsdp"], (4, 2), "heads × head_dim 8, tensor 4"),
        ("params/segments/0/mlp/up/kernel", [3, 8, 16], [None, None, ["fsdp", "tensor"]], (1, 8), "mlp 16, fsdp 2"),
        ("params/embed/embedding", [16, 8], [], (1, 1), "vocab 16"),
    ],
)
def test_a_box_has_the_shards_of_its_spec(name, shape, spec, shards, label):
    picture = weight_box(Array.from_plan(entry(name, shape, spec)), SIZES)
    assert f"cut in {shards[0]} by {shards[1]} pieces" in picture and label in picture
    assert picture.count("<line") == sum(shards) - 2


def test_layers_of_one_sharding_share_a_row():
    alike = [Array.from_plan(entry(f"params/layers/{n}/mlp/up/kernel", [8, 16], [None, "tensor"])) for n in range(3)]
    other = Array.from_plan(entry("params/layers/3/mlp/up/kernel", [8, 16], ["fsdp", "tensor"]))
    rows = re.findall(r"<tr>(.*?)</tr>", arrays_table([*alike, other]))[1:]
    assert ["layers/*/mlp" in row for row in rows] == [True, False]
    assert "192 B" in rows[0] and "embed, mlp" in rows[0] and "layers/3/" in rows[1]


def test_arrays_of_the_optimizer_are_folded(finished):
    plan = json.loads((finished / "plan.json").read_text())
    picture = sharding_picture(plan["arrays"], plan["mesh"])
    assert picture.count("opt_state/adamw/mu") and "opt_state" not in picture.partition("<details>")[0]


def test_a_device_holds_its_state_the_batch_and_temporaries(finished):
    plan = json.loads((finished / "plan.json").read_text())
    parts = device_parts(plan)
    assert sum(parts.values()) == plan["compiled"]["argument_bytes"] + plan["compiled"]["temporary_bytes"]
    assert parts["batch and the rest of the state"] == 40_960


def test_communication_is_stacked_by_kind_in_one_scale():
    plan = {"collectives": {"all-gather": {"fsdp": 300, "none": 9}, "all-reduce": {"fsdp": 100, "data": 200}}}
    picture = communication_section(plan)
    widths = [float(width) for width in re.findall(r"width:([\d.]+)%", picture)]
    assert widths == [75.0, 25.0, 50.0] and "none" not in picture
    assert "No collective" in communication_section({"collectives": {}})


@pytest.mark.parametrize(
    "value, text",
    [(0, "0"), (12345, "12.3k"), (999.7, "1k"), (2.36e6, "2.36M"), (3e-4, "3.0e-4"), (-0.5, "-0.5"), (math.nan, "—")],
)
def test_number_formats(value, text):
    assert format_number(value) == text


def test_formats_of_bytes_and_durations():
    assert [format_bytes(count) for count in (0, 1023, 1536, 3 * 2**30)] == ["0 B", "1023 B", "1.5 KiB", "3.0 GiB"]
    assert [format_duration(seconds) for seconds in (8.24, 252, 7500)] == ["8.2 s", "4m 12s", "2h 05m"]


def test_a_template_escapes_text_and_needs_every_value():
    page = render("goodput", note="1 < 2", rows=[("<b>", Markup("<i>kept</i>"), "&")])
    assert "1 &lt; 2" in page and "<td>&lt;b&gt;</td>" in page and "<i>kept</i>" in page and "&amp;" in page
    with pytest.raises(UndefinedError, match="note"):
        render("goodput", rows=[])
