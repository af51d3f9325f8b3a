"""Pairs of replicas: the rounds of a tournament in which each replica meets every other once. NumPy only.

R replicas pair up in R - 1 rounds without any pair twice (R rounds where R is odd, one replica idle in each). An outer
step takes one of them at random, by a shared seed: nothing is negotiated, and on the mesh each is a fixed pattern.
"""

import numpy as np


def matchings(replicas: int) -> np.ndarray:
    """The partner of each replica in every round, int32 [rounds, replicas]; an idle replica is its own partner.

    The circle method: the last replica stays, the others move on by one position a round.

    >>> matchings(4)
    array([[3, 2, 1, 0],
           [1, 0, 3, 2],
           [2, 3, 0, 1]], dtype=int32)
    """
    if replicas == 1:
        return np.zeros((1, 1), np.int32)
    positions = replicas + replicas % 2  # an odd number pairs with a dummy
    moving = positions - 1
    table = np.empty((moving, positions), np.int32)
    for number in range(moving):
        circle = np.append((np.arange(moving) - number) % moving, moving)
        table[number, circle] = circle[::-1]
    itself = np.arange(replicas)
    return np.where(table[:, :replicas] == replicas, itself, table[:, :replicas]).astype(np.int32)


def matching_for_round(round_number: int, *, replicas: int, seed: int) -> int:
    """The row of `matchings(replicas)` for a synchronization round: uniform, the same on all replicas."""
    return int(np.random.default_rng((seed, round_number)).integers(len(matchings(replicas))))
