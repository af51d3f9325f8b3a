"""Several processes with gloo between them are the same run as one process with all the devices."""

import os
import subprocess
import sys

import pytest
from support.run_files import metric_rows
from support.small_run import SMALL


def meshwright(directory, *arguments):
    environment = os.environ | {"MESHWRIGHT_CACHE": str(directory / "cache")}
    environment["XLA_FLAGS"] = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    done = subprocess.run(
        [sys.executable, "-m", "meshwright.train.cli", *arguments],
        cwd=directory, env=environment, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


def losses(directory, name):
    rows = metric_rows(directory / "runs" / name)
    return [row[key] for row in rows for key in ("loss", "grad_norm", "held_out_loss") if key in row]


def compare(directory, mesh, *, processes, devices):
    arguments = ("quickstart", *SMALL, "steps=3", "data.held_out=0.02", *mesh)
    meshwright(directory, "train", *arguments, "name=one")
    world = ("--processes", str(processes), "--devices-per-process", str(devices))
    meshwright(directory, "launch", *arguments, "name=many", *world)
    one, many = losses(directory, "one"), losses(directory, "many")
    assert len(one) >= 7 and one == pytest.approx(many, rel=1e-5)


def test_two_processes_equal_one(tmp_path):
    mesh = ("mesh.devices=4", "mesh.data=2", "mesh.fsdp=1", "mesh.tensor=2")
    compare(tmp_path, mesh, processes=2, devices=2)


@pytest.mark.slow
def test_four_processes_of_two_devices_equal_one_of_eight(tmp_path):
    compare(tmp_path, (), processes=4, devices=2)
