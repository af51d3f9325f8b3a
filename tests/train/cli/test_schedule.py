"""`meshwright schedule`: numbers, files, and nothing written over."""

import json

import pytest
from typer.testing import CliRunner

from meshwright.configs.errors import UserError
from meshwright.parallel.pipeline.tables.csv_io import read_csv
from meshwright.parallel.pipeline.tables.schedules.registry import make_table
from meshwright.train.cli.main import app

SIZE = ["--stages", "4", "--microbatches", "8"]


def schedule(*arguments):
    """What is printed; errors come as they are raised."""
    result = CliRunner().invoke(app, ["schedule", *map(str, arguments)], catch_exceptions=True)
    if result.exception is not None:
        raise result.exception
    return result.stdout


def test_json_has_the_numbers_of_the_simulator():
    result = json.loads(schedule("1f1b", *SIZE, "--backward", "fused", "--json"))
    assert result["bubble"] == pytest.approx(3 / 11)
    assert result["in_flight"] == [4, 3, 2, 1]
    assert result["makespan"] == pytest.approx(33)


def test_costs_and_cores_change_the_makespan(tmp_path):
    (tmp_path / "costs.yaml").write_text("forward: 2.0\n")
    plain, dear = (json.loads(schedule("1f1b", *SIZE, "--json", *more))
                   for more in ([], ["--costs", tmp_path / "costs.yaml", "--cores", 1]))  # fmt: skip
    assert plain["makespan"] == 30 and dear["makespan"] == 30 + 8 + 3
    assert dear["lockstep"] == 4 * 8 * (2 + 1 + 1), "one core does all work one after the other"


def test_a_written_table_is_read_back(tmp_path):
    schedule("v-half", *SIZE, "--vocab-parallel", 2, "--csv", tmp_path / "out.csv", "--draw", tmp_path / "out.svg")
    assert read_csv(tmp_path / "out.csv").equals(make_table("v-half", devices=4, microbatches=8, vocabulary=2))
    assert (tmp_path / "out.svg").read_text().startswith("<?xml")
    assert "v-half, vocabulary passes by Algorithm 2" in schedule(tmp_path / "out.csv")


def test_best_compares_schedules_and_keeps_the_memory_limit():
    result = json.loads(schedule("best", *SIZE, "--memory-limit", 3, "--json"))
    assert result["schedule"] == "v-half" and max(result["in_flight"]) == 3
    assert {"1f1b", "zb-v", "gpipe"} < {other["schedule"] for other in result["compared"]}
    text = schedule("best", *SIZE, "--memory-limit", 3)
    assert "v-half" in text and "over 3" in next(line for line in text.splitlines() if "zb-v" in line)


def test_the_ops_and_the_written_files_are_printed(tmp_path):
    text = schedule("1f1b", *SIZE, "--csv", tmp_path / "out.csv")
    assert "\ndevice 0  F0 F1 F2 F3 .  .  .  I0 W0 F4 I1 W1 " in text
    assert "out.csv: written" in text.replace("\n", "")


MISTAKES = {
    "name": (["v-haf", *SIZE], r"schedule: v-haf matches nothing.*Did you mean v-half\?"),
    "size": (["1f1b", "--stages", 4], "--microbatches: say how many"),
    "cores": (["1f1b", *SIZE, "--cores", 0], "--cores 0: at least 1"),
    "backward": (["1f1b", *SIZE, "--backward", "fsed"], r"--backward: fsed matches nothing.*Did you mean fused\?"),
    "best of what": (["best", *SIZE, "--chunks", 2], "--chunks 2: best compares schedules as they are"),
    "directory": (["1f1b", *SIZE, "--csv", "no/where.csv"], r"no/where\.csv: no is no directory"),
    "picture": (["1f1b", *SIZE, "--draw", "a.gif", "--csv", "never.csv"], r"a\.gif: suffix '\.gif'; use \.svg"),
}


@pytest.mark.parametrize(("arguments", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_errors_before_anything_is_written(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        schedule(*arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("option", "value"),
    {"--stages": 8, "--microbatches": 4, "--chunks": 1, "--vocab-parallel": 1, "--memory-limit": 3}.items(),
)
def test_options_must_agree_with_the_size_of_a_file(option, value, tmp_path):
    file = tmp_path / "mine.csv"
    schedule("v-half", *SIZE, "--vocab-parallel", 2, "--csv", file)
    assert schedule(file, *SIZE, "--chunks", 2, "--vocab-parallel", 2) == schedule(file)
    with pytest.raises(UserError):
        schedule(file, option, value)


@pytest.mark.parametrize("option", ["--csv", "--draw"])
def test_existing_files_are_not_overwritten(option, tmp_path):
    target = tmp_path / f"out{'.csv' if option == '--csv' else '.svg'}"
    target.write_text("mine")
    with pytest.raises(UserError, match="exists; choose another name, nothing is overwritten"):
        schedule("1f1b", *SIZE, option, target)
    assert target.read_text() == "mine"
