"""Schedules in CSV files, by ticks or by orders; errors name file and line."""

import pytest

from meshwright.configs.errors import UserError
from meshwright.parallel.pipeline.tables.csv_io import read_csv, write_csv
from meshwright.parallel.pipeline.tables.list_schedule import device_orders
from meshwright.parallel.pipeline.tables.schedules.registry import make_table

HEAD = "tick,device,op,microbatch,chunk\n"


def written(tmp_path, text):
    path = tmp_path / "mine.csv"
    path.write_text(text)
    return path


def test_without_the_column_tick_lines_are_the_orders_of_the_devices(tmp_path):
    table = make_table("v-half", devices=2, microbatches=4, vocabulary=2)
    placement = " | ".join(" ".join(map(str, row)) for row in table.placement.tolist())
    lines = [f"# placement: {placement}", "# algorithm: 2", "# name: v-half", "device,op,microbatch,chunk"]
    lines += [f"{device},{step.op.name},{step.microbatch},{step.chunk}"
              for device, order in enumerate(device_orders(table)) for step in order]  # fmt: skip
    assert read_csv(written(tmp_path, "\n".join(lines))).equals(table)


def test_a_file_by_hand_needs_no_header_and_any_order_of_lines(tmp_path):
    table = read_csv(written(tmp_path, HEAD + "2,0,W,0,0\n1,0,I,0,0\n0,0,F,0,0\n"))
    assert (table.name, table.devices, table.microbatches, table.slot.ravel().tolist()) == ("mine", 1, 1, [0, 0, 0])


def test_the_header_is_the_documented_one(tmp_path):
    write_csv(make_table("zb-v", devices=2, microbatches=1), tmp_path / "zb-v.csv")
    lines = (tmp_path / "zb-v.csv").read_text().splitlines()
    assert lines[:5] == ["# placement: 0 3 | 1 2", "# algorithm: 0", "# name: zb-v", HEAD.strip(), "0,0,F,0,0"]


MISTAKES = {
    "empty": ("", r"mine\.csv, line 1: column chunk, device, microbatch, op is missing"),
    "no passes": (HEAD, r"mine\.csv: no passes"),
    "a column too many": ("tick,device,op,microbatch,chunk,slot\n", r"line 1: slot matches nothing"),
    "a cell too few": (HEAD + "0,0,F,0\n", r"mine\.csv, line 2: 4 cells; give one for each column"),
    "no number": (HEAD + "0,0,F,x,0\n", r"mine\.csv, line 2: microbatch 'x'; give a whole number"),
    "negative": (HEAD + "0,-1,F,0,0\n", r"mine\.csv, line 2: device -1; count from 0"),
    "no op": (HEAD + "0,0,F,0,0\n1,0,X,0,0\n", r"mine\.csv, line 3: op: X matches nothing; there are B, F, I, S, T, W"),
    "a cell twice": (HEAD + "0,0,F,0,0\n0,0,F,1,0\n", r"line 3: tick 0, device 0 is already in line 2"),
    "no such chunk": (HEAD + "0,0,F,0,1\n", r"line 2: chunk 1; a device has 1"),
    "no such device": ("# placement: 0\n" + HEAD + "0,1,F,0,0\n", r"line 3: device 1; the placement has 1"),
    "placement": (
        "# placement: 0 1 | 1 2\n" + HEAD + "0,1,F,0,0\n",
        r"placement '0 1 \| 1 2'; give every device the same",
    ),
    "header": ("# placment: 0\n" + HEAD, r"line 1: placment matches nothing; .*Did you mean placement\?"),
    "not a schedule": (HEAD + "0,0,I,0,0\n1,0,F,0,0\n2,0,W,0,0\n", r"schedule mine: tick 0, device 0: I of .* needs F"),
    "a circle": (
        "device,op,microbatch,chunk\n0,F,0,0\n0,I,0,0\n0,F,1,0\n1,F,1,0\n1,F,0,0\n1,I,0,0\n",
        r"never ends: device 0 at I\(microbatch 0, stage 0\) for I\(microbatch 0, stage 1\) of device 1, which waits",
    ),
}


@pytest.mark.parametrize(("text", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_name_file_and_line(text, message, tmp_path):
    with pytest.raises(UserError, match=message):
        read_csv(written(tmp_path, text))


def test_a_missing_file_is_a_mistake(tmp_path):
    with pytest.raises(UserError, match=r"none\.csv: .*No such file"):
        read_csv(tmp_path / "none.csv")
