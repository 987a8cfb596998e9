"""The pages for readers: one is short, what they name exists, and their commands are run."""

import ast
import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from two_ranks import TINY

from core.__main__ import _parser as core_parser
from core.__main__ import main as core_main
from core.config import load, parse_overrides
from sweep.__main__ import _parser as sweep_parser
from sweep.run import main as run_main

ROOT = Path(__file__).resolve().parents[2]
NOT_OURS = {".venv", "runs", "build", ".pytest_cache"}
PAGES = [
    path for path in sorted(ROOT.rglob("*.md")) if not NOT_OURS & {*path.relative_to(ROOT).parts}
]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
PROGRAMS = ("make", "python", "ray", "kubectl", "gcloud", "aws", ".")
CLOUD = "needs an account at a cloud or a cluster; test_clusters.py checks its syntax and options"
HOURS = "needs a downloaded data set, and takes from minutes to hours"
INSTALLS = "installs into .venv, which the tests run in"
UNIT, WHOLE, SWEEPS = "tests/unit/test_", "tests/integration/test_", "tests/e2e/test_"
AFTER = WHOLE + "after_a_run.py::test_"
ANSWERS = (
    # What is typed, and the test that runs it or the reason why none does. The first that fits.
    (r"make sweep$", f"{INSTALLS}; tests/e2e/test_sweep.py runs such a sweep"),
    (r"make (test|check)$", "runs this test"),
    (r"make test-faults$", "runs tests that `make test` leaves out, as they take minutes alone"),
    (r"make mutants$", "runs the tests once for each mutant"),
    (r"make bench$", "takes ten minutes, and other tests beside it would change what it measures"),
    (r"make (ablations|methods|fashion-mnist|budget-grid) DATA=", HOURS),
    (
        r"make transfer DATA=",
        SWEEPS + "experiments.py::test_transfer_is_killed_and_runs_no_trial_twice",
    ),
    (
        r"make search-pays DATA=",
        SWEEPS + "experiments.py::test_search_pays_goes_on_after_its_slot_and_compares_all_ways",
    ),
    (r"make reproduce ", WHOLE + "methods.py::test_reproduce_goes_on_in_slots_and_adds_one_row"),
    (
        r"python tests/benchmarks/gpu.py$",
        UNIT + "benchmarks.py::test_the_gpu_script_runs_and_its_table_is_complete",
    ),
    (r"\. .venv/bin/activate$", INSTALLS),
    (
        r"python -m core init",
        UNIT + "init.py::test_nothing_is_written_until_the_owner_publishes_the_counts",
    ),
    (r"python -m core account", UNIT + "readmes.py::test_account_tells_what_each_scope_would_ask"),
    (
        r"python -m core run --config",
        UNIT + "class_names.py::test_names_go_from_the_folders_to_all_that_is_released",
    ),
    (
        r"python -m core compare",
        UNIT + "readmes.py::test_compare_trains_with_and_without_the_easy_stage",
    ),
    (r"python -m core generate", AFTER + "the_bundles_generator_draws_what_the_run_would"),
    (
        r"python -m core evaluate .*--ema-length",
        WHOLE + "training_options.py::test_a_stopped_run_ends_alike_and_can_be_averaged_afterwards",
    ),
    (
        r"python -m core evaluate",
        AFTER + "nothing_that_leaves_a_run_holds_the_digest_of_its_data",
    ),
    (r"python -m core inspect", AFTER + "the_owners_page_shows_the_nearest_real_images"),
    (
        r"python -m core release --check",
        AFTER + "an_officer_sees_what_there_is_to_know_before_signing",
    ),
    (
        r"python -m core release",
        WHOLE + "spending.py::test_the_release_holds_synthetic_images_card_and_digests_alone",
    ),
    (
        r"python -m core audit",
        WHOLE + "audit.py::test_the_command_keeps_its_bounds_and_a_bundle_holds_nothing_else",
    ),
    (
        r"python -m core ledger accept-loss",
        WHOLE + "spending.py::test_a_lost_ledger_is_accepted_by_command_and_every_card_states_it",
    ),
    (
        r"python -m core ledger restore",
        WHOLE + "durable_copy.py::test_a_lost_disk_is_restored_by_one_command",
    ),
    (r"python -m core ledger", WHOLE + "spending.py::test_the_ledger_is_shown_and_verified"),
    (
        r"python -m core prepare",
        UNIT + "published_data.py::test_prepare_says_what_to_place_where",
    ),
    (
        r"python -m core scale-down",
        UNIT
        + "scale_down.py::test_the_stand_in_keeps_noise_over_batch_and_states_its_true_epsilon",
    ),
    (
        r"python -m sweep ls",
        SWEEPS + "commands.py::test_ls_shows_every_sweep_with_its_best_and_epsilons",
    ),
    (r"python -m sweep show", SWEEPS + "commands.py::test_show_prints_the_table_of_the_sweep"),
    (
        r"python -m sweep best .*--by",
        SWEEPS + "pareto_sweep.py::test_best_asks_which_metric_counts",
    ),
    (
        r"python -m sweep best",
        SWEEPS + "commands.py::test_best_writes_a_configuration_that_the_core_accepts",
    ),
    (r"python -m sweep diff", SWEEPS + "commands.py::test_diff_names_keys_and_scores_that_differ"),
    (
        r"python -m sweep stop",
        SWEEPS + "commands.py::test_stop_interrupts_the_driver_that_holds_the_lock",
    ),
    (r"python -m sweep export", SWEEPS + "commands.py::test_export_holds_a_line_for_each_trial"),
    (r"python -m sweep report", SWEEPS + "report.py::test_the_answer_comes_first"),
    (
        r"python sweep/run.py .*--plan",
        UNIT + "limits.py::test_a_plan_says_what_is_not_measured_and_bounds_what_is",
    ),
    (
        r"python sweep/run.py .*--doctor",
        SWEEPS + "doctor.py::test_each_check_is_a_line_and_what_fails_says_what_helps",
    ),
    (
        r"python sweep/run.py --data",
        SWEEPS + "own_images.py::test_a_folder_becomes_a_bundle",
    ),
    (r"python sweep/run.py$", UNIT + "init.py::test_without_any_argument_the_quickstart_runs"),
    (r"python sweep/run.py ", SWEEPS + "sweep.py::test_table_states_scores_and_all_epsilons"),
    (
        r"python clusters/local/cluster.py -- python sweep/run.py ",
        SWEEPS + "autoscaling.py::test_a_submitted_sweep_runs_on_workers_that_come_and_go",
    ),
    (
        r"ray job submit ",
        SWEEPS + "autoscaling.py::test_a_submitted_sweep_runs_on_workers_that_come_and_go",
    ),
    (
        r"ray job stop\b",
        "tests/faults/test_killed_processes.py::test_every_trial_ends_as_if_nothing_had_happened",
    ),
    (
        r"mlflow.pyfunc.load_model",
        WHOLE + "generator.py::test_the_registered_model_is_the_same_and_registered_once",
    ),
    (
        r"(from core import|config = load|plan = make_plan|outcome = run\(|drawn = Generator)",
        WHOLE + "api.py::test_a_run_and_its_bundle_draw_what_it_was_scored_with",
    ),
    (
        r"(from sweep import|outcome = run_sweep|outcome\.trials)",
        SWEEPS + "python.py::test_python_charges_what_the_command_does_and_tells_the_same",
    ),
    (r"ray start ", "needs several machines, and changes which ports are open on this one"),
    (
        r"bash clusters/secrets.sh$",
        UNIT + "clusters.py::test_secrets_are_made_once_for_their_owner_alone",
    ),
    (
        r"(git clone|pip install|python3.11 -m venv|export|[A-Z]+=\$|echo|sed|for|done|mkdir) ?",
        CLOUD,
    ),
    (r"(docker|helm|aws|gcloud|kubectl|sky|rsync|ssh) ", CLOUD),
    (r"ray (up|down|dashboard|rsync-up|rsync-down|attach|exec)\b", CLOUD),
)


