"""Privacy accounting: the epsilon that a run has spent at a given delta, from its settings and its step alone.

    epsilon_spent(privacy, step=, rows=, batch=) -> epsilon

An epoch consists of full batches (`drop_partial_batches`), so a row is in at most one batch of an epoch. After `epochs`
(rounded up) it is in at most that many batches, and each hides it by noise of `privacy.noise` times what it can add:
together they are one Gaussian mechanism with noise / sqrt(epochs), whose epsilon is exact (arXiv:1805.06530). This is
`shuffled`. It holds for what happens here, for neighbouring data sets that replace a row by an empty one.
`poisson` is what is usually reported: the epsilon if each batch drew each row with probability batch / rows, by Renyi
divergences (arXiv:1908.10530). Batches here are not drawn so: compare it with others' numbers, it is no guarantee.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING

from ....configs.checks.privacy import check_private_inputs
from ....configs.errors import UserError
from ....configs.run import RunConfig
from ....configs.sections.privacy import PrivacyConfig
from ...data.assemble import Data
from ...data.dataset import FullBatches

if TYPE_CHECKING:
    from dp_accounting import DpEvent

MOST_NOISE = 1e4


def with_calibrated_noise(config: RunConfig, data: Data) -> RunConfig:
    """`config` with the least noise that keeps `privacy.epsilon` on `data`. Raises UserError if none does."""
    if config.privacy is None:
        return config
    check_private_inputs(config)
    try:
        import dp_accounting  # noqa: F401
    except ImportError:
        raise UserError("privacy: needs the package dp-accounting; pip install 'meshwright[privacy]'") from None
    rows = data.train.rows_per_epoch()
    privacy = calibrate_noise(config.privacy, steps=config.steps, rows=rows, batch=config.data.global_batch)
    return config.model_copy(update={"privacy": privacy})


def drop_partial_batches(config: RunConfig, data: Data) -> Data:
    """In a private run, `data` without the rows of an epoch that fill no batch. Raises UserError if none is full."""
    if config.privacy is None:
        return data
    batch, rows = config.data.global_batch, data.train.rows_per_epoch()
    if batch > rows:
        raise UserError(
            f"data.global_batch: {batch} with privacy: there are {rows} rows to train on, so that one would be in a "
            f"batch twice; use at most {rows}"
        )
    return replace(data, train=FullBatches(data.train, batch))


def epsilon_metric(config: RunConfig, data: Data) -> Callable[[int], dict[str, float]]:
    """A function from a step to {"epsilon": spent by then}; to {} in a run without privacy."""
    privacy, batch = config.privacy, config.data.global_batch
    if privacy is None:
        return lambda step: {}
    rows = data.train.rows_per_epoch()
    return lambda step: {"epsilon": epsilon_spent(privacy, step=step, rows=rows, batch=batch)}


def epsilon_spent(privacy: PrivacyConfig, *, step: int, rows: int, batch: int) -> float:
    """Epsilon after `step` updates of `batch` rows, in epochs of `rows` rows (at least `batch`, in full batches)."""
    if step == 0:
        return 0.0
    if privacy.sampling == "poisson":
        return epsilon_if_sampled(privacy.noise, privacy.delta, step=step, share=batch / rows)
    import dp_accounting

    epochs = math.ceil(step * batch / rows)
    return float(dp_accounting.get_epsilon_gaussian(privacy.noise / math.sqrt(epochs), privacy.delta))


@lru_cache(maxsize=4096)
def epsilon_if_sampled(noise: float, delta: float, *, step: int, share: float) -> float:
    """Epsilon of `step` Gaussian mechanisms whose rows are drawn with probability `share`."""
    import dp_accounting

    accountant = dp_accounting.rdp.RdpAccountant()
    return float(accountant.compose(sampled_updates(noise, step=step, share=share)).get_epsilon(delta))


def sampled_updates(noise: float, *, step: int, share: float) -> "DpEvent":
    """The event that dp-accounting counts for `step` updates whose rows are drawn with probability `share`."""
    import dp_accounting

    update = dp_accounting.PoissonSampledDpEvent(share, dp_accounting.GaussianDpEvent(noise))
    return dp_accounting.SelfComposedDpEvent(update, step)


def calibrate_noise(privacy: PrivacyConfig, *, steps: int, rows: int, batch: int) -> PrivacyConfig:
    """`privacy` with the least noise that spends at most its epsilon in `steps`; unchanged where `noise` is set."""
    if privacy.noise is not None:
        return privacy
    import dp_accounting

    if privacy.sampling == "poisson":
        try:
            noise = dp_accounting.calibrate_dp_mechanism(
                dp_accounting.rdp.RdpAccountant,
                lambda noise: sampled_updates(noise, step=steps, share=batch / rows),
                privacy.epsilon,
                privacy.delta,
            )
        except dp_accounting.mechanism_calibration.NoBracketIntervalFoundError:
            noise = math.inf
    else:
        one_epoch = dp_accounting.get_sigma_gaussian(privacy.epsilon, privacy.delta)
        noise = one_epoch * math.sqrt(math.ceil(steps * batch / rows)) * (1 + 1e-9)  # sigma is exact to 1e-12 only
    if noise > MOST_NOISE:
        raise UserError(
            f"privacy.epsilon: {privacy.epsilon} would need more noise than {MOST_NOISE:g} in {steps} steps; raise it, "
            "or lower steps"
        )
    return privacy.model_copy(update={"noise": noise})
