"""`ray up clusters/aws.yaml` and the autoscaler's launches against a mocked EC2 (moto).

Ray's own code runs, from the launcher file to the API calls, which botocore checks against AWS's
API model. Not real: EC2 itself, and SSH, whose commands are recorded.
"""

import copy
from pathlib import Path
from typing import Any

import boto3
import botocore.client
import cfnlint.decode.cfn_yaml
import pytest
import yaml
from botocore.exceptions import ClientError
from cfnlint import lint_file
from moto import mock_aws
from ray.autoscaler._private import commands
from ray.autoscaler._private.providers import _get_node_provider

CLUSTERS = Path(__file__).resolve().parents[2] / "clusters"
WORKER_TAGS = {
    "ray-node-name": "ray-feta-sweep-worker",
    "ray-node-type": "worker",
    "ray-node-status": "uninitialized",
    "ray-user-node-type": "gpu",
}


class Recorder:
    """Takes the place of the processes that would run ssh and rsync."""

    def __init__(self) -> None:
        self.commands: list[str] = []

    def check_call(self, command: Any, *args: Any, **kwargs: Any) -> None:
        self.commands.append(" ".join(command))

    def check_output(self, command: Any, *args: Any, **kwargs: Any) -> bytes:
        self.check_call(command)
        return b""


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """The cluster after `ray up`: EC2 client, provider, configuration, recorded commands."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "none")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(CLUSTERS.parent)
    settings = tmp_path / ".config" / "feta-sweep"
    settings.mkdir(parents=True)
    (settings / "master.secret").write_text("not a real secret")
    with mock_aws():
        boto3.client("iam").create_instance_profile(InstanceProfileName="feta-sweep-head")
        path = str(settings / "aws.yaml")
        Path(path).write_text(filled_in(boto3.client("ec2", "us-west-2")))
        config = yaml.safe_load(Path(path).read_text())
        config = commands._bootstrap_config(copy.deepcopy(config), no_config_cache=True)
        provider = _get_node_provider(config["provider"], config["cluster_name"], use_cache=False)
        recorder = Recorder()
        commands.get_or_create_head_node(
            config,
            path,
            no_restart=False,
            restart_only=False,
            yes=True,
            override_cluster_name=None,
            _provider=provider,
            _runner=recorder,
        )
        yield boto3.client("ec2", "us-west-2"), provider, config, recorder.commands


def filled_in(ec2: Any) -> str:
    """The launcher file with the ids that the README's commands put in."""
    subnet = ec2.describe_subnets()["Subnets"][0]
    group = ec2.create_security_group(GroupName="nodes", Description="nodes", VpcId=subnet["VpcId"])
    ids = {
        "subnet-YOURS": subnet["SubnetId"],
        "sg-YOURS": group["GroupId"],
        "ami-YOURS": ec2.describe_images()["Images"][0]["ImageId"],
    }
    text = (CLUSTERS / "aws.yaml").read_text()
    for old, new in ids.items():
        text = text.replace(old, new)
    return text


def instances(ec2: Any) -> list[dict[str, Any]]:
    found = ec2.describe_instances()["Reservations"]
    return [instance for group in found for instance in group["Instances"]]


def tags(instance: dict[str, Any]) -> dict[str, str]:
    return {tag["Key"]: tag["Value"] for tag in instance["Tags"]}


def launch(provider: Any, config: dict[str, Any], count: int = 1) -> None:
    """What the autoscaler on the head calls."""
    kind = config["available_node_types"]["gpu"]
    provider.create_node_with_resources_and_labels(
        kind["node_config"], WORKER_TAGS, count, kind["resources"], {}
    )


