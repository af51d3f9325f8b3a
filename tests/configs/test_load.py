"""Configuration: composed, typed, and helpful about mistakes."""

import pytest

from meshwright.configs.errors import UserError
from meshwright.configs.load import dump, load, parse, validated

MISTAKES = {
    "misspelt section": ({"meshh": {}}, r"meshh: unknown key. Did you mean mesh\?"),
    "misspelt key of one of several": (
        {"adapters": {"one": {"data": {"pth": "x"}}}},
        r"adapters.one.data.pth: unknown key. Did you mean adapters.one.data.path\?",
    ),
    "a quantity that is none": ({"islands": {"patience": "abc"}}, r"islands.patience: 'abc' is no number with one of"),
    "misspelt key": ({"mesh": {"tensr": 2}}, r"mesh.tensr: unknown key. Did you mean mesh.tensor\?"),
    "another tool's key": ({"ici_fsdp_parallelism": 2}, r"Did you mean mesh.fsdp\?"),
    "right key, wrong place": ({"optimizer": {"sequence_length": 2}}, r"Did you mean data.sequence_length\?"),
    "wrong type": ({"steps": "many"}, r"steps: 'many': input should be a valid integer"),
    "heads": ({"model": {"heads": 3}, "mesh": {"tensor": 2}}, r"model.heads: 3 is not divisible by mesh.tensor \(2\)"),
    "batch": ({"data": {"global_batch": 6}, "mesh": {"data": 4}}, r"data.global_batch: 6 is not divisible by"),
    "devices": ({"mesh": {"data": 2, "devices": 3}}, r"mesh: data 2 is 2 devices, not 3"),
    "two open axes": ({"mesh": {"data": -1, "fsdp": -1}}, r"data, fsdp are all -1"),
    "an implementation elsewhere": (
        {"model": {"attention": "cudnn"}, "mesh": {"platform": "cpu"}},
        r"model.attention: cudnn needs a GPU and mesh.platform is cpu",
    ),
    "an axis not built": ({"mesh": {"expert": 2}}, r"mesh.expert: 2 is not supported yet"),
    "sequence": (
        {"data": {"sequence_length": 30}, "mesh": {"seq": 4}},
        r"data.sequence_length: 30 is not divisible by 8",
    ),
}


@pytest.mark.parametrize(("tree", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_line_with_key_value_and_remedy(tree, message):
    with pytest.raises(UserError, match=message):
        validated(tree)


def test_extends_and_overrides_compose(tmp_path):
    (tmp_path / "base.yaml").write_text("steps: 7\nmodel: {layers: 3, embed: 96}\n")
    (tmp_path / "child.yaml").write_text("extends: base.yaml\nmodel: {layers: 5}\n")
    config = load(tmp_path / "child.yaml", overrides=["model.heads=3", "optimizer.learning_rate=1e-2"])
    assert (config.steps, config.model.layers, config.model.embed, config.model.heads) == (7, 5, 96, 3)
    assert config.optimizer.learning_rate == 0.01


@pytest.mark.parametrize("base", ["finetune/lora.yaml", "finetune/lora"])
def test_a_recipe_is_extended_from_anywhere(tmp_path, base):
    """As every page of the documentation writes it; a file beside the one that extends comes first."""
    (tmp_path / "mine.yaml").write_text(f"extends: {base}\nadapter: {{rank: 5}}\n")
    assert load(tmp_path / "mine.yaml").adapter.model_dump() == load("finetune/lora").adapter.model_dump() | {"rank": 5}
    (tmp_path / "finetune").mkdir()
    (tmp_path / base).write_text("steps: 7\n")
    assert load(tmp_path / "mine.yaml").steps == 7
    (tmp_path / "other.yaml").write_text("extends: nowhere.yaml\n")
    with pytest.raises(UserError, match=r"nowhere\.yaml: cannot be read"):
        load(tmp_path / "other.yaml")


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_the_resolved_configuration_reads_back_equal(family):
    config = validated({"model": {"family": family, "layers": 6}})
    assert validated(parse(dump(config), origin="dump")) == config
