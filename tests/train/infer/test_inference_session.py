"""A run of any mesh can be used on one device."""

import pytest

from meshwright.configs.loader import dump_yaml, load_config, recipe_names
from meshwright.train.infer.inference_session import inference_config


@pytest.mark.parametrize("recipe", recipe_names())
def test_a_run_of_every_recipe_can_be_used_on_one_device(recipe, tmp_path):
    (tmp_path / "config.yaml").write_text(dump_yaml(load_config(recipe)))
    config = inference_config(tmp_path, [])
    assert set(config.mesh.sizes.values()) == {1} and config.outer is None