def test_head_and_workers(cluster, monkeypatch):
    ec2, provider, config, run = cluster

    (head,) = instances(ec2)
    assert head["InstanceType"] == "m5.xlarge"
    assert "InstanceLifecycle" not in head
    assert head["IamInstanceProfile"]["Arn"].endswith("/feta-sweep-head")
    expected = {"ray-cluster-name": "feta-sweep", "ray-node-type": "head"}
    assert expected.items() <= tags(head).items()

    ends = ec2.describe_instance_attribute(
        InstanceId=head["InstanceId"], Attribute="instanceInitiatedShutdownBehavior"
    )
    assert ends["InstanceInitiatedShutdownBehavior"] == {"Value": "terminate"}

    # Ray makes neither a firewall of its own, which would be open to the world, nor picks a zone.
    made = {group["GroupName"] for group in ec2.describe_security_groups()["SecurityGroups"]}
    assert made == {"default", "nodes"}
    assert [group["GroupName"] for group in head["SecurityGroups"]] == ["nodes"]

    started = next(command for command in run if "ray start --head" in command)
    assert '"CPU":0,"trial_driver":8' in started
    assert "RAY_enable_autoscaler_v2=1" in started
    setup = next(i for i, command in enumerate(run) if "clusters/setup.sh aws" in command)
    secrets = next(i for i, c in enumerate(run) if c.startswith("rsync") and ".config/feta" in c)
    assert secrets < setup < run.index(started)
    assert not any("not a real secret" in command for command in run)

    resources = config["available_node_types"]["gpu"]["resources"]
    assert {"CPU": 4, "GPU": 1, "accelerator_type:A10G": 1}.items() <= resources.items()
    launch(provider, config, count=2)
    workers = instances(ec2)[1:]
    assert len(workers) == 2
    for worker in workers:
        assert worker["InstanceType"] == "g5.xlarge"
        assert worker["InstanceLifecycle"] == "spot"
        assert "IamInstanceProfile" not in worker
        assert {**WORKER_TAGS, "ray-cluster-name": "feta-sweep"}.items() <= (
            tags(worker) | {"ray-node-name": WORKER_TAGS["ray-node-name"]}
        ).items()
        assert worker["SecurityGroups"] == head["SecurityGroups"]
        assert worker["SubnetId"] == head["SubnetId"]
        assert worker["ImageId"] == head["ImageId"]

    called = recorded(monkeypatch)
    launch(provider, config)
    provider.non_terminated_nodes({})
    provider.set_node_tags(instances(ec2)[-1]["InstanceId"], {"ray-node-status": "up-to-date"})
    assert {"RunInstances", "CreateTags"} <= {operation for operation, _ in called}

    refused = without_spot_capacity(monkeypatch)
    launch(provider, config)
    assert refused
    last = instances(ec2)[-1]
    assert last["InstanceType"] == "g5.xlarge"
    assert "InstanceLifecycle" not in last
    assert tags(last)["ray-user-node-type"] == "gpu"

    provider.terminate_nodes([worker["InstanceId"] for worker in workers])
    states = {i["InstanceId"]: i["State"]["Name"] for i in instances(ec2)}
    assert {states[worker["InstanceId"]] for worker in workers} == {"terminated"}
    for operation, parameters in called:
        assert_allowed(operation, parameters)


def recorded(monkeypatch) -> list[tuple[str, dict[str, Any]]]:
    """The list of all calls from now on."""
    called: list[tuple[str, dict[str, Any]]] = []
    real = botocore.client.BaseClient._make_api_call

    def call(self, operation, parameters):
        called.append((operation, parameters))
        return real(self, operation, parameters)

    monkeypatch.setattr(botocore.client.BaseClient, "_make_api_call", call)
    return called


def assert_allowed(operation: str, parameters: dict[str, Any]) -> None:
    """By the head's role, which is tied to the tag that Ray gives the cluster's machines."""
    template = cfnlint.decode.cfn_yaml.load(CLUSTERS / "aws-storage.yaml")
    role = template["Resources"]["HeadRole"]["Properties"]
    assert "ManagedPolicyArns" not in role
    statements = role["Policies"][0]["PolicyDocument"]["Statement"]
    mine = [s for s in statements if f"ec2:{operation}" in [*listed(s["Action"])]]
    assert mine, f"{operation} is not allowed"
    tag = {"Key": "ray-cluster-name", "Value": "feta-sweep"}
    for statement in mine:
        for condition in statement.get("Condition", {}).values():
            ((key, value),) = condition.items()
            if key == "aws:RequestTag/ray-cluster-name":
                (of_machines,) = parameters["TagSpecifications"]
                assert of_machines["ResourceType"] == "instance"
                assert tag in of_machines["Tags"]
            elif key == "aws:ResourceTag/ray-cluster-name":
                assert value == tag["Value"]
            else:
                assert (key, value) == ("ec2:CreateAction", "RunInstances")


def listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def without_spot_capacity(monkeypatch) -> list[str]:
    """Makes every launch of a spot machine fail as EC2 does; returns where these are listed."""
    refused: list[str] = []
    real = botocore.client.BaseClient._make_api_call

    def call(self, operation, parameters):
        if operation == "RunInstances" and "InstanceMarketOptions" in parameters:
            refused.append(parameters["InstanceType"])
            error = {"Code": "InsufficientInstanceCapacity", "Message": "none left"}
            raise ClientError({"Error": error}, operation)
        return real(self, operation, parameters)

    monkeypatch.setattr(botocore.client.BaseClient, "_make_api_call", call)
    return refused


def test_what_changes_machines_is_tied_to_the_clusters_tag_or_named():
    template = cfnlint.decode.cfn_yaml.load(CLUSTERS / "aws-storage.yaml")
    document = template["Resources"]["HeadRole"]["Properties"]["Policies"][0]["PolicyDocument"]
    for statement in document["Statement"]:
        actions = listed(statement["Action"])
        assert not any(action.endswith("*") for action in actions)
        if statement["Resource"] == "*":
            assert all(action.startswith("ec2:Describe") for action in actions)
        elif "instance/*" in str(statement["Resource"]):
            assert statement["Condition"]["StringEquals"]
    (ssh,) = template["Resources"]["NodeAccess"]["Properties"]["SecurityGroupIngress"]
    assert ssh == {"IpProtocol": "tcp", "FromPort": 22, "ToPort": 22, "CidrIp": {"Ref": "SshFrom"}}


def test_template_passes_cloudformations_linter():
    assert lint_file(CLUSTERS / "aws-storage.yaml") == []
