"""Whether a cluster can have the devices of `launch.k8s.target`."""

from ..sections.launch import KubernetesConfig


def check_launch_target(settings: KubernetesConfig) -> None:
    """Raise ValueError or UserError where `target` is no slice or group of GPUs, or `gpus` says it again."""
    if settings.target is None:
        return
    from ..hardware_targets import parse_topology  # its classes would cost every start of the program their time

    topology = parse_topology(settings.target, key="launch.k8s.target")
    if settings.gpus:
        raise ValueError(f"launch.k8s.gpus: {settings.gpus}, but target {settings.target} says it too; remove one")
    if topology.target.resources.kubernetes is None or topology.slices > 1:
        raise ValueError(
            f"launch.k8s.target: {settings.target} is not one slice, or group of GPUs, that a cluster has; use e.g. "
            "v5p:4x4x4 or h100x8"
        )
