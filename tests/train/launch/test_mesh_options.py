"""Which meshes a run can go on with, what they make of its configuration, and what is refused."""

import itertools

import pytest
from support.equivalence import assert_same, tiny

from meshwright.configs.errors import UserError
from meshwright.configs.sections.fault_tolerance import ElasticConfig
from meshwright.train.launch.drain import drain, read_drained
from meshwright.train.launch.mesh_options import MeshOption, choose_assignment, mesh_options
from meshwright.train.launch.regroup import Regrouping

TREE = {"mesh": {"data": 4, "platform": "cpu"}, "microbatches": 2, "data": {"global_batch": 16}}


def options_of(config, **options):
    return [
        (option.processes, option.mesh, option.overrides[1:])
        for option in mesh_options(config, **{"processes": 4, **options})
    ]


def test_a_run_without_elastic_meshes_has_one_option():
    assert mesh_options(tiny(**TREE), processes=4) == (MeshOption(4),)


def test_a_device_computes_as_many_rows_at_once_on_every_mesh():
    config = tiny(**TREE, elastic={"meshes": [{"data": 2}, {"fsdp": 2}, {"tensor": 2}]})
    assert options_of(config) == [
        (4, "data 4", ()),
        (2, "data 2", ("microbatches=4",)),
        (2, "fsdp 2", ("microbatches=4",)),
        (2, "tensor 2", ("microbatches=8",)),
    ]


def test_an_open_axis_takes_as_many_processes_as_fit():
    """Two devices each; 6 do not divide the batch."""
    config = tiny(**TREE | {"mesh": {"data": 8}, "microbatches": 1}, elastic={"meshes": [{"data": -1}]})
    assert [processes for processes, _, _ in options_of(config)] == [4, 2, 1]


def test_deterministic_runs_keep_their_microbatches():
    config = tiny(**TREE | {"microbatches": 8}, elastic={"deterministic": True, "meshes": [{"data": 2}, {"data": 1}]})
    assert options_of(config)[1:] == [(2, "data 2", ("microbatches=8",)), (1, "one device", ("microbatches=8",))]


def test_the_overrides_of_an_option_make_the_same_run_on_its_mesh():
    first, second = mesh_options(tiny(**TREE, elastic={"meshes": [{"data": 2, "tensor": 1}]}), processes=4)
    assert first.overrides == () and second.overrides[0] == (
        "mesh={replica: 1, pipe: 1, data: 2, fsdp: 1, expert: 1, seq: 1, tensor: 1, devices: 2}"
    )
    assert_same(tiny(**TREE), tiny(**TREE | {"mesh": {"data": 2, "platform": "cpu"}, "microbatches": 4}), steps=2)


REFUSED = {
    "a batch that does not divide": (
        {"elastic": {"meshes": [{"data": 2}, {"data": 3}]}},
        r"elastic.meshes.1: data.global_batch: 16 is not divisible by data x fsdp x microbatches",
    ),
    "replicas": ({"elastic": {"meshes": [{"replica": 2}]}}, r"elastic.meshes.0.replica: 2 "),
    "heads": ({"elastic": {"meshes": [{"tensor": 3}]}}, r"elastic.meshes.0: model.heads: 4 is not divisible"),
    "another axis": (
        {"mesh": {"data": 2, "fsdp": 2}, "elastic": {"deterministic": True}},
        r"mesh.fsdp: 2: elastic.deterministic ",
    ),
    "too few microbatches": (
        {"elastic": {"deterministic": True}},
        r"microbatches: 2 on mesh.data \(4\).* use 4, 8, 16",
    ),
    "blocks that are no subtrees": (
        {"microbatches": 12, "data": {"global_batch": 24}, "elastic": {"deterministic": True}},
        r"microbatches: 12 on mesh.data \(4\)",
    ),
    "a mesh to shrink to": (
        {"microbatches": 4, "elastic": {"deterministic": True, "meshes": [{"fsdp": 2}]}},
        r"elastic.meshes.0: mesh.fsdp: 2: elastic.deterministic",
    ),
    "rows": (
        {"microbatches": 32, "elastic": {"deterministic": True}},
        r"data.global_batch: 16 is not divisible by microbatches \(32\)",
    ),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED)
def test_meshes_that_cannot_work_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        tiny(**{**TREE, **changes})


LAUNCHES = {
    "more processes than there are": ({"meshes": [{"data": 8}]}, {}, r"elastic.meshes.0: no number of processes"),
    "half a process": ({"meshes": [{"data": 1}]}, {"processes": 2}, r"with 2 devices each, up to 2, fits one device"),
}


@pytest.mark.parametrize(("elastic", "options", "message"), LAUNCHES.values(), ids=LAUNCHES)
def test_an_entry_that_the_processes_cannot_make_is_refused(elastic, options, message):
    with pytest.raises(UserError, match=message):
        mesh_options(tiny(**TREE, elastic=elastic), **{"processes": 4, **options})


def test_unknown_devices_are_refused():
    config = tiny(mesh={"data": -1}, elastic={"meshes": [{"data": 2}]})
    with pytest.raises(UserError, match=r"set mesh\.devices or launch\.devices_per_process"):
        mesh_options(config, processes=4)
    assert [option.mesh for option in mesh_options(config, processes=4, devices_per_process=1)] == ["data 4", "data 2"]


ALL, HALF = MeshOption(4, "data 4"), MeshOption(2, "data 2")


@pytest.mark.parametrize(
    ("slots", "unreliable", "mesh", "filled"),
    [
        ((0, 1, 2, 3), (), "data 4", (0, 1, 2, 3)),
        ((0, 2, 3), (), "data 2", (0, 2)),
        ((0, 1, 2, 3), (0,), "data 2", (1, 2)),
        ((0, 1), (0,), "data 2", (0, 1)),  # nothing fits without it
        ((3,), (), None, None),
    ],
)
def test_the_first_option_that_the_slots_fill_is_chosen(slots, unreliable, mesh, filled):
    assignment = choose_assignment((ALL, HALF), slots, unreliable=unreliable)
    assert (assignment and assignment.option.mesh, assignment and assignment.slots) == (mesh, filled)


def test_drained_slots_are_remembered_until_they_are_put_back(tmp_path):
    with pytest.raises(UserError, match="not a run directory"):
        drain(tmp_path, [1])
    (tmp_path / "config.yaml").touch()
    drain(tmp_path, [1, 3])
    assert drain(tmp_path, [2]) == {1, 2, 3} and drain(tmp_path, [1, 2], undo=True) == read_drained(tmp_path) == {3}


def test_available_slots_are_read_once_a_decision():
    """A host that comes during a decision must not count in one half of it: the wait is over, with no assignment."""
    calls = itertools.count()
    settings = ElasticConfig(replace=9.0, settle=9.0, start_timeout=9.0)
    regrouping = Regrouping(
        (HALF,), settings, lambda: {0, 1} if next(calls) else {0}, drained_slots=set, unreliable_slots=set
    )
    assignment = regrouping.wait_for_assignment(stopped=lambda: False, clock=lambda: 0.0, sleep=lambda seconds: None)
    assert assignment is not None and assignment.slots == (0, 1)
