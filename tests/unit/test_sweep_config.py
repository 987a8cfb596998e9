"""A sweep's file and command line: one set of keys, early errors, stable trial ids."""

from pathlib import Path

import pytest

from core.config import load, nested, short_digest, validate
from core.config.privacy import mechanisms_of
from core.config.yaml_subset import dump, parse
from core.errors import ConfigError
from core.io.files import write_json
from core.privacy.keys import MasterSecret
from core.privacy.plan.plan import make_plan
from core.privacy.plan.scopes import share_of
from sweep.config.scope import count_trials
from sweep.config.sweep import SweepConfig, dump_sweep, load_sweep
from sweep.results.claim import claim
from sweep.run import main

QUICKSTART = Path("tests/data/sweep.yaml")
QUICKSTART_FILE, NAMED = QUICKSTART.absolute(), {"runtime.ledger": "/elsewhere"}


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "sweep.yaml"
    base = Path("core/configs/digits.yaml").resolve()
    path.write_text(f"name: t\nbase: {base}\n{text}")
    return path


def test_quickstart_meets_its_promise():
    sweep = load_sweep("sweep/configs/quickstart.yaml", {})
    assert sweep.num_trials >= 8
    assert set(sweep.search_space) == {
        "central_images.num_clusters",
        "central_images.noise_multiplier",
        "stage_split",
    }
    assert sweep.trial_config({"central_images.num_clusters": 3}).uses_moments


def test_keys_of_sweep_and_run_stand_side_by_side():
    sweep = load_sweep(
        QUICKSTART,
        {
            "num_trials": 7,
            "objective.metric": "fid_cnn",
            "objective.direction": "minimize",
            "training.num_steps": 40,
            "search_space.stage_split.high": 0.5,
            "search_space.private_training.learning_rate.low": 1e-4,
            "search_space.private_training.learning_rate.high": 1e-2,
        },
    )
    assert sweep.num_trials == 7
    assert sweep.objective.metric == "fid_cnn"
    assert sweep.fixed["training.num_steps"] == 40
    assert sweep.search_space["stage_split"].high == 0.5
    assert sweep.search_space["private_training.learning_rate"].low == 1e-4
    config = sweep.trial_config({"stage_split": 0.25})
    assert config.training.num_steps == 40
    assert config.stage_split == 0.25
    assert dump_sweep(sweep)["base"]["training"]["num_steps"] == 40


def test_dotted_and_nested_search_spaces_mean_the_same(tmp_path):
    dotted = "search_space:\n  central_images.per_class:\n    low: 1\n    high: 9\n"
    nested = "search_space:\n  central_images:\n    per_class:\n      low: 1\n      high: 9\n"
    first = load_sweep(written(tmp_path, dotted), {})
    assert load_sweep(written(tmp_path, nested), {}) == first


