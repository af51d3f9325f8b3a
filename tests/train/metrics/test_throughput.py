"""The peak of a run's devices, which MFU is measured against."""

import pytest

from meshwright.configs.run import RunConfig
from meshwright.train.metrics.throughput import peak_flops


def devices(kind, platform, count=4):
    return [{"id": number, "kind": kind, "platform": platform, "process": 0} for number in range(count)]


@pytest.mark.parametrize(
    ("kind", "platform", "peak"),
    [
        ("TPU v5", "tpu", 459e12),  # a v5p
        ("TPU v5 lite", "tpu", 197e12),  # a v5e
        ("TPU7x", "tpu", 1153.5e12),  # one of two devices of a chip
        ("NVIDIA H100 80GB HBM3", "gpu", 989e12),
    ],
)
def test_the_peak_is_that_of_the_hardware_target(kind, platform, peak):
    assert peak_flops(RunConfig(), devices(kind, platform)) == 4 * peak


def test_an_unknown_device_has_no_peak_unless_the_user_gives_one():
    unknown = devices("NVIDIA H100 PCIe", "gpu")
    assert peak_flops(RunConfig(), unknown) is None
    assert peak_flops(RunConfig.model_validate({"logging": {"peak_tflops": 756}}), unknown) == 4 * 756e12
