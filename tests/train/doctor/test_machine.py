"""The doctor finds what is wrong, names the remedy, and fails on wrong numbers only."""

import dataclasses
import io
import json
import tomllib
from pathlib import Path

import jax
import pytest
from rich.console import Console

import meshwright
from meshwright.train.doctor import machine


@pytest.fixture(scope="module")
def examination():
    return machine.examine_machine()


def outcomes(checks):
    return [check.outcome for check in checks]


def test_the_checks_of_a_healthy_machine_are_right(examination):
    assert outcomes(examination.checks) == ["right", "right"] and machine.exit_code(examination) == 0
    assert len(examination.devices) == 8 and "pinned_host" in examination.devices[0].memory_kinds
    assert examination.versions["jax"] == jax.__version__ and examination.host.cores >= 1
    assert all(check.seconds > 0 for check in examination.checks)


@pytest.mark.parametrize(
    "reduce, devices",
    [(jax.lax.pmax, "0, 1, 2, 3, 4, 5, 6, 7"), (lambda part, axis: part, "0"), (lambda part, axis: 0 * part, "0")],
    ids=["another reduction", "no reduction", "zeros"],
)
def test_a_wrong_all_reduce_is_found_with_its_devices(reduce, devices):
    check = machine.check_all_reduce(jax.devices(), reduce=reduce)
    assert check.outcome == "wrong" and f"devices {devices}" in check.detail


def test_one_device_with_a_wrong_copy_is_named():
    def wrong_on_device_5(part, axis):
        return jax.lax.psum(part, axis) + (jax.lax.axis_index(axis) == 5)

    assert machine.check_all_reduce(jax.devices(), reduce=wrong_on_device_5).detail == "devices 5 have another sum"


def test_only_wrong_numbers_are_a_failure(examination):
    wrong = dataclasses.replace(examination.checks[0], outcome="wrong")
    missing = dataclasses.replace(examination.checks[1], outcome="unavailable")
    assert machine.exit_code(dataclasses.replace(examination, checks=(wrong, missing))) == 1
    assert machine.exit_code(dataclasses.replace(examination, checks=(missing,))) == 0


@pytest.mark.parametrize(
    "change, remedy",
    [
        (lambda e: {"checks": (dataclasses.replace(e.checks[0], outcome="wrong"),)}, "do not train here"),
        (lambda e: {"checks": (dataclasses.replace(e.checks[1], outcome="unavailable"),)}, "memory.policy"),
        (lambda e: {"versions": {**e.versions, "grain": None}}, "pip install meshwright"),
        (lambda e: {"host": dataclasses.replace(e.host, disk_free_bytes=10**6)}, "make room"),
        (lambda e: {"host": dataclasses.replace(e.host, gloo=False)}, "pip install -U jaxlib"),
    ],
)
def test_every_problem_has_a_remedy(examination, change, remedy, tmp_path):
    nowhere = tmp_path / "nvidia0"
    before = machine.find_problems(examination, nvidia=nowhere)
    after = machine.find_problems(dataclasses.replace(examination, **change(examination)), nvidia=nowhere)
    assert [remedy in problem.remedy for problem in after if problem not in before] == [True]


def test_a_gpu_that_jax_does_not_use_is_a_problem(examination, tmp_path):
    (tmp_path / "nvidia0").touch()
    problems = machine.find_problems(examination, nvidia=tmp_path / "nvidia0")
    assert any("meshwright[gpu]" in problem.remedy for problem in problems)


def test_the_extras_are_those_of_pyproject():
    project = tomllib.loads((Path(meshwright.__file__).parent / "pyproject.toml").read_text())["project"]
    declared = project["optional-dependencies"]
    assert set(machine.EXTRAS) == set(declared) - {"test"}
    for name, (distributions, _) in machine.EXTRAS.items():
        if name not in ("gpu", "tpu", "targets"):  # extras of JAX, which bring plugins of other names
            assert set(distributions) == set(declared[name])


def test_an_extra_is_missing_until_all_of_it_is_installed(monkeypatch):
    monkeypatch.setitem(machine.EXTRAS, "some", (("jax", "no-such-package", "jaxl*"), "tests"))
    part = machine.describe_extra("some")
    assert part.missing == ("no-such-package",) and part.remedy == "pip install 'meshwright[some]'"


def test_cpu_features_are_read_from_either_spelling(tmp_path):
    (tmp_path / "x86").write_text("processor : 0\nflags\t\t: fpu avx2 fma sse\n")
    (tmp_path / "arm").write_text("Features\t: fp asimd sve\n")
    assert machine.read_cpu_features(tmp_path / "x86") == ("avx2", "fma")
    assert machine.read_cpu_features(tmp_path / "arm") == ("asimd", "sve")
    assert machine.read_cpu_features(tmp_path / "none") == ()


def test_every_part_is_printed_and_is_in_the_json(examination):
    with_problem = dataclasses.replace(examination, problems=(machine.Problem("it hurts", "rest"),))
    page = Console(file=io.StringIO(), width=140)
    page.print(machine.render(with_problem))
    text = page.file.getvalue()
    for words in ("jaxlib", "pinned_host", "✓ all-reduce of 1.0 MiB over 8 devices", "meshwright[", "→ rest"):
        assert words in text, words
    assert json.loads(json.dumps(dataclasses.asdict(with_problem)))["problems"] == [
        {"what": "it hurts", "remedy": "rest"}
    ]


def test_main_prints_json_and_returns_the_exit_code(examination, capsys, monkeypatch):
    wrong = dataclasses.replace(examination.checks[0], outcome="wrong")
    monkeypatch.setattr(machine, "examine_machine", lambda: dataclasses.replace(examination, checks=(wrong,)))
    assert machine.main(as_json=True) == 1
    assert json.loads(capsys.readouterr().out)["checks"][0]["outcome"] == "wrong"
