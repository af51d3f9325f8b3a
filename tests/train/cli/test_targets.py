"""`--target`: what can be said without a compiler is said before JAX is imported, and a missing compiler is named."""

import importlib.util
import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from meshwright.train.cli.main import app

NO_JAX = "import sys; sys.modules['jax'] = None; from meshwright.train.cli.main import main; main()"


def meshwright(*arguments, code=NO_JAX):
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)


def test_a_run_is_validated_for_several_targets_without_jax():
    done = meshwright("validate", "pretrain/llama-1b", "--target", "v5p:2x2x2,h100x8")
    assert done.returncode == 0, done.stderr
    assert "v5p:2x2x2 (8 devices)" in done.stdout and "h100x8 (8 devices)" in done.stdout


def test_shards_narrower_than_a_register_are_warned_about_with_a_mesh_that_has_none():
    arguments = ("validate", "pretrain/llama-1b", "data.global_batch=256", "--target", "v5p:4x4x4")
    done = meshwright(*arguments)
    assert done.returncode == 0 and "mesh.fsdp: 64 leaves 32 of 2048 columns" in done.stderr
    assert "mesh.fsdp=16 mesh.data=4" in done.stderr
    better = meshwright(*arguments, "mesh.fsdp=16", "mesh.data=4")
    assert better.returncode == 0 and not better.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["quickstart", "--target", "v5p:4x4x4"], "--target v5p:4x4x4: mesh"),  # 8 devices, not 64
        (["pretrain/llama-1b", "--target", "v5p:4x4x4"], "data.global_batch: 128"),
        (["quickstart", "--target", "v9:2x2"], "--target: v9 matches nothing"),
        (["quickstart", "--target", ","], "names no target"),
        (["quickstart", "model.attention=cudnn", "--target", "v5p:2x2x2"], "model.attention: cudnn"),
    ],
)
def test_a_run_that_is_none_for_the_target_is_refused(arguments, message):
    for verb in ("validate", "plan"):
        done = meshwright(verb, *arguments)
        assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="the compiler is installed")
def test_a_missing_compiler_is_named_with_its_extra():
    code = "from meshwright.train.cli.main import main; main()"
    done = meshwright("plan", "quickstart", "--target", "v5p:2x2x2", code=code)
    assert done.returncode == 2 and "pip install 'meshwright[targets]'" in done.stderr


def test_plans_are_printed_side_by_side_and_a_run_that_does_not_fit_is_exit_code_1(monkeypatch):
    from meshwright.train.plan import target_plan

    def plan_target(config, overrides, topology):
        fits = topology.target.name == "v5p"
        step = {
            "seconds": 0.8,
            "tokens_per_second": 1e5,
            "mfu": 0.4,
            "seconds_by_part": {"attention": 0.25, "products": 0.3},
            "seconds_by_source": {"models/context.py:28": 0.3},
            "collectives": {"exposed_seconds": 0.0, "hidden_seconds": 0.1, "synchronous": []},
            "unknown": {"kernel strange: not measured": 3},
        }
        return target_plan.TargetPlan(
            target=str(topology),
            devices=topology.devices,
            mesh={"fsdp": topology.devices},
            device_memory_bytes=16 * 2**30,
            peak_bytes=(10 if fits else 20) * 2**30,
            compile_seconds=20.0,
            compiler_options={},
            warnings=[],
            savings={} if fits else {"memory.policy=full": 15 * 2**30},
            plan={} if fits else None,
            step=step if fits else None,
        )

    monkeypatch.setattr(target_plan, "plan_target", plan_target)
    arguments = ["plan", "pretrain/llama-1b", "--target", "v5p:2x2x2,v5e:4x4"]
    done = CliRunner().invoke(app, arguments, env={"COLUMNS": "120"})
    assert done.exit_code == 1
    for text in ("v5p:2x2x2", "10 GiB of 16 GiB", "800.0 ms", "40.0%", "fits with memory.policy=full", "not measured"):
        assert text in done.stdout
    plans = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)
    assert [plan["fits"] for plan in plans] == [True, False]
