"""What is spent: the textbook's numbers, and noise that spends no more than it may."""

import math

import pytest
from scipy.optimize import brentq
from scipy.stats import norm

from meshwright.configs.errors import UserError
from meshwright.configs.sections.privacy import PrivacyConfig
from meshwright.train.engine.privacy.accounting import calibrate_noise, epsilon_spent

pytest.importorskip("dp_accounting")


def gaussian_epsilon(noise, delta):
    """arXiv:1805.06530, theorem 8."""

    def over(epsilon):
        first = norm.cdf(1 / (2 * noise) - epsilon * noise)
        return first - math.exp(epsilon) * norm.cdf(-1 / (2 * noise) - epsilon * noise) - delta

    return brentq(over, 0, 200)


@pytest.mark.parametrize(("step", "epochs"), [(1, 1), (10, 1), (11, 2), (95, 10)])
def test_each_row_is_in_one_batch_an_epoch(step, epochs):
    privacy = PrivacyConfig(noise=4.0)
    wanted = gaussian_epsilon(4.0 / math.sqrt(epochs), 1e-5)
    assert epsilon_spent(privacy, step=step, rows=1000, batch=100) == pytest.approx(wanted, rel=1e-3)


def test_chance_is_credited_only_where_it_is_asked_for():
    """A known number: MNIST of arXiv:1607.00133's code, noise 1.1, batches of 256 of 60000, 60 epochs: about 2.9."""
    privacy = PrivacyConfig(noise=1.1, sampling="poisson")
    found = epsilon_spent(privacy, step=60 * 60000 // 256, rows=60000, batch=256)
    assert 2.4 < found < 3.1
    assert (
        epsilon_spent(privacy.model_copy(update={"sampling": "shuffled"}), step=60 * 234, rows=60000, batch=256)
        > 10 * found
    )
    assert epsilon_spent(privacy, step=0, rows=10, batch=1) == 0


@pytest.mark.parametrize("sampling", ["shuffled", "poisson"])
def test_the_noise_spends_what_may_be_spent(sampling):
    privacy = PrivacyConfig(epsilon=3.0, sampling=sampling)
    found = calibrate_noise(privacy, steps=50, rows=500, batch=50)
    assert 2.99 < epsilon_spent(found, step=50, rows=500, batch=50) <= 3.0
    assert calibrate_noise(found, steps=9, rows=9, batch=9) is found


@pytest.mark.parametrize(("sampling", "noise"), [("shuffled", 3.109461), ("poisson", 1.453194)])
def test_the_noise_is_the_least_that_keeps_epsilon(sampling, noise):
    """Found by bisection over `spent`, with nothing of dp-accounting's own search."""
    found = calibrate_noise(PrivacyConfig(epsilon=3.0, sampling=sampling), steps=50, rows=500, batch=50)
    assert found.noise == pytest.approx(noise, rel=2e-6)


@pytest.mark.parametrize("sampling", ["shuffled", "poisson"])
def test_what_cannot_be_kept_is_refused(sampling):
    with pytest.raises(UserError, match=r"privacy.epsilon: 1e-05 .*1000000 steps"):
        calibrate_noise(PrivacyConfig(epsilon=1e-5, delta=1e-9, sampling=sampling), steps=10**6, rows=10, batch=10)
