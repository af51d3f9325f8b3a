"""The keys are a list in the repository: a new key changes `keys.txt` in the same commit, where a reviewer sees it."""

from pathlib import Path

import yaml

from meshwright.configs import aliases
from meshwright.configs.aliases import key_aliases
from meshwright.configs.loader import schema_keys


def test_the_keys_equal_the_list():
    """`from meshwright.configs.loader import schema_keys; print(*sorted(set(schema_keys())))` prints the new list."""
    assert sorted(set(schema_keys())) == (Path(__file__).parent / "keys.txt").read_text().split()


def test_aliases_of_other_tools_name_keys_that_exist():
    assert not set(key_aliases().values()) - set(schema_keys())


def test_no_alias_has_two_meanings():
    tools = yaml.safe_load((Path(aliases.__file__).parent / "aliases.yaml").read_text())
    assert sum(map(len, tools.values())) == len(key_aliases())