SPLIT, COUNT = "search_space.stage_split", "search_space.central_images.per_class"
CHOICES = {f"{SPLIT}.low": None, f"{SPLIT}.high": None}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"num_trails": 3}, r"unknown key 'num_trails'; did you mean 'num_trials'"),
        ({"stage_spilt": 0.1}, r"did you mean 'stage_split'"),
        ({"num_trials": 0}, r"num_trials=0 .*integer in \[1"),
        ({"num_trials": 10**9}, r"num_trials=1000000000 .*integer in \[1, 100000\]"),
        ({"stage_split": 0.3}, r"'stage_split' stands both in search_space and in fixed"),
        ({"search_space.stage_split.high": 1.5}, r"stage_split=1\.5"),
        ({f"{SPLIT}.low": 0.9}, rf"{SPLIT} has low=0\.9, high=0\.8, .* low must not exceed high"),
        ({f"{SPLIT}.log": True}, rf"{SPLIT} has low=0, .*log=true: .* positive with log=true"),
        (
            {f"{SPLIT}.low": None},
            rf"{SPLIT} has low=None, high=0\.8: give low and high, or choices",
        ),
        ({f"{SPLIT}.choices": [0.1]}, rf"{SPLIT} has .*choices=.*and null for the others"),
        (CHOICES | {f"{SPLIT}.choices": []}, rf"{SPLIT}\.choices is empty: list at least one"),
        (CHOICES | {f"{SPLIT}.choices": 3}, rf"{SPLIT}\.choices=3 .*; allowed: list of integer or"),
        (
            CHOICES | {f"{SPLIT}.choices": [0.1, "a"]},
            r"stage_split='a' .*finite number in \[0, 1\)",
        ),
        (CHOICES | {f"{SPLIT}.choices": [0.1, None]}, rf"{SPLIT}\.choices=None .*; allowed: list"),
        ({f"{SPLIT}.low": "abc"}, rf"{SPLIT}\.low='abc' .*; allowed: integer or finite number"),
        ({f"{SPLIT}.step": 0}, rf"{SPLIT}\.step=0 .*; allowed: finite number in \(0, inf\)"),
        ({f"{COUNT}.step": 2}, rf"{COUNT} has both log=true and step=2: leave one out"),
        ({f"{COUNT}.log": False, f"{COUNT}.step": 0.5}, rf"{COUNT}\.step=0\.5 must be a whole"),
        ({"search_space.method.low": 1, "search_space.method.high": 2}, r"method is not numeric"),
        ({SPLIT: [0.1, 0.2]}, rf"{SPLIT}=.* is no part of a search space: give search_space\.KEY"),
        ({f"{SPLIT}.nope": 1}, rf"{SPLIT}\.nope=1 is no part of a search space"),
        ({"search_space": 3}, r"search_space=3 is no part of a search space"),
        (
            {"search_space.stage_splt.low": 0.9, "search_space.stage_splt.high": 0.9},
            r"search_space: unknown key 'stage_splt'; did you mean 'stage_split'",
        ),
        ({"objective.direction": "minimize"}, r"would search for the worst accuracy"),
        ({"objective.metric": "loss"}, r"'accuracy', 'dp_accuracy', 'fid', 'fid_cnn'"),
        (
            {"objective.metric": "kid", "objective.direction": "minimize"},
            r"'kid' is not what evaluation\.fid_extractor='cnn' scores: choose 'kid_cnn'",
        ),
        (
            {"name": "../elsewhere"},
            r"name='\.\./elsewhere' .*; allowed: text that matches \^\[A-Za-z0-9\]",
        ),
        ({"name": "x" * 300}, r"name='x{80,}\.\.\. is out of range"),
        ({"name": "ledger"}, r"'.*runs/ledger' holds something else: choose another name"),
        ({"name": "mlflow.db"}, r"holds something else"),
        ({"storage_path": "a\udcff"}, r"storage_path='.*\\udcff' is not text in UTF-8"),
        ({"experiment": ""}, r"experiment='' .*; allowed: text that matches \^\.\{1,500\}"),
        ({"runtime.cache": "a\udcff"}, r"runtime\.cache='a\\udcff' is not text in UTF-8"),
        ({"dataset.path": "a\udcff"}, r"dataset\.path='a\\udcff' is not text in UTF-8"),
        ({"asha": 3}, r"asha=3 .*; allowed: a section with grace_fraction, reduction_factor"),
        ({"final": 3}, r"final=3 is a section: give its dotted keys one by one"),
        ({"privacy.target_epsilon": -1}, r"privacy\.target_epsilon=-1"),
        ({"base": "nowhere.yaml"}, r"no configuration file at '.*nowhere\.yaml'"),
    ],
)
def test_errors_name_key_and_remedy(overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_sweep(QUICKSTART, overrides)


def test_the_same_point_has_the_same_id_and_another_another():
    sweep = load_sweep(QUICKSTART, {})
    first = short_digest(sweep.trial_config({"stage_split": 0.25}))
    assert first == short_digest(sweep.trial_config({"stage_split": 0.25}))
    assert first != short_digest(sweep.trial_config({"stage_split": 0.5}))


SELECTION = {
    "privacy.scope": "selection",
    "privacy.dp_accuracy_stddev": 50,
    "objective.metric": "dp_accuracy",
    "sampler": "random",
    "num_trials": None,
}
SWEEP = {**SELECTION, "privacy.scope": "sweep", "sampler": "tpe", "num_trials": 4}
PUBLIC = {"privacy.scope": "public", "dataset.public": True, "final.dataset.path": "secret"}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (SWEEP | {"objective.metric": "accuracy"}, r"scope='sweep' cannot choose by .*'accuracy'"),
        (SELECTION | {"objective.metric": "accuracy"}, r"scope='selection' cannot choose by"),
        (SWEEP | {"privacy.dp_accuracy_stddev": None}, r"set privacy\.dp_accuracy_stddev"),
        (
            SELECTION | {"sampler": "tpe"},
            r"is not proven for sampler='tpe', which learns from results: set sampler=random",
        ),
        (SELECTION | {"num_trials": 16}, r"num_trials=16 is not allowed .* fixed number of trials"),
        (SELECTION | {"privacy.data_set_budget": 30}, r"data_set_budget cannot be combined"),
        (SWEEP | {"privacy.adaptive": False}, r"privacy\.adaptive=False contradicts sampler='tpe'"),
        (
            SWEEP | {"search_space.privacy.target_epsilon.choices": [1, 10]},
            r"search_space\.privacy\.target_epsilon cannot be searched",
        ),
        ({"privacy.scope": "public"}, r"'public' and final belong together"),
        ({"final.dataset.path": "secret"}, r"'public' and final belong together"),
        (PUBLIC | {"dataset.public": False}, r"set dataset\.public=true"),
        (PUBLIC | {"final.dataset.public": True}, r"the final run is on the sensitive data"),
        (
            PUBLIC | {"final.privacy.scope": "trial"},
            r"final\.privacy\.scope='trial': .* leave it out",
        ),
        (SELECTION | {"seed": 3}, r"seed cannot be fixed or searched"),
        (SELECTION | {"search_space.seed.choices": [0, 1]}, r"seed cannot be fixed or searched"),
        (
            {"search_space.privacy.scope.choices": ["trial", "selection"]},
            r"search_space\.privacy\.scope cannot be searched",
        ),
        (
            {"search_space.runtime.ledger.choices": ["runs/a", "runs/b"]},
            r"search_space\.runtime\.ledger cannot be searched",
        ),
        ({"search_space.dataset.family.choices": ["a", "b"]}, r"family cannot be searched"),
        ({"search_space.privacy.num_shares.choices": [1, 2]}, r"num_shares cannot be searched"),
        (PUBLIC | {"final.dataset.pth": "x"}, r"unknown key 'dataset.pth'"),
        (
            SELECTION | {"scheduler": "asha"},
            r"is not proven for scheduler='asha', which stops trials by their results: set "
            r"scheduler=none",
        ),
        (
            SELECTION | {"objective": ["dp_accuracy", "fid_cnn"]},
            r"needs one score: give one objective, not dp_accuracy, fid_cnn",
        ),
        (
            SWEEP | {"objective": ["dp_accuracy", "fid_cnn"]},
            r"cannot choose by objective\.metric='fid_cnn'",
        ),
        (
            SWEEP | {"scheduler": "asha", "early_scores.metric": "accuracy"},
            r"early_scores\.metric=accuracy contradicts .* need dp_accuracy: leave it out",
        ),
        (
            {"search_space.early_scores.num_images.choices": [100, 200]},
            r"search_space\.early_scores\.num_images cannot be searched",
        ),
    ],
)
def test_searches_that_would_make_a_scope_a_false_claim_are_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_sweep(QUICKSTART, overrides)


