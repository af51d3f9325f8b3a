"""A model's weights before and after an adapter is added, and after the adapter has changed."""

import jax
import numpy as np

from meshwright.models.adapters import attach
from meshwright.models.decoder import initial_params


def adapted_weights(model, adapter, *, scale):
    """(plain weights, with a new adapter, with every trained leaf changed by normal noise times `scale`)."""

    def create():
        base = initial_params(model, jax.random.key(0))
        return base, attach.init_adapters(base, model, adapter, jax.random.key(1))

    base, tree = jax.jit(create)()
    params, frozen = (attach.flatten(part) for part in attach.split_trained(tree, model, adapter))
    random = np.random.default_rng(1)
    changed = {path: leaf + scale * random.normal(size=leaf.shape).astype(np.float32) for path, leaf in params.items()}
    return base, tree, attach.unflatten(changed | frozen)
