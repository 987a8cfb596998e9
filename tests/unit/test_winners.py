"""Which trials a sweep shows as its best: one, or the Pareto front of several objectives."""

import pytest
from test_report_parts import row

from core.io.files import write_json
from sweep.config.sweep import load_sweep
from sweep.results.table import best, results_table, winners
from sweep.search.asha import Asha

ROWS = [
    row("a", 0.5, 9),
    row("b", 0.9, 20),
    row("c", 0.4, 12),
    row("d", 0.9, 21),
    row("e", 0.5, 9),
    row("f", 0.7, 15),
]


def sweep(**overrides: object):
    keys = {key.replace("__", "."): value for key, value in overrides.items()}
    return load_sweep("tests/data/sweep.yaml", keys)


def test_of_one_objective_there_is_one_best():
    assert [each.trial for each in winners(sweep(), ROWS)] == ["b"]
    assert [each.trial for each in winners(sweep(objective__metric="fid_cnn"), ROWS)] == ["a"]
    assert winners(sweep(), []) == []
    assert best(sweep(), []) is None


def test_of_several_the_front_is_marked_and_one_is_named_by_a_metric():
    several = sweep(objective=["fid_cnn", "accuracy"])
    front = winners(several, ROWS)
    assert [each.trial for each in front] == ["a", "b", "e", "f"]
    named = {by: best(several, ROWS, by) for by in (None, "fid_cnn", "accuracy")}
    assert {by: each.trial for by, each in named.items() if each} == {
        None: "a",
        "fid_cnn": "a",
        "accuracy": "b",
    }
    table = results_table(several, ROWS, front, ["accuracy", "fid_cnn"], 10.0)
    starred = [cell for cell in table.columns[0].cells if str(cell).endswith(" *")]
    assert starred == ["a *", "b *", "e *", "f *"]


class Trial:
    def __init__(self, trial_id: str) -> None:
        self.trial_id = trial_id


class Told:
    """In place of the actor: what it was given."""

    def __init__(self) -> None:
        self.verdicts: list[tuple[str, float, bool]] = []
        self.give = self

    def remote(self, *verdict: object) -> None:
        self.verdicts.append(verdict)  # type: ignore[arg-type]


@pytest.mark.parametrize(("metric", "good", "bad"), [("accuracy", 0.9, 0.1), ("fid_cnn", 9, 90)])
def test_asha_judges_at_its_rungs_and_lets_trials_end_themselves(tmp_path, metric, good, bad):
    asha = sweep(scheduler="asha", objective__metric=metric, asha__grace_fraction=0.2)
    earlier = row("old", 0.5, 9, tmp_path)
    scores = {"identity": "", "metric": "", "scores": {"0.2": good, "0.4": good}}
    write_json(tmp_path / "early_scores.json", scores)
    told = Told()
    scheduler = Asha(asha, told, [earlier])
    asked = [("x", share, bad if share == 0.4 else good) for share in asha.asha.rungs[:2]]
    for name, share, score in [*asked, ("y", 0.2, bad), ("z", 0.8, bad)]:
        if name not in scheduler._trial_info:
            scheduler.on_trial_add(None, Trial(name))  # type: ignore[arg-type]
        result = {"progress": share, f"early_{metric}": score, "trial": f"our {name}"}
        assert scheduler.on_trial_result(None, Trial(name), result) == "CONTINUE"
        assert scheduler.on_trial_result(None, Trial(name), {"loss": 1.0}) == "CONTINUE"
    assert told.verdicts == [
        ("our x", 0.2, True),
        ("our x", 0.4, False),
        ("our y", 0.2, False),
        ("our z", 0.8, True),
    ]
