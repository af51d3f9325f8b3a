"""The knobs are a list in the repository: a new one changes `keys.txt` in the same commit, where a reviewer sees it."""

from pathlib import Path

from meshwright.configs.aliases import FOREIGN_KEYS
from meshwright.configs.loader import keys


def test_the_keys_are_the_listed_ones():
    """To accept a change: python -c "from meshwright.configs.loader import keys; print(*sorted(keys()), sep='\\n')"."""
    assert sorted(set(keys())) == (Path(__file__).parent / "keys.txt").read_text().split()


def test_what_other_tools_call_our_keys_leads_to_keys_or_to_what_is_planned():
    planned = ("adapter.", "mesh.pipe", "mesh.expert", "mesh.replica")
    unknown = {ours for ours in FOREIGN_KEYS.values() if ours not in set(keys()) and not ours.startswith(planned)}
    assert not unknown
