"""The tables of docs/pipeline.md: formulas hold, predictions agree with the papers, the page has the rows."""

from pathlib import Path

import pytest

from meshwright.benchmarks.pipeline_tables import TABLES, VOCABULARIES, Setup, formulas, gap, main, predict
from meshwright.configs.errors import UserError

SMALL = Setup("1f1b", 8, 32, 3072, 2048)
PAGE = Path(__file__).parents[2] / "docs" / "pipeline.md"


def test_the_simulator_agrees_with_formulas_and_bounds():
    for label, formula, value, simulated in formulas()[1:]:
        if formula.startswith("about"):
            assert float(simulated) <= float(value) + 3, label
        else:
            assert float(simulated) == pytest.approx(float(value), rel=1e-3, abs=1e-9), label


def test_the_page_has_the_rows_that_the_command_prints():
    rows = [f"| {' | '.join(row)} |" for row in formulas()]
    assert all(row in PAGE.read_text() for row in rows)


def test_vocabulary_passes_make_utilization_flat_where_the_baseline_falls():
    """The main result of the paper, from FLOPs only."""
    utilization = {method: [predict(SMALL, vocabulary, method).utilization for vocabulary in VOCABULARIES[::3]]
            for method in ("baseline", "redistributed", "algorithm 2")}  # fmt: skip
    assert utilization["baseline"][1] < 0.6 * utilization["baseline"][0]
    assert utilization["baseline"][1] < utilization["redistributed"][1] < utilization["algorithm 2"][1]
    assert utilization["algorithm 2"][1] == pytest.approx(utilization["algorithm 2"][0], rel=0.05)


def test_memory_grows_by_a_shard_of_the_vocabulary():
    """From 32k to 256k words: 2 x 229376 x 3072 parameters of 16 bytes over 8 devices, 2.625 GiB."""
    few, many = (predict(SMALL, vocabulary, "algorithm 2").gigabytes for vocabulary in VOCABULARIES[::3])
    assert many - few == pytest.approx(2.625)


def test_gaps_and_unknown_tables():
    assert (gap(1.1, 1.0), gap(0.5, 1.0)) == ("+10 %", "-50 %")
    with pytest.raises(UserError, match=r"bench pipeline-tables: formula matches nothing.*Did you mean formulas\?"):
        main(["formula"])
    assert set(TABLES) == {"formulas", "zero-bubble", "vocabulary"}
