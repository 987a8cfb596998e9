"""Commands of the page for clusters: options that exist, and what they must name."""

import itertools
import json
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import boto3
import click
import jmespath
import pytest
import yaml
from botocore import xform_name
from ray.scripts.scripts import cli as ray_cli

from core.__main__ import _parser as core_parser
from sweep.__main__ import _parser as sweep_parser
from sweep.run import main as run_main

ROOT = Path(__file__).resolve().parents[2]
CLUSTERS = ROOT / "clusters"
PAGE = (CLUSTERS / "README.md").read_text()
BLOCKS = re.findall(r"^```sh\n(.*?)^```$", PAGE, re.M | re.S)


def shown(program: str) -> list[list[str]]:
    """Words of every command that the README shows of a program, those within `$( )` included."""
    around = re.sub(r"^```sh\n.*?^```$", "", PAGE, flags=re.M | re.S)
    lines = (
        "\n".join((*BLOCKS, *re.findall(r"`([^`]+)`", around))).replace("\\\n", " ").splitlines()
    )
    inner = [each for line in lines for each in re.findall(r"\$\(([^()]+)\)", line)]
    outer = [re.sub(r"\$\([^()]+\)", "inner", line) for line in lines]
    each = [part.strip() for line in (*outer, *inner) for part in re.split(r" (?:&&|[|>]) ", line)]
    return [shlex.split(one, comments=True) for one in each if one.startswith(f"{program} ")]


def test_blocks_of_the_readme_parse_and_name_files_that_exist():
    assert len(BLOCKS) >= 5
    for block in BLOCKS:
        subprocess.run(["bash", "-n"], input=block, text=True, check=True)
        for path in re.findall(r"(?<![\w/-])(?:clusters|sweep|core)/[\w./-]+\w", block):
            assert (ROOT / path).exists(), path
    assert "sed -i" not in PAGE  # macOS wants another argument.


def test_every_submission_names_its_environment_its_id_and_the_folder():
    text = (ROOT / "sweep" / "README.md").read_text().replace("\\\n", " ")
    others = re.findall(r"^ray job submit .*", text, re.M)
    assert others
    submissions = [*shown("ray job submit"), *map(shlex.split, others)]
    for words in submissions:
        given = dict(itertools.pairwise(words))
        assert given["--runtime-env"] == "clusters/runtime_env.yaml"
        assert given["--working-dir"] == "."
        assert "--submission-id" in given


def ours() -> list[str]:
    """Commands of this project, in the README and the files that it has run."""
    texts = [*BLOCKS, (CLUSTERS / "skypilot.yaml").read_text()]
    for name in ("rayjob", "kueue-rayjob"):
        manifest = yaml.safe_load((CLUSTERS / "kuberay" / f"{name}.yaml").read_text())
        texts.append(manifest["spec"]["entrypoint"])
    text = "\n".join(texts).replace("\\\n", " ")
    return re.findall(r"python (?:-m core|-m sweep|\S*sweep/run.py) [^'\n]*", text)


def test_what_is_run_of_this_project_is_known_to_it(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr("sweep.search.feasible.print_plan", lambda sweep, probe: seen.append(sweep))
    parsers = {"core": core_parser(), "sweep": sweep_parser()}
    for command in ours():
        _, first, *words = shlex.split(command)
        if first == "-m":
            assert parsers[words[0]].parse_args(words[1:]).command
            continue
        words = [word.removeprefix("/opt/feta-sweep/") for word in words]
        assert run_main([*words, "--plan", f"storage_path={tmp_path}"]) == 0
    on_gpus = [sweep for sweep in seen if sweep.gpus_per_worker]
    assert len(on_gpus) == 4  # Launchers, Kubernetes twice, SkyPilot.
    assert {(each.workers_per_trial, each.gpus_per_worker) for each in on_gpus} == {(1, 1)}
    assert all(each.max_concurrent_trials for each in on_gpus)


OPTIONS = json.loads((ROOT / "tests" / "data" / "command-options.json").read_text())


def options(words: list[str]) -> list[str]:
    ours = itertools.takewhile(lambda word: word != "--", words)
    return [
        word.split("=")[0]
        for word in ours
        if (word[0] == "-" and word[1:2].isalpha()) or word[:2] == "--"
    ]


@pytest.mark.parametrize("program", ["gcloud", "kubectl", "sky"])
def test_options_of_commands_exist(program):
    """By what the programs themselves list; tests/data/README.md says of which versions."""
    commands = shown(program)
    assert commands
    for words in commands:
        known = [name for name in OPTIONS if words[: len(name.split())] == name.split()]
        assert known, f"`{' '.join(words)}`: not in command-options.json"
        assert {*options(words)} <= {*OPTIONS[max(known, key=len)].split()}, words


AWS_OWN = {
    # Of the command line itself, over several operations of a service.
    "deploy": {"--stack-name", "--template-file", "--capabilities", "--parameter-overrides"},
    "rb": {"--force"},
}


def test_options_of_the_aws_commands_exist():
    """By botocore's model of the services, which the AWS CLI is made of."""
    commands = shown("aws")
    assert commands
    for _, service, name, *rest in commands:
        client = boto3.client(service, region_name="us-west-2")
        if name == "wait":
            waiter = client.get_waiter(rest.pop(0).replace("-", "_"))
            name = xform_name(waiter.config.operation, "-")
        wanted = AWS_OWN.get(name)
        if wanted is None:
            model = client.meta.service_model
            (operation,) = (o for o in model.operation_names if xform_name(o, "-") == name)
            members = model.operation_model(operation).input_shape.members
            wanted = {f"--{xform_name(member, '-')}" for member in members}
        assert {*options(rest)} <= wanted | {"--query", "--output"}, (service, name)
        for query in (b for a, b in itertools.pairwise(rest) if a == "--query"):
            jmespath.compile(query)


def test_options_of_rays_commands_exist():
    commands = shown("ray")
    assert commands
    for _, *words in commands:
        command: Any = ray_cli
        while words and isinstance(command, click.Group):
            command = command.commands[words.pop(0)]
        known = {
            name
            for parameter in command.params
            for name in (*parameter.opts, *parameter.secondary_opts)
        }
        assert {*options(words)} <= known, words


def test_nothing_comes_home_but_what_may_leave_and_the_ledger_at_the_end():
    """Run folders and the cache hold private images."""
    down = [words[3] for words in shown("ray rsync-down")]
    down += [words[2] for words in shown("kubectl cp") if ":" in words[2]]
    allowed = {"/mnt/feta-sweep/out", "/mnt/feta-sweep/runs/ledger"}
    assert {path.partition(":")[2] or path for path in down} <= allowed | {f"{p}/" for p in allowed}
    page = PAGE.index("What stays")
    assert PAGE.index("runs/ledger") > page  # When the original is about to be deleted.


@pytest.mark.parametrize("cloud", ["aws", "gcp"])
def test_the_commands_fill_in_all_that_a_launcher_file_leaves_open(cloud):
    text = (CLUSTERS / f"{cloud}.yaml").read_text()
    (line,) = re.findall(rf"^sed (.*) clusters/{cloud}.yaml > .*", PAGE.replace("\\\n", " "), re.M)
    for old in re.findall(r"s/([\w-]+)/", line):
        assert old in text
        text = text.replace(old, "filled-in")
    assert "YOUR" not in text
