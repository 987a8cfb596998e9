"""One-run audit: its bounds hold for what is private, and catch half of the noise or none."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from two_ranks import TINY, tiny_run

from core.__main__ import main
from core.config import DatasetConfig, load
from core.data import Dataset, Split
from core.evaluation.audit import (
    audit,
    canary_images,
    canary_scores,
    closeness,
    coins,
    epsilon_bound,
    p_value,
)
from core.io.files import write_json
from core.pipeline import run as pipeline
from core.privacy.accounting.mechanism import FINE
from core.privacy.accounting.solve import epsilon_of_mechanisms
from core.privacy.keys import KeyedStream
from core.privacy.plan.plan import make_plan
from core.privacy.plan.releases import DpSgdPlan
from core.publish.proven import audit_lines, bundled_bounds, keep
from core.record.folder import RunFolder

DELTA, CANARIES = 1e-5, 20_000
PLAN = DpSgdPlan(2, 1.0, noise_multiplier=2.0, max_grad_norm=0.1, expected_batch_size=40)


def audited(plan: DpSgdPlan) -> float:
    keys = (KeyedStream(f"{name} of the audit".encode().ljust(32)) for name in ("masks", "noise"))
    return audit(*canary_scores(plan, CANARIES, *keys, "cpu"), DELTA)["epsilon_lower_bound"]


def test_the_bound_stays_below_epsilon_and_half_the_noise_is_caught():
    claimed = epsilon_of_mechanisms((PLAN.mechanism,), DELTA, "zero_out", FINE)
    assert 0.3 * claimed < audited(PLAN) <= claimed
    assert audited(replace(PLAN, noise_multiplier=PLAN.noise_multiplier / 2)) > claimed


@pytest.mark.parametrize("epsilon", [0.0, 0.5, 2.0])
def test_without_delta_it_is_the_binomial_and_with_it_more(epsilon):
    chance = math.exp(epsilon) / (1 + math.exp(epsilon))
    exact = stats.binom.sf(69, 100, chance)
    assert p_value(70, 100, 1000, epsilon, 0.0) == pytest.approx(exact)
    assert p_value(70, 100, 1000, epsilon, 1e-5) > exact
    assert p_value(0, 100, 1000, epsilon, 0.0) == 1


def test_randomized_response_has_its_own_epsilon_at_most():
    """Each bit is told rightly with chance e/(1+e): epsilon 1 by construction."""
    random = np.random.default_rng(0)
    bounds = []
    for _ in range(200):
        correct = random.binomial(2000, math.e / (1 + math.e))
        bounds.append(epsilon_bound(correct, 2000, 2000, 0.0, 0.05))
    assert 0.8 < np.mean(bounds) < 1
    assert np.mean(np.array(bounds) > 1) < 0.12  # 0.05 but for chance: 4.5 standard deviations.


def test_copies_of_canaries_among_synthetic_images_are_seen_and_chance_is_not():
    """By chance a bound exceeds 0 in 1 of 66 audits, and in more than 20 of 400 once in 800,000."""
    canaries = canary_images(DatasetConfig(), 1000, seed=0)
    assert len({image.tobytes() for image in canaries.images.numpy()}) == 1000
    present = coins(KeyedStream(b"c" * 32), 1000)
    assert 400 < present.sum() < 600
    leaked = torch.cat(
        [canaries.images[present][::2], canary_images(DatasetConfig(), 500, 1).images]
    )
    blurred = leaked + 40 * torch.randn(leaked.shape, generator=torch.Generator().manual_seed(0))
    labels = torch.cat([canaries.labels[present][::2], torch.arange(500) % 10])
    drawn = Split(blurred.clamp(0, 255).to(torch.uint8), labels)
    found = audit(closeness(canaries, drawn, 64), present.numpy(), DELTA)
    assert 1 < found["epsilon_lower_bound"] <= found["provable"] < 4
    scores, by_chance = closeness(canaries, canary_images(DatasetConfig(), 500, 2), 64), 0
    for trial in range(400):
        others = coins(KeyedStream(f"chance {trial}".encode().ljust(32)), 1000)
        by_chance += audit(scores, others.numpy(), 0.0)["epsilon_lower_bound"] > 0
    assert by_chance <= 20


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_command_keeps_its_bounds_and_a_bundle_holds_nothing_else(
    tmp_path, capsys, monkeypatch
):
    run = tmp_path / "run"
    tiny_run(run)
    folder, bundle = RunFolder(run), tmp_path / "bundle"
    release = ["release", "--run-dir", str(run), "--out"]
    assert main([*release, str(tmp_path / "before")]) == 0
    assert "| audit by canaries | not audited |" in (tmp_path / "before/README.md").read_text()
    assert json.loads((tmp_path / "before/privacy_card.json").read_text())["audit"] == "not audited"

    def refuse(*_: object) -> Dataset:
        raise AssertionError("the data was opened")

    before = files_of(run)
    with monkeypatch.context() as patched:
        patched.setattr(pipeline, "load_dataset", refuse)
        command = ["audit", "--run-dir", str(run), "--canaries", "400", "--black-box", "120"]
        assert main(command) == 0
    told = capsys.readouterr().out
    for form in ("noisy updates of DP-SGD (white box)", "synthetic images (black box)"):
        assert f"{form}: epsilon is at least" in told
    assert "bounds hold at once with confidence 0.95" in told
    after = files_of(run)
    assert after.keys() - before.keys() == {str(folder.audit)}  # Charged nowhere else.
    assert before.items() <= after.items()
    found = json.loads(folder.audit.read_text())
    assert (found["white_box"]["canaries"], found["black_box"]["canaries"]) == (400, 120)
    assert found["black_box"]["epsilon"] == folder.plan().epsilon
    assert found["white_box"]["epsilon"] == folder.plan().epsilon_dp_sgd
    assert all(line in told for line in audit_lines(folder))

    assert main(["release", "--check", "--run-dir", str(run)]) == 0
    checked = capsys.readouterr().out
    assert all(f"  {line}\n" in checked for line in audit_lines(folder))
    assert main([*release, str(bundle)]) == 0
    assert main(["release", "--verify", "--out", str(bundle)]) == 0
    bounds = {form: found[form]["epsilon_lower_bound"] for form in ("white_box", "black_box")}
    card, earlier = (
        json.loads((each / "privacy_card.json").read_text())
        for each in (bundle, tmp_path / "before")
    )
    assert card.pop("audit") == {"epsilon_at_least": bounds, "confidence": 0.95}
    del earlier["audit"]
    assert card == earlier
    changed = {
        path.name
        for path in bundle.rglob("*")
        if path.is_file()
        and path.read_bytes() != (tmp_path / "before" / path.relative_to(bundle)).read_bytes()
    }
    assert changed == {"privacy_card.json", "README.md", "digests.json"}
    (line,) = set((bundle / "README.md").read_text().splitlines()) - set(
        (tmp_path / "before/README.md").read_text().splitlines()
    )
    assert re.fullmatch(
        r"\| audit by canaries \| epsilon is at least [\d.]+ by noisy updates of DP-SGD "
        r"\(white box\), [\d.]+ by synthetic images \(black box\), with confidence 0\.95 \|",
        line,
    )


def test_too_little_noise_in_a_runs_plan_is_caught_by_the_command_for_good(tmp_path, capsys):
    """Epsilon follows from another noise than the plan holds, as a wrong accountant would have it.

    What is audited needs no training. A quarter, as its keys are random: half is caught by chance.
    """
    settings = {"method": "dpdm", "training.num_steps": 2, "privacy.target_epsilon": 1.9}
    config = load({}, TINY | settings | {"private_training.expected_batch_size": 1437})
    folder, plan = RunFolder(tmp_path), make_plan(config)
    folder.claim(config, plan, {})
    command = ["audit", "--run-dir", str(tmp_path), "--canaries"]
    assert main([*command, "20000"]) == 0
    less = replace(plan.dp_sgd, noise_multiplier=plan.dp_sgd.noise_multiplier / 4)
    write_json(folder.plan_file, replace(plan, dp_sgd=less).summary())
    assert main([*command, "20000"]) == 2
    assert "the audit of the noisy updates of DP-SGD (white box) proves more" in (
        capsys.readouterr().err
    )
    caught = folder.audit.read_bytes()
    assert main([*command, "100"]) == 2  # Too few to prove it again.
    assert folder.audit.read_bytes() == caught


def test_an_audit_that_proves_too_much_or_is_of_something_else_is_told(tmp_path, capsys):
    run = tmp_path / "run"
    tiny_run(run)
    folder, check = RunFolder(run), ["release", "--check", "--run-dir", str(run)]
    command = ["audit", "--run-dir", str(run), "--canaries", "400"]
    assert main(command) == 0
    assert "(black box): not audited: python -m core audit" in capsys.readouterr().out
    found = json.loads(folder.audit.read_text())
    keep(folder, {"black_box": {**found["white_box"], "epsilon_lower_bound": 99.0}})
    assert json.loads(folder.audit.read_text())["white_box"] == found["white_box"]
    assert main(check) == 2
    out = capsys.readouterr().out
    assert "the audit of the synthetic images (black box) proves more than epsilon" in out
    assert main(["release", "--run-dir", str(run), "--out", str(tmp_path / "bundle")]) == 2
    assert "proves more than epsilon: nothing is written" in capsys.readouterr().err
    assert not (tmp_path / "bundle").exists()
    audited = folder.audit.read_text()
    write_json(folder.audit, {**found["white_box"], "confidence": 0.95})  # As earlier versions did.
    assert bundled_bounds(folder) == "not audited"
    folder.audit.write_text(audited)
    kept = folder.plan_file.read_text()
    folder.plan_file.write_text(kept + "\n")  # Stands for another plan.
    assert bundled_bounds(folder) == "not audited"
    folder.plan_file.write_text(kept)
    assert bundled_bounds(folder) != "not audited"
    parts = json.loads(folder.identity.read_text())
    parts["computed by"]["code of core"] = "0" * 64
    folder.identity.write_text(json.dumps(parts))
    assert bundled_bounds(folder) == "not audited"
    assert main(command) == 2
    assert "made by other code of core" in capsys.readouterr().err
    for option in ("--canaries", "--black-box"):
        assert main([*command[:3], option, "10"]) == 2
        assert f"{option}=10 must be at least 100" in capsys.readouterr().err


def test_the_black_box_catches_a_release_without_noise_and_no_honest_one(tmp_path, capsys):
    """Of 20 canaries of a class the Gaussians remember the span, were it not for noise."""
    run = tmp_path / "run"
    tiny_run(run, **{"method": "moments", "evaluation.num_images": 1000})
    folder, command = RunFolder(run), ["audit", "--run-dir", str(run)]
    assert main(command) == 2
    assert "no noisy updates of DP-SGD to audit: add --black-box" in capsys.readouterr().err
    command += ["--black-box", "400"]
    assert main(command) == 0
    honest = json.loads(folder.audit.read_text())["black_box"]
    assert honest["epsilon_lower_bound"] <= honest["epsilon"]
    plan = json.loads(folder.plan_file.read_text())
    plan["moments"]["noise_multiplier"] = 1e-6
    folder.plan_file.write_text(json.dumps(plan))
    assert main(command) == 2
    assert "does not do what its plan says" in capsys.readouterr().err
    caught = json.loads(folder.audit.read_text())["black_box"]
    assert caught["epsilon_lower_bound"] > 1.5 > honest["epsilon"]
