"""The cost of waiting for other replicas: a tree all-reduce over all of them, and an exchange in pairs. NumPy only.

A message takes a log-normal time of median 1 and spread sigma. An all-reduce goes up and down a tree of ceil(log2 n)
levels, each of which waits for the slower of two messages; a pair waits for the slower of its two, in both directions:

    E[max(t1, t2)] = (1 + erf(sigma / 2)) exp(sigma^2 / 2)
    tree / pair = log2 n

Replicas whose inner steps take log-normal times wait for the slowest of all before an all-reduce, but only for their
partner before an exchange in pairs. Source: NoLoCo, arXiv:2506.10911, section 4 and appendix.
"""

import math
from typing import NamedTuple

import numpy as np


def slower_of_two(sigma: float) -> float:
    """Expected time of the slower of two messages, in medians of one.

    >>> round(slower_of_two(0.0), 3), round(slower_of_two(1.0), 3)
    (1.0, 2.507)
    """
    return (1 + math.erf(sigma / 2)) * math.exp(sigma**2 / 2)


def tree_seconds(replicas: int, sigma: float) -> float:
    """Expected time of a tree all-reduce, in medians of one message."""
    return 2 * math.ceil(math.log2(replicas)) * slower_of_two(sigma)


def pair_seconds(sigma: float) -> float:
    """Expected time of an exchange in pairs: two messages at once, twice; in medians of one message."""
    return 2 * slower_of_two(sigma)


class WaitingCost(NamedTuple):
    """Time of a run over its time of computing alone, on average over the replicas."""

    all_reduce: float
    pairs: float


def waiting_cost(replicas: int, *, steps: int, sigma: float, rounds: int = 50, seed: int = 0) -> WaitingCost:
    """Simulate `rounds` of `steps` inner steps, a step taking exp(sigma * normal); messages take no time.

    A replica's time of a round is a sum of many steps, drawn as the normal of the same mean and variance.
    """
    random = np.random.default_rng(seed)
    mean = steps * math.exp(sigma**2 / 2)
    deviation = math.sqrt(steps * (math.exp(sigma**2) - 1) * math.exp(sigma**2))
    all_reduce, clocks = 0.0, np.zeros(replicas)
    for _ in range(rounds):
        times = np.maximum(mean + deviation * random.normal(size=replicas), 0)
        all_reduce += times.max()
        clocks += times
        pairs = random.permutation(replicas)[: replicas // 2 * 2].reshape(-1, 2)
        clocks[pairs] = clocks[pairs].max(axis=1, keepdims=True)
    return WaitingCost(float(all_reduce) / (rounds * mean), float(clocks.mean()) / (rounds * mean))
