"""Retention of checkpoints: a pure decision over steps. The caller deletes the rest."""

from collections.abc import Mapping, Sequence


def select_retained(
    steps: Sequence[int], *, keep_newest: int, keep_every: int = 0, keep_best: int = 0,
    scores: Mapping[int, float] | None = None,
) -> set[int]:  # fmt: skip
    """Return the `keep_newest` steps, multiples of `keep_every` (0: none), and the `keep_best` with the lowest scores.

    A step without a score, or with the score NaN, is never among the best. The newest step is always retained, so that
    a run can go on from it.

    >>> steps = [10, 20, 30, 40, 50]
    >>> sorted(select_retained(steps, keep_newest=1, keep_every=20, keep_best=1, scores={10: 2.5, 30: 3.0}))
    [10, 20, 40, 50]
    """
    ordered = sorted(steps)
    recent = ordered[max(len(ordered) - max(keep_newest, 1), 0) :]
    periodic = {step for step in ordered if keep_every and step % keep_every == 0}
    scored = {step: scores[step] for step in ordered if scores and step in scores and scores[step] == scores[step]}
    return {*recent, *periodic, *sorted(scored, key=lambda step: (scored[step], -step))[:keep_best]}
