"""Adapters as PEFT keeps them: names and shapes, there and back; with the extra `interop`, PEFT's own outputs."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from meshwright.checkpoint.interop import huggingface, peft
from meshwright.configs.errors import UserError
from meshwright.configs.sections.adapter import AdapterConfig
from meshwright.models.adapters import attach, peft_prompt, peft_writer
from meshwright.models.adapters.merge import merge_adapters
from meshwright.models.context import Context, no_constraint
from meshwright.models.decoder import decoder_graphdef
from meshwright.parallel import vocabulary

from .test_huggingface import FIXTURES, read

# PEFT asks models by a name that transformers means to remove, and makes a sparse tensor (SHiRA) without a check.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning"),
]

TOKENS = np.random.default_rng(0).integers(0, 61, (2, 40), dtype=np.int32)
PATTERNS = {"rank": 4, "alpha": 6.0, "ranks": {"layers/0/*": 2}, "alphas": {"v": 3.0}, "targets": ["q", "v", "down"]}
CASES = {
    "lora on qwen3": ("qwen3", {"method": "lora", "rank": 4, "alpha": 8.0}),
    "patterns": ("llama3", {"method": "lora", **PATTERNS}),
    "patterns, rank-stabilized": ("llama3", {"method": "lora", "rank_stabilized": True, **PATTERNS}),
    "dora on one layer": ("llama3", {"method": "dora", "rank": 2, "targets": ["layers/1/*"]}),
    "pissa": ("llama3", {"method": "lora", "start": "pissa", "rank": 2, "targets": ["q", "up"]}),
    "dora from olora": ("llama3", {"method": "dora", "start": "olora", "rank": 2, "alpha": 3.0, "targets": ["q"]}),
    "lora on fused maps": ("gpt2", {"method": "lora", "rank": 3, "targets": ["q", "v", "up", "mlp/down"]}),
    "dora on fused maps": ("phi3", {"method": "dora", "rank": 3, "targets": ["q", "gate", "o"]}),
    "vera": ("llama3", {"method": "vera", "rank": 6, "targets": ["q", "v"]}),
    "ia3": ("llama3", {"method": "ia3"}),
    "adalora": (
        "llama3",
        {"method": "adalora", "rank": 9, "alpha": 6.0, "targets": ["o", "down"]},
    ),
    "oft": ("llama3", {"method": "oft", "block": 4, "targets": ["q", "o", "down"]}),
    "shira": ("llama3", {"method": "shira", "rank": 2, "targets": ["layers/1/attn/q", "o", "down"]}),
    "ia3 on fused maps": ("gpt2", {"method": "ia3"}),
    "prefix": ("llama3", {"method": "prefix", "length": 3}),
    "prompt": ("gpt2", {"method": "prompt", "length": 3}),
    "p-tuning": ("llama3", {"method": "p-tuning", "length": 3}),
    "tokens": ("llama3", {"method": "tokens", "tokens": [3, 17]}),
}
ELSEWHERE = ("prefix", "prompt", "p-tuning", "tokens")
each_case = pytest.mark.parametrize(("name", "settings"), CASES.values(), ids=CASES)


def logits(model, adapter, tree):
    """[rows, sequence, vocab] of an adapted model."""
    structure = decoder_graphdef(model, attach.adapter_inserter(model, adapter))

    @jax.jit
    def run(tree):
        decoder = nnx.merge(structure, tree)
        hidden, _ = decoder.hidden(TOKENS, Context(positions=jnp.broadcast_to(jnp.arange(40), TOKENS.shape)))
        return hidden, decoder.head_kernel(jnp.float32)

    hidden, kernel = run(tree)
    found = vocabulary.compute_logits(
        hidden, kernel, vocab=model.vocab, softcap=model.logit_softcap, constrain=no_constraint
    )
    return np.asarray(found)[..., : model.vocab]


def adapted(name, settings):
    """(model, adapter, tree before the first step, tree with every trained leaf moved)."""
    model, weights = read(FIXTURES / name)
    adapter = AdapterConfig(**settings)
    start = jax.jit(lambda weights: attach.init_adapters(weights, model, adapter, jax.random.key(1)))(weights)
    params, frozen = (attach.flatten(part) for part in attach.split_trained(start, model, adapter))
    random = np.random.default_rng(1)
    params = {path: leaf + 0.2 * random.normal(size=leaf.shape).astype(np.float32) for path, leaf in params.items()}
    return model, adapter, start, attach.unflatten(params | frozen)


def written(name, settings, directory):
    model, adapter, start, tree = adapted(name, settings)
    kind = json.loads((FIXTURES / name / "config.json").read_text())["model_type"]
    peft.write(tree, model, adapter, directory, kind=kind, initial_tree=lambda: start)
    return model, kind, adapter, tree


def plain(model, adapter, tree):
    """The weights with the adapter in them: what it computes, without computing."""
    return jax.device_get(jax.jit(lambda tree: merge_adapters(tree, model, adapter))(tree))


def assert_same(actual, expected):
    np.testing.assert_allclose(actual, expected, atol=1e-5 * np.abs(expected).max(), rtol=0)


@each_case
def test_what_is_written_reads_back_as_the_same_function(name, settings, tmp_path):
    model, kind, adapter, tree = written(name, settings, tmp_path)
    if settings["method"] in ELSEWHERE:
        found = peft.read(tmp_path, model, kind=kind)
        fresh = attach.init_adapters(read(FIXTURES / name)[1], model, found.adapter, jax.random.key(2))
        assert_same(logits(model, found.adapter, peft.load_adapters(fresh, found, model)), logits(model, adapter, tree))
        return
    wanted = plain(model, adapter, tree)
    found = peft.read(tmp_path, model, kind=kind)
    _, weights = read(FIXTURES / name)
    start = jax.jit(lambda weights: attach.init_adapters(weights, model, found.adapter, jax.random.key(2)))(weights)
    got = plain(model, found.adapter, peft.load_adapters(start, found, model))
    jax.tree.map(assert_same, got, wanted)
    moved = jax.tree.map(lambda one, other: np.abs(one - other).max() > 0.01, wanted, jax.device_get(weights))
    assert any(jax.tree.leaves(moved))


def test_every_method_that_peft_has_is_among_the_cases():
    assert {settings["method"] for _, settings in CASES.values()} == {*peft_writer.PEFT_TYPES, *peft_prompt.PEFT_TYPES}


def test_names_and_shapes_are_pefts_own(tmp_path):
    """As dumped from PEFT 0.21: one module of each method."""
    wanted = {
        "dora on one layer": {"q_proj.lora_A.weight": (2, 16), "q_proj.lora_B.weight": (32, 2),
                              "q_proj.lora_magnitude_vector": (32,)},
        "vera": {"q_proj.vera_lambda_b": (32,), "q_proj.vera_lambda_d": (6,)},
        "ia3": {"k_proj.ia3_l": (16, 1)},
    }  # fmt: skip
    for case, shapes in wanted.items():
        written(*CASES[case], tmp_path)
        found = {name: array.shape for name, array in load_file(tmp_path / peft.WEIGHTS).items()}
        for name, shape in shapes.items():
            assert found[f"base_model.model.model.layers.1.self_attn.{name}"] == shape
    assert found["base_model.model.model.layers.1.mlp.down_proj.ia3_l"] == (1, 20)
    config = json.loads((tmp_path / peft.CONFIG).read_text())
    assert config["target_modules"] == ["down_proj", "k_proj", "v_proj"]
    assert config["feedforward_modules"] == ["down_proj"] and config["peft_type"] == "IA3"
    written(*CASES["vera"], tmp_path)
    shared = load_file(tmp_path / peft.WEIGHTS)
    assert shared["base_model.vera_A"].shape == (6, 16) and shared["base_model.vera_B"].shape == (32, 6)


def test_what_an_adapter_asks_for_beyond_this_is_refused(tmp_path):
    model, kind, *_ = written(*CASES["patterns"], tmp_path)
    config = json.loads((tmp_path / peft.CONFIG).read_text())
    tensors = load_file(tmp_path / peft.WEIGHTS)
    for changes, words in [
        ({"peft_type": "LOHA"}, "LOHA matches nothing; there are ADALORA, IA3, LORA, OFT, "),
        ({"bias": "all"}, "bias: 'all' is not supported"),
        ({"init_lora_weights": "pissa"}, "changes the base model too"),
    ]:
        (tmp_path / peft.CONFIG).write_text(json.dumps(config | changes))
        with pytest.raises(UserError, match=words):
            peft.read(tmp_path, model, kind=kind)
    (tmp_path / peft.CONFIG).write_text(json.dumps(config))
    save_file(tensors | {"base_model.model.lm_head.weight": np.zeros((2, 2), np.float32)}, tmp_path / peft.WEIGHTS)
    with pytest.raises(UserError, match=r"adapter_model.safetensors: .*lm_head.weight"):
        peft.read(tmp_path, model, kind=kind)
    with pytest.raises(UserError, match="not an adapter"):
        peft.read(tmp_path / "nowhere", model, kind=kind)


@pytest.mark.parametrize("version", [{}, {"peft_version": "0.17.1"}], ids=["unnamed", "0.17.1"])
def test_rotations_by_an_older_series_are_refused(version, tmp_path):
    model, kind, *_ = written(*CASES["oft"], tmp_path)
    config = json.loads((tmp_path / peft.CONFIG).read_text())
    assert config.pop("peft_version") == "0.18.0"
    (tmp_path / peft.CONFIG).write_text(json.dumps(config | version))
    with pytest.raises(UserError, match=r"peft_version: 0\.\d+\.\d .* 0.18"):
        peft.read(tmp_path, model, kind=kind)


def library(name):
    """PEFT, and the model in a fixture as transformers loads it."""
    torch = pytest.importorskip("torch")
    found = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        FIXTURES / name, attn_implementation="eager", dtype=torch.float32
    )
    return torch, found, model.eval()


def answers(torch, model):
    """Logits of the tokens, without those of virtual ones."""
    return model(torch.from_numpy(TOKENS).long()).logits.numpy()[:, -TOKENS.shape[1] :]


@each_case
def test_peft_computes_the_same_with_our_files(name, settings, tmp_path):
    torch, library_of, base = library(name)
    own, _, adapter, tree = written(name, settings, tmp_path)
    wanted = logits(own, adapter, tree)
    model = library_of.PeftModel.from_pretrained(base, tmp_path).eval()
    with torch.no_grad():
        assert_same(answers(torch, model), wanted)


THEIRS = {
    "lora": ("qwen3", "LoraConfig", {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}),
    "rslora, patterns": (
        "llama3",
        "LoraConfig",
        {"r": 4, "use_rslora": True, "target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1]}
        | {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.self_attn.v_proj": 3}},
    ),
    "dora": ("gpt2", "LoraConfig", {"r": 3, "use_dora": True, "target_modules": ["c_attn"], "fan_in_fan_out": True}),
    "vera": ("llama3", "VeraConfig", {"r": 6, "target_modules": ["q_proj", "o_proj"]}),
    "prefix": ("llama3", "PrefixTuningConfig", {"num_virtual_tokens": 4}),
    "prompt": ("gpt2", "PromptTuningConfig", {"num_virtual_tokens": 4}),
    "p-tuning": ("llama3", "PromptEncoderConfig", {"num_virtual_tokens": 4, "encoder_hidden_size": 8}),
    "tokens": ("llama3", "TrainableTokensConfig", {"token_indices": [2, 9], "target_modules": ["embed_tokens"]}),
    "adalora": (
        "llama3",
        "AdaLoraConfig",
        {"init_r": 4, "target_r": 2, "lora_alpha": 6, "total_step": 9, "target_modules": ["q_proj", "down_proj"]},
    ),
    "oft": ("llama3", "OFTConfig", {"oft_block_size": 4, "target_modules": ["q_proj", "down_proj"]}),
    "shira": ("llama3", "ShiraConfig", {"r": 2, "target_modules": ["q_proj", "o_proj"]}),
    "ia3": ("phi3", "IA3Config", {"target_modules": ["qkv_proj", "down_proj"], "feedforward_modules": ["down_proj"]}),
}


@pytest.mark.parametrize(("name", "config", "settings"), THEIRS.values(), ids=THEIRS)
def test_pefts_own_files_compute_the_same_here(name, config, settings, tmp_path):
    torch, library_of, base = library(name)
    torch.manual_seed(0)
    model = library_of.get_peft_model(base, getattr(library_of, config)(task_type="CAUSAL_LM", **settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
        wanted = answers(torch, model)
    model.save_pretrained(tmp_path)
    own, weights = read(FIXTURES / name)
    found = peft.read(tmp_path, own, kind=huggingface.format_kind(own))
    tree = attach.init_adapters(weights, own, found.adapter, jax.random.key(2))
    assert_same(logits(own, found.adapter, peft.load_adapters(tree, found, own)), wanted)
