"""Places for things that live for a while: as few as possible, by interval colouring. NumPy only.

Taking intervals by their start and giving each the lowest place that is free uses as many places as things are ever
alive at once, and no schedule can do with fewer.
"""

import heapq
from collections.abc import Sequence


def colour(intervals: Sequence[tuple[int, int]]) -> tuple[list[int], int]:
    """A place for each interval [start, end] of ticks, both inclusive, and how many places there are.

    Two intervals that share a tick get different places.

    >>> colour([(0, 3), (1, 2), (3, 5), (4, 4)])
    ([0, 1, 1, 0], 2)
    """
    places = [0] * len(intervals)
    alive: list[tuple[int, int]] = []  # (end, place)
    free: list[int] = []
    count = 0
    for index in sorted(range(len(intervals)), key=lambda index: intervals[index]):
        start, end = intervals[index]
        while alive and alive[0][0] < start:
            heapq.heappush(free, heapq.heappop(alive)[1])
        if free:
            place = heapq.heappop(free)
        else:
            place, count = count, count + 1
        places[index] = place
        heapq.heappush(alive, (end, place))
    return places, count
