"""The fastest schedule within a memory limit: no other one within it is faster."""

import pytest

from meshwright.configs.errors import UserError
from meshwright.parallel.pipeline.tables.costs import Costs
from meshwright.parallel.pipeline.tables.search import candidates, fastest_schedule

UNEVEN = Costs(forward=1.0, input_gradient=1.4, weight_gradient=0.7)


@pytest.mark.parametrize(("limit", "name"), [(None, "zb-v"), (8, "zb-v"), (5, "v-half"), (4, "v-min"), (2, "auto")])
def test_a_lower_limit_chooses_a_schedule_that_holds_less(limit, name):
    chosen = fastest_schedule(devices=8, microbatches=24, memory_limit=limit)
    assert chosen.table.name == name
    assert limit is None or chosen.timeline.in_flight.max() <= limit


@pytest.mark.parametrize("limit", [3, 4, 6])
def test_no_candidate_within_the_limit_is_faster(limit):
    sizes = {"devices": 4, "microbatches": 12, "costs": UNEVEN, "memory_limit": limit}
    fitting = [
        candidate.timeline.makespan for candidate in candidates(**sizes) if candidate.timeline.in_flight.max() <= limit
    ]
    assert fastest_schedule(**sizes).timeline.makespan == pytest.approx(min(fitting))


def test_only_schedules_with_vocabulary_passes_are_compared_if_they_are_asked_for():
    sizes = {"devices": 4, "microbatches": 12, "vocabulary": 2}
    assert {candidate.table.name for candidate in candidates(**sizes)} == {"1f1b", "v-half"}
    assert fastest_schedule(**sizes, memory_limit=4).table.name == "v-half"


def test_interleaved_is_left_out_where_its_groups_do_not_divide():
    assert "interleaved" not in {candidate.table.name for candidate in candidates(devices=4, microbatches=6)}


def test_if_nothing_fits_the_error_names_the_smallest_peak():
    with pytest.raises(UserError, match=r"--memory-limit: 0\.5 .* 2, which v-min needs"):
        fastest_schedule(devices=4, microbatches=12, memory_limit=0.5)
