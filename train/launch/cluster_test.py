"""Launches the self-test (`train/doctor/cluster_selftest.py`) on an engine, without restarts. JAX-free."""

import sys
from pathlib import Path

from ...configs.errors import MeshwrightError, UserError
from ...configs.sections.fault_tolerance import ElasticConfig
from ...configs.sections.launch import LaunchConfig
from .job import Job
from .launchers import ENGINES, launch

TIMEOUT = 300.0  # seconds until every machine must be done


def run_cluster_test(
    engine: str, settings: LaunchConfig, *, processes: int, devices_per_process: int | None, as_json: bool
) -> None:
    """Run it; process 0 prints. Raises MeshwrightError where it finds a problem."""
    if engine not in ENGINES or engine == "k8s":
        raise UserError.no_match("--engine", [engine], candidates=set(ENGINES) - {"k8s"})
    command = [sys.executable, "-m", "meshwright.train.doctor.cluster_selftest", *(["--json"] if as_json else [])]
    elastic = ElasticConfig(restarts=0, start_timeout=TIMEOUT)
    directory = Path("runs") / ".selftest"  # is never made: there is nothing to log
    job = Job("selftest", command, processes, directory, elastic, settings, devices_per_process)
    try:
        launch(engine, job)
    except UserError:
        raise
    except MeshwrightError as error:
        raise MeshwrightError(f"doctor --cluster: something stands out, see above ({error})") from error
