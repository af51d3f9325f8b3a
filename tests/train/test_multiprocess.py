"""Several processes with gloo between them are the same run as one process with all the devices."""

import json
import os
import subprocess
import sys

import pytest

SMALL = (
    "steps=3", "logging.every=1", "model.layers=1", "model.embed=32", "model.heads=2", "model.kv_heads=2",
    "model.mlp=32", "model.vocab=384", "data.source=synthetic",
    "data.tokenizer={bytes: true, train: null, vocab: null}",
    "data.sequence_length=32", "data.global_batch=8", "evaluation.prompts=[]", "logging.tensorboard=false",
    "optimizer.warmup_steps=0",
)  # fmt: skip


def meshwright(directory, *arguments):
    environment = os.environ | {"MESHWRIGHT_CACHE": str(directory / "cache")}
    environment["XLA_FLAGS"] = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    done = subprocess.run(
        [sys.executable, "-m", "meshwright.train.cli", *arguments],
        cwd=directory, env=environment, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


def losses(directory, name):
    rows = [json.loads(line) for line in (directory / "runs" / name / "metrics.jsonl").read_text().splitlines()]
    return [row[key] for row in rows for key in ("loss", "grad_norm", "held_out_loss") if key in row]


def compare(directory, mesh, *, processes, devices):
    arguments = ("quickstart", *SMALL, *mesh)
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
