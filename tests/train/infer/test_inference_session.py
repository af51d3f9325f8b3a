"""Runs are used on one device, whatever they were trained on."""

import pytest

from meshwright.configs.loader import dump, load, recipes
from meshwright.train.infer.inference_session import read


@pytest.mark.parametrize("recipe", recipes())
def test_a_run_of_every_recipe_can_be_used_on_one_device(recipe, tmp_path):
    (tmp_path / "config.yaml").write_text(dump(load(recipe)))
    config = read(tmp_path, [])
    assert set(config.mesh.sizes.values()) == {1} and config.outer is None
