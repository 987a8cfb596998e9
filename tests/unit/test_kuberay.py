"""Manifests: valid for Kubernetes and KubeRay, and pointing at nothing that does not exist.

No cluster is reached: what needs its controllers, such as the rules that KubeRay writes in CEL, is
not checked.
"""

import copy
import functools
import gzip
import json
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import (
    _derive_autoscaling_config_from_ray_cr,
)
from ray.autoscaler._private.util import validate_config
from sqlalchemy import make_url

from core.privacy.keys import SECRET_FILE_VARIABLE
from sweep.driver.launch import DRIVER_RESOURCE

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "clusters" / "README.md").read_text().replace("\\\n", " ")
(KUBERAY,) = re.findall(r"kuberay-operator .*--version (\S+)", README)
"""The operator that the README installs, of whose schemas the tests have a copy."""
Manifest = dict[str, Any]


def read_all() -> dict[tuple[str, str], Manifest]:
    files = sorted((ROOT / "clusters" / "kuberay").glob("*.yaml"))
    found = [document for file in files for document in yaml.safe_load_all(file.read_text())]
    named = {(one["kind"], name_of(one)): one for one in found}
    assert len(named) == len(found)
    return named


def name_of(manifest: Manifest) -> str:
    """The name, or what a generated one begins with."""
    given = manifest["metadata"]
    return given.get("name") or given["generateName"].rstrip("-")


ALL = read_all()
JOB = ("RayJob", "quickstart")
SPEC = "spec rayClusterSpec"
POD, HEAD = "spec template", f"{SPEC} headGroupSpec template"


@pytest.fixture
def manifests() -> dict[tuple[str, str], Manifest]:
    return copy.deepcopy(ALL)


@functools.cache
def own_schema(kind: str) -> jsonschema.Draft202012Validator:
    path = ROOT / "tests" / "data" / f"kuberay-{KUBERAY}-{kind.lower()}s.json.gz"
    schema = json.loads(gzip.decompress(path.read_bytes()))
    return jsonschema.Draft202012Validator(closed(schema, top=True))


def closed(schema: Any, top: bool = False) -> Any:
    """Forbids keys that a schema does not list, as `kubectl --validate=strict` does."""
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    copied = {key: closed(value) for key, value in schema.items()}
    is_schema = isinstance(schema.get("properties"), dict) and schema.get("type") == "object"
    if is_schema and "additionalProperties" not in schema:
        copied["additionalProperties"] = False
    if top:  # The resource's schema leaves this to Kubernetes.
        copied["properties"]["metadata"] = {
            "type": "object",
            "properties": {
                **{key: {"type": "string"} for key in ("name", "generateName", "namespace")},
                "labels": {"type": "object", "additionalProperties": {"type": "string"}},
            },
            "required": ["namespace"],
            "additionalProperties": False,
        }
    return copied


def schema_problem(manifest: Manifest) -> str:
    try:
        if manifest["kind"] == "RayJob":
            own_schema(manifest["kind"]).validate(manifest)
        else:
            kubernetes_validate.validate(manifest, "1.34", strict=True)
    except (jsonschema.ValidationError, kubernetes_validate.ValidationError) as error:
        return error.message
    return ""


@pytest.mark.parametrize("key", ALL, ids="/".join)
def test_manifest_fits_its_schema(key):
    assert not schema_problem(ALL[key])


@pytest.mark.parametrize(
    ("key", "path"),
    [
        (JOB, "spec"),
        (JOB, SPEC),
        (JOB, f"{HEAD} spec"),
        (JOB, f"{SPEC} autoscalerOptions"),
        (("Deployment", "mlflow"), f"{POD} spec"),
        (("PersistentVolumeClaim", "feta-sweep"), "spec"),
    ],
)
def test_unknown_keys_are_refused(manifests, key, path):
    place = manifests[key]
    for step in path.split():
        place = place[step]
    place["unknownKey"] = 1
    assert "unknownKey" in schema_problem(manifests[key])


class Pods:
    """A pod template with what it is part of."""

    def __init__(self, key: tuple[str, str], template: Manifest, claims: set[str]) -> None:
        self.key = key
        self.labels = template.get("metadata", {}).get("labels", {})
        self.spec = template["spec"]
        self.claims = claims
        self.containers = [*self.spec["containers"], *self.spec.get("initContainers", [])]


def pods(manifests: dict[tuple[str, str], Manifest]) -> Iterator[Pods]:
    for key, manifest in manifests.items():
        spec = manifest.get("spec", {})
        claims = {claim["metadata"]["name"] for claim in spec.get("volumeClaimTemplates", [])}
        if manifest["kind"] == "Pod":
            yield Pods(key, manifest, claims)
        for name in ("template", "submitterPodTemplate"):
            if name in spec:
                yield Pods(key, spec[name], claims)
        for template, labels in nodes(manifest):
            yield Pods(key, {**template, "metadata": {"labels": labels}}, claims)


