"""Every test sees eight simulated CPU devices, strict numerics, and a compiler that hurries."""

import os
import sys

import pytest

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


@pytest.fixture(scope="session", autouse=True)
def data_cache(tmp_path_factory):
    """Tokenized data is kept for the session, out of the working directory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MESHWRIGHT_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        yield


@pytest.fixture
def idle_coordination_service(monkeypatch):
    """The coordination service does nothing: fake workers do not speak JAX."""
    from meshwright.train.launch import local_processes

    idle = [sys.executable, "-c", "import time; time.sleep(600)"]
    monkeypatch.setattr(local_processes, "COORDINATION_SERVICE", idle)
