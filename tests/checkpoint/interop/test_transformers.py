"""With the extra `interop`: the same models in transformers itself, both directions, made while the test runs."""

import importlib.util
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from meshwright.checkpoint.interop import huggingface
from meshwright.configs.huggingface import to_config_json
from meshwright.configs.sections.model import FAMILIES, ModelConfig
from meshwright.models.decoder import initial_params

from .test_huggingface import logits, read

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SCRIPT = Path(__file__).parents[2] / "models/families/make_fixtures.py"
TOKENS = np.random.default_rng(0).integers(0, 61, (2, 80), dtype=np.int32)
TINY = {"vocab": 61, "vocab_multiple": 8, "layers": 7, "embed": 16, "heads": 4, "head_dim": 8, "mlp": 20}


def load_script():
    """The script that makes the fixtures, as a module."""
    spec = importlib.util.spec_from_file_location("make_fixtures", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


FIXTURE_SCRIPT = load_script()


def reference_logits(model):
    """Logits of a model of transformers, computed in float64."""
    with torch.no_grad():
        return model.double()(torch.from_numpy(TOKENS[:, :60]).long()).logits.float().numpy()


def assert_same(actual, expected):
    np.testing.assert_allclose(actual, expected, atol=1e-4 * np.abs(expected).max(), rtol=0)
    np.testing.assert_array_equal(actual.argmax(-1), expected.argmax(-1))


@pytest.mark.parametrize("name", sorted(FIXTURE_SCRIPT.CASES))
def test_a_model_of_transformers_computes_the_same_here(name, tmp_path):
    model = FIXTURE_SCRIPT.random_model(name, seed=7)
    model.save_pretrained(tmp_path)
    assert_same(logits(*read(tmp_path), TOKENS[:, :60]), reference_logits(model))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_of_ours_computes_the_same_there(family, tmp_path):
    """Loaded without a missing or an unexpected tensor."""
    own = {"head_dim": None, "max_positions": 80} if family == "gpt2" else {"kv_heads": 2}
    model = ModelConfig(**TINY | own, family=family)
    if "windows" in FAMILIES[family]:
        model = model.model_copy(update={"windows": tuple(w and 5 for w in model.windows)})
    random = np.random.default_rng(1)
    params = jax.tree.map(
        lambda leaf: leaf + 0.3 * random.normal(size=leaf.shape).astype(np.float32),
        initial_params(model, jax.random.key(0)),
    )
    tree = to_config_json(model, positions=80, dtype="float32")
    (tmp_path / "config.json").write_text(json.dumps(tree))
    huggingface.write(params, model, tmp_path, kind=tree["model_type"], limit=20_000)
    loaded, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation="eager", output_loading_info=True, dtype=torch.float32
    )
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    assert_same(logits(model, params, TOKENS[:, :60]), reference_logits(loaded.eval()))