def nodes(manifest: Manifest) -> Iterator[tuple[Manifest, dict[str, str]]]:
    """The templates of a cluster's head and workers, with the labels that KubeRay gives them."""
    cluster = manifest.get("spec", {}).get("rayClusterSpec")
    if cluster:
        ours = {"ray.io/is-ray-node": "yes", "app.kubernetes.io/name": "kuberay"}
        yield cluster["headGroupSpec"]["template"], {**ours, "ray.io/node-type": "head"}
        for group in cluster["workerGroupSpecs"]:
            yield group["template"], {**ours, "ray.io/node-type": "worker"}


def structural_problems(manifests: dict[tuple[str, str], Manifest]) -> list[str]:
    return [
        *namespace_problems(manifests),
        *selector_problems(manifests),
        *volume_problems(manifests),
        *secret_problems(manifests),
        *port_problems(manifests),
    ]


def namespace_problems(manifests: dict[tuple[str, str], Manifest]) -> Iterator[str]:
    names = {name for kind, name in manifests if kind == "Namespace"}
    for (kind, name), manifest in manifests.items():
        if (
            kind not in ("Namespace", "StorageClass")
            and manifest["metadata"].get("namespace") not in names
        ):
            yield f"{kind} {name} is in no namespace of ours"


def selector_problems(manifests: dict[tuple[str, str], Manifest]) -> Iterator[str]:
    templates = list(pods(manifests))
    for (kind, name), manifest in manifests.items():
        spec = manifest.get("spec", {})
        if kind in ("Deployment", "StatefulSet"):
            own = next(one for one in templates if one.key == (kind, name))
            if not spec["selector"]["matchLabels"].items() <= own.labels.items():
                yield f"{kind} {name} does not select its own pods"
        if kind == "StatefulSet" and ("Service", spec["serviceName"]) not in manifests:
            yield f"{kind} {name} names no service that exists"
        wanted = spec.get("selector") if kind == "Service" else None
        if kind == "NetworkPolicy":
            wanted = spec["podSelector"].get("matchLabels")
        if wanted and not any(wanted.items() <= one.labels.items() for one in templates):
            yield f"{kind} {name} selects no pods"


def volume_problems(manifests: dict[tuple[str, str], Manifest]) -> Iterator[str]:
    for one in pods(manifests):
        volumes = {volume["name"]: volume for volume in one.spec.get("volumes", [])}
        mounted = {
            mount["name"] for c in one.containers for mount in c.get("volumeMounts", [])
        }  # fmt: skip
        for name in mounted ^ (volumes.keys() | one.claims):
            yield f"volume {name} of {one.key[1]} is mounted or declared, not both"
        for volume in volumes.values():
            claim = volume.get("persistentVolumeClaim", {}).get("claimName")
            if claim and ("PersistentVolumeClaim", claim) not in manifests:
                yield f"claim {claim} does not exist"


def secret_problems(manifests: dict[tuple[str, str], Manifest]) -> Iterator[str]:
    """Secrets are made by the command that the README gives, with these keys."""
    made = secret_of_readme()
    for one in pods(manifests):
        used = [
            (source["secretKeyRef"]["name"], source["secretKeyRef"]["key"])
            for container in one.containers
            for variable in container.get("env", [])
            if (source := variable.get("valueFrom"))
        ]
        for volume in one.spec.get("volumes", []):
            secret = volume.get("secret", {})
            used += [(secret["secretName"], item["key"]) for item in secret.get("items", [])]
        yield from (f"secret {name}/{key} is not made" for name, key in {*used} - made)
    for (kind, name), manifest in manifests.items():
        auth = manifest.get("spec", {}).get("rayClusterSpec", {}).get("authOptions")
        if auth and (auth["secretName"], "auth_token") not in made:
            yield f"{kind} {name} finds no token in its secret"


def secret_of_readme() -> set[tuple[str, str]]:
    command = re.search(r"kubectl create secret generic .*", README)
    assert command
    words = shlex.split(command[0])
    keys = [word.split("=", 2)[1] for word in words if word.startswith("--from-")]
    return {(words[4], key) for key in keys}


