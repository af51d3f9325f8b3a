"""Every test sees eight simulated CPU devices, strict numerics, and a compiler that hurries."""

import os

FLAGS = (
    "--xla_force_host_platform_device_count=8",
    # 2.6x faster compilation; the programs are small and nobody times them.
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    # A collective that hangs is an error in 20 s, not in 40.
    "--xla_cpu_collective_call_terminate_timeout_seconds=20",
)
os.environ.setdefault("XLA_FLAGS", " ".join(FLAGS))
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
