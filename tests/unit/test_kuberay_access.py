"""Rights of pods, and who reaches whom: by the rules of Kubernetes, computed here."""

import re

import pytest
from test_kuberay import ALL, JOB, README, Manifest, pods


def refused_when_restricted(spec: Manifest) -> list[str]:
    """What the pod security standard "restricted" refuses, by the checks that it lists."""
    found = [key for key in ("hostNetwork", "hostPID", "hostIPC") if spec.get(key)]
    whole = spec.get("securityContext", {})
    allowed = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "projected", "secret"}
    kinds = {kind for volume in spec.get("volumes", []) for kind in volume} - {"name"}
    found += sorted(kinds - allowed - {"persistentVolumeClaim"})
    if {key for key in whole if key in ("sysctls", "seLinuxOptions", "windowsOptions")}:
        found.append("securityContext")
    for container in [*spec["containers"], *spec.get("initContainers", [])]:
        own = container.get("securityContext", {})
        capabilities = own.get("capabilities", {})
        if own.get("privileged") or "procMount" in own or "seLinuxOptions" in own:
            found.append("privileges")
        if own.get("allowPrivilegeEscalation") is not False:
            found.append("allowPrivilegeEscalation")
        if "ALL" not in capabilities.get("drop", []):
            found.append("capabilities.drop")
        if {*capabilities.get("add", [])} - {"NET_BIND_SERVICE"}:
            found.append("capabilities.add")
        if (own.get("runAsNonRoot", whole.get("runAsNonRoot"))) is not True:
            found.append("runAsNonRoot")
        if 0 in (own.get("runAsUser"), whole.get("runAsUser")):
            found.append("runAsUser")
        profile = own.get("seccompProfile", whole.get("seccompProfile", {}))
        if profile.get("type") not in ("RuntimeDefault", "Localhost"):
            found.append("seccompProfile")
        found += [
            f"hostPort {p['hostPort']}" for p in container.get("ports", []) if "hostPort" in p
        ]
    return found


def test_the_restricted_standard_admits_every_pod_and_the_namespace_demands_it():
    labels = ALL["Namespace", "feta-sweep"]["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"
    templates = list(pods(ALL))
    assert len(templates) >= 8
    for one in templates:
        assert refused_when_restricted(one.spec) == [], one.key
        # Only the head's autoscaler asks Kubernetes for something.
        is_head = one.labels.get("ray.io/node-type") == "head"
        assert is_head or one.spec["automountServiceAccountToken"] is False
    for key, manifest in ALL.items():
        options = manifest.get("spec", {}).get("rayClusterSpec", {}).get("autoscalerOptions")
        if options:  # KubeRay puts this container into the head's pod.
            pod = ALL[key]["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
            assert refused_when_restricted({**pod, "containers": [options]}) == []


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"hostNetwork": True}, "hostNetwork"),
        ({"securityContext": {"runAsNonRoot": True}}, "seccompProfile"),
        ({"volumes": [{"name": "x", "hostPath": {"path": "/"}}]}, "hostPath"),
        ({"containers": [{"name": "x"}]}, "capabilities.drop"),
    ],
)
def test_what_the_standard_refuses_is_seen(change, problem):
    assert problem in refused_when_restricted({**ALL["Pod", "files"]["spec"], **change})


SUBMITTER, OUTSIDE = {"app": "submitter"}, {"app": "another"}
RAY_HEAD, RAY_WORKER = (
    {"ray.io/is-ray-node": "yes", "ray.io/node-type": kind} for kind in ("head", "worker")
)
POSTGRES, STORE, MLFLOW, FILES = (
    {"app": n} for n in ("postgres", "object-store", "mlflow", "files")
)


def reaches(source: dict[str, str], target: dict[str, str], port: int) -> bool:
    """Whether a pod of the namespace reaches another, by all policies together."""
    chosen = False
    for (kind, _), manifest in ALL.items():
        spec = manifest.get("spec", {})
        if kind != "NetworkPolicy" or not fits(spec["podSelector"], target):
            continue
        chosen = True
        for rule in spec.get("ingress", []):
            is_open = port in {p["port"] for p in rule.get("ports", [{"port": port}])}
            peers = [peer for peer in rule["from"] if "namespaceSelector" not in peer]
            if is_open and any(fits(peer["podSelector"], source) for peer in peers):
                return True
    return not chosen


def fits(selector: Manifest, labels: dict[str, str]) -> bool:
    assert {*selector} <= {"matchLabels"}
    return selector.get("matchLabels", {}).items() <= labels.items()


@pytest.mark.parametrize(
    ("target", "port", "sources"),
    [
        (POSTGRES, 5432, [MLFLOW]),
        (STORE, 8333, [MLFLOW]),
        (STORE, 8888, []),  # SeaweedFS's filer, which asks for no key.
        (STORE, 9333, []),
        (STORE, 8080, []),
        (MLFLOW, 5000, [RAY_HEAD]),
        (RAY_HEAD, 8265, [RAY_HEAD, RAY_WORKER, SUBMITTER]),
        (RAY_HEAD, 6379, [RAY_HEAD, RAY_WORKER]),
        (RAY_HEAD, 10001, [RAY_HEAD, RAY_WORKER]),
        (RAY_WORKER, 8076, [RAY_HEAD, RAY_WORKER]),
        (FILES, 22, []),
    ],
)
def test_each_part_is_reached_by_those_who_need_it_alone(target, port, sources):
    everyone = [POSTGRES, STORE, MLFLOW, FILES, RAY_HEAD, RAY_WORKER, SUBMITTER, OUTSIDE]
    assert [each for each in everyone if reaches(each, target, port)] == sources


def test_the_cluster_of_the_readme_enforces_policies_and_they_are_applied():
    (made,) = re.findall(r"gcloud container clusters create .*", README)
    assert "--enable-dataplane-v2" in made
    applied = " ".join(re.findall(r"kubectl apply .*", README))
    for name in ("gke-storage-class", "storage", "network", "mlflow", "files"):
        assert f"/{name}.yaml" in applied
    (submitter,) = (one for one in pods(ALL) if one.key == JOB and one.labels.get("app"))
    assert submitter.labels == SUBMITTER