def commands() -> Iterator[str]:
    """All that the pages show to type: blocks, and quoted words that begin with a program."""
    for page in PAGES:
        text = page.read_text().replace("\\\n", " ")
        for kind, body in FENCE.findall(text):
            assert kind in ("sh", "python", "text", "mermaid"), f"{page}: ```{kind}"
            yield from typed(body) if kind in ("sh", "python") else ()
        rest = FENCE.sub("", text)
        yield from typed("\n".join(re.findall(r"^    (.*)$", rest, re.M)))
        for words in re.findall(r"`([^`]+)`", re.sub(r"^    .*$", "", rest, flags=re.M)):
            if " " in words and words.split()[0] in PROGRAMS:
                yield from typed(words)


def typed(block: str) -> Iterator[str]:
    """Lines without comments and double blanks."""
    for line in block.splitlines():
        if command := re.sub(r"\s+", " ", re.sub(r"(^|\s)#.*", "", line)).strip():
            yield command


def answer_to(command: str) -> tuple[str, str]:
    found = (answer for answer in ANSWERS if re.match(answer[0], command))
    return next(found, ("", ""))


COMMANDS = sorted({*commands()})


def test_the_first_page_is_one_page():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 180
    assert len(text.split()) <= 2_000


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_run_by_a_test_or_says_why_not(command):
    _, answer = answer_to(command)
    assert answer, f"`{command}`: add it to ANSWERS"
    if answer.startswith("tests/"):
        path, _, name = answer.partition("::")
        tree = ast.parse((ROOT / path).read_text())
        assert name in {each.name for each in tree.body if isinstance(each, ast.FunctionDef)}


