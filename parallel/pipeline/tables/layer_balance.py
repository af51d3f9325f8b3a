"""How many layers each stage holds when the last one has more to do: the baseline `redistributed`. NumPy only."""

import heapq

import numpy as np

from ....configs.errors import UserError


def even(layers: int, *, stages: int) -> np.ndarray:
    """Layers of each stage, int [stages]; the first ones hold one more where they do not divide.

    >>> even(7, stages=3).tolist()
    [3, 2, 2]
    """
    return layers // stages + (np.arange(stages) < layers % stages).astype(int)


def redistributed(
    layers: int, *, stages: int, head_cost: float, embedding_cost: float = 0.0, fewest: int = 0
) -> np.ndarray:
    """Layers of each stage, int [stages], so that the slowest stage is as fast as it can be.

    Costs in units of one layer: the last stage also has the head, the first the embedding. Each layer in turn goes to
    the stage with the least to do, the last of equal ones, which hold fewer microbatches: optimal for equal layers. A
    head that costs more than a stage's share cannot be balanced so, and its parameters stay where they are. Source:
    "Redis" in Vocabulary Parallelism, arXiv:2411.05288.

    >>> redistributed(32, stages=8, head_cost=2.4).tolist()
    [4, 4, 4, 4, 4, 5, 5, 2]
    """
    if layers < stages * fewest:
        raise UserError(
            f"layers: {layers} do not give {stages} stages {fewest} each; use {layers // fewest} stages at most"
        )
    load = np.full(stages, float(fewest))
    load[0] += embedding_cost
    load[-1] += head_cost
    queue = [(cost, -stage) for stage, cost in enumerate(load.tolist())]
    heapq.heapify(queue)
    held = np.full(stages, fewest)
    for _ in range(layers - stages * fewest):
        cost, stage = heapq.heappop(queue)
        held[-stage] += 1
        heapq.heappush(queue, (cost + 1, stage))
    return held
