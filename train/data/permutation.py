"""Random order that is a pure function of a few integers, and stays so across versions of numpy."""

import numpy as np


def permutation(count: int, *key: int) -> np.ndarray:
    """[count] int64: 0..count-1 in an order that depends on `count` and the non-negative integers of `key` only.

    Sorts raw bits of PCG64: numpy keeps bit generators and SeedSequence stable for ever, `Generator.permutation` not.
    """
    seed = np.random.SeedSequence((len(key), *key))  # without the length, (1, 2) and (1, 2, 0) would be one key
    bits = np.random.PCG64(seed).random_raw(count)
    return np.argsort(bits, kind="stable")
