"""Hugging Face directories made by transformers: the same logits, the same tensors back, and only the bytes needed."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from meshwright.checkpoint.interop import huggingface
from meshwright.configs.errors import UserError
from meshwright.configs.huggingface import changed_keys, read_tables, to_config_json, to_model_section
from meshwright.configs.sections.model import ModelConfig
from meshwright.configs.sections.parallel import MeshConfig
from meshwright.models.context import Context, no_constraint
from meshwright.models.decoder import decoder_graphdef, initial_params
from meshwright.models.families import safetensors_files as storage
from meshwright.parallel import vocabulary
from meshwright.parallel.mesh import make_mesh
from meshwright.parallel.sharding import weight_shardings

FIXTURES = Path(__file__).parents[2] / "models/families/fixtures"
each_fixture = pytest.mark.parametrize("name", sorted(path.name for path in FIXTURES.iterdir()))


def read(directory, *, mesh=None, **settings):
    """(model, parameters) of a directory, on one device or on the axes of `mesh`."""
    model = ModelConfig(**{"from": str(directory), "vocab_multiple": 8, **settings})
    shapes = jax.eval_shape(lambda: initial_params(model, jax.random.key(0)))
    devices = make_mesh(MeshConfig(platform="cpu", **(mesh or {})))
    shardings = weight_shardings(shapes, mesh=devices, zero=3)
    return model, huggingface.read(directory, model, shapes=shapes, shardings=shardings)


def logits(model, params, tokens):
    """[rows, sequence, vocab]."""
    structure, positions = decoder_graphdef(model), jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)

    @jax.jit
    def run(params):
        decoder = nnx.merge(structure, params)
        hidden, _ = decoder.hidden(tokens, Context(positions=positions))
        return hidden, decoder.head_kernel(jnp.float32)

    hidden, kernel = run(params)
    found = vocabulary.compute_logits(
        hidden,
        kernel,
        vocab=model.vocab,
        softcap=model.logit_softcap,
        constrain=no_constraint,
    )
    return np.asarray(found)[..., : model.vocab]


def test_every_format_has_a_fixture():
    configs = [json.loads((directory / "config.json").read_text()) for directory in FIXTURES.iterdir()]
    assert {config["model_type"] for config in configs} == set(read_tables()[0])


@each_fixture
def test_logits_equal_those_of_transformers(name):
    expected = load_file(FIXTURES / name / "expected.safetensors")
    got = logits(*read(FIXTURES / name), expected["tokens"])
    np.testing.assert_allclose(got, expected["logits"], atol=1e-4 * np.abs(expected["logits"]).max(), rtol=0)
    np.testing.assert_array_equal(got.argmax(-1), expected["logits"].argmax(-1))


@each_fixture
def test_writing_returns_the_tensors_that_were_read(name, tmp_path):
    """Every tensor under its name and bit for bit, in files of at most 5 kB; config.json describes the same model."""
    model, params = read(FIXTURES / name)
    tree = to_config_json(model, positions=64, dtype="float32")
    assert tree["model_type"] == json.loads((FIXTURES / name / "config.json").read_text())["model_type"]
    assert not changed_keys(model, tree)
    huggingface.write(params, model, tmp_path, kind=tree["model_type"], limit=5000)
    written, made = {}, {}
    for file in tmp_path.glob("model*.safetensors"):
        written |= load_file(file)
    for file in (FIXTURES / name).glob("model*.safetensors"):
        made |= load_file(file)
    assert written.keys() == made.keys()
    for tensor, array in made.items():
        np.testing.assert_array_equal(written[tensor], array.astype(np.float32), err_msg=tensor)
    assert set(storage.WeightFiles(tmp_path)) == made.keys()


@pytest.mark.parametrize("name", ["phi3", "gpt2", "gemma3"])
def test_every_device_reads_only_its_block(name, monkeypatch):
    """The same arrays on data 2 x fsdp 2 x tensor 2; of a weight cut in four no read takes more than a quarter."""
    _, whole = read(FIXTURES / name)
    taken, part = [], storage.WeightFiles.read_region
    monkeypatch.setattr(storage.WeightFiles, "read_region", lambda *key: taken.append(part(*key)) or taken[-1])
    _, cut = read(FIXTURES / name, mesh={"data": 2, "fsdp": 2, "tensor": 2})
    for one, other in zip(jax.tree.leaves(whole), jax.tree.leaves(cut), strict=True):
        np.testing.assert_array_equal(one, other)
    kernel = cut["segments"]["0"]["0"]["block"]["attn"]["q"]["kernel"]
    assert {shard.data.size for shard in kernel.addressable_shards} == {kernel.size // 4}
    assert max(array.size for array in taken) <= max(leaf.size // 4 for leaf in jax.tree.leaves(cut)) + 61 * 16


REFUSED = {
    "another architecture": ({"model_type": "mamba"}, "mamba matches nothing; there are gemma"),
    "own code": ({"auto_map": {"AutoModel": "x.y"}}, "auto_map"),
    "quantized": ({"quantization_config": {"bits": 4}}, "quantization_config"),
    "activation": ({"hidden_act": "relu"}, "hidden_act: 'relu'"),
    "one bias of two": ({"attention_bias": True}, "mlp_bias is False"),
    "stretching": ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type: 'dynamic'"),
    "its old spelling": ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type: 'dynamic'"),
    "half a head": ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary"),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED)
def test_a_config_that_would_be_computed_differently_is_refused(changes, message):
    tree = json.loads((FIXTURES / "llama2/config.json").read_text())
    with pytest.raises(UserError, match=message):
        to_model_section(tree | changes)


def test_version_4_spells_the_same_model():
    """What transformers 4 writes and what 5 does, for the same three models."""
    for name in ("llama3", "gemma3", "qwen3"):
        model = ModelConfig(**{"from": str(FIXTURES / name)})
        tree = to_config_json(model, positions=64, dtype="float32")
        assert "rope_parameters" not in tree and not changed_keys(model, tree)


def test_defaults_of_absent_keys_are_transformers_own():
    """The text part of a Gemma 3 with images, as published: almost every key is left to the class."""
    text = {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34, "sliding_window": 1024,
            "model_type": "gemma3_text", "rope_scaling": {"factor": 8.0, "rope_type": "linear"}}  # fmt: skip
    model = ModelConfig(**to_model_section({"model_type": "gemma3", "text_config": text, "vision_config": {}}))
    assert (model.heads, model.kv_heads, model.head_dim, model.vocab) == (8, 4, 256, 262208)
    assert model.windows == (1024,) * 5 + (None,) and model.attention_scale == 1 / 16
    assert (model.rope.theta, model.rope.local_theta, model.rope.factor) == (1e6, 1e4, 8.0)


def test_null_and_absent_are_two_things():
    """Mistral's class has a window where a file says nothing; the later releases say null, and mean none."""
    tree = {"model_type": "mistral", "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
    assert to_model_section(tree)["windows"] == [4096] and to_model_section(tree | {"sliding_window": None})[
        "windows"
    ] == [None]


RENAMED = {
    "gpt2 as first published": ("gpt2", lambda name: name.removeprefix("transformer."), "h.0.attn.bias"),
    "gemma3 with an image tower": ("gemma3", lambda name: f"language_model.{name}", "vision_tower.x.weight"),
    "the same, by version 5": (
        "gemma3",
        lambda name: name.replace("model.", "model.language_model.", 1),
        "model.vision_tower.x.weight",
    ),
}


@pytest.mark.parametrize(("name", "rename", "extra_name"), RENAMED.values(), ids=RENAMED)
def test_tensors_under_other_names_are_read(name, rename, extra_name, tmp_path):
    tensors = load_file(FIXTURES / name / "model.safetensors")
    extra = {extra_name: np.ones((2, 2), np.float32)}
    save_file({rename(tensor): array for tensor, array in tensors.items()} | extra, tmp_path / "model.safetensors")
    tree = json.loads((FIXTURES / name / "config.json").read_text())
    if name == "gemma3":
        tree = {"model_type": "gemma3", "text_config": tree, "vision_config": {}}
    (tmp_path / "config.json").write_text(json.dumps(tree))
    for one, other in zip(*(jax.tree.leaves(read(place)[1]) for place in (tmp_path, FIXTURES / name)), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_directory_that_is_not_its_config_is_refused(tmp_path):
    for name, change, words in [
        ("a tensor too many", {"num_hidden_layers": 1}, "model.layers.1.*do not belong to the model"),
        ("a tensor missing", {"num_hidden_layers": 3}, "model.layers.2.*matches nothing"),
        ("another size", {"intermediate_size": 24}, r"model\.from: .*is \[16, 20\], .* \[16, 24\]"),
    ]:
        shutil.copytree(FIXTURES / "llama2", tmp_path / name)
        file = tmp_path / name / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | change))
        with pytest.raises(UserError, match=words):
            read(tmp_path / name)
    with pytest.raises(UserError, match=r"no readable config\.json"):
        read(tmp_path / "nowhere")
    (tmp_path / "another size/model.safetensors").unlink()
    with pytest.raises(UserError, match="pickled weights"):
        read(tmp_path / "another size", mlp=20)


def test_an_export_no_format_holds_names_the_key():
    with pytest.raises(UserError, match=r"model.parallel_block"):
        to_config_json(ModelConfig(family="qwen3", parallel_block=True), positions=64, dtype="float32")
    biased = ModelConfig(family="llama", qkv_bias=True, norm_epsilon=1e-6)
    assert to_config_json(biased, positions=64, dtype="float32")["model_type"] == "qwen2"
