"""Launcher files: valid for the pinned Ray and each cloud's own schema, and able to run a sweep.

No cloud is reached: what a schema cannot tell, such as quotas and images, only a real run would.
"""

import copy
import gzip
import http.server
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import threading
import tomllib
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import pytest
import yaml
from ray._private.runtime_env.packaging import create_package
from ray.autoscaler._private import util
from ray.job_submission import JobStatus
from ray.scripts.scripts import cli

from clusters import autostop, notice, spot
from clusters.local.ports import free_ports
from core.config.yaml_subset import parse
from core.privacy.keys import SECRET_FILE_VARIABLE
from sweep.driver.launch import DRIVER_RESOURCE

ROOT = Path(__file__).resolve().parents[2]
CLUSTERS = ROOT / "clusters"
CLOUDS = ("aws", "gcp")
FILES = {cloud: yaml.safe_load((CLUSTERS / f"{cloud}.yaml").read_text()) for cloud in CLOUDS}
HEAD, WORKER = "head", "gpu"

every_cloud = pytest.mark.parametrize("cloud", CLOUDS)


def node_config(cloud: str, node_type: str) -> dict[str, Any]:
    return FILES[cloud]["available_node_types"][node_type]["node_config"]


@every_cloud
def test_launcher_file_is_valid_for_ray(cloud):
    config = FILES[cloud]
    util.validate_config(util.prepare_config(copy.deepcopy(config)))
    with pytest.raises(jsonschema.ValidationError, match="unknown_key"):
        util.validate_config(util.prepare_config({**copy.deepcopy(config), "unknown_key": 1}))


@every_cloud
def test_head_holds_trials_and_workers_come_and_go(cloud):
    config = FILES[cloud]
    types = config["available_node_types"]
    assert set(types) == {HEAD, WORKER}
    assert config["head_node_type"] == HEAD
    assert types[HEAD]["resources"] == {"CPU": 0, DRIVER_RESOURCE: 8}
    assert types[WORKER]["min_workers"] == 0
    assert 0 < types[WORKER]["max_workers"] <= config["max_workers"]
    assert types[WORKER]["resources"]["GPU"] == 1
    assert 0 < config["idle_timeout_minutes"] <= 10
    assert config["provider"]["cache_stopped_nodes"] is False


@every_cloud
def test_clouds_differ_only_in_their_machines(cloud):
    own = {"provider", "available_node_types", "setup_commands"}
    assert {k: v for k, v in FILES[cloud].items() if k not in own} == {
        k: v for k, v in FILES["aws"].items() if k not in own
    }
    assert FILES[cloud]["setup_commands"] == [f"bash ~/feta-sweep/clusters/setup.sh {cloud}"]
    assert {k: v["resources"] for k, v in FILES[cloud]["available_node_types"].items()} == {
        k: v["resources"] for k, v in FILES["aws"]["available_node_types"].items()
    }


def test_aws_head_takes_the_role_that_the_template_makes():
    text = (CLUSTERS / "aws-storage.yaml").read_text()
    name = node_config("aws", HEAD)["IamInstanceProfile"]["Name"]
    assert f"InstanceProfileName: {name}\n" in text


@pytest.mark.parametrize("node_type", [HEAD, WORKER])
def test_gcp_machine_is_valid_for_the_compute_api(node_type):
    schemas = json.loads(
        gzip.decompress((ROOT / "tests" / "data" / "gcp-compute-v1-instance.json.gz").read_bytes())
    )["schemas"]
    config = node_config("gcp", node_type)
    check_discovery(schemas, "Instance", config)
    check_discovery(schemas, "Instance", spot._gcp_on_demand(config))
    for wrong in ({"machineTipe": "x"}, {"disks": {"boot": True}}, {"scheduling": {"spot": 1}}):
        with pytest.raises(AssertionError):
            check_discovery(schemas, "Instance", {**config, **wrong})


def check_discovery(schemas: dict, name: str, value: Any) -> None:
    """Checks names, types and enumerations of a value against a Google discovery document."""
    check_discovery_node(schemas, schemas[name], value, name)


