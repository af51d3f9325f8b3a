"""Who exchanges with whom: the rounds of a tournament in which each replica meets every other once. NumPy only.

R replicas pair up in R - 1 ways without any pair twice (R ways where R is odd, one replica idle in each). A meeting
takes one of them at random, by a seed that all share: nobody negotiates, and on the mesh each way is a fixed pattern.
"""

import numpy as np


def matchings(replicas: int) -> np.ndarray:
    """Partner of each replica in every round, int32 [rounds, replicas]; who sits out is its own partner.

    The circle method: the last replica stays, the others move on by one place a round.

    >>> matchings(4)
    array([[3, 2, 1, 0],
           [1, 0, 3, 2],
           [2, 3, 0, 1]], dtype=int32)
    """
    if replicas == 1:
        return np.zeros((1, 1), np.int32)
    seats = replicas + replicas % 2  # an odd number meets an empty seat
    moving = seats - 1
    table = np.empty((moving, seats), np.int32)
    for turn in range(moving):
        circle = np.append((np.arange(moving) - turn) % moving, moving)
        table[turn, circle] = circle[::-1]
    if seats == replicas:
        return table
    own = np.arange(replicas)
    return np.where(table[:, :replicas] == replicas, own, table[:, :replicas]).astype(np.int32)


def chosen(meeting: int, *, replicas: int, seed: int) -> int:
    """Row of `matchings(replicas)` that meeting number `meeting` of a run takes: uniform, the same for everybody."""
    return int(np.random.default_rng((seed, meeting)).integers(len(matchings(replicas))))
