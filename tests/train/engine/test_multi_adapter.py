"""Several adapters in one step: together they are the runs that each would be alone."""

import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from support.equivalence import assert_close, batches, tiny
from support.run_files import metric_rows

from meshwright.configs.adapter_runs import adapter_rows, single_adapter_run
from meshwright.configs.errors import UserError
from meshwright.configs.loader import merge_trees
from meshwright.configs.run import RunConfig
from meshwright.parallel.layout import to_canonical
from meshwright.parallel.mesh import make_mesh
from meshwright.train.core.process_env import ProcessInfo
from meshwright.train.engine.adapter_views import slice_state
from meshwright.train.engine.host_data import make_global_arrays
from meshwright.train.engine.program import build
from meshwright.train.engine.replicas import metrics_to_host
from meshwright.train.infer.import_export import export_adapter, export_run
from meshwright.train.infer.inference_session import evaluate, generate
from meshwright.train.run import train

MESH = {"data": 2, "fsdp": 2, "tensor": 2}
ADAPTERS = {
    "wide": {"rows": 4, "rank": 6, "alpha": 12},
    "narrow": {"rows": 1, "rank": 2, "targets": ["q", "layers/1/mlp/down"], "learning_rate": 0.03},
    "plain": {"rows": 3},
}
COMMON = {"rank": 4, "targets": ["o", "down"], "ratio": 4.0, "dropout": 0.1, "ranks": {"layers/0/*": 3}}
SGD = {"name": "sgd", "b1": 0.0, "weight_decay": 0.1, "clip": 0.3}


def three(**changes):
    """A run of three adapters."""
    return tiny(**merge_trees({"adapter": COMMON, "adapters": ADAPTERS, "optimizer": SGD}, changes))


def parts(config):
    """Slices of the global batch, by adapter."""
    stops = np.cumsum(list(adapter_rows(config).values()))
    return {
        name: slice(stop - rows, stop) for (name, rows), stop in zip(adapter_rows(config).items(), stops, strict=True)
    }


def numbered(config, batch):
    """The batch with whose each row is."""
    own = np.repeat(np.arange(len(config.adapters)), list(adapter_rows(config).values())).astype(np.int32)
    return batch | {"adapters": np.broadcast_to(own[:, None], batch["tokens"].shape)}


@functools.lru_cache(maxsize=8)
def _compiled(config_json):
    config = RunConfig.model_validate_json(config_json)
    program = build(config, make_mesh(config.mesh))
    return program, program.compiled_step()


@functools.lru_cache(maxsize=8)
def _run_all(config_json, steps):
    config = RunConfig.model_validate_json(config_json)
    program, step = _compiled(config_json)
    state, seen = program.initialize(), []
    for batch in batches(config, steps):
        state, metrics = step(state, make_global_arrays(numbered(config, batch), config, program.mesh))
        seen.append(metrics_to_host(metrics))
    return seen, jax.device_get(state)


def run_all(config, steps=4):
    """Metrics of every step and the last state of the run with all adapters."""
    return _run_all(config.model_dump_json(), steps)


def run_single(config, name, steps=4):
    """Metrics of every step and the last state of one adapter's run, on its own rows of the same batches."""
    one = single_adapter_run(config, name)
    program = build(one, make_mesh(one.mesh))
    state, step, seen = program.initialize(), program.compiled_step(), []
    for batch in batches(config, steps):
        own = {field: array[parts(config)[name]] for field, array in batch.items()}
        state, metrics = step(state, make_global_arrays(own, one, program.mesh))
        seen.append(metrics_to_host(metrics))
    return seen, state, program


PAIRS = {"source": "jsonl", "path": "nowhere", "format": "preference", "packing": {"method": "best-fit"}}
ALONE = {
    **{name: (name, {}) for name in ADAPTERS},
    "adamw": ("narrow", {"optimizer": {"name": "adamw", "ema": 0.9}}),
    "lion": ("wide", {"optimizer": {"name": "lion"}, "logging": {"spike": 2.0}}),
    "a quantized base, A frozen": (
        "narrow",
        {"quantization": {"format": "nf4", "group": 8}, "adapter": {"freeze_a": True}},
    ),
    "pairs": ("narrow", {"recipe": {"name": "orpo"}, "data": PAIRS}),
    "pairs and a reference": ("wide", {"recipe": {"name": "dpo"}, "data": PAIRS}),
}
SLOW = ("wide", "plain", "adamw", "lion", "a quantized base, A frozen", "pairs", "pairs and a reference")


