"""The fastest schedule that fits: no other that fits is faster."""

import pytest

from meshwright.configs.errors import UserError
from meshwright.parallel.pipeline.tables.costs import Costs
from meshwright.parallel.pipeline.tables.search import best, candidates

UNEVEN = Costs(forward=1.0, input_gradient=1.4, weight_gradient=0.7)


@pytest.mark.parametrize(("limit", "name"), [(None, "zb-v"), (8, "zb-v"), (5, "v-half"), (4, "v-min"), (2, "auto")])
def test_less_memory_leads_down_the_family(limit, name):
    chosen = best(devices=8, microbatches=24, memory_limit=limit)
    assert chosen.table.name == name
    assert limit is None or chosen.timeline.in_flight.max() <= limit


@pytest.mark.parametrize("limit", [3, 4, 6])
def test_no_candidate_within_the_limit_is_faster(limit):
    asked = {"devices": 4, "microbatches": 12, "costs": UNEVEN, "memory_limit": limit}
    fitting = [one.timeline.makespan for one in candidates(**asked) if one.timeline.in_flight.max() <= limit]
    assert best(**asked).timeline.makespan == pytest.approx(min(fitting))


def test_with_vocabulary_passes_only_those_that_take_them_are_compared():
    asked = {"devices": 4, "microbatches": 12, "vocabulary": 2}
    assert {one.table.name for one in candidates(**asked)} == {"1f1b", "v-half"}
    assert best(**asked, memory_limit=4).table.name == "v-half"


def test_groups_that_do_not_fit_are_left_out():
    assert "interleaved" not in {one.table.name for one in candidates(devices=4, microbatches=6)}


def test_where_nothing_fits_the_least_is_named():
    with pytest.raises(UserError, match=r"holds at most 0\.5 microbatches; v-min holds 2"):
        best(devices=4, microbatches=12, memory_limit=0.5)
