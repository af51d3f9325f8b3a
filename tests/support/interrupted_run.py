"""Runs in this process that end before their last step."""

import pytest

from meshwright.configs.errors import Preemption
from meshwright.train.core.process_env import ProcessInfo
from meshwright.train.preemption import StopRequest
from meshwright.train.run import train


def train_until_stopped(config, root, *, step):
    """Train until the run is asked to stop, after `step`: its state is saved."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Preemption, match=f"stopped after step {step}"):
        patch.setattr(StopRequest, "should_stop", lambda self, number: number == step)
        train(config, process_info=ProcessInfo(), root=root)


def train_until_killed(config, root, *, step):
    """Train until the process is killed without warning, after `step`."""

    def kill(self, number):
        if number == step:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(StopRequest, "should_stop", kill)
        train(config, process_info=ProcessInfo(), root=root)