def check_discovery_node(schemas: dict, schema: dict, value: Any, path: str) -> None:
    schema = schemas[schema["$ref"]] if "$ref" in schema else schema
    python = {"object": dict, "array": list, "string": str, "boolean": bool, "integer": int}
    # The API takes int64, which its schema calls a string, as a number too.
    kinds = (str, int) if schema.get("format") == "int64" else (python[schema["type"]],)
    assert isinstance(value, kinds), f"{path} is {value!r}"
    assert value in schema.get("enum", [value]), f"{path} is {value!r}"
    for key, item in value.items() if isinstance(value, dict) else ():
        inner = schema.get("properties", {}).get(key) or schema.get("additionalProperties")
        assert inner, f"{path}.{key} is unknown"
        check_discovery_node(schemas, inner, item, f"{path}.{key}")
    for item in value if isinstance(value, list) else ():
        check_discovery_node(schemas, schema["items"], item, path)


class Provider:
    """Stands for a cloud without spot capacity; the real providers need an account."""

    def __init__(self, is_spot, room: int = 99) -> None:
        self.is_spot, self.room, self.made = is_spot, room, []

    def create_node(self, node_config, tags, count):
        for _ in range(count):
            if self.is_spot(node_config):
                raise RuntimeError("no spot capacity")
            if len(self.made) == self.room:
                raise RuntimeError("no capacity at all")
            self.made.append(node_config)
        return {f"node-{len(self.made)}": node_config}


SPOT = {
    "aws": lambda c: c.get("InstanceMarketOptions", {}).get("MarketType") == "spot",
    "gcp": lambda c: c.get("scheduling", {}).get("provisioningModel") == "SPOT",
}


@every_cloud
def test_workers_are_spot_machines_and_fall_back_to_on_demand(cloud):
    module, _, name = FILES[cloud]["provider"]["module"].rpartition(".")
    assert module == "clusters.spot"
    on_demand = spot._CLOUDS[name][2]
    worker, head = node_config(cloud, WORKER), node_config(cloud, HEAD)
    assert SPOT[cloud](worker)
    assert not SPOT[cloud](head)
    provider = spot.with_fallback(Provider, on_demand)(SPOT[cloud], room=3)
    assert len(provider.create_node(worker, {}, 3)) == 3
    assert provider.made == [on_demand(worker)] * 3
    assert machine(provider.made[0]) == machine(worker)
    with pytest.raises(RuntimeError, match="no capacity at all"):
        provider.create_node(worker, {}, 1)
    with pytest.raises(RuntimeError, match="no capacity at all"):  # Of the head, asked once.
        provider.create_node(head, {}, 1)


def machine(config: dict[str, Any]) -> str:
    return config.get("InstanceType") or config["machineType"]


@every_cloud
def test_price_table_names_the_machines_of_the_launcher_file(cloud):
    prices = parse((CLUSTERS / "prices.yaml").read_text())["prices"][cloud]
    assert {"date", "source", "region"} < set(prices)
    assert prices["region"] == FILES[cloud]["provider"]["region"]
    for node_type in FILES[cloud]["available_node_types"]:
        assert prices[node_type]["machine"] == machine(node_config(cloud, node_type))
        assert prices[node_type]["on_demand"] > 0
    assert 0 < prices[WORKER]["spot"] < prices[WORKER]["on_demand"]
    idle = parse((CLUSTERS / "prices.yaml").read_text())["minutes"]
    assert idle["idle"] == FILES[cloud]["idle_timeout_minutes"]
    (stop,) = (line for line in FILES[cloud]["head_start_ray_commands"] if "autostop" in line)
    assert f"--minutes {idle['head_idle']} " in stop


def test_nodes_get_what_they_install_and_nothing_that_grows():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    found = project["tool"]["setuptools"]["packages"]["find"]["include"]
    packages = {name.rstrip("*") for name in found}
    named = {"pyproject.toml", project["project"]["readme"], *project["project"]["license-files"]}
    for cloud in CLOUDS:
        mounts = FILES[cloud]["file_mounts"]
        here = {path for node, path in mounts.items() if node == f"/home/ubuntu/feta-sweep/{path}"}
        assert here == packages | named | {"constraints.txt"}
        assert len(mounts) == len(here) + 1
        assert all((ROOT / path).exists() for path in here)


