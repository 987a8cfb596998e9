"""`--doctor` on one machine: all is well, and one line with a remedy for what is not."""

import os
import re
import secrets
import subprocess
import sys

import pytest
from test_sweep import HEAD
from tiny_sweep import ROOT, sweep_text

from sweep.driver.doctor import _check, examine


def doctor(folder, *overrides: str, **environment: str) -> tuple[int, str]:
    (folder / "sweep.yaml").write_text(sweep_text("tiny", HEAD))
    ended = subprocess.run(
        [
            sys.executable,
            ROOT / "sweep" / "run.py",
            "--config",
            "sweep.yaml",
            "--doctor",
            *overrides,
        ],
        cwd=folder,
        env={k: v for k, v in os.environ.items() if k != "MLFLOW_TRACKING_URI"} | environment,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert "Traceback" not in ended.stderr + ended.stdout
    return ended.returncode, ended.stdout


@pytest.mark.parametrize("well", [True, False])
def test_each_check_is_a_line_and_what_fails_says_what_helps(tmp_path, joined, well):
    wrong = () if well else ("workers_per_trial=64", "dataset.num_examples=1436")
    server = {} if well else {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9"}
    secret = {"FETA_SWEEP_SECRET_FILE": str(tmp_path / "secret")}
    (tmp_path / "secret").touch(mode=0o600)
    (tmp_path / "secret").write_text(digits := secrets.token_hex(32))
    code, out = doctor(tmp_path, *wrong, **server, **secret)
    lines = out.splitlines()
    assert len(lines) == 11
    assert re.match(r"ok +the head holds \d+ trials at a time, this sweep runs \d", lines[4])
    failed = [line for line in lines if line.startswith("FAIL")]
    assert code == (0 if well else 1)
    assert [line.split(":")[0].removeprefix("FAIL").strip() for line in failed] == (
        [] if well else ["MLflow answers", "room for one trial", "data readable and the same"]
    )
    if not well:
        assert "start the server" in failed[0]
        assert "one trial needs 64 CPUs" in failed[1]
        assert "dataset.num_examples=1436" in failed[2]
    assert not list((tmp_path / "runs").glob(".doctor*"))
    assert digits[:16] not in out


def test_places_that_cannot_be_used_are_a_line_each(tmp_path):
    (tmp_path / "file").touch()
    code, out = doctor(
        tmp_path,
        f"storage_path={tmp_path}/file",
        MLFLOW_TRACKING_URI="mysql://me:word@host/base",
        RAY_ADDRESS="127.0.0.1:9",
    )
    assert code == 1
    assert "word" not in out
    stored, tracked, joined = out.splitlines()
    assert stored.startswith("FAIL  results can be stored: storage_path=")
    assert tracked.startswith("FAIL  MLflow answers: ")
    assert tracked.endswith(": pip install mysqlclient")
    assert joined.startswith("FAIL  cluster reachable: RAY_ADDRESS='127.0.0.1:9' does not answer")


def test_a_node_answers_every_question_whatever_happens(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    settings = {"dataset": {"path": str(tmp_path)}}

    def broken(*_):
        raise ValueError("of a kind\nthat nobody foresaw")

    monkeypatch.setattr("core.data.load_dataset", broken)
    answers = examine(settings, str(tmp_path / "file" / "mark"))
    assert answers["data"] == (False, "ValueError: of a kind that nobody foresaw")
    assert not answers["storage"][0]
    assert f"{tmp_path}/file/mark" in answers["storage"][1]
    assert answers["versions"][0]
    assert _check("it works", broken).problem == "ValueError: of a kind that nobody foresaw"
