"""Numbers that papers printed, which `pipeline_tables` puts the simulator's beside. Data only.

Vocabulary Parallelism, arXiv:2411.05288, tables 5 and 6: MFU in percent and peak memory in GB (of 2^30 bytes) at
vocabularies of 32k, 64k, 128k and 256k; one sequence a microbatch, 128 microbatches, a stage for each GPU. Zero Bubble,
arXiv:2401.10241, table 5: bubble rates of 32 stages and 96 microbatches.
"""

from typing import NamedTuple

VOCABULARIES = (32768, 65536, 131072, 262144)
MICROBATCHES = 128


class Setup(NamedTuple):
    """A model on a pipeline."""

    schedule: str
    gpus: int
    layers: int
    embed: int
    sequence: int


class Published(NamedTuple):
    """A row of the paper's table, by vocabulary."""

    mfu: tuple[float, ...]
    gigabytes: tuple[float, ...]


VOCABULARY = {
    Setup("1f1b", 8, 32, 3072, 2048): {
        "baseline": Published((46.16, 40.48, 33.11, 25.23), (14.86, 16.32, 19.25, 25.64)),
        "redistributed": Published((46.01, 46.37, 44.22, 38.91), (14.86, 16.32, 19.25, 25.64)),
        "algorithm 1": Published((50.42, 50.28, 49.93, 50.12), (15.63, 16.02, 16.84, 18.59)),
        "algorithm 2": Published((50.23, 50.18, 49.82, 49.69), (14.83, 15.23, 16.04, 17.78)),
        "interlaced": Published((51.18, 50.94, 50.97, 50.92), (17.20, 17.57, 18.43, 20.17)),
    },
    Setup("1f1b", 8, 32, 3072, 4096): {
        "baseline": Published((47.05, 41.87, 35.00, 26.75), (21.39, 22.85, 25.78, 31.64)),
        "redistributed": Published((46.93, 46.78, 47.44, 43.01), (21.39, 22.85, 25.78, 31.64)),
        "algorithm 1": Published((50.98, 50.98, 50.83, 50.66), (24.04, 24.47, 25.41, 27.34)),
        "algorithm 2": Published((50.93, 50.75, 50.56, 50.40), (22.44, 22.89, 23.80, 25.73)),
        "interlaced": Published((51.41, 51.82, 51.32, 51.38), (27.20, 27.64, 28.60, 30.53)),
    },
    Setup("1f1b", 16, 48, 4096, 2048): {
        "baseline": Published((45.66, 40.09, 32.44, 24.21), (24.03, 25.98, 29.92, 38.71)),
        "redistributed": Published((45.56, 42.82, 38.65, 36.98), (24.03, 25.98, 29.92, 38.71)),
        "algorithm 1": Published((49.02, 50.62, 50.54, 50.66), (24.37, 24.63, 25.14, 26.26)),
        "algorithm 2": Published((48.90, 50.49, 50.46, 50.46), (23.57, 23.83, 24.35, 25.47)),
        "interlaced": Published((48.94, 48.97, 49.19, 49.52), (29.23, 29.47, 29.97, 31.10)),
    },
    Setup("1f1b", 16, 48, 4096, 4096): {
        "baseline": Published((47.56, 41.21, 33.88, 25.33), (36.99, 38.94, 42.85, 50.90)),
        "redistributed": Published((47.41, 43.07, 43.15, 40.15), (36.99, 38.94, 42.85, 50.90)),
        "algorithm 1": Published((50.93, 50.97, 50.71, 51.22), (39.46, 39.73, 40.31, 41.53)),
        "algorithm 2": Published((50.97, 50.80, 50.68, 50.90), (37.89, 38.18, 38.77, 39.92)),
        "interlaced": Published((49.52, 49.53, 49.77, 49.84), (49.16, 49.44, 50.05, 51.28)),
    },
    Setup("1f1b", 32, 64, 5120, 2048): {
        "baseline": Published((42.81, 37.28, 28.97, 20.86), (33.45, 35.89, 41.17, 52.16)),
        "redistributed": Published((43.48, 37.29, 36.32, 29.16), (33.45, 35.89, 41.17, 52.16)),
        "algorithm 1": Published((45.85, 45.92, 45.90, 46.11), (33.38, 33.55, 33.86, 34.51)),
        "algorithm 2": Published((45.54, 45.86, 45.86, 46.16), (32.72, 32.88, 33.20, 33.84)),
        "interlaced": Published((42.40, 42.43, 42.75, 43.25), (42.94, 43.09, 43.40, 44.07)),
    },
    Setup("1f1b", 32, 64, 5120, 4096): {
        "baseline": Published((43.68, 38.11, 30.05, 21.63), (54.97, 57.41, 62.29, 73.05)),
        "redistributed": Published((44.01, 38.12, 37.87, 31.03), (54.97, 57.41, 62.29, 73.05)),
        "algorithm 1": Published((46.41, 46.44, 46.68, 46.83), (57.41, 57.56, 57.88, 58.58)),
        "algorithm 2": Published((46.23, 46.35, 46.55, 46.84), (56.09, 56.26, 56.61, 57.31)),
    },
    Setup("v-half", 16, 32, 4096, 2048): {
        "baseline": Published((46.41, 38.52, 28.75, 19.99), (15.57, 19.77, 28.55, 46.77)),
        "algorithm 1": Published((52.82, 53.11, 53.41, 52.89), (13.20, 13.46, 13.98, 15.02)),
    },
    Setup("v-half", 16, 32, 4096, 4096): {
        "baseline": Published((50.01, 41.17, 31.36, 21.90), (21.22, 25.61, 34.56, 53.11)),
        "algorithm 1": Published((58.69, 58.56, 58.44, 57.59), (20.14, 20.41, 20.96, 22.06)),
    },
    Setup("v-half", 24, 48, 5120, 2048): {
        "baseline": Published((51.07, 43.13, 32.38, 22.54), (23.94, 29.12, 39.98, 61.71)),
        "algorithm 1": Published((56.70, 56.50, 55.72, 54.86), (21.08, 21.29, 21.72, 22.57)),
    },
    Setup("v-half", 24, 48, 5120, 4096): {
        "baseline": Published((54.53, 45.96, 34.99, 24.31), (33.60, 38.97, 49.90, 72.60)),
        "algorithm 1": Published((60.09, 60.09, 59.42, 58.22), (32.55, 32.78, 33.22, 34.12)),
    },
    Setup("v-half", 32, 64, 6144, 2048): {
        "baseline": Published((52.80, 45.56, 35.69), (34.11, 40.28, 53.22)),
        "algorithm 1": Published((57.70, 57.62, 57.69, 57.80), (30.85, 31.04, 31.42, 32.18)),
    },
    Setup("v-half", 32, 64, 6144, 4096): {
        "baseline": Published((56.06, 48.17, 37.85), (48.84, 55.19, 68.12)),
        "algorithm 1": Published((60.10, 60.14, 60.72, 59.82), (47.99, 48.19, 48.59, 49.38)),
    },
}  # fmt: skip

# Of the 28.3B model; "auto" is the paper's automatic schedule under twice 1F1B's memory, ZB-2p.
BUBBLES = {
    "1f1b": 0.2646, "interleaved": 0.1493, "zb-h1": 0.1421, "zb-h2": 0.0641, "auto": 0.0038, "zb-v": 0.0593,
}  # fmt: skip
BUBBLES_AT = {"devices": 32, "microbatches": 96}
