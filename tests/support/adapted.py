"""A model's weights before and after an adapter, and after the adapter has learned something."""

import jax
import numpy as np

from meshwright.models.adapters import attach
from meshwright.models.decoder import initial_params


def trees(model, adapter, *, scale):
    """(plain weights, fresh tree, tree with every leaf that learns moved by normal draws times `scale`)."""

    def born():
        base = initial_params(model, jax.random.key(0))
        return base, attach.init_adapters(base, model, adapter, jax.random.key(1))

    base, tree = jax.jit(born)()
    params, frozen = (attach.flatten(part) for part in attach.split_trained(tree, model, adapter))
    random = np.random.default_rng(1)
    moved = {path: leaf + scale * random.normal(size=leaf.shape).astype(np.float32) for path, leaf in params.items()}
    return base, tree, attach.unflatten(moved | frozen)
