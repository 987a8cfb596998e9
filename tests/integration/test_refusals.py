"""Every refusal, by the command a person types: exit code 2, data never opened, ledger unchanged.

What only the data can tell (N, its content) is found after it was opened, before anything is drawn.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from two_ranks import TINY

from core.__main__ import main
from core.config import load
from core.pipeline import released
from core.pipeline import run as pipeline
from core.privacy.mechanisms import central_images

CONFIG = "core/configs/digits.yaml"


def arguments(folder: Path, run: str, **changes: object) -> list[str]:
    settings = TINY | {"runtime.ledger": folder / "ledger", "runtime.cache": folder / "cache"}
    settings |= {key.replace("__", "."): value for key, value in changes.items()}
    pairs = [f"{key}={value}" for key, value in settings.items()]
    return ["run", "--config", CONFIG, "--run-dir", str(folder / run), *pairs]


def content(folder: Path) -> dict[str, bytes]:
    """All but the log, which tells of the refusal."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "run.log")
    return {str(path): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A finished run `first`, charged to a ledger with a budget of 1.1."""
    folder = tmp_path_factory.mktemp("begun")
    assert main(arguments(folder, "first", privacy__data_set_budget=1.1)) == 0
    return folder


@pytest.fixture
def again(begun, tmp_path):
    """A copy that a test may spoil; sources are known, so the data need not be opened."""
    shutil.copytree(begun, tmp_path / "copy")
    return tmp_path / "copy"


@pytest.fixture
def unopened(monkeypatch):
    def refuse(*_: object) -> None:
        raise AssertionError("the data was opened")

    monkeypatch.setattr(pipeline, "load_dataset", refuse)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"privacy__target_epsilon": 0}, "privacy.target_epsilon=0 is out of range"),
        ({"privacy__target_epsilon": -1}, "privacy.target_epsilon=-1 is out of range"),
        ({"privacy__target_epsilon": ".nan"}, "privacy.target_epsilon='.nan' is out of range"),
        ({"privacy__target_epsilon": ".inf"}, "privacy.target_epsilon='.inf' is out of range"),
        ({"privacy__target_delta": 0}, "privacy.target_delta=0 is out of range"),
        ({"privacy__target_delta": ".nan"}, "privacy.target_delta='.nan' is out of range"),
        ({"privacy__target_delta": 0.001}, "must lie in (0, 1/dataset.num_examples="),
        ({"central_images__noise_multiplier": 0}, "central_images.noise_multiplier=0 is out of"),
        ({"central_images__noise_multiplier": ".nan"}, "central_images.noise_multiplier='.nan' is"),
        ({"privacy__dp_accuracy_stddev": 0}, "privacy.dp_accuracy_stddev=0 is out of range"),
        ({"private_training__max_grad_norm": 0}, "private_training.max_grad_norm=0 is out of"),
        ({"private_training__expected_batch_size": 0}, "expected_batch_size=0 is out of range"),
        ({"private_training__expected_batch_size": 1438}, "the sample rate may not exceed 1"),
        ({"central_images__expected_batch_size": 1438}, "the sample rate may not exceed 1"),
        ({"central_images__per_class": 500}, "central images alone spend epsilon"),
        ({"seed": 1}, "of its budget 1.1 (spent or reserved 0.99"),
        ({"privacy__data_set_budget": 50}, "was begun with 1.1, which never changes"),
        ({"privacy__target_delta": 1e-6}, "was begun with 1e-05, which never changes"),
        (
            {"privacy__scope": "selection", "privacy__data_set_budget": "null"},
            "one run alone is no search",
        ),
    ],
)
def test_what_cannot_be_meant_or_paid_is_refused(again, unopened, capsys, changes, text):
    before = content(again / "ledger")
    assert main(arguments(again, "second", **{"privacy__data_set_budget": 1.1} | changes)) == 2
    error = capsys.readouterr().err
    assert text in error
    assert error.startswith("error: ")
    assert "Traceback" not in error
    assert content(again / "ledger") == before
    assert not (again / "second" / "model.pt").exists()


def test_another_configuration_on_resume_is_refused(again, unopened, capsys):
    before = content(again)
    assert main(arguments(again, "first", privacy__data_set_budget=1.1, stage_split=0.3)) == 2
    assert "stage_split: 0.5 -> 0.3" in capsys.readouterr().err
    assert content(again) == before


@pytest.mark.parametrize("harm", ["edited", "truncated", "missing"])
def test_a_damaged_ledger_stops_a_run_before_the_data_is_opened(again, unopened, capsys, harm):
    (ledger,) = (again / "ledger").glob("*.jsonl")
    lines = ledger.read_text().splitlines(keepends=True)
    if harm == "edited":
        ledger.write_text(ledger.read_text().replace('"count":2', '"count":1'))
    elif harm == "truncated":
        ledger.write_text("".join(lines[:-1]))
    else:
        ledger.unlink()
    (again / "first" / "evaluation.json").unlink()  # So that there is something to resume.
    before = content(again / "ledger")
    assert main(arguments(again, "first", privacy__data_set_budget=1.1)) == 2
    error = capsys.readouterr().err
    assert {"missing": "shorter than its head says"}.get(harm, "edited or truncated") in error
    assert content(again / "ledger") == before


def test_two_resumes_at_once_are_refused(again, capsys, monkeypatch):
    monkeypatch.setattr(pipeline, "_LOCK_TIMEOUT_S", 0.0)
    before = content(again / "ledger")
    program = (
        "import sys; from pathlib import Path; from core.io.locks import locked\n"
        "with locked(Path(sys.argv[1])): print('held', flush=True); sys.stdin.readline()"
    )
    command = [sys.executable, "-c", program, str(again / "first" / "run.lock")]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        assert main(arguments(again, "first", privacy__data_set_budget=1.1)) == 2
        assert f"is in use by process {other.pid} on" in capsys.readouterr().err
        other.communicate("end\n", timeout=30)
    assert content(again / "ledger") == before
    assert main(arguments(again, "first", privacy__data_set_budget=1.1)) == 0


def test_a_wrong_number_of_records_is_found_before_anything_is_drawn(tmp_path, capsys, monkeypatch):
    def drawn(*_: object, **__: object) -> None:
        raise AssertionError("central images were drawn")

    monkeypatch.setattr(released, "release_central_images", drawn)
    assert central_images.release_central_images is not released.release_central_images
    assert main(arguments(tmp_path, "run", dataset__num_examples=1436)) == 2
    assert "dataset.num_examples=1436" in capsys.readouterr().err
    assert not list((tmp_path / "ledger").glob("*.jsonl"))


def test_the_tiny_run_of_these_tests_is_affordable():
    """Else every refusal above would be seen for the wrong reason."""
    assert load(CONFIG, TINY).privacy.target_epsilon == 1.0
