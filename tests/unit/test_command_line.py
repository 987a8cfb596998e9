"""The command lines: overrides on either side of the flags, errors as one sentence."""

import pytest

from core.__main__ import main
from sweep.run import main as sweep_main

DIGITS = ["--config", "core/configs/digits.yaml"]


def test_overrides_may_stand_on_both_sides_of_flags(capsys):
    before = ["account", "privacy.target_epsilon=0.5", *DIGITS, "central_images.per_class=50"]
    assert main(before) == 2
    assert "spend epsilon 2.956 of 0.5" in capsys.readouterr().err
    sweep = ["num_trials=0", "--config", "sweep/configs/quickstart.yaml", "--plan", "name=x"]
    assert sweep_main(sweep) == 2
    assert "num_trials=0" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["account", *DIGITS, "--nope"],
        ["ledger", "show", "seed=1"],
        [],
    ],
)
def test_unknown_arguments_are_refused(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage" in capsys.readouterr().err


def test_a_user_error_is_one_sentence(capsys):
    assert main(["account", *DIGITS, "stage_spilt=0.3"]) == 2
    error = capsys.readouterr().err
    assert error == "error: unknown key 'stage_spilt'; did you mean 'stage_split'?\n"
    assert main(["run", *DIGITS, "--run-dir", "s3://bucket/run"]) == 2
    error = capsys.readouterr().err
    assert error == "error: --run-dir='s3://bucket/run' is an address: name a folder\n"
    assert main(["account", "--config", "nowhere.yaml"]) == 2
    assert "no configuration file at 'nowhere.yaml'" in capsys.readouterr().err


def test_what_cannot_be_written_is_one_sentence(tmp_path, capsys):
    (tmp_path / "file").touch()
    out = tmp_path / "file" / "smaller.yaml"
    command = ["scale-down", *DIGITS, "--factor", "4", "dataset.public=true"]
    assert main([*command, "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert str(out.parent) in error
    assert error.count("\n") == 1