def port_problems(manifests: dict[tuple[str, str], Manifest]) -> Iterator[str]:
    open_ports: dict[str, set[int]] = {}
    for (kind, name), manifest in manifests.items():
        if kind != "Service":
            continue
        wanted = manifest["spec"]["selector"].items()
        for port in manifest["spec"]["ports"]:
            open_ports.setdefault(name, set()).add(port["port"])
            for one in pods(manifests):
                if wanted <= one.labels.items():
                    ports = {p["name"]: p["containerPort"] for p in container_ports(one)}
                    if ports.get(port["targetPort"]) != port["port"]:
                        yield f"service {name} and its pods disagree on port {port['name']}"
    for one in pods(manifests):
        ports = {port["name"]: port["containerPort"] for port in container_ports(one)}
        for container in one.containers:
            probe = container.get("readinessProbe", {})
            for way in ("httpGet", "tcpSocket"):
                if way in probe and probe[way]["port"] not in ports:
                    yield f"probe of {container['name']} asks a port that is not open"
            words = [
                *container.get("args", []),
                *(e.get("value", "") for e in container.get("env", [])),
            ]
            for word in words:
                asked = re.match(r"-{1,2}(?:s3\.)?port=(\d+)$", word)
                if asked and int(asked[1]) not in ports.values():
                    yield f"{container['name']} listens to {asked[1]}, which is not open"
                for host, port in re.findall(r"://(?:[^@/]*@)?([a-z-]+):(\d+)", word):
                    if int(port) not in open_ports.get(host, ()):
                        yield f"{container['name']} calls {host}:{port}, which no service offers"


def container_ports(one: Pods) -> list[Manifest]:
    return [port for container in one.containers for port in container.get("ports", [])]


def test_manifests_agree_with_each_other():
    assert structural_problems(ALL) == []


@pytest.mark.parametrize(
    ("key", "path", "value", "problem"),
    [
        (("Service", "mlflow"), "spec selector app", "x", "selects no pods"),
        (("Service", "mlflow"), "spec ports 0 port", 80, "disagree on port"),
        (("Service", "postgres"), "spec ports 0 targetPort", "x", "disagree on port"),
        (("Service", "mlflow"), "metadata namespace", "x", "no namespace of ours"),
        (("Deployment", "mlflow"), f"{POD} metadata labels app", "x", "not select its own pods"),
        (("Deployment", "mlflow"), f"{POD} spec containers 0 args 1", "--port=80", "listens to 80"),
        (
            ("Deployment", "mlflow"),
            f"{POD} spec containers 0 readinessProbe httpGet port",
            "x",
            "asks a port that is not open",
        ),
        (("StatefulSet", "postgres"), "spec serviceName", "x", "names no service"),
        (
            ("StatefulSet", "postgres"),
            f"{POD} spec containers 0 env 3 valueFrom secretKeyRef key",
            "x",
            "secret feta-sweep/x is not made",
        ),
        (
            ("StatefulSet", "object-store"),
            f"{POD} spec containers 0 volumeMounts 0 name",
            "x",
            "mounted or declared",
        ),
        (("NetworkPolicy", "mlflow"), "spec podSelector matchLabels app", "x", "no pods"),
        (JOB, f"{SPEC} authOptions secretName", "x", "no token"),
        (
            JOB,
            f"{HEAD} spec volumes 0 persistentVolumeClaim claimName",
            "x",
            "claim x does not exist",
        ),
        (
            JOB,
            f"{HEAD} spec containers 0 env 1 value",
            "http://mlflow:80",
            "calls mlflow:80",
        ),
    ],
)
def test_disagreements_are_found(manifests, key, path, value, problem):
    *steps, last = [int(step) if step.isdigit() else step for step in path.split()]
    place = manifests[key]
    for step in steps:
        place = place[step]
    assert place[last] != value
    place[last] = value
    assert any(problem in found for found in structural_problems(manifests))


def test_autoscaler_sees_a_head_for_trials_and_spot_workers_first():
    cluster = {"metadata": {"namespace": "feta-sweep", "name": "made-by-kuberay"}}
    cluster["spec"] = copy.deepcopy(ALL[JOB]["spec"]["rayClusterSpec"])
    config = _derive_autoscaling_config_from_ray_cr(cluster)
    validate_config(config)
    types = config["available_node_types"]
    head = types.pop("headgroup")["resources"]
    assert head["CPU"] == 0
    assert head[DRIVER_RESOURCE] == 8
    assert config["idle_timeout_minutes"] == 10
    assert types["gpu-spot"]["priority"] > types["gpu-on-demand"]["priority"]
    assert types["gpu-spot"]["resources"] == types["gpu-on-demand"]["resources"]
    for kind in types.values():
        assert kind["min_workers"] == 0 < kind["max_workers"]
        assert kind["resources"]["GPU"] == 1
    # Without it Ray would wait an hour for a spot node before it tries the other group.
    variables = {v["name"]: v["value"] for v in cluster["spec"]["autoscalerOptions"]["env"]}
    assert 300 <= int(variables["RAY_AUTOSCALER_RECONCILE_ALLOCATE_STATUS_TIMEOUT_S"]) <= 1800


