"""The section privacy: differential privacy, which bounds what a run reveals about any one row."""

from typing import Literal

from pydantic import Field, model_validator

from .base import Section


class PrivacyConfig(Section):
    """DP-SGD (arXiv:1607.00133): no row moves the sum of gradients by more than `clip`, and noise hides each row."""

    clip: float = Field(0.1, gt=0)
    """Norm to which the gradient of each row is clipped. Default: 0.1, from arXiv:2110.05679."""
    noise: float | None = Field(None, gt=0)
    """Standard deviation of the noise in the sum of a batch's gradients, in units of `clip`; null: set by `epsilon`."""
    epsilon: float | None = Field(None, gt=0)
    """Privacy budget of the whole run, which sets the smallest noise that keeps it; null: set by `noise`."""
    delta: float = Field(1e-5, gt=0, lt=1)
    """Probability that the bound fails; choose it well below 1 / rows of the data set. Default: 1e-5."""
    sampling: Literal["shuffled", "poisson"] = "shuffled"
    """How `epsilon` is computed. shuffled: as a run reads its rows, each once an epoch, with no amplification by
    sampling; poisson: as if each batch drew each row at random, which most papers report and no run does."""

    @model_validator(mode="after")
    def _check_exactly_one(self) -> "PrivacyConfig":
        if (self.noise is None) is (self.epsilon is None):
            raise ValueError(
                f"privacy.noise: {self.noise} with privacy.epsilon: {self.epsilon}; set exactly one of them, the other "
                "follows from it"
            )
        return self
