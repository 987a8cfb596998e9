"""Progress of a sweep and of a run: on a terminal and off one, quiet, verbose, in a file."""

import logging
import os
import pty
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from core.io.terminal import log_to
from sweep.config.sweep import load_sweep
from sweep.driver.progress import Progress

ROOT = Path(__file__).resolve().parents[2]
POINT = '{"central_images.per_class": 2, "stage_split": 0.5}'
# Two trials, of which the second starts while the first is shown as ended.
STORY = f"""
import sys, time
from core.io.terminal import log_to
from sweep.config.sweep import load_sweep
from sweep.driver.progress import Progress
from pathlib import Path
pause = 0.7 * (sys.stderr.isatty() and sys.argv[2] == "0")  # For the table alone, to be drawn.
sweep = load_sweep("tests/data/sweep.yaml", {{}})
with log_to("sweep", Path(sys.argv[1])):
    progress = Progress(sweep, 4, 1, False, int(sys.argv[2]))
    first, second = {POINT}, {{**{POINT}, "stage_split": 0.25}}
    progress.pruned({{"stage_split": 0.9}}, "too expensive [sic]")
    progress.started("0a", first)
    for step in (0, 300):
        progress.reported("0a", {{"stage": "decoding", "step": step, "total": 900}})
        time.sleep(pause)
    for step in (10, 20, 30):
        progress.reported("0a", {{"stage": "warm_up", "step": step}})
        time.sleep(pause)
    progress.ended("0a", {{"stage": "done", "step": 200, "accuracy": 0.75, "seconds": 3}})
    progress.started("0b", second)
    report = {{"stage": "private_training", "step": 120, "note": "code changed"}}
    progress.reported("0b", report)
    time.sleep(pause)
    progress.close()
print("the end")
"""
RUN = """
from core.io.terminal import Console
import sys
console = Console(40, int(sys.argv[2]))
note = {"note": "code changed"} if sys.argv[2] == "2" else {}
console({"stage": "decoding", "step": 0, "total": 900})
console({"stage": "decoding", "step": 450, "total": 900})
for step in (1, 2, 30, 40):
    console({"stage": "private_training", "step": step, "loss": 0.5, **note})
    note = {}
console({"stage": "done", "step": 40})
"""


def shown(code: str, log: Path, verbosity: int, terminal: bool) -> str:
    """What a process shows on its standard error."""
    command = [sys.executable, "-c", code, str(log), str(verbosity)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "100", "LINES": "30"}
    environment |= {"TERM": "xterm", "NO_COLOR": "1"}
    if not terminal:
        done = subprocess.run(
            command, env=environment, cwd=ROOT, capture_output=True, text=True, check=True
        )
        return done.stderr
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        command, env=environment, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=theirs
    ) as process:
        os.close(theirs)
        content = b""
        while True:
            try:
                part = os.read(ours, 65536)
            except OSError:  # How Linux says that nobody has the other end any more.
                break
            if not part:
                break
            content += part
    os.close(ours)
    assert process.returncode == 0, content
    return content.decode()


def test_a_terminal_shows_one_table_that_changes(tmp_path):
    text = shown(STORY, tmp_path / "sweep.log", 0, terminal=True)
    frames = re.split(r"\x1b\[2K|\x1b\[1A", text)
    assert len(frames) > 10  # Lines were written over.
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    for words in ("quickstart  trials 1/4", "1 pruned", "trials 2/4", "left", "accuracy"):
        assert words in plain
    assert re.search(r"decoding +300/900 +\d s", plain)
    assert re.search(r"warm_up +30/200", plain)
    assert re.search(r"warm_up +30/200 .* \d+ s", plain)
    assert re.search(r"finished +30/200 +0\.75", plain)
    assert re.search(r"private_training +120/200", plain)
    assert "about" in plain
    assert plain.count("pruned without compute: stage_split=0.9: too expensive [sic]") == 1
    assert text.endswith("\x1b[?25h") or "\x1b[?25h" in text[-200:]  # The cursor is back.
    log = (tmp_path / "sweep.log").read_text()
    assert "pruned without compute" in log
    assert log.count("warm_up, step 10") == 1


def test_an_estimate_that_has_run_out_is_left_out(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    progress = Progress(load_sweep("tests/data/sweep.yaml", {}), 2, 0, False, -1)
    progress.started("0a", {})
    now[0] = 10.0
    progress.ended("0a", {"stage": "done", "step": 200, "accuracy": 0.75, "seconds": 3})
    for now[0], told in ((12.0, "trials 1/2  about 8 s left"), (21.0, "trials 1/2")):
        assert progress._summary() == told


def test_elsewhere_lines_are_plain_and_sparse(tmp_path):
    text = shown(STORY, tmp_path / "sweep.log", 0, terminal=False)
    assert "\x1b" not in text
    lines = text.splitlines()
    assert sum("trials 1/4" in line for line in lines) == 1  # Not one for each report.
    assert any(re.match(r"trial 0a finished: accuracy 0.75", line) for line in lines)
    assert sum(bool(re.match(r"trial 0b: code changed$", line)) for line in lines) == 1


def test_verbose_is_a_line_for_each_report(tmp_path):
    text = shown(STORY, tmp_path / "sweep.log", 1, terminal=True)
    assert "\x1b" not in text
    for step in (10, 20, 30):
        assert f"warm_up {step}/200" in text


@pytest.mark.parametrize("code", [STORY, RUN], ids=["sweep", "run"])
def test_quiet_shows_nothing(tmp_path, code):
    assert shown(code, tmp_path / "sweep.log", -1, terminal=True) == ""


def test_a_run_is_one_line_with_the_time_left(tmp_path):
    text = shown(RUN, tmp_path / "none", 0, terminal=True)
    assert text.count("\n") == 1
    assert re.search(r"decoding +450/900  about \d+ s of it left", text)
    assert re.search(r"step 30/40  loss 0\.5000  about \d+ s of training left", text)
    assert not re.search(r"step 40/40[^\r]*training left", text), "scores are still to come"
    verbose = shown(RUN, tmp_path / "none", 1, terminal=True).replace("\r\n", "\n")
    assert [re.search(r"step (\d+)", line)[1] for line in verbose.splitlines()[2:]] == [
        "1", "2", "30", "40", "40",
    ]  # fmt: skip


def test_a_note_of_a_run_is_a_line_that_stays(tmp_path):
    text = shown(RUN, tmp_path / "none", 2, terminal=False)
    assert text.splitlines().count("code changed") == 1


def test_the_log_tells_how_a_run_ended(tmp_path):
    path = tmp_path / "deeper" / "run.log"
    for number in (1, 2):
        with log_to("progress test", path):
            logging.getLogger("progress test").info("start %d", number)
    with pytest.raises(ValueError, match="no"), log_to("progress test", path):
        raise ValueError("no")
    with pytest.raises(KeyboardInterrupt), log_to("progress test", path):
        raise KeyboardInterrupt
    logging.getLogger("progress test").info("after")
    lines = path.read_text().splitlines()
    assert [line.split(" INFO ")[-1] for line in lines[:2]] == ["start 1", "start 2"]
    assert lines[2].endswith("ERROR stopped by ValueError: no")
    assert lines[3].endswith("INFO interrupted")
    assert len(lines) == 4
    time.strptime(lines[0][:19], "%Y-%m-%d %H:%M:%S")
