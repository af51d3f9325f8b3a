"""Random weights for tests: no weight has its initial value, so that no term is hidden by a one or a zero."""

from typing import Any

import jax
import numpy as np

from meshwright.configs.sections.model import ModelConfig
from meshwright.models.decoder import initial_params
from meshwright.parallel.layout import canonical_slices
from meshwright.parallel.sharding import path_name


def random_weights(model: ModelConfig) -> dict[str, Any]:
    """Parameters in the model's own layout; norms, biases and the vocabulary's padding are random too."""
    random = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: initial_params(model, jax.random.key(0)))
    return jax.tree.map(lambda leaf: 0.4 * random.normal(size=leaf.shape).astype(np.float32), shapes)


def by_canonical_name(model: ModelConfig, params: Any) -> dict[str, np.ndarray]:
    """`parallel.layout.canonical`, in numpy."""
    return {
        name: leaf[index]
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
        for name, index in canonical_slices(path_name(path), leaf.shape, model)
    }
