"""Placement of stages on devices: int [devices, chunks] -> stage. NumPy only.

    straight       device i holds stage i
    interleaved    device i holds stages i, i + devices, ...: a microbatch goes around the ring of devices
    v-shaped       device i holds stages i and 2 * devices - 1 - i: a microbatch goes down the V and up again

In the V the stage whose activations live longest shares a device with the stage whose activations live shortest, so all
devices hold the same. Source: Pipeline Parallelism with Controllable Memory, arXiv:2405.15362.
"""

import numpy as np


def straight(devices: int) -> np.ndarray:
    """One stage on each device, [devices, 1]."""
    return np.arange(devices)[:, None]


def interleaved(devices: int, *, chunks: int) -> np.ndarray:
    """Stage `device + chunk * devices` on each device and chunk, [devices, chunks].

    >>> interleaved(2, chunks=3).tolist()
    [[0, 2, 4], [1, 3, 5]]
    """
    return np.arange(devices)[:, None] + devices * np.arange(chunks)


def v_shaped(devices: int) -> np.ndarray:
    """The first and the last stage on device 0, [devices, 2].

    >>> v_shaped(2).tolist()
    [[0, 3], [1, 2]]
    """
    down = np.arange(devices)
    return np.stack([down, 2 * devices - 1 - down], axis=1)