def test_no_answer_is_left_over():
    assert {pattern for pattern, _ in ANSWERS} == {answer_to(each)[0] for each in COMMANDS}


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("python -m ")])
def test_arguments_and_keys_are_known(command):
    _, _, package, *arguments = shlex.split(command)
    options = {"core": core_parser, "sweep": sweep_parser}[package]().parse_args(arguments)
    assert options.command
    if package == "core" and "config" in options:
        load(ROOT / options.config, parse_overrides(options.overrides))


@pytest.mark.parametrize(
    "command", [c for c in COMMANDS if c.startswith("python sweep/run.py --config")]
)
def test_sweeps_that_are_shown_load(command, monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr("sweep.search.feasible.print_plan", lambda sweep, probe: seen.append(sweep))
    where = f"storage_path={tmp_path}"
    assert run_main([*shlex.split(command)[2:], "--plan", where]) == 0
    assert seen


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("make ")])
def test_targets_and_variables_are_those_of_the_makefile(command):
    _, target, *variables = shlex.split(command)
    makefile = (ROOT / "Makefile").read_text()
    assert re.search(rf"^{target}:", makefile, re.M)
    assert all(f"$({each.split('=')[0]})" in makefile for each in variables)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_file_names_exist(page):
    text = FENCE.sub("", page.read_text())
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if "://" in target:
            continue
        path, _, title = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), f"{target} does not exist"
        assert not title or title in titles(linked), f"{target} has no such title"
    for name in re.findall(r"`([\w./-]+)`", text):
        ours = re.fullmatch(
            r"[\w-]+/|[\w./-]+\.(py|sh|css|toml|txt)|(core|sweep|clusters|tests)/.*", name
        )
        if ours and name not in ("runs/", "trials/"):
            assert (page.parent / name).exists() or (ROOT / name).exists(), name


def titles(page: Path) -> set[str]:
    """Addresses of a page's titles, as GitHub makes them."""
    found = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text()), re.M)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in found}


def test_the_file_tree_names_every_package_in_one_line():
    (tree,) = (
        b for k, b in FENCE.findall((ROOT / "README.md").read_text()) if k == "text" and "/ " in b
    )
    named: list[str] = []
    for indent, name in re.findall(r"^( *)([\w]+)/  +\S", tree, re.M):
        depth = len(indent) // 2
        parents = named[-1].split("/")[:depth] if named else []
        named.append("/".join([*parents, name]))
    assert len(named) == len(tree.splitlines())
    there = {
        path.parent.relative_to(ROOT).as_posix()
        for top in ("core", "sweep")
        for path in (ROOT / top).rglob("__init__.py")
    }
    assert {*named} == there | {"core/configs", "sweep/configs", "clusters", "tests"}


def test_the_benchmarks_have_a_place_for_their_tables():
    folder = ROOT / "tests" / "benchmarks"
    found = re.findall(r"<!-- bench: \w+ -->", (folder / "bench.py").read_text())
    assert found == ["<!-- bench: start -->", "<!-- bench: end -->"]
    assert re.findall(r"<!-- bench: \w+ -->", (folder / "README.md").read_text()) == found


def test_account_tells_what_each_scope_would_ask(capsys):
    assert core_main(["account", "--config", "core/configs/digits.yaml"]) == 0
    told = capsys.readouterr().out
    assert all(re.search(rf"^{each} ", told, re.M) for each in ("trial", "public", "sweep"))
    assert re.search(r"^selection selection_law=geometric ", told, re.M)
    assert re.search(r"^tune_then_train num_shares=16 ", told, re.M)


def test_compare_trains_with_and_without_the_easy_stage(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config = str(ROOT / "core" / "configs" / "digits.yaml")
    pairs = [f"{key}={value}" for key, value in TINY.items()]
    pairs.append(f"runtime.cache={os.environ['FETA_SWEEP_TEST_CACHE']}")
    pairs += ["frequency.num_features=50", "frequency.num_steps=4"]
    assert core_main(["compare", "--config", config, "--methods", "moments,dp_merf", *pairs]) == 0
    told = capsys.readouterr().out
    rows = re.findall(r"^(\w+) +(0|0\.5) +(\d) +(\d) +(?:1|0\.99\d*) ", told, re.M)
    assert rows == [
        ("dp_feta", "0.5", "6", "3"),
        ("dp_feta", "0", "6", "6"),
        ("moments", "0.5", "0", "0"),
        ("dp_merf", "0.5", "0", "0"),
    ]
