"""Sweeps from Python: the notebook at smaller sizes, and the same charges as the command's."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from stand_in import drive
from tiny_sweep import ROOT, sweep_text

NOTEBOOK = ROOT / "sweep" / "notebooks" / "sweep.ipynb"
SMALLER = {
    '"num_trials": 3': '"num_trials": 2, "workers_per_trial": 1, "model.base_channels": 8',
    '"evaluation.num_images": 500': '"evaluation.num_images": 60',
    '"evaluation.classifier_epochs": 6': '"evaluation.classifier_epochs": 1',
    '"evaluation.extractor_epochs": 2': '"evaluation.extractor_epochs": 1',
}
SPACE = """  stage_split:
    choices: [0.2, 0.4]
  private_training.learning_rate:
    choices: [1e-4, 1e-3]
"""
CALL = """
import json, os, signal, sys
from stand_in import stand_in
from sweep import load_sweep, run_sweep

config = load_sweep("sweep.yaml")
before = os.getcwd(), signal.getsignal(signal.SIGTERM)
outcome = run_sweep(config, train=stand_in)
assert before == (os.getcwd(), signal.getsignal(signal.SIGTERM))
again = run_sweep(config, train=stand_in)
assert again.trials.equals(outcome.trials)
best = outcome.trials.loc[outcome.trials.accuracy.idxmax()]
print(json.dumps({
    "complete": outcome.complete, "stopped": outcome.stopped, "states": [*outcome.trials.state],
    "best": [outcome.best.trial, outcome.released.trial, best.trial], "card": outcome.card,
    "searched": [*outcome.trials["private_training.learning_rate"]],
}))
"""


def charges(folder: Path) -> list[str]:
    """What a ledger holds but for times, places and random names."""
    (path,) = (folder / "runs" / "ledger").glob("*.jsonl")
    lines = map(json.loads, path.read_text().splitlines())
    kept = ({k: v for k, v in line.items() if k in ("kind", "events")} for line in lines)
    return sorted(json.dumps(each, sort_keys=True) for each in kept)


def test_python_charges_what_the_command_does_and_tells_the_same(tmp_path, joined):
    text = sweep_text("tiny", "sampler: grid\nnum_trials: 4", SPACE)
    for name in ("command", "python"):
        (tmp_path / name).mkdir()
    told, _ = drive(tmp_path / "command", text, joined)
    (tmp_path / "python" / "sweep.yaml").write_text(text)
    path = os.pathsep.join([str(Path(__file__).parent), str(ROOT)])
    environment = {k: v for k, v in os.environ.items() if k != "MLFLOW_TRACKING_URI"}
    done = subprocess.run(
        [sys.executable, "-c", CALL],
        cwd=tmp_path / "python",
        env=environment | joined | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["complete"], found["stopped"]) == (True, "")
    assert found["states"] == ["finished"] * 4
    assert sorted(found["searched"]) == [1e-4, 1e-4, 1e-3, 1e-3]
    assert len({*found["best"]}) == 1
    (statement,) = re.findall(r"^privacy: (.*)$", told, re.M)
    assert statement in found["card"]
    assert charges(tmp_path / "python") == charges(tmp_path / "command")
    assert len(charges(tmp_path / "python")) >= 8  # Reserved and settled, four times.


def test_the_notebook_runs_from_top_to_bottom(tmp_path, joined, monkeypatch):
    for name, value in {**joined, "PYTHONPATH": str(ROOT)}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    text = NOTEBOOK.read_text()
    for old, new in SMALLER.items():
        old, new = json.dumps(old)[1:-1], json.dumps(new)[1:-1]
        assert text.count(old) == 1
        text = text.replace(old, new)
    notebook = nbformat.reads(text, as_version=4)
    resources = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=900, kernel_name="python3", resources=resources).execute()
    outputs = [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]
    shown = "\n".join(json.dumps(each) for each in outputs)
    assert "This trial alone is (" in shown
    assert "alone spend epsilon" in shown
    assert shown.count("finished") >= 2
    assert "image/png" in shown
    assert "# Privacy card" in shown
    assert len([*(tmp_path / "runs" / "notebook" / "trials").glob("*/evaluation.json")]) == 2


def test_the_notebook_names_no_place_on_a_machine():
    text = NOTEBOOK.read_text()
    nbformat.validate(nbformat.reads(text, as_version=4))
    assert not re.search(r"/(home|root|work|tmp|Users)/", text)
    assert text.isascii()