def test_several_objectives_are_a_list_of_metrics(tmp_path):
    metrics = ("fid_cnn", "accuracy")
    sweep = load_sweep(QUICKSTART, {"objective": list(metrics), "sampler": "nsga2"})
    assert [(each.metric, each.direction) for each in sweep.objectives] == [
        ("fid_cnn", "minimize"),
        ("accuracy", "maximize"),
    ]
    stored = dump_sweep(sweep)
    assert validate(SweepConfig, stored).objectives == sweep.objectives
    for word in ("fid_cnn", ["fid_cnn"], [{"metric": "fid_cnn"}]):
        one = load_sweep(QUICKSTART, {"objective": word})
        assert one.objectives == sweep.objectives[:1]
    text = (
        "objective: [fid_cnn, accuracy]\nsearch_space:\n  stage_split:\n    choices: [0.1, 0.2]\n"
    )
    assert load_sweep(written(tmp_path, text), {}).objectives == sweep.objectives


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"objective": ["accuracy", "accuracy"]}, r"names a metric twice"),
        ({"objective": ["accuracy", "loss"]}, r"objective='loss' is none of accuracy, dp_accuracy"),
        (
            {"objective": "loss"},
            r"objective='loss' is none of .*: name one, or several as \[fid_cnn",
        ),
        ({"objective": 3}, r"objective=3 is none of accuracy"),
        ({"objective": None}, r"objective=None is none of accuracy"),
        ({"objective": []}, r"objective=\[\] is none of accuracy"),
        ({"objective": [["accuracy"]]}, r"objective=\['accuracy'\] is none of accuracy"),
        ({"further_objectives": 3}, r"further_objectives=3 .*; allowed: list of a section with"),
        ({"objective": ["fid", "accuracy"]}, r"is not what .*='cnn' scores: choose 'fid_cnn'"),
        ({"objective": ["fid_cnn", "accuracy"], "scheduler": "asha"}, r"compares trials by one"),
        ({"scheduler": "asha", "asha.grace_fraction": 1.0}, r"asha\.grace_fraction=1\.0"),
        ({"scheduler": "asha", "replicates": 2}, r"replicates=2 cannot .*='asha'.*scheduler=none"),
        ({"replicates": 2, "search_space.seed.choices": [0, 1]}, r"set replicates=1"),
        (SELECTION | {"replicates": 2}, r"set replicates=1"),
        ({"scheduler": "asha", "asha.grace": 0.5}, r"did you mean 'asha\.grace_fraction'"),
        ({"scheduler": "asha", "early_scores.at": [0.3]}, r"early_scores\.at=\[0\.3\] contradicts"),
        ({"scheduler": "asha", "training.num_steps": 2}, r"must ascend and name different steps"),
    ],
)
def test_searches_that_make_no_sense_are_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_sweep(QUICKSTART, overrides)


