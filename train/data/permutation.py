"""Random permutations that are pure functions of a few integers, in all versions of numpy."""

import numpy as np


def permutation(count: int, *key: int) -> np.ndarray:
    """[count] int64: 0..count-1 in an order that depends on `count` and the non-negative integers of `key` only.

    Sorts raw bits of PCG64: numpy guarantees stable bit generators and SeedSequence, but not `Generator.permutation`.
    """
    seed = np.random.SeedSequence((len(key), *key))  # without the length (1, 2) and (1, 2, 0) would be equal
    bits = np.random.PCG64(seed).random_raw(count)
    return np.argsort(bits, kind="stable")
