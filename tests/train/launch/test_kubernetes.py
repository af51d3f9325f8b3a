"""The engine `k8s`: every field of what it prints is one of the API's, of its type; and the parts fit one another."""

import subprocess
import sys

import pytest
import yaml

from meshwright.configs.errors import UserError
from meshwright.configs.loader import validate_tree
from meshwright.configs.sections.fault_tolerance import ElasticConfig
from meshwright.configs.sections.launch import KubernetesConfig, LaunchConfig
from meshwright.train.launch.job import Job
from meshwright.train.launch.kubernetes import manifests

STRINGS = {"*": str}
# What the API takes, as far as we write it: a type, the words of an enumeration, {field: ...}, [of each element]; "*":
# any name. JobSet v1alpha2: kubernetes-sigs/jobset, api/jobset/v1alpha2/jobset_types.go. Job, Pod: k8s.io/api batch/v1,
# core/v1 of Kubernetes 1.31. Resource quantities and limits are strings here.
CONTAINER = {
    "name": str, "image": str, "command": [str], "workingDir": str,
    "env": [{"name": str, "value": str}],
    "ports": [{"containerPort": int}],
    "resources": {"requests": STRINGS, "limits": STRINGS},
    "volumeMounts": [{"name": str, "mountPath": str, "readOnly": bool}],
}  # fmt: skip
POD = {
    "restartPolicy": ("Always", "OnFailure", "Never"), "terminationGracePeriodSeconds": int, "containers": [CONTAINER],
    "volumes": [
        {
            "name": str,
            "persistentVolumeClaim": {"claimName": str},
            "configMap": {"name": str},
            "emptyDir": {"medium": ("", "Memory", "HugePages")},
        }
    ],
    "nodeSelector": STRINGS, "serviceAccountName": str,
}  # fmt: skip
JOB = {
    "parallelism": int, "completions": int, "completionMode": ("Indexed", "NonIndexed"), "backoffLimit": int,
    "podReplacementPolicy": ("Failed", "TerminatingOrFailed"),
    "podFailurePolicy": {
        "rules": [
            {
                "action": ("FailJob", "FailIndex", "Ignore", "Count"),
                "onPodConditions": [{"type": str, "status": ("True", "False", "Unknown")}],
                "onExitCodes": {"containerName": str, "operator": ("In", "NotIn"), "values": [int]},
            }
        ]
    },
    "template": {"spec": POD},
}  # fmt: skip
METADATA = {"name": str, "namespace": str, "labels": STRINGS}
ACTIONS = (
    "FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts", "RestartJob", "RestartJobAndIgnoreMaxRestarts",
)  # fmt: skip
JOBSET = {
    "apiVersion": ("jobset.x-k8s.io/v1alpha2",), "kind": ("JobSet",), "metadata": METADATA,
    "spec": {
        "network": {"enableDNSHostnames": bool, "subdomain": str, "publishNotReadyAddresses": bool},
        "coordinator": {"replicatedJob": str, "jobIndex": int, "podIndex": int},
        "successPolicy": {"operator": ("All", "Any"), "targetReplicatedJobs": [str]},
        "failurePolicy": {
            "maxRestarts": int,
            "restartStrategy": ("Recreate", "BlockingRecreate", "InPlaceRestart"),
            "rules": [
                {"name": str, "action": ACTIONS, "onJobFailureReasons": [str], "targetReplicatedJobs": [str]},
            ],
        },
        "replicatedJobs": [{"name": str, "replicas": int, "template": {"spec": JOB}}],
    },
}  # fmt: skip
CONFIGMAP = {"apiVersion": ("v1",), "kind": ("ConfigMap",), "metadata": METADATA, "data": STRINGS}


def check(value, kind, path=""):
    """Raise where `value` is not what the API takes there."""
    match kind:
        case dict():
            assert isinstance(value, dict), path
            for name, part in value.items():
                assert name in kind or "*" in kind, f"{path}.{name}: no such field"
                check(part, kind.get(name, kind.get("*")), f"{path}.{name}")
        case list():
            assert isinstance(value, list), path
            for number, part in enumerate(value):
                check(part, kind[0], f"{path}[{number}]")
        case tuple():
            assert value in kind, f"{path}: {value!r}"
        case _:
            assert type(value) is kind, f"{path}: {value!r} is no {kind.__name__}"


def make_manifests(name="My_run", processes=4, grace=30.0, **settings):
    settings = KubernetesConfig(image="registry/meshwright:1", claim="work", **settings)
    elastic = ElasticConfig(grace=grace)
    return manifests(
        Job(name, [], processes, None, elastic, LaunchConfig(k8s=settings), devices_per_process=2, document="name: a\n")
    )


ALL_SETTINGS = {
    "gpus": 8, "cpu": "16", "memory": "64Gi", "queue": "team", "node_selector": {"gpu": "h100"},
    "service_account": "me",
}  # fmt: skip


@pytest.mark.parametrize("settings", [{}, ALL_SETTINGS], ids=["least", "everything"])
def test_every_field_is_one_of_the_api_with_its_type(settings):
    config, jobset = yaml.safe_load_all(yaml.safe_dump_all(make_manifests(**settings)))
    check(config, CONFIGMAP)
    check(jobset, JOBSET)


def job_specs(**settings):
    return {job["name"]: job["template"]["spec"] for job in make_manifests(**settings)[1]["spec"]["replicatedJobs"]}