@pytest.mark.parametrize("place", [*CLOUDS, "skypilot.yaml", "kuberay/Dockerfile"])
def test_every_node_has_what_the_copy_of_the_ledger_needs(place):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    script = (CLUSTERS / ("setup.sh" if place in CLOUDS else place)).read_text()
    (names,) = re.findall(r"""['"]\.\[(.*)\]['"]""", script)
    wanted, extras = names.replace("$cloud", place).split(","), set[str]()
    while wanted:  # An extra may take in another one.
        extras.add(extra := wanted.pop())
        for package in project["optional-dependencies"][extra]:
            wanted += re.findall(rf"^{project['name']}\[(.*)\]$", package)
    assert extras >= {"images", "sweep", "s3"}
    imported = re.findall(
        r"^ +import (\w+)$", (ROOT / "core/privacy/ledger/durable_copy.py").read_text(), re.M
    )
    assert imported == [each.partition(">")[0] for each in project["optional-dependencies"]["s3"]]


@every_cloud
def test_the_head_ends_itself_when_idle_and_workers_sooner(cloud):
    start, stop = FILES[cloud]["head_start_ray_commands"][-2:]
    assert "ray start --head" in start
    found = re.search(r" python -m clusters.autostop --minutes (\d+) .* &$", stop)
    assert found
    assert FILES[cloud]["idle_timeout_minutes"] < int(found[1]) <= 60
    # As Ray wraps what it runs over SSH.
    subprocess.run(["bash", "-n"], input=f"true && ({stop})", text=True, check=True)


@every_cloud
def test_workers_listen_for_the_clouds_notice(cloud):
    start, notice = FILES[cloud]["worker_start_ray_commands"][-2:]
    assert "ray start --address" in start
    assert " python -m clusters.notice " in notice
    subprocess.run(["bash", "-n"], input=f"true && ({notice})", text=True, check=True)


@pytest.mark.parametrize("name", ["rayjob.yaml", "kueue-rayjob.yaml"])
def test_what_tells_ray_of_the_end_of_a_machine_has_options_that_ray_knows(name, monkeypatch):
    calls: list[list[str]] = []
    monkeypatch.setattr(notice, "seconds_left", lambda metadata: 120)
    monkeypatch.setattr(notice.subprocess, "call", lambda command: calls.append(command) or 0)
    assert notice.main(["--node-id", "ab" * 28]) == 0
    (job,) = yaml.safe_load_all((CLUSTERS / "kuberay" / name).read_text())
    for group in job["spec"]["rayClusterSpec"]["workerGroupSpecs"]:
        (container,) = group["template"]["spec"]["containers"]
        *shell, script = container["lifecycle"]["preStop"]["exec"]["command"]
        assert shell == ["bash", "-c"]
        calls.append(shlex.split(script.partition(" && ")[0]))
    for ray, name, *arguments in calls:
        assert (ray, name) == ("ray", "drain-node")
        cli.commands[name].make_context(name, arguments)
    assert calls[0][calls[0].index("--deadline-remaining-seconds") + 1] == "120"


def test_a_notice_is_that_of_aws_or_of_gcp_and_nothing_else():
    pages: dict[tuple[str, str, str], str] = {}

    class Metadata(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            own = [(k.lower(), v) for k, v in self.headers.items() if k.startswith(("X-", "Meta"))]
            headers = [f"{name}: {value}" for name, value in own]
            text = pages.get((self.command, self.path, *headers), "")
            self.send_response(200 if text else 404)
            self.end_headers()
            self.wfile.write(text.encode())

        def do_PUT(self) -> None:
            self.do_GET()

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Metadata)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    assert notice.seconds_left(address) == 0
    gcp = ("GET", "/computeMetadata/v1/instance/preempted", "metadata-flavor: Google")
    pages[gcp] = "FALSE"
    assert notice.seconds_left(address) == 0
    pages[gcp] = "TRUE"
    assert notice.seconds_left(address) == 30
    ttl = "x-aws-ec2-metadata-token-ttl-seconds: 60"
    pages[("PUT", "/latest/api/token", ttl)] = "t"
    action = "/latest/meta-data/spot/instance-action"
    pages[("GET", action, "x-aws-ec2-metadata-token: t")] = '{"action": "terminate"}'
    assert notice.seconds_left(address) == 120
    server.shutdown()
    server.server_close()
    assert notice.seconds_left(address) == 0


