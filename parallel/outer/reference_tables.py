"""The bandwidth table of Streaming DiLoCo (arXiv:2501.18512, table 4), to compare a simulation with. No JAX."""

from .link_simulator import Method, Workload, data_parallel, diloco, streaming_diloco

UTILISATION_TARGETS = (0.5, 0.8, 0.9, 0.95, 0.99)

# Bits on the wire of one nominal parameter. bfloat16 would be 16, but only 13.3 to 13.6 reproduce the paper's
# data-parallel rows, so its simulator sends a sixth less than nominal. Fitted on those rows alone.
BITS_PER_PARAMETER = 13.4

WORKLOADS = {
    "1B": Workload(layers=24, step_seconds=0.1, gigabits=1 * BITS_PER_PARAMETER),
    "10B": Workload(layers=48, step_seconds=0.8, gigabits=10 * BITS_PER_PARAMETER),
    "100B": Workload(layers=108, step_seconds=4.9, gigabits=100 * BITS_PER_PARAMETER),
}


def methods(layers: int) -> dict[str, Method]:
    """The rows of the table: outer steps every 100 steps, fragments of 3 layers, and 4 of bfloat16's 16 bits."""
    count = layers // 3 + 1
    return {
        "data-parallel": data_parallel(),
        "diloco": diloco(100),
        "streaming": streaming_diloco(100, count=count),
        "streaming, overlapped": streaming_diloco(100, count=count, overlap=1),
        "streaming, overlapped, 4 bits": streaming_diloco(100, count=count, overlap=1, compression=4 / 16),
    }


# Gbit/s for each of UTILISATION_TARGETS.
PUBLISHED_BANDWIDTHS: dict[tuple[str, str], tuple[float, ...]] = {
    ("1B", "data-parallel"): (86.8, 152.6, 184.2, 222.3, 569.0),
    ("1B", "diloco"): (1.4, 6.2, 13.3, 23.3, 86.8),
    ("1B", "streaming"): (1.4, 5.2, 9.1, 16.0, 28.1),
    ("1B", "streaming, overlapped"): (1.4, 4.3, 6.2, 9.1, 11.0),
    ("1B", "streaming, overlapped, 4 bits"): (0.4, 0.9, 1.7, 2.0, 3.0),
    ("10B", "data-parallel"): (104.8, 222.3, 222.3, 268.3, 471.5),
    ("10B", "diloco"): (1.7, 7.5, 16.0, 33.9, 104.8),
    ("10B", "streaming"): (1.7, 5.2, 9.1, 13.3, 19.3),
    ("10B", "streaming, overlapped"): (1.7, 3.6, 5.2, 6.2, 7.5),
    ("10B", "streaming, overlapped, 4 bits"): (0.4, 0.9, 1.4, 1.4, 1.7),
    ("100B", "data-parallel"): (184.2, 323.8, 390.7, 390.7, 471.5),
    ("100B", "diloco"): (3.0, 11.0, 23.3, 49.4, 184.2),
    ("100B", "streaming"): (2.4, 6.2, 9.1, 11.0, 19.3),
    ("100B", "streaming, overlapped"): (1.7, 3.6, 4.3, 5.2, 5.2),
    ("100B", "streaming, overlapped, 4 bits"): (0.5, 0.9, 1.1, 1.1, 1.4),
}
