"""Loading a configuration: composition, types, and helpful errors."""

import pytest
import yaml

from meshwright.configs.errors import UserError
from meshwright.configs.loader import (
    copy_recipe,
    dump_yaml,
    find_config,
    load_config,
    parse_yaml,
    read_tree,
    recipe_names,
    validate_tree,
)
from meshwright.configs.sections.model import FAMILIES

MISTAKES = {
    "misspelt section": ({"meshh": {}}, r"meshh: unknown key. Did you mean mesh\?"),
    "misspelt key of one of several": (
        {"adapters": {"one": {"data": {"pth": "x"}}}},
        r"adapters.one.data.pth: unknown key. Did you mean adapters.one.data.path\?",
    ),
    "a quantity that is none": ({"islands": {"patience": "abc"}}, r"islands.patience: 'abc' .*ms, s, m"),
    "misspelt key": ({"mesh": {"tensr": 2}}, r"mesh.tensr: unknown key. Did you mean mesh.tensor\?"),
    "another tool's key": ({"ici_fsdp_parallelism": 2}, r"Did you mean mesh.fsdp\?"),
    "right key, wrong place": ({"optimizer": {"sequence_length": 2}}, r"Did you mean data.sequence_length\?"),
    "wrong type": ({"steps": "many"}, r"steps: 'many': input should be a valid integer"),
    "heads": ({"model": {"heads": 3}, "mesh": {"tensor": 2}}, r"model.heads: 3 is not divisible by mesh.tensor \(2\)"),
    "batch": ({"data": {"global_batch": 6}, "mesh": {"data": 4}}, r"data.global_batch: 6 is not divisible by"),
    "devices": ({"mesh": {"data": 2, "devices": 3}}, r"mesh: data 2 is 2 devices, not 3"),
    "a section that is none": ({"model": 5}, r"model: 5: input should be a mapping .* such as \{from: \.\.\.\}"),
    "PEFT's shortest key": ({"adapter": {"r": 4}}, r"adapter.r: unknown key. Did you mean adapter.rank\?"),
    "a key of no likeness": ({"memory": {"zz": 4}}, r"memory.zz: unknown key. There are loss_chunks, names, policy"),
    "a key of several sections": ({"model": {"path": "x"}}, r"Did you mean data.path\?"),
    "a setting of another method": (
        {"adapter": {"method": "ia3", "alpha": 32}},
        r"adapter.alpha: 32.0 .*ia3; remove it \(adapter.alpha=null where another file sets it\)",
    ),
    "hours for minutes": (
        parse_yaml("launch: {slurm: {time: 24:00:00}}", origin=""),
        r"launch.slurm.time: '24:00:00': input",
    ),
    "neither of two kinds": ({"checkpoint": {"every": 0.5}}, r"^checkpoint.every: 0.5: .*integer.*; or .* 'auto'$"),
    "a word for a list": ({"evaluation": {"prompts": "def"}}, r"evaluation.prompts: 'def': .* such as \[def\]"),
    "two open axes": ({"mesh": {"data": -1, "fsdp": -1}}, r"data, fsdp are all -1"),
    "an implementation elsewhere": (
        {"model": {"attention": "cudnn"}, "mesh": {"platform": "cpu"}},
        r"model.attention: cudnn .*mesh.platform is cpu",
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
        validate_tree(tree)


def test_extends_and_overrides_compose(tmp_path):
    (tmp_path / "base.yaml").write_text("steps: 7\nmodel: {layers: 3, embed: 96}\n")
    (tmp_path / "child.yaml").write_text("extends: base.yaml\nmodel: {layers: 5}\n")
    config = load_config(tmp_path / "child.yaml", overrides=["model.heads=3", "optimizer.learning_rate=1e-2"])
    assert (config.steps, config.model.layers, config.model.embed, config.model.heads) == (7, 5, 96, 3)
    assert config.optimizer.learning_rate == 0.01


@pytest.mark.parametrize("base", ["finetune/lora.yaml", "finetune/lora"])
def test_a_recipe_can_be_extended_from_any_directory(tmp_path, base):
    """As the documentation writes it; a file in the same directory comes first."""
    (tmp_path / "mine.yaml").write_text(f"extends: {base}\nadapter: {{rank: 5}}\n")
    assert load_config(tmp_path / "mine.yaml").adapter.model_dump() == load_config(
        "finetune/lora"
    ).adapter.model_dump() | {"rank": 5}
    (tmp_path / "finetune").mkdir()
    (tmp_path / base).write_text("steps: 7\n")
    assert load_config(tmp_path / "mine.yaml").steps == 7


UNREADABLE = {
    "extends nothing": (
        "extends: quikstart.yaml",
        r"extends: quikstart.yaml .* mean quickstart\?",
    ),
    "extends two": ("extends: [a, b]", r"mine.yaml: extends: \['a', 'b'\]"),
    "a key twice": ("mesh: {data: 2,\n  data: 4}", r"data .*line 1.* at line 2"),
    "not YAML": ("name: [x", r"mine.yaml: not valid YAML: while parsing a flow sequence at line 1, column 7"),
    "a text": ("just words", r"mine.yaml: 'just words' is not a mapping"),
}


@pytest.mark.parametrize(("text", "message"), UNREADABLE.values(), ids=UNREADABLE)
def test_the_error_of_an_unreadable_file_names_line_and_reason(tmp_path, text, message):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        load_config(tmp_path / "mine.yaml")


def test_the_same_key_in_two_mappings_is_no_duplicate():
    assert parse_yaml("one: {path: a}\nother: &b {path: b}\nthird: {<<: *b, path: c}", origin="") == {
        "one": {"path": "a"},
        "other": {"path": "b"},
        "third": {"path": "c"},
    }


@pytest.mark.parametrize("text", ["0", "-5", "007", "0x1F", "1_000", ".5", "1.0e-3", "-.inf", "1e-3", "true", "null"])
def test_numbers_are_those_of_yaml_except_in_base_60(text):
    assert parse_yaml(text, origin="") == yaml.safe_load(text)
    assert yaml.safe_load("24:00:00") == 86400 and parse_yaml("24:00:00", origin="") == "24:00:00"


def test_the_error_tells_typos_folders_and_model_directories_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").touch()
    (tmp_path / "mine.yaml").touch()
    for word, message in {
        "mine.yml": r"mine.yml .* Did you mean mine.yaml\?",
        "quikstart": r"recipes ls.*Did you mean quickstart\?",
        "finetune": r"CONFIG: finetune .*finetune/distill, ",
        "model": r"CONFIG: model .*model.from: model",
        ".": r"CONFIG: \. is a directory",
    }.items():
        with pytest.raises(UserError, match=message):
            load_config(word)


@pytest.mark.parametrize("name", recipe_names())
def test_a_copied_recipe_is_the_same_run_in_any_directory(tmp_path, name):
    copy_recipe(find_config(name), tmp_path / "mine.yaml")
    assert read_tree(tmp_path / "mine.yaml") == read_tree(find_config(name))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_resolved_configuration_reads_back_equal(family):
    config = validate_tree({"model": {"family": family, "layers": 6}})
    assert validate_tree(parse_yaml(dump_yaml(config), origin="dump")) == config
