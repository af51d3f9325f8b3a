"""Which checkpoints survive: pure decisions over steps. The caller deletes the rest."""

from collections.abc import Mapping, Sequence


def retained(
    steps: Sequence[int], *, newest: int, every: int = 0, best: int = 0, scores: Mapping[int, float] | None = None
) -> set[int]:
    """The `newest` steps, every multiple of `every` (0: none), and the `best` by the lowest of `scores`.

    A step without a score, or whose score is not a number, is never among the best. The newest step of all survives
    whatever is asked: a run always has something to go on from.

    >>> sorted(retained([10, 20, 30, 40, 50], newest=1, every=20, best=1, scores={10: 2.5, 30: 3.0}))
    [10, 20, 40, 50]
    """
    ordered = sorted(steps)
    recent = ordered[max(len(ordered) - max(newest, 1), 0) :]
    kept = {step for step in ordered if every and step % every == 0}
    scored = {step: scores[step] for step in ordered if scores and step in scores and scores[step] == scores[step]}
    return {*recent, *kept, *sorted(scored, key=lambda step: (scored[step], -step))[:best]}
