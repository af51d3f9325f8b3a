"""The published formulas for bubbles, spans and peaks, each against the simulator."""

import numpy as np
import pytest

from meshwright.parallel.pipeline.tables.costs import Costs
from meshwright.parallel.pipeline.tables.fused_backward import fuse_backward
from meshwright.parallel.pipeline.tables.schedules.registry import make_table
from meshwright.parallel.pipeline.tables.simulator import in_flight, simulate, stash_bytes

UNEVEN = Costs(forward=1.0, input_gradient=1.3, weight_gradient=0.8)
F, I, W = UNEVEN.forward, UNEVEN.input_gradient, UNEVEN.weight_gradient  # noqa: E741
SIZES = [(2, 6), (4, 12), (8, 24)]
sizes = pytest.mark.parametrize(("p", "m"), SIZES)


def table(name, p, m, **more):
    return make_table(name, devices=p, microbatches=m, **more)


def longest_span(timeline):
    """Zero Bubble's cost of a schedule: the longest time from a device's first pass to its last."""
    return float((np.nanmax(timeline.end, axis=0) - np.nanmin(timeline.start, axis=0)).max())


@sizes
@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
def test_a_fused_backward_idles_p_minus_1_of_m_plus_p_minus_1(name, p, m):
    assert simulate(fuse_backward(table(name, p, m))).bubble == pytest.approx((p - 1) / (m + p - 1))
    assert simulate(fuse_backward(table(name, p, m)), UNEVEN).makespan == pytest.approx((m + p - 1) * (F + I + W))


@sizes
def test_1f1b_split_into_i_and_w_idles_p_minus_1_forwards_and_input_gradients(p, m):
    assert simulate(table("1f1b", p, m)).makespan == pytest.approx(3 * m + 2 * (p - 1))


@sizes
@pytest.mark.parametrize("v", [2, 3])
def test_interleaving_divides_the_bubble_by_the_chunks(p, m, v):
    timeline = simulate(fuse_backward(table("interleaved", p, m, chunks=v)))
    assert timeline.bubble == pytest.approx((p - 1) / (v * m + p - 1))
    assert timeline.in_flight.max() == pytest.approx(p * (1 + (p - 1) / (p * v)))


@sizes
def test_zb_h1_and_zb_h2_spans(p, m):
    h1, h2 = simulate(table("zb-h1", p, m), UNEVEN), simulate(table("zb-h2", p, m), UNEVEN)
    assert longest_span(h1) == pytest.approx(m * (F + I + W) + (p - 1) * (F + I - W))
    assert longest_span(h2) == pytest.approx(m * (F + I + W) + (p - 1) * (F + I - 2 * W))


@pytest.mark.parametrize("p", [2, 3, 5, 8, 16])
def test_zb_h2_and_zb_v_have_no_bubble_between_steps(p):
    assert simulate(table("zb-h2", p, 2 * p)).bubble_between_steps == pytest.approx(0, abs=1e-12)
    assert simulate(table("zb-v", p, 2 * p)).bubble_between_steps == pytest.approx(0, abs=1e-12)


@sizes
def test_activations_of_1f1b_and_zero_bubble_on_each_worker(p, m):
    """M_B = 34, M_W = 32 of a layer without attention's own: rows of Zero Bubble's table 2, i from 1."""
    held = {name: stash_bytes(table(name, p, m), input=2, weight=32)
            for name in ("1f1b", "zb-h1", "zb-h2")}  # fmt: skip
    i = np.arange(1, p + 1)
    np.testing.assert_allclose(held["1f1b"], (p - i + 1) * 34)
    np.testing.assert_allclose(held["zb-h1"], (p - i + 1) * 34 + (i - 1) * 32)
    np.testing.assert_allclose(held["zb-h2"], (2 * p - 2 * i + 1) * 34 + (2 * i - 2) * 32)


@pytest.mark.parametrize("p", range(2, 13))
def test_v_schedules_hold_what_the_paper_says_on_every_device(p):
    m = 2 * p
    assert (in_flight(table("zb-v", p, m)) == p).all()
    assert (in_flight(table("v-half", p, m)) == (p + 2) // 2).all()
    assert in_flight(table("v-min", p, m)).max() == (p + 4) // 3


@pytest.mark.parametrize("p", [4, 8, 16])
def test_v_half_and_v_min_idle_at_most_a_half_and_two_thirds_of_1f1b(p):
    """Bubbles in time, fused 1F1B's being 3 (p - 1)."""
    m = 3 * p
    idle = {name: simulate(table(name, p, m)).makespan - 3 * m for name in ("v-half", "v-min")}
    assert 0 < idle["v-half"] <= (p - 1) * 3 / 2
    assert 0 < idle["v-min"] <= (p - 1) * 2


@pytest.mark.parametrize("p", [2, 4, 8])
@pytest.mark.parametrize(("algorithm", "more"), [(1, 2), (2, 1)])
def test_each_barrier_of_the_vocabulary_passes_costs_one_microbatch(p, algorithm, more):
    m = 3 * p
    np.testing.assert_array_equal(in_flight(table("1f1b", p, m, vocabulary=algorithm)), p - np.arange(p) + more)
    assert in_flight(table("v-half", p, m, vocabulary=algorithm)).max() == (p + 2) // 2 + more


@pytest.mark.parametrize("name", ["1f1b", "v-half"])
@pytest.mark.parametrize("algorithm", [1, 2])
@pytest.mark.parametrize("p", [4, 8])
def test_vocabulary_passes_add_their_own_time_and_no_bubble(name, algorithm, p):
    """Per microbatch exactly F + I + W + S + T: twenty more cost twenty times that."""
    costs = Costs(vocabulary_s=1.0, vocabulary_t=1.0) if name == "1f1b" else Costs(vocabulary_s=0.5, vocabulary_t=0.5)
    few, many = (simulate(table(name, p, m, vocabulary=algorithm), costs).makespan for m in (3 * p, 3 * p + 20))
    assert many - few == pytest.approx(20 * (3 + costs.vocabulary_s + costs.vocabulary_t))
    plain = simulate(fuse_backward(table("1f1b", p, 3 * p))).makespan - 9 * p
    assert few - 3 * p * (3 + costs.vocabulary_s + costs.vocabulary_t) <= plain + 1


@pytest.mark.parametrize("p", [4, 8, 16])
def test_interlaced_holds_one_and_a_half_times_as_much(p):
    held = in_flight(table("interlaced", p, 3 * p, vocabulary=1))
    np.testing.assert_array_equal(held, np.floor(1.5 * (p - np.arange(p))))


def test_auto_needs_no_more_than_zb_h1_to_be_as_fast():
    assert table("auto", 6, 18, memory_limit=6).ticks == table("zb-h1", 6, 18).ticks
    ticks = [table("auto", 6, 18, memory_limit=limit).ticks for limit in (1, 2, 3, 4, 6, 12)]
    assert ticks == sorted(ticks, reverse=True)
