"""Import and export by the functions of the command line: import, continue training, export."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file
from support.equivalence import tiny

from meshwright.configs.errors import UserError
from meshwright.configs.loader import dump_yaml, parse_yaml, validate_tree
from meshwright.parallel.layout import to_canonical
from meshwright.parallel.mesh import make_mesh
from meshwright.train.core.process_env import ProcessInfo
from meshwright.train.data.tokenizer import byte_tokenizer
from meshwright.train.engine.program import build
from meshwright.train.infer.import_export import export_run, import_directory
from meshwright.train.run import train

FIXTURES = Path(__file__).parents[2] / "models/families/fixtures"
BYTES = {"source": "synthetic", "tokenizer": {"bytes": True}, "sequence_length": 16, "global_batch": 8}


def read_tensors(directory):
    """Every tensor of a directory, by name."""
    return {name: array for file in directory.glob("model*.safetensors") for name, array in load_file(file).items()}


def test_import_then_export_gives_the_same_tensors_and_companions(tmp_path):
    source = tmp_path / "phi3"
    shutil.copytree(FIXTURES / "phi3", source)
    byte_tokenizer().save(source)
    (source / "chat_template.jinja").write_text("{{ messages }}")
    import_directory(source, tmp_path / "runs/phi3")
    shutil.rmtree(source)  # the run has all it needs
    written = export_run(tmp_path / "runs/phi3", tmp_path / "out", limit=5000)
    assert {"tokenizer.json", "chat_template.jinja", "config.json"} <= set(written)
    original, exported = read_tensors(FIXTURES / "phi3"), read_tensors(tmp_path / "out")
    assert original.keys() == exported.keys()
    for name, array in original.items():
        np.testing.assert_array_equal(exported[name], array)
    assert json.loads((tmp_path / "out/config.json").read_text())["eos_token_id"] == 256
    with pytest.raises(UserError, match="nothing is overwritten"):
        export_run(tmp_path / "runs/phi3", tmp_path / "out", limit=5000)


def test_training_starts_from_the_weights_on_any_mesh():
    """The state before step 0 holds the file's tensors, and equals the one on a single device."""
    original = load_file(FIXTURES / "qwen3/model.safetensors")
    for mesh in ({}, {"data": 2, "fsdp": 2, "tensor": 2}):
        tree = tiny(mesh=mesh).model_dump(mode="json") | {
            "model": {"from": str(FIXTURES / "qwen3"), "vocab_multiple": 8},
        }
        config = validate_tree(tree)
        params = to_canonical(build(config, make_mesh(config.mesh)).initialize().params, config.model)
        np.testing.assert_array_equal(params["embed/embedding"], original["model.embed_tokens.weight"])
        down = original["model.layers.1.mlp.down_proj.weight"].T
        np.testing.assert_array_equal(jax.device_get(params["layers/1/mlp/down/kernel"]), down)


def test_the_origin_fills_the_configuration_and_is_needed_once(tmp_path):
    """`data.tokenizer` is the model's own unless the user says otherwise; a resolved configuration needs no origin."""
    config = validate_tree(
        {"model": {"from": str(FIXTURES / "llama2"), "vocab": 384}, "steps": 2, "data": BYTES, "name": "tuned"}
        | {"logging": {"tensorboard": False}}
    )
    with pytest.raises(UserError, match="leave the sizes to config"):
        train(config, process_info=ProcessInfo(), root=tmp_path)
    inherited = validate_tree({"model": {"from": str(FIXTURES / "llama2")}})
    assert inherited.data.tokenizer.file == str(FIXTURES / "llama2") and inherited.model.vocab == 61
    tree = parse_yaml(dump_yaml(inherited), origin="config.yaml")
    tree["model"]["from"] = "gone"
    assert validate_tree(tree).model.layers == 2
