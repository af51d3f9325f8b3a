"""The recipes of `configs/lowcomm`, each as typed: on the mesh, and as islands with one option more."""

import subprocess
import sys

import pytest
from support.run_files import metric_rows

from meshwright.configs.loader import load_config
from meshwright.train.launch.launch_islands import island_overrides

RECIPES = {"lowcomm/diloco": 2, "lowcomm/streaming": 2, "lowcomm/noloco": 4}
SHORT = ("steps=8", "outer.every=4", "optimizer.warmup_steps=2", "evaluation={every: 8, batches: 1, prompts: []}")
SMALL = ("data={sequence_length: 32, tokenizer: {vocab: 512}}", "checkpoint.every=0", "name=run")
TINY = "model={vocab: 512, layers: 3, embed: 32, mlp: 64}"


@pytest.mark.parametrize(("recipe", "replicas"), RECIPES.items(), ids=RECIPES)
def test_islands_of_a_recipe_are_its_replicas_with_equal_parts_of_the_devices(recipe, replicas):
    whole = load_config(recipe)
    islands = load_config(recipe, overrides=island_overrides(whole, count=replicas))
    assert whole.mesh.replica == islands.islands.count == replicas
    assert islands.mesh.devices * replicas == whole.mesh.devices and islands.outer == whole.outer


@pytest.mark.slow
@pytest.mark.parametrize("islands", [False, True], ids=["mesh", "islands"])
@pytest.mark.parametrize(("recipe", "replicas"), RECIPES.items(), ids=RECIPES)
def test_a_recipe_trains_from_one_command(tmp_path, recipe, replicas, islands):
    verb = ["launch", recipe, "--islands", str(replicas)] if islands else ["train", recipe]
    command = [sys.executable, "-m", "meshwright.train.cli", *verb, *SHORT, *SMALL, TINY]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr[-2000:] + done.stdout[-2000:]
    rows = metric_rows(tmp_path / "runs" / "run")
    assert any("held_out_loss" in row for row in rows)
    sent = [row for row in rows if row.get("sent_bytes")]
    assert sent, "nobody sent anything"
    if islands:
        assert len(list((tmp_path / "runs" / "run").glob("island-*"))) == replicas