def test_a_scheduler_asks_for_scores_during_training_and_a_plan_pays_for_private_ones():
    asha = {"scheduler": "asha", "asha.grace_fraction": 0.2, "asha.reduction_factor": 2}
    run = load_sweep(QUICKSTART, asha).run
    assert run.early_scores.at == (0.2, 0.4, 0.8)
    assert run.early_metric == "early_accuracy"
    assert load_sweep(QUICKSTART, {"objective.metric": "fid_cnn", **asha}).run.early_metric == (
        "early_fid_cnn"
    )
    shared = load_sweep(QUICKSTART, SWEEP | asha)
    plan = make_plan(shared.run)
    assert plan.score is not None
    assert plan.score.num_releases == 4
    assert plan.tag("early_dp_accuracy").startswith("dp(")
    once = make_plan(load_sweep(QUICKSTART, SWEEP).run)
    assert plan.noise_multiplier > once.noise_multiplier


def test_a_scope_decides_what_its_trials_share():
    sweep = load_sweep(QUICKSTART, SWEEP)
    assert sweep.run.privacy.num_shares == 4
    assert sweep.run.privacy.adaptive
    drawn = load_sweep(QUICKSTART, SWEEP | {"sampler": "random", "privacy.num_shares": 6})
    assert drawn.run.privacy.num_shares == 6
    assert not drawn.run.privacy.adaptive
    public = load_sweep(QUICKSTART, PUBLIC)
    assert public.final == {"dataset.path": "secret"}
    assert public.run.dataset.public


def test_every_trial_of_a_selection_has_the_one_reference_that_the_sweep_fixed():
    sweep = load_sweep(QUICKSTART, SELECTION)
    score, dp_sgd = mechanisms_of(sweep.run.privacy.selection_reference)
    assert score == (1.0, SELECTION["privacy.dp_accuracy_stddev"], 1)
    # The end of the space with the most steps of DP-SGD: no easy stage, so no central images.
    assert dp_sgd[2] == sweep.run.training.num_steps
    for split in (0.0, 0.3, 0.8):
        trial = sweep.trial_config({"stage_split": split, "central_images.per_class": 2})
        assert trial.privacy.selection_reference == sweep.run.privacy.selection_reference
        assert share_of(trial.privacy) == share_of(sweep.run.privacy)
        again = load(nested(trial), {})
        assert again.privacy == trial.privacy
        assert parse(dump(nested(trial)))["privacy"]["selection_reference"] == list(
            trial.privacy.selection_reference
        )
    given = {"privacy.selection_reference": sweep.run.privacy.selection_reference}
    assert load_sweep(QUICKSTART, SELECTION | given).run.privacy == sweep.run.privacy
    with pytest.raises(ConfigError, match=r"must hold a sample rate in \(0, 1\]"):
        load_sweep(QUICKSTART, SELECTION | {"privacy.selection_reference": [0.5, 2.0]})


