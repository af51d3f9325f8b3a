"""Differential privacy: how much a run may tell of any one row."""

from typing import Literal

from pydantic import Field, model_validator

from .base import Section


class PrivacyConfig(Section):
    """DP-SGD (arXiv:1607.00133): no row moves the sum of gradients by more than `clip`, and noise hides which did."""

    clip: float = Field(0.1, gt=0)
    """Largest norm of a row's gradient; larger ones are scaled down to it. Default: 0.1, of arXiv:2110.05679."""
    noise: float | None = Field(None, gt=0)
    """Standard deviation of the noise in the sum of a batch's gradients, in units of `clip`. Default: by `epsilon`."""
    epsilon: float | None = Field(None, gt=0)
    """What the whole run may spend; the noise is as small as that allows. Default: by `noise`."""
    delta: float = Field(1e-5, gt=0, lt=1)
    """Probability that the bound does not hold; well below one over the number of rows. Default: 1e-5."""
    sampling: Literal["shuffled", "poisson"] = "shuffled"
    """What `epsilon` assumes. shuffled: what happens, each row once an epoch, and no credit for chance; poisson: that
    each batch draws each row by chance, as most reports do and no run of ours does. Default: shuffled."""

    @model_validator(mode="after")
    def _one(self) -> "PrivacyConfig":
        if (self.noise is None) is (self.epsilon is None):
            raise ValueError(
                f"privacy.noise: {self.noise} with privacy.epsilon: {self.epsilon}; set one of them: how much noise, "
                "or how much may be spent"
            )
        return self
