"""The core needs neither Ray nor MLflow nor the sweep, and few packages otherwise."""

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
from idx_files import write_idx
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

CORE = Path(__file__).parents[2] / "core"
REQUIRED = ("torch", "numpy", "scipy", "opacus", "dp-accounting", "pydantic", "safetensors")
FORBIDDEN = {"ray", "mlflow", "sweep"}


def imports(source: str) -> Iterator[tuple[str, bool]]:
    """Top-level name of every import in a file, and whether the file needs it to be loaded."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""] if node.level == 0 else ["core"]
        else:
            continue
        for name in names:
            yield name.split(".")[0], node in tree.body


@pytest.mark.parametrize("path", sorted(CORE.rglob("*.py")), ids=lambda p: str(p.relative_to(CORE)))
def test_core_imports_only_what_it_may(path):
    own = {"core", *sys.stdlib_module_names}
    needed = {name.replace("-", "_") for name in REQUIRED}
    if path.name.endswith("_kernel.py"):  # Loaded on a GPU alone, for which torch brings it.
        needed |= {"triton"}
    found = list(imports(path.read_text()))
    assert not {name for name, _ in found} & FORBIDDEN
    assert {name for name, at_once in found if at_once} <= own | needed
    optional = {"PIL", "boto3", "botocore", "pyarrow", "pytorch_fid", "torchvision"}
    assert {name for name, _ in found} <= own | needed | optional


def test_nested_imports_are_seen():
    text = "import os.path\ndef f():\n  if f:\n    from ray.tune import a\n    import b.c, d"
    assert set(imports(text)) == {("os", True), ("ray", False), ("b", False), ("d", False)}


def closure(*roots: str) -> set[str]:
    """Distributions that pip installs for `roots`, extras included."""
    todo, seen = [(name, "") for name in roots], set()
    while todo:
        name, extra = todo.pop()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        try:
            requirements = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue  # Needed on other systems only.
        for requirement in map(Requirement, requirements):
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                wanted = canonicalize_name(requirement.name)
                todo += [(wanted, extra) for extra in ("", *requirement.extras)]
    return {name for name, _ in seen}


RUN_WITHOUT = """
import importlib, json, runpy, sys

class Without:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        absent = name.partition(".")[0] in refused
        return None if absent else self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)

refused = set(json.loads(sys.argv.pop(1)))
sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
try:
    runpy.run_module("core", run_name="__main__", alter_sys=True)
except SystemExit as end:
    assert not end.code, end.code
assert not refused & {name.partition(".")[0] for name in sys.modules}
for name in ("ray", "mlflow", "sweep", "sklearn", "PIL", "torchvision", "yaml"):
    assert name in refused
    try:
        importlib.import_module(name)
    except ModuleNotFoundError:
        continue
    sys.exit(f"{name} was not refused")
print("every package was refused")
"""


def test_a_run_needs_no_package_but_the_required_ones(tmp_path):
    allowed = closure(*REQUIRED) | {"feta-sweep"}
    refused = {"sweep"}
    for module, owners in metadata.packages_distributions().items():
        if not allowed & {canonicalize_name(owner) for owner in owners}:
            refused.add(module)
    images = np.random.default_rng(0).integers(0, 256, (60, 8, 8))
    write_idx(
        tmp_path / "data",
        train_images=images,
        train_labels=np.arange(60) % 2,
        test_images=images[:20],
        test_labels=np.arange(20) % 2,
    )
    config = tmp_path / "tiny.yaml"
    config.write_text(
        "dataset:\n  name: idx\n  num_examples: 60\n  num_classes: 2\n"
        "privacy:\n  target_epsilon: 0.5\n"
        "central_images:\n  per_class: 1\n  expected_batch_size: 30\n"
        "training:\n  num_steps: 2\n"
        "private_training:\n  expected_batch_size: 6\n  noise_multiplicity: 1\n"
        "model:\n  base_channels: 8\n"
        "sampler:\n  num_steps: 2\n"
        "evaluation:\n  num_images: 8\n  fid_extractor: cnn\n  classifier_epochs: 1\n"
    )
    command = [sys.executable, "-c", RUN_WITHOUT, json.dumps(sorted(refused))]
    command += ["run", "--config", config, "--run-dir", tmp_path / "run", "runtime.device=cpu"]
    command += [f"dataset.path={tmp_path / 'data'}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(CORE.parent)}
    done = subprocess.run(
        command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "every package was refused" in done.stdout
    result = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert 0 <= result["accuracy"] <= 1
    assert 0.49 < result["epsilon"] <= 0.5
    assert (tmp_path / "run" / "synthetic" / "grid.png").exists()


@pytest.mark.parametrize(
    ("modules", "unneeded"),
    [
        # Drivers, trials and the commands that only look.
        (
            (
                "sweep.run",
                "sweep.driver.launch",
                "sweep.trials.trial",
                "sweep.tracking.mirror",
                "sweep.results.table",
                "sweep.__main__",
                "core.privacy.ledger.account",
            ),
            {"torch", "dp_accounting"},
        ),
        # Trials, whose reports the driver records.
        (("sweep.trials.trial",), {"torch", "mlflow"}),
        (("core.io.code_digest",), {"torch", "numpy"}),
        # Workers whose plan another rank solves.
        (("sweep.trials.trial", "core.pipeline.run"), {"dp_accounting"}),
    ],
)
def test_a_process_loads_only_what_it_uses(modules, unneeded):
    """It begins sooner, and takes less memory."""
    code = f"import sys, {', '.join(modules)}; sys.exit(str({unneeded} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=CORE.parent, timeout=120, capture_output=True, text=True
    )
    assert done.stderr.strip() == "set()"