def test_the_secret_number_of_trials_is_that_of_the_sweep_and_its_secret():
    sweep = load_sweep(QUICKSTART, SELECTION)
    assert sweep.search_space["seed"].high == 2**31 - 1
    one, other = MasterSecret(b"1" * 32), MasterSecret(b"2" * 32)

    def numbers(master: MasterSecret) -> list[int]:
        return [count_trials(sweep.run, None, master, str(i)) for i in range(40)]

    assert numbers(one) == numbers(one)
    assert numbers(one) != numbers(other)
    assert min(numbers(one)) == 1 < max(numbers(one))
    assert count_trials(load_sweep(QUICKSTART, SWEEP).run, 4, one, "0") == 4


def test_a_sweep_keeps_its_ledger(tmp_path):
    keys = {"storage_path": str(tmp_path)}
    claim(load_sweep(QUICKSTART, keys))
    write_json(tmp_path / "quickstart" / "trials" / "a" / "identity.json", {})  # Which is charged.
    claim(load_sweep(QUICKSTART, keys | {"runtime.log_every": 7}))
    with pytest.raises(ConfigError, match=r"base\.runtime\.ledger: .* -> elsewhere"):
        claim(load_sweep(QUICKSTART, keys | {"runtime.ledger": "elsewhere"}))


@pytest.mark.parametrize("cluster", [False, True])
def test_the_default_ledger_is_one_that_all_machines_see(tmp_path, monkeypatch, cluster):
    """On one machine that of all runs there; on a cluster it lies in the storage folder."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if cluster:
        monkeypatch.setenv("RAY_ADDRESS", "auto")
    found = {}
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        sweep = load_sweep(QUICKSTART_FILE, {"storage_path": str(tmp_path / "runs")})
        monkeypatch.chdir(tmp_path / folder)
        claim(sweep)
        found[folder] = sweep.trial_config({}).runtime.ledger
    expected = tmp_path / ("runs" if cluster else "data/feta-sweep") / "ledger"
    assert set(found.values()) == {str(expected)}
    named = load_sweep(QUICKSTART_FILE, {"storage_path": str(tmp_path / "s"), **NAMED})
    assert named.trial_config({}).runtime.ledger == "/elsewhere"


def test_files_of_other_kinds_are_refused(tmp_path):
    path = tmp_path / "sweep.yaml"
    space = "search_space:\n  stage_split:\n    low: 0\n    high: 0.5\n"
    for content, message in {
        b"": r"is no sweep, as it has neither base nor search_space",
        Path("core/configs/digits.yaml").read_bytes(): r"train alone by python -m core run",
        "name: \u00e4".encode("latin-1"): r"is not text in UTF-8 .*: save it as such",
        f"name: t\nbase: x\nfixed: [1]\n{space}".encode(): r"fixed=\[1\] must be a section",
        b"name: t\nbase: x\nsearch_space: word\n": r"search_space='word' must be a section",
        b"base: x\nsearch_space:\n\tseed: 3\n": r"line 3: .*indented by blanks, .*\\tseed",
        b"base: x\nobjective:\n  - fid\n": r"line 3: .*with lists as \[a, b\]; found '  - fid'",
    }.items():
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=message):
            load_sweep(path, {})
    marked = written(tmp_path, space)  # As some editors begin each file.
    marked.write_bytes(b"\xef\xbb\xbf" + marked.read_bytes())
    assert load_sweep(marked, {}).name == "t"


def test_a_home_folder_is_found_and_the_empty_name_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    sweep = load_sweep(QUICKSTART, {"storage_path": "~/runs", "runtime.ledger": "~/ledger"})
    assert sweep.storage_path == f"{tmp_path}/runs"
    assert sweep.trial_config({}).runtime.ledger == f"{tmp_path}/ledger"
    assert main(["--config", str(QUICKSTART), "--plan", "--name", ""]) == 2
    assert "name='' is out of range" in capsys.readouterr().err
