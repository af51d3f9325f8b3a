"""The learning rate of each update of a run: warm-up, then the decay that `optimizer.schedule` names."""

import optax

from ...configs.sections.training import OptimizerConfig


def learning_rate_schedule(optimizer: OptimizerConfig, *, steps: int) -> optax.Schedule:
    """Learning rate of update `count`, counted from 0; the last update has `final_fraction` of the peak."""
    peak, warmup = optimizer.learning_rate, optimizer.warmup_steps
    final, rest = peak * optimizer.final_fraction, max(steps - warmup - 1, 1)
    if optimizer.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, rest, alpha=optimizer.final_fraction)
    elif optimizer.schedule == "linear":
        after = optax.linear_schedule(peak, final, rest)
    elif optimizer.schedule == "wsd":
        drop = min(optimizer.decay_steps or max(steps // 10, 1), rest)
        after = optax.linear_schedule(peak, final, drop, transition_begin=rest - drop)
    else:
        after = optax.constant_schedule(peak)
    if not warmup:
        return after
    return optax.join_schedules([optax.linear_schedule(peak / warmup, peak, max(warmup - 1, 1)), after], [warmup])