@pytest.mark.parametrize(
    ("name", "changes"),
    [pytest.param(*one, id=key, marks=[pytest.mark.slow] * (key in SLOW)) for key, one in ALONE.items()],
)
def test_each_of_several_adapters_trains_as_in_a_run_of_its_own(name, changes):
    """Loss, norm, parameters and optimizer state; clipping, decay, dropout, LoRA+ and ranks by pattern among it."""
    config = three(**changes)
    metrics, state = run_all(config)
    own, last, program = run_single(config, name)
    for number, (all_of_them, one) in enumerate(zip(metrics, own, strict=True)):
        for key in ("loss", "tokens", "grad_norm", "learning_rate"):
            np.testing.assert_allclose(all_of_them[f"{name}/{key}"], one[key], rtol=2e-5, err_msg=f"{key}, {number}")
    if not changes:
        assert max(one["grad_norm"] for one in own) > config.optimizer.clip
    found = slice_state(state, program.shapes, number=list(ADAPTERS).index(name))
    for part in ("params", "opt_state", "frozen"):
        a, b = (to_canonical({part: getattr(one, part)}, config.model) for one in (last, found))
        assert_close(a, b, tolerance=2e-5 if "optimizer" in changes else 2e-6)


RAGGED = {"adapter": {"product": "ragged"}}
SAME = {
    "cut over data, fsdp and tensor, in parts": {"mesh": MESH, "microbatches": 2},
    "ragged": RAGGED,
    "ragged, on shards": RAGGED | {"mesh": {"data": 2, "fsdp": 2, "seq": 2}},
}


@pytest.mark.parametrize(
    "changes", [pytest.param(one, id=key, marks=[pytest.mark.slow] * (key == "ragged")) for key, one in SAME.items()]
)
def test_results_depend_neither_on_the_mesh_nor_on_the_adapter_product(changes):
    """On four shards one has rows of two adapters, and a microbatch of it of others than the next."""
    (plain, state), (other, moved) = run_all(three()), run_all(three(**changes))
    for one, two in zip(plain, other, strict=True):
        for key in one:
            np.testing.assert_allclose(one[key], two[key], rtol=2e-5, err_msg=key)
    a, b = (dict(jax.tree_util.tree_leaves_with_path(one.params)) for one in (state, moved))
    assert_close(a, b, tolerance=2e-6)


def test_an_adapter_with_nan_does_not_spoil_the_others():
    """Its update is skipped; the others make theirs, to the bit."""
    config = three()
    program, step = _compiled(config.model_dump_json())
    start = program.initialize()
    batch = make_global_arrays(numbered(config, batches(config, 1)[0]), config, program.mesh)
    broken = jax.tree.map(lambda leaf: leaf.at[1].set(jnp.nan), start.params)
    spoilt, metrics = step(dataclasses.replace(jax.tree.map(jnp.copy, start), params=broken), batch)
    whole, _ = step(start, batch)
    assert [bool(metrics[f"{name}/skipped"]) for name in ADAPTERS] == [False, True, False]
    for one, other in zip(jax.tree.leaves(whole.params), jax.tree.leaves(spoilt.params), strict=True):
        np.testing.assert_array_equal(one[::2], other[::2])
        assert np.isnan(other[1]).all()