def test_spot_and_on_demand_nodes_exclude_each_other():
    groups = ALL[JOB]["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    spot, on_demand = (
        group["template"]["spec"]["affinity"]["nodeAffinity"][
            "requiredDuringSchedulingIgnoredDuringExecution"
        ]["nodeSelectorTerms"]
        for group in groups
    )
    positive = [term["matchExpressions"][0] for term in spot]
    (negative,) = [term["matchExpressions"] for term in on_demand]
    assert [{**one, "operator": "NotIn"} for one in positive] == negative


def test_every_node_has_the_secret_the_folder_and_the_same_image():
    nodes = [one for one in pods(ALL) if "ray.io/is-ray-node" in one.labels]
    assert len(nodes) >= 3
    for node in nodes:
        (container,) = node.containers
        variables = {variable["name"]: variable.get("value") for variable in container["env"]}
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        (secret,) = (v["secret"] for v in node.spec["volumes"] if v["name"] == "secret")
        (item,) = secret["items"]
        assert variables[SECRET_FILE_VARIABLE] == f"{mounts['secret']}/{item['path']}"
        assert not secret["defaultMode"] & 0o007
        assert mounts["shared"] == "/mnt/feta-sweep"
        is_head = node.labels["ray.io/node-type"] == "head"
        assert variables.get("MLFLOW_TRACKING_URI") == ("http://mlflow:5000" if is_head else None)
    claim = ALL["PersistentVolumeClaim", "feta-sweep"]["spec"]
    (kept,) = (manifest for key, manifest in ALL.items() if key[0] == "StorageClass")
    assert claim["storageClassName"] == kept["metadata"]["name"]
    assert kept["reclaimPolicy"] == "Retain"  # The only ledger lies there.
    assert kept["parameters"]["protocol"] == "NFS_V4_1"
    assert claim["accessModes"] == ["ReadWriteMany"]
    assert "storage_path=/mnt/feta-sweep/" in ALL[JOB]["spec"]["entrypoint"]
    version = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.M)
    ours = {c["image"] for one in pods(ALL) for c in one.containers if "feta" in c["image"]}
    assert version
    assert ours == {f"feta-sweep:{version[1]}"}


def test_image_has_the_driver_that_the_data_base_is_asked_with():
    """Without a name SQLAlchemy takes another one from version 2.1 on."""
    (server,) = ALL["Deployment", "mlflow"]["spec"]["template"]["spec"]["containers"]
    variables = {variable["name"]: variable.get("value") for variable in server["env"]}
    driver = make_url(variables["MLFLOW_BACKEND_STORE_URI"]).get_driver_name()
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    installed = extras["optional-dependencies"]["kuberay"]
    assert any(line.startswith(f"{driver}-binary") for line in installed)


def test_ray_is_the_pinned_one():
    pin = re.search(r"^ray==(.*)$", (ROOT / "constraints.txt").read_text(), re.M)
    assert pin
    assert ALL[JOB]["spec"]["rayClusterSpec"]["rayVersion"] == pin[1]


def test_the_job_for_kueue_is_the_same_on_machines_that_do_not_come_and_go():
    """Kueue refuses another cluster's job, one that stays, autoscaling, and more than 7 groups."""
    queued, usual = copy.deepcopy(ALL["RayJob", "queued"]), copy.deepcopy(ALL[JOB])
    assert queued["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "feta-sweep"}
    (group,) = queued["spec"]["rayClusterSpec"].pop("workerGroupSpecs")
    assert group["minReplicas"] == group["maxReplicas"] == group["replicas"]
    assert f"max_concurrent_trials={group['replicas']} " in queued["spec"]["entrypoint"]
    (*_, on_demand) = usual["spec"]["rayClusterSpec"].pop("workerGroupSpecs")
    on_demand["template"]["spec"].pop("affinity")
    assert group["template"] == on_demand["template"]
    head = queued["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    assert head.pop("automountServiceAccountToken") is False  # No autoscaler needs it.
    for key in ("enableInTreeAutoscaling", "autoscalerOptions"):
        usual["spec"]["rayClusterSpec"].pop(key)
    assert queued["spec"] == usual["spec"]


@pytest.mark.parametrize("key", [key for key in ALL if key[0] == "RayJob"], ids="/".join)
def test_a_jobs_cluster_ends_with_it_and_never_runs_for_ever(key):
    spec = ALL[key]["spec"]
    assert spec["shutdownAfterJobFinishes"] is True
    assert spec["ttlSecondsAfterFinished"] <= 600
    assert spec["preRunningDeadlineSeconds"] <= 3600
    assert spec["activeDeadlineSeconds"] <= 7 * 86400
    assert "clusterSelector" not in spec
    environment = yaml.safe_load((ROOT / "clusters" / "runtime_env.yaml").read_text())
    assert yaml.safe_load(spec["runtimeEnvYAML"]) == environment  # As on the other clusters.
