"""Layers of each stage: evenly, or so that a stage with embedding or head holds fewer. NumPy only."""

import heapq

import numpy as np

from ....configs.errors import UserError


def even_layers(layers: int, *, stages: int) -> np.ndarray:
    """Layers of each stage, int [stages]; the first stages hold one more where they do not divide.

    >>> even_layers(7, stages=3).tolist()
    [3, 2, 2]
    """
    return layers // stages + (np.arange(stages) < layers % stages).astype(int)


def redistribute_layers(
    layers: int, *, stages: int, head_cost: float, embedding_cost: float = 0.0, min_layers: int = 0
) -> np.ndarray:
    """Layers of each stage, int [stages], at least `min_layers`, so that the slowest stage is as fast as possible.

    Costs are in units of one layer: the last stage also has the head, the first the embedding. Each layer in turn goes
    to the stage with the least load; of equal ones to the last, which holds fewer microbatches. This is optimal for
    equal layers. A head that costs more than a stage's share cannot be balanced so, and its parameters do not move.
    Source: "Redis" in Vocabulary Parallelism, arXiv:2411.05288.

    >>> redistribute_layers(32, stages=8, head_cost=2.4).tolist()
    [4, 4, 4, 4, 4, 5, 5, 2]
    """
    if layers < stages * min_layers:
        raise UserError(
            f"layers: {layers} layers, too few for {stages} stages of at least {min_layers} each; "
            f"use at most {layers // min_layers} stages"
        )
    load = np.full(stages, float(min_layers))
    load[0] += embedding_cost
    load[-1] += head_cost
    queue = [(cost, -stage) for stage, cost in enumerate(load.tolist())]
    heapq.heapify(queue)
    counts = np.full(stages, min_layers)
    for _ in range(layers - stages * min_layers):
        cost, stage = heapq.heappop(queue)
        counts[-stage] += 1
        heapq.heappush(queue, (cost + 1, stage))
    return counts