@pytest.mark.parametrize("on_gcp", [True, False])
def test_a_head_of_gcp_deletes_itself_as_its_disk_would_stay(on_gcp, tmp_path):
    stand_ins = {
        "curl": """echo "curl $*" >>"$LOG"
            case "${@: -1}" in
            *instance/zone) echo projects/1/zones/z ;;
            *instance/name) echo ray-head ;;
            *token) echo '{"access_token": "of-this-test", "expires_in": 9}' ;;
            *) cat >>"$LOG" ;;
            esac""",
        "sudo": 'echo "sudo $*" >>"$LOG"',
    }
    if not on_gcp:
        stand_ins["curl"] = "exit 6"  # No such host.
    for name, body in stand_ins.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "LOG": str(tmp_path / "log")}
    subprocess.run(["bash", CLUSTERS / "end_head.sh"], env=environment, check=True)
    done = (tmp_path / "log").read_text()
    assert done.splitlines()[-1] == "sudo shutdown -h now"
    deletes = "-X DELETE -H @- https://compute.googleapis.com/compute/v1/projects/1/zones/z/"
    assert (f"{deletes}instances/ray-head\n" in done) is on_gcp
    assert ("Authorization: Bearer of-this-test\n" in done) is on_gcp
    disks = node_config("gcp", HEAD)["disks"]
    assert all(disk["autoDelete"] for disk in disks)


def test_idle_is_a_time_without_a_break():
    now, told = [0.0], iter([True, False, False, False, True, *[False] * 9])

    def sleep(seconds: float) -> None:
        now[0] += seconds

    autostop.wait_until_idle(lambda: next(told), 40, lambda: now[0], sleep)
    assert now[0] == 10 * (5 + 4)


def test_jobs_and_workers_keep_a_cluster_and_a_dead_ray_does_not(monkeypatch):
    def state(*jobs: str, workers: int) -> bool:
        node = SimpleNamespace(state="ALIVE", is_head_node=True)
        worker, gone = (SimpleNamespace(state=s, is_head_node=False) for s in ("ALIVE", "DEAD"))
        there = [SimpleNamespace(status=JobStatus(job)) for job in jobs]
        client = SimpleNamespace(list_jobs=lambda: there)
        monkeypatch.setattr(autostop, "JobSubmissionClient", lambda address: client)
        nodes = [node, gone, *[worker] * workers]
        monkeypatch.setattr(autostop, "list_nodes", lambda **kwargs: nodes)
        return autostop.is_busy()

    assert state("RUNNING", "SUCCEEDED", workers=0)
    assert state("PENDING", workers=0)
    assert state("FAILED", workers=1)
    assert not state("SUCCEEDED", "FAILED", "STOPPED", workers=0)
    monkeypatch.setattr(autostop, "JobSubmissionClient", _refuse)
    assert not autostop.is_busy()


def _refuse(address: str) -> None:
    raise ConnectionError("nobody listens")