def of_two(root, **changes):
    """A run of four steps of two adapters, each with a file of its own; `data` has settings of its own too."""
    two = {
        "digits": {"rows": 3, "rank": 2, "data": {"source": "jsonl", "path": str(root / "digits.jsonl")}},
        "letters": {"rows": 5, "learning_rate": 0.05, "data": {"source": "jsonl", "path": str(root / "letters.jsonl")}},
    }
    tree = {
        "name": "two",
        "steps": 4,
        "model": {"vocab": 384},
        "adapter": {"rank": 4, "targets": ["q", "v"]},
        "adapters": two,
        "data": {"source": None, "held_out": 0.2},
        "checkpoint": {"every": 2, "keep": 5},
        "logging": {"every": 1, "tensorboard": False},
    }
    return tiny(**merge_trees(tree, changes))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Where two files are, and the runs of both adapters and of each alone."""
    directory = tmp_path_factory.mktemp("several")
    for name, symbols in {"digits": "0123456789", "letters": "abcdefghijklmnop"}.items():
        random = np.random.default_rng(len(symbols))
        texts = ["".join(random.choice(list(symbols), random.integers(10, 40))) for _ in range(60)]
        (directory / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MESHWRIGHT_CACHE", str(directory / "cache"))
        yield directory


def test_a_run_of_two_adapters_equals_two_runs(root, tmp_path):
    """From their files to the held-out losses and what PEFT reads, also after a stop; and the order is the file's."""
    config = of_two(root)
    both = train(config, process_info=ProcessInfo(), root=root)
    shutil.rmtree(root / "two/checkpoints/4")
    again = train(config, process_info=ProcessInfo(), root=root)
    assert again.metrics["held_out_loss"] == both.metrics["held_out_loss"]
    found = evaluate(root / "two", [])
    names = export_adapter(root / "two", tmp_path / "both")
    written = ("adapter_config.json", "adapter_model.safetensors", "tokenizer.json")
    assert set(names) >= {f"{name}/{file}" for name in config.adapters for file in written}
    name = "letters"  # the second: its rows and its place are not the first ones
    one = train(single_adapter_run(config, name), process_info=ProcessInfo(), root=root)
    for key in ("loss", "tokens", "held_out_loss", "held_out_bits_per_byte"):
        assert both.metrics[f"{name}/{key}"] == pytest.approx(one.metrics[key], rel=1e-5), key
    assert found[f"{name}/held_out_loss"] == pytest.approx(one.metrics["held_out_loss"], rel=1e-5)
    export_adapter(root / f"two-{name}", tmp_path / name)
    assert (tmp_path / name / "adapter_config.json").read_text() == (
        tmp_path / "both" / name / "adapter_config.json"
    ).read_text()
    theirs, ours = (load_file(tmp_path / at / "adapter_model.safetensors") for at in (name, f"both/{name}"))
    assert theirs.keys() == ours.keys()
    for tensor, array in theirs.items():
        np.testing.assert_allclose(ours[tensor], array, atol=1e-5, err_msg=tensor)
    assert both.metrics["digits/held_out_loss"] != both.metrics["letters/held_out_loss"]


@pytest.mark.slow
def test_one_of_two_adapters_is_used_by_its_name(root, tmp_path):
    """Merged and sampled from; several without a name, and a name there is not, are refused."""
    train(of_two(root), process_info=ProcessInfo(), root=root)
    assert generate(root / "two", ["12"], adapter="digits", tokens=2, temperature=0, top_k=None, top_p=None, seed=0)
    names = export_run(root / "two", tmp_path / "merged", limit=10**9, adapter="letters")
    assert "model.safetensors" in names
    with pytest.raises(UserError, match="several adapters, digits, letters; choose one with --adapter"):
        export_run(root / "two", tmp_path / "none", limit=10**9)
    with pytest.raises(UserError, match=r"--adapter: digit matches nothing; .* Did you mean digits\?"):
        export_run(root / "two", tmp_path / "none", limit=10**9, adapter="digit")


@pytest.mark.slow
def test_each_adapter_uses_the_reference_of_its_own_rows(root):
    """DPO before the first update: every pair's loss is log 2, which it is by nobody else's numbers."""
    pairs = [{"prompt": f"{n}", "chosen": f"{n + 1}", "rejected": f"{7 * n % 91}"} for n in range(60)]
    (root / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    data = {"source": "jsonl", "path": str(root / "pairs.jsonl"), "format": "preference"}
    several = {"first": {"rows": 3, "data": {"documents": 40}}, "second": {"rows": 5, "rank": 2}}
    config = tiny(
        name="pairs",
        model={"vocab": 384},
        steps=2,
        adapter={"rank": 4},
        adapters=several,
        recipe={"name": "dpo"},
        data=data | {"packing": {"method": "best-fit"}, "held_out": 0.2, "sequence_length": 32},
        logging={"every": 1, "tensorboard": False},
    )
    found = train(config, process_info=ProcessInfo(), root=root)
    rows = metric_rows(root / "pairs")
    for name in several:
        assert rows[0][f"{name}/loss"] == pytest.approx(np.log(2), rel=1e-5)
        one = train(single_adapter_run(config, name), process_info=ProcessInfo(), root=root)
        assert found.metrics[f"{name}/held_out_loss"] == pytest.approx(one.metrics["held_out_loss"], rel=1e-5)
        assert found.metrics[f"{name}/loss"] == pytest.approx(one.metrics["loss"], rel=1e-5)
