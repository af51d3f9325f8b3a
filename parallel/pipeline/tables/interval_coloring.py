"""Slots for values that live for some ticks: as few as possible, by interval coloring. NumPy only.

Taking intervals by their start and giving each the lowest free slot uses as many slots as values are ever alive at
once, and no schedule can do with fewer.
"""

import heapq
from collections.abc import Sequence


def color_intervals(intervals: Sequence[tuple[int, int]]) -> tuple[list[int], int]:
    """The slot of each interval [start, end] of ticks, both inclusive, and the number of slots.

    Two intervals that share a tick get different slots.

    >>> color_intervals([(0, 3), (1, 2), (3, 5), (4, 4)])
    ([0, 1, 1, 0], 2)
    """
    slots = [0] * len(intervals)
    alive: list[tuple[int, int]] = []  # heap of (end, slot)
    free: list[int] = []
    count = 0
    for index in sorted(range(len(intervals)), key=lambda index: intervals[index]):
        start, end = intervals[index]
        while alive and alive[0][0] < start:
            heapq.heappush(free, heapq.heappop(alive)[1])
        if free:
            slot = heapq.heappop(free)
        else:
            slot, count = count, count + 1
        slots[index] = slot
        heapq.heappush(alive, (end, slot))
    return slots, count