def test_skypilot_file_fits_its_schemas_and_takes_along_what_is_installed():
    text = (CLUSTERS / "README.md").read_text()
    (version,) = re.findall(r"skypilot\[.*\]==([\d.]+)", text)
    path = ROOT / "tests" / "data" / f"skypilot-{version}.json.gz"
    schemas = json.loads(gzip.decompress(path.read_bytes()))
    task = yaml.safe_load((CLUSTERS / "skypilot.yaml").read_text())
    for schema, part in (("task", task), ("resources", task["resources"])):
        jsonschema.validate(part, schemas[schema])
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({**part, "unknown": 1}, schemas[schema])
    assert 0 < task["resources"]["autostop"]["idle_minutes"] <= 60
    # A spot machine, and one that is deleted when idle, would take the ledger along.
    assert task["resources"]["use_spot"] is task["resources"]["autostop"]["down"] is False
    mounts = {k.removeprefix("~/feta-sweep/"): v for k, v in task["file_mounts"].items()}
    secret = "~/.config/feta-sweep/master.secret"
    assert mounts.pop(secret) == secret
    launcher = FILES["aws"]["file_mounts"].values()
    assert {*mounts} == {*mounts.values()} == {path for path in launcher if path[0] != "~"}
    for script in (task["setup"], task["run"]):
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def test_secrets_come_from_outside_the_repository():
    for cloud in CLOUDS:
        mounts = FILES[cloud]["file_mounts"]
        assert mounts["/home/ubuntu/.config/feta-sweep"] == "~/.config/feta-sweep"
    text = (CLUSTERS / "environment.sh").read_text()
    assert f'{SECRET_FILE_VARIABLE}="$FETA_SWEEP_SETTINGS/master.secret"' in text
    for path in CLUSTERS.rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts:
            assert not re.search(
                r"\b[0-9a-f]{32,}\b|AKIA[0-9A-Z]{16}|BEGIN \w+ PRIVATE", read(path)
            )


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def test_every_shell_of_a_node_knows_where_things_are(tmp_path):
    settings = tmp_path / ".config" / "feta-sweep"
    settings.mkdir(parents=True)
    (settings / "cluster.env").write_text("FETA_SWEEP_NFS=host:/share\nFETA_SWEEP_BUCKET=s3://b\n")
    shown = subprocess.run(
        ["bash", "-c", f"set -eu; . {CLUSTERS}/environment.sh; env"],
        env={"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    seen = dict(line.split("=", 1) for line in shown.splitlines() if "=" in line)
    assert seen["FETA_SWEEP_NFS"] == "host:/share"
    assert seen["FETA_SWEEP_BUCKET"] == "s3://b"
    assert seen[SECRET_FILE_VARIABLE] == f"{settings}/master.secret"
    assert seen["RAY_AUTH_MODE"] == "token"
    assert seen["RAY_AUTH_TOKEN_PATH"] == f"{settings}/ray.token"
    assert seen["MLFLOW_TRACKING_URI"] == "http://127.0.0.1:5000"
    assert seen["PATH"].startswith(f"{tmp_path}/feta-sweep/.venv/bin:")


@pytest.mark.parametrize("script", sorted(CLUSTERS.rglob("*.sh")), ids=lambda path: path.name)
def test_script_parses(script):
    subprocess.run(["bash", "-n", script], check=True)


def test_a_job_uploads_code_and_presets_alone(tmp_path):
    """By Ray's own packager, from a checkout in which all sorts of things lie about."""
    checkout = tmp_path / "checkout"
    for name in ("clusters", "core", "sweep", "tests/data"):
        shutil.copytree(ROOT / name, checkout / name)
    for name in (".gitignore", ".rayignore", "README.md", "pyproject.toml"):
        shutil.copy(ROOT / name, checkout)
    private = "data/a.png core/data/b.png core/data/photos/c.png core/data/train-images-idx3-ubyte"
    private += " sweep/configs/d.csv clusters/master.secret runs/e/f.pt runs-2/g.npz bundle/h.png"
    private += " core/data/photos/labels.py core/photos/001 i.npz j.py .config/feta-sweep/ray.token"
    for name in private.split():
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).write_text("private")
    create_package(str(checkout), tmp_path / "up.zip", include_gitignore=True)
    up = {name for name in zipfile.ZipFile(tmp_path / "up.zip").namelist() if name[-1] != "/"}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    patterns = [f"{top}/**/*.py" for top in ("clusters", "core", "sweep")]
    patterns += [
        f"{top}/{name}" for top, names in project["package-data"].items() for name in names
    ]
    found = {path for pattern in patterns for path in ROOT.glob(pattern)}
    wanted = {path.relative_to(ROOT).as_posix() for path in found} | {"clusters/prices.yaml"}
    assert up == wanted, f"name in .rayignore, or take out: {sorted(up ^ wanted)}"


def test_secrets_are_made_once_for_their_owner_alone(tmp_path):
    def make() -> list[str]:
        environment = {"HOME": str(tmp_path), "PATH": os.environ["PATH"]}
        subprocess.run(["bash", CLUSTERS / "secrets.sh"], env=environment, check=True)
        folder = tmp_path / ".config" / "feta-sweep"
        assert {path.stat().st_mode & 0o077 for path in (folder, *folder.iterdir())} == {0}
        return [(folder / name).read_text() for name in ("master.secret", "ray.token")]

    made = make()
    assert all(re.fullmatch(r"[0-9a-f]{64}\n", each) for each in made)
    assert len({*made}) == 2
    assert make() == made


def test_ports_are_free_different_and_none_that_the_system_gives_out():
    with socket.socket() as taken:
        (port,) = free_ports(1)
        taken.bind(("127.0.0.1", port))
        taken.listen()
        ports = free_ports(2_000)
        assert len(set(ports)) == 2_000
        assert port not in free_ports(11_000)
    assert 20_000 <= min(ports) <= max(ports) < 32_000 < 32_768
    assert free_ports(1) != free_ports(1)
