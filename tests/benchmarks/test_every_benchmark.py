"""`benchmarks/` holds what `meshwright bench` runs, and nothing else."""

import re
from pathlib import Path

import pytest

from meshwright.train.cli.bench import BENCHMARKS, run

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_benchmark_has_help(name, capsys):
    with pytest.raises(SystemExit) as ended:
        run(name, ["--help"])
    assert ended.value.code == 0 and f"meshwright bench {name}" in capsys.readouterr().out


def test_a_file_is_a_benchmark_or_part_of_one():
    """A rejected experiment is deleted once docs/log.md has its result and the commit with its file."""
    texts = {file.stem: file.read_text() for file in FOLDER.glob("*.py") if file.stem != "__init__"}
    reached = {name.replace("-", "_") for name in BENCHMARKS}
    for name in list(reached):
        reached |= {other for other in texts if re.search(rf"\b{other}\b", texts[name])}
    assert not texts.keys() - reached