def test_agents_dial_the_address_at_which_the_supervisors_pod_listens():
    """<jobset>-<replicatedJob>-<job index>-<pod index>.<subdomain>, as JobSet's headless service names pods."""
    container = {name: job["template"]["spec"]["containers"][0] for name, job in job_specs().items()}
    address = "my-run-supervisor-0-0.my-run:29400"
    assert container["workers"]["command"][-1] == address
    assert container["supervisor"]["command"][-1] == f"launch.listen={address}"
    assert container["supervisor"]["ports"] == [{"containerPort": 29400}]
    assert make_manifests()[1]["spec"]["network"]["subdomain"] == "my-run"


def test_a_lost_pod_is_replaced_alone_and_a_refused_configuration_ends_the_set():
    supervisor, workers = job_specs()["supervisor"], job_specs()["workers"]
    assert (workers["completions"], workers["parallelism"], workers["completionMode"]) == (4, 4, "Indexed")
    assert workers["backoffLimit"] == 2**31 - 1 and workers["podReplacementPolicy"] == "Failed"
    rules = {rule["action"] + str(rule.get("onExitCodes", {}).get("values", "")) for rule in
             supervisor["podFailurePolicy"]["rules"]}  # fmt: skip
    assert rules == {"Ignore", "Ignore[75]", "FailJob[2]"} and supervisor["backoffLimit"] == 0
    policy = make_manifests()[1]["spec"]["failurePolicy"]
    assert policy["rules"][0]["action"] == "FailJobSet" and policy["maxRestarts"] == 3
    pods = [job["template"]["spec"] for job in (supervisor, workers)]
    assert {pod["restartPolicy"] for pod in pods} == {"Never"}, "podFailurePolicy needs it"


@pytest.mark.parametrize(
    ("target", "processes", "resource", "amount", "selector"),
    [
        ("v5p:2x2x4", 4, "google.com/tpu", "4", ("tpu-v5p-slice", "2x2x4")),
        ("v6e:2x4", 1, "google.com/tpu", "8", ("tpu-v6e-slice", "2x4")),
        ("v6e:4x4", 4, "google.com/tpu", "4", ("tpu-v6e-slice", "4x4")),
        ("v7x:2x2x2", 2, "google.com/tpu", "4", ("tpu7x", "2x2x2")),
        ("h100x16", 2, "nvidia.com/gpu", "8", None),
        ("mi300xx8", 8, "amd.com/gpu", "1", None),
    ],
)
def test_a_target_chooses_the_nodes_and_devices_of_each_process(target, processes, resource, amount, selector):
    workers = job_specs(processes=processes, target=target)["workers"]["template"]["spec"]
    assert workers["containers"][0]["resources"]["limits"] == {resource: amount}
    labels = ("cloud.google.com/gke-tpu-accelerator", "cloud.google.com/gke-tpu-topology")
    assert workers.get("nodeSelector") == (None if selector is None else dict(zip(labels, selector, strict=True)))
    assert "nodeSelector" not in job_specs(processes=processes, target=target)["supervisor"]["template"]["spec"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"processes": 3, "target": "v5p:2x2x4"}, "launch.processes: 3, but v5p:2x2x4 has 4 nodes of 4 chips"),
        ({"processes": 3, "target": "h100x8"}, "launch.processes: 3 do not share the 8 devices"),
    ],
)
def test_processes_that_the_nodes_of_a_target_do_not_match_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        make_manifests(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target": "v5p:2x2x4", "gpus": 4}, "launch.k8s.gpus: 4"),
        ({"target": "2*v5p:2x2x4"}, "is not one slice"),
        ({"target": "cpux8"}, "is not one slice"),
        ({"target": "v5q:2x2x4"}, "launch.k8s.target: v5q matches nothing"),
    ],
)
def test_a_target_that_no_cluster_has_is_refused(settings, message):
    with pytest.raises(UserError, match=message.replace("*", ".")):
        validate_tree({"launch": {"k8s": settings}})


def test_a_pod_has_the_grace_period_to_save():
    for job in job_specs(grace=100.5).values():
        assert job["template"]["spec"]["terminationGracePeriodSeconds"] == 101 + 15


def test_mounts_are_volumes_and_one_is_the_configuration():
    config, _ = make_manifests()
    for job in job_specs().values():
        pod = job["template"]["spec"]
        mounts = {mount["name"]: mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]}
        assert mounts.keys() == {volume["name"] for volume in pod["volumes"]}
        assert next(v["configMap"]["name"] for v in pod["volumes"] if "configMap" in v) == config["metadata"]["name"]
        assert mounts["shm"] == "/dev/shm"


def test_missing_keys_of_a_cluster_are_the_users_mistake(tmp_path):
    command = [sys.executable, "-m", "meshwright.train.cli", "launch", "quickstart", "--engine", "k8s"]
    done = subprocess.run([*command, "launch.k8s.image=a"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "launch.k8s.claim: null" in done.stderr
    complete = [*command, "launch.k8s.image=a", "launch.k8s.claim=work", "--processes", "4"]
    done = subprocess.run(complete, cwd=tmp_path, capture_output=True, text=True, check=True)
    config, jobset = yaml.safe_load_all(done.stdout)
    check(jobset, JOBSET)
    assert yaml.safe_load(config["data"]["config.yaml"])["name"] == "quickstart"
    with pytest.raises(UserError, match="name: 7up has no letter at its beginning"):
        make_manifests(name="7up")
