"""Accumulation is a wrapper that changes nothing but memory."""

from support.equivalence import assert_same, tiny

from meshwright.parallel.gradients import accumulate_gradients


def test_with_one_microbatch_it_is_the_engine_itself():
    engine = object()
    assert accumulate_gradients(engine, microbatches=1) is engine


def test_accumulation_equals_one_pass_under_uneven_weights():
    assert_same(tiny(), tiny(microbatches=4, mesh={"data": 2}))


def test_dropout_draws_the_same_for_every_mesh_and_microbatch():
    model = {"dropout": 0.3}
    assert_same(tiny(model=model), tiny(model=model, microbatches=2, mesh={"data": 2, "tensor": 2}), steps=2)
