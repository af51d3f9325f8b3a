"""What a private run has spent: epsilon at a given delta, from its settings and the number of steps alone.

    spent(privacy, step=, rows=, batch=) -> epsilon

An epoch is whole batches (`dealt`), so a row is in at most one batch of each, and after `epochs` (rounded up) in at
most as many, each hidden by noise of `privacy.noise` times what it can add: together one Gaussian mechanism with
noise / sqrt(epochs), whose epsilon is exact (arXiv:1805.06530). That is `shuffled`, and holds for what happens here: a
row against an empty one in its place.
`poisson` is what is usually reported: as if each batch drew each row with probability batch / rows, by Renyi
divergences (arXiv:1908.10530). Batches here are not drawn so; read it beside others' numbers, not as a guarantee.
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


def budgeted(config: RunConfig, data: Data) -> RunConfig:
    """`config` with the noise that the data and the run's epsilon ask for. UserError where it cannot be counted."""
    if config.privacy is None:
        return config
    check_private_inputs(config)
    try:
        import dp_accounting  # noqa: F401
    except ImportError:
        raise UserError("privacy: is counted by dp-accounting; pip install 'meshwright[privacy]'") from None
    rows = data.train.rows_per_epoch()
    privacy = calibrated(config.privacy, steps=config.steps, rows=rows, batch=config.data.global_batch)
    return config.model_copy(update={"privacy": privacy})


def dealt(config: RunConfig, data: Data) -> Data:
    """`data` as the run reads it: a private one leaves out the rows of an epoch that fill no batch. UserError."""
    if config.privacy is None:
        return data
    batch, rows = config.data.global_batch, data.train.rows_per_epoch()
    if batch > rows:
        raise UserError(
            f"data.global_batch: {batch} with privacy: there are {rows} rows to train on, so that one would be in a "
            f"batch twice; use at most {rows}"
        )
    return replace(data, train=FullBatches(data.train, batch))


def spending(config: RunConfig, data: Data) -> Callable[[int], dict[str, float]]:
    """A function from a step to what is spent by then; to nothing where nothing is promised."""
    privacy, batch = config.privacy, config.data.global_batch
    if privacy is None:
        return lambda step: {}
    rows = data.train.rows_per_epoch()
    return lambda step: {"epsilon": spent(privacy, step=step, rows=rows, batch=batch)}


def spent(privacy: PrivacyConfig, *, step: int, rows: int, batch: int) -> float:
    """Epsilon after `step` updates of `batch` rows, of epochs of `rows`: at least `batch`, in whole batches."""
    if step == 0:
        return 0.0
    if privacy.sampling == "poisson":
        return sampled(privacy.noise, privacy.delta, step=step, share=batch / rows)
    import dp_accounting

    epochs = math.ceil(step * batch / rows)
    return float(dp_accounting.get_epsilon_gaussian(privacy.noise / math.sqrt(epochs), privacy.delta))


@lru_cache(maxsize=4096)
def sampled(noise: float, delta: float, *, step: int, share: float) -> float:
    """Of `step` Gaussian mechanisms, each of rows drawn with probability `share`."""
    import dp_accounting

    accountant = dp_accounting.rdp.RdpAccountant()
    return float(accountant.compose(sampled_batches(noise, step=step, share=share)).get_epsilon(delta))


def sampled_batches(noise: float, *, step: int, share: float) -> "DpEvent":
    """The event that dp-accounting counts for `step` updates whose rows are drawn with probability `share`."""
    import dp_accounting

    update = dp_accounting.PoissonSampledDpEvent(share, dp_accounting.GaussianDpEvent(noise))
    return dp_accounting.SelfComposedDpEvent(update, step)


def calibrated(privacy: PrivacyConfig, *, steps: int, rows: int, batch: int) -> PrivacyConfig:
    """`privacy` with the least noise that spends at most its epsilon in `steps`; as it is where noise is given."""
    if privacy.noise is not None:
        return privacy
    import dp_accounting

    if privacy.sampling == "poisson":
        try:
            noise = dp_accounting.calibrate_dp_mechanism(
                dp_accounting.rdp.RdpAccountant,
                lambda noise: sampled_batches(noise, step=steps, share=batch / rows),
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
            f"privacy.epsilon: {privacy.epsilon} cannot be kept for {steps} steps with any useful noise; raise it, "
            "or lower steps"
        )
    return privacy.model_copy(update={"noise": noise})
