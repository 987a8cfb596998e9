"""What a person and a script do with a sweep after it ran: list, show, compare, export, stop."""

import fcntl
import json
import re
import signal
import subprocess
import sys
import time

import pandas
import pytest
from tiny_sweep import ROOT

from core.__main__ import main as core_main
from core.config import load
from core.privacy.accounting.rounding import upward
from sweep.__main__ import main
from sweep.results.driver import running_driver
from sweep.results.find import open_sweep

HOLD_LOCK = """
import fcntl, json, os, signal, socket, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # As sweep/run.py does.
file = open(sys.argv[1], "w")
fcntl.flock(file, fcntl.LOCK_EX)
json.dump({"host": socket.gethostname(), "pid": os.getpid()}, file)
file.flush()
time.sleep(60)
"""


@pytest.fixture
def ask(storage, capsys):
    """Runs a command and returns its exit code and what it printed."""

    def ask(*arguments: str) -> tuple[int, str, str]:
        code = main([*arguments, "--storage", str(storage)])
        out, err = capsys.readouterr()
        return code, out, err

    return ask


def test_ls_shows_every_sweep_with_its_best_and_epsilons(ask):
    code, out, _ = ask("ls")
    assert code == 0
    assert "12/13" in out
    assert "eps sweep" in out
    new, small = json.loads(ask("ls", "--json")[1])
    assert (new["sweep"], new["finished"], new["best_trial"]) == ("new", 0, None)
    assert new["state"] == "incomplete"
    assert (small["finished"], small["failed"], small["state"]) == (12, 1, "incomplete")
    assert small["epsilon_trial"] <= 3 < small["epsilon_sweep"]


def test_a_reader_that_has_enough_ends_the_command_quietly(storage):
    command = f"{sys.executable} -m sweep show small --storage {storage} | true"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


def test_show_prints_the_table_of_the_sweep(ask):
    code, out, _ = ask("show", "small")
    assert code == 0
    assert "13 trials, 1 point pruned without compute" in out
    assert "best trial: " in out
    records = json.loads(ask("show", "small", "--json")[1])
    assert len(records) == 13
    assert {"accuracy", "epsilon", "epsilon_sweep", "stage_split"} <= set(records[0])


def test_best_writes_a_configuration_that_the_core_accepts(ask, tmp_path, capsys):
    path = tmp_path / "deep" / "best.yaml"
    code, out, _ = ask("best", "small", "--out", str(path), "--json")
    assert code == 0
    best = json.loads(out)
    assert best["config"] == str(path)
    assert load(path).stage_split == best["stage_split"]
    assert core_main(["account", "--config", str(path)]) == 0
    assert f"({upward(best['epsilon'])}, 1e-05)" in capsys.readouterr().out


def test_diff_names_keys_and_scores_that_differ(ask):
    records = json.loads(ask("show", "small", "--json")[1])
    first, second, _ = (r["trial"] for r in records if r["stage_split"] == 0.3)
    code, out, _ = ask("diff", first, f"small/{second}", "--json")
    assert code == 0
    found = json.loads(out)
    assert found["private_training.learning_rate"] == [1e-4, 1e-3]
    assert not {"stage_split", "noise_multiplier", "run_dir"} & set(found)
    assert "learning_rate" in ask("diff", first, second)[1]
    assert ask("diff", first, first)[1] == "nothing differs\n"
    assert ask("diff", "small/best", "best")[0] == 0


@pytest.mark.parametrize("suffix", ["csv", "json", "parquet"])
def test_export_holds_a_line_for_each_trial(ask, tmp_path, suffix):
    path = tmp_path / f"trials.{suffix}"
    assert ask("export", "small", "--out", str(path))[0] == 0
    frame = getattr(pandas, f"read_{suffix}")(path)
    assert len(frame) == 13
    assert frame["accuracy"].notna().sum() == 12
    assert "idx needs a folder" in " ".join(frame["error"].dropna())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("show", "smal"), "no sweep 'smal' in "),
        (("best", "new"), "no trial of sweep 'new' has finished"),
        (("diff", "best", "zz"), "'zz' names no trial"),
        (("diff", "best", ""), "'' names no trial"),
        (("export", "small", "--out", "x.xlsx"), "must end in one of .csv, .json, .parquet"),
        (("export", "small", "--out", "/proc/none/trials.csv"), "'/proc/none"),
        (("stop", "small"), "sweep 'small' is not running"),
    ],
)
def test_a_user_error_is_one_line(ask, arguments, message):
    code, out, err = ask(*arguments)
    assert code == 2
    assert out == ""
    assert message in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize("content", [b"{", b"3", b"\xff"])
def test_a_damaged_sweep_is_a_user_error(tmp_path, capsys, content):
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "sweep.json").write_bytes(content)
    assert main(["ls", "--storage", str(tmp_path)]) == 2
    assert "sweep.json' is damaged" in capsys.readouterr().err


def test_an_empty_storage_folder_is_a_user_error(tmp_path, capsys):
    assert main(["ls", "--storage", str(tmp_path)]) == 2
    assert "holds no sweep: name its folder with --storage" in capsys.readouterr().err


def test_stop_interrupts_the_driver_that_holds_the_lock(ask, storage):
    lock = storage / "new" / "driver.lock"
    driver = subprocess.Popen([sys.executable, "-c", HOLD_LOCK, lock], stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 30
        while not lock.exists() or not lock.read_text().endswith("}"):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert json.loads(ask("ls", "--json")[1])[0]["state"] == "running"
        code, out, _ = ask("stop", "new")
        assert code == 0
        assert f"asked process {driver.pid} to stop" in out
        assert driver.wait(30) in (-signal.SIGINT, 1)
    finally:
        driver.kill()
        driver.wait()
    assert running_driver(lock.parent) is None, "the file is left, but nobody holds it"
    assert ask("stop", "new")[0] == 2
    lock.unlink()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"host": "elsewhere", "pid": 7}, "host 'elsewhere'.*`kill -INT 7`"),
        ({}, "does not say by whom"),
    ],
)
def test_stop_leaves_alone_what_it_cannot_reach(ask, storage, content, message):
    lock = storage / "new" / "driver.lock"
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        json.dump(content, file)
        file.flush()
        code, _, err = ask("stop", "new")
    lock.unlink()
    assert code == 2
    assert re.search(message, err)


def test_a_moved_sweep_is_found_where_it_lies(storage, tmp_path):
    moved = tmp_path / "moved"
    (moved / "small").mkdir(parents=True)
    (moved / "small" / "sweep.json").write_text((storage / "small" / "sweep.json").read_text())
    assert open_sweep(moved, "small").folder == moved / "small"


def test_looking_at_a_sweep_needs_neither_ray_nor_mlflow():
    code = (
        "import sys, sweep.__main__, sweep.report; "
        "sys.exit(bool({'ray', 'mlflow'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
