"""docs/finetune/adapters.md's table of adapters: as many weights as the code trains."""

import math
import re
from pathlib import Path

import jax
import pytest

from meshwright.configs import loader
from meshwright.parallel.mesh import make_mesh
from meshwright.train.engine.program import build

PAGE = (Path(__file__).parents[3] / "docs" / "finetune" / "adapters.md").read_text()
TABLE = PAGE[PAGE.index("| `adapter.method` | trains |") :].partition("\n\n")[0]
ALONE = [
    "mesh={data: 1, fsdp: 1, tensor: 1, devices: 1}",
    "optimizer={name: adamw, schedule: cosine, decay_steps: null}",
]
# What a method must be told, or what the table says it was told.
TOLD = {"adalora": {"budget": {"rank": 8}}, "vera": {"rank": 256}, "tokens": {"tokens": [7]}}
ROWS = {row[1].strip(" `"): row[3].strip() for row in (line.split("|") for line in TABLE.splitlines()[2:])}
UNCOUNTED = {"bitfit", "selective", "fishmask", "lottery"}  # by the targets, or a share
COUNTED = ROWS.keys() - UNCOUNTED


def number(text):
    """The first number of a cell, 217,088 as 217088."""
    return int(re.match(r"[\d,]+", text)[0].replace(",", ""))


def trained(**adapter):
    """Weights that a run of the quickstart's model with this adapter trains."""
    config = loader.load_config("quickstart", overrides=[*ALONE, f"adapter={adapter}"])
    shapes = build(config, make_mesh(config.mesh)).shapes
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes.params))


@pytest.mark.parametrize("method", sorted(COUNTED))
def test_a_method_trains_what_the_page_counts(method):
    assert trained(method=method, **TOLD.get(method, {})) == number(ROWS[method])


def test_loras_variants_train_what_the_page_counts():
    thin, targeted = re.search(r"`freeze_a`: ([\d,]+); targets q, v: ([\d,]+)", ROWS["lora"]).groups()
    assert trained(method="lora", freeze_a=True) == number(thin)
    assert trained(method="lora", targets=["q", "v"]) == number(targeted)
